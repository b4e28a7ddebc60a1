"""Extents are what NumPy finds in the tensors themselves, whatever the rows are."""

from __future__ import annotations

import numpy as np
import pytest
from nets import graph_of, net, normal, tensor

from trtq.calibration.extents import measure_extents
from trtq.data.samples import InputSpec, Samples
from trtq.errors import InputError
from trtq.graph.fold import fold
from trtq.graph.half_rules import Extent

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
    graph = graph_of(model)
    fold(graph)
    feed = {"x": normal(24, 16, seed=1), "seen": np.ones((24, 16), bool)}
    feed["seen"][5, 3:] = False
    feed["x"][3] = 0
    found = measure_extents(graph, samples_of(**feed))
    assert found.keys() == {"x", "a", "e", "m", "p", "l", "y"}
    for name in ("x", "a", "e"):
        values = feed[name] if name in feed else tensor(model, name, feed)
        assert (found[name].low, found[name].high) == (values.min(), values.max())
        assert found[name].count == values.size
        assert found[name].energy == pytest.approx((values.astype(np.float64) ** 2).sum(), rel=1e-5)
    p = tensor(model, "p", feed)
    assert found["p"].smallest == np.abs(p[p != 0]).min()
    assert found["m"].amax == np.inf
    assert found["m"].high == tensor(model, "m", feed).max()


def test_an_empty_tensor_reaches_nowhere() -> None:
    graph = graph_of(
        net(
            "g (float[N,4] x) => (float[N,?] y) { y = Slice(x, start, end, axes) }",
            start=np.int64([4]),
            end=np.int64([9]),
            axes=np.int64([1]),
        )
    )
    fold(graph)
    found = measure_extents(graph, samples_of(x=normal(3, 4)))
    assert (found["y"].amax, found["y"].rms, found["y"].count) == (0, 0, 0)


def test_data_that_the_model_refuses() -> None:
    graph = graph_of(net("g (float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }", w=normal(4, 4)))
    fold(graph)
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
