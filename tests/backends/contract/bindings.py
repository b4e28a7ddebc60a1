"""NVIDIA's own Python bindings of several TensorRT versions, with libraries compiled from `stub.cpp`.

The bindings' wheels install without TensorRT; two versions cannot be in one process, so what uses them runs
in a process of its own (`run_checks`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent

PACKAGES = {
    "8.6.1": "tensorrt_bindings==8.6.1",
    "10.0.1": "tensorrt_cu12_bindings==10.0.1",
    "10.3.0": "tensorrt_cu12_bindings==10.3.0",
    "10.8.0": "tensorrt_cu12_bindings==10.8.0.43",
    "10.16.1": "tensorrt_cu13_bindings==10.16.1.11",
    "11.4.0": "tensorrt_cu13_bindings==11.4.0.106",
}
"""Version -> the wheel with its module `tensorrt_bindings`."""

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvparsers")


def run_checks(checks: str, version: str, downloads: Path, libraries: Path) -> None:
    """Run the tests in the file `checks` of this folder with the bindings of `version`; fail if they fail.

    Skips where the wheel cannot be had, or there is no C++ compiler.

    Args:
        downloads: folder that keeps the wheels' contents.
        libraries: folder for the compiled libraries.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_bindings(version, downloads)), *sys.path]),
        "LD_LIBRARY_PATH": str(_libraries(version, libraries)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / checks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"with the bindings of TensorRT {version}:\n{done.stdout}\n{done.stderr}", pytrace=False)


def _bindings(version: str, downloads: Path) -> Path:
    """The folder with the module `tensorrt_bindings`, installed by pip if it is not there yet."""
    target = downloads / f"{version}-{sys.implementation.cache_tag}"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(dir=downloads) as temporary:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "1", "--timeout", "30"]
        wheel = ["--no-deps", "--target", f"{temporary}/bindings", PACKAGES[version]]
        done = subprocess.run([*install, *wheel], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot install {PACKAGES[version]}: {done.stderr.strip().splitlines()[-1]}")
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(f"{temporary}/bindings", target)
    return target


def _libraries(version: str, folder: Path) -> Path:
    """`folder`, with the stub library under the names that the bindings of `version` link to."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler for the stub libraries")
    major = version.split(".")[0]
    first, *others = (folder / f"lib{name}.so.{major}" for name in LIBRARIES)
    options = ["-std=c++14", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(
        [compiler, *options, f"-DTENSORRT_MAJOR={major}", str(HERE / "stub.cpp"), "-o", str(first)],
        check=True,
    )
    for other in others:
        other.symlink_to(first.name)
    return folder
