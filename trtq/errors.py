"""What can go wrong, said once: every error a user can meet is a `TrtqError` with its exit code."""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Callable, Iterator

_LONGEST = 200


class ExitCode(enum.IntEnum):
    """Exit codes of the command line; a CI gates on them."""

    PASS = 0
    FAIL = 1
    BAD_INPUT = 2
    INCONCLUSIVE = 3
    MISSING_BACKEND = 4


LONGEST_CAUSE = 4000
"""Characters of an error's cause, or problem; what a backend says of many layers fits."""


class TrtqError(Exception):
    """A problem the user can act on: one message that names the problem, file, cause and remedy.

    Args:
        problem: what went wrong, one clause without a full stop.
        file: the file or folder it concerns.
        cause: why, as far as it is known (an exception's text is fine).
        remedy: what the user can do about it.
    """

    exit_code = ExitCode.BAD_INPUT

    def __init__(
        self,
        problem: str,
        *,
        file: str | os.PathLike[str] | None = None,
        cause: object = None,
        remedy: str | None = None,
    ) -> None:
        self.problem = to_an_end(problem)
        self.file = None if file is None else os.fspath(file)
        self.cause = None if cause is None else to_an_end(str(cause).strip())
        self.remedy = remedy
        lines = [self.problem]
        lines += [f"  file:   {self.file}"] if self.file else []
        lines += [f"  cause:  {self.cause}"] if self.cause else []
        lines += [f"  remedy: {remedy}"] if remedy else []
        super().__init__("\n".join(lines))

    def retell(self, words: Callable[[str], str]) -> None:
        """Put each part of the message through `words`."""
        cause, remedy = (part and words(part) for part in (self.cause, self.remedy))
        file = self.file and words(self.file)
        TrtqError.__init__(self, words(self.problem), file=file, cause=cause, remedy=remedy)


def to_an_end(text: str) -> str:
    """Text that may hold names and values of any length, as a message can show it."""
    return text if len(text) <= LONGEST_CAUSE else f"{text[:LONGEST_CAUSE]}…"


class TrtqWarning(UserWarning):
    """What makes a result doubtful and stops nothing, where no console prints it."""


class InputError(TrtqError):
    """Bad usage or bad input: a model, data, a metric, an option or a path that cannot be used."""


class BuildError(InputError):
    """The builder cannot make an engine from a model; the model itself runs."""


class MissingBackendError(TrtqError):
    """A package, a GPU or a driver that the job needs is missing."""

    exit_code = ExitCode.MISSING_BACKEND


def shown(value: object) -> str:
    """A value that somebody gave, as a message has it: not of any length, and whatever it is."""
    try:
        text = repr(value)
    except Exception:  # integers of thousands of digits, lists of lists, and whatever its own code raises
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


@contextlib.contextmanager
def about(file: str | os.PathLike[str]) -> Iterator[None]:
    """Add `file` to an input error raised inside that names no file."""
    try:
        yield
    except InputError as error:
        if error.file is not None:
            raise
        raise InputError(error.problem, file=file, cause=error.cause, remedy=error.remedy) from error
