"""Running a hostile case, and what is wrong with what came of it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection
from pathlib import Path
from xml.etree import ElementTree

from hostile.inputs import Hostile, write_suitable
from jobs import Run, inside, trtq_command

from trtq.errors import ExitCode

MOST_SECONDS = 10.0
MOST_CHARACTERS = 10_000


def faults(case: Hostile, folder: Path) -> list[str]:
    """What a case does beside ending with exit code 2 and one message; nothing if all is well.

    Args:
        folder: empty; the case runs in it.
    """
    write_suitable(folder)
    case.make(folder)
    run, found = tried(case.arguments, folder)
    if run.code != ExitCode.BAD_INPUT:
        found.append(f"exit code {run.code}: {run.out[-200:]!r}")
    return found


def tried(arguments: Collection[object], folder: Path, *, may_write: bool = False) -> tuple[Run, list[str]]:
    """Run a command in a folder; and what is wrong with how it ended, whatever it was given: a crash, more
    than one message or none with an error, what a terminal would obey, too much time, and files that came,
    went or changed, but for a new JUnit file that has the error of a job that was refused.

    Args:
        may_write: where the command succeeds.
    """
    before, started = _state(folder), time.process_time()
    with inside(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = trtq_command(*arguments)
    seconds, found = time.process_time() - started, []
    refused = run.code in (ExitCode.BAD_INPUT, ExitCode.MISSING_BACKEND)
    if run.code not in set(ExitCode):
        found.append(f"exit code {run.code}")
    messages = [line for line in run.err.splitlines() if line.startswith("trtq: ")]
    if len(messages) != refused or "Traceback" in run.err or "internal error" in run.err:
        found.append(f"not one message: {run.err[-500:]!r}")
    if not all(character.isprintable() or character in "\n\t" for character in run.out + run.err):
        found.append(f"it prints what a terminal obeys: {(run.out + run.err)[-300:]!r}")
    if len(run.err) > MOST_CHARACTERS:
        found.append(f"{len(run.err)} characters of messages")
    after = _state(folder)
    if refused:
        _leave_out_errors(folder, before, after)
    if after != before and not (may_write and not refused):
        found.append(f"files changed: {sorted(set(before.items()) ^ set(after.items()))}"[:300])
    if seconds > MOST_SECONDS:
        found.append(f"it took {seconds:.0f} s")
    return run, found


def _leave_out_errors(folder: Path, before: Collection[str], after: dict[str, tuple[int, int, int]]) -> None:
    """Take new JUnit files that have an error, and the new folders that they are in, out of what there is."""
    for path in folder.rglob("junit.xml"):
        name = str(path.relative_to(folder))
        if name not in before and ElementTree.parse(path).getroot().get("errors") == "1":
            for new in (path, *path.parents):
                if new == folder or str(new.relative_to(folder)) in before:
                    break
                after.pop(str(new.relative_to(folder)), None)


def _state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes where a file is written, replaced or removed; but for what Python compiled."""
    found = {}
    for path in folder.rglob("*"):
        if "__pycache__" not in path.parts:
            status = path.lstat()
            changed = 0 if path.is_dir() else status.st_mtime_ns
            found[str(path.relative_to(folder))] = (status.st_ino, status.st_size, changed)
    return found
