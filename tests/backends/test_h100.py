"""What engines of the demo ran on a real GPU, and the table that NVIDIA's own calibrator left there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtq.demo
from trtq.backends.compiled import Compiled, int8_nodes
from trtq.calibration.collect import collect
from trtq.calibration.foreign import read_table
from trtq.calibration.methods import parse_method, scales_from
from trtq.calibration.table import Table
from trtq.data.load import load_samples
from trtq.graph.fold import fold
from trtq.graph.model import Model, load_model
from trtq.graph.place import place

HERE = Path(__file__).parent / "data" / "h100"
DEMO = Path(trtq.demo.__file__).parent


@pytest.fixture(scope="module")
def model() -> Model:
    found = load_model(DEMO / "digits.onnx")
    fold(found.graph)
    return found


@pytest.fixture(scope="module")
def table() -> Table:
    return read_table(HERE / "digits.EntropyCalibration2.cache")


def engine(name: str) -> Compiled:
    record: dict[str, Any] = json.loads((HERE / f"digits.{name}.json").read_text())
    return Compiled.from_json(record["compiled"])


def test_every_weighted_node_of_the_qdq_model_ran_in_int8(model: Model) -> None:
    compiled, nodes = engine("qdq"), place(model).int8_nodes
    assert len(nodes) == 17
    assert int8_nodes(compiled.layers, nodes) == set(nodes)
    assert (compiled.kernels, compiled.unread) == (19, ())  # a conversion of the input and one of the output


@pytest.mark.parametrize(
    ("name", "floating"),
    [
        ("calibrator", {"stem"}),
        ("table", {"stem", "blocks.4.expand", "blocks.4.depthwise", "blocks.4.project", "classifier"}),
    ],
)
def test_implicit_quantization_chooses_by_time(model: Model, name: str, floating: set[str]) -> None:
    """The classifier's inner tensors have no names in ONNX, so a table of ONNX's names lacks their scales."""
    nodes = set(place(model).int8_nodes)
    assert nodes - int8_nodes(engine(name).layers, nodes) == floating


def test_nvidias_table_is_read_to_the_bit(table: Table) -> None:
    assert len(table.scales) == 38
    assert table.scales["image"] == np.frombuffer(bytes.fromhex("3c010a14"), ">f4")[0]
    assert "(Unnamed Layer* 38) [Matrix Multiply]_output" in table.scales


def test_entropy_is_near_nvidias_calibrator(model: Model, table: Table) -> None:
    """Its histograms have other bins, so the scales differ a little."""
    plan = place(model)
    samples = load_samples(str(DEMO / "calib.npz"), model.inputs, {})
    ours = scales_from(collect(model.graph, plan.tensors, samples), parse_method("entropy"))
    ratios = np.array([float(ours[tensor] / table.scales[tensor]) for tensor in plan.tensors])
    assert np.all((ratios > 0.75) & (ratios < 1.3)), ratios
    assert abs(np.median(ratios) - 1) < 0.1
