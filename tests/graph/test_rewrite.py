"""The rewritten graph computes what NumPy's fake quantization does, and the engine runs it in INT8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import engine, graph_of, loaded, max_scales, net, normal, run
from numpy.typing import NDArray

from trtq.backends.compiled import int8_nodes
from trtq.errors import InputError
from trtq.graph.fold import fold
from trtq.graph.model import Model, export
from trtq.graph.place import place
from trtq.graph.plan import Plan
from trtq.graph.rewrite import WEIGHT_FORMS, rewrite, scales_as_inputs, switches_as_inputs, weight_scale
from trtq.numerics import fake_quantize


def placed(model: onnx.ModelProto, folder: Path, **options: Any) -> tuple[Model, Plan]:
    read = loaded(model, folder)
    fold(read.graph)
    return read, place(read, **options)


def fake(values: NDArray, scale: Any, axis: int | None = None) -> NDArray:
    return fake_quantize(values, scale, axis=axis, narrow=axis is not None).astype(np.float64)


def fake_weight(weight: NDArray, axis: int) -> NDArray:
    return fake(weight, weight_scale(weight, axis), axis)


def gemm_net(op: str, attributes: str = "") -> onnx.ModelProto:
    weight = normal(16, 32) if "transB" in attributes else normal(32, 16)
    return net(f"g (float[N,32] x) => (float[N,16] y) {{ y = {op}<{attributes}>(x, w) }}", w=weight)


# -- values


@pytest.mark.parametrize("form", WEIGHT_FORMS)
@pytest.mark.parametrize(
    ("op", "attributes", "axis"), [("MatMul", "", 1), ("Gemm", "", 1), ("Gemm", "transB = 1", 0)]
)
def test_a_product_is_that_of_the_fake_quantized_operands(
    op: str, attributes: str, axis: int, form: str, tmp_path: Path
) -> None:
    model, plan = placed(gemm_net(op, attributes), tmp_path)
    weight = model.graph.nodes[0].inputs[1].values
    x, scale = normal(5, 32, seed=2), np.float32(0.013)  # small enough that some values saturate
    quantized = rewrite(model.graph, plan, {"x": scale}, weights=form)
    expected_weight = fake_weight(weight, axis)
    expected = fake(x, scale) @ (expected_weight.T if attributes else expected_weight)
    assert np.abs(x).max() > 128 * scale
    np.testing.assert_allclose(run(quantized, {"x": x})["y"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", WEIGHT_FORMS)
def test_a_convolution_is_that_of_the_fake_quantized_operands(form: str, tmp_path: Path) -> None:
    weight = normal(6, 4, 3, 3)
    model, plan = placed(
        net(
            "g (float[N,4,5,5] x) => (float[N,6,3,3] y) { y = Conv(x, w, b) }", w=weight, b=normal(6, seed=4)
        ),
        tmp_path,
    )
    x, scale = normal(2, 4, 5, 5, seed=2), np.float32(0.02)
    patches = np.lib.stride_tricks.sliding_window_view(fake(x, scale), (3, 3), axis=(2, 3))
    expected = np.einsum("nchwij,ocij->nohw", patches, fake_weight(weight, 0))
    expected += normal(6, seed=4)[:, None, None]
    quantized = rewrite(model.graph, plan, {"x": scale}, weights=form)
    np.testing.assert_allclose(run(quantized, {"x": x})["y"], expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.floats(0, 6), dead=st.integers(0, 16))
def test_both_forms_of_the_weights_are_bit_identical(seed: int, spread: float, dead: int) -> None:
    random = np.random.default_rng(seed)
    weight = (random.normal(size=(16, 3)) * 10 ** random.uniform(-spread, spread, (16, 1))).astype(np.float32)
    weight[:dead] = 0
    graph = graph_of(net("g (float[N,3] x) => (float[N,16] y) { y = Gemm<transB = 1>(x, w) }", w=weight))
    plan = place(Model(Path("model.onnx"), graph, ""))
    feed = {"x": random.normal(size=(4, 3)).astype(np.float32)}
    scales = {"x": np.float32(0.02)}
    first, second = (run(rewrite(graph, plan, scales, weights=form), feed)["y"] for form in WEIGHT_FORMS)
    np.testing.assert_array_equal(first, second)
    assert not first[:, :dead].any()


def test_a_channel_of_zeros_gets_scale_one() -> None:
    weight = np.array([[0, 0], [1.27, -2.54]], np.float32)
    np.testing.assert_allclose(weight_scale(weight, 0), [1, 0.02], rtol=1e-6)
    np.testing.assert_allclose(weight_scale(weight, 1), [0.01, 0.02], rtol=1e-6)


# -- structure


@pytest.mark.parametrize(
    ("tail", "dtype"),
    [
        (
            "a = Add(m, b) r = Reshape(a, shape) t = Transpose<perm = [2,0,1]>(r) y = Gather(t, first)",
            np.float32,
        ),
        ("y, z, v = Split(m, thirds)", np.float32),
        ("a = Add(m, b) r = Relu(a) y = Gather(r, first)", np.int8),
        ("y = Add(m, b)", np.int8),
    ],
    ids=["packed heads", "split", "cut behind an activation", "whole"],
)
def test_weights_of_a_product_that_is_cut_stay_float_behind_a_pair(
    tail: str, dtype: type, tmp_path: Path
) -> None:
    integers = {"shape": np.array([-1, 3, 2]), "first": np.array(0), "thirds": np.array([2, 2, 2])}
    text = f"g (float[N,4] x) => (float y) {{ m = MatMul(x, w) {tail} }}"
    model, plan = placed(net(text, w=normal(4, 6), b=normal(6), **integers), tmp_path)
    product = next(n for n in rewrite(model.graph, plan, {"x": np.float32(0.02)}).nodes if n.op == "MatMul")
    source = product.inputs[1].inputs[0].inputs[0]
    stored = source if isinstance(source, gs.Constant) else source.inputs[0].inputs[0]
    assert stored.dtype == dtype


RESIDUAL = "g (float[N,16,8,8] x) => (float[?,?,?,?] y) { c = Conv<pads = [1,1,1,1]>(x, w) y = Add(c, x) }"


def test_a_tensor_that_several_nodes_read_gets_one_pair(tmp_path: Path) -> None:
    model, plan = placed(net(RESIDUAL, w=normal(16, 16, 3, 3)), tmp_path)
    quantized = rewrite(model.graph, plan, {"x": np.float32(0.02)})
    assert [n.op for n in quantized.nodes].count("QuantizeLinear") == 1
    pair = quantized.tensors()["x/dequantized"]
    assert {n.name for n in pair.outputs} == {"c", "y"}


def test_a_weight_that_several_nodes_read_is_stored_once_per_axis(tmp_path: Path) -> None:
    model, plan = placed(
        net(
            "g (float[N,8] x) => (float[N,8] y) { a = MatMul(x, w) b = MatMul(a, w)"
            " y = Gemm<transB = 1>(b, w) }",
            w=normal(8, 8),
        ),
        tmp_path,
    )
    quantized = rewrite(model.graph, plan, dict.fromkeys(plan.tensors, np.float32(0.1)))
    codes = [t for t in quantized.tensors().values() if isinstance(t, gs.Constant) and t.shape == (8, 8)]
    assert sorted(t.name for t in codes) == ["w/0/int8", "w/1/int8"]
    assert all(t.dtype == np.int8 and t.values.min() >= -127 for t in codes)


@pytest.mark.parametrize("form", WEIGHT_FORMS)
def test_names_are_unique_and_quantizers_are_what_tensorrt_takes(form: str, tmp_path: Path) -> None:
    model, plan = placed(net(RESIDUAL, w=normal(16, 16, 3, 3)), tmp_path)
    quantized = rewrite(model.graph, plan, {"x": np.float32(0.02)}, weights=form)
    proto = export(quantized)
    onnx.checker.check_model(proto, full_check=True)
    names = [n.name for n in proto.graph.node]
    made = [o for n in proto.graph.node for o in n.output] + [i.name for i in proto.graph.initializer]
    assert len(set(names)) == len(names)
    assert len(set(made)) == len(made)
    for node in quantized.nodes:
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            _, scale, zero_point = node.inputs
            assert zero_point.dtype == np.int8
            assert not zero_point.values.any()
            assert (scale.values > 0).all()


def test_the_given_graph_is_not_changed(tmp_path: Path) -> None:
    model, plan = placed(net(RESIDUAL, w=normal(16, 16, 3, 3)), tmp_path)
    before = export(model.graph).SerializeToString(deterministic=True)
    rewrite(model.graph, plan, {"x": np.float32(0.02)})
    assert export(model.graph).SerializeToString(deterministic=True) == before


# -- what does not fit


def test_a_missing_scale_is_named(tmp_path: Path) -> None:
    model, plan = placed(gemm_net("MatMul"), tmp_path)
    with pytest.raises(InputError, match=r"1 tensors of the plan have no scale[\s\S]*missing: x"):
        rewrite(model.graph, plan, {"other": np.float32(1)})


def test_a_plan_of_another_model(tmp_path: Path) -> None:
    _, plan = placed(gemm_net("MatMul"), tmp_path)
    other = graph_of(net("g (float[N,32] x) => (float[N,16] z) { z = MatMul(x, w) }", w=normal(32, 16)))
    with pytest.raises(InputError, match=r"another model[\s\S]*no node 'y'"):
        rewrite(other, plan, {"x": np.float32(1)})


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan])
def test_a_scale_that_is_none(scale: float, tmp_path: Path) -> None:
    model, plan = placed(gemm_net("MatMul"), tmp_path)
    with pytest.raises(InputError, match="not a positive finite float32"):
        rewrite(model.graph, plan, {"x": np.float32(scale)})


# -- scales as inputs


def test_scales_given_at_run_time_compute_the_same(tmp_path: Path) -> None:
    model, plan = placed(net(RESIDUAL, w=normal(16, 16, 3, 3)), tmp_path)
    x = normal(1, 16, 8, 8, seed=3)
    open_graph = rewrite(model.graph, plan, {"x": np.float32(1)})
    (name,) = (name for name, tensor in scales_as_inputs(open_graph, plan).items() if tensor == "x")
    for scale in (np.float32(0.01), np.float32(0.03)):
        fixed = run(rewrite(model.graph, plan, {"x": scale}), {"x": x})["y"]
        given_now = run(open_graph, {"x": x, name: np.array(scale)})["y"]
        np.testing.assert_array_equal(given_now, fixed)


def test_switches_as_inputs_quantize_one_tensor_or_another(tmp_path: Path) -> None:
    model, plan = placed(net(RESIDUAL, w=normal(16, 16, 3, 3)), tmp_path)
    plan = replace(plan, weights=[])
    x = normal(1, 16, 8, 8, seed=3)
    scales = dict.fromkeys(plan.tensors, np.float32(0.05))
    switched = rewrite(model.graph, plan, scales)
    switches = switches_as_inputs(switched, plan)
    assert sorted(switches.values()) == sorted(plan.tensors)
    for wanted in ([], plan.tensors, *([tensor] for tensor in plan.tensors)):
        edges = [edge for edge in plan.edges if edge.range in wanted]
        expected = run(rewrite(model.graph, replace(plan, edges=edges), scales), {"x": x})["y"]
        given = {name: np.array(tensor in wanted) for name, tensor in switches.items()}
        np.testing.assert_array_equal(run(switched, {"x": x, **given})["y"], expected)


# -- the engine


@pytest.mark.parametrize("form", WEIGHT_FORMS)
@pytest.mark.parametrize(
    ("text", "constants", "shape"),
    [
        (RESIDUAL, {"w": normal(16, 16, 3, 3)}, (1, 16, 8, 8)),
        (
            "g (float[N,32,8,8] x) => (float[?,?,?,?] y) { y = Conv<group = 32, pads = [1,1,1,1]>(x, w) }",
            {"w": normal(32, 1, 3, 3)},
            (1, 32, 8, 8),
        ),
        (
            "g (float[N,32] x) => (float[N,32] y) { y = Gemm<transB = 1>(x, w, b) }",
            {"w": normal(32, 32), "b": normal(32)},
            (4, 32),
        ),
        ("g (float[N,32] x) => (float[N,64] y) { y = MatMul(x, w) }", {"w": normal(32, 64)}, (4, 32)),
    ],
    ids=["Conv and residual", "depthwise", "Gemm", "MatMul"],
)
def test_the_engine_runs_every_planned_node_in_int8(
    text: str, constants: dict[str, NDArray], shape: tuple[int, ...], form: str, tmp_path: Path
) -> None:
    model, plan = placed(net(text, **constants), tmp_path)
    feed = {"x": normal(*shape, seed=1)}
    quantized = rewrite(model.graph, plan, max_scales(model.graph, plan, feed), weights=form)
    compiled = engine(quantized, tmp_path, x=shape).compiled
    assert not compiled.unread
    assert int8_nodes(compiled.layers, plan.int8_nodes) == frozenset(plan.int8_nodes)
    reference = run(model.graph, feed)["y"]
    assert np.abs(run(quantized, feed)["y"] - reference).max() < 0.03 * np.abs(reference).max()


def test_the_engine_of_the_model_as_it_was_runs_nothing_in_int8(tmp_path: Path) -> None:
    model, plan = placed(net(RESIDUAL, w=normal(16, 16, 3, 3)), tmp_path)
    compiled = engine(model.graph, tmp_path, x=(1, 16, 8, 8)).compiled
    assert not int8_nodes(compiled.layers, plan.int8_nodes)


def test_codes_stay_symmetric_where_a_float16_scale_is_rounded_down() -> None:
    """A channel of 1e-6 has the scale 7.9e-9, which float16 cannot hold: its codes saturate at 127."""
    weight = np.float16([[1, -1], [1e-6, -1e-6], [3e-4, -3e-4]])
    graph = graph_of(
        net("g (float16[N,2] x) => (float16[N,3] y) { y = Gemm<transB = 1>(x, w) }", opset=19, w=weight)
    )
    plan = place(Model(Path("model.onnx"), graph, ""))
    tensors = rewrite(graph, plan, {"x": np.float32(0.02)}).tensors()
    assert (tensors["w/0/scale"].values > 0).all()
    assert tensors["w/0/int8"].values.min() >= -127


def test_given_codes_follow_a_scale_that_float16_cannot_hold() -> None:
    """float16 holds multiples of 6e-8 below 6e-5: each weight stays within half a step of what was wanted."""
    wanted = np.float32([1e-2, 6.3e-7, 8.9e-8, 1e-16])
    given = np.int8([[127, -60]] * 4)
    product = "g (float16[N,2] x) => (float16[N,4] y) { y = Gemm<transB = 1>(x, w) }"
    graph = graph_of(net(product, opset=19, w=(given * wanted[:, None]).astype(np.float16)))
    plan = place(Model(Path("model.onnx"), graph, ""))
    key = ("w", 0)
    tensors = rewrite(
        graph, plan, {"x": np.float32(0.02)}, weight_scales={key: wanted}, codes={key: given}
    ).tensors()
    codes, scale = tensors["w/0/int8"].values.astype(np.float64), tensors["w/0/scale"].values
    step = scale.astype(np.float64)[:, None]
    assert (np.abs(codes * step - given * wanted.astype(np.float64)[:, None]) <= step / 2).all()
    np.testing.assert_array_equal(codes[0], given[0])
