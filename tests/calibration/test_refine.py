"""The search for each tensor's own range: it finds what helps, and only that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from mixed import mixed_net
from nets import normal

from trtq.calibration.collect import collect
from trtq.calibration.methods import parse_method
from trtq.calibration.refine import NARROWER, Refinement, refine_ranges
from trtq.console import SILENT
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


def refined(folder: Path, *methods: str, workers: int | None = None) -> Refinement:
    model = load_model(folder / "m.onnx")
    fold(model.graph)
    plan = place(model)
    samples = load_samples(str(folder / "x.npz"), model.inputs)
    statistics = collect(model.graph, plan.tensors, samples)
    others = [parse_method(name) for name in methods]
    bare = Quantization(model.graph, plan, {})
    return refine_ranges(bare, statistics, parse_method("max"), others, samples, SILENT, workers=workers)


def test_a_narrower_range_is_found_where_it_is_better(tmp_path: Path) -> None:
    found = refined(two_layers(tmp_path, outlier=10.0))
    assert str(found.exceptions["x"]) == f"max*{min(NARROWER):g}"  # the rest lies within 1


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
    assert found[0].rows == found[1].rows == 200  # all there are


@pytest.mark.parametrize("methods", [("max",), ("max", "percentile:100")])
def test_equal_ranges_are_not_tried(methods: tuple[str, ...], tmp_path: Path) -> None:
    alone = refined(two_layers(tmp_path, outlier=10.0))
    assert refined(tmp_path, *methods).runs == alone.runs == 2 * len(NARROWER)  # two tensors


def test_ranges_are_searched_for_scores_that_boxes_drown(tmp_path: Path) -> None:
    """The outlier in the input of `cls` matters to the scores alone."""
    onnx.save(mixed_net(), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=normal(64, 16))
    found = refined(tmp_path, "percentile:95", "percentile:90")
    assert str(found.exceptions["kg"]).startswith("percentile")
