"""Dtypes, shapes and multiply-accumulates of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from trtq.graph.evaluate import fold_constants
from trtq.graph.model import export

_SHAPE_VALUES = 1024  # constants up to this size may be shapes, which inference needs to see


def infer_types(graph: gs.Graph) -> None:
    """Write the dtype and shape that ONNX shape inference finds onto the graph's variables, in place.

    Large weights are left out of what is inferred, so this costs no more on large models.
    """
    light = _without_weights(graph)
    inferred = onnx.shape_inference.infer_shapes(export(light), data_prop=True)
    tensors = graph.tensors()
    for info in [*inferred.graph.value_info, *inferred.graph.output]:
        tensor = tensors.get(info.name)
        if isinstance(tensor, gs.Variable) and info.type.HasField("tensor_type"):
            kind = info.type.tensor_type
            tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            if kind.HasField("shape"):
                dims = kind.shape.dim
                tensor.shape = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims]


def concrete_shapes(graph: gs.Graph, inputs: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor for given input shapes; tensors whose shape depends on values are left out.

    Args:
        graph: is not changed.
        inputs: model input name -> shape without dynamic dimensions.
    """
    concrete = _without_weights(graph)
    for tensor in concrete.inputs:
        if tensor.name in inputs:
            tensor.shape = list(inputs[tensor.name])
    size = -1
    while len(concrete.nodes) != size:
        size = len(concrete.nodes)
        for tensor in concrete.tensors().values():
            if isinstance(tensor, gs.Variable) and tensor not in concrete.inputs:
                tensor.shape = None
        infer_types(concrete)
        fold_constants(concrete, size_threshold=1 << 20)
        concrete.cleanup(remove_unused_graph_inputs=False)
    return {
        name: tuple(tensor.shape)
        for name, tensor in concrete.tensors().items()
        if tensor.shape is not None and all(isinstance(d, (int, np.integer)) for d in tensor.shape)
    }


def macs(node: gs.Node, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Multiply-accumulates of a convolution, product or recurrent layer; None if unknown, as for others."""
    count = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2, "MatMul": 2, "LSTM": 3, "GRU": 3, "RNN": 3}
    if node.op not in (*count, "Einsum"):
        return None
    wanted = [shapes.get(tensor.name) for tensor in node.inputs[: count.get(node.op)]]
    operands = [shape for shape in wanted if shape is not None]
    if len(operands) != len(wanted):
        return None
    if count.get(node.op) == 3:
        steps, weight, recurrent = operands
        return prod(steps[:2]) * (prod(weight) + prod(recurrent))
    out = shapes.get(node.outputs[0].name)
    if out is None:
        return None
    if node.op == "Einsum":
        return prod(out) * _contracted(node.attrs["equation"], operands)
    first, second = operands
    if node.op == "Conv":
        return prod(out) * prod(second[1:])
    if node.op == "ConvTranspose":
        return prod(first) * prod(second[1:])
    return prod(out) * first[-2 if node.attrs.get("transA", 0) else -1]


def _contracted(equation: str, shapes: Sequence[Sequence[int]]) -> int:
    """How many products are summed up for each value that an Einsum gives."""
    terms, _, result = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms.split(","), shapes, strict=True):
        before, dots, after = term.partition("...")
        sizes |= dict(zip(before, shape, strict=not dots))
        sizes |= dict(zip(after, shape[len(shape) - len(after) :], strict=True))
    kept = result if "->" in equation else {letter for letter in terms if terms.count(letter) == 1}
    return prod(size for letter, size in sizes.items() if letter not in kept)


def _without_weights(graph: gs.Graph) -> gs.Graph:
    """A copy whose large constants are graph inputs of the same dtype and shape."""
    light = graph.copy()
    for tensor in list(light.tensors().values()):
        if isinstance(tensor, gs.Constant) and prod(tensor.shape) > _SHAPE_VALUES:
            variable = gs.Variable(tensor.name, dtype=tensor.dtype, shape=list(tensor.shape))
            for node in list(tensor.outputs):
                node.inputs = [variable if t is tensor else t for t in node.inputs]
            light.inputs.append(variable)
    return light
