"""Half precision: TensorRT's strongly typed build takes it, and it computes what float32 does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from nets import engine, graph_of, loaded, max_scales, net, normal, run
from numpy.typing import NDArray

from trtq.backends.compiled import int8_nodes
from trtq.errors import InputError
from trtq.graph.fold import fold
from trtq.graph.half import SATURATED, convert_to_half
from trtq.graph.model import FP16_SCALE_OPSET, export
from trtq.graph.place import place
from trtq.graph.rewrite import rewrite
from trtq.simulation.session import simulation_session

HALF = np.dtype(np.float16)
SINGLE = np.dtype(np.float32)


def folded(text: str, opset: int = FP16_SCALE_OPSET, **constants: Any) -> gs.Graph:
    graph = graph_of(net(text, opset=opset, **constants))
    fold(graph)
    return graph


def converted(graph: gs.Graph, feed: dict[str, NDArray], tolerance: float = 4e-3) -> gs.Graph:
    """The graph in half: the same inputs and outputs, close to the float32 graph's values."""
    half = convert_to_half(graph)
    assert [(t.name, t.dtype) for t in half.inputs] == [(t.name, t.dtype) for t in graph.inputs]
    assert [(t.name, t.dtype) for t in half.outputs] == [(t.name, t.dtype) for t in graph.outputs]
    expected, actual = run(graph, feed), run(half, feed)
    for name, values in expected.items():
        assert actual[name].dtype == values.dtype
        assert np.isfinite(actual[name]).all()
        largest = max(1.0, float(np.abs(values).max()))
        np.testing.assert_allclose(actual[name], values, rtol=0, atol=tolerance * largest)
    return half


def dtypes(graph: gs.Graph, *names: str) -> list[np.dtype]:
    tensors = graph.tensors()
    return [np.dtype(tensors[name].dtype) for name in names]


W = normal(16, 16) / 4
MATMUL = "a = MatMul(x, w)"
X = {"x": normal(2, 16, seed=1)}

CNN = """g (float[N,3,16,16] x) => (float[N,10] y) {
    c1 = Conv<pads = [1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<pads = [1,1,1,1]>(r1, w2)
    s = Add(c2, r1)
    p = MaxPool<kernel_shape = [2,2], strides = [2,2]>(s)
    c3 = Conv<pads = [1,1,1,1], strides = [2,2]>(p, w3)
    r3 = Relu(c3)
    a = GlobalAveragePool(r3)
    f = Flatten(a)
    y = Gemm<transB = 1>(f, w4, b4)
}"""
CNN_WEIGHTS = {
    "w1": normal(16, 3, 3, 3) / 4,
    "b1": normal(16),
    "w2": normal(16, 16, 3, 3, seed=1) / 12,
    "w3": normal(32, 16, 3, 3, seed=2) / 12,
    "w4": normal(10, 32, seed=3) / 4,
    "b4": normal(10, seed=4),
}

BLOCK = """g (int64[N,8] ids, bool[N,1,1,8] mask) => (float[?,?,?] y) {
    e = Gather<axis = 0>(table, ids)
    n = LayerNormalization<axis = -1, epsilon = 1e-12>(e, gamma, beta)
    qm = MatMul(n, wq)
    km = MatMul(n, wk)
    vm = MatMul(n, wv)
    qs = Reshape(qm, split)
    ks = Reshape(km, split)
    vs = Reshape(vm, split)
    q = Transpose<perm = [0,2,1,3]>(qs)
    k = Transpose<perm = [0,2,3,1]>(ks)
    v = Transpose<perm = [0,2,1,3]>(vs)
    qk = MatMul(q, k)
    scaled = Div(qk, root)
    masked = Where(mask, scaled, lowest)
    p = Softmax<axis = -1>(masked)
    pv = MatMul(p, v)
    joined = Transpose<perm = [0,2,1,3]>(pv)
    o = Reshape(joined, width)
    d = Add(o, e)
    u = MatMul(d, wu)
    ur = Div(u, sqrt2)
    erf = Erf(ur)
    erf1 = Add(erf, one)
    ue = Mul(u, erf1)
    g = Mul(ue, half)
    y = MatMul(g, wd)
}"""
BLOCK_WEIGHTS = {
    "table": normal(50, 32),
    "gamma": np.ones(32, np.float32),
    "beta": np.zeros(32, np.float32),
    "wq": normal(32, 32, seed=1) / 6,
    "wk": normal(32, 32, seed=2) / 6,
    "wv": normal(32, 32, seed=3) / 6,
    "wu": normal(32, 64, seed=4) / 6,
    "wd": normal(64, 32, seed=5) / 8,
    "split": np.int64([0, 8, 2, 16]),
    "width": np.int64([0, 8, 32]),
    "root": np.float32(4),
    "lowest": np.float32(-3.4e38),
    "sqrt2": np.float32(np.sqrt(2)),
    "one": np.float32(1),
    "half": np.float32(0.5),
}
BLOCK_FEED = {
    "ids": np.random.default_rng(0).integers(0, 50, (2, 8)),
    "mask": np.arange(8)[None, None, None] < np.array([5, 8])[:, None, None, None],
}


# -- whole networks


def test_a_cnn_with_a_residual_and_pooling(tmp_path: Path) -> None:
    graph = folded(CNN, **CNN_WEIGHTS)
    half = converted(graph, {"x": normal(2, 3, 16, 16)})
    assert [n.op for n in half.nodes].count("Cast") == 2  # one in front, one behind
    compiled = engine(half, tmp_path, x=(2, 3, 16, 16)).compiled
    convolutions = [layer for layer in compiled.layers if layer.computes]
    assert convolutions
    assert all(t.datatype == "Half" for layer in convolutions for t in layer.constants if len(t.dims) > 1)


def test_a_transformer_block(tmp_path: Path) -> None:
    graph = folded(BLOCK, **BLOCK_WEIGHTS)
    half = converted(graph, BLOCK_FEED)
    assert half.tensors()["lowest/float16"].values == np.float16(-SATURATED)
    assert engine(half, tmp_path, ids=(2, 8), mask=(2, 1, 1, 8)).compiled.kernels


@pytest.mark.parametrize(
    ("text", "constants", "feed"),
    [
        (
            "g (float[N,4,8,8] x) => (float[?,?,?,?] y)"
            ' { a = Conv(x, w) y = Resize<mode = "linear">(a, , s) }',
            {"w": normal(4, 4, 3, 3) / 6, "s": np.float32([1, 1, 2, 2])},
            {"x": normal(2, 4, 8, 8)},
        ),
        (
            f"g (float[N,16] x) => (float[N,3] y, int64[N,3] i) {{ {MATMUL} y, i = TopK(a, k) }}",
            {"k": np.int64([3])},
            X,
        ),
        (
            f"g (float[N,16] x) => (float[N,16] y) {{ {MATMUL} m = Greater(a, z) f = Cast<to = 1>(m)"
            " y = Mul(a, f) }",
            {"z": np.float32(0)},
            X,
        ),
        (
            f"g (float[N,16] x) => (float[N,16] y) {{ {MATMUL} s = Shape(x)"
            " c = ConstantOfShape<value = float[1] {2.5}>(s) y = Mul(a, c) }",
            {},
            X,
        ),
        (
            f"g (float[N,16] x) => (float[N,16] y) {{ {MATMUL} s = Shape(x) c = ConstantOfShape(s)"
            " y = Add(a, c) }",
            {},
            X,
        ),
        (
            f"g (float[N,16] x) => (float[N,16] y) {{ {MATMUL} s = Shape(x) k = Gather<axis = 0>(s, i)"
            " f = Cast<to = 1>(k) r = Range(z, f, o) t = Div(r, f) y = Add(a, t) }",
            {"i": np.int64(1), "z": np.float32(0), "o": np.float32(1)},
            X,
        ),
        (
            f"g (float[N,16] x) => (double[N,16] y) {{ {MATMUL} y = Cast<to = 11>(a) }}",
            {},
            X,
        ),
        (
            "g (float16[N,16] x) => (float[N,16] y) { b = Cast<to = 1>(x) y = MatMul(b, w) }",
            {},
            {"x": X["x"].astype(np.float16)},
        ),
    ],
    ids=["Resize", "TopK", "Cast", "ConstantOfShape", "default", "Range", "double", "float16 input"],
)
def test_operators_whose_types_are_their_own(
    text: str, constants: dict[str, Any], feed: dict[str, NDArray], tmp_path: Path
) -> None:
    graph = folded(text, **({"w": W} | constants if "w)" in text else constants))
    half = converted(graph, feed)
    assert engine(half, tmp_path, **{name: values.shape for name, values in feed.items()}).compiled.kernels


def test_non_max_suppression_keeps_float32_boxes() -> None:
    """TensorRT for RTX has no kernel for it, so only ONNX Runtime runs it."""
    graph = folded(
        "g (float[1,6,4] x, float[1,2,6] s) => (int64[?,3] y)"
        " { a = Mul(x, o) y = NonMaxSuppression(a, s, m, i, t) }",
        o=np.float32(2),
        m=np.int64(3),
        i=np.float32(0.5),
        t=np.float32(0.1),
    )
    corner = normal(1, 6, 2)
    feed = {"x": np.concatenate([corner, corner + 1], 2), "s": np.abs(normal(1, 2, 6, seed=2))}
    half = converted(graph, feed)
    (node,) = [n for n in half.nodes if n.op == "NonMaxSuppression"]
    assert {np.dtype(t.dtype) for t in (node.inputs[0], node.inputs[1], node.inputs[3])} == {SINGLE}
    assert dtypes(half, "a") == [HALF]


@pytest.mark.parametrize("opset", [19, 20, 21])
def test_operators_newer_than_the_lowest_opset(opset: int, tmp_path: Path) -> None:
    op = "Gelu" if opset >= 20 else "Relu"
    graph = folded(f"g (float[N,16] x) => (float[N,16] y) {{ {MATMUL} y = {op}(a) }}", opset, w=W)
    half = converted(graph, X)
    assert dtypes(half, "a") == [HALF]
    assert engine(half, tmp_path, x=(2, 16)).compiled.kernels


# -- where casts go


def test_an_output_that_is_also_used_inside(tmp_path: Path) -> None:
    graph = folded(f"g (float[N,16] x) => (float[N,16] a, float[N,16] y) {{ {MATMUL} y = Relu(a) }}", w=W)
    half = converted(graph, X)
    relu = next(n for n in half.nodes if n.op == "Relu")
    assert relu.inputs[0].name == "a/float16"
    assert dtypes(half, "a", "a/float16") == [SINGLE, HALF]
    assert engine(half, tmp_path, x=(2, 16)).compiled.kernels


def test_an_input_that_several_nodes_read_is_cast_once() -> None:
    graph = folded("g (float[N,16] x) => (float[N,16] y) { a = MatMul(x, w) b = Relu(x) y = Add(a, b) }", w=W)
    half = converted(graph, X)
    assert len([n for n in half.nodes if n.op == "Cast" and n.inputs[0].name == "x"]) == 1


def test_nodes_that_stay_float32_stand_between_casts(tmp_path: Path) -> None:
    """(300 a)^2 is beyond 65504 and its root is not."""
    graph = folded(
        f"g (float[N,16] x) => (float[N,16] y)"
        f" {{ {MATMUL} b = Mul(a, k) p = Pow(b, two) r = Sqrt(p) s = Div(r, k) y = MatMul(s, w) }}",
        w=W,
        k=np.float32(300),
        two=np.float32(2),
    )
    feed = {"x": 2 * X["x"]}
    half = convert_to_half(graph, ["p", "r"])
    assert dtypes(half, "b", "b/float32", "p", "r", "r/float16", "s") == [
        HALF,
        SINGLE,
        SINGLE,
        SINGLE,
        HALF,
        HALF,
    ]
    expected, found = (
        run(graph, feed)["y"],
        simulation_session(export(half).SerializeToString()).run(None, feed)[0],
    )
    np.testing.assert_allclose(found, expected, atol=4e-3 * np.abs(expected).max())
    overflowing = export(convert_to_half(graph)).SerializeToString()
    assert not np.isfinite(simulation_session(overflowing).run(None, feed)[0]).all()
    assert engine(half, tmp_path, x=(2, 16)).compiled.kernels


def test_names_order_and_positions_stay() -> None:
    graph = folded(CNN, **CNN_WEIGHTS)
    half = convert_to_half(graph)
    assert [n.name for n in half.nodes if n.op != "Cast"] == [n.name for n in graph.nodes]
    by_name = {n.name: n for n in half.nodes}
    assert all(len(by_name[n.name].inputs) == len(n.inputs) for n in graph.nodes)
    onnx.checker.check_model(export(half), full_check=True)


def test_the_given_graph_is_not_changed() -> None:
    graph = folded(CNN, **CNN_WEIGHTS)
    before = export(graph).SerializeToString(deterministic=True)
    convert_to_half(graph)
    assert export(graph).SerializeToString(deterministic=True) == before


# -- constants


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3.4e38, SATURATED),
        (-3.4e38, -SATURATED),
        (-np.inf, -np.inf),
        (65504, 65504),
        (1e-12, 2.0**-24),
        (-1e-12, -(2.0**-24)),
        (0.0, 0.0),
        (1.0, 1.0),
        (2.0**-24, 2.0**-24),
    ],
)
def test_constants_saturate_and_do_not_vanish(value: float, expected: float) -> None:
    graph = folded("g (float[N,16] x) => (float[N,16] y) { y = Max(x, k) }", k=np.float32(value))
    constant = convert_to_half(graph).tensors()["k/float16"].values
    assert constant.dtype == HALF
    assert float(constant) == expected


# -- what cannot be converted


def test_control_flow_stays_float32() -> None:
    graph = folded(
        "g (float[N,4] x, bool c) => (float[N,4] y) { m = Relu(x) i = If(c)"
        " <then_branch = t () => (float[N,4] a) { a = Abs(m) },"
        "  else_branch = e () => (float[N,4] b) { b = Neg(m) }> y = Exp(i) }"
    )
    half = convert_to_half(graph)
    assert dtypes(half, "m", "i", "i/float16") == [SINGLE, SINGLE, HALF]
    for condition in (True, False):
        feed = {"x": normal(2, 4), "c": np.array(condition)}
        np.testing.assert_allclose(run(half, feed)["y"], run(graph, feed)["y"], rtol=4e-3)


def test_a_tensor_of_unknown_dtype_is_refused() -> None:
    graph = folded(f"g (float[N,16] x) => (float[N,16] y) {{ {MATMUL} y = Relu(a) }}", w=W)
    graph.tensors()["a"].dtype = None
    with pytest.raises(InputError, match="dtype of 'a' is not known"):
        convert_to_half(graph)


# -- INT8 and float16


@pytest.mark.parametrize(
    ("text", "constants", "feed"),
    [(CNN, CNN_WEIGHTS, {"x": normal(2, 3, 16, 16)}), (BLOCK, BLOCK_WEIGHTS, BLOCK_FEED)],
    ids=["cnn", "transformer"],
)
def test_int8_with_the_rest_in_half(
    text: str, constants: dict[str, Any], feed: dict[str, NDArray], tmp_path: Path
) -> None:
    model = loaded(net(text, opset=FP16_SCALE_OPSET, **constants), tmp_path, opset=FP16_SCALE_OPSET)
    fold(model.graph)
    plan = place(model)
    scales = max_scales(model.graph, plan, feed)
    single = rewrite(model.graph, plan, scales)
    half = rewrite(convert_to_half(model.graph), plan, scales)
    shapes = {name: values.shape for name, values in feed.items()}
    in_int8 = [
        int8_nodes(engine(graph, tmp_path, **shapes).compiled.layers, plan.int8_nodes)
        for graph in (single, half)
    ]
    assert in_int8[0] == in_int8[1] != frozenset()
    expected, actual, exact = (run(g, feed)["y"] for g in (single, half, model.graph))
    rounding = np.abs(expected - exact).max()
    assert np.abs(actual - expected).max() < max(rounding, 0.02 * np.abs(exact).max())
