"""Folding: fewer nodes, the same outputs; what cannot be folded exactly is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import graph_of, net, normal, run
from numpy.typing import NDArray

from trtq.graph.fold import fold

NORM = "y = BatchNormalization{}(c, gamma, beta, mean, variance)"


def norm_parameters(channels: int, dtype: type = np.float32) -> dict[str, NDArray]:
    random = np.random.default_rng(7)
    values = {
        "gamma": random.uniform(-2, 2, channels),
        "beta": random.normal(size=channels),
        "mean": random.normal(size=channels),
        "variance": random.uniform(0.2, 3, channels),
    }
    return {name: value.astype(dtype) for name, value in values.items()}


def folded(model: onnx.ModelProto, x: NDArray, rtol: float = 2e-5) -> gs.Graph:
    """The folded graph; every output is that of the model, to the rounding of its largest value."""
    graph = graph_of(model)
    fold(graph)
    expected, actual = run(model, {"x": x}), run(graph, {"x": x})
    assert list(expected) == list(actual)
    for name, values in expected.items():
        assert actual[name].dtype == values.dtype
        np.testing.assert_allclose(actual[name], values, rtol=0, atol=rtol * max(1, np.abs(values).max()))
    return graph


def ops(graph: gs.Graph) -> list[str]:
    return [node.op for node in graph.nodes]


# -- BatchNormalization


@settings(max_examples=15, deadline=None)
@given(
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    out_per_group=st.integers(1, 3),
    kernel=st.integers(1, 3),
    bias=st.booleans(),
    transposed=st.booleans(),
    spatial=st.integers(1, 3),
)
def test_batch_norm_goes_into_any_convolution(
    groups: int, per_group: int, out_per_group: int, kernel: int, bias: bool, transposed: bool, spatial: int
) -> None:
    channels, out = groups * per_group, groups * out_per_group
    dims = ",".join(["4"] * spatial)
    shape = (channels, out_per_group) if transposed else (out, per_group)
    op = "ConvTranspose" if transposed else "Conv"
    constants: dict[str, Any] = {"w": normal(*shape, *[kernel] * spatial), **norm_parameters(out)}
    if bias:
        constants["b"] = normal(out, seed=3)
    free = ",".join(["?"] * spatial)
    model = net(
        f"g (float[N,{channels},{dims}] x) => (float[N,{out},{free}] y)"
        f" {{ c = {op}<group = {groups}>(x, w{', b' if bias else ''}) {NORM.format('')} }}",
        **constants,
    )
    graph = folded(model, normal(2, channels, *[4] * spatial, seed=1))
    assert ops(graph) == [op]
    assert [n.name for n in graph.nodes] == ["c"]


@pytest.mark.parametrize(
    "attributes", ["", "transB = 1", "alpha = 0.5, beta = 2.0", "transA = 1, alpha = 3.0"]
)
@pytest.mark.parametrize("bias_shape", [None, (5,), (1, 5), (1,), (), (4, 1), (4, 5)])
def test_batch_norm_goes_into_gemm(attributes: str, bias_shape: tuple[int, ...] | None) -> None:
    constants: dict[str, Any] = {
        "w": normal(5, 3) if "transB" in attributes else normal(3, 5),
        **norm_parameters(5),
    }
    if bias_shape is not None:
        constants["b"] = normal(*bias_shape, seed=3)
    arguments = "x, w, b" if "b" in constants else "x, w"
    model = net(
        f"g (float[A,B] x) => (float[N,5] y) {{ c = Gemm<{attributes}>({arguments}) {NORM.format('')} }}",
        **constants,
    )
    x = normal(4, 3, seed=1)
    assert ops(folded(model, x.T if "transA" in attributes else x)) == ["Gemm"]


def test_epsilon_is_the_nodes_own() -> None:
    model = net(
        f"g (float[N,2,3] x) => (float[N,2,3] y) {{ c = Conv(x, w) {NORM.format('<epsilon = 0.5>')} }}",
        w=np.ones((2, 2, 1), np.float32),
        gamma=np.float32([1, 2]),
        beta=np.float32([0, 1]),
        mean=np.float32([0, 4]),
        variance=np.float32([0.5, 3.5]),
    )
    graph = folded(model, normal(1, 2, 3))
    weight, bias = graph.nodes[0].inputs[1:]
    np.testing.assert_array_equal(weight.values[:, :, 0], [[1, 1], [1, 1]])  # gains 1 / 1 and 2 / 2
    np.testing.assert_array_equal(bias.values, [0, -3])


def test_a_chain_of_batch_norms_goes_into_one_convolution() -> None:
    model = net(
        f"g (float[N,3,4] x) => (float[N,5,4] y) {{ a = Conv(x, w)"
        f" c = BatchNormalization(a, gamma, beta, mean, variance) {NORM.format('')} }}",
        w=normal(5, 3, 1),
        **norm_parameters(5),
    )
    assert ops(folded(model, normal(2, 3, 4))) == ["Conv"]


def test_float16_weights_stay_float16() -> None:
    model = net(
        f"g (float16[N,3,6] x) => (float16[N,5,?] y) {{ c = Conv(x, w, b) {NORM.format('')} }}",
        w=normal(5, 3, 3, dtype=np.float16),
        b=normal(5, dtype=np.float16),
        **norm_parameters(5, np.float16),
    )
    graph = folded(model, normal(2, 3, 6, dtype=np.float16), rtol=4e-3)
    assert ops(graph) == ["Conv"]
    assert {t.dtype for t in graph.nodes[0].inputs} == {np.dtype(np.float16)}


@pytest.mark.parametrize(
    ("nodes", "outputs", "kept"),
    [
        ("c = Conv(x, w) r = Relu(c) y = BatchNormalization(c, gamma, beta, mean, variance)", "y r", 1),
        ("c = Conv(x, w) y = BatchNormalization(c, gamma, beta, mean, variance)", "y c", 1),
        ("c = Abs(x) y = BatchNormalization(c, gamma, beta, mean, variance)", "y", 1),
        ("w2 = Mul(x, x) c = Conv(x, w2) y = BatchNormalization(c, gamma, beta, mean, variance)", "y", 1),
        (
            "g2 = ReduceSum<keepdims=0>(x, a) c = Conv(x, w)"
            " y = BatchNormalization(c, g2, beta, mean, variance)",
            "y",
            1,
        ),
    ],
    ids=["used twice", "graph output", "no convolution", "computed weight", "computed gamma"],
)
def test_batch_norm_that_must_stay(nodes: str, outputs: str, kept: int) -> None:
    declared = ", ".join(f"float[?,?,?] {name}" for name in outputs.split())
    model = net(
        f"g (float[3,3,1] x) => ({declared}) {{ {nodes} }}",
        w=normal(3, 3, 1),
        a=np.int64([0, 2]),
        **norm_parameters(3),
    )
    assert ops(folded(model, normal(3, 3, 1))).count("BatchNormalization") == kept


def test_batch_norm_in_training_mode_stays() -> None:
    model = net(
        "g (float[N,3,4] x) => (float[N,3,4] y) { c = Conv(x, w)"
        " y, running_mean, running_variance ="
        " BatchNormalization<training_mode = 1>(c, gamma, beta, mean, variance) }",
        w=normal(3, 3, 1),
        **norm_parameters(3),
    )
    assert ops(folded(model, normal(2, 3, 4))) == ["Conv", "BatchNormalization"]


# -- Pad


def padded(
    pads: list[int],
    *,
    opset: int = 13,
    value: Any = None,
    axes: list[int] | None = None,
    mode: str = "constant",
    conv: str = "",
    rank: int = 4,
) -> onnx.ModelProto:
    constants: dict[str, Any] = {"w": normal(5, 3, *[3] * (rank - 2)), "pads": np.int64(pads)}
    if value is not None:
        constants["value"] = np.float32(value)
    if axes is not None:
        constants["axes"] = np.int64(axes)
    names = ["x", "pads", "value" if value is not None else "", *(["axes"] if axes is not None else [])]
    while not names[-1]:
        names.pop()
    free = ",".join(["?"] * rank)
    return net(
        f"g (float[N,C,{','.join('H' * (rank - 2))}] x) => (float[{free}] y) {{"
        f' p = Pad<mode = "{mode}">({", ".join(names)}) y = Conv<{conv}>(p, w) }}',
        opset=opset,
        **constants,
    )


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("value", [None, 0.0])
def test_a_zero_pad_goes_into_the_convolution(opset: int, value: float | None) -> None:
    model = padded([0, 0, 1, 2, 0, 0, 3, 4], opset=opset, value=value, conv="pads = [1, 0, 0, 1]")
    graph = folded(model, normal(2, 3, 6, 6))
    assert ops(graph) == ["Conv"]
    assert graph.nodes[0].attrs["pads"] == [2, 2, 3, 5]


@pytest.mark.parametrize("axes", [[2, 3], [-2, -1], [3, 2]])
@pytest.mark.parametrize("value", [None, 0.0])
def test_a_zero_pad_of_named_axes(axes: list[int], value: float | None) -> None:
    graph = folded(padded([1, 2, 3, 4], opset=18, axes=axes, value=value), normal(2, 3, 6, 6))
    assert ops(graph) == ["Conv"]
    assert graph.nodes[0].attrs["pads"] == ([1, 2, 3, 4] if axes[0] % 4 == 2 else [2, 1, 4, 3])


@settings(max_examples=10, deadline=None)
@given(data=st.data(), spatial=st.integers(1, 3))
def test_any_spatial_zero_pad(data: st.DataObject, spatial: int) -> None:
    amounts = st.lists(st.integers(0, 3), min_size=spatial, max_size=spatial)
    pads = [0, 0, *data.draw(amounts), 0, 0, *data.draw(amounts)]
    own = data.draw(amounts) * 2
    model = padded(pads, rank=spatial + 2, conv=f"pads = {own}")
    assert ops(folded(model, normal(1, 3, *[4] * spatial))) == ["Conv"]


def test_auto_pad_valid_is_no_padding() -> None:
    model = padded([0, 0, 1, 1, 0, 0, 1, 1], conv='auto_pad = "VALID"')
    graph = folded(model, normal(2, 3, 6, 6))
    assert ops(graph) == ["Conv"]
    assert graph.nodes[0].attrs["pads"] == [1, 1, 1, 1]


def test_one_pad_in_front_of_two_convolutions_goes_into_both() -> None:
    model = net(
        "g (float[N,3,6,6] x) => (float[?,?,?,?] y) { p = Pad(x, pads) a = Conv(p, w) b = Conv(p, v)"
        " y = Add(a, b) }",
        pads=np.int64([0, 0, 1, 1, 0, 0, 1, 1]),
        w=normal(5, 3, 3, 3),
        v=normal(5, 3, 3, 3, seed=2),
    )
    assert ops(folded(model, normal(2, 3, 6, 6))) == ["Conv", "Conv", "Add"]


@pytest.mark.parametrize(
    "model",
    [
        padded([0, 0, 1, 1, 0, 0, 1, 1], value=0.5),
        padded([0, 0, -1, 0, 0, 0, 1, 1]),
        padded([0, 1, 1, 1, 0, -1, 1, 1]),
        padded([0, 0, 1, 1, 0, 0, 1, 1], mode="reflect"),
        padded([0, 0, 1, 1, 0, 0, 1, 1], mode="edge"),
        padded([0, 0, 1, 1, 0, 0, 1, 1], conv='auto_pad = "SAME_UPPER"'),
    ],
    ids=["value", "negative", "channels", "reflect", "edge", "auto_pad"],
)
def test_a_pad_that_must_stay(model: onnx.ModelProto) -> None:
    assert ops(folded(model, normal(2, 3, 6, 6))) == ["Pad", "Conv"]


def test_a_pad_by_computed_amounts_stays() -> None:
    model = net(
        "g (float[N,3,H,6] x) => (float[?,?,?,?] y) { s = Shape(x) d = Sub(s, s) p = Pad(x, e)"
        " e2 = Concat<axis = 0>(d, d) q = Pad(p, e2) y = Conv(q, w) }",
        e=np.zeros(8, np.int64),
        w=normal(5, 3, 3, 3),
    )
    assert ops(folded(model, normal(2, 3, 6, 6)))[-2:] == ["Pad", "Conv"]


# -- constants, dtypes and shapes


def test_what_does_not_depend_on_the_inputs_is_evaluated() -> None:
    model = net(
        "g (float[N,3] x) => (float[N,5] y) { t = Transpose(w) u = Add(t, b)"
        " v = Mul(u, u) y = MatMul(x, v) }",
        w=normal(5, 3),
        b=normal(5),
    )
    graph = folded(model, normal(2, 3))
    assert ops(graph) == ["MatMul"]
    assert isinstance(graph.nodes[0].inputs[1], gs.Constant)


def test_every_tensor_has_a_dtype_and_known_dimensions() -> None:
    model = net(
        "g (float[N,3,8,8] x) => (float[?,?,?,?] y) { c = Conv(x, w) s = Shape(c) r = Relu(c)"
        " k = Greater(r, z) f = Cast<to = 1>(k) y = Mul(r, f) }",
        w=normal(16, 3, 3, 3),
        z=np.float32(0),
    )
    graph = folded(model, normal(2, 3, 8, 8))
    tensors = graph.tensors()
    assert {name: t.dtype for name, t in tensors.items() if name in "ckf"} == {
        "c": np.dtype(np.float32),
        "k": np.dtype(bool),
        "f": np.dtype(np.float32),
    }
    assert all(list(tensors[name].shape) == ["N", 16, 6, 6] for name in "crkfy")


# -- Shape of some axes


@pytest.mark.parametrize("batch", ["2", "N"])
@pytest.mark.parametrize(
    "bounds", ["start = 1, end = 2", "start = -1", "start = -2, end = -1", "start = 2, end = 9"]
)
def test_known_axes_of_a_shape_become_constants(bounds: str, batch: str) -> None:
    """Only the axes from `start` to `end`, also where the others are known or not."""
    model = net(
        f"""g (float[{batch},3,8] x) => (float[?,?,?] y) {{
            axes = Shape<{bounds}>(x)
            factor = Cast<to = 1>(axes)
            y = Mul(x, factor)
        }}""",
    )
    assert ops(folded(model, normal(2, 3, 8))) == ["Mul"]


# -- what folding would make wrong


def test_batch_norm_beyond_the_range_of_float16_stays() -> None:
    """A gain of 1 / sqrt(1e-7) over weights of 100: 316,228."""
    model = net(
        f"g (float16[N,2,3] x) => (float16[N,2,3] y) {{ c = Conv(x, w) {NORM.format('<epsilon = 1e-7>')} }}",
        w=np.full((2, 2, 1), 100, np.float16),
        gamma=np.float16([1, 1]),
        beta=np.float16([0, 0]),
        mean=np.float16([0, 0]),
        variance=np.float16([0, 0]),
    )
    graph = folded(model, np.full((1, 2, 3), 1e-4, np.float16), rtol=1e-2)
    assert ops(graph) == ["Conv", "BatchNormalization"]


def test_pads_that_auto_pad_overrules() -> None:
    model = padded([0, 0, 1, 1, 0, 0, 1, 1], conv='auto_pad = "VALID", pads = [5, 5, 5, 5]')
    graph = graph_of(model)
    fold(graph)
    assert graph.nodes[0].attrs["pads"] == [1, 1, 1, 1]


def test_a_pad_that_others_read_stays_for_them() -> None:
    model = net(
        "g (float[N,3,6,6] x) => (float[?,?,?,?] y, float[?,?,?,?] p, float[?,?,?,?] r) {"
        " p = Pad(x, pads) y = Conv(p, w) r = Relu(p) }",
        pads=np.int64([0, 0, 1, 1, 0, 0, 1, 1]),
        w=normal(5, 3, 3, 3),
    )
    graph = folded(model, normal(2, 3, 6, 6))
    assert sorted(ops(graph)) == ["Conv", "Pad", "Relu"]
    assert next(n for n in graph.nodes if n.op == "Conv").inputs[0].name == "x"
