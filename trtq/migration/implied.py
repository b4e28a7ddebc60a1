"""What a calibration table implies: the model that TensorRT up to 10 may make of it by itself.

Implicit quantization does not say where it quantizes: TensorRT up to 10 "uses INT8 opportunistically", and
a layer may run in INT8 if it "has assigned quantization scales on its data inputs and outputs" (Developer
Guide, "Explicit vs. implicit quantization"). What a table *implies* is here the model in which every layer
that may run in INT8 does so:

- layers are those after TensorRT's fusions: batch normalization folded, pointwise operators (an activation,
  a residual addition) behind the convolution or matrix product that alone feeds them; tensors inside such a
  layer are not quantized;
- a layer may run in INT8 if its first operator is one of `INT8_OPS` and the table has a scale for each of its
  floating-point inputs and for its output;
- the inputs of those layers are quantized with the table's scales, and the weights of Conv, Gemm and MatMul
  per output channel.

That is an upper bound: for speed TensorRT may leave any of these layers in floating point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx_graphsurgeon as gs

from trtq.calibration.table import Table
from trtq.graph.place import FLOATS, place
from trtq.graph.plan import Edge, Plan
from trtq.graph.rewrite import rewrite
from trtq.migration.source import Source

MATRIX_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

POINTWISE_OPS = frozenset(
    {
        "Add",
        "Clip",
        "Div",
        "Elu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Mul",
        "PRelu",
        "Relu",
        "Sigmoid",
        "Sub",
        "Tanh",
    }
)
"""Operators that TensorRT fuses with each other and behind a convolution or matrix product."""

INT8_OPS = MATRIX_OPS | POINTWISE_OPS | {"AveragePool", "Concat", "GlobalAveragePool", "Resize"}
"""First operators of layers that implicit quantization may run in INT8. Operators that only move values
(MaxPool, Reshape, Transpose, ...) take what their neighbours have."""


@dataclass(frozen=True)
class Implied:
    """What a table lets TensorRT up to 10 run in INT8.

    Attributes:
        layers: first nodes of the layers that may run in INT8 by their kind.
        missing: first node of a layer -> its inputs and outputs without a scale, for which it cannot.
    """

    layers: Sequence[str]
    missing: Mapping[str, Sequence[str]]

    @property
    def int8(self) -> int:
        """How many layers may run in INT8."""
        return len(self.layers) - len(self.missing)

    def text(self) -> str:
        """For a person, with the tensors that lack a scale; at most three."""
        said = f"the table implies {self.int8} of {len(self.layers)} layers in INT8"
        tensors = list(dict.fromkeys(tensor for found in self.missing.values() for tensor in found))
        if not tensors:
            return said
        more = ", …" if len(tensors) > 3 else ""
        return f"{said}: it has no scale for {', '.join(tensors[:3])}{more}"

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"int8": self.int8, **asdict(self)}


def implied(source: Source, table: Table) -> Implied:
    """What a table lets TensorRT run in INT8 (see the module)."""
    layers = [layer for layer in _layers(source.model.graph) if any(_layer_inputs(layer))]
    missing = {layer[0].name: _missing(layer, source, table) for layer in layers}
    return Implied(
        [layer[0].name for layer in layers], {name: found for name, found in missing.items() if found}
    )


def implied_model(source: Source, table: Table) -> gs.Graph:
    """The model that a table implies (see the module), as a Q/DQ graph: for simulation only.

    Raises:
        InputError: as `place`.
    """
    edges, int8 = [], set()
    for layer in _layers(source.model.graph):
        inputs = [*_layer_inputs(layer)]
        if inputs and not _missing(layer, source, table):
            int8.add(layer[0].name)
            names = [node.inputs[index].name for node, index in inputs]
            edges += [
                Edge(name, node.name, index, "implied", name)
                for name, (node, index) in zip(names, inputs, strict=True)
            ]
    weights = [weight for weight in place(source.model).weights if weight.node in int8]
    plan = Plan(source.model.sha256, [], edges, weights)
    rows = ((tensor, source.row(tensor, table)) for tensor in plan.tensors)
    return rewrite(source.model.graph, plan, {tensor: table.scales[row] for tensor, row in rows if row})


def _missing(layer: list[gs.Node], source: Source, table: Table) -> list[str]:
    """What enters and leaves a layer without a scale in the table."""
    tensors = [node.inputs[index].name for node, index in _layer_inputs(layer)]
    return [name for name in [*tensors, layer[-1].outputs[0].name] if source.row(name, table) is None]


def _layers(graph: gs.Graph) -> Iterator[list[gs.Node]]:
    """The layers that may run in INT8: an operator and the pointwise ones that fuse behind it.

    A pointwise operator fuses with the one of its inputs that is computed last, if nothing else reads it.
    """
    order = {id(node): index for index, node in enumerate(graph.nodes)}
    behind: dict[int, gs.Node] = {}
    fused: set[int] = set()
    for node in graph.nodes:
        if node.op not in POINTWISE_OPS:
            continue
        producers = [
            t.inputs[0]
            for t in node.inputs
            if len(t.inputs) == len(t.outputs) == 1
            and t.inputs[0].op in MATRIX_OPS | POINTWISE_OPS
            and not any(t is output for output in graph.outputs)
        ]
        if producers:
            behind[id(max(producers, key=lambda producer: order[id(producer)]))] = node
            fused.add(id(node))
    for node in graph.nodes:
        if node.op not in INT8_OPS or id(node) in fused:
            continue
        layer = [node]
        while id(layer[-1]) in behind:
            layer.append(behind[id(layer[-1])])
        yield layer


def _layer_inputs(layer: list[gs.Node]) -> Iterator[tuple[gs.Node, int]]:
    """Where floating-point activations enter a layer: node, position of the input."""
    for position, node in enumerate(layer):
        count = 2 if node.op in MATRIX_OPS else 1 if node.op == "Resize" else len(node.inputs)
        for index, tensor in enumerate(node.inputs[:count]):
            inside = position > 0 and tensor is layer[position - 1].outputs[0]
            if isinstance(tensor, gs.Variable) and tensor.name and tensor.dtype in FLOATS and not inside:
                yield node, index
