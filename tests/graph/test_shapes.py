"""Shapes for given inputs, and multiply-accumulates worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nets import graph_of, net, normal

from trtq.graph.model import export
from trtq.graph.products import macs
from trtq.graph.shapes import concrete_shapes, infer_types


def macs_of(text: str, node: str, inputs: dict[str, tuple[int, ...]], **constants: Any) -> int | None:
    graph = graph_of(net(text, **constants))
    shapes = concrete_shapes(graph, inputs)
    return macs(next(n for n in graph.nodes if n.name == node), shapes)


@pytest.mark.parametrize(
    ("attributes", "weight", "expected"),
    [
        ("", (16, 6, 3, 3), 16 * 6 * 6 * (6 * 9)),
        ("pads = [1, 1, 1, 1]", (16, 6, 3, 3), 16 * 8 * 8 * (6 * 9)),
        ("pads = [1, 1, 1, 1], strides = [2, 2]", (16, 6, 3, 3), 16 * 4 * 4 * (6 * 9)),
        ("dilations = [2, 2]", (16, 6, 3, 3), 16 * 4 * 4 * (6 * 9)),
        ("group = 2", (16, 3, 3, 3), 16 * 6 * 6 * (3 * 9)),
        ("group = 6", (6, 1, 5, 3), 6 * 4 * 6 * 15),
        ("strides = [3, 1]", (16, 6, 1, 1), 16 * 3 * 8 * 6),
    ],
)
@pytest.mark.parametrize("batch", [1, 7])
def test_macs_of_a_convolution(attributes: str, weight: tuple[int, ...], expected: int, batch: int) -> None:
    text = f"g (float[N,6,8,8] x) => (float[?,?,?,?] y) {{ y = Conv<{attributes}>(x, w) }}"
    assert macs_of(text, "y", {"x": (batch, 6, 8, 8)}, w=normal(*weight)) == batch * expected


def test_macs_of_a_transposed_convolution() -> None:
    """Every input element meets every weight of its channel."""
    text = (
        "g (float[N,6,8,8] x) => (float[?,?,?,?] y) { y = ConvTranspose<strides = [2, 2], group = 2>(x, w) }"
    )
    assert macs_of(text, "y", {"x": (1, 6, 8, 8)}, w=normal(6, 5, 3, 3)) == (6 * 8 * 8) * (5 * 9)


@pytest.mark.parametrize(
    ("attributes", "a", "b"),
    [("", (7, 3), (3, 5)), ("transA = 1", (3, 7), (3, 5)), ("transB = 1", (7, 3), (5, 3))],
)
def test_macs_of_gemm(attributes: str, a: tuple[int, int], b: tuple[int, int]) -> None:
    text = f"g (float[M,K] x) => (float[?,?] y) {{ y = Gemm<{attributes}>(x, w) }}"
    assert macs_of(text, "y", {"x": a}, w=normal(*b)) == 7 * 3 * 5


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((4, 2, 7, 3), (4, 2, 3, 5), 4 * 2 * 7 * 3 * 5),
        ((4, 2, 7, 3), (3, 5), 4 * 2 * 7 * 3 * 5),
        ((1, 2, 7, 3), (4, 1, 3, 5), 4 * 2 * 7 * 3 * 5),
        ((7, 3), (3,), 7 * 3),
        ((3,), (3, 5), 3 * 5),
    ],
)
def test_macs_of_matmul(first: tuple[int, ...], second: tuple[int, ...], expected: int) -> None:
    a, b = (",".join("ABCD"[: len(shape)]) for shape in (first, second))
    text = f"g (float[{a}] x, float[{b}] z) => (float[?] y) {{ y = MatMul(x, z) }}"
    assert macs_of(text, "y", {"x": first, "z": second}) == expected


@pytest.mark.parametrize(
    ("equation", "first", "second", "expected"),
    [
        ("nqd,nkd->nqk", (2, 5, 4), (2, 3, 4), 2 * 5 * 3 * 4),
        ("ij,jk", (5, 4), (4, 3), 5 * 4 * 3),
        ("...j,jk->...k", (2, 5, 4), (4, 3), 2 * 5 * 4 * 3),
        ("nsd, dhk -> nshk", (2, 5, 4), (4, 3, 7), 2 * 5 * 4 * 3 * 7),
        ("ij,ij->ij", (5, 4), (5, 4), 5 * 4),
    ],
)
def test_macs_of_einsum(
    equation: str, first: tuple[int, ...], second: tuple[int, ...], expected: int
) -> None:
    a, b = (",".join("ABCD"[: len(shape)]) for shape in (first, second))
    text = f'g (float[{a}] x, float[{b}] z) => (float[] y) {{ y = Einsum<equation = "{equation}">(x, z) }}'
    assert macs_of(text, "y", {"x": first, "z": second}) == expected


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_macs_of_a_recurrent_layer(op: str, gates: int, directions: int) -> None:
    """At every step each gate meets the input and the state before."""
    direction = "bidirectional" if directions == 2 else "forward"
    text = (
        f'g (float[S,N,6] x) => (float[?,?,?,?] y) {{ y = {op}<hidden_size = 5, direction = "{direction}">'
        "(x, w, r) }"
    )
    weights = {"w": normal(directions, gates * 5, 6), "r": normal(directions, gates * 5, 5)}
    expected = 9 * 2 * directions * gates * 5 * (6 + 5)
    assert macs_of(text, "y", {"x": (9, 2, 6)}, **weights) == expected


def test_other_operators_and_unknown_shapes_have_none() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) { r = Relu(x) y = MatMul(r, w) }"
    assert macs_of(text, "r", {"x": (2, 4)}, w=normal(4, 4)) is None
    assert macs_of(text, "y", {}, w=normal(4, 4)) is None


ATTENTION = """g (float[N,S,24] x) => (float[?,?,?] y) {
    shape = Shape(x)
    n = Gather<axis = 0>(shape, zero)
    s = Gather<axis = 0>(shape, one)
    n1 = Unsqueeze(n, axes)
    s1 = Unsqueeze(s, axes)
    split = Concat<axis = 0>(n1, s1, heads)
    qm = MatMul(x, wq)
    km = MatMul(x, wk)
    q4 = Reshape(qm, split)
    k4 = Reshape(km, split)
    q = Transpose<perm = [0, 2, 1, 3]>(q4)
    k = Transpose<perm = [0, 2, 3, 1]>(k4)
    scores = MatMul(q, k)
    p = Softmax<axis = -1>(scores)
    v = Transpose<perm = [0, 2, 1, 3]>(k4)
    c4 = MatMul(p, v)
    c = Transpose<perm = [0, 2, 1, 3]>(c4)
    joined = Concat<axis = 0>(n1, s1, width)
    y = Reshape(c, joined)
}"""

CONSTANTS = {
    "zero": np.int64(0),
    "one": np.int64(1),
    "axes": np.int64([0]),
    "heads": np.int64([3, 8]),
    "width": np.int64([24]),
    "wq": normal(24, 24),
    "wk": normal(24, 24),
}


def test_shapes_through_reshapes_computed_from_shapes() -> None:
    graph = graph_of(net(ATTENTION, **CONSTANTS))
    before = export(graph).SerializeToString(deterministic=True)
    shapes = concrete_shapes(graph, {"x": (5, 10, 24)})
    assert export(graph).SerializeToString(deterministic=True) == before
    assert shapes["q"] == (5, 3, 10, 8)
    assert shapes["scores"] == (5, 3, 10, 10)
    assert shapes["y"] == (5, 10, 24)
    nodes = {n.name: n for n in graph.nodes}
    assert macs(nodes["qm"], shapes) == 5 * 10 * 24 * 24
    assert macs(nodes["scores"], shapes) == 5 * 3 * 10 * 10 * 8
    assert macs(nodes["c4"], shapes) == 5 * 3 * 10 * 8 * 10


def test_shapes_from_some_axes_of_a_shape() -> None:
    """As PyTorch's exporter writes them since opset 15: Shape with `start` and `end`."""
    text = """g (float[N,S,24] x) => (float[?,?,?,?] y) {
        n = Shape<start = 0, end = 1>(x)
        s = Shape<start = 1, end = -1>(x)
        split = Concat<axis = 0>(n, s, heads)
        y = Reshape(x, split)
    }"""
    graph = graph_of(net(text, heads=np.int64([3, 8])))
    assert concrete_shapes(graph, {"x": (5, 10, 24)})["y"] == (5, 10, 3, 8)


def test_shapes_that_depend_on_values_are_left_out() -> None:
    graph = graph_of(net("g (float[N] x) => (int64[?,?] y) { r = Relu(x) y = NonZero(r) }"))
    shapes = concrete_shapes(graph, {"x": (6,)})
    assert shapes["r"] == (6,)
    assert "y" not in shapes


def test_a_dtype_that_inference_leaves_open() -> None:
    """Before IR version 4, initializers that are no inputs count for nothing there."""
    text = "g (float[N,4] x) => (float[N,4] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
    graph = graph_of(net(text, ir_version=3, s=np.float32(1), z=np.int8(0)))
    assert concrete_shapes(graph, {"x": (2, 4)}) == {"x": (2, 4), "q": (2, 4), "y": (2, 4), "s": (), "z": ()}


def test_large_weights_keep_their_shapes() -> None:
    graph = graph_of(
        net("g (float[N,64] x) => (float[?,?] y) { y = MatMul(x, w) }", w=np.zeros((64, 100), np.float32))
    )
    assert concrete_shapes(graph, {"x": (2, 64)}) == {"x": (2, 64), "w": (64, 100), "y": (2, 100)}


@pytest.mark.parametrize(
    "operator", ["GroupNormalization<num_groups = 2>(x, g, b)", "MeanVarianceNormalization(x)"]
)
def test_types_behind_operators_that_onnx_does_not_infer(operator: str) -> None:
    """Both give what has the shape and dtype of their input (ONNX's text of the operators)."""
    text = f"g (float[N,6,8,8] x) => (float[?,?,?,?] y) {{ h = {operator} y = Relu(h) }}"
    gains = {"g": normal(6), "b": normal(6)} if "g, b" in operator else {}
    graph = graph_of(net(text, opset=21, **gains))
    infer_types(graph)
    tensor = graph.tensors()["h"]
    assert (tensor.dtype, tensor.shape) == (np.float32, ["N", 6, 8, 8])
    assert concrete_shapes(graph, {"x": (3, 6, 8, 8)})["y"] == (3, 6, 8, 8)
    assert [node.op for node in graph.nodes] == [operator.partition("(")[0].partition("<")[0], "Relu"]
