"""Ranges of their own: for the tensors that make the noise, where they help, within the budget."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from mixed import mixed_net
from nets import normal

from trtq.budget import NO_BUDGET, Budget
from trtq.calibration.collect import collect
from trtq.calibration.methods import parse_method
from trtq.calibration.refine import FACTORS, Alone, Refinement, refine_ranges
from trtq.calibration.search import Rows
from trtq.console import SILENT, Console
from trtq.data.load import load_samples
from trtq.graph.fold import fold
from trtq.graph.model import load_model
from trtq.graph.place import place
from trtq.graph.quantization import Quantization


def two_layers(folder: Path, outlier: float) -> Path:
    """Two matmuls with a ReLU between; the first channel has an outlier and no influence."""
    random = np.random.default_rng(0)
    first, second = (random.normal(size=(16, 16)).astype(np.float32) for _ in range(2))
    first[0] = 0
    graph = gs.Graph(opset=17)
    graph.inputs = [gs.Variable("x", np.float32, ["N", 16])]
    graph.outputs = [gs.Variable("y", np.float32, ["N", 16])]
    h, r = gs.Variable("h", np.float32, ["N", 16]), gs.Variable("r", np.float32, ["N", 16])
    graph.nodes = [
        gs.Node("MatMul", "first", {}, [*graph.inputs, gs.Constant("w1", first)], [h]),
        gs.Node("Relu", "relu", {}, [h], [r]),
        gs.Node("MatMul", "second", {}, [r, gs.Constant("w2", second)], graph.outputs),
    ]
    proto = gs.export_onnx(graph)
    proto.ir_version = 10
    onnx.save(proto, folder / "m.onnx")
    x = random.uniform(-1, 1, size=(200, 16)).astype(np.float32)
    x[:, 0] = outlier
    np.savez(folder / "x.npz", x=x)
    return folder


def refined(
    folder: Path,
    *methods: str,
    workers: int | None = None,
    console: Console = SILENT,
    budget: Budget = NO_BUDGET,
) -> Refinement:
    model = load_model(folder / "m.onnx")
    fold(model.graph)
    plan = place(model)
    samples = load_samples(str(folder / "x.npz"), model.inputs)
    statistics = collect(model.graph, plan.tensors, samples)
    others = [parse_method(name) for name in methods]
    bare = Quantization(model.graph, plan, {})
    start = parse_method("max")
    return refine_ranges(bare, statistics, start, others, samples, console, workers=workers, budget=budget)


def test_a_narrower_range_is_found_where_it_is_better(tmp_path: Path) -> None:
    found = refined(two_layers(tmp_path, outlier=10.0))
    assert str(found.exceptions["x"]) == f"max*{min(FACTORS):g}"  # the rest lies within 1


def test_another_method_is_found_where_it_is_better(tmp_path: Path) -> None:
    found = refined(two_layers(tmp_path, outlier=10.0), "percentile:90")
    assert str(found.exceptions["x"]) == "percentile:90"


def test_what_does_not_help_is_left_alone(tmp_path: Path) -> None:
    found = refined(two_layers(tmp_path, outlier=1.0))
    assert "x" not in found.exceptions  # uniform within the range: every narrower one clips


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    folder = two_layers(tmp_path, outlier=5.0)
    found = [refined(folder, "entropy", "mse", "percentile:99", workers=n) for n in (1, 3)]
    chosen = [{tensor: str(method) for tensor, method in f.exceptions.items()} for f in found]
    assert chosen[0] == chosen[1]
    assert found[0].runs == found[1].runs
    assert found[0].rows == found[1].rows


@pytest.mark.parametrize("methods", [("max",), ("max", "percentile:100")])
def test_equal_ranges_are_not_tried(methods: tuple[str, ...], tmp_path: Path) -> None:
    alone = refined(two_layers(tmp_path, outlier=10.0))
    assert refined(tmp_path, *methods).runs == alone.runs


def test_ranges_are_searched_for_scores_that_boxes_drown(tmp_path: Path) -> None:
    """The outlier in the input of `cls` matters to the scores alone."""
    onnx.save(mixed_net(), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=normal(64, 16))
    found = refined(tmp_path, "percentile:95", "percentile:90")
    assert str(found.exceptions["kg"]).startswith("percentile")


@pytest.mark.parametrize("tensor", ["x", "r"])
def test_the_noise_of_one_tensor_alone_is_that_of_the_arithmetic(tensor: str, tmp_path: Path) -> None:
    folder, scale = two_layers(tmp_path, outlier=2.0), np.float32(0.03)
    model = load_model(folder / "m.onnx")
    fold(model.graph)
    samples = load_samples(str(folder / "x.npz"), model.inputs)
    tensors = model.graph.tensors()
    w1, w2 = (tensors[name].values.astype(np.float64) for name in ("w1", "w2"))
    x = np.load(folder / "x.npz")["x"].astype(np.float64)

    def rounded(name: str, values: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(values / scale), -128, 127) * scale if name == tensor else values

    exact = np.maximum(x @ w1, 0) @ w2
    hidden = np.maximum(rounded("x", x) @ w1, 0)
    expected = ((rounded("r", hidden) @ w2 - exact) ** 2).sum() / (exact**2).sum()
    rows = Rows(model.graph, samples, kept=True)
    alone = Alone(rows, Quantization(model.graph, place(model), {}))
    assert alone.noise(tensor, scale) == pytest.approx(expected, rel=1e-3)


def test_a_tensor_that_makes_next_to_no_noise_is_not_tried(tmp_path: Path) -> None:
    """A second input adds a ten-thousandth to the output; its outlier would be worth a narrower range."""
    model = onnx.load(two_layers(tmp_path, outlier=10.0) / "m.onnx")
    graph = gs.import_onnx(model)
    z = gs.Variable("z", np.float32, ["N", 16])
    small = gs.Constant("w3", np.concatenate([np.zeros((1, 16)), np.full((15, 16), 1e-4)]).astype(np.float32))
    added, total = gs.Variable("added", np.float32), gs.Variable("total", np.float32, ["N", 16])
    graph.inputs.append(z)
    graph.nodes.append(gs.Node("MatMul", "third", {}, [z, small], [added]))
    graph.nodes.append(gs.Node("Add", "sum", {}, [graph.outputs[0], added], [total]))
    graph.outputs = [total]
    onnx.save(gs.export_onnx(graph), tmp_path / "m.onnx")
    x = np.load(tmp_path / "x.npz")["x"]
    np.savez(tmp_path / "x.npz", x=x, z=x)
    found = refined(tmp_path)
    assert found.shares["z"] < 1e-4
    assert "x" in found.exceptions
    assert "z" not in found.exceptions
    ladders = 2 * (1 + len(FACTORS))  # of x and of r, at most
    assert found.runs <= len(found.shares) + 1 + ladders


def test_a_spent_budget_ends_the_search_with_what_was_found(tmp_path: Path) -> None:
    found = refined(two_layers(tmp_path, outlier=10.0), budget=Budget(time.perf_counter()))
    assert not found.whole
    assert found.runs == 1
    assert not found.exceptions


def test_the_search_says_what_is_coming(tmp_path: Path) -> None:
    lines = []

    class Log(Console):
        def say(self, label: str, text: str) -> None:
            lines.append(text)

    found = refined(two_layers(tmp_path, outlier=10.0), console=Log())
    assert len(lines) == 2
    assert all("runs of" in line and "about" in line for line in lines)
    assert f"of {found.rows} rows" in lines[1]
    assert found.passes == pytest.approx(sum(found_rows(found)) / 200)


def found_rows(found: Refinement) -> list[int]:
    """Rows of every run: a quarter of the batches for each tensor alone, all for the others."""
    quarter = len(range(0, found.rows, 4)) // 4 * 4
    return [quarter] * len(found.shares) + [found.rows] * (found.runs - len(found.shares))
