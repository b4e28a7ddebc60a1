"""What stands in the way: a planted bad layer is first, and the line that is printed does what it says."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from jobs import Case, Run, deploy_arguments, save_case, trtq_command

from trtq.errors import ExitCode

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def chain(folder: Path, names: Sequence[str], bad: str, *, last: str | None = None) -> Case:
    """Gemm + Relu layers. One channel of the input of `bad` is 500 times as large as the others and hardly
    used, so that per-tensor INT8 rounds the others to almost nothing. `last` is an operator on the output."""
    random, width = np.random.default_rng(0), 24
    value = gs.Variable("x", np.float32, ["N", width])
    graph = gs.Graph(opset=17, inputs=[value])
    weights = [random.normal(size=(width, width)) / np.sqrt(width) for _ in names]
    weights[names.index(bad) - 1][:, 0] *= 500
    weights[names.index(bad)][0] /= 500
    for index, (name, weight) in enumerate(zip(names, weights, strict=True)):
        made = gs.Variable(f"made{index}", np.float32, ["N", width])
        constants = [gs.Constant(f"w{index}", weight.astype(np.float32))]
        constants += [gs.Constant(f"b{index}", random.normal(size=width).astype(np.float32))]
        graph.nodes.append(gs.Node("Gemm", name, {}, [value, *constants], [made]))
        value = made
        if index < len(names) - 1:
            value = gs.Variable(f"active{index}", np.float32, ["N", width])
            graph.nodes.append(gs.Node("Relu", f"relu{index}", {}, [made], [value]))
    if last is not None:
        made, value = value, gs.Variable("y", np.float32, ["N", width])
        graph.nodes.append(gs.Node(last, "last", {}, [made], [value]))
    graph.outputs = [value]
    return save_case(graph, folder, {"x": random.normal(size=(96, width)).astype(np.float32)})


def deploy(case: Case, output: Path, *options: str) -> Run:
    return trtq_command(*deploy_arguments(case, output, "--method", "max", *options))


PLANTED = (["first", "second", "bad", "fourth"], "bad")
AWKWARD = (["first", "a*d", "acd", "-op:x?"], "a*d")


@pytest.mark.slow
@pytest.mark.parametrize(("names", "bad"), [PLANTED, AWKWARD])
@pytest.mark.parametrize("recover", [("--recover", "none"), ("--recover", "partial", "--min-int8", "100%")])
def test_the_planted_layer_is_first_and_the_line_passes(
    names: list[str], bad: str, recover: tuple[str, ...], tmp_path: Path
) -> None:
    case = chain(tmp_path, names, bad)
    gate = ("--min-sqnr", "25")
    run = deploy(case, tmp_path / "out", *gate, *recover)
    assert run.code == ExitCode.FAIL
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    found = verdict["in_the_way"]
    first = found["obstacles"][0]
    assert (first["rank"], first["nodes"], first["op"]) == (1, [bad], "Gemm")
    assert first["mac_share"] == pytest.approx(1 / 4)
    shares = [obstacle["noise_share"] for obstacle in found["obstacles"]]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert found["options"].startswith("--exclude ")
    for told in (
        run.out,
        (tmp_path / "out" / "report.html").read_text(),
        "".join(ElementTree.parse(tmp_path / "out" / "junit.xml").getroot().itertext()),
    ):
        assert "Gemm" in told
        assert "in the way" in told.lower()
    assert found["options"] in run.out
    kept = [step for step in json.loads((tmp_path / "out" / "workflow.json").read_text()) if step["kept"]]
    assert [step["in_the_way"] for step in kept] == [found]
    again = deploy(case, tmp_path / "again", *gate, *recover, *shlex.split(found["options"]))
    assert again.code == ExitCode.PASS
    plan = json.loads((tmp_path / "again" / "plan.json").read_text())
    assert [node["name"] for node in plan["nodes"] if not node["int8"]] == [bad]
    assert json.loads((tmp_path / "again" / "verdict.json").read_text())["in_the_way"] is None


def test_where_int8_is_not_the_cause_it_says_so(tmp_path: Path) -> None:
    """Too few samples to prove anything, even with the model compared with itself."""
    case = chain(tmp_path, *PLANTED)
    proof = ("--confidence", "0.9999999", "--metric", "top1")
    run = deploy(case, tmp_path / "out", "--recover", "none", *proof)
    assert run.code != ExitCode.PASS
    found = json.loads((tmp_path / "out" / "verdict.json").read_text())["in_the_way"]
    assert found["what"].startswith("INT8 is not the cause")
    assert (found["obstacles"], found["options"]) == ([], None)
    assert "INT8 is not the cause" in run.out


def test_outputs_that_are_not_finite_are_ignored_there_too(tmp_path: Path) -> None:
    case = chain(tmp_path, *PLANTED, last="Sqrt")
    run = deploy(case, tmp_path / "out", "--recover", "none", "--min-sqnr", "60", "--ignore-nonfinite")
    assert run.code == ExitCode.FAIL
    assert "in the way" in run.out.lower()


def test_a_plan_is_not_told_to_exclude(tmp_path: Path) -> None:
    case = chain(tmp_path, *PLANTED)
    gate = ("--min-sqnr", "25", "--recover", "none")
    assert deploy(case, tmp_path / "out", *gate).code == ExitCode.FAIL
    run = deploy(case, tmp_path / "two", *gate, "--plan", str(tmp_path / "out" / "plan.json"))
    assert run.code == ExitCode.FAIL
    assert "--exclude" not in run.out
    assert "1. bad (Gemm)" in run.out
