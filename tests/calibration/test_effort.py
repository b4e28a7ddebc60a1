"""What calibration takes is counted: the limit holds, is told, and gives the same twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_graphs import Log, job_of

from trtq.calibration import effort
from trtq.calibration.calibrate import calibrate
from trtq.calibration.effort import LEFT_OUT, MOST_PASSES, TOO_LONG, Effort
from trtq.job import Job
from trtq.recovery.fixes.fix import FIXES_DB, calibrated, fix, is_made
from trtq.recovery.partial import is_searchable


def logged_job(folder: Path, **options: object) -> tuple[Job, Log]:
    log = Log()
    _, job = job_of(folder, log, **options)
    return job, log


def test_what_does_not_fit_is_left_out_and_what_follows_may_fit(tmp_path: Path) -> None:
    job, _ = logged_job(tmp_path)
    plan = job.place()
    work = Effort(job.model.graph, plan, 96, bounded=True)
    assert not work.takes("much", effort.LEAST_SECONDS, 1)
    assert work.takes("half", effort.LEAST_SECONDS / 2)
    assert not work.takes("more than half", effort.LEAST_SECONDS / 2, 1e-6)
    assert work.takes("the rest", effort.LEAST_SECONDS / 2)
    assert work.left_out == ["much", "more than half"]
    work.say(log := Log())
    assert [line.split(":")[0] for line in log.lines] == ["left out"]
    free = Effort(job.model.graph, plan, 96, bounded=False)
    assert free.takes("much", 1e9)
    assert not free.left_out


def test_many_multiply_accumulates_raise_the_limit_as_passes_over_the_data(tmp_path: Path) -> None:
    job, _ = logged_job(tmp_path)
    plan = job.place()
    heavy = replace(plan, nodes=[replace(node, macs=10**9) for node in plan.nodes])
    rows, work = 96, Effort(job.model.graph, heavy, 96, bounded=True)
    each = work.plain(rows)
    assert each == pytest.approx(rows * heavy.macs_per_row * effort.MAC, rel=0.01)
    assert sum(work.takes("pass", each) for _ in range(2 * MOST_PASSES)) in (MOST_PASSES - 1, MOST_PASSES)


@pytest.mark.parametrize("method", ["max", "auto"])
def test_a_limit_of_nothing_leaves_plain_ranges(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effort, "LEAST_SECONDS", 0.0)
    job, log = logged_job(tmp_path, method=method)
    plan = job.place()
    assert not is_made(job, plan)
    made = calibrated(job, plan)
    assert "fixes" in made.notes[LEFT_OUT]
    assert FIXES_DB not in made.notes
    assert made.scales == calibrate(job, plan).scales
    assert any(line.startswith("left out: fixes") for line in log.lines)
    assert is_made(job, plan)


@pytest.mark.parametrize("limit", [0.02, 0.03, 0.05, 0.1, 0.3])
def test_a_second_run_leaves_out_the_same(
    tmp_path: Path, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever part of the steps fits: bytes are equal, and so is what is said to be left out."""
    monkeypatch.setattr(effort, "LEAST_SECONDS", limit)
    found = []
    for run in ("first", "second"):
        job, log = logged_job(tmp_path, cache=str(tmp_path / run))
        made = calibrated(job, job.place())
        said = [line for line in log.lines if line.startswith("left out")]
        assert bool(said) == (LEFT_OUT in made.notes)
        found.append((made.to_bytes(), said))
    assert found[0] == found[1]


def test_a_budget_takes_the_place_of_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was left out before is not taken from the cache for it; what it made serves all."""
    whole = calibrated((job := logged_job(tmp_path, method="max")[0]), job.place())
    cache = str(tmp_path / "other")
    for limit, budget, cut in ((0.0, None, True), (0.0, 3600.0, False), (20.0, None, False)):
        monkeypatch.setattr(effort, "LEAST_SECONDS", limit)
        job, _ = logged_job(tmp_path, method="max", budget=budget, cache=cache)
        assert is_made(job, job.place()) == (limit > 0)
        made = calibrated(job, job.place())
        assert (LEFT_OUT in made.notes) == cut
        assert (made.notes.get(FIXES_DB) == whole.notes[FIXES_DB]) != cut


def test_steps_of_recovery_that_would_take_too_long_are_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtq.calibration.calibrate.STEP_SECONDS", 0.0)
    job, _ = logged_job(tmp_path, method="max", recover=())
    start = calibrate(job, job.place())
    assert not is_searchable(job, start)
    made = fix(job, start)
    assert made.quantization is None
    assert made.reason == TOO_LONG
    free, _ = logged_job(tmp_path, method="max", recover=(), budget=3600.0)
    assert is_searchable(free, start)
    assert fix(free, start).reason != TOO_LONG
