"""Which source of costs there is: the most trusted of those that the options name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_graphsurgeon as gs

from trtq.cost.gpus import gpu_named
from trtq.cost.interface import CostSource
from trtq.cost.roofline import Roofline
from trtq.graph.shapes import concrete_shapes


def source_for(
    graph: gs.Graph, input_shapes: Mapping[str, Sequence[int]], *, gpu: str | None = None
) -> CostSource | None:
    """The source of costs for a model; None where nothing says what a kernel takes.

    Args:
        graph: folded, not yet quantized.
        input_shapes: of the inference whose latency counts: model input -> shape without dynamic dimensions.
        gpu: name of a GPU, for the roofline of its data sheet.

    Raises:
        InputError: there is no data sheet for that GPU.
    """
    if gpu is not None:
        return Roofline(graph, concrete_shapes(graph, input_shapes), gpu_named(gpu))
    return None
