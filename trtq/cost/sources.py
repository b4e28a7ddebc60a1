"""Which source of costs there is: the most trusted of those that the options name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import onnx_graphsurgeon as gs

from trtq.cost.gpus import gpu_named
from trtq.cost.imported import closest_gpu, read_engine
from trtq.cost.interface import Builder, CostSource
from trtq.cost.modelled import Modelled
from trtq.cost.timed import Timed, TimedEngine
from trtq.errors import InputError
from trtq.files import PathLike
from trtq.graph.shapes import concrete_shapes


def source_for(
    graph: gs.Graph,
    input_shapes: Mapping[str, Sequence[int]],
    *,
    measured: Sequence[TimedEngine] = (),
    profiles: Sequence[PathLike] = (),
    layer_infos: Sequence[PathLike] = (),
    gpu: str | None = None,
    builder: Builder = "tensorrt",
    int8_inputs: Collection[str] = (),
) -> CostSource | None:
    """The source of costs for a model; None where nothing says what a kernel takes.

    Args:
        graph: folded, not yet quantized.
        input_shapes: of the inference whose latency counts: model input -> shape without dynamic dimensions.
        measured: engines of the model that were timed on the GPU here (see `measured.time_engines`).
        profiles, layer_infos: what trtexec wrote of engines of the model, of one FP16 and one INT8 at best;
            the first of one belongs to the first of the other.
        gpu: name of a GPU, for the roofline of its data sheet; by default the one that is closest to the
            timed engines.
        builder: whose engines.
        int8_inputs: model inputs that the engine takes in INT8, quantized by the host.

    Raises:
        InputError: there is no data sheet for that GPU; a file cannot be read; the engines are of another
            model.
    """
    if not (measured or profiles or layer_infos or gpu):
        return None
    batch = next((shape[0] for shape in input_shapes.values() if len(shape)), 1)
    engines = list(measured) or _imported(profiles, layer_infos, batch)
    card = gpu_named(gpu) if gpu else closest_gpu(engines)
    modelled = Modelled(graph, concrete_shapes(graph, input_shapes), card, builder, int8_inputs=int8_inputs)
    if not engines:
        return modelled
    timed = Timed(modelled, engines, "measured" if measured else "imported")
    if timed.share < LEAST_FOUND:
        raise InputError(
            f"{timed.name}: the layers are not the model's",
            cause=f"those found in the model take {timed.share:.0%} of the time",
            remedy="profile engines of this very model: nodes are found by their names",
        )
    return timed


LEAST_FOUND = 0.5
"""Engines of which less of the time is of layers that the model has are taken for another model's."""


def _imported(profiles: Sequence[PathLike], layer_infos: Sequence[PathLike], batch: int) -> list[TimedEngine]:
    if len(profiles) != len(layer_infos):
        raise InputError(
            f"{len(profiles)} profiles and {len(layer_infos)} lists of layers were given",
            remedy="give one list of layers (trtexec --exportLayerInfo) for each profile (--exportProfile)",
        )
    return [read_engine(*pair, batch) for pair in zip(profiles, layer_infos, strict=True)]
