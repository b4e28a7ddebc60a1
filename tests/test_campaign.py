"""A sample of tools/campaign.py: kills, signals and writers. The tool does the rest."""

from __future__ import annotations

import random
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import campaign

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals and sessions of POSIX"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, campaign.Undisturbed]:
    """A small model with data, and what calibrating it leaves."""
    root = tmp_path_factory.mktemp("campaign")
    case = campaign.case_in(root / "case")
    return case, campaign.Undisturbed.of(campaign.JOBS["calibrate"], case, root / "undisturbed")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_job_that_was_ended_runs_again_as_if_it_had_not_been(
    seed: int, number: int, undisturbed: tuple[Path, campaign.Undisturbed], tmp_path: Path
) -> None:
    case, known = undisturbed
    source = random.Random(seed)
    assert campaign.killed(campaign.JOBS["calibrate"], case, tmp_path / "job", known, number, source) == []


def test_workers_end_with_the_job_that_started_them(
    undisturbed: tuple[Path, campaign.Undisturbed], tmp_path: Path
) -> None:
    """With SIGKILL, of which nobody is told."""
    case, _ = undisturbed
    process = campaign.Place(tmp_path).start(f"{campaign.JOBS['calibrate']} {campaign.PARALLEL}", case)
    end = time.monotonic() + 60
    while len(campaign.children(process.pid)) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    assert process.poll() is None
    process.kill()
    process.wait()
    assert campaign.left_running(process.pid) == []


def test_a_job_that_leaves_something_else_is_found_out(
    undisturbed: tuple[Path, campaign.Undisturbed], tmp_path: Path
) -> None:
    case, known = undisturbed
    other = campaign.Undisturbed({**known.results, "calibration.cache": b""}, known.code, known.seconds)
    job, source = campaign.JOBS["calibrate"], random.Random(0)
    found = campaign.killed(job, case, tmp_path / "job", other, signal.SIGKILL, source)
    assert "it leaves another calibration.cache" in "".join(found)


def test_many_write_verify_and_prune_one_cache(tmp_path: Path) -> None:
    assert campaign.writers(tmp_path, number=4, seconds=4) == []


def test_what_was_tried_is_not_tried_again(tmp_path: Path) -> None:
    found = iter([["it hangs"], []])
    tries = [campaign.Try("kind", name, lambda: next(found)) for name in ("one", "other")]
    journal = campaign.Journal(tmp_path / "tried.jsonl")
    journal.add(tries[0])
    again = campaign.Journal(tmp_path / "tried.jsonl")
    assert [again.knows(attempt) for attempt in tries] == [True, False]
    again.add(tries[1])
    assert again.failed == {"kind": 1}
    assert again.text().splitlines()[-1].split() == ["all", "2", "1"]
