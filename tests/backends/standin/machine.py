"""Checks on what seems a machine with a GPU: the driver is `driver.cpp`, TensorRT is `standin.py`.

Driver and modules take the places of the real ones when a process starts, so what uses them runs in one of
its own (`run_checks`). The GPU's memory is had through NVIDIA's cuda-bindings, which are the real ones.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run_checks(checks: str, folder: Path, *, tensorrt: bool = True, **environment: str) -> None:
    """Run the tests in the file `checks` of this folder; fail if they fail.

    Skips where there are no cuda-bindings or no C++ compiler.

    Args:
        folder: for the compiled driver.
        tensorrt: the stand-ins for TensorRT are there, too; without them what is installed is.
    """
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        pytest.skip("cuda-bindings are not installed")
    modules = [str(HERE / "modules")] if tensorrt else []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*modules, str(HERE), *sys.path]),
        "LD_LIBRARY_PATH": str(driver(folder)),
        "TRTQ_STANDIN_GPU": "1",
        "CUDA_VISIBLE_DEVICES": "0",
        **environment,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / checks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"on the stand-in GPU:\n{done.stdout}\n{done.stderr}", pytrace=False)


def driver(folder: Path) -> Path:
    """`folder`, with the stand-ins for the driver and NVML under the names by which they are loaded."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler for the stand-in driver")
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    for source, library in (("driver.cpp", "libcuda.so.1"), ("nvml.cpp", "libnvidia-ml.so.1")):
        command = [compiler, *options, str(HERE / source), "-o", str(folder / library), "-ldl"]
        subprocess.run(command, check=True)
    return folder
