"""Rows put together into the batches a model takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray]

Axes = Mapping[str, int | None]
"""Input name -> its batch axis; None: it has none. Arrays that are not named have theirs first."""


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of equal shapes as one feed.

    Attributes:
        feed: input name -> array with `rows + padding` rows.
        start: position of the first row in the data.
        rows: rows that count.
        padding: copies of the last row after them, to fill the smallest batch that the model takes.
        axes: where the feed's arrays have their rows.
    """

    feed: Arrays
    start: int
    rows: int
    padding: int
    axes: Axes = field(default_factory=dict)

    def own(self, array: NDArray) -> NDArray:
        """What a tensor of this batch holds for the rows that count.

        Each row may have several entries; an array whose first axis is not that of the rows stays whole.
        """
        size = self.rows + self.padding
        if not self.padding or array.ndim == 0 or len(array) % size:
            return array
        return array[: len(array) // size * self.rows]


def batches(
    rows: Iterable[Mapping[str, NDArray]], highest: int, lowest: int = 1, axes: Axes | None = None
) -> Iterator[Batch]:
    """Batches of up to `highest` rows in order.

    Rows of different shapes never share one, nor rows that differ in an input without a batch axis.

    Args:
        rows: feeds of one row each.
        highest: most rows of a batch.
        lowest: fewest rows that the model takes; smaller batches are filled up with their last row.
        axes: of the inputs.
    """
    start = 0
    axes = axes or {}
    waiting: list[Mapping[str, NDArray]] = []
    for row in rows:
        if waiting and (len(waiting) == highest or not _may_share(row, waiting[0], axes)):
            yield _batch(waiting, start, lowest, axes)
            start, waiting = start + len(waiting), []
        waiting.append(row)
    if waiting:
        yield _batch(waiting, start, lowest, axes)


def repeated(row: Mapping[str, NDArray], times: int, axes: Axes) -> Batch:
    """A batch of one row several times."""
    return _batch([row] * times, 0, 1, axes)


def single_rows(batch: Batch, *, filled: bool = False) -> Iterator[Batch]:
    """The rows that count of a batch, each as a batch of its own; the padding is left out.

    An array with several entries for each row, as activations may have, is cut accordingly; one whose first
    axis is not that of the rows stays whole.

    Args:
        filled: each is as large as the batch, filled up with copies of its row.
    """
    size = batch.rows + batch.padding
    times = size if filled else 1

    def own(name: str, array: NDArray, row: int) -> NDArray:
        axis = batch.axes.get(name, 0)
        if axis is None or array.ndim == 0 or array.shape[axis] % size:
            return array
        each = array.shape[axis] // size
        part = array.take(range(row * each, (row + 1) * each), axis)
        return np.concatenate([part] * times, axis)

    for row in range(batch.rows):
        feed = {name: own(name, array, row) for name, array in batch.feed.items()}
        yield Batch(feed, batch.start + row, 1, times - 1, batch.axes)


def _may_share(row: Mapping[str, NDArray], other: Mapping[str, NDArray], axes: Axes) -> bool:
    """Whether two rows fit into one batch."""
    return all(
        array.shape == row[name].shape and (axes.get(name, 0) is not None or np.array_equal(array, row[name]))
        for name, array in other.items()
    )


def _batch(rows: list[Mapping[str, NDArray]], start: int, lowest: int, axes: Axes) -> Batch:
    padding = max(lowest - len(rows), 0)
    padded = rows + padding * rows[-1:]
    if len(padded) == 1:
        return Batch(dict(rows[0]), start, 1, 0, axes)
    feed = {name: _together([row[name] for row in padded], axes.get(name, 0)) for name in rows[0]}
    return Batch(feed, start, len(rows), padding, axes)


def _together(arrays: list[NDArray], axis: int | None) -> NDArray:
    return arrays[0] if axis is None else np.concatenate(arrays, axis)
