"""What selects by value, such as NonMaxSuppression: where a search measures what stands in front of it, and
which outputs have a size that depends on values.

Behind it another number of boxes, or two that change places, says little about how large an error is: every
search measures noise on the tensors that go into what selects and what follows it. The gate looks at the
outputs themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import onnx.inliner
import onnx_graphsurgeon as gs
from onnx import ModelProto, NodeProto

from trtq.graph import foreign
from trtq.graph.evaluate import bodies, reads
from trtq.graph.foreign import View
from trtq.graph.products import product
from trtq.graph.shapes import infer_types
from trtq.graph.surgery import cleaned, copied, in_order

SELECTING = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})
"""Operators whose outputs have a shape that depends on values; plugins with NMS in their name count, too."""

_SIZES: Mapping[str, tuple[int, ...]] = {
    "CenterCropPad": (1,),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "If": (0,),
    "Loop": (0, 1),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "SplitToSequence": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Upsample": (1,),
}
"""Operators that take sizes -> the inputs that are these."""

_ROWS = "the rows of the batch"


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
    part = copied(graph)
    tensors = part.tensors()
    part.outputs = [tensors[name] for name in names]
    return cleaned(part)


def sized_by_values(model: ModelProto, axes: Mapping[str, int | None]) -> frozenset[str]:
    """The outputs whose first axis may have a size that depends on what the inputs hold, and not on their
    shapes alone: boxes behind a NonMaxSuppression. Where shape inference finds that it is the rows of a batch
    nevertheless, as where a fixed number is picked of each, it is not among them.

    Args:
        axes: where the inputs have their rows; first where one is not named. None: nowhere.
    """
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    sized: set[str] = set()
    valued = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    known = -1
    while known != len(valued) + len(sized):  # nodes may be in any order
        known = len(valued) + len(sized)
        _follow(model.graph.node, valued, sized)
    if not (doubtful := {value.name for value in model.graph.output} & sized):
        return frozenset()
    graph = gs.import_onnx(model).toposort()
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor not in graph.inputs:
            tensor.shape = None
    for tensor in graph.inputs:
        axis = axes.get(tensor.name, 0)
        if axis is not None and tensor.shape and not isinstance(tensor.shape[axis], int):
            tensor.shape = [*tensor.shape[:axis], _ROWS, *tensor.shape[axis + 1 :]]
    infer_types(graph)
    firsts = {tensor.name: tensor.shape[0] for tensor in graph.outputs if tensor.shape}
    return frozenset(
        name for name in doubtful if not (isinstance(firsts.get(name), int) or firsts.get(name) == _ROWS)
    )


def _follow(nodes: Iterable[NodeProto], valued: set[str], sized: set[str]) -> None:
    """Add the names of the tensors whose values depend on what a model's inputs hold to `valued`, and of
    those whose sizes do to `sized`, as far as the nodes are in an order that they can run in."""
    for node in nodes:
        read = set(foreign.reads(node))
        sizes = {name for index, name in enumerate(node.input) if index in _SIZES.get(node.op_type, ())}
        before = len(sized)
        for body in foreign.bodies(node):
            own = [value.name for value in body.input]
            if node.op_type == "Loop":  # its turn, and whether it goes on, which the body says again
                sizes.add(body.output[0].name)
                own = own[1:] if node.input[1] in valued else own[2:]
            valued.update(own)
            _follow(body.node, valued, sized)
        if node.op_type in SELECTING or node.op_type == "EfficientNMS_ONNX_TRT":
            sizes = read
        if sizes & valued or read & sized or len(sized) > before:
            sized.update(node.output)
        if read & (sized if node.op_type in ("Shape", "Size") else valued | sized):
            valued.update(node.output)


def _behind(graph: gs.Graph) -> set[str]:
    """Names of the tensors that depend on what selects without a product in between or after it."""
    ordered = in_order(copied(graph)).nodes
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
