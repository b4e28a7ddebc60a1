"""Dtypes and shapes of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from trtq.errors import InputError
from trtq.graph import references
from trtq.graph.evaluate import fold_constants
from trtq.graph.foreign import is_foreign_node
from trtq.graph.model import export
from trtq.graph.surgery import cleaned, copied
from trtq.graph.weights import values_of

_SHAPE_VALUES = 1024  # constants up to this size may be shapes, which inference needs to see

_SHAPED_AS_INPUT = frozenset({"GroupNormalization", "MeanVarianceNormalization"})
"""Operators that ONNX does not infer, at some opset at least: what they give is of the first input's type."""


def infer_types(graph: gs.Graph) -> None:
    """Write the dtype and shape that ONNX shape inference finds onto the graph's variables, in place.

    Large weights are left out of what is inferred, so this costs no more on large models. Of an operator that
    ONNX does not define, the reference tells them, run on ones; without one, nothing is known.
    """
    _infer(graph)
    tried: set[int] = set()
    while node := next((n for n in graph.nodes if id(n) not in tried and _is_untyped(n)), None):
        tried.add(id(node))
        if _type_by_reference(node):
            _infer(graph)


def _infer(graph: gs.Graph) -> None:
    light = without_weights(graph)
    for node in light.nodes:
        if node.op in _SHAPED_AS_INPUT:
            node.op, node.domain, node.attrs, node.inputs = "Identity", None, {}, node.inputs[:1]
    inferred = onnx.shape_inference.infer_shapes(export(light), data_prop=True)
    tensors = graph.tensors()
    for info in [*inferred.graph.value_info, *inferred.graph.output]:
        tensor = tensors.get(info.name)
        if isinstance(tensor, gs.Variable) and info.type.HasField("tensor_type"):
            kind = info.type.tensor_type
            if kind.elem_type:
                tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            if kind.HasField("shape"):
                dims = kind.shape.dim
                tensor.shape = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims]


def _is_untyped(node: gs.Node) -> bool:
    """Whether an operator that ONNX does not define has inputs of known types, and an output of unknown."""
    if not is_foreign_node(node):
        return False
    inputs, outputs = (
        [tensor.dtype is not None and tensor.shape is not None for tensor in side if tensor.name]
        for side in (node.inputs, node.outputs)
    )
    return all(inputs) and not all(outputs)


def _type_by_reference(node: gs.Node) -> bool:
    """Write the types of what a node's reference makes of ones onto its outputs; whether it has a reference.

    Where it does not take ones, its outputs are taken for tensors of the first floating-point input's type.
    """
    if references.find(node.op, node.domain) is None:
        return False
    inputs = [_example(tensor) if tensor.name else None for tensor in node.inputs]
    sizes = [size for tensor in node.inputs if tensor.name for size in tensor.shape]
    static = all(isinstance(size, (int, np.integer)) for size in sizes)
    outputs = [t for t in node.outputs if t.name and (t.dtype is None or t.shape is None)]
    try:
        found = references.compute(OnnxExporter.export_node(node), inputs, {})
    except InputError:
        floats = (t.dtype for t in node.inputs if t.name and _numpy_dtype(t).kind == "f")
        for tensor in outputs:
            tensor.dtype = tensor.dtype or next(floats, np.dtype(np.float32))
        return True
    for tensor in outputs:
        array = found[tensor.name]
        tensor.dtype = array.dtype
        tensor.shape = list(array.shape) if static else [None] * array.ndim
    return True


def _example(tensor: gs.Tensor) -> np.ndarray:
    """A constant's values, or ones of a variable's type; 1 stands for sizes that are not known."""
    if isinstance(tensor, gs.Constant):
        return values_of(tensor)
    shape = [size if isinstance(size, (int, np.integer)) else 1 for size in tensor.shape]
    return np.ones(shape, _numpy_dtype(tensor))


def _numpy_dtype(tensor: gs.Tensor) -> np.dtype:
    """A tensor's dtype; GraphSurgeon has ONNX's number for those that NumPy lacks."""
    kind = tensor.dtype
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind) if isinstance(kind, int) else kind)


def concrete_shapes(graph: gs.Graph, inputs: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor for given input shapes; tensors whose shape depends on values are left out.

    Args:
        graph: is not changed.
        inputs: model input name -> shape without dynamic dimensions.
    """
    concrete = without_weights(graph)
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
        cleaned(concrete)
    return {
        name: tuple(tensor.shape)
        for name, tensor in concrete.tensors().items()
        if tensor.shape is not None and all(isinstance(d, (int, np.integer)) for d in tensor.shape)
    }


def without_weights(graph: gs.Graph) -> gs.Graph:
    """A copy whose large constants are graph inputs of the same dtype and shape."""
    light = copied(graph)
    for tensor in list(light.tensors().values()):
        if isinstance(tensor, gs.Constant) and prod(tensor.shape) > _SHAPE_VALUES:
            variable = gs.Variable(tensor.name, dtype=tensor.dtype, shape=list(tensor.shape))
            for node in list(tensor.outputs):
                node.inputs = [variable if t is tensor else t for t in node.inputs]
            light.inputs.append(variable)
    return light
