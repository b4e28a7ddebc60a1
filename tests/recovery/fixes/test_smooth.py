"""Channel-wise scaling: the function stays, outliers go into the weights, and only where that is exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from small_graphs import Case, outputs, range_of, relative_error, small_case

from trtq.data.load import load_samples
from trtq.data.preprocess import Preprocess
from trtq.graph.fit import of_model
from trtq.graph.fold import fold
from trtq.graph.model import load_model
from trtq.graph.place import RESIDUAL, leave_out, place
from trtq.recovery.fixes.smooth import find_streams, scale_stream, smooth, tamed
from trtq.simulation.similarity import sqnr_db


def pre_norm(case: Case) -> None:
    """A normalization that two layers read."""
    x = case.input("x", 4)
    y = case.node("LayerNormalization", x, np.array([9, 1, 1, 2], np.float32), case.ones(4), axis=-1)
    case.output(case.node("Mul", case.linear(y, 4, 3), case.linear(y, 4, 3)), 3)


def decomposed(case: Case) -> None:
    """RMSNorm as exporters write it, with a shift."""
    x = case.input("x", 4)
    mean = case.node("ReduceMean", case.node("Mul", x, x), axes=[-1], keepdims=1)
    normal = case.node("Div", x, case.node("Sqrt", mean))
    y = case.node("Add", case.node("Mul", np.array([9, 1, 1, 2], np.float32), normal), case.ones(4))
    case.output(case.linear(y, 4, 3), 3)


def gelu(case: Case) -> None:
    """As exporters write it."""
    h = case.linear(case.input("x", 4), 4, 6)
    one = case.node("Add", case.node("Erf", case.node("Div", h, np.float32(2**0.5))), np.float32(1))
    y = case.node("Mul", case.node("Mul", h, one), np.float32(0.5))
    case.output(case.linear(y, 6, 3), 3)


def depthwise(case: Case) -> None:
    """Convolutions, one of them depthwise, with a ReLU between, and a residual Add."""
    x = case.input("x", 3, 6, 6)
    a = case.conv(x, 3, 4, pads=(1, 1, 1, 1))
    b = case.conv(case.node("Relu", a), 4, 4, group=4, pads=(1, 1, 1, 1))
    c = case.conv(case.node("Relu", case.node("Add", b, a)), 4, 4, group=2)
    case.output(c, 4, None, None)


def post_norm(case: Case) -> None:
    """A normalization that a layer and the residual Add around it read."""
    x = case.input("x", 8)
    gamma = np.array([50, 1, 1, 1, 1, 1, 1, 1], np.float32)
    y = case.node("LayerNormalization", x, gamma, case.ones(8), axis=-1)
    weight = case.weight(8, 8)
    weight[0] /= 50
    z = case.node("Add", case.node("MatMul", y, weight), y)
    case.output(case.node("LayerNormalization", z, case.ones(8), case.ones(8), axis=-1), 8)


@pytest.mark.parametrize("build", [pre_norm, decomposed, gelu, depthwise, post_norm])
def test_any_factors_keep_the_function(tmp_path: Path, build: Callable[[Case], None]) -> None:
    case = small_case(tmp_path, build)
    streams = find_streams(case.graph)
    expected = outputs(case.graph, case.samples)
    assert streams
    for stream in streams:
        name = stream.readers[0].inputs[0].name
        before = range_of(case.graph, name, case.samples)
        factors = np.random.default_rng(1).uniform(0.1, 10, size=stream.channels)
        scale_stream(case.graph, stream, factors)
        after = range_of(case.graph, name, case.samples)
        np.testing.assert_allclose(after, np.array(before) / factors, rtol=1e-4, atol=1e-5)
        assert relative_error(expected, outputs(case.graph, case.samples)) < 1e-4


def clipped(case: Case) -> None:
    y = case.node("Clip", case.conv(case.input("x", 3, 6, 6), 3, 4), np.float32(0), np.float32(6))
    case.output(case.conv(y, 4, 2), 2, None, None)


def silu(case: Case) -> None:
    h = case.linear(case.input("x", 4), 4, 6)
    case.output(case.linear(case.node("Mul", h, case.node("Sigmoid", h)), 6, 2), 2)


def normalized_conv(case: Case) -> None:
    """A residual Add that fuses with the Conv in front of it."""
    y = case.node("Mul", case.node("Sigmoid", case.input("x", 3, 6, 6)), np.ones((3, 1, 1), np.float32))
    z = case.node("Add", case.conv(y, 3, 3), y)
    case.output(case.node("Softmax", z, axis=1), 3, None, None)


def shared_weights(case: Case) -> None:
    weight = gs.Constant("shared", case.weight(4, 4))
    y = case.node("MatMul", case.input("x", 4), weight)
    case.output(case.node("MatMul", case.node("Relu", y), weight), 4)


@pytest.mark.parametrize("build", [clipped, silu, normalized_conv, shared_weights])
def test_what_does_not_commute_is_left_alone(tmp_path: Path, build: Callable[[Case], None]) -> None:
    case = small_case(tmp_path, build)
    assert find_streams(case.graph) == []
    assert smooth(case.graph, case.plan, case.samples) is None


def test_an_outlier_channel_is_moved_into_the_weights(tmp_path: Path) -> None:
    def outlier(case: Case) -> None:
        gamma = np.array([300, 1, 1, 1, 1, 1, 1, 1], np.float32)
        x = case.input("x", 8)
        y = case.node("LayerNormalization", x, gamma, np.zeros(8, np.float32), axis=-1)
        weight = case.weight(8, 3)
        weight[0] /= 300
        case.output(case.node("MatMul", y, weight), 3)

    case = small_case(tmp_path, outlier)
    found = smooth(case.graph, case.plan, case.samples)
    assert found is not None
    smoothed = found.graph
    expected = outputs(case.graph, case.samples)
    assert relative_error(expected, outputs(smoothed, case.samples)) < 1e-5
    plain, better = (
        sqnr_db(expected[0], outputs(case.quantized(graph).rewritten(), case.samples)[0])[0]
        for graph in (case.graph, smoothed)
    )
    assert better > plain + 10
    gamma = next(n for n in smoothed.nodes if n.op == "LayerNormalization").inputs[1].values
    assert gamma.max() / gamma.min() < 20  # was 300


def test_resnet_keeps_its_function(zoo: Path) -> None:
    model = load_model(zoo / "models" / "resnet20_cifar10.onnx")
    fold(model.graph)
    steps = {"input": Preprocess.parse("input", {"from": "images", "scale": "1/255", "layout": "NCHW"})}
    samples = load_samples(str(zoo / "cifar10" / "calib.npz"), model.inputs, steps).subset(range(8))
    found = smooth(model.graph, place(model), samples)
    assert found is not None
    changed = found.graph
    assert [n.op for n in changed.nodes] == [n.op for n in model.graph.nodes]
    assert relative_error(outputs(model.graph, samples), outputs(changed, samples)) < 1e-4


def test_a_residual_add_gets_back_what_was_scaled_behind_the_quantizer(tmp_path: Path) -> None:
    case = small_case(tmp_path, post_norm)
    found = smooth(case.graph, case.plan, case.samples)
    assert found is not None
    expected = outputs(case.graph, case.samples)
    assert relative_error(expected, outputs(found.graph, case.samples)) < 1e-5
    (residual,) = [edge for edge in found.plan.edges if edge.rule == RESIDUAL]
    mul = next(node for node in found.graph.nodes if node.name == residual.node)
    (product,) = [edge for edge in found.plan.edges if edge.rule != RESIDUAL]
    assert (mul.op, mul.outputs[0].outputs[0].op) == ("Mul", "Add")
    assert mul.inputs[residual.index].name == residual.tensor == product.tensor  # one quantizer for both
    plain, better = (
        sqnr_db(expected[0], outputs(q.rewritten(), case.samples)[0])[0]
        for q in (case.quantized(case.graph), replace(case.quantized(found.graph), plan=found.plan))
    )
    assert better > plain + 10
    assert of_model(found.plan, case.graph) == case.plan
    left = leave_out(found.graph, found.plan, {product.node: "test"})
    assert not left.edges  # INT8 in front of the Add spares nothing any more


def test_outliers_alone_are_tamed() -> None:
    amax = np.array([2, 40, 3, 1, 8, 2, 0, 1, 2], np.float32)
    np.testing.assert_allclose(
        list(tamed(amax)), [[1, 5, 1, 1, 1, 1, 1, 1, 1], [1, 40 / 3, 1, 1, 8 / 3, 1, 1, 1, 1]]
    )


def test_the_streams_of_minilm_are_its_normalizations_and_gelus(zoo: Path) -> None:
    model = load_model(zoo / "models" / "minilm_l6.onnx")
    fold(model.graph)
    streams = find_streams(model.graph)
    made = [node.op for stream in streams for node in stream.makers]
    assert sorted(made) == ["LayerNormalization"] * 12 + ["Mul"] * 6
    assert all(len(s.restored or ()) == (s.makers[0].op == "LayerNormalization") for s in streams)
