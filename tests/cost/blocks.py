"""Graphs whose kernels can be told by hand, and plans for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_graphsurgeon as gs
from small_nets import Net

from trtq.graph.model import Model
from trtq.graph.place import place
from trtq.graph.plan import Plan
from trtq.graph.shapes import concrete_shapes, infer_types

Shapes = Mapping[str, Sequence[int]]


def finished(net: Net, *outputs: gs.Variable) -> gs.Graph:
    net.graph.outputs = list(outputs)
    net.graph.cleanup().toposort()
    infer_types(net.graph)
    return net.graph


def shapes_of(graph: gs.Graph) -> Shapes:
    return concrete_shapes(graph, input_shapes(graph))


def input_shapes(graph: gs.Graph) -> Shapes:
    return {tensor.name: tuple(tensor.shape) for tensor in graph.inputs}


def plan_of(graph: gs.Graph) -> Plan:
    """As trtq places Q/DQ."""
    return place(Model(Path("net.onnx"), graph, "0" * 64), input_shapes=input_shapes(graph))


def without(plan: Plan) -> Plan:
    """Nothing in INT8."""
    return replace(plan, nodes=[replace(node, int8=False) for node in plan.nodes], edges=[], weights=[])


def residual_block(batch: int = 8, channels: int = 64, size: int = 56) -> gs.Graph:
    """conv1 + relu, conv2 + relu, conv3 + Add(conv1's) + relu, pool, fc."""
    net = Net()
    x = net.input(batch, channels, size, size)
    first = net.op("Relu", conv(net, x, channels, channels, "conv1"), name="relu1")
    second = net.op("Relu", conv(net, first, channels, channels, "conv2"), name="relu2")
    third = net.op("Add", conv(net, second, channels, channels, "conv3"), first, name="add")
    pooled = net.op("GlobalAveragePool", net.op("Relu", third, name="relu3"), name="pool")
    flat = net.op("Flatten", pooled, name="flat")
    return finished(net, net.op("Gemm", flat, net.weight(10, channels), transB=1, name="fc"))


def conv(
    net: Net,
    x: gs.Tensor,
    before: int,
    after: int,
    name: str,
    size: int = 3,
    stride: int = 1,
    group: int = 1,
) -> gs.Variable:
    weight = net.weight(after, before // group, size, size)
    return net.op("Conv", x, weight, name=name, strides=[stride] * 2, pads=[size // 2] * 4, group=group)
