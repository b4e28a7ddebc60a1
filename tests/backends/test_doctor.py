"""The doctor's findings, against what Python and the packages say themselves."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numba
import numpy
import onnx
import onnxruntime
import PIL
import pytest

from trtq.backends import doctor
from trtq.backends.interface import Gpu
from trtq.backends.tensorrt_rtx import supported_targets

has_rtx = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(not has_rtx, reason="TensorRT for RTX is not installed")


def with_packages(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    """As if some packages were there in these versions, or not (None)."""
    real = doctor.installed_version
    monkeypatch.setattr(
        doctor,
        "installed_version",
        lambda module: versions[module] if module in versions else real(module),
    )


def findings() -> dict[str, doctor.Finding]:
    return {check.name: check for check in doctor.diagnose()}


def test_versions_are_those_of_the_modules() -> None:
    found = findings()
    for module in (numpy, onnx, onnxruntime, numba):
        assert found[module.__name__].detail == module.__version__
    for name in doctor.OPTIONAL:
        top = name.split(".")[0]
        there = importlib.util.find_spec(top) is not None and importlib.util.find_spec(name) is not None
        assert found[name].ok == there


def test_a_package_may_be_called_otherwise() -> None:
    assert doctor.installed_version("PIL") == PIL.__version__


def test_a_module_without_metadata_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bare_module.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.installed_version("bare_module") == "version unknown"
    assert doctor.installed_version("no_such_module") is None
    assert doctor.installed_version("no_such_package.part") is None


def test_python_3_10_does_not_know_whose_a_module_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """There only packages with a top_level.txt are known."""
    monkeypatch.setattr(doctor, "packages_distributions", dict)
    assert doctor.installed_version("numpy") == numpy.__version__


def test_large_packages_are_not_imported() -> None:
    code = (
        "import sys, trtq.backends.doctor; trtq.backends.doctor.diagnose(); "
        "print({'torch', 'numba', 'polygraphy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_what_works_on_this_machine() -> None:
    found = findings()
    assert not found["gpu"].ok
    assert "CPUExecutionProvider" in found["simulate INT8"].detail
    assert found["gate"].ok
    assert not found["run engines"].ok
    assert "GPU" in found["run engines"].remedy
    assert "simulation" in found["gate"].detail


@needs_rtx
def test_a_builder_was_created() -> None:
    check = findings()["build engines"]
    assert check.ok
    assert ", ".join(supported_targets()) in check.detail


@needs_rtx
@pytest.mark.parametrize(
    ("capability", "runs"), [("8.6", True), ("9.0", False), ("10.0", False), ("13.0", True)]
)
def test_engines_run_on_gpus_that_the_package_supports(
    capability: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT runs on both")
    monkeypatch.setattr(doctor, "find_gpu", lambda: Gpu("Some GPU", capability))
    with_packages(monkeypatch, {"cuda.bindings": "13.5.0"})
    found = findings()
    assert found["gpu"].detail == f"Some GPU, compute capability {capability}"
    assert found["run engines"].ok == runs
    assert ("engine" if runs else "simulation") in found["gate"].detail
    if not runs:
        assert capability in found["run engines"].detail


@needs_rtx
def test_engines_need_device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_gpu", lambda: Gpu("Some GPU", "8.6"))
    with_packages(monkeypatch, {"cuda.bindings": None, "pycuda": None})
    found = findings()["run engines"]
    assert not found.ok
    assert "cuda.bindings" in found.detail
    assert found.remedy == "pip install 'trtq[cuda]'"


@needs_rtx
def test_a_broken_installation_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt_rtx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)  # as Python marks a module that cannot be imported
    found = findings()
    assert "does not work" in found["build engines"].detail
    assert "does not import" in found["simulate INT8"].detail
    assert found["gate"].ok == found["run engines"].ok


def test_text_is_aligned() -> None:
    checks = [
        doctor.Finding("One", "a", True, "1.0"),
        doctor.Finding("One", "longer", False, "not installed", "install it"),
        doctor.Finding("Two", "b", True, "fine"),
    ]
    assert doctor.as_text(checks).splitlines() == [
        "One",
        "  ok  a       1.0",
        "  --  longer  not installed",
        "              remedy: install it",
        "",
        "Two",
        "  ok  b       fine",
    ]
