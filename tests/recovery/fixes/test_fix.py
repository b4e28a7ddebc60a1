"""Free fixes as part of calibration: what is kept, what stays as it is, and what the cache holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_graphs import Case, Log, job_of, outputs, small_case

from trtq.calibration.calibrate import CUT_SHORT, calibrate
from trtq.graph.quantization import Quantization
from trtq.job import Job
from trtq.recipe import Recipe
from trtq.recovery.fixes.fix import FIXES, FIXES_DB, calibrated, changed_weights, is_made


def noise(case: Case, quantization: Quantization) -> float:
    expected, found = (outputs(g, case.samples)[0] for g in (case.graph, quantization.rewritten()))
    return float(np.square(expected - found).sum())


@pytest.mark.parametrize("method", ["max", "auto"])
def test_fixes_make_the_outputs_better(tmp_path: Path, method: str) -> None:
    case, job = job_of(tmp_path, method=method)
    plain, fixed = calibrate(job, job.place()), calibrated(job, job.place())
    case.samples = job.data
    assert noise(case, fixed) < 0.8 * noise(case, plain)
    tried = fixed.notes[FIXES_DB]
    best = max(tried, key=tried.__getitem__)
    assert best.endswith(fixed.notes[FIXES])
    assert tried["as calibrated"] < tried[best]


def test_methods_are_compared_again_once_outliers_are_scaled_down(tmp_path: Path) -> None:
    def one_large_channel(case: Case) -> None:
        gamma, weight = case.ones(16), case.weight(16, 12)
        gamma[0], weight[0] = 20, weight[0] / 20
        y = case.node("LayerNormalization", case.input("x", 16), gamma, 0 * case.ones(16), axis=-1)
        case.output(case.linear(case.node("Relu", case.node("MatMul", y, weight)), 12, 5), 5)

    case = small_case(
        tmp_path, one_large_channel, np.random.default_rng(0).normal(size=(128, 16)).astype("f")
    )
    recipe = Recipe(model=str(tmp_path / "m.onnx"), data=str(tmp_path / "x.npz"), cache=str(tmp_path / "c"))
    job = Job.open(replace(recipe, rest="fp32"), Log())
    fixed, other = calibrated(job, job.place()), calibrate(job, job.place())
    tried, chosen = fixed.notes[FIXES_DB], fixed.notes["method"]
    assert fixed.notes[FIXES].startswith("smooth")
    assert chosen != other.notes["method"]
    assert tried[f"{chosen} + smooth"] > tried[f"{other.notes['method']} + smooth"] + 0.3
    case.samples = job.data
    assert noise(case, fixed) < 0.5 * noise(case, other)


def test_what_changes_no_weight_of_the_float_model_changes_no_range(tmp_path: Path) -> None:
    _, job = job_of(tmp_path, method="max")
    plain, fixed = calibrate(job, job.place()), calibrated(job, job.place())
    if not changed_weights(fixed.notes):
        assert fixed.scales == plain.scales
    assert changed_weights({FIXES: "rounding + bias"}) == []
    assert changed_weights({FIXES: "shift + rounding + bias", "learned": {}}) == ["shift", "learned"]
    assert changed_weights({}) == []


def test_recover_turns_them_off(tmp_path: Path) -> None:
    _, job = job_of(tmp_path, recover=())
    assert calibrated(job, job.place()).to_bytes() == calibrate(job, job.place()).to_bytes()


def test_a_second_run_takes_all_from_the_cache(tmp_path: Path) -> None:
    _, job = job_of(tmp_path)
    plan = job.place()
    assert not is_made(job, plan)
    first = calibrated(job, plan)
    assert is_made(job, plan)
    _, again = job_of(tmp_path, log := Log())
    assert calibrated(again, again.place()).to_bytes() == first.to_bytes()
    assert log.lines == [f"calibration: {first.notes['method']}, from the cache; nothing was run"]


def test_what_the_budget_cut_short_is_not_kept(tmp_path: Path) -> None:
    _, job = job_of(tmp_path, method="max", budget=1e-3)
    cut = calibrated(job, job.place())
    assert cut.notes[CUT_SHORT]
    assert cut.scales == calibrate(job, job.place()).scales
    assert not is_made(job, job.place())
    assert job.console.warnings == ["the budget was spent before every fix was tried"]
