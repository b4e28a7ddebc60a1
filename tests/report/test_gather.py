"""What `deploy` leaves for the report, against the values that it comes from."""

from __future__ import annotations

import json

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from jobs import Deployed

from trtq.calibration.methods import sqnr_db
from trtq.calibration.statistics import Histogram
from trtq.calibration.table import Table
from trtq.numerics import INT8_MAX
from trtq.report.gather import BARS, MOST_NODES, graph_nodes, tensor_values
from trtq.report.record import IN_USE, Record


def histogram_of(values: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.add(values.astype(np.float32))
    return histogram


@pytest.mark.parametrize("amax", [0.5, 2.0, 4.0])
def test_the_sqnr_of_a_tensor_is_that_of_its_values(amax: float) -> None:
    """Quantized and dequantized one by one in float64."""
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32).astype(np.float64)
    scale = amax / INT8_MAX
    image = np.clip(np.rint(values / scale), -INT8_MAX, INT8_MAX) * scale
    expected = 10 * np.log10((values**2).sum() / ((values - image) ** 2).sum())
    assert sqnr_db(histogram_of(values), amax) == pytest.approx(expected, abs=0.05)


def test_bars_count_the_values() -> None:
    values = np.random.default_rng(1).laplace(size=100_000).astype(np.float32)
    found = tensor_values("t", histogram_of(values), 3.0)
    expected, _ = np.histogram(np.abs(values), BARS, (0, float(np.abs(values).max())))
    assert sum(found.counts) == values.size
    assert np.abs(np.array(found.counts) - expected).max() <= 0.002 * values.size
    assert (found.low, found.high) == (values.min(), values.max())


def test_thresholds_are_those_of_the_methods() -> None:
    values = np.random.default_rng(2).normal(size=100_000).astype(np.float32)
    found = {t.method: t for t in tensor_values("t", histogram_of(values), 2.0).thresholds}
    assert found[IN_USE].amax == 2
    assert found[IN_USE].beyond == pytest.approx((np.abs(values) > 2).mean(), abs=1e-3)
    assert found["max"].amax == np.abs(values).max()
    assert found["max"].beyond == 0
    assert found["percentile:99.9"].amax == pytest.approx(np.percentile(np.abs(values), 99.9), rel=0.01)
    assert found["mse"].sqnr_db >= max(t.sqnr_db for t in found.values()) - 1e-9


def test_nodes_come_after_what_they_read() -> None:
    x, a, b, y = (gs.Variable(name, np.float32, [1]) for name in "xaby")
    first, second = gs.Node("Relu", "first", {}, [x], [a]), gs.Node("Neg", "second", {}, [a], [b])
    both = gs.Node("Add", "both", {}, [a, b], [y])
    nodes, count = graph_nodes(gs.Graph([both, second, first], [x], [y]), MOST_NODES)
    found = [(node.name, node.op, node.inputs) for node in nodes]
    assert found == [
        ("x", "input", ()),
        ("first", "Relu", (0,)),
        ("second", "Neg", (1,)),
        ("both", "Add", (1, 2)),
        ("y", "output", (3,)),
    ]
    assert count == 3
    assert graph_nodes(gs.Graph([both, second, first], [x], [y]), most=2) == ((), 3)


def test_what_the_demo_leaves(demo: Deployed) -> None:
    record = Record.load(demo.folder / "report.json")
    table = Table.load(demo.folder / "calibration.cache")
    assert record.data.rows == json.loads((demo.folder / "calibration.cache.json").read_text())["rows"]
    assert record.tensor_count == len(record.tensors)
    for tensor in record.tensors:
        assert tensor.thresholds[0].amax == pytest.approx(float(table.scales[tensor.tensor]) * INT8_MAX)
        assert sum(tensor.counts) > 0
    worst = json.loads((demo.folder / "verdict.json").read_text())["worst_samples"]
    assert [sample.number for sample in record.samples] == worst
    assert [cost.engine for cost in record.costs][:2] == ["FP32", "FP16"]
    assert record.costs[1].bytes < record.costs[0].bytes
    assert (demo.folder / "report.json").stat().st_size < 200_000
    assert (demo.folder / "report.html").stat().st_size < 300_000


def test_a_record_is_itself_again(demo: Deployed) -> None:
    record = Record.load(demo.folder / "report.json")
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record
