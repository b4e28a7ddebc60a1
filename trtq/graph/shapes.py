"""Dtypes and shapes of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from trtq.graph.evaluate import fold_constants
from trtq.graph.model import export

_SHAPE_VALUES = 1024  # constants up to this size may be shapes, which inference needs to see

_SHAPED_AS_INPUT = frozenset({"GroupNormalization", "MeanVarianceNormalization"})
"""Operators that ONNX does not infer, at some opset at least: what they give is of the first input's type."""


def infer_types(graph: gs.Graph) -> None:
    """Write the dtype and shape that ONNX shape inference finds onto the graph's variables, in place.

    Large weights are left out of what is inferred, so this costs no more on large models.
    """
    light = _without_weights(graph)
    for node in light.nodes:
        if node.op in _SHAPED_AS_INPUT:
            node.op, node.domain, node.attrs, node.inputs = "Identity", None, {}, node.inputs[:1]
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
