"""Running a hostile case, and what is wrong with what came of it."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from hostile.inputs import Hostile, write_suitable
from jobs import trtq_command

MOST_SECONDS = 10.0


def faults(case: Hostile, folder: Path) -> list[str]:
    """What a case does beside ending with exit code 2 and one message; nothing if all is well.

    Args:
        folder: empty; the case runs in it.
    """
    write_suitable(folder)
    case.make(folder)
    before, started = _state(folder), time.monotonic()
    with _inside(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = trtq_command(*case.arguments)
    seconds, found = time.monotonic() - started, []
    if run.code != 2:
        found.append(f"exit code {run.code}: {run.out[-200:]!r}")
    messages = [line for line in run.err.splitlines() if line.startswith("trtq: ")]
    if len(messages) != 1 or "Traceback" in run.err or "internal error" in run.err:
        found.append(f"not one message: {run.err[-500:]!r}")
    if len(run.err) > 10_000:
        found.append(f"{len(run.err)} characters of messages")
    if (after := _state(folder)) != before:
        found.append(f"files changed: {sorted(set(before.items()) ^ set(after.items()))}"[:300])
    if seconds > MOST_SECONDS:
        found.append(f"it took {seconds:.0f} s")
    return found


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    own = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(own)


def _state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes where a file is written, replaced or removed; but for what Python compiled."""
    found = {}
    for path in folder.rglob("*"):
        if "__pycache__" not in path.parts:
            status = path.lstat()
            changed = 0 if path.is_dir() else status.st_mtime_ns
            found[str(path.relative_to(folder))] = (status.st_ino, status.st_size, changed)
    return found
