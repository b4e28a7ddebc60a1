"""Dtypes and shapes of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from trtq.graph.model import export
from trtq.graph.weights import read_foldable

_END = np.iinfo(np.int64).max  # of a Slice without an end
_SHAPE_VALUES = 1024  # constants up to this size may be shapes, which inference needs to see


def fold_constants(graph: gs.Graph, size_threshold: int | None = None) -> None:
    """Evaluate, in place, everything that does not depend on the graph's inputs, known shapes included.

    Args:
        size_threshold: leave tensors above this many bytes to run time.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # its constant folding warns about harmless things
    for body in (graph, *graph.subgraphs(recursive=True)):
        _slice_shapes(body)
    read_foldable(graph.toposort())
    graph.fold_constants(size_threshold=size_threshold)


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


def _slice_shapes(graph: gs.Graph) -> None:
    """Write a Shape with `start` or `end` as Shape and Slice: GraphSurgeon overlooks them when it folds."""
    for node in [n for n in graph.nodes if n.op == "Shape" and n.attrs.keys() & {"start", "end"}]:
        bounds = node.attrs.pop("start", 0), node.attrs.pop("end", _END)
        whole = gs.Variable(f"{node.name}/whole", np.int64)
        limits = [
            gs.Constant(f"{node.name}/{name}", np.array([value], np.int64))
            for name, value in zip(("start", "end"), bounds, strict=True)
        ]
        graph.nodes.append(gs.Node("Slice", f"{node.name}/slice", {}, [whole, *limits], [node.outputs[0]]))
        node.outputs = [whole]


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
