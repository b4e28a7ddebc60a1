"""Run a model over samples: ONNX on the CPU as a simulation, or an engine on the GPU.

Both run batch by batch, so that memory holds one batch and the outputs; engines in Polygraphy's runner.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trtq.backends.builders import package_of
from trtq.backends.interface import Gpu, find_gpu
from trtq.data.batches import Arrays, batches
from trtq.data.samples import Samples
from trtq.errors import InputError, MissingBackendError
from trtq.gate.verdict import Executor
from trtq.graph.inputs import InputSpec

if TYPE_CHECKING:
    from polygraphy.backend.base import BaseRunner

DEFAULT_BATCH_SIZE = 16
ENGINE_SUFFIXES = (".plan", ".engine")


@dataclass(frozen=True)
class Outputs:
    """A model's outputs, rows in the samples' order, and what computed them."""

    arrays: Arrays
    executor: Executor

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @classmethod
    def concatenated(cls, parts: Sequence[Outputs], model: str | Path) -> Outputs:
        """The outputs of consecutive parts of the samples as those of all of them.

        Raises:
            InputError: an output's shape changes from part to part.
        """
        names = list(parts[0].arrays)
        for name, part in itertools.product(names, parts):
            _check_shape(name, part.arrays[name], parts[0].arrays[name], model)
        arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in names}
        return cls(arrays, parts[0].executor)

    def to_bytes(self) -> bytes:
        """An `.npz`; equal outputs give equal bytes."""
        buffer = io.BytesIO()
        stored: dict[str, Any] = {"names": np.array(list(self.arrays)), "executor": np.array(self.executor)}
        stored |= {f"output.{name}": array for name, array in self.arrays.items()}
        np.savez(buffer, **stored)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Outputs:
        """The inverse of `to_bytes`."""
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = {name: stored[f"output.{name}"] for name in stored["names"].tolist()}
            return cls(arrays, "engine" if str(stored["executor"]) == "engine" else "simulation")


@dataclass(frozen=True)
class BatchLimits:
    """Fewest and most rows that a model takes at once; `highest` None: any number."""

    lowest: int
    highest: int | None


def run_model(
    model: str | Path,
    samples: Samples,
    *,
    batch_size: int | None = None,
    threads: int | None = None,
    progress: Callable[[int], object] | None = None,
    runner: BaseRunner | None = None,
) -> Outputs:
    """The outputs of `model` on every row of `samples`.

    Consecutive rows of equal shapes run as one batch. A batch smaller than the model takes is
    filled up by repeating its last row; those outputs are dropped.

    Args:
        model: an ONNX file, which is simulated on the CPU (see `simulation_session`), or an engine
            (.plan, .engine), which needs a GPU.
        batch_size: rows at once; None: `DEFAULT_BATCH_SIZE`, or what the model takes.
        threads: CPU threads; None: all cores.
        progress: called with the number of rows just done, such as a progress bar's `update`.
        runner: an active one of the model, which stays active; None: one for this call.

    Raises:
        InputError: the model does not load, does not take these inputs or this batch size, or has
            outputs that cannot be put together row by row.
        MissingBackendError: an engine, and no GPU, driver or TensorRT here.
    """
    engine = is_engine(model)
    rows_total = len(samples)
    if rows_total == 0:
        raise InputError("the data has no rows")
    arrays: Arrays = {}
    done = 0
    with _polygraphy_errors(model), contextlib.ExitStack() as stack:
        if runner is None:
            made = engine_runner(Path(model)) if engine else _simulation_runner(model, threads)
            runner = stack.enter_context(made)
        metadata = runner.get_input_metadata(use_numpy_dtypes=False)
        limits = _profile_limits(runner.engine, metadata) if engine else _shape_limits(metadata)
        size = _batch_size(batch_size, limits, model)
        for batch in batches(_inputs_only(samples, list(metadata), model), size, limits.lowest):
            done += batch.rows
            if done > rows_total:
                break
            for name, output in runner.infer(batch.feed).items():
                _check_output(name, output, batch.rows + batch.padding, arrays.get(name), model)
                if name not in arrays:
                    arrays[name] = np.empty((rows_total, *output.shape[1:]), output.dtype)
                arrays[name][batch.start : batch.start + batch.rows] = output[: batch.rows]
            if progress is not None:
                progress(batch.rows)
    if done != rows_total:
        raise InputError(f"the data did not give the {rows_total} rows that it says it has")
    return Outputs(arrays, "engine" if engine else "simulation")


def input_specs(models: Sequence[str | Path]) -> list[InputSpec]:
    """The inputs of the first ONNX model among `models`; of the first engine where all are engines.

    Raises:
        InputError: the model or engine cannot be read.
        MissingBackendError: engines only, and no GPU, driver or TensorRT here.
    """
    onnx_models = [model for model in models if not is_engine(model)]
    if onnx_models:
        from trtq.graph.model import load_model

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
        from trtq.simulation.session import simulation_fingerprint

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


def is_engine(model: str | Path) -> bool:
    """Whether a file is an engine, by its name."""
    return Path(model).suffix in ENGINE_SUFFIXES


def _simulation_runner(model: str | Path, threads: int | None) -> BaseRunner:
    from trtq.simulation.session import SimulationRunner

    return SimulationRunner(model, threads)


def engine_runner(model: Path) -> Any:
    """Polygraphy's runner of an engine, with the TensorRT that the plan is for.

    Raises:
        InputError: the file cannot be read, or this process runs engines of the other TensorRT.
        MissingBackendError: no GPU, driver or TensorRT here.
    """
    package = package_of(model)
    _required_gpu(model)
    _tensorrt(package)
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
def _polygraphy_errors(model: str | Path) -> Iterator[None]:
    """Polygraphy's and ONNX Runtime's errors as one readable error; Polygraphy's own log is silent."""
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            yield
    except PolygraphyException as error:
        raise InputError("the model cannot run on these inputs", file=model, cause=error) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "onnxruntime":
            raise
        raise InputError("the model cannot run on these inputs", file=model, cause=error) from error


def _shape_limits(metadata: Any) -> BatchLimits:
    """Batch limits from input shapes: a static first dimension N is a batch of exactly N."""
    static = [item.shape[0] for item in metadata.values() if item.shape and isinstance(item.shape[0], int)]
    static = [size for size in static if size > 0]
    return BatchLimits(max(static), min(static)) if static else BatchLimits(1, None)


def _profile_limits(engine: Any, metadata: Any) -> BatchLimits:
    """Batch limits from the engine's first optimization profile."""
    profiles = [engine.get_tensor_profile_shape(name, 0) for name in metadata]
    return BatchLimits(
        max(lowest[0] for lowest, _, _ in profiles), min(highest[0] for _, _, highest in profiles)
    )


def _batch_size(wanted: int | None, limits: BatchLimits, model: str | Path) -> int:
    if wanted is not None and wanted < 1:
        raise InputError(f"the batch size must be at least 1, not {wanted}")
    if limits.highest is None:
        return wanted or DEFAULT_BATCH_SIZE
    if wanted is not None and wanted > limits.highest:
        raise InputError(f"the model takes at most {limits.highest} rows, not {wanted}", file=model)
    return wanted or limits.highest


def _inputs_only(samples: Samples, inputs: list[str], model: str | Path) -> Iterator[Arrays]:
    """The rows without arrays that the model does not take."""
    for index, row in enumerate(samples.rows()):
        if missing := [name for name in inputs if name not in row]:
            raise InputError(
                f"row {index} of the data has no array for input {missing[0]!r}",
                file=model,
                cause=f"the model's inputs are {', '.join(inputs)}; the row has {', '.join(row)}",
            )
        yield {name: row[name] for name in inputs}


def _check_output(
    name: str, output: NDArray, batch: int, collected: NDArray | None, model: str | Path
) -> None:
    """Refuse an output that does not have a row per row of the batch, of the shape seen before."""
    if output.ndim == 0 or len(output) != batch:
        raise InputError(
            f"output {name!r} does not have one row per sample",
            file=model,
            cause=f"its shape is {output.shape} for a batch of {batch}",
            remedy="give every output of the model a leading batch axis",
        )
    if collected is not None:
        _check_shape(name, output, collected, model)


def _check_shape(name: str, output: NDArray, collected: NDArray, model: str | Path) -> None:
    if output.shape[1:] != collected.shape[1:]:
        raise InputError(
            f"output {name!r} changes its shape from sample to sample",
            file=model,
            cause=f"{collected.shape[1:]} and then {output.shape[1:]}",
            remedy="pad the samples to one shape",
        )
