"""Integer division without the one quotient that ends the process.

The smallest integer divided by -1 does not fit its type, and on x86 the processor refuses to divide: ONNX
Runtime dies of SIGFPE, in constant folding as on a user's data. Here such a Div divides by 1 in place of -1
and its quotients are negated, which gives the smallest integer again, as NumPy and TensorRT's GPU have it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.inliner
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from trtq.graph.foreign import all_nodes, bodies

_TRAPS = frozenset({TensorProto.INT32, TensorProto.INT64})
"""Types that are divided as they are; narrower ones are divided as int32."""

_FLOATS = frozenset(
    "BatchNormalization Conv DequantizeLinear Erf Exp LayerNormalization Log Sigmoid Softmax Sqrt".split()
)
"""Operators of floating-point numbers alone: what they make needs no inference of types."""

_OPSET = 7
"""The first whose operators broadcast as today's do."""


def with_safe_division(model: ModelProto) -> ModelProto:
    """The model with integer divisions that cannot end the process; itself where it has none that might.

    Args:
        model: large weights may be external; is not changed.
    """
    if not any(map(_may_divide, (model.graph, *model.functions))) or _opset(model) < _OPSET:
        return model
    model = onnx.inliner.inline_local_functions(model) if model.functions else model
    if None in _kinds_divided(model.graph, {}):
        model = onnx.shape_inference.infer_shapes(model)
    if _TRAPS.isdisjoint(_kinds_divided(model.graph, {})):
        return model
    guarded = ModelProto()
    guarded.CopyFrom(model)
    taken = {name for node in all_nodes(guarded.graph) for name in (*node.input, *node.output)}
    _guard_all(guarded.graph, {}, taken)
    return guarded


def _opset(model: ModelProto) -> int:
    return max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=0)


def _may_divide(graph: GraphProto | FunctionProto) -> bool:
    """Whether a graph, or a body in it, has a Div by what is not known to be harmless."""
    weights = {} if isinstance(graph, FunctionProto) else {t.name: t for t in graph.initializer}
    return any(
        _is_trap(node, weights) or any(map(_may_divide, bodies(node)))  # a body reads weights around it, too
        for node in graph.node
    )


def _is_trap(node: NodeProto, weights: Mapping[str, TensorProto]) -> bool:
    """Whether a node is a Div by what may be an integer -1."""
    if node.op_type != "Div" or node.domain not in ("", "ai.onnx"):
        return False
    divisor = weights.get(node.input[1])
    if divisor is None:
        return True
    if divisor.data_type not in _TRAPS:
        return False
    return divisor.data_location == TensorProto.EXTERNAL or -1 in numpy_helper.to_array(divisor)


def _kinds_in(graph: GraphProto, around: Mapping[str, int]) -> dict[str, int]:
    """Tensor -> element type, as far as a graph says; `around`: what is around a body."""
    values = (*graph.input, *graph.output, *graph.value_info)
    own = {name: TensorProto.FLOAT for n in graph.node if n.op_type in _FLOATS for name in n.output}
    own |= {value.name: value.type.tensor_type.elem_type for value in values}
    return {**around, **own, **{tensor.name: tensor.data_type for tensor in graph.initializer}}


def _kind(node: NodeProto, kinds: Mapping[str, int]) -> int | None:
    """The element type of what a Div reads and makes; None where it is not known."""
    return next((kinds[name] for name in (*node.input, *node.output) if kinds.get(name)), None)


def _kinds_divided(graph: GraphProto, around: Mapping[str, int]) -> set[int | None]:
    """The element types of what is divided in a graph and its bodies."""
    kinds, weights = _kinds_in(graph, around), {tensor.name: tensor for tensor in graph.initializer}
    found = {_kind(node, kinds) for node in graph.node if _is_trap(node, weights)}
    return found.union(*(_kinds_divided(body, kinds) for node in graph.node for body in bodies(node)))


def _guard_all(graph: GraphProto, around: Mapping[str, int], taken: set[str]) -> None:
    """Guard the divisions of a graph and its bodies, in place.

    Args:
        taken: names of tensors that there are; new ones are added.
    """
    kinds, weights = _kinds_in(graph, around), {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        for body in bodies(node):
            _guard_all(body, kinds, taken)
        kind = _kind(node, kinds) if _is_trap(node, weights) else None
        nodes += _guarded(node, kind, taken) if kind in _TRAPS else [node]
    if len(nodes) > len(graph.node):
        nodes = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(nodes)


def _guarded(node: NodeProto, kind: int, taken: set[str]) -> list[NodeProto]:
    """A Div by 1 where it would be by -1, with what makes its divisor, and what negates its quotient then."""

    def name(role: str) -> str:
        fresh = f"{node.output[0]}/{role}"
        while fresh in taken:
            fresh += "_"
        taken.add(fresh)
        return fresh

    one, minus_one, found, code, twice, divisor, quotient, sign = map(
        name, ("one", "minus_one", "is_minus_one", "code", "twice", "divisor", "quotient", "sign")
    )
    number = helper.tensor_dtype_to_np_dtype(kind).type
    return [
        helper.make_node("Constant", [], [one], value=numpy_helper.from_array(np.array(number(1)))),
        helper.make_node("Constant", [], [minus_one], value=numpy_helper.from_array(np.array(number(-1)))),
        helper.make_node("Equal", [node.input[1], minus_one], [found]),
        helper.make_node("Cast", [found], [code], to=kind),
        helper.make_node("Add", [code, code], [twice]),
        helper.make_node("Add", [node.input[1], twice], [divisor]),
        helper.make_node("Sub", [one, twice], [sign]),
        helper.make_node("Div", [node.input[0], divisor], [quotient], name=node.name),
        helper.make_node("Mul", [quotient, sign], list(node.output)),
    ]
