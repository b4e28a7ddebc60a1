"""Engines over rows, on the GPU; and what engines and ONNX models are both asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from trtq.backends.builders import package_of
from trtq.backends.runner import Profile, open_engine, required_gpu, tensorrt_module
from trtq.data.batches import Arrays, Axes, Batch
from trtq.data.samples import InputSpec, Samples
from trtq.errors import InputError, TrtqError
from trtq.graph.model import load_model
from trtq.simulation.outputs import BatchLimits, Outputs, batches_for, gathered
from trtq.simulation.rows import naming_rows
from trtq.simulation.session import simulation_fingerprint
from trtq.simulation.states import following

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
        batch_size: rows at once; None: as many as its optimization profiles take.
        progress: called with the number of rows just done.
        plugins: libraries of TensorRT plugins.

    Raises:
        InputError: the engine does not load, does not take these inputs or this batch size, or has outputs
            that cannot be put together row by row.
        MissingBackendError: no GPU, driver or TensorRT here.
    """
    if len(samples) == 0:
        raise InputError("the data has no rows")
    with open_engine(Path(engine), plugins) as loaded:
        limits = batch_limits(loaded.profiles, samples.axes)
        parts = batches_for(list(loaded.inputs), samples, limits, batch_size, engine)

        def run(batch: Batch) -> Arrays:
            with naming_rows(loaded.infer, batch, samples, str(engine)):
                return loaded.infer(batch.feed)

        found, mixed = gathered(
            following(run, samples), parts, len(samples), engine, progress, by_value=lambda: loaded.by_value
        )
        return Outputs(found, "engine", mixed)


def batch_limits(profiles: Sequence[Profile], axes: Axes) -> BatchLimits:
    """The numbers of rows that every profile takes; where they have none in common, the largest's.

    Args:
        axes: the inputs' batch axes; first where one is not named. Any number will do where none has one.
    """
    limits = [found for profile in profiles if (found := _limits(profile, axes)) is not None]
    if not limits:
        return BatchLimits(1, None)
    lowest, highest = max(low for low, _ in limits), min(high for _, high in limits)
    if lowest > highest:
        lowest, highest = max(limits, key=lambda pair: pair[1])
    return BatchLimits(lowest, highest)


def input_specs(models: Sequence[str | Path], plugins: Sequence[str] = ()) -> list[InputSpec]:
    """The inputs of the first ONNX model among `models`; of the first engine where all are engines.

    Args:
        plugins: libraries of TensorRT plugins.

    Raises:
        InputError: the model or engine cannot be read.
        MissingBackendError: engines only, and no GPU, driver or TensorRT here.
    """
    onnx_models = [model for model in models if not is_engine(model)]
    if onnx_models:
        return load_model(onnx_models[0]).inputs
    with open_engine(Path(models[0]), plugins) as loaded:
        return loaded.specs


def why_not_loaded(engine: Path, plugins: Sequence[str] = ()) -> str | None:
    """Why an engine does not load here, with TensorRT's words and what to do; None if it loads."""
    try:
        with open_engine(engine, plugins):
            return None
    except TrtqError as error:
        return "; ".join(
            " ".join(part.split()) for part in (error.problem, error.cause, error.remedy) if part
        )


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
    gpu = required_gpu(Path(model))
    trt = tensorrt_module(package)
    return {
        "executor": "engine",
        "gpu": gpu.name,
        "compute_capability": gpu.compute_capability,
        "driver": gpu.driver,
        "tensorrt": f"{trt.__name__}-{trt.__version__}",
    }


def _limits(profile: Profile, axes: Axes) -> tuple[int, int] | None:
    """Fewest and most rows that a profile takes; None where no input has a batch axis."""
    ranges = [
        (sizes.min[axis], sizes.max[axis])
        for name, sizes in profile.shapes.items()
        if sizes.min and (axis := axes.get(name, 0)) is not None
    ]
    return (max(low for low, _ in ranges), min(high for _, high in ranges)) if ranges else None
