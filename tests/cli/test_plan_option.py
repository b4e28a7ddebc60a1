"""`--plan`: a plan that was written is carried out, also after a person edited it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from jobs import Case, Run, deploy_arguments, trtq_command

from trtq.errors import InputError
from trtq.graph.model import model_sha256
from trtq.graph.plan import Plan

_Trtq = Callable[..., Run]


@pytest.fixture(scope="module")
def written(small: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `deploy` writes of the small model, calibrated only."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    folder = tmp_path_factory.mktemp("plan")
    run = trtq_command(
        *deploy_arguments(small, folder / "out", "--method", "max", "--recover", "none"),
        *("--cache", folder / "cache"),
    )
    assert run.code == 0, run.err
    return folder / "out"


def _edited(written: Path, edit: Callable[[Any], Any], path: Path) -> Path:
    plan = json.loads((written / "plan.json").read_text())
    edit(plan)
    path.write_text(json.dumps(plan))
    return path


def test_plan_and_table_give_the_model_that_was_deployed(
    small: Case, written: Path, tmp_path: Path, trtq_run: _Trtq
) -> None:
    plan = ("--plan", written / "plan.json")
    table, data = tmp_path / "table.onnx", tmp_path / "data.onnx"
    run = trtq_run(
        *("quantize", small.model, *plan, "--table", written / "calibration.cache"),
        *("--rest", "fp16", "-o", table),
    )
    assert run.code == 0, run.err
    assert "warning" not in run.err
    run = trtq_run(
        *("quantize", small.model, *plan, "--data", small.data, "--method", "max"),
        *("--recover", "none", "-o", data),
    )
    assert run.code == 0, run.err
    assert table.read_bytes() == data.read_bytes() == (written / "model.int8.onnx").read_bytes()


def test_a_node_set_to_floating_point_by_hand_loses_its_quantizers(
    small: Case, written: Path, tmp_path: Path, trtq_run: _Trtq
) -> None:
    plan = _edited(written, lambda p: p["nodes"][1].update(int8=False), tmp_path / "plan.json")
    run = trtq_run(
        *("quantize", small.model, "--plan", plan, "--table", written / "calibration.cache"),
        *("-o", tmp_path / "model.onnx"),
    )
    assert run.code == 0, run.err
    assert "in floating point: classes (MatMul): the given plan has it in floating point" in run.out
    nodes = {node.name: node for node in onnx.load(tmp_path / "model.onnx").graph.node}
    quantized = [node.output[0] for node in nodes.values() if node.op_type == "DequantizeLinear"]
    assert set(nodes["conv"].input[:2]) <= set(quantized)
    assert not set(nodes["classes"].input) & set(quantized)


def test_a_node_that_the_plan_does_not_name_counts_as_floating_point(
    small: Case, written: Path, tmp_path: Path, trtq_run: _Trtq
) -> None:
    def forget(plan: dict[str, Any]) -> None:
        name = plan["nodes"].pop(1)["name"]
        for items in ("edges", "weights"):
            plan[items] = [item for item in plan[items] if item["node"] != name]

    plan = _edited(written, forget, tmp_path / "plan.json")
    run = trtq_run(
        *("quantize", small.model, "--plan", plan, "--table", written / "calibration.cache"),
        *("-o", tmp_path / "model.onnx"),
    )
    assert run.code == 0, run.err
    assert "1 of 2 weighted nodes to INT8" in run.out
    assert "in floating point: classes (MatMul): the given plan does not list it" in run.out
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    quantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    (classes,) = (node for node in nodes if node.name == "classes")
    assert quantized
    assert not set(classes.input) & quantized


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (lambda p: p["nodes"][0].update(name="nowhere"), "no node 'nowhere'"),
        (lambda p: p["edges"][0].update(node="nowhere"), "no node 'nowhere'"),
        (lambda p: p["edges"][0].update(tensor="nowhere"), "input 0 of 'conv' is not 'nowhere'"),
        (lambda p: p["edges"][0].update(range="nowhere"), "no tensor 'nowhere'"),
        (lambda p: p["edges"][0].update(index=9), "input 9 of 'conv' is not 'x'"),
        (lambda p: p["edges"][0].update(index=1, tensor="w"), "input 1 of 'conv' is a constant"),
        (lambda p: p["weights"][0].update(index=0, tensor="x"), "input 0 of 'conv' is no constant"),
        (lambda p: p["weights"][0].update(axis=9), "'w' has no axis 9"),
        (lambda p: p["weights"].pop(0), "'conv' is to be INT8, but its input 1 has no quantizer"),
        (lambda p: p["weights"][0].update(axis=1), "axis 1 of 'w' is not the output channels of 'conv'"),
        (lambda p: p["weights"][1].update(axis=0), "axis 0 of 'fc' is not the output channels of 'classes'"),
        (lambda p: p["nodes"].append(p["nodes"][0]), "'conv' is listed twice among its nodes"),
        (
            lambda p: p["edges"].append({**p["edges"][0], "rule": "mine"}),
            "input 0 of 'conv' has two quantizers",
        ),
        (lambda p: p["weights"].append(p["weights"][0]), "input 1 of 'conv' has two quantizers"),
        (lambda p: p["nodes"][0].update(op="Gemm"), "'conv' is a Gemm in the plan and a Conv in the model"),
        (lambda p: p["nodes"].pop(1), "'classes' has both quantizers, so it would run in INT8"),
        (lambda p: p["nodes"][1].update(int8=False, rule="mine"), "'classes' has both quantizers"),
        (
            lambda p: p["nodes"].append({**p["nodes"][0], "name": "relu", "op": "Relu"}),
            "'relu' (Relu) is not a weighted node",
        ),
        (lambda p: p["nodes"].append({**p["nodes"][0], "name": "no", "int8": False}), "no node 'no'"),
        (lambda p: p["edges"][0].update(range="w"), "'w', whose range 'x' is to take, is a constant"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(
    edit: Callable[[Any], Any],
    cause: str,
    small: Case,
    written: Path,
    tmp_path: Path,
    trtq_run: _Trtq,
) -> None:
    plan = _edited(written, edit, tmp_path / "plan.json")
    run = trtq_run(
        *("quantize", small.model, "--plan", plan, "--table", written / "calibration.cache"),
        *("-o", tmp_path / "model.onnx"),
    )
    assert run.code == 2
    assert run.err.startswith("trtq: the plan does not fit the model")
    assert str(plan) in run.err
    assert cause in run.err
    assert "remedy:" in run.err
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (lambda p: p["nodes"][0].update(int8="false"), "`nodes[0].int8`: expected bool, got str"),
        (lambda p: p["nodes"][0].update(macs="many"), "`nodes[0].macs`: expected int | null, got str"),
        (lambda p: p["nodes"].append(1), "`nodes[2]`: expected object, got int"),
        (lambda p: p["nodes"][1].update(int8=1), "`nodes[1].int8`: expected bool, got int"),
        (lambda p: p["edges"][0].update(index=True), "`edges[0].index`: expected int, got bool"),
        (lambda p: p["edges"][0].update(rnage="x"), "`edges[0]`: unknown key 'rnage'; it may have tensor"),
        (lambda p: p["nodes"][0].update(int4=True), "`nodes[0]`: unknown key 'int4'"),
        (lambda p: p["weights"][1].update(scale=1.0), "`weights[1]`: unknown key 'scale'"),
        (lambda p: p.update(edge=[]), "unknown key 'edge'"),
        (lambda p: p["edges"][0].pop("range"), "`edges[0]`: the key 'range' is missing"),
        (lambda p: p.pop("weights"), "the key 'weights' is missing"),
        (lambda p: p.update(batch=0), "`batch`: expected a number from 1, got 0"),
        (lambda p: p.update(format="trtq-plan-0"), "trtq-plan-0"),
    ],
)
def test_what_is_no_plan_is_refused(
    edit: Callable[[Any], Any], cause: str, written: Path, tmp_path: Path
) -> None:
    plan = _edited(written, edit, tmp_path / "plan.json")
    with pytest.raises(InputError, match="not a plan") as raised:
        Plan.load(plan)
    assert raised.value.file == str(plan)
    assert cause in str(raised.value.cause)
    assert raised.value.remedy


def test_what_has_a_default_may_be_missing(written: Path, tmp_path: Path) -> None:
    """As in the plans of versions that did not have it yet."""

    def older(plan: Any) -> None:
        plan.pop("batch")
        for node in plan["nodes"]:
            node.pop("macs")

    plan = Plan.load(_edited(written, older, tmp_path / "plan.json"))
    assert plan.batch == 1
    assert [node.macs for node in plan.nodes] == [None, None]


def test_a_second_range_for_one_tensor_is_refused(
    small: Case, written: Path, tmp_path: Path, trtq_run: _Trtq
) -> None:
    first = json.loads((written / "plan.json").read_text())["edges"][0]
    reader = next(n for n in onnx.load(small.model).graph.node if n.op_type == "Relu")
    tensor = reader.input[0]
    edge = {"tensor": tensor, "node": reader.name, "index": 0, "rule": "mine", "range": tensor}
    for others in (("x",), (tensor,)):
        edges = [{**edge, "range": other} for other in others]
        plan = _edited(written, lambda p, edges=edges: p["edges"].extend(edges), tmp_path / "plan.json")
        run = trtq_run(
            *("quantize", small.model, "--plan", plan, "--data", small.data, "--method", "max"),
            *("-o", tmp_path / "model.onnx"),
        )
        assert run.code == 0, run.err  # one range each
    double = tmp_path / "double.onnx"
    proto = onnx.load(small.model)
    proto.graph.node.append(onnx.helper.make_node("Neg", ["x"], ["negative"], name="neg"))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("negative", 1, ["N", 3, 8, 8]))
    onnx.save(proto, double)
    second = {**edge, "tensor": "x", "node": "neg", "range": tensor}

    def edit(plan: Any) -> None:
        plan["model"] = model_sha256(double)
        plan["edges"].append(second)

    plan = _edited(written, edit, tmp_path / "plan.json")
    run = trtq_run(
        *("quantize", double, "--plan", plan, "--data", small.data, "--method", "max"),
        *("-o", tmp_path / "double.int8.onnx"),
    )
    assert run.code == 2
    assert f"a second range for 'x': that of '{tensor}', after that of '{first['range']}'" in run.err


def test_a_node_that_the_plan_does_not_list_counts_as_floating_point(
    small: Case, written: Path, tmp_path: Path, trtq_run: _Trtq
) -> None:
    def edit(plan: Any) -> None:
        for kind, name in (("nodes", "name"), ("edges", "node"), ("weights", "node")):
            plan[kind] = [item for item in plan[kind] if item[name] != "classes"]

    plan = _edited(written, edit, tmp_path / "plan.json")
    run = trtq_run(*deploy_arguments(small, tmp_path / "out", "--plan", plan, "--method", "max"))
    assert run.code == 0, run.err
    assert "in floating point: classes (MatMul): the given plan does not list it" in run.err
    assert "1 of 2 weighted nodes in INT8" in run.err


def test_a_table_of_another_model_is_refused_with_a_plan_and_without(
    small: Case, written: Path, tmp_path: Path, trtq_run: _Trtq
) -> None:
    for name in ("calibration.cache", "calibration.cache.json"):
        (tmp_path / name).write_bytes((written / name).read_bytes())
    metadata = json.loads((tmp_path / "calibration.cache.json").read_text())
    (tmp_path / "calibration.cache.json").write_text(json.dumps({**metadata, "model": "0" * 64}))
    for plan in ((), ("--plan", written / "plan.json")):
        run = trtq_run(
            *("quantize", small.model, *plan, "--table", tmp_path / "calibration.cache"),
            *("-o", tmp_path / "model.onnx"),
        )
        assert run.code == 2
        assert "the table was made for another model" in run.err
        assert not (tmp_path / "model.onnx").exists()


def test_a_table_of_changed_weights_says_that_it_is_not_the_whole_story(
    small: Case, written: Path, tmp_path: Path, trtq_run: _Trtq
) -> None:
    for name in ("calibration.cache", "calibration.cache.json"):
        (tmp_path / name).write_bytes((written / name).read_bytes())
    metadata = json.loads((tmp_path / "calibration.cache.json").read_text())
    (tmp_path / "calibration.cache.json").write_text(json.dumps({**metadata, "fixes": "smooth"}))
    run = trtq_run(
        *("quantize", small.model, "--plan", written / "plan.json"),
        *("--table", tmp_path / "calibration.cache", "-o", tmp_path / "model.onnx"),
    )
    assert run.code == 0, run.err
    assert "weights that recovery changed (smooth)" in run.err


@pytest.mark.parametrize(
    ("fixes", "held"),
    [("rounding + bias", "rounded weights and corrected biases"), ("bias", "corrected biases"), (None, None)],
)
def test_a_table_says_what_it_cannot_hold(
    fixes: str | None, held: str | None, small: Case, written: Path, tmp_path: Path, trtq_run: _Trtq
) -> None:
    (tmp_path / "calibration.cache").write_bytes((written / "calibration.cache").read_bytes())
    metadata = json.loads((written / "calibration.cache.json").read_text())
    metadata = {key: value for key, value in metadata.items() if key != "fixes"}
    metadata |= {} if fixes is None else {"fixes": fixes}
    (tmp_path / "calibration.cache.json").write_text(json.dumps(metadata))
    run = trtq_run(
        *("quantize", small.model, "--plan", written / "plan.json"),
        *("--table", tmp_path / "calibration.cache", "-o", tmp_path / "model.onnx"),
    )
    assert run.code == 0, run.err
    if held is None:
        assert "has ranges only" not in run.err
    else:
        assert run.err.count("has ranges only") == 1
        assert f"the {held} of the job that wrote it are in its model.int8.onnx only" in run.err


def test_labels_that_the_data_lack_are_missed_before_anything_runs(
    small: Case, tmp_path: Path, trtq_run: _Trtq
) -> None:
    run = trtq_run(*deploy_arguments(small, tmp_path / "out", "--labels", "nowhere"))
    assert run.code == 2
    assert "have no class number for each row under 'nowhere'" in run.err
    assert "targets: labels" in run.err


@pytest.mark.parametrize(
    ("option", "value"), [("--min-sqnr", "nan"), ("--min-sqnr", "inf"), ("--parallel", "loky:0")]
)
def test_options_without_meaning_are_refused_at_once(
    option: str, value: str, small: Case, tmp_path: Path, trtq_run: _Trtq
) -> None:
    run = trtq_run(*deploy_arguments(small, tmp_path / "out", option, value))
    assert run.code == 2
    assert f"{option} is " in run.err


def test_deploy_goes_by_an_edited_plan(small: Case, written: Path, tmp_path: Path, trtq_run: _Trtq) -> None:
    plan = _edited(written, lambda p: p["nodes"][1].update(int8=False), tmp_path / "plan.json")
    run = trtq_run(*deploy_arguments(small, tmp_path / "out", "--plan", plan, "--method", "max"))
    assert run.code == 0, run.err
    kept = Plan.load(tmp_path / "out" / "plan.json")
    assert kept.int8_nodes == ["conv"]
    assert [edge.node for edge in kept.edges] == ["conv"]


def test_a_quantizer_that_no_rule_knows_is_carried_out(
    small: Case, written: Path, tmp_path: Path, trtq_run: _Trtq
) -> None:
    nodes = {node.name: node for node in onnx.load(small.model).graph.node}
    relu = next(node for node in nodes.values() if node.op_type == "Relu")
    edge = {"tensor": relu.input[0], "node": relu.name, "index": 0, "rule": "mine", "range": relu.input[0]}
    plan = _edited(written, lambda p: p["edges"].append(edge), tmp_path / "plan.json")
    run = trtq_run(
        *("quantize", small.model, "--plan", plan, "--data", small.data, "--method", "max"),
        *("-o", tmp_path / "model.onnx"),
    )
    assert run.code == 0, run.err
    after = {node.name: node for node in onnx.load(tmp_path / "model.onnx").graph.node}
    made_by = {name: node.op_type for node in after.values() for name in node.output}
    assert made_by[after[relu.name].input[0]] == "DequantizeLinear"
