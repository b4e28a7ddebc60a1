"""Rows put together into the batches a model takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray]


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of equal shapes as one feed.

    Attributes:
        feed: input name -> array with `rows + padding` rows.
        start: position of the first row in the data.
        rows: rows that count.
        padding: copies of the last row after them, to fill the smallest batch that the model takes.
    """

    feed: Arrays
    start: int
    rows: int
    padding: int

    def own(self, array: NDArray) -> NDArray:
        """What a tensor of this batch holds for the rows that count.

        Each row may have several entries; an array whose first axis is not that of the rows stays whole.
        """
        size = self.rows + self.padding
        if not self.padding or array.ndim == 0 or len(array) % size:
            return array
        return array[: len(array) // size * self.rows]


def batches(rows: Iterable[Mapping[str, NDArray]], highest: int, lowest: int = 1) -> Iterator[Batch]:
    """Batches of up to `highest` rows in order; rows of different shapes never share one.

    Args:
        rows: feeds whose arrays have a leading axis of 1.
        highest: most rows of a batch.
        lowest: fewest rows that the model takes; smaller batches are filled up with their last row.
    """
    start = 0
    waiting: list[Mapping[str, NDArray]] = []
    for row in rows:
        if waiting and (len(waiting) == highest or _shapes(row) != _shapes(waiting[0])):
            yield _batch(waiting, start, lowest)
            start, waiting = start + len(waiting), []
        waiting.append(row)
    if waiting:
        yield _batch(waiting, start, lowest)


def single_rows(batch: Batch, *, filled: bool = False) -> Iterator[Batch]:
    """The rows that count of a batch, each as a batch of its own; the padding is left out.

    An array with several entries for each row, as activations may have, is cut accordingly; one whose first
    axis is not that of the rows stays whole.

    Args:
        filled: each is as large as the batch, filled up with copies of its row.
    """
    size = batch.rows + batch.padding
    times = size if filled else 1

    def own(array: NDArray, row: int) -> NDArray:
        if array.ndim == 0 or len(array) % size:
            return array
        each = len(array) // size
        return np.concatenate([array[row * each : (row + 1) * each]] * times)

    for row in range(batch.rows):
        feed = {name: own(array, row) for name, array in batch.feed.items()}
        yield Batch(feed, batch.start + row, 1, times - 1)


def _shapes(row: Mapping[str, NDArray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in row.items()}


def _batch(rows: list[Mapping[str, NDArray]], start: int, lowest: int) -> Batch:
    padding = max(lowest - len(rows), 0)
    padded = rows + padding * rows[-1:]
    if len(padded) == 1:
        return Batch(dict(rows[0]), start, 1, 0)
    feed = {name: np.concatenate([row[name] for row in padded]) for name in rows[0]}
    return Batch(feed, start, len(rows), padding)
