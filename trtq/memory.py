"""What a Python program gives in place of a file: data, a model or a metric that are in its memory.

Such a value stands in a recipe where a path would. All that is left of it in a saved recipe, a manifest or a
message is its text, `in-memory://NAME`, which nothing can be read from.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trtq.errors import InputError
from trtq.scratch import scratch_folder

SCHEME = "in-memory://"


class InMemory:
    """A value in a Python program's memory.

    Attributes:
        name: what it is called in messages, such as the name of its type.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}"

    def __repr__(self) -> str:
        return f"<{self}>"


class Function(InMemory):
    """A function that is given itself, not as `FILE.py:FUNCTION`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(name_of(function))
        self.function = function


def name_of(function: Callable[..., Any]) -> str:
    """What a function is called: of a `functools.partial` the name of its function, of an object with
    `__call__` the name of its type, of a lambda its file and line."""
    while hasattr(function, "func"):
        function = function.func
    name = str(getattr(function, "__qualname__", type(function).__qualname__)).rpartition("<locals>.")[2]
    code = getattr(function, "__code__", None)
    if code is not None and "<lambda>" in name:
        return f"lambda at {Path(code.co_filename).name}:{code.co_firstlineno}"
    return name


def folder_of(owner: InMemory) -> Path:
    """A new folder for what is kept of a value on disk; it goes with the value, or with the process."""
    until_it_goes = contextlib.ExitStack()
    folder = until_it_goes.enter_context(scratch_folder())
    weakref.finalize(owner, until_it_goes.close)
    return folder


def refuse_memory(source: str, what: str, remedy: str) -> None:
    """Refuse the text that a saved recipe has of what was in memory.

    Args:
        what: what it was, as a message has it: "the data were".

    Raises:
        InputError: `source` is such a text.
    """
    if source.startswith(SCHEME):
        raise InputError(
            f"{what} in the memory of the Python program that made this recipe, and in no file",
            file=source,
            remedy=remedy,
        )
