"""What a model gives for every sample, of any shape: an array where the samples stack, else a list of arrays.

Either way `values[i]` is what row i of the samples gave, without a batch axis where the model has one. Boxes
behind a NonMaxSuppression are such a list: each sample has as many as were found in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray | list[NDArray]
"""One output, rows first."""

AllValues = Mapping[str, Values]
"""Output name -> its values; all of one length."""


def stacked(rows: Sequence[NDArray]) -> Values:
    """The rows' values as one array where all have one shape, else as a list."""
    return np.stack(rows) if len({row.shape for row in rows}) == 1 else list(rows)


def joined(parts: Sequence[Values]) -> Values:
    """The values of consecutive rows as those of all of them.

    Where one part found its values to have a batch axis of 1 and another did not, none has: as many boxes as
    rows may be found by chance.
    """
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts) and len({part.shape[1:] for part in arrays}) == 1:
        return np.concatenate(arrays)
    rank = max(map(rank_of, parts))
    return stacked([row[None] if row.ndim == rank - 1 else row for part in parts for row in part])


def batches_of(values: Values) -> list[NDArray]:
    """The values as arrays with an axis of rows: one of all rows, or one for each row."""
    return [values] if isinstance(values, np.ndarray) else [np.asarray(row)[None] for row in values]


def paired(one: Values, other: Values) -> tuple[Values, Values]:
    """Two models' values of one output as they are compared: two arrays of one shape, or two lists of rows.

    A row that has a batch axis in one list and none in the other, as `joined` says, has one in both.
    """
    both = [one, other]
    if all(isinstance(own, np.ndarray) for own in both) and np.shape(one)[1:] == np.shape(other)[1:]:
        return one, other
    rank = max(map(rank_of, both))
    lists = [[row[None] if row.ndim == rank - 1 else row for row in map(np.asarray, own)] for own in both]
    return lists[0], lists[1]


def same_shapes(one: Values, other: Values) -> NDArray[np.bool_]:
    """Of each row, whether it has the same shape in both."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.full(len(one), one.shape[1:] == other.shape[1:])
    return np.array([np.shape(a) == np.shape(b) for a, b in zip(one, other, strict=True)], np.bool_)


def each(function: Callable[..., Any], *values: Values) -> Any:
    """What a function makes of arrays, row by row where one of them is a list; then it is a list of those."""
    if all(isinstance(value, np.ndarray) for value in values):
        return function(*values)
    return [function(*rows) for rows in zip(*values, strict=True)]


def take(values: Values, rows: Sequence[int] | NDArray[np.int64]) -> Values:
    """The values of some rows, in the given order."""
    return values[np.asarray(rows)] if isinstance(values, np.ndarray) else [values[i] for i in rows]


def take_all(values: AllValues, rows: Sequence[int] | NDArray[np.int64]) -> dict[str, Values]:
    """`take` of every output."""
    return {name: take(own, rows) for name, own in values.items()}


def nbytes(values: Values) -> int:
    """Bytes of all rows."""
    return sum(batch.nbytes for batch in batches_of(values))


def dtype_of(values: Values) -> np.dtype:
    """The datatype of all rows."""
    return values.dtype if isinstance(values, np.ndarray) else values[0].dtype


def rank_of(values: Values) -> int:
    """The highest rank of a row."""
    return values.ndim - 1 if isinstance(values, np.ndarray) else max(row.ndim for row in values)


def shape_text(values: Values) -> str:
    """The shape of one row; of several shapes the smallest and largest size of each axis."""
    shapes = {row.shape for row in values}
    if len(shapes) == 1:
        return str(shapes.pop())
    if len({len(shape) for shape in shapes}) > 1:
        return "of different ranks"
    ranges = [(min(sizes), max(sizes)) for sizes in zip(*shapes, strict=True)]
    return "(" + ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in ranges) + ")"


def packed(values: list[NDArray]) -> dict[str, NDArray]:
    """A list of arrays as three arrays that `unpacked` makes it from."""
    return {
        "values": np.concatenate([row.ravel() for row in values]),
        "ranks": np.array([row.ndim for row in values], np.int64),
        "sizes": np.array([size for row in values for size in row.shape], np.int64),
    }


def unpacked(stored: Mapping[str, NDArray]) -> list[NDArray]:
    """The inverse of `packed`."""
    ends = np.cumsum(stored["ranks"])
    shapes = [tuple(sizes.tolist()) for sizes in np.split(stored["sizes"], ends[:-1])]
    counts = np.cumsum([int(np.prod(shape)) for shape in shapes])
    flat = np.split(stored["values"], counts[:-1])
    return [part.reshape(shape) for part, shape in zip(flat, shapes, strict=True)]
