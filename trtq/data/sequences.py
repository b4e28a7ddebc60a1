"""Rows that follow each other: a state that a model leaves at one row is its input at the next."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trtq.errors import InputError

ARRAY = "sequence"
"""The array of the data that numbers the sequences, one entry for each row."""


@dataclass(frozen=True)
class Sequences:
    """Which rows follow each other, and what goes from one to the next.

    Attributes:
        state: input -> the output whose value at a row is the input's at the next row of the sequence.
        starts: the first row of each sequence, ascending from 0; there the state is the data's own.
    """

    state: Mapping[str, str]
    starts: tuple[int, ...]

    def bounds(self, rows: int) -> list[tuple[int, int]]:
        """First row of each sequence and the row behind its last, of `rows` rows in all."""
        return list(zip(self.starts, (*self.starts[1:], rows), strict=True))

    def of(self, indices: Sequence[int], rows: int) -> Sequences | None:
        """The sequences of some rows; None unless they are whole sequences, each in its order.

        Args:
            rows: how many there are in all.
        """
        ends, starts, position = dict(self.bounds(rows)), [], 0
        while position < len(indices):
            first = indices[position]
            length = ends.get(first, first) - first
            if not length or list(indices[position : position + length]) != list(
                range(first, first + length)
            ):
                return None
            starts.append(position)
            position += length
        return Sequences(self.state, tuple(starts))

    def to_json(self) -> dict[str, object]:
        """As JSON values, for hashes."""
        return {"state": dict(self.state), "starts": list(self.starts)}


class Rows(Protocol):
    """A state's rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Starts:
    """A state's rows before any model ran: only the first row of each sequence is known."""

    def __init__(self, rows: Rows, starts: Sequence[int], name: str) -> None:
        self._rows, self._starts, self._name = rows, frozenset(starts), name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        if index not in self._starts:
            raise InputError(
                f"the state '{self._name}' of row {index} is not known before the model has run",
                remedy="run the sequences from their starts",
            )
        return self._rows[index]


def starts_of(numbers: NDArray, rows: int, source: str) -> tuple[int, ...]:
    """The first row of each sequence, from the number or name of each row's sequence.

    Raises:
        InputError: they are not one for each row, or a sequence goes on after another one.
    """
    if numbers.shape != (rows,):
        raise InputError(
            f"the array '{ARRAY}' has shape {numbers.shape} for {rows} rows",
            file=source,
            remedy="give one number for each row, the same for all rows of a sequence",
        )
    changes = (np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist()
    starts = [0, *changes]
    names = numbers[starts]
    if len(np.unique(names)) != len(names):
        again = next(name for i, name in enumerate(names) if name in names[:i])
        raise InputError(
            f"sequence {again} goes on after another sequence",
            file=source,
            remedy="put the rows of each sequence one after another, in their order",
        )
    return tuple(starts)


def number_of(row: int, starts: Sequence[int]) -> int:
    """Which sequence a row belongs to, from 0."""
    return bisect_right(starts, row) - 1
