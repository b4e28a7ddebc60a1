"""Files that trtq itself wrote, edited or damaged: their bytes, and JSON key by key."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs import conv_case, inside, trtq_command

Command = tuple[str, ...]

READ_BY: dict[str, Sequence[Command]] = {
    "verdict.json": [("report", ".")],
    "workflow.json": [("report", ".")],
    "report.json": [("report", ".")],
    "plan.json": [("report", "."), ("inspect", "plan.json")],
    "calibration.cache.json": [("report", "."), ("inspect", "calibration.cache")],
    "model.plan.json": [("report", "."), ("inspect", "model.plan")],
}
"""File of the results -> the commands that read it, in their folder."""

_DATA = ("--data", "data.npz", "--method", "max", "--cache", "cache")
_CALIBRATE = ("calibrate", "model.onnx", *_DATA, "-o", "again.cache")
_GATE = (
    *("gate", "model.onnx", "model.int8.onnx", "--eval", "data.npz", "--metric", "top1"),
    *("--cache", "cache", "--json", "again.json"),
)

ALSO_READ_BY: dict[str, Sequence[Command]] = {
    "manifest.json": [("report", ".")],
    "plan.json": [("quantize", "model.onnx", *_DATA, "--plan", "plan.json", "-o", "again.onnx")],
    "calibration.cache": [
        *[("inspect", "calibration.cache"), ("cache", "convert", "calibration.cache", "-o", "again.cache")],
        ("quantize", "model.onnx", "--table", "calibration.cache", "-o", "again.onnx"),
    ],
    "calibration.cache.json": [
        ("quantize", "model.onnx", "--table", "calibration.cache", "-o", "again.onnx"),
        ("cache", "convert", "calibration.cache", "-o", "again.cache"),
    ],
    "model.plan": [("inspect", "model.plan"), ("bench", "model.plan")],
    "model.plan.json": [("bench", "model.plan")],
    "model.int8.onnx": [("inspect", "model.int8.onnx"), _GATE, ("build", "model.int8.onnx", "-o", "a.plan")],
    "recipe.toml": [("calibrate", "--recipe", "recipe.toml", "-o", "again.cache", "--cache", "cache")],
    "effects.json": [("inspect", "effects.json")],
    "study.json": [("inspect", "study.json")],
}
"""The same for further commands, which take longer."""

CACHE_READ_BY: Sequence[Command] = (
    *[("cache", action, "--cache", "cache") for action in ("list", "show", "verify")],
    *(_CALIBRATE, _GATE),
)
"""The commands that read any file of the cache."""


def write_own(folder: Path) -> None:
    """Results of all kinds with the model, the data and the cache that they come from, and what two commands
    make that read the cache: `again.cache` and `again.json`.

    Raises:
        RuntimeError: a command fails.
    """
    folder.mkdir(parents=True)
    conv_case(folder, "N", rows=48)
    job = ("model.onnx", *_DATA, "--eval", "data.npz", "--metric", "top1")
    with inside(folder):
        for command in (
            ("deploy", *job, "-o", "."),
            ("sensitivity", *job, "-o", "effects.json"),
            ("study", *job, "--budget", "1s", "-o", "."),
            _CALIBRATE,
            _GATE,
        ):
            if (run := trtq_command(*command)).code:
                raise RuntimeError(f"{command}: {run.err}")


def read_by(folder: Path) -> dict[str, Sequence[Command]]:
    """Name of every file of `write_own` -> the commands that read it."""
    found = {name: [*READ_BY.get(name, ()), *ALSO_READ_BY.get(name, ())] for name in READ_BY | ALSO_READ_BY}
    entries = (path for path in sorted((folder / "cache").rglob("*")) if path.is_file())
    return {**found, **{str(path.relative_to(folder)): CACHE_READ_BY for path in entries}}


def copied(folder: Path, place: Path) -> None:
    """A copy of what `write_own` made, without what the commands make again."""
    shutil.copytree(folder, place)
    for name in ("again.cache", "again.cache.json", "again.json", "report.html"):
        (place / name).unlink(missing_ok=True)


EDITS: dict[str, Any] = {
    "null": None,
    "true": True,
    "-1": -1,
    "1e308": 1e308,
    "10^400": 10**400,
    "markup": "<script>alert(1)</script>",
    "an escape sequence": "\x1b]0;owned\x07",
    "70 kB": "x" * 70_000,
    "a list": [[[]]],
    "an object": {},
}
"""What a value of a JSON file is replaced by."""

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "deep lists": lambda content: b"[" * 200_000,
    "deep objects": lambda content: b'{"a":' * 100_000,
    "not UTF-8": lambda content: b"\xff\xfe" + content,
    "NaN": lambda content: b"NaN",
    "null": lambda content: b"null",
    "a number of 6000 digits": lambda content: b"9" * 6000,
    "NUL": lambda content: bytes(100),
    "an escape sequence first": lambda content: b"\x1b[31m" + content,
    "an escape sequence as text": lambda content: b'"\\u001b[31mx"',
    "half a surrogate pair": lambda content: b'{"format": "\\ud800"}',
}
"""What happens to the bytes of a file."""


def edited(value: Any, deepest: int = 4) -> Iterator[tuple[str, Any]]:
    """Copies of a JSON value with one part replaced or left out, each with its name."""
    for path in _paths(value, deepest):
        where = ".".join(map(str, path))
        for name, new in EDITS.items():
            yield f"{where or 'all'} is {name}", _put(value, path, new)
        if path:
            yield f"{where} is left out", _without(value, path)


def dumped(value: Any) -> bytes:
    """The bytes of a JSON file; unlike trtq, this writes infinity."""
    return json.dumps(value).encode()


def _paths(value: Any, deepest: int) -> Iterator[tuple[str | int, ...]]:
    yield ()
    if deepest == 0:
        return
    parts = (
        value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    )
    for key, part in parts:
        yield from ((key, *path) for path in _paths(part, deepest - 1))


def _put(value: Any, path: tuple[str | int, ...], new: Any) -> Any:
    if not path:
        return new
    result = copy.copy(value)
    result[path[0]] = _put(value[path[0]], path[1:], new)
    return result


def _without(value: Any, path: tuple[str | int, ...]) -> Any:
    result = copy.copy(value)
    if len(path) == 1:
        del result[path[0]]
    else:
        result[path[0]] = _without(value[path[0]], path[1:])
    return result
