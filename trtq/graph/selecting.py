"""What selects by value, such as NonMaxSuppression, and where a search measures what stands in front of it.

Behind it another number of boxes, or two that change places, says little about how large an error is: every
search measures noise on the tensors that go into what selects and what follows it. The gate looks at the
outputs themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from trtq.graph.evaluate import bodies, reads
from trtq.graph.foreign import View
from trtq.graph.products import product

SELECTING = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})
"""Operators whose outputs have a shape that depends on values; plugins with NMS in their name count, too."""


def measured_tensors(graph: gs.Graph) -> list[str]:
    """The tensors to measure noise on: the graph's outputs, as far as they can be computed (`View`), but for
    those behind what selects the floating-point tensors that go into it, or that are looked up by what it
    selected.

    What selects counts only where no product follows: of a detector in two stages the second is measured.
    Outputs that nothing computes, weights and inputs, are left out, too: they are always exact.
    """
    behind, tensors, view = _behind(graph), graph.tensors(), View.of(graph)
    computed = [name for name in view.outputs if tensors[name].inputs]
    found = [name for name in computed if name not in behind]
    if found == computed:
        return computed or list(view.outputs)
    for node in graph.nodes:
        if any(tensor.name in behind for tensor in node.outputs) and not view.hides(node):
            found += [own for tensor in reads(node) if tensor.name not in behind for own in _floats(tensor)]
    return list(dict.fromkeys(found)) or list(view.outputs)


def instead_of_outputs(graph: gs.Graph) -> list[str] | None:
    """The measured tensors; None where those are the graph's outputs."""
    names = measured_tensors(graph)
    return None if names == [tensor.name for tensor in graph.outputs] else names


def up_to_measured(graph: gs.Graph) -> gs.Graph:
    """The graph with the measured tensors as its outputs, and without what only stands behind them; itself
    where those are its outputs."""
    names = instead_of_outputs(graph)
    if names is None:
        return graph
    part = graph.copy()
    tensors = part.tensors()
    part.outputs = [tensors[name] for name in names]
    return part.cleanup()


def _behind(graph: gs.Graph) -> set[str]:
    """Names of the tensors that depend on what selects without a product in between or after it."""
    ordered = graph.copy().toposort().nodes
    weighted: set[str] = set()  # tensors that a product follows
    for node in reversed(ordered):
        if product(node) or any(tensor.name in weighted for tensor in node.outputs):
            weighted |= {tensor.name for tensor in reads(node)}
    behind: set[str] = set()
    for node in ordered:
        selects = _selects(node) and not any(tensor.name in weighted for tensor in node.outputs)
        if selects or any(tensor.name in behind for tensor in reads(node)):
            behind |= {tensor.name for tensor in node.outputs}
    return behind


def _selects(node: gs.Node) -> bool:
    inside = (inner for body in bodies(node) for inner in body.nodes)
    return node.op in SELECTING or "NMS" in node.op or any(map(_selects, inside))


def _floats(tensor: gs.Tensor) -> Iterator[str]:
    """The tensor itself if it is computed and in floating point, else those that it is made from."""
    if isinstance(tensor, gs.Constant) or not tensor.inputs:
        return
    if tensor.dtype is not None and tensor.dtype.kind == "f":
        yield tensor.name
        return
    if tensor.inputs[0].op not in ("Shape", "Size"):
        for source in tensor.inputs[0].inputs:
            yield from _floats(source)
