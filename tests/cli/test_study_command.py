"""`trtq study`: what it prints and writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from jobs import Case, Run, conv_case

from trtq.report.inspection import inspect
from trtq.study import Study

_Trtq = Callable[..., Run]


def _arguments(case: Case, *more: object) -> Sequence[object]:
    return (
        *("study", case.model, "--data", case.data, "--eval", case.data, "--metric", "top1"),
        *("--method", "max", *more),
    )


@pytest.mark.slow
def test_the_tables_are_printed_and_written(small: Case, tmp_path: Path, trtq_run: _Trtq) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "study"
    run = trtq_run(*_arguments(small, "-o", folder, "--budget", "2s"))
    assert run.code == 0, run.err
    found = Study.load(folder / "study.json")
    assert run.out == f"{found.text()}\n{folder}: study.json, study.svg, study.txt\n"
    assert (folder / "study.txt").read_text() == found.text() + "\n"
    assert (folder / "study.svg").read_text().rstrip().endswith("</svg>")
    assert inspect(folder / "study.json").text() == "\n  ".join(["study", *found.text().splitlines()])


@pytest.mark.slow
def test_a_spent_budget_leaves_the_first_tables_and_says_what_is_missing(
    small: Case, tmp_path: Path, trtq_run: _Trtq
) -> None:
    run = trtq_run(*_arguments(small, "-o", tmp_path / "study", "--budget", "0.001s"))
    assert run.code == 0, run.err
    found = Study.load(tmp_path / "study" / "study.json")
    assert [title.rpartition(" (")[0] for title in found.tables] == [
        "Calibration methods, all layers INT8",
        "Weights alone in INT8",
    ]
    assert "note: the budget was spent before partial quantization" in run.out
    assert "note: the budget was spent before learning" in run.out


@pytest.mark.parametrize("option", ["--eval", "--metric", "--data"])
def test_nothing_is_run_without_data_and_a_metric(small: Case, trtq_run: _Trtq, option: str) -> None:
    arguments = list(_arguments(small))
    at = arguments.index(option)
    run = trtq_run(*arguments[:at], *arguments[at + 2 :])
    assert run.code == 2
    assert f"{option} is missing" in run.err


@pytest.mark.slow
def test_a_model_that_cannot_learn_has_all_other_tables(tmp_path: Path, trtq_run: _Trtq) -> None:
    case = conv_case(tmp_path, "N")
    graph = gs.import_onnx(onnx.load(case.model))
    decision = gs.Variable("decision", np.int64, ["N"])
    graph.nodes.append(
        gs.Node("ArgMax", "decide", {"axis": 1, "keepdims": 0}, [graph.outputs[0]], [decision])
    )
    graph.outputs = [decision]
    onnx.save(gs.export_onnx(graph), case.model)
    arguments = ["accuracy" if a == "top1" else a for a in _arguments(case)]
    run = trtq_run(*arguments)
    assert run.code == 0, run.err
    assert "paper table 5" in run.out
    assert "note: nothing was learned: " in run.out
