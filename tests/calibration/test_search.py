"""`--method auto`: the best method wins, and a tensor gets a range of its own only where that helps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from mixed import BOXES, SCORES, lowest_decibels, mixed_net
from nets import normal, run

from trtq.calibration.collect import collect
from trtq.calibration.methods import Method, parse_method, scales_from
from trtq.calibration.search import CANDIDATES, Rows, choose_method
from trtq.calibration.statistics import Histogram, Statistics
from trtq.console import SILENT
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.graph.fold import fold
from trtq.graph.model import load_model
from trtq.graph.place import place
from trtq.graph.quantization import Quantization
from trtq.simulation.similarity import MAX_SQNR_DB


def measured(folder: Path, x: np.ndarray, weight: np.ndarray) -> tuple[Rows, Quantization, Statistics]:
    """A matmul with the rows of `x` held back, not yet calibrated, and the statistics of the same rows."""
    graph = gs.Graph(opset=17)
    graph.inputs = [gs.Variable("x", np.float32, ["N", x.shape[1]])]
    graph.outputs = [gs.Variable("y", np.float32, ["N", weight.shape[1]])]
    graph.nodes = [gs.Node("MatMul", "m", {}, [*graph.inputs, gs.Constant("w", weight)], graph.outputs)]
    proto = gs.export_onnx(graph)
    proto.ir_version = 10
    onnx.save(proto, folder / "m.onnx")
    np.savez(folder / "x.npz", x=x)
    model = load_model(folder / "m.onnx")
    fold(model.graph)
    plan = place(model)
    samples = load_samples(str(folder / "x.npz"), model.inputs)
    statistics = collect(model.graph, plan.tensors, samples)
    return Rows(model.path, samples), Quantization(model.graph, plan, {}), statistics


def mixed(folder: Path) -> tuple[Rows, Quantization, Statistics]:
    """The same of a network whose output mixes scales."""
    onnx.save(mixed_net(), folder / "m.onnx")
    np.savez(folder / "x.npz", x=normal(64, 16))
    model = load_model(folder / "m.onnx")
    fold(model.graph)
    plan = place(model)
    samples = load_samples(str(folder / "x.npz"), model.inputs)
    return (
        Rows(model.path, samples),
        Quantization(model.graph, plan, {}),
        collect(model.graph, plan.tensors, samples),
    )


def by_hand(x: np.ndarray, weight: np.ndarray, scale: float) -> float:
    """SQNR in dB of x @ w with x per tensor and w per column in INT8, in float64."""
    columns = np.abs(weight).max(axis=0) / 127
    codes = np.clip(np.rint(weight / columns), -127, 127) * columns
    quantized = np.clip(np.rint(x / scale), -128, 127) * scale
    exact = x.astype(np.float64) @ weight
    return float(10 * np.log10((exact**2).sum() / ((exact - quantized @ codes) ** 2).sum()))


@pytest.fixture
def arrays() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(64, 32)).astype(np.float32), random.normal(size=(32, 8)).astype(np.float32)


def test_the_score_is_the_sqnr_of_quantized_arithmetic(
    arrays: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    x, weight = arrays
    rows, bare, statistics = measured(tmp_path, x, weight)
    for name in ("max", "percentile:99.9"):
        scales = scales_from(statistics, parse_method(name))
        expected = by_hand(x, weight, float(scales["x"]))
        assert rows.sqnr_db(replace(bare, scales=scales), SILENT, name) == pytest.approx(expected, abs=0.05)


def test_the_best_candidate_is_chosen(arrays: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    x, weight = arrays
    x[0, 0], weight[0] = 1000.0, 0.0  # an outlier that no output depends on: max wastes the range on it
    rows, bare, statistics = measured(tmp_path, x, weight)
    choice = choose_method(rows, bare, statistics, SILENT)
    assert choice.sqnr_db.keys() == set(CANDIDATES)
    assert choice.rows == 64
    assert str(choice.method) != "max"
    assert choice.sqnr_db[str(choice.method)] == max(choice.sqnr_db.values())
    assert choice.sqnr_db[str(choice.method)] > choice.sqnr_db["max"] + 20


def test_of_equals_the_first_is_chosen(arrays: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    x, weight = arrays
    rows, bare, statistics = measured(tmp_path, x, np.zeros_like(weight))
    choice = choose_method(rows, bare, statistics, SILENT)
    assert len(set(choice.sqnr_db.values())) == 1
    assert str(choice.method) == CANDIDATES[0]


def test_a_method_that_keeps_only_zeros_takes_the_maximum_and_zeros_have_no_scale() -> None:
    histogram, never = Histogram(), Histogram()
    histogram.add(np.array([3.0], np.float32))
    never.add(np.zeros(3, np.float32))
    zeros = Method("zeros", lambda h: 0.0)
    scales = scales_from(Statistics({"x": histogram, "never": never, "empty": Histogram()}), zeros)
    assert scales == {"x": np.float32(3 / 127)}


def test_scales_take_a_tensors_own_method(arrays: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    x, weight = arrays
    _, _, statistics = measured(tmp_path, x, weight)
    own = {"x": parse_method("percentile:50")}
    scale = scales_from(statistics, parse_method("max"), own)["x"]
    assert scale.dtype == np.float32
    assert scale == pytest.approx(np.median(np.abs(x)) / 127, rel=0.02)
    plain = scales_from(statistics, parse_method("max"))["x"]
    assert plain == pytest.approx(np.abs(x).max() / 127, rel=1e-6)


def test_outputs_that_are_not_finite_are_the_worst(tmp_path: Path) -> None:
    """y = log(x w) is finite in fp32, but not where rounding makes a product 0."""
    x = np.full((16, 2), 1, np.float32)
    x[:, 1] = 1e-5
    graph = gs.Graph(opset=17)
    graph.inputs = [gs.Variable("x", np.float32, ["N", 2])]
    graph.outputs = [gs.Variable("y", np.float32, ["N", 1])]
    weight = gs.Constant("w", np.array([[0], [1]], np.float32))
    graph.nodes = [gs.Node("MatMul", "m", {}, [*graph.inputs, weight], [gs.Variable("h", np.float32)])]
    graph.nodes.append(gs.Node("Log", "l", {}, [graph.nodes[0].outputs[0]], graph.outputs))
    proto = gs.export_onnx(graph)
    proto.ir_version = 10
    onnx.save(proto, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=x)
    model = load_model(tmp_path / "m.onnx")
    samples = load_samples(str(tmp_path / "x.npz"), model.inputs)
    rows = Rows(model.path, samples)
    coarse, fine = (Quantization(model.graph, place(model), {"x": np.float32(s)}) for s in (1 / 127, 1e-6))
    assert rows.sqnr_db(coarse, SILENT, "coarse") == -MAX_SQNR_DB
    assert rows.sqnr_db(fine, SILENT, "fine") > 30


def test_a_method_is_chosen_for_scores_that_boxes_drown(tmp_path: Path) -> None:
    """Judged as one array, maxima are as good as anything: they are best for the boxes."""
    rows, bare, statistics = mixed(tmp_path)
    choice = choose_method(rows, bare, statistics, SILENT)
    reference = run(bare.graph, {"x": normal(64, 16)})["y"]
    for name in ("max", "percentile:99.9"):
        scales = scales_from(statistics, parse_method(name))
        found = run(replace(bare, scales=scales).rewritten(), {"x": normal(64, 16)})["y"]
        expected = lowest_decibels(reference, found, [BOXES, SCORES])
        assert choice.sqnr_db[name] == pytest.approx(expected, abs=0.05)
    assert choice.sqnr_db["max"] < 12
    assert choice.sqnr_db[str(choice.method)] > choice.sqnr_db["max"] + 3


def test_rows_of_different_lengths_are_scored_together(tmp_path: Path) -> None:
    weight = normal(4, 8, seed=1)
    graph = gs.Graph(opset=17)
    graph.inputs = [gs.Variable("x", np.float32, ["N", "L", 4])]
    graph.outputs = [gs.Variable("y", np.float32, ["N", "L", 8])]
    graph.nodes = [gs.Node("MatMul", "m", {}, [*graph.inputs, gs.Constant("w", weight)], graph.outputs)]
    proto = gs.export_onnx(graph)
    proto.ir_version = 10
    onnx.save(proto, tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx")
    column = [normal(length, 4, seed=length) for length in (3, 3, 5)]
    samples = Samples("rows", tuple(model.inputs), {"x": column}, {}, "0" * 64)
    quantization = Quantization(model.graph, place(model), {"x": np.float32(0.05)})
    found = Rows(model.path, samples).sqnr_db(quantization, SILENT, "int8")
    assert found == pytest.approx(by_hand(np.concatenate(column), weight, 0.05), abs=0.05)


@pytest.mark.parametrize("kind", [measured, mixed])
def test_outputs_that_are_too_large_to_keep_are_scored_alike(
    kind: Callable[..., tuple[Rows, Quantization, Statistics]],
    arrays: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are in a file, and their energies are sums over batches: the same but for the last bits."""
    arguments = () if kind is mixed else arrays
    rows, quantization, statistics = kind(tmp_path, *arguments)
    expected = choose_method(rows, quantization, statistics, SILENT)
    monkeypatch.setattr("trtq.calibration.search.TOGETHER_BYTES", 1000)
    rows, *_ = kind(tmp_path, *arguments)
    found = choose_method(rows, quantization, statistics, SILENT)
    assert found.method == expected.method
    assert found.sqnr_db == pytest.approx(expected.sqnr_db, rel=1e-9)
