"""The process that tries hostile cases finds out what hangs, what ends it, and what leaves something."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile.own_files import ALSO_READ_BY, READ_BY
from hostile.whole import Try, Trying, all_tries


def strange_cases() -> Iterator[tuple[str, str, Try]]:
    """Cases that are no good, and one that is."""
    yield "kind", "hangs", lambda folder: time.sleep(100) or []
    yield "kind", "ends", lambda folder: os._exit(7)
    yield "kind", "litters", lambda folder: [tempfile.mkdtemp(prefix="x") and "found"]
    yield "kind", "fails", lambda folder: [str(1 / 0)]
    yield "kind", "good", lambda folder: []


@pytest.mark.slow
def test_what_hangs_or_ends_the_process_is_found_out() -> None:
    with contextlib.closing(Trying(strange_cases, seconds=20)) as trying:
        found = [trying(number) for number in range(5)]
    assert found[0] == ["it hangs"]
    assert found[1] == ["the process ended: 7"]
    assert found[2][0] == "found"
    assert found[2][1].startswith("left x")
    assert found[3][0].startswith("the case fails: ZeroDivisionError")
    assert found[4][0].startswith("left x")


def test_every_try_has_a_name_of_its_own(tmp_path: Path) -> None:
    for name in READ_BY | ALSO_READ_BY:
        (tmp_path / name).write_text("{}")
    names = [(kind, name) for kind, name, _ in all_tries(0, 1, tmp_path)]
    assert len(names) > 2000
    assert len(set(names)) == len(names)
