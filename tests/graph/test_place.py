"""The placement rules, each on the smallest graph that shows it.

In the drawings `==>` is an edge that gets a Q/DQ pair, `-->` one that stays in floating point, and `[w]`
a constant that is quantized per channel.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import engine, loaded, net, normal
from numpy.typing import NDArray

from trtq.backends.compiled import int8_nodes
from trtq.errors import InputError
from trtq.graph.fold import fold
from trtq.graph.place import leave_out, matches, pattern_of, place, placed
from trtq.graph.plan import Edge, NodePlan, Plan, Weight
from trtq.graph.products import product
from trtq.graph.rewrite import weight_scale
from trtq.numerics import quantize

KERNEL = normal(4, 4, 3, 3)
SAME = "Conv<pads = [1,1,1,1]>"


class Placed:
    """The plan of one model."""

    def __init__(self, model: onnx.ModelProto, folder: Path, **options: Any) -> None:
        self.model = loaded(model, folder)
        fold(self.model.graph)
        self.plan = place(self.model, **options)

    @property
    def edges(self) -> set[tuple[str, str, int, str]]:
        return {(e.tensor, e.node, e.index, e.rule) for e in self.plan.edges}

    @property
    def weights(self) -> set[tuple[str, str, int, int]]:
        return {(w.tensor, w.node, w.index, w.axis) for w in self.plan.weights}

    @property
    def skipped(self) -> dict[str, str]:
        return {n.name: n.rule for n in self.plan.nodes if not n.int8}

    def reason(self, name: str) -> str:
        return next(n.reason for n in self.plan.nodes if n.name == name)


def images(nodes: str, *, inputs: str = "float[N,4,8,8] x", **constants: Any) -> onnx.ModelProto:
    constants = {
        name: values
        for name, values in {"w": KERNEL, "v": KERNEL, **constants}.items()
        if f"{name})" in nodes or f"{name}," in nodes
    }
    return net(f"g ({inputs}) => (float[?,?,?,?] y) {{ {nodes} }}", **constants)


# -- weighted inputs


def test_conv(tmp_path: Path) -> None:
    """x ==> Conv --> y
    [w, axis 0] ^   ^ b --> (the bias stays in floating point)
    """
    placed = Placed(images(f"y = {SAME}(x, w, b)", b=normal(4)), tmp_path)
    assert placed.edges == {("x", "y", 0, "weighted-input")}
    assert placed.weights == {("w", "y", 1, 0)}
    assert placed.plan.nodes == [NodePlan("y", "Conv", True, "weighted", "its inputs are quantized")]


def test_conv_with_a_computed_weight(tmp_path: Path) -> None:
    """x ==> Conv --> y
    k ====> ^ (an activation: per tensor)
    """
    placed = Placed(images("y = Conv(x, k)", inputs="float[N,4,8,8] x, float[4,4,3,3] k"), tmp_path)
    assert placed.edges == {("x", "y", 0, "weighted-input"), ("k", "y", 1, "weighted-input")}
    assert not placed.weights


@pytest.mark.parametrize("trans", [0, 1])
def test_gemm_constant_right(trans: int, tmp_path: Path) -> None:
    """x ==> Gemm --> y
    [w] --^ axis 1 of (K, N), axis 0 of (N, K) with transB
    """
    model = net(
        f"g (float[M,6] x) => (float[M,5] y) {{ y = Gemm<transB = {trans}>(x, w, b) }}",
        w=normal(5, 6) if trans else normal(6, 5),
        b=normal(5),
    )
    placed = Placed(model, tmp_path)
    assert placed.edges == {("x", "y", 0, "weighted-input")}
    assert placed.weights == {("w", "y", 1, 1 - trans)}


@pytest.mark.parametrize("trans", [0, 1])
def test_gemm_constant_left(trans: int, tmp_path: Path) -> None:
    """[w] --> Gemm --> y     axis 0 of (M, K), axis 1 of (K, M) with transA
    x =======^
    """
    model = net(
        f"g (float[6,N] x) => (float[5,N] y) {{ y = Gemm<transA = {trans}>(w, x) }}",
        w=normal(6, 5) if trans else normal(5, 6),
    )
    placed = Placed(model, tmp_path)
    assert placed.edges == {("x", "y", 1, "weighted-input")}
    assert placed.weights == {("w", "y", 0, trans)}


@pytest.mark.parametrize("batch", [(), (3,)])
def test_matmul_constant_right(batch: tuple[int, ...], tmp_path: Path) -> None:
    """x ==> MatMul --> y
    [w, last axis] ^
    """
    model = net("g (float[3,M,6] x) => (float[3,M,5] y) { y = MatMul(x, w) }", w=normal(*batch, 6, 5))
    placed = Placed(model, tmp_path)
    assert placed.edges == {("x", "y", 0, "weighted-input")}
    assert placed.weights == {("w", "y", 1, len(batch) + 1)}


@pytest.mark.parametrize("batch", [(), (3,)])
def test_matmul_constant_left(batch: tuple[int, ...], tmp_path: Path) -> None:
    """[w, last axis but one] --> MatMul --> y
    x ==================> ^
    """
    model = net("g (float[3,6,N] x) => (float[3,5,N] y) { y = MatMul(w, x) }", w=normal(*batch, 5, 6))
    placed = Placed(model, tmp_path)
    assert placed.edges == {("x", "y", 1, "weighted-input")}
    assert placed.weights == {("w", "y", 0, len(batch))}


def test_matmul_of_two_activations(tmp_path: Path) -> None:
    """q ==> MatMul --> y
    k ====> ^
    """
    placed = Placed(
        net("g (float[N,2,5,6] q, float[N,2,6,5] k) => (float[N,2,5,5] y) { y = MatMul(q, k) }"), tmp_path
    )
    assert placed.edges == {("q", "y", 0, "weighted-input"), ("k", "y", 1, "weighted-input")}
    assert not placed.weights


def test_an_input_read_by_several_nodes_needs_one_range(tmp_path: Path) -> None:
    """x ==> MatMul q --> MatMul y
    x ==> MatMul k ------^      (and q, k are themselves quantized in front of y)
    """
    model = net(
        "g (float[5,6] x) => (float[5,5] y) { q = MatMul(x, w) k = MatMul(x, v)"
        " t = Transpose(k) y = MatMul(q, t) }",
        w=normal(6, 6),
        v=normal(6, 6, seed=1),
    )
    placed = Placed(model, tmp_path)
    assert placed.plan.tensors == ["x", "q", "t"]
    assert {(e.node, e.index) for e in placed.plan.edges} == {("q", 0), ("k", 0), ("y", 0), ("y", 1)}


def channelwise(weight: NDArray, axis: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The integer codes and the scales of a weight."""
    scale = weight_scale(weight, axis)
    return quantize(weight, scale, axis=axis, narrow=True).astype(np.float64), scale.astype(np.float64)


@pytest.mark.parametrize(
    ("op", "weight_shape", "input_shape", "left", "attributes"),
    [
        ("Gemm", (6, 5), (4, 6), False, {}),
        ("Gemm", (5, 6), (4, 6), False, {"transB": 1}),
        ("Gemm", (5, 6), (6, 4), True, {}),
        ("Gemm", (6, 5), (6, 4), True, {"transA": 1}),
        ("MatMul", (6, 5), (4, 6), False, {}),
        ("MatMul", (3, 6, 5), (3, 4, 6), False, {}),
        ("MatMul", (5, 6), (6, 4), True, {}),
        ("MatMul", (3, 5, 6), (3, 6, 4), True, {}),
    ],
)
def test_the_scales_of_a_constant_factor_out(
    op: str,
    weight_shape: tuple[int, ...],
    input_shape: tuple[int, ...],
    left: bool,
    attributes: dict[str, int],
    tmp_path: Path,
) -> None:
    """codes . x, then times the scales along one output axis, is the product with the quantized weight.

    Only then can the multiplication run in INT8. Every channel has a magnitude of its own, so with the
    scales along another axis this fails.
    """
    spread = np.logspace(-3, 3, num=int(np.prod(weight_shape))).reshape(weight_shape)
    weight = normal(*weight_shape) * np.random.default_rng(1).permuted(spread).astype(np.float32)
    arguments = "w, x" if left else "x, w"
    listed = ", ".join(f"{k} = {v}" for k, v in attributes.items())
    model = net(
        f"g (float[{','.join(map(str, input_shape))}] x) => (float[{','.join('?' * len(input_shape))}] y)"
        f" {{ y = {op}<{listed}>({arguments}) }}",
        w=weight,
    )
    (planned,) = Placed(model, tmp_path).plan.weights
    codes, scale = channelwise(weight, planned.axis)
    shape = [1] * weight.ndim
    shape[planned.axis] = -1

    def product(w: NDArray[np.float64]) -> NDArray[np.float64]:
        w = w.T if attributes else w
        return w @ x if left else x @ w

    x = normal(*input_shape, seed=2).astype(np.float64)
    factored = product(codes) * (scale[:, None] if left else scale)
    np.testing.assert_allclose(factored, product(codes * scale.reshape(shape)), rtol=1e-12)


# -- average pooling


@pytest.mark.parametrize("pool", ["GlobalAveragePool", "AveragePool<kernel_shape = [8,8]>"])
@pytest.mark.parametrize(
    "flat", ["f = Flatten(p)", "h = Shape(p) b = Slice(h, o, i) k = Concat<axis = 0>(b, m) f = Reshape(p, k)"]
)
def test_an_average_pooling_between_quantized_layers(pool: str, flat: str, tmp_path: Path) -> None:
    """Conv --> Relu r ==> pool p ==> Flatten f ==> Gemm      (p and f share one range)"""
    nodes = f"c = {SAME}(x, w) r = Relu(c) p = {pool}(r) {flat} y = Gemm(f, s)"
    integers = {"o": np.array([0]), "i": np.array([1]), "m": np.array([-1])}
    placed = Placed(images(nodes, s=normal(4, 5), **integers), tmp_path)
    names = {n.outputs[0].name: n.name for n in placed.model.graph.nodes}
    assert placed.edges == {
        ("x", names["c"], 0, "weighted-input"),
        ("r", names["p"], 0, "average-pool"),
        ("p", names["f"], 0, "moved-input"),
        ("f", names["y"], 0, "weighted-input"),
    }
    assert placed.plan.tensors == ["x", "r", "p"]


@pytest.mark.parametrize(
    ("nodes", "exclude"),
    [
        (f"c = {SAME}(x, w) p = GlobalAveragePool(c) f = Flatten(p) y = Gemm(f, s)", ["op:Gemm"]),
        (f"c = {SAME}(x, w) p = GlobalAveragePool(c) d = {SAME}(p, v) y = Mul(c, d)", []),
        (f"c = {SAME}(x, w) p = GlobalAveragePool(c) f = Flatten(p) g = Gemm(f, s) y = Mul(g, f)", []),
    ],
    ids=["floating point behind it", "its input is read beside it", "its output is read beside it"],
)
def test_an_average_pooling_in_floating_point(nodes: str, exclude: list[str], tmp_path: Path) -> None:
    placed = Placed(images(nodes, s=normal(4, 4)), tmp_path, exclude=exclude)
    assert {e.rule for e in placed.plan.edges} == {"weighted-input"}


# -- residual additions


def test_a_normalized_stream_is_read_in_int8_alone(tmp_path: Path) -> None:
    """LayerNorm n ==> MatMul m --> Add y
    n =====================> ^      (n is then written in INT8 only)
    """
    nodes = "n = LayerNormalization(x, g) m = MatMul(n, w) y = Add(m, n)"
    model = net(f"g (float[N,6] x) => (float[N,6] y) {{ {nodes} }}", w=normal(6, 6), g=normal(6))
    placed = Placed(model, tmp_path)
    assert placed.edges == {("n", "m", 0, "weighted-input"), ("n", "y", 1, "residual-add")}
    assert placed.plan.tensors == ["n"]


@pytest.mark.parametrize(
    ("nodes", "exclude"),
    [
        ("n = LayerNormalization(x, g) m = MatMul(n, w) t = Softmax(m) u = Add(t, n) y = Mul(u, n)", []),
        ("n = LayerNormalization(x, g) m = MatMul(n, w) k = MatMul(n, v) u = Add(m, n) y = Add(u, k)", ["k"]),
        ("n = LayerNormalization(x, g) p = MatMul(x, w) u = Add(p, n) y = Relu(u)", []),
        ("n = LayerNormalization(x, g) m = MatMul(n, w) s = ReduceMean(m) y = Add(n, s)", []),
    ],
    ids=["read in floating point", "an excluded reader", "no quantized reader", "broadcast"],
)
def test_a_stream_that_is_written_in_floating_point(nodes: str, exclude: list[str], tmp_path: Path) -> None:
    weights = {"w": normal(6, 6), "v": normal(6, 6, seed=1), "g": normal(6)}
    model = net(f"g (float[N,6] x) => (float[N,6] y) {{ {nodes} }}", **weights)
    assert {e.rule for e in Placed(model, tmp_path, exclude=exclude).plan.edges} == {"weighted-input"}


def test_identity_residual(tmp_path: Path) -> None:
    """x ==> Conv c --> Add y
    x =============> ^      (one pair for both)
    """
    placed = Placed(images(f"c = {SAME}(x, w) y = Add(c, x)"), tmp_path)
    assert placed.edges == {("x", "c", 0, "weighted-input"), ("x", "y", 1, "residual-add")}
    assert placed.plan.tensors == ["x"]


def test_identity_residual_the_other_way_round(tmp_path: Path) -> None:
    """x =============> Add y
    x ==> Conv c --> ^
    """
    placed = Placed(images(f"c = {SAME}(x, w) y = Add(x, c)"), tmp_path)
    assert ("x", "y", 0, "residual-add") in placed.edges


def test_residual_of_two_convolutions(tmp_path: Path) -> None:
    """x ==> Conv a ==> Add y      (a is the residual of b, which is computed last)
    x ==> Conv b --> ^
    """
    placed = Placed(images(f"a = {SAME}(x, w) b = {SAME}(x, v) y = Add(a, b)"), tmp_path)
    last = [n.name for n in placed.model.graph.nodes if n.op == "Conv"][-1]
    (edge,) = [e for e in placed.plan.edges if e.rule == "residual-add"]
    assert {edge.tensor, last} == {"a", "b"}


def test_residual_beside_an_excluded_convolution(tmp_path: Path) -> None:
    """x --> Conv a ==> Add y      (a stays in floating point, so only b can fuse)
    x ==> Conv b --> ^
    """
    placed = Placed(images(f"a = {SAME}(x, w) b = {SAME}(x, v) y = Add(b, a)"), tmp_path, exclude=["a"])
    assert placed.edges == {("x", "b", 0, "weighted-input"), ("a", "y", 1, "residual-add")}


@pytest.mark.parametrize(
    ("nodes", "inputs"),
    [
        (f"c = {SAME}(x, w) y = Add(c, z)", "float[N,4,8,8] x, float[8,8] z"),
        (f"c = {SAME}(x, w) p = GlobalAveragePool(x) y = Add(c, p)", "float[N,4,8,8] x"),
        (f"c = {SAME}(x, w) y = Add(c, z)", "float[N,4,8,8] x, float[1,4,8,8] z"),
        (f"p = GlobalAveragePool(x) c = {SAME}(p, w) y = Add(c, x)", "float[N,4,8,8] x"),
        (f"c = {SAME}(x, w) y = Add(c, s)", "float[N,4,8,8] x"),
        (f"c = {SAME}(x, w) r = Relu(c) y = Add(r, x)", "float[N,4,8,8] x"),
        (f"c = {SAME}(x, w) r = Relu(c) t = Add(c, x) y = Add(t, r)", "float[N,4,8,8] x"),
        (f"c = {SAME}(x, w) y = Add(c, c)", "float[N,4,8,8] x"),
        (f"c = {SAME}(x, w) y = Sub(c, x)", "float[N,4,8,8] x"),
        (f"c = {SAME}(x, w) m = Abs(x) t = Abs(m) u = Add(m, t) y = Mul(c, u)", "float[N,4,8,8] x"),
    ],
    ids=[
        "rank", "per channel", "batch of one", "broadcast convolution", "constant", "not behind the Conv",
        "Conv read twice", "both the same", "no Add", "no Conv",
    ],
)  # fmt: skip
def test_additions_that_do_not_fuse(nodes: str, inputs: str, tmp_path: Path) -> None:
    """x ==> Conv --> Add y      (no quantizer: the addition stays a kernel of its own)
    other --------> ^
    """
    placed = Placed(images(nodes, inputs=inputs, s=normal(1, 4, 8, 8)), tmp_path)
    assert {e.rule for e in placed.plan.edges} == {"weighted-input"}


def test_a_convolution_that_is_an_output_does_not_fuse(tmp_path: Path) -> None:
    """x ==> Conv c --> Add y
    c --> (output)
    """
    model = images(f"c = {SAME}(x, w) y = Add(c, x)")
    model.graph.output.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, ["N", 4, 8, 8]))
    assert Placed(model, tmp_path).edges == {("x", "c", 0, "weighted-input")}


def test_matmul_does_not_fuse_with_an_addition(tmp_path: Path) -> None:
    """x ==> MatMul m --> Add y
    x ---------------> ^
    """
    model = net("g (float[N,6] x) => (float[N,6] y) { m = MatMul(x, w) y = Add(m, x) }", w=normal(6, 6))
    assert Placed(model, tmp_path).edges == {("x", "m", 0, "weighted-input")}


# -- one range for values that are only moved


def ranges(nodes: str, folder: Path, **constants: Any) -> dict[str, str]:
    """Quantized tensor -> the tensor whose range it takes."""
    placed = Placed(images(nodes, **constants), folder)
    assert set(placed.plan.tensors) == {e.range for e in placed.plan.edges}
    return {e.tensor: e.range for e in placed.plan.edges}


POOL = "MaxPool<kernel_shape = [2,2], strides = [2,2]>"


def test_moved_values_take_the_range_of_where_they_come_from(tmp_path: Path) -> None:
    """x ==> Conv a
    x --> MaxPool p ==> Conv b      (p's pair has x's range)
    """
    nodes = f"a = {SAME}(x, w) p = {POOL}(x) b = {SAME}(p, v) q = {POOL}(a) y = Mul(q, b)"
    assert ranges(nodes, tmp_path) == {"x": "x", "p": "x"}


def test_the_range_is_that_of_the_farthest_quantized_tensor(tmp_path: Path) -> None:
    """x ==> Conv a
    x --> MaxPool p ==> Conv b
          MaxPool p --> Transpose t ==> Conv c
    """
    nodes = (
        f"a = {SAME}(x, w) p = {POOL}(x) b = {SAME}(p, v) t = Transpose<perm = [0,1,3,2]>(p)"
        f" c = {SAME}(t, w) m = Mul(b, c) q = {POOL}(a) y = Mul(m, q)"
    )
    assert ranges(nodes, tmp_path) == {"x": "x", "p": "x", "t": "x"}


def test_without_a_quantized_origin_moved_values_keep_their_own_range(tmp_path: Path) -> None:
    """x --> MaxPool p ==> Conv y      (x itself is not quantized)"""
    assert ranges(f"p = {POOL}(x) y = {SAME}(p, w)", tmp_path) == {"p": "p"}


@pytest.mark.parametrize(
    "between",
    [
        "Relu(x)",
        "AveragePool<kernel_shape = [1,1]>(x)",
        "Pad(x, pads, one)",
        'Pad<mode = "reflect">(x, pads)',
    ],
)
def test_changed_values_keep_their_own_range(between: str, tmp_path: Path) -> None:
    """x ==> Conv a
    x --> Relu p ==> Conv b
    """
    nodes = f"a = {SAME}(x, w) p = {between} b = {SAME}(p, v) e = ReduceMax<keepdims = 1>(b) y = Mul(a, e)"
    constants = {"pads": np.int64([0, 0, 1, 1, 0, 0, 1, 1]), "one": np.float32(1)}
    assert ranges(nodes, tmp_path, **constants) == {"x": "x", "p": "p"}


# -- patterns


@pytest.mark.parametrize(
    ("pattern", "name", "matching"),
    [
        ("/conv1/Conv", "/conv1/Conv", True),
        ("/conv1", "/conv1/Conv", False),
        ("/layer?/*", "/layer1/block/Conv", True),
        ("/layer?/*", "/layer10/Conv", False),
        ("*", "", True),
        ("a[0].b", "a[0].b", True),
        ("a[0].b", "a0.b", False),
        ("a.b", "axb", False),
        ("a*b", "a*b", True),
        ("a+(b)|^$", "a+(b)|^$", True),
        ("op:Conv", "x", True),
        ("op:Conv*", "x", False),
        ("op:conv", "x", False),
        ("op:", "op:", True),
    ],
)
def test_patterns(pattern: str, name: str, matching: bool) -> None:
    assert matches(pattern, gs.Node("Conv", name)) is matching


CHAIN = f"a = {SAME}(x, w) r = Relu(a) y = {SAME}(r, v)"


def test_excluded_node(tmp_path: Path) -> None:
    """x --> Conv a --> Relu ==> Conv y"""
    placed = Placed(images(CHAIN), tmp_path, exclude=["a"])
    assert placed.skipped == {"a": "excluded"}
    assert placed.reason("a") == "excluded by 'a'"
    assert placed.edges == {("r", "y", 0, "weighted-input")}
    assert placed.weights == {("v", "y", 1, 0)}


def test_included_node(tmp_path: Path) -> None:
    """x ==> Conv a --> Relu --> Conv y"""
    placed = Placed(images(CHAIN), tmp_path, include=["a"])
    assert placed.skipped == {"y": "excluded"}
    assert placed.edges == {("x", "a", 0, "weighted-input")}


def test_exclusion_wins_over_inclusion(tmp_path: Path) -> None:
    placed = Placed(images(CHAIN), tmp_path, include=["op:Conv"], exclude=["y"])
    assert placed.skipped == {"y": "excluded"}


def test_excluded_operator(tmp_path: Path) -> None:
    """x --> Conv a --> MatMul y <== [u]"""
    model = images(f"a = {SAME}(x, w) y = MatMul(a, u)", u=normal(8, 8))
    assert Placed(model, tmp_path, exclude=["op:Conv"]).skipped == {"a": "excluded"}


@pytest.mark.parametrize("name", ["a*", "a?", "a[0]", "a]", "a.(b)|c+$", "op/Conv", "a b"])
def test_names_full_of_pattern_characters(name: str, tmp_path: Path) -> None:
    model = images(CHAIN)
    model.graph.node[0].name = name
    assert Placed(model, tmp_path, exclude=[name]).skipped == {name: "excluded"}


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["b", "op:Gemm", "Relu", "a?", ""])
def test_a_pattern_that_matches_nothing(option: str, pattern: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="matches no node"):
        Placed(images(CHAIN), tmp_path, **{option: [pattern]})


# -- nodes that stay in floating point


QKV = "float[N,4,5,8] q, float[N,4,7,8] k, float[N,4,7,6] v"


def with_matmul(
    nodes: str, inputs: str = "float[N,4,8,8] x", opset: int = 17, **constants: Any
) -> onnx.ModelProto:
    """`nodes` make `t` beside a MatMul that is quantized."""
    return net(
        f"g ({inputs}, float[N,6] m) => (float[?,?] y, float t) {{ y = MatMul(m, u) {nodes} }}",
        opset=opset,
        u=normal(6, 6),
        **constants,
    )


@pytest.mark.parametrize(
    ("model", "node", "reason"),
    [
        (with_matmul("t = ConvTranspose(x, w)", w=KERNEL), "t", "floating point even between Q/DQ"),
        (
            with_matmul('t = Einsum<equation = "nchw,cd->nd">(x, w)', w=normal(4, 5)),
            "t",
            "export it as MatMul",
        ),
        (
            with_matmul(
                "t = LSTM<hidden_size = 2>(x, w, r)", "float[S,N,8] x", w=normal(1, 8, 8), r=normal(1, 8, 2)
            ),
            "t",
            "recurrent",
        ),
        (
            with_matmul(
                "t = GRU<hidden_size = 2>(x, w, r)", "float[S,N,8] x", w=normal(1, 6, 8), r=normal(1, 6, 2)
            ),
            "t",
            "recurrent",
        ),
        (
            with_matmul(
                "t = RNN<hidden_size = 2>(x, w, r)", "float[S,N,8] x", w=normal(1, 2, 8), r=normal(1, 2, 2)
            ),
            "t",
            "recurrent",
        ),
        (
            with_matmul("t = DeformConv(x, w, o)", "float[N,4,8,8] x, float[N,18,6,6] o", opset=19, w=KERNEL),
            "t",
            "no INT8 kernel",
        ),
    ],
    ids=["ConvTranspose", "Einsum", "LSTM", "GRU", "RNN", "DeformConv"],
)
def test_operators_without_an_int8_kernel(
    model: onnx.ModelProto, node: str, reason: str, tmp_path: Path
) -> None:
    """x --> op t
    m ==> MatMul y
    """
    placed = Placed(model, tmp_path)
    assert placed.skipped == {node: "no-int8-kernel"}
    assert reason in placed.reason(node)
    assert placed.edges == {("m", "y", 0, "weighted-input")}


def test_integer_matmul(tmp_path: Path) -> None:
    """i (int32) --> MatMul t
    m (float) ==> MatMul y
    """
    model = with_matmul("t = MatMul(i, j)", "int32[N,4] i", j=np.ones((4, 4), np.int32))
    model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.INT32
    placed = Placed(model, tmp_path)
    assert placed.skipped == {"t": "not-floating-point"}
    assert "int32" in placed.reason("t")


@pytest.mark.parametrize("arguments", ["x, v", "v, x"])
def test_vectors(arguments: str, tmp_path: Path) -> None:
    """x --> MatMul t <-- v (a vector)
    m ==> MatMul y
    """
    placed = Placed(with_matmul(f"t = MatMul({arguments})", "float[4,4] x", v=normal(4)), tmp_path)
    assert placed.skipped == {"t": "vector-operand"}


def test_bodies_of_control_flow(tmp_path: Path) -> None:
    """c --> If y { MatMul, or If { MatMul } }
    x ==> MatMul t
    """
    model = net(
        """g (float[N,4] x, bool c) => (float[N,4] y) {
            t = MatMul(x, w)
            y = If(c) <
                then_branch = one () => (float[N,4] a) { a = MatMul(t, w) },
                else_branch = two () => (float[N,4] b) {
                    b = If(c) <then_branch = three () => (float[N,4] d) { d = MatMul(t, w) },
                               else_branch = four () => (float[N,4] e) { e = Relu(t) }>
                }
            >
        }""",
        w=normal(4, 4),
    )
    placed = Placed(model, tmp_path)
    assert [(n.op, n.int8, n.rule) for n in placed.plan.nodes] == [
        ("MatMul", True, "weighted"),
        ("MatMul", False, "subgraph"),
        ("MatMul", False, "subgraph"),
    ]
    assert len({n.name for n in placed.plan.nodes}) == 3
    assert placed.edges == {("x", "t", 0, "weighted-input")}
    counted = Placed(model, tmp_path, input_shapes={"x": (2, 4), "c": ()}).plan
    assert [n.macs for n in counted.nodes] == [2 * 4 * 4, None, None]  # a body may run any number of times
    assert counted.mac_share() is None


# -- models that cannot be placed


def test_nothing_to_quantize(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no node of the model can be quantized[\s\S]*it has no Conv"):
        Placed(net("g (float[N] x) => (float[N] y) { y = Relu(x) }"), tmp_path)


def test_everything_excluded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no node[\s\S]*a \(Conv\): excluded by '\*'"):
        Placed(images(CHAIN), tmp_path, exclude=["*"])


SCALES = {"s": np.float32(0.1), "z": np.int8(0), "u": np.uint8(128)}
CODES = np.random.default_rng(3).integers(-127, 128, (4, 4)).astype(np.int8)


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        ("q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, w)", "QuantizeLinear"),
        ("d = DequantizeLinear(c, s, z) y = MatMul(x, d)", "DequantizeLinear"),
        ("d = DequantizeLinear(c, s, z) t = Transpose(d) y = MatMul(x, t)", "DequantizeLinear"),
        ("q, r, p = DynamicQuantizeLinear(x) d = DequantizeLinear(q, r, p) y = MatMul(d, w)", "DynamicQ"),
        ("b = Cast<to = 2>(x) i = MatMulInteger(b, c) f = Cast<to = 1>(i) y = MatMul(f, w)", "MatMulInteger"),
        (
            "b = Cast<to = 2>(x) p = QLinearMatMul(b, s, u, c, s, z, s, u)"
            " f = Cast<to = 1>(p) y = MatMul(f, w)",
            "QLinearMatMul",
        ),
    ],
)
@pytest.mark.parametrize("where", ["graph", "body", "function"])
def test_a_model_that_is_quantized_already(nodes: str, found: str, where: str, tmp_path: Path) -> None:
    """In any of ONNX's ways, with a float MatMul beside it that could be quantized."""
    given = {**SCALES, "c": CODES, "w": normal(4, 4)}
    used = {name: values for name, values in given.items() if any(f"{name}{c}" in nodes for c in ",)")}
    if where == "graph":
        model = net(f"g (float[N,4] x) => (float[N,4] y) {{ {nodes} }}", **used)
    elif where == "body":
        inner = nodes.replace("y = ", "e = ")
        model = net(
            f"""g (float[N,4] x, bool t) => (float[N,4] o) {{
                k = MatMul(x, w)
                o = If(t) <then_branch = one () => (float[N,4] e) {{ {inner} }},
                           else_branch = two () => (float[N,4] a) {{ a = Relu(k) }}>
            }}""",
            **{"w": normal(4, 4), **used},
        )
    else:
        model = net("g (float[N,4] x) => (float[N,4] y) { k = MatMul(x, w) y = Relu(k) }", w=normal(4, 4))
        model.opset_import.append(onnx.helper.make_opsetid("local", 1))
        written = onnx.parser.parse_function(
            f'<domain: "local", opset_import: ["": 17]> Linear(x, {", ".join(used)}) => (y) {{ {nodes} }}'
        )
        model.functions.append(written)
        for name, values in used.items():
            if name != "w":
                model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
        model.graph.node[1].CopyFrom(onnx.helper.make_node("Linear", ["k", *used], ["y"], domain="local"))
    with pytest.raises(InputError, match=rf"quantized already: it holds [\s\S]*{found}[\s\S]*trtq gate"):
        Placed(model, tmp_path)


# -- the placement that a model already has

QUANTIZED = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) "
WEIGHT = "v = DequantizeLinear(c, s, z) "


def as_given(
    nodes: str, folder: Path, inputs: str = "float[2,4,4] x", opset: int = 21, **constants: Any
) -> Plan:
    constants = {**SCALES, "c": CODES, **constants}
    used = {
        n: v for n, v in constants.items() if any(f" {n}{c}" in nodes or f"({n}{c}" in nodes for c in ",)")
    }
    return placed(loaded(net(f"g ({inputs}) => (float y) {{ {nodes} }}", opset=opset, **used), folder), None)


@pytest.mark.parametrize(
    ("moved", "read"),
    [
        ("", "d"),
        ("m = Transpose<perm = [0, 2, 1]>(d) ", "m"),
        ("m = Reshape(d, shape) ", "m"),
        ("m = Unsqueeze(d, axis) n = Squeeze(m, axis) ", "n"),
        ("m = Flatten(d) n = Reshape(m, shape) ", "n"),
        ("m = Cast<to = 10>(d) n = Cast<to = 1>(m) ", "n"),
        ("m = Identity(d) n = Identity(m) ", "n"),
    ],
)
@pytest.mark.parametrize("weight", ["v", "t"])
def test_what_moves_values_may_stand_behind_a_dequantizer(
    moved: str, read: str, weight: str, tmp_path: Path
) -> None:
    nodes = f"{QUANTIZED}{WEIGHT}t = Transpose(v) {moved}y = MatMul({read}, {weight})"
    constants = {"shape": np.int64([2, 4, 4]), "axis": np.int64([0])}
    (node,) = as_given(nodes, tmp_path, **constants).nodes
    assert (node.int8, node.reason) == (True, "both operands are dequantized")


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (f"{QUANTIZED}{WEIGHT}m = Relu(d) y = MatMul(m, v)", "not between Q/DQ"),
        (f"{QUANTIZED}{WEIGHT}m = Add(d, d) y = MatMul(m, v)", "not between Q/DQ"),
        (f"{WEIGHT}y = MatMul(x, v)", "not between Q/DQ"),
        (f"{QUANTIZED}y = MatMul(d, w)", "not between Q/DQ"),
        (f"{QUANTIZED}v = DequantizeLinear(i, s) y = MatMul(d, v)", "dequantized from int4"),
        (
            "q = QuantizeLinear(x, s, e) d = DequantizeLinear(q, s, e) v = DequantizeLinear(f, s, e)"
            " y = MatMul(d, v)",
            "dequantized from float8",
        ),
    ],
    ids=["relu", "addition", "weight only", "activation only", "int4 weight", "float8"],
)
def test_what_is_not_between_quantizers(nodes: str, reason: str, tmp_path: Path) -> None:
    int4, float8 = onnx.TensorProto.INT4, onnx.TensorProto.FLOAT8E4M3FN
    constants = {
        "w": normal(4, 4),
        "i": onnx.numpy_helper.to_array(onnx.helper.make_tensor("", int4, (4, 4), [1] * 16)),
        "e": onnx.numpy_helper.to_array(onnx.helper.make_tensor("", float8, (), [0.0])),
        "f": onnx.numpy_helper.to_array(onnx.helper.make_tensor("", float8, (4, 4), [1.0] * 16)),
    }
    (node,) = as_given(nodes, tmp_path, **constants).nodes
    assert not node.int8
    assert reason in node.reason


@pytest.mark.parametrize("zero", ["", ", u"])
def test_unsigned_integers_of_eight_bits_are_integers_too(zero: str, tmp_path: Path) -> None:
    """Without a zero-point, QuantizeLinear makes uint8."""
    nodes = f"q = QuantizeLinear(x, s{zero}) d = DequantizeLinear(q, s{zero}) {WEIGHT}y = MatMul(d, v)"
    (node,) = as_given(nodes, tmp_path).nodes
    assert node.int8


def test_integer_operators_are_given_in_integers(tmp_path: Path) -> None:
    nodes = "q, r, p = DynamicQuantizeLinear(x) i = MatMulInteger(q, c, p, z) y = Cast<to = 1>(i)"
    (node,) = as_given(nodes, tmp_path).nodes
    assert (node.op, node.int8) == ("MatMulInteger", True)


def test_attention_is_in_floating_point_whatever_its_inputs(tmp_path: Path) -> None:
    """Its softmax is inside, where no quantizer reaches it."""
    nodes = f"{QUANTIZED}y = Attention<q_num_heads = 1, kv_num_heads = 1>(d, d, d)"
    (node,) = as_given(nodes, tmp_path, opset=23).nodes
    assert not node.int8
    assert "softmax" in node.reason


def test_products_in_bodies_belong_to_the_placement_given(tmp_path: Path) -> None:
    nodes = f"""{QUANTIZED}{WEIGHT}k = MatMul(d, v)
        y = If(t) <then_branch = one () => (float[2,4,4] e) {{ e = MatMul(k, w) }},
                   else_branch = two () => (float[2,4,4] a) {{ a = Relu(k) }}>"""
    given = as_given(nodes, tmp_path, inputs="float[2,4,4] x, bool t", w=normal(4, 4))
    assert [(node.op, node.int8) for node in given.nodes] == [("MatMul", True), ("MatMul", False)]


@pytest.mark.parametrize(
    "nodes",
    [
        f"{QUANTIZED}{WEIGHT}t = Transpose(v) y = MatMul(d, t)",
        f"{QUANTIZED}{WEIGHT}m = Transpose<perm = [0, 2, 1]>(d) y = MatMul(m, v)",
        f"{QUANTIZED}{WEIGHT}m = Reshape(d, shape) y = MatMul(m, v)",
        f"{QUANTIZED}{WEIGHT}m = Relu(d) y = MatMul(m, v)",
    ],
    ids=["weight transposed", "activation transposed", "activation reshaped", "relu"],
)
def test_the_engine_looks_through_the_same(nodes: str, tmp_path: Path) -> None:
    """TensorRT runs in INT8 what the placement says."""
    given = as_given(nodes, tmp_path, inputs="float[2,64,64] x", opset=17, shape=np.int64([4, 32, 64]),
                     c=np.resize(CODES, (64, 64)))  # fmt: skip
    compiled = engine(tmp_path / "model.onnx", tmp_path).compiled
    assert int8_nodes(compiled.layers, ["y"]) == set(given.int8_nodes)


# -- the plan as a whole


@settings(max_examples=25, deadline=None)
@given(
    ops=st.lists(st.sampled_from(["conv", "relu", "up", "add", "abs"]), min_size=1, max_size=8),
    data=st.data(),
)
def test_every_weighted_node_is_in_the_plan_once(
    ops: list[str], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors, nodes = ["x"], []
    for index, op in enumerate(["conv", *ops]):
        name, source = f"t{index}", data.draw(st.sampled_from(tensors))
        other = data.draw(st.sampled_from(tensors))
        nodes.append({
            "conv": f"{name} = {SAME}({source}, w)",
            "relu": f"{name} = Relu({source})",
            "up": f"{name} = ConvTranspose<pads = [1,1,1,1]>({source}, w)",
            "add": f"{name} = Add({source}, {other})",
            "abs": f"{name} = Abs({source})",
        }[op])  # fmt: skip
        tensors.append(name)
    every = ", ".join(tensors)
    model = images(f"{' '.join(nodes)} y = Sum({every})")
    placed = Placed(model, tmp_path_factory.mktemp("model"))
    weighted = [n.name for n in placed.model.graph.nodes if product(n)]
    assert [n.name for n in placed.plan.nodes] == weighted
    assert all(n.reason and n.rule for n in placed.plan.nodes)
    assert set(placed.plan.int8_nodes) == {w.node for w in placed.plan.weights}
    assert len(placed.plan.edges) == len({(e.node, e.index) for e in placed.plan.edges})


def test_share_of_the_multiply_accumulates(tmp_path: Path) -> None:
    """a: 8 x 8 positions x 4 x 4 x 9 = 9216; y: 8 x 8 x 4 x 2 = 512."""
    model = images(f"a = {SAME}(x, w) y = Conv(a, k)", k=normal(2, 4, 1, 1))
    placed = Placed(model, tmp_path, exclude=["y"], input_shapes={"x": (1, 4, 8, 8)})
    assert [n.macs for n in placed.plan.nodes] == [9216, 512]
    assert placed.plan.mac_share() == 9216 / (9216 + 512)
    assert placed.plan.mac_share({"y"}) == 512 / (9216 + 512)
    assert Placed(model, tmp_path).plan.mac_share() is None


def test_both_products_of_an_attention_count(tmp_path: Path) -> None:
    """The MatMul: 2 x 6 x 6; Attention: 2 rows, 4 heads, 5 queries, 7 keys, sizes 8 and 6."""
    shapes = {"q": (2, 4, 5, 8), "k": (2, 4, 7, 8), "v": (2, 4, 7, 6), "m": (2, 6)}
    placed = Placed(with_matmul("t = Attention(q, k, v)", QKV, opset=23), tmp_path, input_shapes=shapes)
    assert {n.name: n.macs for n in placed.plan.nodes} == {"y": 72, "t/MatMul": 2240, "t/MatMul_1": 1680}
    assert placed.plan.mac_share() == 1


def test_plan_as_json(tmp_path: Path) -> None:
    plan = Placed(images(f"c = {SAME}(x, w) y = Add(c, x)"), tmp_path, input_shapes={"x": (1, 4, 8, 8)}).plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.edges[0] == Edge("x", "c", 0, "weighted-input", "x")
    assert plan.weights == [Weight("w", "c", 1, 0)]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"text"',
        "{}",
        '{"format": "trtq-plan-0", "model": "", "nodes": [], "edges": [], "weights": []}',
        '{"format": "trtq-plan-1", "model": "", "nodes": [], "edges": []}',
        '{"format": "trtq-plan-1", "model": "", "nodes": 3, "edges": [], "weights": []}',
        '{"format": "trtq-plan-1", "model": "", "nodes": ["a"], "edges": [], "weights": []}',
        '{"format": "trtq-plan-1", "model": "", "nodes": [], "edges": [{"tensor": "x"}], "weights": []}',
        '{"format": "trtq-plan-1", "model": "", "nodes": [], "edges": [], "weights": [{"what": "x"}]}',
    ],
)
def test_a_damaged_plan(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(InputError, match="plan") as caught:
        Plan.load(tmp_path / "plan.json")
    assert caught.value.file == str(tmp_path / "plan.json")


def test_a_missing_plan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the plan"):
        Plan.load(tmp_path / "plan.json")


def test_plan_json_is_plain(tmp_path: Path) -> None:
    plan = Placed(images(f"y = {SAME}(x, w)"), tmp_path).plan
    assert json.loads(json.dumps(plan.to_json())) == plan.to_json()


def test_a_pooling_that_is_left_out_leaves_no_quantizer_in_front_of_flatten(tmp_path: Path) -> None:
    nodes = f"c = {SAME}(x, w) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p) y = Gemm(f, s)"
    placed = Placed(images(nodes, s=normal(4, 5)), tmp_path)
    (pool,) = (node.name for node in placed.model.graph.nodes if node.op == "GlobalAveragePool")
    left = leave_out(placed.model.graph, placed.plan, {pool: "to measure"})
    assert {edge.rule for edge in left.edges} == {"weighted-input"}
    assert left.int8_nodes == placed.plan.int8_nodes


_names = st.text(r"ab*?\[]:.op", min_size=1, max_size=6)


@given(name=_names, other=_names)
def test_the_pattern_of_a_name_matches_that_name_alone(name: str, other: str) -> None:
    """But for the first letter of a name that reads as an operator's pattern."""
    pattern = pattern_of(name)
    assert matches(pattern, gs.Node("Conv", name))
    if name != other and not name.startswith("op:"):
        assert not matches(pattern, gs.Node("Conv", other))


def test_bfloat16_stays_in_floating_point(tmp_path: Path) -> None:
    """A block in bfloat16 between casts stays, with that reason; the products around it do not."""
    weight = onnx.helper.make_tensor("w2", onnx.TensorProto.BFLOAT16, [8, 8], normal(64).tolist())
    block = net(
        """g (float[N,6] x) => (float[N,4] y) {
            first = MatMul(x, w1)
            enter = Cast<to = 16>(first)
            inner = MatMul(enter, w2)
            leave = Cast<to = 1>(inner)
            y = MatMul(leave, w3)
        }""",
        w1=normal(6, 8),
        w3=normal(8, 4),
    )
    block.graph.initializer.append(weight)
    placed = Placed(block, tmp_path)
    assert placed.plan.int8_nodes == ["first", "y"]
    assert placed.reason("inner") == "its inputs are bfloat16, not float32 or float16"


def test_a_line_for_each_reason(tmp_path: Path) -> None:
    """However many nodes have it; the first three are named."""
    nodes = " ".join(f"t{i} = ConvTranspose({f't{i - 1}' if i else 'x'}, w)" for i in range(5))
    placed = Placed(images(f"{nodes} y = {SAME}(t4, v)"), tmp_path)
    (line,) = [line for line in placed.plan.text().splitlines() if line.startswith("in floating point")]
    assert "t0 (ConvTranspose), t1 (ConvTranspose), t2 (ConvTranspose) and 2 more: TensorRT runs it" in line
