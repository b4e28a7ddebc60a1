"""Half precision: the part of the graph that is not quantized becomes float16.

TensorRT 11 and TensorRT for RTX are strongly typed, so INT8 + FP16 must be in the ONNX model itself. Every
float32 tensor becomes float16, except where ONNX's own type constraints ask for float32 (the scales of a
Resize, NonMaxSuppression, ...), around nodes that are kept in float32 (see `trtq.graph.half_rules`), and
where the body of a control-flow node reads it. Casts stand at those places and at the model's inputs and
outputs, which keep their dtypes.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from trtq.errors import InputError
from trtq.graph.foreign import View, is_foreign_node
from trtq.graph.names import Names
from trtq.graph.surgery import copied, in_order
from trtq.graph.weights import values_of

SATURATED = float(np.finfo(np.float16).max) / 2
"""What constants beyond float16's range become: they are masks, to which scores are still added."""

_HALF = np.finfo(np.float16)
_CAST_TO = {
    np.dtype(np.float16): onnx.TensorProto.FLOAT16,
    np.dtype(np.float32): onnx.TensorProto.FLOAT,
}


def convert_to_half(graph: gs.Graph, float32: Collection[str] = ()) -> gs.Graph:
    """A copy of a folded float32 graph that computes in float16 and has the same inputs and outputs.

    Node names, node order and the positions of their inputs stay, so a plan made for `graph` fits the copy.

    Args:
        graph: folded, with the dtypes of all tensors known (`fold`), opset 19 or above for Q/DQ.
        float32: names of nodes that stay float32; so do nodes with bodies, nodes that bodies read, and
            operators that ONNX does not define, with what can only be computed behind them by TensorRT.

    Raises:
        InputError: a tensor whose dtype is not known.
    """
    check_dtypes(graph)
    graph, names = copied(graph), Names(graph)
    captured, view = read_by_bodies(graph), View.of(graph)
    kept = {*float32}
    for node in graph.nodes:
        if is_foreign_node(node) or view.hides(node):
            kept.add(node.name)
            continue
        if has_body(node) or not captured.isdisjoint(tensor.name for tensor in node.outputs):
            kept.add(node.name)
    casts: dict[tuple[int, np.dtype], gs.Variable] = {}
    nodes = list(graph.nodes)
    for tensor in [t for t in graph.tensors().values() if isinstance(t, gs.Variable)]:
        if (
            tensor.dtype == np.float32
            and tensor not in graph.inputs
            and tensor.inputs[0].name not in kept
            and _made_in_half(tensor.inputs[0], tensor, graph.opset)
        ):
            tensor.dtype = np.dtype(np.float16)
    for node in nodes:
        _set_output_dtype(node)
        for index, tensor in enumerate(node.inputs):
            if tensor.name and tensor.dtype in _CAST_TO:
                half = node.name not in kept and takes_half(node, index, graph.opset)
                wanted = np.dtype(np.float16 if half else np.float32)
                node.inputs[index] = _as(graph, names, casts, tensor, wanted)
    for index, output in enumerate(graph.outputs):
        if output.dtype == np.float16:
            graph.outputs[index] = _restore_output(graph, names, output)
    added = {id(cast) for cast in casts.values()}
    foreign = [node for node in nodes if is_foreign_node(node) or view.hides(node)]
    for tensor in [tensor for node in foreign for tensor in node.inputs]:
        if id(tensor) in added and isinstance(tensor, gs.Variable):
            _restore_name(names, tensor)
    return in_order(graph)


def check_dtypes(graph: gs.Graph) -> None:
    """Make sure that the dtypes of all tensors are known that the conversion looks at.

    Raises:
        InputError: one is not.
    """
    view = View.of(graph)
    converted = [node for node in graph.nodes if not is_foreign_node(node) and not view.hides(node)]
    unknown = [t.name for node in converted for t in node.outputs if t.name and t.dtype is None]
    if unknown:
        raise InputError(f"the dtype of '{unknown[0]}' is not known", remedy="leave the rest in fp32")


def has_body(node: gs.Node) -> bool:
    """Whether the node is an If, Loop or Scan."""
    return any(isinstance(value, gs.Graph) for value in node.attrs.values())


def read_by_bodies(graph: gs.Graph) -> frozenset[str]:
    """Names of all tensors in the bodies of the graph's control-flow nodes, including those from outside."""
    return frozenset(name for body in graph.subgraphs(recursive=True) for name in body.tensors())


def takes_half(node: gs.Node, index: int, opset: int) -> bool:
    """Whether a float input may be float16, by the operator's schema."""
    schema = _schema(node, opset)
    formal = schema.inputs[min(index, len(schema.inputs) - 1)]
    return _allows_half(schema, formal.type_str)


def _made_in_half(node: gs.Node, tensor: gs.Variable, opset: int) -> bool:
    """Whether a float32 output of `node` becomes float16."""
    if node.op in ("Cast", "ConstantOfShape"):
        return True
    schema = _schema(node, opset)
    index = next(i for i, t in enumerate(node.outputs) if t is tensor)
    formal = schema.outputs[min(index, len(schema.outputs) - 1)]
    tied = any(f.type_str == formal.type_str for f in schema.inputs)
    return tied and _allows_half(schema, formal.type_str)


def _schema(node: gs.Node, opset: int) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(node.op, opset, node.domain or "")


def _allows_half(schema: onnx.defs.OpSchema, type_str: str) -> bool:
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    return "tensor(float16)" in allowed.get(type_str, [type_str])


def _set_output_dtype(node: gs.Node) -> None:
    """Attributes that name the output's dtype follow it."""
    if not node.outputs or node.outputs[0].dtype != np.float16:
        return
    if node.op == "Cast":
        node.attrs["to"] = onnx.TensorProto.FLOAT16
    elif node.op == "ConstantOfShape":
        value = node.attrs.get("value")
        values = np.zeros(1, np.float32) if value is None else value.values
        node.attrs["value"] = gs.Constant(f"{node.name}/value", _to_half(values))


def _as(
    graph: gs.Graph,
    names: Names,
    casts: dict[tuple[int, np.dtype], gs.Variable],
    tensor: gs.Tensor,
    dtype: np.dtype,
) -> gs.Tensor:
    """`tensor` in `dtype`: itself, a converted constant, or the output of a Cast, one for all its readers."""
    if tensor.dtype == dtype:
        return tensor
    key = (id(tensor), dtype)
    if key not in casts:
        name = names.tensor(f"{tensor.name}/{dtype}")
        if isinstance(tensor, gs.Constant):
            values = values_of(tensor)
            casts[key] = gs.Constant(name, _to_half(values) if dtype == np.float16 else values.astype(dtype))
        else:
            casts[key] = gs.Variable(name, dtype=dtype, shape=tensor.shape)
            node = names.node(f"{name}/Cast")
            graph.nodes.append(gs.Node("Cast", node, {"to": _CAST_TO[dtype]}, [tensor], [casts[key]]))
    return casts[key]


def _restore_output(graph: gs.Graph, names: Names, output: gs.Variable) -> gs.Variable:
    """A float32 tensor under the model output's own name; the float16 one gets another."""
    restored = gs.Variable(output.name, dtype=np.dtype(np.float32), shape=output.shape)
    output.name = names.tensor(f"{output.name}/float16")
    node = names.node(f"{restored.name}/Cast")
    graph.nodes.append(gs.Node("Cast", node, {"to": onnx.TensorProto.FLOAT}, [output], [restored]))
    return restored


def _restore_name(names: Names, cast: gs.Variable) -> None:
    """Give a tensor that was cast to float32 the name that the float16 one has: it is what the float32 model
    calls it. Not where that one is an output of the model, which has got the name."""
    (half,) = cast.inputs[0].inputs
    if cast.name == f"{half.name}/float32":
        cast.name, half.name = half.name, names.tensor(f"{half.name}/float16")


def _to_half(values: np.ndarray) -> np.ndarray:
    """float16 values; what is beyond its range saturates, and what is not zero does not become zero."""
    beyond = np.isfinite(values) & (np.abs(values) > _HALF.max)
    half = np.where(beyond, np.copysign(SATURATED, values), values).astype(np.float16)
    vanished = (half == 0) & (values != 0)
    return np.where(vanished, np.copysign(_HALF.smallest_subnormal, values), half).astype(np.float16)
