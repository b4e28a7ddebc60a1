"""What stays float32, rule by rule, and that what the rules leave in float16 computes what float32 does."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx.reference
import onnx_graphsurgeon as gs
import pytest
from family import FAMILIES, data_for, folded
from nets import graph_of, net, normal
from numpy.typing import NDArray

from trtq.calibration.extents import measure_extents
from trtq.data.samples import Samples
from trtq.graph.fold import fold
from trtq.graph.half import SATURATED
from trtq.graph.half_rules import float32_nodes, half_by_rules
from trtq.graph.inputs import InputSpec
from trtq.graph.model import export
from trtq.graph.plan import Edge, Plan
from trtq.simulation.session import simulation_session

NOTHING = Plan("", [], [], [])
W = normal(16, 16) / 4
OPSET = 19


def samples_of(**columns: NDArray) -> Samples:
    specs = tuple(InputSpec(n, c.dtype, (None, *c.shape[1:])) for n, c in columns.items())
    return Samples("rows", specs, columns, {}, "hash")


def graph_for(text: str, **constants: Any) -> gs.Graph:
    graph = graph_of(net(text, opset=OPSET, **constants))
    fold(graph)
    return graph


def kept(graph: gs.Graph, samples: Samples) -> dict[str, str]:
    """Node -> the rule that keeps it in float32."""
    extents = measure_extents(graph, samples)
    return {node.name: node.rule for node in float32_nodes(graph, NOTHING, {}, extents)}


def referenced(graph: gs.Graph, feed: dict[str, NDArray]) -> list[NDArray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: list[NDArray] = onnx.reference.ReferenceEvaluator(export(graph)).run(None, feed)
    return found


def noise_db(graph: gs.Graph, half: gs.Graph, feed: dict[str, NDArray]) -> float:
    """SQNR in dB of the half graph against the float32 one, both by onnx.reference."""
    (expected,), (found,) = referenced(graph, feed), referenced(half, feed)
    assert np.isfinite(found).all()
    e, f = expected.astype(np.float64), found.astype(np.float64)
    with np.errstate(divide="ignore"):  # all of it may be float32, and exact
        return float(10 * np.log10((e**2).sum() / ((e - f) ** 2).sum()))


LAYER_NORM = """g (float[N,16] x) => (float[N,16] y) {
    h = MatMul(x, w)
    m = ReduceMean<axes = [-1], keepdims = 1>(h)
    d = Sub(h, m)
    p = SQUARE
    v = ReduceMean<axes = [-1], keepdims = 1>(p)
    ve = Add(v, eps)
    s = Sqrt(ve)
    y = Div(d, s)
}""".replace("ReduceMean<axes = [-1], keepdims = 1>(h)", "ReduceMean<keepdims = 1>(h, last)").replace(
    "ReduceMean<axes = [-1], keepdims = 1>(p)", "ReduceMean<keepdims = 1>(p, last)"
)


@pytest.mark.parametrize("square", ["Pow(d, two)", "Mul(d, d)"])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_layer_norm_is_normal_whatever_the_size_of_what_it_normalizes(square: str, size: float) -> None:
    """At 1,000 the squares overflow, at 1e-4 they drown; between them only the epsilon matters."""
    constants = {"two": np.float32(2)} if square.startswith("Pow") else {}
    graph = graph_for(
        LAYER_NORM.replace("SQUARE", square),
        w=np.float32(size) * W,
        last=np.int64([-1]),
        eps=np.float32(1e-12),
        **constants,
    )
    feed = {"x": normal(32, 16, seed=1)}
    found = kept(graph, samples_of(**feed))
    if size == 1.0:
        assert found == {"ve": "range"}
    else:
        assert {"p", "v", "ve"} <= found.keys()
    half = half_by_rules(graph, measure_extents(graph, samples_of(**feed)))
    assert noise_db(graph, half, feed) > 50


def test_the_reason_names_tensor_value_and_limit() -> None:
    graph = graph_for("g (float[N,16] x) => (float[N,16] y) { a = MatMul(x, w) b = Mul(a, k) y = Relu(b) }",
                      w=W, k=np.float32(1e5))  # fmt: skip
    feed = {"x": normal(8, 16, seed=1)}
    nodes = {n.name: n for n in float32_nodes(graph, NOTHING, {}, measure_extents(graph, samples_of(**feed)))}
    assert nodes.keys() == {"b", "y"}
    assert nodes["b"].reason == "its input 'k' holds 1e+05, and float16 ends at 65504"
    largest = np.abs(feed["x"] @ W).max() * 1e5
    assert nodes["y"].reason == f"its input 'b' reaches {largest:.3g}, and float16 ends at 65504"
    assert nodes["y"].op == "Relu"


def test_headroom_for_rows_that_were_not_seen() -> None:
    """What reached 40,000 may reach 65,504; what reached 30,000 is given the benefit of twice."""
    graph = graph_for("g (float[N,2] x) => (float[N,2] y) { y = Neg(x) }")
    assert kept(graph, samples_of(x=np.float32([[40_000, 1]] * 4))) == {"y": "range"}
    assert not kept(graph, samples_of(x=np.float32([[30_000, 1]] * 4)))


@pytest.mark.parametrize(("top", "stays"), [(5.0, False), (6.0, True)])
def test_exp_leaves_room_for_twice_its_input(top: float, stays: bool) -> None:
    """exp(2 · 5.5) is about 65504."""
    graph = graph_for("g (float[N,2] x) => (float[N,2] y) { y = Exp(x) }")
    assert kept(graph, samples_of(x=np.float32([[top, -1]] * 4))) == ({"y": "grows"} if stays else {})


@pytest.mark.parametrize(("op", "rule"), [("ReduceL2", "grows"), ("ReduceSumSquare", "range")])
def test_sums_of_squares(op: str, rule: str) -> None:
    """The result of ReduceL2 is small where its squares are not."""
    graph = graph_for(f"g (float[N,8] x) => (float[N,1] y) {{ y = {op}(x, last) }}", last=np.int64([-1]))
    assert kept(graph, samples_of(x=200 * normal(4, 8))) == {"y": rule}
    assert not kept(graph, samples_of(x=normal(4, 8)))


@pytest.mark.parametrize(
    "call", ["ReduceL2(x, last)", "LpNormalization(x)", "LpPool<kernel_shape = [400]>(u)", "GlobalLpPool(u)"]
)
def test_sums_of_many_squares(call: str) -> None:
    """The square of 20 is 400, that of 400 values like it is beyond float16; the root of it is not."""
    text = f"g (float[N,400] x) => (float[?,?] y) {{ u = Unsqueeze(x, one) y = {call} }}"
    constants = {"last": np.int64([-1])} if "last" in call else {}
    graph = graph_for(text, one=np.int64([1]), **constants)
    feed = {"x": 20 * normal(4, 400)}
    assert kept(graph, samples_of(**feed)).keys() == {"y"}
    assert not kept(graph, samples_of(x=normal(4, 400)))
    if "Global" not in call:  # which the reference lacks
        half = half_by_rules(graph, measure_extents(graph, samples_of(**feed)))
        assert noise_db(graph, half, feed) > 50


def test_squares_that_drown() -> None:
    """A norm of 1e-4 is a float16; the squares of 1e-4 are none."""
    graph = graph_for("g (float[N,8] x) => (float[N,1] y) { y = ReduceL2(x, last) }", last=np.int64([-1]))
    feed = {"x": np.float32(1e-4) * normal(4, 8)}
    assert kept(graph, samples_of(**feed)) == {"y": "inside"}
    half = half_by_rules(graph, measure_extents(graph, samples_of(**feed)))
    assert noise_db(graph, half, feed) > 50


GAIN, NO_BIAS = np.ones(16, np.float32), np.zeros(16, np.float32)


@pytest.mark.parametrize(
    "call",
    [
        "LayerNormalization(h, gain, bias)",
        "LpNormalization(h)",
        "InstanceNormalization(h, gain, bias)",
        "GroupNormalization<num_groups = 2>(h, gain, bias)",
        "LpPool<kernel_shape = [3]>(h)",
        "MeanVarianceNormalization<axes = [2]>(h)",
        "ReduceLogSumExp<keepdims = 1>(h, last)",
        "Softplus(h)",
        "Mish(h)",
    ],
)
def test_what_overflows_inside_one_operator(call: str) -> None:
    """The reference computes them in float16 and finds zeros, infinities or NaN where their squares or
    exponentials overflow; small values it normalizes as float32 does."""
    text = f"g (float[N,16,16] x) => (float[N,16,M] y) {{ h = MatMul(x, w) y = {call} }}"
    constants = {"w": 400 * W, "gain": GAIN, "bias": NO_BIAS, "last": np.int64([-1])}
    used = {name: value for name, value in constants.items() if name in call or name == "w"}
    model = net(text, opset=21, **used)
    graph = graph_of(model)
    fold(graph)
    feed = {"x": normal(8, 16, 16, seed=1)}
    assert kept(graph, samples_of(**feed)) == {"y": "inside"}
    half = half_by_rules(graph, measure_extents(graph, samples_of(**feed)))
    assert noise_db(graph, half, feed) > 50


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_what_does_not_overflow_inside(size: float) -> None:
    """Nor do squares around 1 drown; those of 0.001 do, and the epsilon of the mean is another size."""
    graph = graph_for("g (float[N,16] x) => (float[N,16] y) { y = LpNormalization(x) }")
    feed = {"x": np.float32(size) * normal(8, 16, seed=1)}
    assert kept(graph, samples_of(**feed)) == ({"y": "inside"} if size < 1 else {})


@pytest.mark.parametrize("op", ["Mean", "Sum"])
def test_partial_sums_of_tensors(op: str) -> None:
    """20,000 + 20,000 + 20,000 - 20,000: the third of the partial sums is at the end of float16."""
    text = f"g (float[N,4] x) => (float[N,4] y) {{ n = Neg(x) y = {op}(x, x, x, n) }}"
    assert kept(graph_for(text), samples_of(x=np.full((4, 4), 20_000, np.float32)))["y"] in ("sums", "range")
    assert not kept(graph_for(text), samples_of(x=np.full((4, 4), 2_000, np.float32)))


@pytest.mark.parametrize("op", ["Log", "Reciprocal"])
def test_small_values_in_front_of_a_pole(op: str) -> None:
    graph = graph_for(f"g (float[N,2] x) => (float[N,2] y) {{ y = {op}(x) }}")
    assert kept(graph, samples_of(x=np.float32([[1, 5e-5], [2, 0.5]]))) == {"y": "singular"}
    assert not kept(graph, samples_of(x=np.float32([[1, 0.01], [2, 0.5]])))


@pytest.mark.parametrize(("length", "stays"), [(2048, False), (2049, True)])
def test_sums_over_long_axes(length: int, stays: bool) -> None:
    graph = graph_for("g (float[N,L] x) => (float[N,1] y) { y = ReduceMean(x, last) }", last=np.int64([-1]))
    found = kept(graph, samples_of(x=np.full((2, length), 0.1, np.float32)))
    assert found == ({"y": "sums"} if stays else {})


def test_a_sum_whose_mean_is_small() -> None:
    graph = graph_for("g (float[N,100] x) => (float[N,1] y) { y = ReduceMean(x, last) }", last=np.int64([-1]))
    assert kept(graph, samples_of(x=np.full((2, 100), 500, np.float32))) == {"y": "sums"}


def test_integers_beyond_2048_stay_exact() -> None:
    text = "g (int64[N,2] i) => (float[N,2] y) { f = Cast<to = 1>(i) y = Mul(f, k) }"
    graph = graph_for(text, k=np.float32(0.001))
    assert kept(graph, samples_of(i=np.int64([[1, 2049], [5, 7]]))) == {"f": "range", "y": "range"}
    assert not kept(graph, samples_of(i=np.int64([[1, 2048], [5, 7]])))


def test_shape_arithmetic_stays_float32_and_exact() -> None:
    """A height of 1,001, times 0.7, is 700.7; float16 has steps of 0.5 there and would round it to 700.5."""
    text = """g (float[1,1,H,W] x) => (float[?] y) {
        s = Shape<start = 2>(x)
        f = Cast<to = 1>(s)
        h = Mul(f, k)
        c = Ceil(h)
        n = Cast<to = 7>(c)
        z = ConstantOfShape(n)
        y = Reshape(z, flat)
    }"""
    graph = graph_for(text, k=np.float32(0.7), flat=np.int64([-1]))
    samples = samples_of(x=normal(1, 1, 1001, 3))
    found = kept(graph, samples)
    assert {name for name, rule in found.items() if rule == "index"} == {"f", "h", "c", "n"}
    half = half_by_rules(graph, measure_extents(graph, samples))
    feed = {"x": normal(1, 1, 1001, 3)}
    assert referenced(half, feed)[0].shape == referenced(graph, feed)[0].shape == (701 * 3,)


MASKED = """g (float[N,6,8] x, int64[N,6] mask) => (float[N,6,8] y) {
    q = MatMul(x, wq)
    xt = Transpose<perm = [0, 2, 1]>(x)
    scores = MatMul(q, xt)
    bits = Unsqueeze(mask, one)
    floats = Cast<to = 1>(bits)
    off = Sub(whole, floats)
    far = Mul(off, lowest)
    masked = Add(scores, far)
    p = Softmax<axis = -1>(masked)
    y = MatMul(p, x)
}"""


@pytest.mark.parametrize("lowest", [-1e9, -3.4e38, -1e4])
def test_masks_saturate_and_stay_masks(lowest: float) -> None:
    graph = graph_for(
        MASKED, wq=normal(8, 8), one=np.int64([1]), whole=np.float32(1), lowest=np.float32(lowest)
    )
    mask = np.int64([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    feed = {"x": normal(3, 6, 8, seed=3), "mask": mask}
    assert not kept(graph, samples_of(**feed))
    half = half_by_rules(graph, measure_extents(graph, samples_of(**feed)))
    assert noise_db(graph, half, feed) > 50
    constants = [t for t in half.tensors().values() if isinstance(t, gs.Constant) and t.dtype == np.float16]
    assert min(float(t.values.min()) for t in constants) == max(lowest, -SATURATED)


def test_what_looks_like_a_mask_and_is_not() -> None:
    """The same constant, but the sum is also an output."""
    graph = graph_for(
        "g (float[N,4] x) => (float[N,4] a, float[N,4] y) { a = Add(x, far) y = Softmax<axis = -1>(a) }",
        far=np.float32(-1e9),
    )
    assert kept(graph, samples_of(x=normal(2, 4))) == {"a": "range", "y": "range"}


def test_a_product_whose_sum_overflows_on_the_way() -> None:
    """A thousand times 100, half of them negative: the result is small, the way to it is not."""
    weight = np.ones((1000, 2), np.float32)
    weight[500:] = -1
    graph = graph_for("g (float[N,1000] x) => (float[N,2] y) { y = MatMul(x, w) }", w=weight)
    assert kept(graph, samples_of(x=np.full((2, 1000), 100, np.float32))) == {"y": "products"}
    assert not kept(graph, samples_of(x=np.full((2, 1000), 10, np.float32)))


def test_a_scale_that_float16_does_not_hold() -> None:
    graph = graph_for("g (float[N,16] x) => (float[N,16] y) { y = MatMul(x, w) }", w=W)
    plan = Plan("", [], [Edge("x", "y", 0, "weighted-input", "x")], [])
    extents = measure_extents(graph, samples_of(x=normal(4, 16)))
    for scale, stays in ((1e-6, True), (1e-2, False), (1e9, True)):
        found = float32_nodes(graph, plan, {"x": np.float32(scale)}, extents)
        assert [node.rule for node in found] == (["scale"] if stays else [])


def test_without_data_what_may_overflow_stays_float32() -> None:
    graph = graph_for(LAYER_NORM.replace("SQUARE", "Mul(d, d)"), w=W, last=np.int64([-1]),
                      eps=np.float32(1e-12))  # fmt: skip
    found = {node.name: node.rule for node in float32_nodes(graph, NOTHING, {}, {})}
    assert found == {"m": "sums", "p": "grows", "v": "sums", "ve": "range"}


def test_what_a_body_reads_stays_float32() -> None:
    text = """g (float[N,16] x, bool[] c) => (float[N,16] y) {
        a = MatMul(x, w)
        b = MatMul(a, w)
        i = If (c) <
            then_branch = t () => (float[N,16] r) { r = Relu(a) },
            else_branch = e () => (float[N,16] n) { n = Neg(a) }
        >
        y = Add(i, b)
    }"""
    graph = graph_for(text, w=W)
    found = {node.name: node.rule for node in float32_nodes(graph, NOTHING, {}, {})}
    assert found == {"a": "control-flow", "i": "control-flow"}
    half = half_by_rules(graph, {})
    for condition in (True, False):
        feed = {"x": normal(2, 16), "c": np.array(condition)}
        (expected,), (actual,) = (
            simulation_session(export(g).SerializeToString(), 1).run(None, feed) for g in (graph, half)
        )
        np.testing.assert_allclose(actual, expected, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_half_are_finite_and_close(family: str) -> None:
    """Few nodes stay float32, and the simulation of all others in float16 is near the float32 outputs."""
    model = folded(family)
    samples = data_for(model.inputs)
    nodes = float32_nodes(model.graph, NOTHING, {}, measure_extents(model.graph, samples))
    assert len(nodes) <= 0.05 * len(model.graph.nodes) + 1
    feed = next(iter(samples.batches(1))).feed
    half = half_by_rules(model.graph, measure_extents(model.graph, samples))
    outputs = [
        simulation_session(export(g).SerializeToString(), threads=1).run(None, feed)
        for g in (model.graph, half)
    ]
    for expected, found in zip(*outputs, strict=True):
        error = np.square(found.astype(np.float64) - expected).sum()
        assert 10 * np.log10(np.square(expected.astype(np.float64)).sum() / error) > 48
