"""A sample of damaged results: the report and `trtq inspect` show them or refuse them with one message."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import pytest
from hostile.own_files import DAMAGES, READ_BY, Command, dumped, edited
from hostile.trial import tried
from jobs import Deployed

from trtq.errors import ExitCode

EVERY = 60
"""Of the edits of a file, one in so many is tried here; `tools/campaign.py` tries more, and more commands."""


@pytest.fixture
def results(demo: Deployed, tmp_path: Path) -> Path:
    """A copy of a folder of results."""
    return Path(shutil.copytree(demo.folder, tmp_path / "results"))


def refused(command: Command, name: str, results: Path) -> bool:
    """Whether a command refuses a file with one message; else what it shows is harmless."""
    (results / "report.html").unlink(missing_ok=True)
    run, found = tried(command, results, may_write=True)
    assert found == []
    assert run.code in (ExitCode.PASS, ExitCode.BAD_INPUT)
    page = results / "report.html"
    if run.code:
        assert name in run.err
    elif page.exists():
        assert "<script>" not in page.read_text()
        assert "\x1b" not in page.read_text()
    return run.code == ExitCode.BAD_INPUT


@pytest.mark.parametrize("name", READ_BY)
def test_files_edited_key_by_key(name: str, results: Path) -> None:
    value = json.loads((results / name).read_text())
    for where, new in edited(value):
        if zlib.crc32(where.encode()) % EVERY:
            continue
        (results / name).write_bytes(dumped(new))
        for command in READ_BY[name]:
            refused(command, name, results)


@pytest.mark.parametrize("name", READ_BY)
def test_files_whose_bytes_are_damaged(name: str, results: Path) -> None:
    content = (results / name).read_bytes()
    for kind, damage in DAMAGES.items():
        (results / name).write_bytes(damage(content))
        for command in READ_BY[name]:
            of_another_table = (name, kind) == ("calibration.cache.json", "half a surrogate pair")
            assert refused(command, name, results) != of_another_table
