"""Which nodes become one kernel, as TensorRT's engine inspector shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from cost.blocks import conv, finished, plan_of, residual_block, shapes_of, without
from nets import engine
from small_nets import Net

from trtq.cost.fused import Fused, Gemm, fuse
from trtq.cost.placed import placed
from trtq.graph.products import macs
from trtq.graph.rewrite import rewrite


def fused(graph: gs.Graph) -> Fused:
    return fuse(graph, shapes_of(graph))


def nodes(graph: gs.Graph) -> list[list[str]]:
    return [kernel.nodes for kernel in fused(graph).kernels]


def test_a_residual_block() -> None:
    """As engines of ResNets have it: Conv + Add + Relu is one, Flatten is none."""
    view = fused(residual_block())
    assert [kernel.nodes for kernel in view.kernels] == [
        ["conv1", "relu1"],
        ["conv2", "relu2"],
        ["conv3", "add", "relu3"],
        ["pool", "flat"],
        ["fc"],
    ]
    third = view.kernels[2]
    assert third.gemms == [Gemm(8 * 56 * 56, 64, 64 * 9, 1, 64)]
    assert third.weights == 64 * 64 * 9
    assert [read.ends for read in third.reads] == [(("conv3", 0),), (("add", 1),)]
    assert (third.operands, third.is_conv) == (1, True)
    assert view.shapes[third.writes[0]] == (8, 64, 56, 56)


def test_an_addition_joins_the_convolution_that_is_computed_last() -> None:
    net = Net()
    x = net.input(1, 8, 4, 4)
    total = net.op("Add", conv(net, x, 8, 8, "a"), conv(net, x, 8, 8, "b"), name="add")
    assert nodes(finished(net, total)) == [["a"], ["b", "add"]]


def test_a_convolution_that_others_read_keeps_its_output() -> None:
    net = Net()
    made = conv(net, net.input(1, 8, 4, 4), 8, 8, "conv")
    assert nodes(finished(net, net.op("Relu", made, name="relu"), made)) == [["conv"], ["relu"]]


@pytest.mark.parametrize("order", [1, -1])
def test_swish_is_one_activation(order: int) -> None:
    net = Net()
    made = conv(net, net.input(1, 8, 4, 4), 8, 8, "conv")
    factors = [made, net.op("Sigmoid", made, name="sigmoid")][::order]
    assert nodes(finished(net, net.op("Mul", *factors, name="mul"))) == [["conv", "sigmoid", "mul"]]


def test_a_gate_of_something_else_is_a_kernel() -> None:
    """Squeeze and excitation: the sigmoid is the end of its convolution, the product is pointwise."""
    net = Net()
    x = conv(net, net.input(1, 8, 4, 4), 8, 8, "conv")
    gate = net.op("Sigmoid", conv(net, net.op("GlobalAveragePool", x, name="pool"), 8, 8, "se", 1), name="s")
    found = nodes(finished(net, net.op("Mul", x, gate, name="mul")))
    assert found == [["conv"], ["pool"], ["se", "s"], ["mul"]]


def test_normalization_and_its_neighbours_are_one_generated_kernel() -> None:
    net = Net()
    x = net.input(1, 16, 32)
    centred = net.op("Sub", x, net.op("ReduceMean", x, axes=[-1], name="mean"), name="sub")
    spread = net.op("ReduceMean", net.op("Mul", centred, centred, name="sq"), axes=[-1], name="var")
    out = net.op("Div", centred, net.op("Sqrt", spread, name="sqrt"), name="div")
    (kernel,) = fused(finished(net, out)).kernels
    assert sorted(kernel.nodes) == ["div", "mean", "sq", "sqrt", "sub", "var"]
    assert [read.tensor for read in kernel.reads] == ["x"]
    assert len(kernel.writes) == 1


def attention(heads: int, length: int, size: int) -> gs.Graph:
    net = Net()
    q, k, v = (net.input(1, heads, length, size, name=name) for name in "qkv")
    turned = net.op("Transpose", k, perm=[0, 1, 3, 2], name="turn")
    scores = net.op("Mul", net.op("MatMul", q, turned, name="qk"), np.float32(0.1), name="scale")
    return finished(net, net.op("MatMul", net.op("Softmax", scores, axis=-1, name="softmax"), v, name="av"))


def test_attention_is_one_kernel() -> None:
    (kernel,) = fused(attention(4, 16, 32)).kernels
    assert kernel.work == "attention"
    assert kernel.weighted == ["qk", "av"]
    assert kernel.gemms == [Gemm(16, 16, 32, 4, 32), Gemm(16, 32, 16, 4, 16)]
    assert {read.tensor for read in kernel.reads} == {"q", "k", "v"}


def test_attention_with_large_heads_is_three() -> None:
    found = nodes(attention(1, 16, 512))
    assert [kernel for kernel in found if kernel != ["turn"]] == [["qk", "scale"], ["softmax"], ["av"]]


def test_what_is_concatenated_is_copied_only_where_others_read_it() -> None:
    net = Net()
    x = net.input(1, 8, 4, 4)
    a, b = conv(net, x, 8, 8, "a"), conv(net, x, 8, 8, "b")
    both = net.op("Concat", a, b, axis=1, name="concat")
    graph = finished(net, conv(net, both, 16, 8, "end"), net.op("Relu", b, name="relu"))
    view = next(kernel for kernel in fused(graph).kernels if kernel.work == "view")
    assert [(read.tensor, read.copied) for read in view.reads] == [(a.name, False), (b.name, True)]


def test_a_strided_convolution_of_size_one_reads_a_quarter() -> None:
    net = Net()
    graph = finished(net, conv(net, net.input(1, 8, 4, 4), 8, 8, "conv", size=1, stride=2))
    assert fused(graph).kernels[0].reads[0].share == 0.25


@pytest.mark.parametrize("group", [1, 2, 8])
def test_products_have_the_multiply_accumulates_of_the_plan(group: int) -> None:
    net = Net()
    graph = finished(net, conv(net, net.input(2, 8, 6, 6), 8, 16, "conv", stride=2, group=group))
    (kernel,) = fused(graph).kernels
    assert kernel.gemms[0].count == group
    assert sum(g.macs for g in kernel.gemms) == macs(graph.nodes[0], shapes_of(graph))


def test_products_of_matrices_have_the_multiply_accumulates_of_the_plan() -> None:
    net = Net()
    x = net.input(2, 3, 5, 7)
    y = net.op("MatMul", x, net.weight(7, 11), name="constant")
    z = net.op("MatMul", x, net.input(2, 3, 7, 5, name="other"), name="variable")
    graph = finished(net, y, z)
    view = {kernel.nodes[0]: kernel.gemms for kernel in fused(graph).kernels}
    assert view == {"constant": [Gemm(30, 11, 7, 1, 7)], "variable": [Gemm(5, 5, 7, 6, 7)]}
    for node in graph.nodes:
        assert sum(g.macs for g in view[node.name]) == macs(node, shapes_of(graph))


def test_every_kernel_reads_only_what_is_there() -> None:
    for graph in (residual_block(), attention(4, 16, 32)):
        view = fused(graph)
        there = set(view.inputs)
        for kernel in view.kernels:
            assert {read.tensor for read in kernel.reads} <= there
            there |= set(kernel.writes)
        assert view.outputs <= there


def test_what_moves_values_one_after_the_other_is_one_kernel() -> None:
    """A shortcut of ResNet-20: every other position, and channels of zeros."""
    net = Net()
    x = net.op("Relu", net.input(1, 8, 4, 4), name="relu")
    ends = (np.array([0]), np.array([4]), np.array([2]), np.array([2]))
    sliced = net.op("Slice", x, *ends, name="slice")
    padded = net.op("Pad", sliced, np.array([0, 4, 0, 0, 0, 4, 0, 0]), name="pad")
    assert nodes(finished(net, padded)) == [["relu"], ["slice", "pad"]]


@pytest.mark.slow
def test_kernels_and_bytes_are_those_that_tensorrt_for_rtx_compiles(tmp_path: Path) -> None:
    """What the builder lists of engines of the residual block, in float32 and as trtq quantizes it."""
    graph = residual_block(batch=2, channels=32, size=16)
    plan = plan_of(graph)
    scales = {tensor: np.float32(0.05) for tensor in plan.tensors}
    view = fused(graph)
    quantized = rewrite(graph, plan, scales)
    for name, model, made in (("float", graph, without(plan)), ("int8", quantized, plan)):
        folder = tmp_path / name
        folder.mkdir()
        compiled = engine(model, folder).compiled
        kernels = placed(view, made, "fp32", "tensorrt-rtx")
        loads = [load for k in kernels for load in (k.load, *k.after, *(b.load for b in k.before))]
        assert len(loads) == pytest.approx(compiled.kernels, abs=2), name
        assert sum(load.bytes for load in loads) == pytest.approx(compiled.bytes_moved(2), rel=0.15), name
