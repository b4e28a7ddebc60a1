"""Which tensors of a placement are INT8, what converts them, and the bytes of that, by hand."""

from __future__ import annotations

from dataclasses import replace

from cost.blocks import conv, finished, plan_of, residual_block, shapes_of, without
from small_nets import Net

from trtq.cost.fused import fuse
from trtq.cost.interface import Builder, Rest
from trtq.cost.placed import Placed, placed
from trtq.graph.place import POOL, RESIDUAL
from trtq.graph.plan import Plan

N = 8 * 64 * 56 * 56
"""Elements of the residual block's tensors."""

WEIGHTS = 64 * 64 * 9


def kernels(plan: Plan | None = None, rest: Rest = "fp16", builder: Builder = "tensorrt") -> list[Placed]:
    graph = residual_block()
    return placed(fuse(graph, shapes_of(graph)), plan_of(graph) if plan is None else plan, rest, builder)


def test_float() -> None:
    nothing = without(plan_of(residual_block()))
    for rest, size in (("fp16", 2), ("fp32", 4)):
        first, second, third, pool, _ = kernels(nothing, rest)  # type: ignore[arg-type]
        assert first.load.sizes == second.load.sizes == (size * WEIGHTS, size * N, size * N)
        assert third.load.sizes == (size * WEIGHTS, size * N, size * N, size * N)
        assert pool.load.sizes == (size * N, size * 8 * 64)
        assert {each.load.precision for each in (first, second, third, pool)} == {rest}


def test_an_input_is_rearranged_for_convolutions_once() -> None:
    nothing = without(plan_of(residual_block()))
    for rest, size in (("fp16", 2), ("fp32", 4)):
        first, *others = kernels(nothing, rest)  # type: ignore[arg-type]
        assert [(each.made, each.load.sizes) for each in first.before] == [(rest, (4 * N, size * N))]
        assert not any(each.before for each in others)


def test_int8_as_trtq_places_it() -> None:
    """Only the input is quantized by a kernel of its own; every other tensor is written in INT8."""
    first, second, third, pool, fc = kernels()
    assert [(each.made, each.load.sizes) for each in first.before] == [("int8", (4 * N, N))]
    assert first.load.sizes == second.load.sizes == (WEIGHTS, N, N)
    assert third.load.sizes == (WEIGHTS, N, N, N)
    assert pool.load.sizes == (N, 8 * 64)
    assert fc.load.sizes == (640, 8 * 64, 2 * 80)
    assert {each.load.precision for each in (first, second, third, pool, fc)} == {"int8"}
    assert not any(each.before for each in (second, third, pool, fc))


def test_an_input_that_comes_in_int8_needs_no_kernel() -> None:
    graph = residual_block()
    view = fuse(graph, shapes_of(graph))
    first, *_ = placed(view, plan_of(graph), "fp16", int8_inputs=["x"])
    assert (first.before, first.load.sizes) == ((), (WEIGHTS, N, N))
    nothing = without(plan_of(graph))
    assert placed(view, nothing, "fp16", int8_inputs=["x"]) == placed(view, nothing, "fp16")


def test_without_q_on_the_residual_input_it_is_written_in_float16_and_quantized() -> None:
    """As in NVIDIA's engines of ResNets with Q/DQ in front of convolutions only."""
    plan = plan_of(residual_block())
    plan = replace(plan, edges=[edge for edge in plan.edges if edge.rule != RESIDUAL])
    first, second, third, *_ = kernels(plan)
    assert first.load.sizes == (WEIGHTS, N, 2 * N)
    assert [(each.made, each.load.sizes) for each in second.before] == [("int8", (2 * N, N))]
    assert third.load.sizes == (WEIGHTS, N, 2 * N, N)


def test_a_layer_in_float16_has_reformats_around_it() -> None:
    """conv2 in float16: conv1 writes float16 for it and for the INT8 that the addition wants; what it writes
    itself is quantized by a kernel, as a float16 convolution writes no INT8."""
    plan = plan_of(residual_block())
    nodes = [replace(node, int8=node.name != "conv2") for node in plan.nodes]
    plan = replace(plan, nodes=nodes, edges=[edge for edge in plan.edges if edge.node != "conv2"])
    first, second, third, *_ = kernels(plan)
    assert first.load.sizes == (WEIGHTS, N, 2 * N)
    assert second.load.sizes == (2 * WEIGHTS, 2 * N, 2 * N)
    assert [each.load.sizes for each in third.before] == [(2 * N, N), (2 * N, N)]
    assert (second.load.precision, third.load.precision) == ("fp16", "int8")


def test_max_pooling_moves_int8() -> None:
    net = Net()
    x = net.op("Relu", conv(net, net.input(8, 64, 56, 56), 64, 64, "conv1"), name="relu")
    pooled = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], name="pool")
    graph = finished(net, conv(net, pooled, 64, 64, "conv2"))
    first, pool, second = placed(fuse(graph, shapes_of(graph)), plan_of(graph), "fp16")
    assert first.load.sizes == (WEIGHTS, N, N)
    assert pool.load.sizes == (N, N // 4)
    assert pool.before == second.before == ()


def test_a_thin_int8_convolution_writes_float32_where_it_cannot_write_int8() -> None:
    """As in NVIDIA's engine of a ResNet whose first convolution is read in floating point."""
    net = Net()
    x = conv(net, net.input(8, 3, 56, 56), 3, 64, "conv1")
    graph = finished(net, conv(net, x, 64, 64, "conv2"), x)
    first, second = placed(fuse(graph, shapes_of(graph)), plan_of(graph), "fp16")
    assert first.load.sizes == (64 * 27, 8 * 4 * 56 * 56, 4 * N)
    assert [each.load.sizes for each in second.before] == [(4 * N, N)]


def test_tensorrt_for_rtx_does_not_fuse_int8_convolutions() -> None:
    """They write float32 sums, and a generated kernel scales, adds, and quantizes."""
    first, _, third, *_, fc = kernels(builder="tensorrt-rtx")
    assert first.load.sizes == (WEIGHTS, N, 4 * N)
    assert [load.sizes for load in first.after] == [(4 * N, N)]
    assert third.load.sizes == (WEIGHTS, N, 4 * N)
    assert [load.sizes for load in third.after] == [(4 * N, N, N)]
    assert fc.load.sizes == (640, 8 * 64, 2 * 80)  # sums of matrix products are float16
    nothing = without(plan_of(residual_block()))
    assert kernels(nothing, builder="tensorrt-rtx") == kernels(nothing)


def test_a_copy_for_a_concatenation() -> None:
    net = Net()
    x = net.input(8, 64, 56, 56)
    a, b = conv(net, x, 64, 64, "a"), conv(net, x, 64, 64, "b")
    end = conv(net, net.op("Concat", a, b, axis=1, name="concat"), 128, 64, "end")
    graph = finished(net, end, net.op("Relu", b, name="relu"))
    found = placed(fuse(graph, shapes_of(graph)), without(plan_of(graph)), "fp16")
    (copy,) = [each for each in found if each.kernel.nodes == ["concat"]]
    assert (copy.load.sizes, copy.before) == ((2 * N, 2 * N), ())


def test_pooling_in_float_after_int8() -> None:
    plan = plan_of(residual_block())
    plan = replace(plan, edges=[e for e in plan.edges if e.rule not in (POOL, "moved-input")])
    *_, third, pool, fc = kernels(plan)
    assert third.load.sizes == (WEIGHTS, N, N, 2 * N)
    assert pool.load.sizes == (2 * N, 2 * 8 * 64)
    assert [each.made for each in fc.before] == ["int8"]


def test_generated_kernels_take_over_what_follows_a_product_in_tensorrt_for_rtx() -> None:
    """As in its engines of BERT, where the bias, the addition and the normalization are one kernel."""
    net = Net()
    x = net.input(8, 128, 384)
    made = net.op("MatMul", x, net.weight(384, 384), name="product")
    graph = finished(net, net.op("Softmax", net.op("Erf", made, name="erf"), axis=-1, name="softmax"))
    product, softmax = placed(fuse(graph, shapes_of(graph)), plan_of(graph), "fp16", "tensorrt-rtx")
    n = 8 * 128 * 384
    assert (product.load.sizes, product.after) == ((384 * 384, n, 2 * n), ())
    assert softmax.load.sizes == (2 * n, 2 * n)
