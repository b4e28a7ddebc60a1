"""Rows that two sets of samples share, and how many rows of one are different.

Rows are equal if all their inputs are. Where both sets are made by one preprocessing, what is compared is
what it is made from: for images the files' bytes, so that none is decoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from trtq.data.samples import Column, Mapped, Samples
from trtq.graph.inputs import InputSpec

_SKETCHED = 256
"""About this many values of a row are looked at first; only rows that agree in them are read whole."""

Read = Callable[[int], Any]
"""Index of a row -> what stands for one of its inputs: an array, or the hash of a file."""


class Shared(NamedTuple):
    """What two sets of samples have in common.

    Attributes:
        found: samples of the second that are in the first as well.
        total: samples of the second.
        first: first row of the first of them, in the second set and in the first, as their sources number.
        size: rows of a sample: those that make one where both sets have equally many, else 1.
    """

    found: int
    total: int
    first: tuple[int, int]
    size: int = 1


def shared_rows(samples: Samples, others: Samples) -> Shared | None:
    """The samples among `others` that are in `samples`, too; None where there are none.

    Where k rows make a sample in both, one of them alone is not shared: pairs of sentences may have one in
    common. Memory holds one row, and a few bytes for each.
    """
    size = samples.group if samples.group == others.group else 1
    pairs = [_readers(spec, samples, others) for spec in samples.specs]
    mine, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    known = np.fromiter((_sketch(mine, row, size) for row in range(0, len(samples), size)), np.int64)
    found = np.fromiter((_sketch(theirs, row, size) for row in range(0, len(others), size)), np.int64)
    where: dict[bytes, int] = {}
    for index in np.flatnonzero(np.isin(known, found)).tolist():
        where.setdefault(_digest(mine, index * size, size), index * size)
    shared = [
        (index * size, where[digest])
        for index in np.flatnonzero(np.isin(found, known)).tolist()
        if (digest := _digest(theirs, index * size, size)) in where
    ]
    if not shared:
        return None
    first = others.row_number(shared[0][0]), samples.row_number(shared[0][1])
    return Shared(len(shared), len(found), first, size)


def distinct_rows(samples: Samples, enough: int) -> int:
    """How many different rows there are; no more are looked at once there are `enough`."""
    reads = [_readers(spec, samples, samples)[0] for spec in samples.specs]
    seen: set[bytes] = set()
    for index in range(len(samples)):
        if len(seen) >= enough:
            break
        seen.add(_digest(reads, index))
    return len(seen)


def _readers(spec: InputSpec, samples: Samples, others: Samples) -> tuple[Read, Read]:
    """Functions that read an input's rows from both sets, so that equal rows give equal values."""
    first, second = samples.columns[spec.name], others.columns[spec.name]
    if isinstance(first, Mapped) and isinstance(second, Mapped) and first.function == second.function:
        one, other = (getattr(column.rows, "digest", None) for column in (first, second))
        if one is not None and other is not None:
            return one, other
        alike = np.asarray(first.rows[0]).dtype == np.asarray(second.rows[0]).dtype
        if one is None and other is None and alike:
            return first.rows.__getitem__, second.rows.__getitem__
    return _cast(first, spec), _cast(second, spec)


def _cast(column: Column, spec: InputSpec) -> Read:
    """Rows as the model takes them: the same values in another type are the same row."""
    return lambda index: np.asarray(column[index]).astype(spec.dtype)


def _sketch(reads: Sequence[Read], row: int, size: int) -> int:
    """Equal for samples of `size` rows from `row` on that are equal, and seldom for others."""
    return hash(tuple(_some(read(index)) for index in range(row, row + size) for read in reads))


def _some(value: Any) -> Any:
    if isinstance(value, bytes):
        return value
    array = np.asarray(value)
    return array.shape, array.reshape(-1)[:: max(array.size // _SKETCHED, 1)].tobytes()


def _digest(reads: Sequence[Read], row: int, size: int = 1) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for value in (read(index) for index in range(row, row + size) for read in reads):
        if isinstance(value, bytes):
            digest.update(value)
        else:
            digest.update(repr(np.shape(value)).encode())
            digest.update(np.ascontiguousarray(value).tobytes())
    return digest.digest()
