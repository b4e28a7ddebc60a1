"""Functions that a model brings along are written out where they are called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx
import onnx.inliner

from trtq.errors import InputError


def inline_functions(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """`proto`, which is changed, without functions of its own; those of another opset are converted.

    Raises:
        InputError: ONNX's inliner cannot do it.
    """
    if not proto.functions:
        return proto
    defaults = {(f.domain, f.name): {a.name: a for a in f.attribute_proto} for f in proto.functions}
    for nodes in (proto.graph.node, *(f.node for f in proto.functions)):
        _give_defaults(nodes, defaults)
    tell_types(proto.graph)
    try:
        return onnx.inliner.inline_local_functions(proto, convert_version=True)
    except Exception as error:
        raise InputError(
            "the model's local functions cannot be written out",
            file=path,
            cause=error,
            remedy="export the model without functions, or with all of them at the model's opset",
        ) from error


def tell_types(graph: onnx.GraphProto) -> None:
    """Write down the types of weights, which ONNX's inliner asks for."""
    told = {value.name for value in (*graph.value_info, *graph.input)}
    graph.value_info.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in graph.initializer
        if tensor.name not in told
    )


def _give_defaults(
    nodes: Iterable[onnx.NodeProto], defaults: Mapping[tuple[str, str], Mapping[str, onnx.AttributeProto]]
) -> None:
    """Write the defaults of a function's attributes into its calls: the inliner of onnx 1.23 forgets them.

    Args:
        defaults: domain and name of a function -> its attributes that have one.
    """
    for node in _every(nodes):
        given = {attribute.name for attribute in node.attribute}
        for name, value in defaults.get((node.domain, node.op_type), {}).items():
            if name not in given:
                node.attribute.add().CopyFrom(value)


def _every(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those in their bodies."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _every(body.node)
