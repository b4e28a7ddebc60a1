"""A sample of tools/campaign.py: kills, signals and writers. The tool does the rest."""

from __future__ import annotations

import random
import signal
import sys
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
    random.seed(seed)
    assert campaign.killed(campaign.JOBS["calibrate"], case, tmp_path / "job", known, number) == []


def test_a_job_that_leaves_something_else_is_found_out(
    undisturbed: tuple[Path, campaign.Undisturbed], tmp_path: Path
) -> None:
    case, known = undisturbed
    other = campaign.Undisturbed({**known.results, "calibration.cache": b""}, known.code, known.seconds)
    found = campaign.killed(campaign.JOBS["calibrate"], case, tmp_path / "job", other, signal.SIGKILL)
    assert "it leaves another calibration.cache" in "".join(found)


def test_many_write_verify_and_prune_one_cache(tmp_path: Path) -> None:
    count = campaign.Count()
    campaign.writers(count, tmp_path, number=4, seconds=2)
    assert count.failures == []
    assert count.tried["cache: write"] == 4
    assert count.tried["cache: write, rounds"] > 100
