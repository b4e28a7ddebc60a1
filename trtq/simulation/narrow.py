"""float16 and bfloat16, simulated: a float32 model that rounds wherever the narrow types round.

ONNX Runtime's CPU provider runs float16 operators in float32 and drops the casts between them, so neither
overflow nor rounding shows. Here every tensor of a narrow type becomes float32, and behind each operator
that computes one stand two casts, to the narrow type and back, which ONNX Runtime keeps: what is beyond the
range becomes infinite, and what lies between two values is rounded to one of them.

One operator is one kernel: sums inside it run in float32, as they do in TensorRT's kernels, and its result is
rounded once. The results of operators that only move or choose values are not rounded. Nor is a
DequantizeLinear in front of a product between Q/DQ, perhaps with a Transpose in between: that runs on the
integers, and the dequantized values are never written.

A builder fuses operators, and rounds nothing within such a kernel. Which ones is not known here; the other
extreme is one kernel for all, in which only Casts round.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data

NARROW = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
"""Element types that are simulated."""

EXACT_OPS = frozenset(
    "Abs Ceil Clip Compress Concat ConcatFromSequence ConstantOfShape DepthToSpace Dropout Expand Flatten"
    " Floor Gather GatherElements GatherND GlobalMaxPool Identity If Loop Max MaxPool Min Neg OneHot Optional"
    " OptionalGetElement Pad ReduceMax ReduceMin Relu Reshape ReverseSequence Round Scan ScatterElements"
    " ScatterND SequenceAt SequenceConstruct SequenceInsert Sign Slice SpaceToDepth Split SplitToSequence"
    " Squeeze Tile TopK Transpose Trilu Unsqueeze Where".split()
)
"""Operators whose results are representable where their inputs are (see `_is_exact`)."""

_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
"""Operators that TensorRT runs on integers where both operands come from DequantizeLinear."""

_MOVES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that TensorRT looks through between a DequantizeLinear and a product."""

_GRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


def holds_narrow(model: ModelProto) -> bool:
    """Whether a tensor of the model is float16 or bfloat16, as far as the model says without inference."""
    return any(_says_narrow(graph) for graph in _graphs(model.graph))


def in_float32(model: ModelProto, *, fused: bool = False) -> ModelProto:
    """The model in float32, rounded wherever one of its operators writes a narrow type.

    Inputs and outputs keep their names and dtypes. Tensors inside keep their names and become float32 that
    holds only values of the narrow type, which is what a session fetches. A sequence of narrow tensors is
    left as it is.

    Args:
        model: large weights may be external; is not changed.
        fused: nothing is rounded but by Casts.
    """
    typed = onnx.shape_inference.infer_shapes(model)
    names = {name for graph in _graphs(typed.graph) for name in _names(graph)}
    _Widening(names, fused).of_model(typed.graph)
    return typed


class _Widening:
    """Turns the graphs of one model into float32, in place.

    Args:
        names: of everything in the model; new names are added.
        fused: as for `in_float32`.
    """

    def __init__(self, names: set[str], fused: bool) -> None:
        self._names, self._fused = names, fused

    def of_model(self, graph: GraphProto) -> None:
        """The model's own graph: inputs and outputs keep their dtypes, behind casts."""
        kinds = _kinds(graph)
        before, after, renamed = [], [], {}
        for value in graph.input:
            if kinds.get(value.name) in NARROW:
                renamed[value.name] = self._fresh(value.name)
                before.append(_cast(value.name, renamed[value.name], TensorProto.FLOAT))
        for value in graph.output:
            if kinds.get(value.name) in NARROW:
                inside = renamed.setdefault(value.name, self._fresh(value.name))
                after.append(_cast(inside, value.name, kinds[value.name]))
        self._widen(graph, kinds, renamed, before)
        graph.node.extend(after)

    def _widen(
        self, graph: GraphProto, kinds: dict[str, int], renamed: dict[str, str], before: list[NodeProto]
    ) -> None:
        """Replace the nodes and initializers of a graph.

        Args:
            kinds: tensor -> element type, those outside a body too.
            renamed: tensor -> its name in float32 where that is another one.
            before: nodes that come first.
        """
        nodes = [*before, *self._initializers(graph, renamed)]
        unrounded = _integer_operands(graph)
        for node in graph.node:
            for output in node.output:
                if output and output not in kinds:  # of an operator that inference does not know
                    kinds[output] = next((kinds[name] for name in node.input if name in kinds), 0)
            nodes += self._node(node, kinds, renamed, unrounded)
        del graph.node[:]
        graph.node.extend(nodes)
        del graph.value_info[:]

    def _initializers(self, graph: GraphProto, renamed: dict[str, str]) -> Iterator[NodeProto]:
        """Make narrow initializers float32; those outside the model are cast when they are read."""
        for tensor in graph.initializer:
            if tensor.data_type not in NARROW:
                continue
            if uses_external_data(tensor):
                renamed[tensor.name] = self._fresh(tensor.name)
                yield _cast(tensor.name, renamed[tensor.name], TensorProto.FLOAT)
            else:
                tensor.CopyFrom(_float32(tensor))

    def _node(
        self, node: NodeProto, kinds: dict[str, int], renamed: dict[str, str], unrounded: set[str]
    ) -> list[NodeProto]:
        """The node on float32, and the casts that round what it writes."""
        wide = NodeProto()
        wide.CopyFrom(node)
        for attribute in wide.attribute:
            self._attribute(attribute, kinds, renamed)
        if node.op_type == "CastLike" and kinds.get(node.input[1]) in NARROW:
            wide = _cast(node.input[0], node.output[0], kinds[node.input[1]])
        wide.input[:] = [renamed.get(name, name) for name in wide.input]
        rounds = _is_cast(node) if self._fused else not _is_exact(node)
        casts = []
        for index, name in enumerate(node.output):
            wide.output[index] = renamed.get(name, name)
            if rounds and kinds.get(name) in NARROW and name not in unrounded:
                raw, narrow, rounded = self._fresh(name), self._fresh(name), wide.output[index]
                casts += [_cast(raw, narrow, kinds[name]), _cast(narrow, rounded, TensorProto.FLOAT)]
                wide.output[index] = raw
        if _casts_to_narrow(wide) and casts:
            wide.output[0] = casts.pop(0).output[0]
        return [wide, *casts]

    def _attribute(self, attribute: AttributeProto, kinds: dict[str, int], renamed: dict[str, str]) -> None:
        """Make an attribute say float32 where it says a narrow type; a Cast's target stays: it rounds."""
        if attribute.type in _GRAPHS:
            for body in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                own = _kinds(body)
                for value in [*body.input, *body.output]:
                    if value.type.tensor_type.elem_type in NARROW:
                        value.type.tensor_type.elem_type = TensorProto.FLOAT
                outside = {name: new for name, new in renamed.items() if name not in own}
                self._widen(body, kinds | own, outside, [])
        elif attribute.type == AttributeProto.TENSOR and attribute.t.data_type in NARROW:
            attribute.t.CopyFrom(_float32(attribute.t))
        elif attribute.name in ("dtype", "output_dtype") and attribute.i in NARROW:
            attribute.i = TensorProto.FLOAT

    def _fresh(self, name: str) -> str:
        """A name that nothing in the model has."""
        number = 0
        while (fresh := f"{name}/float32_{number}") in self._names:
            number += 1
        self._names.add(fresh)
        return fresh


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and the bodies in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type in _GRAPHS:
                for body in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                    yield from _graphs(body)


def _names(graph: GraphProto) -> Iterator[str]:
    for values in (graph.input, graph.output, graph.value_info, graph.initializer):
        yield from (value.name for value in values)
    for node in graph.node:
        yield from (*node.input, *node.output)


def _kinds(graph: GraphProto) -> dict[str, int]:
    """Tensor -> element type, of what the graph itself makes, holds or takes."""
    values = (*graph.value_info, *graph.input, *graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    return {name: kind for name, kind in kinds.items() if kind} | {
        tensor.name: tensor.data_type for tensor in graph.initializer
    }


def _says_narrow(graph: GraphProto) -> bool:
    if not NARROW.isdisjoint(_kinds(graph).values()):
        return True
    attributes = (attribute for node in graph.node for attribute in node.attribute)
    return any(
        attribute.t.data_type in NARROW
        if attribute.type == AttributeProto.TENSOR
        else attribute.name in ("to", "dtype", "output_dtype") and attribute.i in NARROW
        for attribute in attributes
    )


def _integer_operands(graph: GraphProto) -> set[str]:
    """Outputs of DequantizeLinear that are read, moved or not, by products between Q/DQ alone."""
    origins: dict[str, str] = {}  # tensor -> the output of DequantizeLinear whose values it holds
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            origins[node.output[0]] = node.output[0]
        elif node.op_type in _MOVES and node.input[0] in origins:
            origins[node.output[0]] = origins[node.input[0]]
    elsewhere = {value.name for value in graph.output}
    for node in graph.node:
        integer = node.op_type in _PRODUCTS and all(name in origins for name in node.input[:2])
        passed = 2 if integer else 1 if node.output and node.output[0] in origins else 0
        elsewhere.update(node.input[passed:])
    return set(origins.values()) - {origins[name] for name in elsewhere if name in origins}


def _is_exact(node: NodeProto) -> bool:
    """Whether what a node gives is representable where its inputs are; a scatter may sum up or multiply."""
    computes = any(a.name == "reduction" and a.s in (b"add", b"mul") for a in node.attribute)
    return node.op_type in EXACT_OPS and node.domain in ("", "ai.onnx") and not computes


def _is_cast(node: NodeProto) -> bool:
    return node.op_type in ("Cast", "CastLike")


def _casts_to_narrow(node: NodeProto) -> bool:
    return node.op_type == "Cast" and any(a.name == "to" and a.i in NARROW for a in node.attribute)


def _cast(source: str, target: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], to=kind)


def _float32(tensor: TensorProto) -> TensorProto:
    values = np.asarray(numpy_helper.to_array(tensor), np.float32)
    return numpy_helper.from_array(values, tensor.name)
