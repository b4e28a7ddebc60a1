"""What a person sees: results on standard output; progress and lines of a long job on standard error."""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from trtq.errors import to_an_end
from trtq.escapes import printable

Advance = Callable[[int], object]
"""Called with how many rows, or runs, were just done."""

_LABEL = 12
_SECONDS_BETWEEN_LINES = 10.0


def show(text: str) -> None:
    """Print a result on standard output, without what a terminal would obey."""
    print(printable(text))


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


class Console:
    """Prints steps and progress; `quiet` prints nothing, as a library should by default.

    Attributes:
        warnings: what was warned of, each once.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self.warnings: list[str] = []

    def fresh(self) -> Console:
        """The same console for another job: `warnings` starts empty."""
        console = copy.copy(self)
        console.warnings = []
        return console

    def say(self, label: str, text: str) -> None:
        """One finished step: a short label and what came of it; further lines are indented."""
        if not self._quiet:
            label += " "  # parts it from the text even where it is long
            indented = text.replace("\n", "\n" + " " * (_LABEL + 2))
            print(printable(f"  {label:<{_LABEL}}{indented}"), file=self._stream, flush=True)

    def warn(self, text: str) -> None:
        """Something that did not stop the job but should be known; it is kept in `warnings`."""
        text = to_an_end(text)
        if text not in self.warnings:
            self.warnings.append(text)
        self.say("warning", text)

    @contextlib.contextmanager
    def progress(self, label: str, total: int | None, unit: str = "row") -> Iterator[Advance]:
        """A progress bar on a terminal or in a notebook, a plain line every few seconds elsewhere.

        Args:
            total: how much there is to do; None: nobody knows.
        """
        if self._quiet:
            yield lambda rows: None
        elif self._stream.isatty() or in_notebook():
            if in_notebook():
                from tqdm.auto import tqdm
            else:
                from tqdm import tqdm

            bar = tqdm(
                total=total,
                desc=printable(f"  {label:<{_LABEL - 1}}"),
                unit=unit,
                leave=False,
                file=self._stream,
            )
            with bar:
                yield bar.update
        else:
            yield self._lines(label, total, unit)

    def _lines(self, label: str, total: int | None, unit: str) -> Advance:
        done, last = 0, time.monotonic()

        def advance(rows: int) -> None:
            nonlocal done, last
            done += rows
            if done != total and time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self.say(label, f"{done} {unit}s" if total is None else f"{done} of {total} {unit}s")

        return advance


SILENT = Console(quiet=True)
