"""Sequences as the tensors in them: TensorRT has none, and exporters write them for `split` and `unbind`."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from trtq.graph.names import Names


def take_from_sequences(graph: gs.Graph) -> None:
    """Write what reads a sequence at a known position, or joins it again, as a node on tensors, in place."""
    names = Names(graph)
    for node in graph.nodes:
        if node.op in ("ConcatFromSequence", "SequenceAt") and node.inputs[0].inputs:
            maker = node.inputs[0].inputs[0]
            if node.op == "ConcatFromSequence":
                _join(node, maker)
            elif isinstance(node.inputs[1], gs.Constant):
                _take(node, maker, int(node.inputs[1].values.item()), names)


def _join(node: gs.Node, maker: gs.Node) -> None:
    if maker.op == "SequenceConstruct" and not node.attrs.get("new_axis", 0):
        node.op, node.attrs, node.inputs = "Concat", {"axis": node.attrs["axis"]}, list(maker.inputs)


def _take(node: gs.Node, maker: gs.Node, position: int, names: Names) -> None:
    """Make a SequenceAt what gives that part of the sequence."""
    if maker.op == "SequenceConstruct" and -len(maker.inputs) <= position < len(maker.inputs):
        node.op, node.inputs = "Identity", [maker.inputs[position]]
    if maker.op != "SplitToSequence":
        return
    source, axis = maker.inputs[0], maker.attrs.get("axis", 0)
    if len(maker.inputs) == 1:  # parts of size 1
        index = np.array([position] if maker.attrs.get("keepdims", 1) else position)
        node.inputs = [source, gs.Constant(names.tensor(f"{node.name}/position"), index)]
        node.op, node.attrs = "Gather", {"axis": axis}
        return
    bounds = _bounds(maker.inputs[1], position)
    if bounds is not None:
        ends = {"start": bounds[0], "end": bounds[1], "axis": axis}
        constants = [gs.Constant(names.tensor(f"{node.name}/{n}"), np.array([v])) for n, v in ends.items()]
        node.op, node.attrs, node.inputs = "Slice", {}, [source, *constants]


def _bounds(sizes: gs.Tensor, position: int) -> tuple[int, int] | None:
    """Where a part begins and ends: parts have one size, or one each; None where that is not known."""
    if not isinstance(sizes, gs.Constant):
        return None
    if sizes.values.ndim:
        if not -len(sizes.values) <= position < len(sizes.values):
            return None
        ends = np.cumsum(sizes.values).tolist()
        return ends[position] - int(sizes.values[position]), ends[position]
    size = int(sizes.values)
    return (position * size, (position + 1) * size) if position >= 0 else None
