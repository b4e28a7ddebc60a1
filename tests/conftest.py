"""What end-to-end tests share: a cache of their own, and jobs that several of them look at."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import Case, Deployed, Run, conv_case, trtq_command

SLOW_FIXTURES = {"zoo", "pool"}
"""Trained models, and processes that import everything anew."""


def pytest_configure(config: pytest.Config) -> None:
    """Each of several workers takes one processor. No test sees a GPU but those marked `gpu`, since what a
    job decides depends on the machine it runs on, and those that have a stand-in for one (`standin.machine`).
    """
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the workers, which are yet to start
    if config.getoption("markexpr") != "gpu" and "TRTQ_STANDIN_GPU" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a slow fixture; others are marked where they stand."""
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def trtq_run() -> Callable[..., Run]:
    return trtq_command


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def gpu_for_rtx() -> None:
    """A GPU that engines of TensorRT for RTX run on."""
    from trtq.backends.builders import runs_on
    from trtq.backends.interface import find_gpu

    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    gpu = find_gpu()
    if gpu is None or not runs_on("tensorrt-rtx", gpu.compute_capability):
        pytest.skip(f"TensorRT for RTX runs no engines on {gpu.name if gpu else 'this machine'}")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """`trtq demo`, run once for all tests that only look at it."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    root = tmp_path_factory.mktemp("demo")
    folder, cache = root / "out", root / "cache"
    return Deployed(folder, cache, trtq_command("demo", "-o", folder, "--cache", cache))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Conv, Relu, pooling and a MatMul; any batch size."""
    return conv_case(tmp_path_factory.mktemp("small"), "N")


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of trained models (environment variable TRTQ_ZOO)."""
    folder = Path(os.environ.get("TRTQ_ZOO", Path(__file__).parents[2] / "shared" / "zoo"))
    if not folder.is_dir():
        pytest.skip(f"no model zoo: set TRTQ_ZOO (looked in {folder.name})")
    return folder
