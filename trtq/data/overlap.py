"""Rows that two sets of samples share, and how many rows of one are different.

Rows are equal if all their inputs are. Where both sets are made by one preprocessing, what is compared is
what it is made from: for images the files' bytes, so that none is decoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from trtq.data.samples import Column, InputSpec, Mapped, Samples

_SKETCHED = 256
"""About this many values of a row are looked at first; only rows that agree in them are read whole."""

Read = Callable[[int], Any]
"""Index of a row -> what stands for one of its inputs: an array, or the hash of a file."""


class Shared(NamedTuple):
    """What two sets of samples have in common.

    Attributes:
        found: rows of the second that are in the first as well.
        rows: of the second.
        first: the first of them, in the second set and in the first, numbered as their sources do.
    """

    found: int
    rows: int
    first: tuple[int, int]


def shared_rows(samples: Samples, others: Samples) -> Shared | None:
    """The rows of `others` that are rows of `samples`, too; None where there are none.

    Memory holds one row, and a few bytes for each.
    """
    pairs = [_readers(spec, samples, others) for spec in samples.specs]
    mine, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    known = [_sketch(mine, index) for index in range(len(samples))]
    found = [_sketch(theirs, index) for index in range(len(others))]
    alike = set(known) & set(found)
    where: dict[bytes, int] = {}
    for index, sketch in enumerate(known):
        if sketch in alike:
            where.setdefault(_digest(mine, index), index)
    shared = [
        (index, where[digest])
        for index, sketch in enumerate(found)
        if sketch in alike and (digest := _digest(theirs, index)) in where
    ]
    if not shared:
        return None
    theirs_first, mine_first = shared[0]
    return Shared(len(shared), len(others), (others.row_number(theirs_first), samples.row_number(mine_first)))


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


def _sketch(reads: Sequence[Read], index: int) -> int:
    return hash(tuple(_some(read(index)) for read in reads))


def _some(value: Any) -> Any:
    if isinstance(value, bytes):
        return value
    array = np.asarray(value)
    return array.shape, array.reshape(-1)[:: max(array.size // _SKETCHED, 1)].tobytes()


def _digest(reads: Sequence[Read], index: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for read in reads:
        value = read(index)
        if not isinstance(value, bytes):
            digest.update(repr(np.shape(value)).encode())
            value = np.ascontiguousarray(value).tobytes()
        digest.update(value)
    return digest.digest()
