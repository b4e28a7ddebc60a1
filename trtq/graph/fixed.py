"""Inputs that always have one value: constants of the graph, so that what they decide is decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.files import sha256_json
from trtq.graph.inputs import InputSpec
from trtq.graph.model import Model


def with_fixed(model: Model, values: Mapping[str, NDArray]) -> Model:
    """The model whose graph has constants for some of its inputs; they are no longer inputs of what is made
    from it. Its graph is changed in place.

    Args:
        values: input -> its value, as the model takes it.
    """
    if not values:
        return model
    specs: list[InputSpec] = [spec for spec in model.inputs if spec.name in values]
    for tensor in [tensor for tensor in model.graph.inputs if tensor.name in values]:
        model.graph.inputs.remove(tensor)
        tensor.to_constant(values[tensor.name])
    digest = sha256_json([model.sha256, {name: value.tolist() for name, value in sorted(values.items())}])
    return replace(model, sha256=digest, fixed=(*model.fixed, *specs))


_DECIDING: Mapping[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "If": (0,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
}
"""Inputs of operators that say which branch is taken, or how large the output is."""


def deciding_inputs(graph: gs.Graph) -> set[str]:
    """The inputs from whose values the conditions of Ifs, or sizes of tensors, are computed.

    TensorRT wants ranges of such values, and fuses no quantizers in the branches of an If.
    """
    waiting = [
        node.inputs[index]
        for node in graph.nodes
        for index in _DECIDING.get(node.op, ())
        if index < len(node.inputs)
    ]
    inputs, found = {tensor.name for tensor in graph.inputs}, set()
    seen = set()
    while waiting:
        tensor = waiting.pop()
        if tensor.name in inputs:
            found.add(tensor.name)
        for node in tensor.inputs:
            if node.name not in seen and node.op not in ("Shape", "Size"):
                seen.add(node.name)
                waiting += node.inputs
    return found
