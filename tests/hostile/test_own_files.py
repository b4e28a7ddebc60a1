"""A sample of damaged results: the report and `trtq inspect` show them or refuse them with one message."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import pytest
from jobs import Deployed, Run, trtq_command
from own_files import DAMAGES, dumped, edited

from trtq.errors import ExitCode

READ_BY = {
    "verdict.json": [("report", "")],
    "workflow.json": [("report", "")],
    "plan.json": [("report", ""), ("inspect", "plan.json")],
    "calibration.cache.json": [("report", ""), ("inspect", "calibration.cache")],
    "model.plan.json": [("report", ""), ("inspect", "model.plan")],
}
"""File -> the commands that read it, and what they are given: a file, or the folder."""

EVERY = 60
"""Of the edits of a file, one in so many is tried here; `tools/campaign.py` tries all."""


@pytest.fixture
def results(demo: Deployed, tmp_path: Path) -> Path:
    """A copy of a folder of results."""
    return Path(shutil.copytree(demo.folder, tmp_path / "results"))


def assert_shown_or_refused(run: Run, name: str, page: Path) -> None:
    assert run.code in (ExitCode.PASS, ExitCode.BAD_INPUT)
    assert "Traceback" not in run.err
    assert "internal error" not in run.err
    assert all(character.isprintable() or character == "\n" for character in run.out + run.err)
    if run.code:
        assert run.err.count("trtq: ") == 1
        assert name in run.err
        assert len(run.err) < 6000
    elif page.exists():
        assert "<script>" not in page.read_text()
        assert "\x1b" not in page.read_text()


@pytest.mark.parametrize("name", READ_BY)
def test_files_edited_key_by_key(name: str, results: Path) -> None:
    value = json.loads((results / name).read_text())
    for where, new in edited(value):
        if zlib.crc32(where.encode()) % EVERY:
            continue
        (results / name).write_bytes(dumped(new))
        for command, file in READ_BY[name]:
            (results / "report.html").unlink(missing_ok=True)
            assert_shown_or_refused(trtq_command(command, results / file), name, results / "report.html")


@pytest.mark.parametrize("name", READ_BY)
def test_files_whose_bytes_are_damaged(name: str, results: Path) -> None:
    content = (results / name).read_bytes()
    for kind, damage in DAMAGES.items():
        (results / name).write_bytes(damage(content))
        for command, file in READ_BY[name]:
            run = trtq_command(command, results / file)
            assert_shown_or_refused(run, name, results / "report.html")
            of_another_table = (name, kind) == ("calibration.cache.json", "half a surrogate pair")
            assert (run.code == ExitCode.BAD_INPUT) != of_another_table
