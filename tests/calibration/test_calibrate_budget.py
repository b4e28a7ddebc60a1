"""The budget of a job bounds the search for ranges, and what it cut short is not kept."""

from __future__ import annotations

from pathlib import Path

from jobs import conv_case

from trtq.calibration.calibrate import CUT_SHORT, calibrate, is_calibrated
from trtq.calibration.search import CANDIDATES
from trtq.console import Console
from trtq.job import Job
from trtq.recipe import Recipe


def test_ranges_that_the_budget_cut_short_are_searched_again(tmp_path: Path) -> None:
    case = conv_case(tmp_path, "N")
    recipe = {"model": str(case.model), "data": str(case.data), "cache": str(tmp_path / "cache")}
    console = Console(quiet=True)
    job = Job.open(Recipe(budget="0.001s", **recipe), console)
    plan = job.place()
    cut = calibrate(job, plan)
    assert cut.notes[CUT_SHORT]
    assert len(cut.notes["sqnr_db"]) == 1
    assert cut.scales.keys() == set(plan.tensors)
    assert console.warnings == ["the budget was spent before the search for ranges was complete"]
    assert not is_calibrated(job, plan)

    whole = calibrate(Job.open(Recipe(**recipe), console), plan)
    assert CUT_SHORT not in whole.notes
    assert whole.notes["sqnr_db"].keys() == set(CANDIDATES)
    assert is_calibrated(job, plan)


def test_a_fixed_method_needs_no_time(tmp_path: Path) -> None:
    case = conv_case(tmp_path, "N")
    recipe = Recipe(
        model=str(case.model), data=str(case.data), cache=str(tmp_path), method="mse", budget="0.001s"
    )
    job = Job.open(recipe, console := Console(quiet=True))
    assert CUT_SHORT not in calibrate(job, job.place()).notes
    assert not console.warnings
    assert is_calibrated(job, job.place())
