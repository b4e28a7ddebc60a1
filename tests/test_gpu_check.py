"""tools/gpu_check.py prepares what it takes along, and runs everywhere and says what it could not do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "gpu_check.py"


def script(*arguments: object, cache: Path) -> None:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, "TRTQ_CACHE": str(cache)})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    folder = tmp_path_factory.mktemp("check") / "prepared"
    script("--prepare", folder, cache=folder.parent / "cache")
    return folder


@pytest.mark.slow
def test_what_is_taken_along_is_small_and_whole(prepared: Path) -> None:
    archive = prepared.with_name("prepared.tar.xz")
    assert archive.stat().st_size < 2_000_000
    demo = prepared / "demo"
    for precision in ("fp32", "fp16", "int8", "int8-fp16"):
        assert (demo / f"{precision}.onnx").exists()
        assert (demo / f"{precision}.default.plan").exists()
    assert (demo / "int8.8.9.plan").exists()


@pytest.mark.slow
def test_sums_of_the_simulation_are_those_of_the_integers(prepared: Path) -> None:
    with np.load(prepared / "demo" / "products.npz") as stored:
        count = sum(name.startswith("a") for name in stored.files)
        assert count > 3
        for i in range(count):
            a, b = (stored[f"{part}{i}"].astype(np.int64) for part in "ab")
            np.testing.assert_array_equal(a @ b, stored[f"c{i}"])
            assert stored[f"off{i}"] < 32  # sums of hundreds of products, each rounded to float32
            assert np.abs(stored[f"c{i}"]).max() > 1000


@pytest.mark.slow
def test_steps_are_run_or_skipped_with_a_reason(prepared: Path, tmp_path: Path) -> None:
    archive = prepared.with_name("prepared.tar.xz")
    only = ("environment", "memory", "loading", "gate", "products", "simulation")
    words = [argument for word in only for argument in ("--only", word)]
    script("--run", archive, "-o", tmp_path / "out", *words, cache=tmp_path / "cache")
    report = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert report["environment"]["ok"]
    assert report["simulation demo"]["result"]["int8"]["logits"]["equal"]
    assert not [name for name, step in report.items() if step["ok"] is False]
    assert report["environment"]["result"]["gpu"] is None
    assert report["loading demo"]["skipped"] == "there is no GPU"
    assert "PyTorch" in report["integer products demo"]["skipped"]


@pytest.mark.slow
def test_a_step_that_hangs_is_stopped(prepared: Path, tmp_path: Path) -> None:
    script("--run", prepared, "-o", tmp_path, "--only", "simulation", "--limit", "0.1", cache=tmp_path)
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["simulation demo"]["ok"] is False
    assert report["simulation demo"]["exit"] == "stopped after 0.1 s"
