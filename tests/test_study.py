"""The paper's tables for one model: what the rows must show, whatever the model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from jobs import Case, save_case

from trtq import Recipe
from trtq.console import SILENT
from trtq.errors import MissingBackendError
from trtq.study import FRONT, METHODS, Row, Study, plot, study

pytestmark = pytest.mark.slow

METHOD_TABLE, WEIGHT_TABLE, CURVE, LEARNED = range(4)


@pytest.fixture(scope="module")
def normalized(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Conv, BatchNormalization with gains from 0.01 to 100, Relu, pooling and a MatMul."""
    random = np.random.default_rng(0)

    def constant(name: str, values: np.ndarray) -> gs.Constant:
        return gs.Constant(name, values.astype(np.float32))

    x, y = gs.Variable("x", np.float32, ["N", 3, 8, 8]), gs.Variable("y", np.float32, ["N", 4])
    graph = gs.Graph(opset=17, inputs=[x], outputs=[y])
    names = ("conv_out", "norm_out", "relu_out", "pool_out", "flat_out")
    conv, norm, relu, pool, flat = (gs.Variable(name, np.float32) for name in names)
    statistics = [constant("gamma", np.logspace(-2, 2, 8)), constant("beta", np.zeros(8))]
    statistics += [constant("mean", np.zeros(8)), constant("variance", np.ones(8))]
    weight = constant("w", random.normal(size=(8, 3, 3, 3)))
    classes = constant("fc", random.normal(size=(8, 4)) / np.logspace(-2, 2, 8)[:, None])
    graph.nodes = [
        gs.Node("Conv", "conv", {"kernel_shape": [3, 3]}, [x, weight], [conv]),
        gs.Node("BatchNormalization", "norm", {}, [conv, *statistics], [norm]),
        gs.Node("Relu", "relu", {}, [norm], [relu]),
        gs.Node("GlobalAveragePool", "pool", {}, [relu], [pool]),
        gs.Node("Flatten", "flatten", {}, [pool], [flat]),
        gs.Node("MatMul", "classes", {}, [flat, classes], [y]),
    ]
    data = random.normal(size=(48, 3, 8, 8)).astype(np.float32)
    return save_case(graph, tmp_path_factory.mktemp("normalized"), {"x": data})


def studied(case: Case, folder: Path, budget: float | None = None, exclude: tuple[str, ...] = ()) -> Study:
    recipe = Recipe(
        model=str(case.model),
        data=str(case.data),
        eval=str(case.data),
        metric="top1",
        method="mse",
        exclude=exclude,
        cache=str(folder / "cache"),
        budget=budget,
    )
    return study(recipe, SILENT)


@pytest.fixture(scope="module")
def result(normalized: Case, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return studied(normalized, tmp_path_factory.mktemp("study"))


def rows(result: Study, table: int) -> dict[str, Row]:
    return {row.name: row for row in list(result.tables.values())[table]}


def sqnr_db(row: Row) -> float:
    assert row.sqnr_db is not None
    return row.sqnr_db


def test_every_method_has_a_row_with_all_layers_in_int8(result: Study) -> None:
    found = rows(result, METHOD_TABLE)
    assert tuple(found) == METHODS
    assert all((row.floating_point, row.int8_share) == (0, 1.0) for row in found.values())
    assert result.fp32 == 1.0  # the labels are the fp32 model's own decisions
    for row in found.values():
        assert row.metric is not None
        assert row.drop == pytest.approx(1 - row.metric)


def test_weights_per_channel_do_not_care_about_folding_and_per_tensor_do(
    normalized: Case, tmp_path: Path
) -> None:
    result = studied(normalized, tmp_path, budget="0.01s", exclude=("classes",))
    found = {name: sqnr_db(row) for name, row in rows(result, WEIGHT_TABLE).items()}
    folded, not_folded = (found[f"per channel, {form}"] for form in ("folded", "not folded"))
    assert folded == pytest.approx(not_folded, abs=0.5)  # paper 4.1
    assert found["per tensor, folded"] < found["per tensor, not folded"] - 10
    assert found["per tensor, folded"] < folded - 10


def test_the_curve_ends_in_floating_point(result: Study) -> None:
    curve = list(rows(result, CURVE).values())
    assert [row.floating_point for row in curve] == [0, 1, 2]
    assert [row.int8_share for row in curve][::2] == [1.0, 0.0]
    assert sqnr_db(curve[-1]) > 100
    assert sqnr_db(curve[0]) == pytest.approx(sqnr_db(rows(result, METHOD_TABLE)["mse"]), abs=0.01)


def test_learning_does_not_make_it_worse(result: Study) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    if len(result.tables) > LEARNED:
        found = rows(result, LEARNED)
        assert sqnr_db(found["learned"]) > sqnr_db(found["calibrated"]) - 1


def test_text_and_json_say_the_same(result: Study) -> None:
    text = result.text()
    for title, table in json.loads(json.dumps(result.to_json(), allow_nan=False))["tables"].items():
        assert title in text
        for row in table:
            assert f"{row['sqnr_db']:.1f}" in next(
                line for line in text.split(title)[1].splitlines() if line.strip().startswith(row["name"])
            )


def test_a_model_without_normalization_says_so(small: Case, tmp_path: Path) -> None:
    found = studied(small, tmp_path, budget="0.01s")
    assert set(rows(found, WEIGHT_TABLE)) == {"per channel, folded", "per tensor, folded"}
    assert any("no BatchNormalization" in note for note in found.notes)
    assert any("budget" in note for note in found.notes)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_plot_is_a_picture(result: Study, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    plot(result, tmp_path / f"study.{suffix}")
    content = (tmp_path / f"study.{suffix}").read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


def test_without_matplotlib_there_is_a_remedy(
    result: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingBackendError, match="Matplotlib is not installed"):
        plot(result, tmp_path / "study.svg")
    assert not (tmp_path / "study.svg").exists()


def test_a_named_gpu_adds_the_front_of_latency_and_accuracy(normalized: Case, tmp_path: Path) -> None:
    files = {"model": str(normalized.model), "data": str(normalized.data), "eval": str(normalized.data)}
    recipe = Recipe(**files, metric="top1", method="mse", gpu="T4", cache=str(tmp_path / "cache"), batch=64)
    found = study(recipe, SILENT)
    rows = found.tables[FRONT]
    latencies = [row.microseconds for row in rows]
    assert None not in latencies
    assert latencies == sorted(latencies)
    assert rows[-1].int8_share == 0.0
    assert "roofline of NVIDIA T4" in found.text()
    plot(found, tmp_path / "study.svg")
    assert (tmp_path / "study.svg").stat().st_size > 1000
