from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import Case, Run

from trtq.recovery.sensitivity import Sensitivity

_Trtq = Callable[..., Run]


def test_every_layer_is_ranked_and_written(small: Case, tmp_path: Path, trtq_run: _Trtq) -> None:
    out = tmp_path / "sensitivity.json"
    run = trtq_run("sensitivity", small.model, "--data", small.data, "--method", "max", "-o", out)
    assert run.code == 0, run.err
    found = Sensitivity.load(out)
    assert run.out == found.text() + "\n"
    assert {effect.group.op for effect in found.effects} == {"Conv", "MatMul"}
    assert (found.mode, found.metric, found.rows) == ("only", None, 40)


def test_a_metric_is_measured_on_the_evaluation_data(small: Case, tmp_path: Path, trtq_run: _Trtq) -> None:
    out = tmp_path / "sensitivity.json"
    run = trtq_run(
        *("sensitivity", small.model, "--data", small.data, "--method", "max", "-o", out),
        *("--eval", small.data, "--metric", "top1", "--all-but-one", "--fast"),
    )
    assert run.code == 0, run.err
    found = Sensitivity.load(out)
    assert (found.mode, found.metric, found.reference) == ("all-but", "top1", 1.0)
    assert all(effect.metric is not None for effect in found.effects)


def test_an_excluded_layer_is_not_measured(small: Case, trtq_run: _Trtq) -> None:
    run = trtq_run(
        *("sensitivity", small.model, "--data", small.data, "--method", "max"),
        *("--exclude", "op:MatMul"),
    )
    assert run.code == 0, run.err
    assert "Conv" in run.out
    assert "MatMul" not in run.out


@pytest.mark.parametrize("option", ["--eval", "--metric"])
def test_eval_and_metric_go_together(small: Case, trtq_run: _Trtq, option: str) -> None:
    value = small.data if option == "--eval" else "top1"
    run = trtq_run("sensitivity", small.model, "--data", small.data, option, value)
    assert run.code == 2
    assert "--eval and a --metric with labels go together" in run.err


def test_a_metric_without_labels_is_measured_on_the_calibration_data(small: Case, trtq_run: _Trtq) -> None:
    run = trtq_run("sensitivity", small.model, "--data", small.data, "--metric", "kl", "--method", "max")
    assert run.code == 0, run.err
    assert "in fp32: kl 1" in run.out
