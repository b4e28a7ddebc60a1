"""Free fixes as part of calibration: what is kept, what stays as it is, and what the cache holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_graphs import Case, outputs, small_case

from trtq.calibration.calibrate import CUT_SHORT, calibrate
from trtq.console import Console
from trtq.graph.quantization import Quantization
from trtq.job import Job
from trtq.recipe import Recipe
from trtq.recovery.fixes.fix import FIXES, FIXES_DB, calibrated, changed_weights, is_made


class Log(Console):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, label: str, text: str) -> None:
        self.lines.append(f"{label}: {text}")


def one_sided(case: Case) -> None:
    """Two layers whose inputs are mixtures of a few, far from zero: rounding errors have a mean."""
    h = case.node("Relu", case.linear(case.input("x", 12), 12, 16))
    case.output(case.linear(h, 16, 4), 4)


def job_of(folder: Path, console: Console | None = None, **options: object) -> tuple[Case, Job]:
    random = np.random.default_rng(2)
    x = (random.normal(size=(96, 3)) @ random.normal(size=(3, 12)) + 4).astype(np.float32)
    case = small_case(folder, one_sided, x)
    recipe = Recipe(
        model=str(folder / "m.onnx"), data=str(folder / "x.npz"), cache=str(folder / "cache"), rest="fp32"
    )
    return case, Job.open(replace(recipe, **options), console or Log())  # type: ignore[arg-type]


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
