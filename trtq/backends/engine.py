"""Engines over rows, on the GPU, in Polygraphy's runner; and what engines and ONNX models are both asked."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trtq.backends.builders import package_of
from trtq.backends.interface import Gpu, find_gpu
from trtq.backends.network import load_plugins, logger
from trtq.data.batches import Arrays, Batch, batches
from trtq.data.samples import InputSpec, Samples
from trtq.errors import InputError, MissingBackendError
from trtq.graph.model import load_model
from trtq.simulation.outputs import BatchLimits, Outputs, gathered, rows_for
from trtq.simulation.rows import naming_rows
from trtq.simulation.session import simulation_fingerprint

ENGINE_SUFFIXES = (".plan", ".engine")


def is_engine(model: str | Path) -> bool:
    """Whether a file is an engine, by its name."""
    return Path(model).suffix in ENGINE_SUFFIXES


def run_engine(
    engine: str | Path,
    samples: Samples,
    *,
    batch_size: int | None = None,
    progress: Callable[[int], object] | None = None,
    plugins: Sequence[str] = (),
) -> Outputs:
    """The outputs of an engine on every row of `samples`.

    Args:
        batch_size: rows at once; None: as many as its first optimization profile takes.
        progress: called with the number of rows just done.
        plugins: libraries of TensorRT plugins.

    Raises:
        InputError: the engine does not load, does not take these inputs or this batch size, or has outputs
            that cannot be put together row by row.
        MissingBackendError: no GPU, driver or TensorRT here.
    """
    if len(samples) == 0:
        raise InputError("the data has no rows")
    with _polygraphy_errors(engine), engine_runner(Path(engine), plugins) as runner:
        inputs = list(runner.get_input_metadata(use_numpy_dtypes=False))
        limits = _profile_limits(runner.engine, inputs)
        rows = rows_for(inputs, samples, engine)
        parts = batches(rows, limits.size(batch_size, engine), limits.lowest)

        def run(batch: Batch) -> Arrays:
            with naming_rows(runner.infer, batch, samples, str(engine)):
                found: Arrays = runner.infer(batch.feed)
                return found

        return Outputs(gathered(run, parts, len(samples), engine, progress), "engine")


def input_specs(models: Sequence[str | Path]) -> list[InputSpec]:
    """The inputs of the first ONNX model among `models`; of the first engine where all are engines.

    Raises:
        InputError: the model or engine cannot be read.
        MissingBackendError: engines only, and no GPU, driver or TensorRT here.
    """
    onnx_models = [model for model in models if not is_engine(model)]
    if onnx_models:
        return load_model(onnx_models[0]).inputs
    with _polygraphy_errors(models[0]), engine_runner(Path(models[0])) as runner:
        return [
            InputSpec(name, np.dtype(item.dtype), tuple(None if d < 0 else d for d in item.shape))
            for name, item in runner.get_input_metadata(use_numpy_dtypes=True).items()
        ]


def fingerprint(model: str | Path) -> dict[str, str]:
    """What the outputs of a model depend on beside it and the data, by name: what executes it here.

    For an engine that is the GPU with its driver, and TensorRT.

    Raises:
        InputError: an engine that cannot be read.
        MissingBackendError: an engine, and no GPU, driver or TensorRT here.
    """
    if not is_engine(model):
        return {"executor": simulation_fingerprint()}
    package = package_of(Path(model))
    gpu = _required_gpu(Path(model))
    trt = _tensorrt(package)
    return {
        "executor": "engine",
        "gpu": gpu.name,
        "compute_capability": gpu.compute_capability,
        "driver": gpu.driver,
        "tensorrt": f"{trt.__name__}-{trt.__version__}",
    }


def engine_runner(model: Path, plugins: Sequence[str] = ()) -> Any:
    """Polygraphy's runner of an engine, with the TensorRT that the plan is for.

    Args:
        plugins: libraries of TensorRT plugins.

    Raises:
        InputError: the file cannot be read, or this process runs engines of the other TensorRT.
        MissingBackendError: no GPU, driver or TensorRT here.
    """
    package = package_of(model)
    _required_gpu(model)
    trt = _tensorrt(package)
    load_plugins(trt, logger(trt), plugins)
    _choose_package(package, model)
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    return TrtRunner(EngineFromBytes(model.read_bytes()))


def _choose_package(package: str, model: Path) -> None:
    """Let Polygraphy use the TensorRT that the plan is for: it decides when its TensorRT part is imported."""
    from polygraphy import config

    wanted = package == "tensorrt_rtx"
    if wanted != config.USE_TENSORRT_RTX and "polygraphy.backend.trt" in sys.modules:
        raise InputError(
            "one process cannot run engines of both TensorRT and TensorRT for RTX",
            file=model,
            cause=f"this engine needs {package}, and the other one has been used already",
            remedy="run them in two processes",
        )
    config.USE_TENSORRT_RTX = wanted


def _required_gpu(model: Path) -> Gpu:
    """Look for a GPU first: TensorRT itself answers a missing one and a bad plan alike."""
    gpu = find_gpu()
    if gpu is None:
        raise MissingBackendError(
            "an engine runs only on an NVIDIA GPU",
            file=model,
            cause="there is no GPU or no NVIDIA driver here",
            remedy="gate the engine on a machine with the GPU, or gate the quantized ONNX model here,"
            " which is simulated on the CPU",
        )
    return gpu


def _tensorrt(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        remedy = f"pip install {package.replace('_', '-')}"
        raise MissingBackendError(f"{package} is not installed", cause=error, remedy=remedy) from error


@contextlib.contextmanager
def _polygraphy_errors(engine: str | Path) -> Iterator[None]:
    """Polygraphy's errors as one readable error; its own log is silent."""
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            yield
    except PolygraphyException as error:
        raise InputError("the engine cannot be used", file=engine, cause=error) from error


def _profile_limits(engine: Any, inputs: Sequence[str]) -> BatchLimits:
    """Batch limits from the engine's first optimization profile."""
    profiles = [engine.get_tensor_profile_shape(name, 0) for name in inputs]
    return BatchLimits(
        max(lowest[0] for lowest, _, _ in profiles), min(highest[0] for _, _, highest in profiles)
    )
