"""Tensors that mix ranges: one scale for all of their values would lose the small ones."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from trtq.graph.evaluate import reads
from trtq.graph.place import only_moved
from trtq.graph.products import product
from trtq.simulation.components import GAP, LEAST


def mixed_tensors(graph: gs.Graph, reached: Mapping[str, float]) -> set[str]:
    """Names of what a Concat makes of operands whose ranges are `GAP` apart, as boxes in pixels beside scores
    are, and of what only holds its values, where no product follows.

    TensorRT, quantizing by itself, would requantize the operands to the one scale of the result. In front of
    a product they would share a scale anyway.

    Args:
        graph: is not changed.
        reached: tensor -> its largest magnitude.
    """
    ordered = graph.copy().toposort().nodes
    followed: set[str] = set()
    for node in reversed(ordered):
        if product(node) or any(tensor.name in followed for tensor in node.outputs):
            followed |= {tensor.name for tensor in reads(node)}
    mixed: set[str] = set()
    for node in ordered:
        own = {tensor.name for tensor in node.outputs} - followed
        if node.op == "Concat":
            sizes = [reached.get(tensor.name, 0.0) for tensor in node.inputs]
            apart = max(sizes) >= GAP * max(min(sizes), LEAST)
            if apart or any(tensor.name in mixed for tensor in node.inputs):
                mixed |= own
        elif node.inputs and node.inputs[0].name in mixed and all(map(only_moved, node.outputs)):
            mixed |= own
    return mixed
