"""The builders by name, and the description of an engine that any of them built."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any, cast

from trtq.backends import tensorrt_rtx
from trtq.backends.interface import Builder, find_gpu
from trtq.backends.record import read_record
from trtq.errors import InputError
from trtq.files import PathLike, first_bytes

BUILDERS = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Name of a builder -> the Python package it needs and the module of `trtq.backends` that drives it."""

NO_ENGINE = "none"
"""Stands for no builder, where a job quantizes and gates without an engine."""


def chosen(name: str | None = None) -> str:
    """`name`, or without one the builder whose engines run here.

    That is the one that is installed, and of both TensorRT for RTX, which builds on any machine; unless there
    is a GPU here that it does not support.

    Raises:
        InputError: there is no builder of that name, or it is `NO_ENGINE`.
    """
    if name == NO_ENGINE:
        raise InputError("--backend none builds no engine", remedy="leave --backend out, or deploy with it")
    if name is not None and name not in BUILDERS:
        raise InputError(f"there is no backend '{name}'", remedy=f"choose among {', '.join(BUILDERS)}")
    if name is not None:
        return name
    installed = [n for n, package in BUILDERS.items() if importlib.util.find_spec(package)]
    gpu = find_gpu() if len(installed) > 1 else None
    if gpu is not None and not tensorrt_rtx.runs_on(gpu.compute_capability):
        return "tensorrt"
    return installed[0] if installed else tensorrt_rtx.NAME


def runs_on(name: str, capability: str) -> bool:
    """Whether engines of a builder run on GPUs of a compute capability such as "8.6".

    Where TensorRT for RTX is not installed, nothing tells, and the builder will say what is missing.
    """
    rtx = name == tensorrt_rtx.NAME and importlib.util.find_spec(BUILDERS[name]) is not None
    return not rtx or tensorrt_rtx.runs_on(capability)


def builder(name: str | None = None) -> Builder:
    """The builder that `chosen` gives.

    Raises:
        InputError: as `chosen`.
    """
    name = chosen(name)
    return cast(Builder, importlib.import_module(f"trtq.backends.{BUILDERS[name]}"))


def describe_engine(path: PathLike) -> dict[str, Any]:
    """What an engine is, without loading it: `describe_plan` for RTX; for TensorRT what its record says.

    Returns:
        As `trtq.backends.tensorrt_rtx.describe_plan`, and `backend`.

    Raises:
        InputError: missing, damaged, or neither a plan of RTX nor one with a record beside it.
    """
    path = Path(path)
    record = None if tensorrt_rtx.is_plan(first_bytes(path, 64)) else read_record(path)
    if record is None:
        return {"backend": tensorrt_rtx.NAME, **tensorrt_rtx.describe_plan(path)}
    return {
        "backend": record["builder"],
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": record["engine_sha256"],
        "version": record["version"],
        "targets": record["targets"],
        "build": record,
    }


def package_of(engine: Path) -> str:
    """The Python package that runs an engine (see `engine_package`).

    Raises:
        InputError: the file cannot be read.
    """
    return engine_package(first_bytes(engine, 64))


def engine_package(content: bytes) -> str:
    """The Python package that runs a plan with these first bytes: `tensorrt_rtx` or `tensorrt`."""
    return "tensorrt_rtx" if tensorrt_rtx.is_plan(content) else "tensorrt"
