"""Extents are what NumPy finds in the tensors themselves, whatever the rows are."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import onnx_graphsurgeon as gs
import pytest
from nets import graph_of, net, normal
from numpy.typing import NDArray

from trtq.calibration.extents import measure_extents, measure_reach
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.graph.fold import fold
from trtq.graph.half_rules import Extent
from trtq.graph.inputs import InputSpec


def folded(model: onnx.ModelProto) -> gs.Graph:
    graph = graph_of(model)
    fold(graph)
    return graph


def values_of(model: onnx.ModelProto, feed: dict[str, NDArray]) -> dict[str, NDArray]:
    """Every tensor that a node makes, by ONNX's reference implementation."""
    names = [node.output[0] for node in model.graph.node]
    found = onnx.reference.ReferenceEvaluator(model).run(names, feed)
    return dict(zip(names, found, strict=True)) | feed


TEXT = """g (float[N,16] x, bool[N,16] seen) => (float[N,16] y) {
    a = MatMul(x, w)
    e = Exp(a)
    m = Where(seen, e, lowest)
    p = Softmax<axis = -1>(m)
    l = Log(p)
    y = Mul(l, e)
}"""


def samples_of(**columns: np.ndarray) -> Samples:
    specs = tuple(InputSpec(n, c.dtype, (None, *c.shape[1:])) for n, c in columns.items())
    return Samples("rows", specs, columns, {}, "hash")


def test_figures_are_those_of_the_tensors() -> None:
    model = net(TEXT, w=normal(16, 16) / 2, lowest=np.float32(-np.inf))
    feed = {"x": normal(24, 16, seed=1), "seen": np.ones((24, 16), bool)}
    feed["seen"][5, 3:] = False
    feed["x"][3] = 0
    found, truth = measure_extents(folded(model), samples_of(**feed)), values_of(model, feed)
    assert found.keys() == {"x", "a", "e", "m", "p", "l", "y"}
    for name in ("x", "a", "e"):
        values = truth[name]
        assert found[name].low == pytest.approx(values.min(), rel=1e-5)
        assert found[name].high == pytest.approx(values.max(), rel=1e-5)
        assert found[name].count == values.size
        assert found[name].energy == pytest.approx((values.astype(np.float64) ** 2).sum(), rel=1e-5)
    p = truth["p"]
    assert found["p"].smallest == pytest.approx(np.abs(p[p != 0]).min(), rel=1e-4)
    assert found["m"].amax == np.inf
    assert found["m"].high == pytest.approx(truth["m"].max(), rel=1e-5)


@pytest.mark.parametrize("opset", [17, 18])
def test_many_small_tensors_of_one_shape(opset: int) -> None:
    """They are looked at together, with others of other shapes and sizes between them."""
    steps = [f"a{i} = MatMul(a{i - 1}, w)\n s{i} = ReduceMax<keepdims = 0>(a{i})" for i in range(1, 15)]
    wide = [f"b{i} = MatMul({f'b{i - 1}' if i else 'a14'}, {'v' if i else 'u'})" for i in range(9)]
    scalars = ", ".join(f"s{i}" for i in range(1, 15))
    lines = "\n".join(["a0 = Relu(x)", *steps, *wide, f"y = Sum(b8, {scalars})"])
    text = f"g (float[N,6] x) => (float[N,5] y) {{ {lines} }}"
    model = net(text, opset=opset, w=normal(6, 6) / 2, u=normal(6, 5), v=normal(5, 5) / 2)
    rows = normal(3, 6, seed=1)
    found = measure_extents(folded(model), samples_of(x=rows))
    assert list(found) == ["x", *(node.output[0] for node in model.graph.node)]
    truths = [values_of(model, {"x": rows[i : i + 1]}) for i in range(3)]
    for name, extent in found.items():
        values = np.concatenate([np.ravel(truth[name]) for truth in truths]).astype(np.float64)
        assert (extent.low, extent.high) == pytest.approx((values.min(), values.max()), rel=1e-5)
        assert extent.count == values.size
        assert extent.energy == pytest.approx((values**2).sum(), rel=1e-5)
    assert measure_reach(folded(model), samples_of(x=rows)) == {n: e.amax for n, e in found.items()}


def test_the_reach_is_that_of_all_rows() -> None:
    model = net("g (float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }", w=-np.eye(4, dtype=np.float32))
    rows = normal(200, 4)
    largest = np.abs(rows).max()
    assert measure_reach(folded(model), samples_of(x=rows)) == dict.fromkeys("xy", largest)
    assert measure_reach(folded(model), samples_of(x=rows), {"y": 7.0}) == {"x": largest, "y": 7.0}
    assert measure_reach(folded(model), samples_of(x=rows), {"x": 1.0, "y": 7.0}) == {"x": 1.0, "y": 7.0}


def test_an_empty_tensor_reaches_nowhere() -> None:
    graph = folded(
        net(
            "g (float[N,4] x) => (float[N,?] y) { y = Slice(x, start, end, axes) }",
            start=np.int64([4]),
            end=np.int64([9]),
            axes=np.int64([1]),
        )
    )
    found = measure_extents(graph, samples_of(x=normal(3, 4)))
    assert measure_reach(graph, samples_of(x=normal(3, 4)))["y"] == 0
    assert (found["y"].amax, found["y"].rms, found["y"].count) == (0, 0, 0)


def test_data_that_the_model_refuses() -> None:
    graph = folded(net("g (float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }", w=normal(4, 4)))
    with pytest.raises(InputError, match="does not run"):
        measure_extents(graph, samples_of(x=normal(3, 5)))


@pytest.mark.parametrize("rms", [1e-7, 1e-6, 1e-4, 1.0])
def test_the_loss_is_not_less_than_what_rounding_takes(rms: float) -> None:
    values = rms * np.random.default_rng(0).normal(size=100_000)
    extent = Extent(values.min(), values.max(), 0.0, float((values**2).sum()), values.size)
    lost = ((values - values.astype(np.float16).astype(np.float64)) ** 2).sum() / (values**2).sum()
    relative = 2.0**-24  # of rounding to 11 bits
    assert lost <= extent.loss * 1.05 + relative
    if rms < 1e-5:
        assert lost >= extent.loss * 0.5


def test_a_model_in_half_has_none() -> None:
    model = net("g (float16[N,4] x) => (float16[N,4] y) { y = Relu(x) }")
    specs = (InputSpec("x", np.dtype(np.float16), ("N", 4)),)
    x = {"x": normal(3, 4, dtype=np.float16)}
    samples = Samples("random", specs, x, {}, "random")
    assert measure_extents(folded(model), samples) == measure_reach(folded(model), samples) == {}
