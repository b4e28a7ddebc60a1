"""Operators that ONNX defines by smaller ones, which take their place where TensorRT needs that.

It quantizes the two products of an attention only where it sees them, and refuses Attention as one operator
in float32 (TensorRT for RTX 1.7.1, which crashes on some shapes). The other operators of `EXPANDED` its
parser does not know. All others (LayerNormalization, RMSNormalization, RotaryEmbedding, GroupNormalization,
Gelu, Swish, Mish, ...) it imports as they are, with kernels at least as good as those of their parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import onnx.defs
import onnx.inliner
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from trtq.graph.attention import attention_body
from trtq.graph.local import tell_types
from trtq.graph.names import Names

EXPANDED = frozenset(
    {
        "AffineGrid",
        "Attention",
        "Bernoulli",
        "CenterCropPad",
        "NegativeLogLikelihoodLoss",
        "SoftmaxCrossEntropyLoss",
        "SwiGLU",
    }
)
"""ONNX's operators that are written as smaller ones."""


def holds_functions(graph: gs.Graph) -> bool:
    """Whether the graph, or a body in it, holds an operator of `EXPANDED`."""
    return any(_is_expanded(node) for body in _bodies(graph) for node in body.nodes)


def expand_functions(graph: gs.Graph) -> bool:
    """Write the operators of `EXPANDED` as smaller ones, in place; whether there were any.

    Their parts are named after them. Those stay whole whose definition depends on a type that is not known.
    """
    names, found = Names(graph), False
    for body in _bodies(graph):
        for node in [node for node in body.nodes if _is_expanded(node)]:
            definition = attention_body(node) if node.op == "Attention" else None
            if (definition := definition or _definition(node, graph.opset)) is not None:
                _put_in_place(body, names, node, definition)
                found = True
    return found


def with_attention_defined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`proto`, which may be changed, with every Attention as ONNX defines it.

    ONNX Runtime's own (1.32) refuses a mask that is one for all queries, and a few of its results differ.
    """
    tell_types(proto.graph)
    proto.graph.value_info.add(name="")  # the inliner asks for the type of an input that is left out, too
    found = onnx.inliner.inline_selected_functions(proto, [("", "Attention")], inline_schema_functions=True)
    named = [value for value in found.graph.value_info if value.name]
    del found.graph.value_info[:]
    found.graph.value_info.extend(named)
    return found


def holds_attention(proto: onnx.ModelProto) -> bool:
    """Whether a model's own graph has an Attention of ONNX's."""
    return any(n.op_type == "Attention" and n.domain in ("", "ai.onnx") for n in proto.graph.node)


def _bodies(graph: gs.Graph) -> list[gs.Graph]:
    return [graph, *graph.subgraphs(recursive=True)]


def _is_expanded(node: gs.Node) -> bool:
    return node.op in EXPANDED and (node.domain or "") in ("", "ai.onnx")


def _definition(node: gs.Node, opset: int) -> onnx.FunctionProto | None:
    """ONNX's definition of a node's operator; None where it depends on types that are not known."""
    schema: Any = onnx.defs.get_schema(node.op, opset, "")  # its stubs lack the functions
    call = _call(node)
    if schema.has_function:
        content = schema.get_function_with_opset_version(_newest(schema.function_opset_versions, opset))
    else:
        if any(t.name and (t.dtype is None or t.shape is None) for t in node.inputs):
            return None
        version = _newest(schema.context_dependent_function_opset_versions, opset)
        types = [_type(tensor).SerializeToString() for tensor in node.inputs]
        content = schema.get_context_dependent_function_with_opset_version(
            version, call.SerializeToString(), types
        )
    body = onnx.FunctionProto.FromString(content)
    values = {name: formal.default_value for name, formal in schema.attributes.items()}
    _set_attributes(body, values | {attribute.name: attribute for attribute in call.attribute})
    return body if body.node else None


def _newest(versions: list[int], opset: int) -> int:
    return max(version for version in versions if version <= opset)


def _call(node: gs.Node) -> onnx.NodeProto:
    inputs, outputs = ([tensor.name for tensor in side] for side in (node.inputs, node.outputs))
    return onnx.helper.make_node(node.op, inputs, outputs, node.name, **node.attrs)


def _type(tensor: gs.Tensor) -> onnx.TypeProto:
    if not tensor.name:
        return onnx.TypeProto()
    kind = tensor.dtype
    number = kind if isinstance(kind, int) else onnx.helper.np_dtype_to_tensor_dtype(kind)
    return onnx.helper.make_tensor_type_proto(number, list(tensor.shape))


def _set_attributes(body: onnx.FunctionProto, values: Mapping[str, onnx.AttributeProto]) -> None:
    """Put values in the place of a function's references to its attributes."""
    for node in body.node:
        for attribute in [a for a in node.attribute if a.ref_attr_name]:
            value = values[attribute.ref_attr_name]
            node.attribute.remove(attribute)
            if value.type != onnx.AttributeProto.UNDEFINED:
                node.attribute.add().CopyFrom(value)
                node.attribute[-1].name = attribute.name


def _put_in_place(graph: gs.Graph, names: Names, node: gs.Node, body: onnx.FunctionProto) -> None:
    """Replace a node by the nodes of a function, without its Identities."""
    tensors = {tensor.name: tensor for tensor in (*node.inputs, *node.outputs) if tensor.name}
    actual = {"": ""}
    actual |= {formal: tensor.name for formal, tensor in zip(body.input, node.inputs, strict=False)}
    wanted = zip(body.output, node.outputs, strict=False)
    actual |= {formal: tensor.name for formal, tensor in wanted if tensor.name}
    position = next(i for i, other in enumerate(graph.nodes) if other is node)
    node.inputs.clear()
    node.outputs.clear()
    parts = []
    for part in body.node:
        if part.op_type == "Identity" and part.output[0] not in actual:
            actual[part.output[0]] = actual[part.input[0]]
        else:
            _rename(part, actual, names, node.name)
            parts.append(OnnxImporter.import_node(part, {}, tensors, graph.opset, graph.import_domains))
    graph.nodes[position : position + 1] = parts


def _rename(node: onnx.NodeProto, actual: dict[str, str], names: Names, prefix: str) -> None:
    """Give a node a free name, and tensors their actual names or free ones, also in bodies."""

    def name(formal: str) -> str:
        if formal not in actual:
            actual[formal] = names.tensor(f"{prefix}/{formal}")
        return actual[formal]

    node.name = names.node(f"{prefix}/{node.op_type}")
    node.input[:] = map(name, node.input)
    node.output[:] = map(name, node.output)
    for body in (a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH):
        for inner in body.node:
            _rename(inner, actual, names, prefix)
        for value in (*body.input, *body.output):
            value.name = name(value.name)
