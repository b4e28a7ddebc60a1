"""Costs from engines that are timed layer by layer on the GPU here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trtq.backends.record import read_record
from trtq.backends.timing import Measuring, Timing, measure
from trtq.cost.imported import own_us, precision_of
from trtq.cost.timed import TimedEngine, TimedLayer
from trtq.errors import InputError


def time_engines(
    engines: Sequence[Path], how: Measuring | None = None, plugins: Sequence[str] = ()
) -> list[TimedEngine]:
    """Engines' layers and what they take on the first GPU. Loads the plans: only plans you built or trust.

    Args:
        engines: plans, each with the record that trtq writes beside what it builds.
        plugins: libraries of TensorRT plugins.

    Raises:
        MissingBackendError: no GPU, CUDA package or TensorRT for them here.
        InputError: an engine does not load or run, has no record, or TensorRT's profiler shows no layers.
    """
    timings = measure(engines, how, plugins)
    return [timed_engine(path, timing) for path, timing in zip(engines, timings, strict=True)]


def timed_engine(engine: Path, timing: Timing) -> TimedEngine:
    """A timed engine's layers, each without its share of what the profiler adds to the whole.

    Raises:
        InputError: it has no record, or there are no times of layers.
    """
    record = read_record(engine)
    if record is None or not timing.kernel_ms:
        raise InputError(
            "what the engine's layers take cannot be told",
            file=engine,
            cause="it has no record beside it" if record is None else "TensorRT's profiler shows no layers",
            remedy="build it with trtq here" if record is None else "name the GPU (--gpu) for a model of it",
        )
    compiled = record["compiled"]
    described = {layer.name: layer for layer in compiled.layers}
    added = 1e3 * max(sum(timing.kernel_ms.values()) - timing.p50_ms, 0.0) / len(timing.kernel_ms)
    layers = [
        TimedLayer(
            name,
            own_us(1e3 * milliseconds, added),
            described[name].onnx_nodes if name in described else (),
            described.get(name),
        )
        for name, milliseconds in timing.kernel_ms.items()
    ]
    return TimedEngine(
        f"{engine.name} timed here", precision_of(compiled.layers), tuple(layers), timing.batch
    )
