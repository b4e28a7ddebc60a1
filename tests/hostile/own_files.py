"""Files that trtq itself wrote, edited or damaged: their bytes, and JSON key by key."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

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
