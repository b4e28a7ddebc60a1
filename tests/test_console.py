"""Steps and progress as lines of text."""

from __future__ import annotations

import io

import pytest

from trtq import console
from trtq.console import SILENT, Console


def test_further_lines_are_indented_to_the_first() -> None:
    stream = io.StringIO()
    Console(stream).say("plan", "first\nsecond")
    first, second = stream.getvalue().splitlines()
    assert first.split() == ["plan", "first"]
    assert second.index("second") == first.index("first")


def test_a_label_longer_than_its_column_is_apart_from_the_text() -> None:
    stream = io.StringIO()
    Console(stream).say("calibrate, rest fp32", "PASS")
    assert stream.getvalue() == "  calibrate, rest fp32 PASS\n"


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    SILENT.warn("careful")
    with SILENT.progress("rows", 10) as advance:
        advance(10)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_warning_about_a_long_name_is_short() -> None:
    stream = io.StringIO()
    quoting = Console(stream)
    quoting.warn("x" * 70_000)
    assert len(stream.getvalue()) < 5_000
    assert quoting.warnings[0] in stream.getvalue()


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Console(stream).progress("statistics", 100) as advance:
        for seconds in (1.0, 11.0, 12.0, 30.0):
            now[0] = seconds
            advance(25)
    assert [line.split() for line in stream.getvalue().splitlines()] == [
        ["statistics", "50", "of", "100", "rows"]
    ]
