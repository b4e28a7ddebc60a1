"""`trtq migrate`: what a table implies, checked with NumPy, and the demo model from table to engine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from numpy.typing import ArrayLike, NDArray

import trtq.demo
from trtq.build import table_notes
from trtq.calibration.collect import collect
from trtq.calibration.table import Table
from trtq.cli.migrate import MIGRATE
from trtq.data.load import load_samples
from trtq.errors import ExitCode, InputError
from trtq.graph.model import export
from trtq.migration.implied import implied, implied_model
from trtq.migration.migrate import Migration, migrate
from trtq.migration.source import Source, load_source
from trtq.numerics import scale_from_amax
from trtq.recipe import Recipe

DEMO = Path(trtq.demo.__file__).parent
RANDOM = np.random.default_rng(0)


def net(folder: Path, text: str, **constants: ArrayLike) -> Source:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    for name, values in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    for node in model.graph.node:
        node.name = node.output[0]
    onnx.save(model, folder / "model.onnx")
    return load_source(folder / "model.onnx")


def weight(*shape: int) -> NDArray[np.float32]:
    return RANDOM.normal(size=shape).astype(np.float32)


def table(**scales: float) -> Table:
    return Table({name: np.float32(scale) for name, scale in scales.items()})


def run_implied(source: Source, given: Table, feed: dict[str, NDArray]) -> NDArray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = export(implied_model(source, given)).SerializeToString()
    return onnxruntime.InferenceSession(model, options).run(None, feed)[0]


def quantized_tensors(source: Source, given: Table) -> set[str]:
    return {n.inputs[0].name for n in implied_model(source, given).nodes if n.op == "QuantizeLinear"}


def fake(x: NDArray, scale: ArrayLike) -> NDArray:
    return np.clip(np.rint(x / np.float32(scale)), -128, 127) * np.float32(scale)


def fake_weight(w: NDArray) -> NDArray:
    return fake(w, np.abs(w).max(axis=0) / np.float32(127))


# --- what a table implies --------------------------------------------------------------------------------

CHAIN = """g (float[7,6] x) => (float[7,4] y) {
    a = MatMul(x, w)
    relu = Relu(a)
    y = MatMul(relu, v)
}"""


def test_layers_with_scales_on_inputs_and_outputs_are_quantized(tmp_path: Path) -> None:
    w, v, x = weight(6, 5), weight(5, 4), weight(7, 6)
    source = net(tmp_path, CHAIN, w=w, v=v)
    relu = np.maximum(fake(x, 0.02) @ fake_weight(w), 0)  # a is inside a layer: its row is not used
    expected = fake(relu, 0.05) @ fake_weight(v)
    given = table(x=0.02, a=0.5, relu=0.05, y=0.1)
    np.testing.assert_allclose(run_implied(source, given, {"x": x}), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_without_a_scale_on_its_output_stays_in_floating_point(tmp_path: Path) -> None:
    w, v, x = weight(6, 5), weight(5, 4), weight(7, 6)
    source = net(tmp_path, CHAIN, w=w, v=v)
    expected = np.maximum(fake(x, 0.02) @ fake_weight(w), 0) @ v
    given = table(x=0.02, relu=0.05)
    np.testing.assert_allclose(run_implied(source, given, {"x": x}), expected, rtol=1e-4, atol=1e-4)


def test_an_addition_fuses_with_the_convolution_computed_last(tmp_path: Path) -> None:
    source = net(
        tmp_path,
        """g (float[1,4,8,8] x) => (float[1,4,8,8] y) {
            first = Conv(x, w)
            second = Conv(x, v)
            sum = Add(first, second)
            relu = Relu(sum)
            y = Conv(relu, w)
        }""",
        w=weight(4, 4, 1, 1),
        v=weight(4, 4, 1, 1),
    )
    every = table(x=0.1, first=0.1, second=0.1, sum=0.1, relu=0.1, y=0.1)
    assert quantized_tensors(source, every) == {"x", "first", "relu"}
    without = Table({name: scale for name, scale in every.scales.items() if name != "first"})
    assert quantized_tensors(source, without) == {"relu"}  # both convolutions lack a scale


def test_operators_that_implicit_quantization_has_no_int8_for(tmp_path: Path) -> None:
    source = net(
        tmp_path,
        """g (float[2,4] x) => (float[2,4] y) {
            a = MatMul(x, w)
            soft = Softmax(a)
            y = MatMul(soft, w)
        }""",
        w=weight(4, 4),
    )
    assert quantized_tensors(source, table(x=0.1, a=0.1, soft=0.01, y=0.1)) == {"x", "soft"}


def test_a_table_that_implies_nothing(tmp_path: Path) -> None:
    source = net(tmp_path, CHAIN, w=weight(6, 5), v=weight(5, 4))
    assert quantized_tensors(source, table(x=0.02)) == set()


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old_table() -> Table:
    """A table as TensorRT 8.6 writes it: a row for every activation of the model before any fusion."""
    source = load_source(DEMO / "digits.onnx")
    samples = load_samples(str(DEMO / "calib.npz"), source.model.inputs, {}).subset(range(64))
    names = [
        tensor.name for node in source.original.nodes for tensor in node.outputs if node.op != "Constant"
    ]
    statistics = collect(source.original, ["image", *names], samples)
    scales = {n: np.float32(scale_from_amax(h.amax)) for n, h in statistics.histograms.items()}
    return Table({**scales, "(Unnamed Layer* 9) [Constant]_output": np.float32(0.1)}, 8601)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    options = {"model": str(DEMO / "digits.onnx"), "output": str(tmp_path / "out"), "target": ["8.6"]}
    return Recipe().merged(options | {"cache": str(tmp_path / "cache")})


def with_eval(recipe: Recipe) -> Recipe:
    return recipe.merged({"eval": str(DEMO / "eval.npz"), "metric": "top1"})


def migrated(recipe: Recipe, given: Table, folder: Path, **options: bool) -> Migration:
    given.save(folder / "old.cache")
    return migrate(recipe, folder / "old.cache", command="trtq migrate", **options)


def test_demo_from_table_to_gated_engine(recipe: Recipe, old_table: Table, tmp_path: Path) -> None:
    result = migrated(with_eval(recipe), old_table, tmp_path, strict=True)
    assert result.exit_code is ExitCode.PASS
    assert result.coverage.share == 1.0
    assert not result.coverage.missed
    assert result.build.engine == tmp_path / "out" / "model.plan"
    assert {path.name for path in result.folder.iterdir()} == {
        "calibration.cache",
        "calibration.cache.json",
        "junit.xml",
        "migration.json",
        "model.int8.onnx",
        "model.plan",
        "model.plan.json",
        "plan.json",
        "report.html",
        "verdict.json",
    }
    kept = Table.load(result.folder / "calibration.cache")
    assert kept.version == 8601
    assert all(kept.scales[name] == old_table.scales[name] for name in kept.scales)
    agreement = result.agreement
    closest = agreement["migrated to table"]["logits"].sqnr_db
    assert closest > agreement["migrated to fp32"]["logits"].sqnr_db > 20
    record = json.loads((result.folder / "migration.json").read_text())
    assert record["fit"]["positional"] == ["(Unnamed Layer* 9) [Constant]_output"]
    assert record["int8_share"] == 1.0
    assert record["against_table"]["outcome"] == "pass"
    assert record["inputs"]["table"]["header"] == "TRT-8601-EntropyCalibration2"
    assert set(record["outputs"]) == {p.name for p in result.folder.iterdir()} - {"migration.json"}
    cases = {case.get("name") for case in ElementTree.parse(result.folder / "junit.xml").iter("testcase")}
    assert cases == {"accuracy gate top1", "against the table"}


@pytest.mark.slow
def test_a_bad_table_fails_the_gate(recipe: Recipe, old_table: Table, tmp_path: Path) -> None:
    scales = {name: np.float32(scale * 60) for name, scale in old_table.scales.items()}
    result = migrated(with_eval(recipe), Table(scales), tmp_path)
    assert result.exit_code is ExitCode.FAIL
    assert result.fit.doubts
    assert (result.folder / "verdict.json").is_file()


@pytest.mark.slow
def test_what_keeps_layers_from_int8(tmp_path: Path) -> None:
    source = net(
        tmp_path,
        """net (float[1,8] x) => (float[1,8] y) {
            a = MatMul(x, w)
            r = Relu(a)
            b = MatMul(r, w)
            y = Softmax(b)
        }""",
        w=weight(8, 8),
    )
    every = implied(source, table(x=1, r=1, b=1))
    assert (every.int8, every.layers, every.missing) == (2, ["a", "b"], {})
    assert every.text() == "the table implies 2 of 2 layers in INT8"
    inputs_alone = implied(source, table(x=1, r=1))  # what Q/DQ need
    assert (inputs_alone.int8, inputs_alone.missing) == (1, {"b": ["b"]})
    assert inputs_alone.text().endswith("1 of 2 layers in INT8: it has no scale for b")
    nothing = implied(source, table(a=1))
    assert nothing.text().endswith("0 of 2 layers in INT8: it has no scale for x, r, b")
    assert table_notes(every) == ()
    assert "trtq calibrate writes a scale for every tensor" in table_notes(nothing)[0]


def test_an_implied_model_that_scores_nothing_is_no_reference(
    recipe: Recipe, old_table: Table, tmp_path: Path
) -> None:
    (pool,) = (n for n in load_source(DEMO / "digits.onnx").model.graph.nodes if n.op == "GlobalAveragePool")
    unused = pool.inputs[0].name  # implicit quantization quantizes it, Q/DQ placement does not
    vast = Table({**old_table.scales, unused: np.float32(1e9)}, 8601)  # all of it becomes zero
    metric = tmp_path / "spread.py"
    metric.write_text(
        "def spread(outputs, targets):\n"
        "    logits = outputs['logits']\n"
        "    return float((logits.max(axis=0) - logits.min(axis=0)).max())\n"
    )
    options = {"eval": str(DEMO / "eval.npz"), "metric": f"{metric}:spread", "max_drop": "20%"}
    options["exclude"] = ["classifier"]  # or the pooling in front of it would be INT8
    result = migrated(recipe.merged(options), vast, tmp_path)
    assert result.against_table is None
    assert result.exit_code is ExitCode.PASS
    assert json.loads((result.folder / "migration.json").read_text())["against_table"] is None


def test_without_data_there_is_an_engine_and_no_verdict(
    recipe: Recipe, old_table: Table, tmp_path: Path
) -> None:
    result = migrated(recipe, old_table, tmp_path)
    assert (result.verdict, result.against_table, result.agreement) == (None, None, {})
    assert result.exit_code is ExitCode.PASS
    assert "not gated" in result.text()
    assert result.headline() == "NOT GATED  give --eval and --metric for a verdict"
    assert not (result.folder / "verdict.json").exists()


@pytest.mark.slow
def test_calibration_data_alone_show_the_agreement(recipe: Recipe, old_table: Table, tmp_path: Path) -> None:
    result = migrated(recipe.merged({"data": str(DEMO / "calib.npz")}), old_table, tmp_path)
    assert set(result.agreement) == {"migrated to fp32", "migrated to table", "table to fp32"}
    assert result.verdict is None


def test_missing_rows_are_reported_and_checked(recipe: Recipe, old_table: Table, tmp_path: Path) -> None:
    scales = {name: scale for name, scale in old_table.scales.items() if name != "image"}
    result = migrated(recipe.merged({"min_int8": "100%"}), Table(scales), tmp_path)
    (left,) = (node for node in result.quantization.plan.nodes if not node.int8)
    assert left.reason == "the table has no row for 'image'"
    assert result.coverage.share < 1
    assert result.exit_code is ExitCode.FAIL
    assert "without a scale" in result.fit.text()


def test_a_refused_table_leaves_nothing(recipe: Recipe, old_table: Table, tmp_path: Path) -> None:
    scales = {name: scale for name, scale in old_table.scales.items() if name != "image"}
    with pytest.raises(InputError, match="incomplete"):
        migrated(recipe, Table(scales), tmp_path, strict=True)
    with pytest.raises(InputError, match="both --eval and --metric"):
        migrated(recipe.merged({"metric": "top1"}), old_table, tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_command(
    recipe: Recipe, old_table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old_table.save(tmp_path / "old.cache")
    given = argparse.Namespace(
        recipe=None,
        quiet=True,
        command=MIGRATE,
        command_line="trtq migrate digits.onnx",
        table=str(tmp_path / "old.cache"),
        encoding="scale",
        strict=False,
        **{name: getattr(recipe, name) for name in ("model", "output", "target", "cache")},
    )
    assert MIGRATE.run(given) == ExitCode.PASS
    assert "17 of 17 weighted nodes in INT8" in capsys.readouterr().out
