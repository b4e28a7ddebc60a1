"""The bundled demo model and data are what tools/make_demo.py says they are."""

from __future__ import annotations

from collections import Counter
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

DEMO = Path(str(resources.files("trtq.demo")))


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return onnx.load(DEMO / "digits.onnx")


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(DEMO / name) as archive:
        return dict(archive)


@pytest.mark.parametrize(("name", "rows"), [("calib.npz", 256), ("eval.npz", 500)])
def test_data_fit_the_model(name: str, rows: int) -> None:
    data = load(name)
    assert set(data) == {"image", "label"}
    assert data["image"].shape == (rows, 1, 8, 8)
    assert data["image"].dtype == np.float32
    assert data["image"].min() == 0
    assert data["image"].max() == 1
    assert data["label"].shape == (rows,)
    assert data["label"].dtype == np.int64
    assert set(data["label"]) == set(range(10))


def test_calibration_and_evaluation_images_are_disjoint() -> None:
    seen = {image.tobytes() for image in load("calib.npz")["image"]}
    assert not seen & {image.tobytes() for image in load("eval.npz")["image"]}


def test_images_come_from_the_data_set() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    label_of = {
        np.float32(image / 16).tobytes(): label
        for image, label in zip(digits.images, digits.target, strict=True)
    }
    for data in (load("calib.npz"), load("eval.npz")):
        assert [label_of[image.tobytes()] for image in data["image"]] == data["label"].tolist()


def test_accuracy_is_what_the_metadata_claims(model: onnx.ModelProto) -> None:
    claimed = {entry.key: entry.value for entry in model.metadata_props}["eval_top1"]
    data = load("eval.npz")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": data["image"]})
    accuracy = float((logits.argmax(axis=1) == data["label"]).mean())
    assert accuracy == pytest.approx(float(claimed), abs=1e-3)  # one image, for another CPU's rounding
    assert accuracy > 0.97


def test_the_graph_is_the_hard_case_it_should_be(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["BatchNormalization"] == operators["Conv"] == 16
    assert operators["Add"] == 3
    depthwise = [
        node.name
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "group" and attribute.i > 1
    ]
    assert depthwise == [f"blocks.{i}.depthwise" for i in range(5)]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_old_runtimes_can_read_it(model: onnx.ModelProto) -> None:
    assert model.ir_version <= 10
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]


def test_assets_are_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file()) < 1_000_000
