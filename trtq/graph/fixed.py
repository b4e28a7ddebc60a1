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


def deciding_inputs(graph: gs.Graph) -> set[str]:
    """The inputs that the conditions of the graph's Ifs are computed from."""
    waiting = [node.inputs[0] for node in graph.nodes if node.op == "If"]
    inputs, seen, found = {tensor.name for tensor in graph.inputs}, set(), set()
    while waiting:
        tensor = waiting.pop()
        if tensor.name in inputs:
            found.add(tensor.name)
        for node in tensor.inputs:
            if node.name not in seen:
                seen.add(node.name)
                waiting += node.inputs
    return found
