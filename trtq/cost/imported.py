"""Costs from what trtexec wrote on another machine's GPU, so that one without can decide with its figures.

``trtexec --loadEngine=model.plan --separateProfileRun --exportProfile=profile.json
--exportLayerInfo=layers.json`` of an engine that was built with ``--profilingVerbosity=detailed``. Layers of
TensorRT up to 8.5 say which ONNX nodes they are by their names, joined by " + "; later ones by metadata.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trtq.backends.compiled import Compiled, CompiledLayer, named_nodes, parse_inspection
from trtq.cost.gpus import GPUS, Gpu
from trtq.cost.interface import Precision
from trtq.cost.layers import layer_load
from trtq.cost.roofline import FITTED, kernel_time
from trtq.cost.timed import TimedEngine, TimedLayer
from trtq.errors import InputError
from trtq.files import PathLike, read_bytes, read_json

LEAST_SHARE = 0.2
"""Of what the profiler shows of a layer at least this is the layer's own."""


def read_engine(profile: PathLike, layer_info: PathLike, batch: int = 1) -> TimedEngine:
    """An engine's layers and what they take, from two files of trtexec.

    Args:
        profile: `--exportProfile`: a list of layers with their times.
        layer_info: `--exportLayerInfo`: the engine inspector's JSON.
        batch: stands for dynamic dimensions.

    Raises:
        InputError: a file is missing or is something else, or they are of two engines.
    """
    times = layer_times(profile)
    compiled = _layers(layer_info, batch)
    described: dict[str, list[CompiledLayer]] = defaultdict(list)
    for layer in compiled.layers:
        described[layer.name].append(layer)
    if not described.keys() & times.keys():
        raise InputError(
            f"no layer of {Path(layer_info).name} has a time in {Path(profile).name}",
            file=layer_info,
            cause="they are of two engines, or the engine was built without detailed profiling verbosity",
            remedy="run trtexec --loadEngine=FILE --exportProfile=FILE --exportLayerInfo=FILE on one engine,"
            " built with --profilingVerbosity=detailed",
        )
    layers = []
    for name, every in times.items():
        of_name = described.get(name, [])
        for position, milliseconds in enumerate(every):
            found = of_name[position] if position < len(of_name) else None
            nodes = named_nodes(name) if found is None else found.onnx_nodes
            layers.append(TimedLayer(name, own_us(1e3 * milliseconds), nodes, found))
    return TimedEngine(
        f"{Path(profile).name} of trtexec", precision_of(compiled.layers), tuple(layers), batch
    )


def own_us(profiled: float, overhead: float = FITTED.profiler_us) -> float:
    """What a layer takes by itself, from what TensorRT's profiler shows, both in microseconds."""
    return max(profiled - overhead, LEAST_SHARE * profiled)


def precision_of(layers: Sequence[CompiledLayer]) -> Precision:
    """INT8 if a product among the layers is, else what most products compute in."""
    computing = [layer for layer in layers if layer.computes]
    if any(layer.int8 for layer in computing):
        return "int8"
    counted = Counter(layer_load(layer).precision for layer in computing)
    return counted.most_common(1)[0][0] if counted else "fp32"


def closest_gpu(engines: Sequence[TimedEngine], gpus: Sequence[Gpu] = GPUS) -> Gpu:
    """The GPU whose roofline is closest to what engines took: trtexec's files do not say which it was."""
    loads = [
        (layer.microseconds, layer_load(layer.compiled, engine.batch))
        for engine in engines
        for layer in engine.layers
        if layer.compiled is not None and layer.microseconds > 0
    ]
    return min(gpus, key=lambda gpu: sum(abs(us - kernel_time(gpu, load).microseconds) for us, load in loads))


def layer_times(path: PathLike) -> Mapping[str, list[float]]:
    """Layer -> average milliseconds, of every layer of that name, as `--exportProfile` has them.

    Raises:
        InputError: the file is missing or is something else.
    """
    value = read_json(path, "profile of trtexec")
    times: dict[str, list[float]] = {}
    try:
        runs = next((entry["count"] for entry in value if "count" in entry), 1)
        for entry in value:
            if "name" in entry:
                average = entry["averageMs"] if "averageMs" in entry else entry["timeMs"] / runs
                times.setdefault(entry["name"], []).append(_milliseconds(average))
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _other_file(path, "a profile", "--exportProfile", error) from error
    if not times:
        raise _other_file(path, "a profile", "--exportProfile", "it has no layer with a name and a time")
    return times


def _milliseconds(value: Any) -> float:
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError(f"a time of {number}")
    return number


def _layers(path: PathLike, batch: int) -> Compiled:
    try:
        return parse_inspection(read_bytes(path).decode(), batch)
    except OSError as error:
        raise InputError("cannot read the layers of the engine", file=path, cause=error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise _other_file(path, "a list of an engine's layers", "--exportLayerInfo", error) from error


def _other_file(path: PathLike, what: str, option: str, cause: object) -> InputError:
    return InputError(
        f"the file is not {what} as trtexec writes it",
        file=path,
        cause=cause,
        remedy=f"give what trtexec {option}=FILE wrote",
    )
