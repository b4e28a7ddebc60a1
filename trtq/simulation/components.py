"""The components of an output: parts of different scale, which one sum of squares cannot judge together.

A detector's output may hold boxes in pixels, up to 640, and class scores up to 1 along one axis. Of all its
energy the scores have a millionth, so they can be destroyed while the output as a whole looks exact. Here the
indices along such an axis are split into groups of like scale, and each is then judged by its own energy.

The rule looks at the reference alone. It takes the largest |x| of every index along an axis (any but the
samples'), over all rows, sorts these peaks, and cuts where a peak is `GAP` times the next one or more and the
root mean squares of the two sides are as far apart.

- Scores, indices within 0...1 that reach `LEAST`, need no gap: coefficients of masks, around ±3, must not
  hide them. But every other index has to be negative somewhere or reach twice the bound, and the root mean
  squares are `GAP` apart here, too.
- Peaks up to 1 stay together, however small some are: probabilities of classes that hardly occur are no
  component of their own. So an output within -1...1 is whole, and so is one whose values along the axis are
  a distribution: not negative, with one sum everywhere.
- A cut has to follow a deliberate layout, such as 4 boxes before 80 scores, or x, y, visibility over
  and over: along the axis, almost all runs of one side are of a few lengths. Channels that are weak or strong
  because training made them so are scattered.
- A minority of small values has to reach `LEAST`: scores that say something do, channels that died do not.
- A side with fewer than 1 of `HANDFUL` indices is an outlier, as embeddings have them, unless it is one
  block: of 3 or more indices, of 2 at an end of the axis, or of 1 where the small side are scores (within
  0...1): a large one at an end, or a lone score among large values that are alike.
- An index says nothing of scale if it is zero everywhere, or as far below the largest as float32 rounding
  (`RESIDUE`); nor does a small one that is constant. Such indices belong to the smallest group.
- An axis whose indices have fewer than `FEWEST_VALUES` values each is never split: peaks of that few say
  nothing. Where several axes could be split, the one with the widest gap is.

What this cannot see: scales other than scores that pass into each other without a gap (70, 20, 5), scales
within -1...1, components along two axes at once, and integers, which are always whole. An outlier among up to
`HANDFUL` channels cannot be told from a component, and is taken for one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

GAP = 10.0
"""The least factor between the peaks of neighbouring groups."""

BOUND = 1.0
"""Peaks up to this are one component."""

HANDFUL = 32
"""A group of fewer than 1 of this many indices is an outlier unless its place says otherwise."""

RESIDUE = 1e-7
"""Peaks below this share of the largest are rounding."""

CONSTANT = 1e-3
"""Values that differ by less than this share of their peak are a constant."""

LEAST = 0.1
"""What a minority of small values reaches where it is more than channels that died."""

FEWEST_VALUES = 8
"""Values of each index that its peak is taken from, at least."""

_RUN_KINDS, _LAID_OUT = 3, 0.9
"""Runs along the axis are a layout if this share of them is of this many kinds (side and length)."""

_LIKE = 30.0
"""Values that a lone score stands among are alike if their peaks are within this factor."""

_LISTED = 4
"""Ranges of indices that a label names."""

Mask = NDArray[np.bool_]
Vector = NDArray[np.float64]
"""Of each index along an axis."""


@dataclass(frozen=True)
class Components:
    """How an output is split; one group and no axis where it is whole.

    Attributes:
        axis: the axis, 1 or more; None: whole.
        indices: of each group along that axis, ascending; the group of the largest values first.
        peaks: largest |x| of each group.
    """

    axis: int | None = None
    indices: tuple[NDArray[np.intp], ...] = ()
    peaks: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.indices) or 1

    def parts(self, array: NDArray) -> list[NDArray]:
        """The groups' values, the axis of samples kept; the array itself where it is whole."""
        if self.axis is None:
            return [array]
        return [array.take(indices, self.axis) for indices in self.indices]

    def labels(self) -> list[str]:
        """The indices of each group and how large its values are; nothing where the output is whole."""
        return [
            f"{_ranges(indices)} of axis {self.axis} (up to {peak:.4g})"
            for indices, peak in zip(self.indices, self.peaks, strict=True)
        ]


WHOLE = Components()


def components(batches: Sequence[NDArray]) -> Components:
    """The components of one output of the reference; see the module for the rule.

    Args:
        batches: the output's batches, samples first, of equal rank; an axis whose length changes from batch
            to batch is not split.
    """
    first = batches[0]
    if first.dtype.kind != "f":
        return WHOLE
    peak = np.max([[batch.max(initial=0.0), -batch.min(initial=0.0)] for batch in batches])
    if not BOUND < peak < np.inf:  # NaN is neither
        return WHOLE
    best, widest = WHOLE, 0.0
    for axis in range(1, first.ndim):
        length, size = first.shape[axis], sum(batch.size for batch in batches)
        if any(batch.shape[axis] != length for batch in batches) or size < length * FEWEST_VALUES:
            continue
        found, gap = _split(batches, axis)
        if gap > widest and not _distribution(batches, axis):
            best, widest = found, gap
    return best


def _split(batches: Sequence[NDArray], axis: int) -> tuple[Components, float]:
    """The groups along an axis and the widest gap between them; `WHOLE` and 0 where there is one group."""
    others = tuple(i for i in range(batches[0].ndim) if i != axis)
    highest = np.max([b.max(axis=others, initial=-np.inf) for b in batches], axis=0).astype(np.float64)
    lowest = np.min([b.min(axis=others, initial=np.inf) for b in batches], axis=0).astype(np.float64)
    peaks = np.maximum(highest, -lowest)
    cuts = [*_gaps(peaks, lowest, highest), *_scores(peaks, lowest, highest)]
    if not cuts:
        return WHOLE, 0.0
    values = _Values(peaks, lowest, np.sum([_energy(batch, axis) for batch in batches], axis=0))
    made = [large for large in cuts if _is_made(values, large)]
    if not made:
        return WHOLE, 0.0
    sides = np.stack(made, axis=1)
    groups = [np.flatnonzero((sides == side).all(axis=1)) for side in np.unique(sides, axis=0)]
    groups.sort(key=lambda own: -peaks[own].max())
    widest = max(peaks[large].max() / peaks[~large].max() for large in made)
    return Components(axis, tuple(groups), tuple(float(peaks[own].max()) for own in groups)), float(widest)


def _gaps(peaks: Vector, lowest: Vector, highest: Vector) -> Iterator[Mask]:
    """The indices of large values at each gap between the sorted peaks."""
    order = np.argsort(-peaks, kind="stable")
    order = order[peaks[order] > RESIDUE * peaks.max()]
    upper, lower = peaks[order[:-1]], peaks[order[1:]]
    wide = (upper >= GAP * lower) & (upper > BOUND) & _vary(peaks, lowest, highest)[order[1:]]
    yield from (peaks >= bound for bound in upper[wide])


def _scores(peaks: Vector, lowest: Vector, highest: Vector) -> Iterator[Mask]:
    """The indices that are not scores, where there are scores that can be told from all others."""
    scores = (lowest >= 0) & (peaks <= BOUND)
    doubtful = (lowest >= 0) & ~scores & (peaks < 2 * BOUND)
    if (scores & _vary(peaks, lowest, highest) & (peaks >= LEAST)).any() and not (
        doubtful.any() or scores.all()
    ):
        yield ~scores


def _vary(peaks: Vector, lowest: Vector, highest: Vector) -> Mask:
    """Which indices have more than one value."""
    return highest - lowest > CONSTANT * peaks


@dataclass(frozen=True)
class _Values:
    """The values of each index along an axis.

    Attributes:
        peaks: the largest |x|.
        lowest: the smallest x.
        energy: the sum of x².
    """

    peaks: Vector
    lowest: Vector
    energy: Vector


def _energy(batch: NDArray, axis: int) -> Vector:
    every = list(range(batch.ndim))
    return np.einsum(batch, every, batch, every, [axis], dtype=np.float64)


def _is_made(values: _Values, large: Mask) -> bool:
    """Whether a cut between the indices of large values and the others is a deliberate layout."""
    if values.energy[large].mean() < GAP**2 * values.energy[~large].mean():
        return False
    runs = [(bool(side), len(list(run))) for side, run in groupby(large)]
    common = sum(count for _, count in Counter(runs).most_common(_RUN_KINDS))
    if common < _LAID_OUT * len(runs):
        return False
    few = large if 2 * large.sum() < large.size else ~large
    top, count = values.peaks[~large].max(), int(few.sum())
    if few is not large and 2 * count < large.size and top < LEAST:
        return False
    if HANDFUL * count >= large.size:
        return True
    if count > 1:
        return len(runs) == 2 or (count > 2 and len(runs) == 3)
    if values.lowest[~large].min() < 0 or top > BOUND:
        return False
    if few is large:
        return bool(few[0] or few[-1])
    return bool(values.peaks[large].max() <= _LIKE * values.peaks[large].min())


def _distribution(batches: Sequence[NDArray], axis: int) -> bool:
    """Whether the values along an axis are never negative and have the same sum everywhere."""
    if any(batch.min(initial=0.0) < 0 for batch in batches):
        return False
    sums = np.concatenate([batch.sum(axis=axis, dtype=np.float64).ravel() for batch in batches])
    return bool(sums.max() - sums.min() <= 1e-3 * sums.max())


def _ranges(indices: NDArray[np.intp]) -> str:
    """Such as "channels 0-3, 7"; of many ranges the first few and how many indices there are."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    runs = [(int(run[0]), int(run[-1])) for run in np.split(indices, breaks)]
    texts = [f"{low}-{high}" if low < high else f"{low}" for low, high in runs]
    more = f", ... ({len(indices)} in all)" if len(texts) > _LISTED else ""
    return f"{'channels' if len(indices) > 1 else 'channel'} {', '.join(texts[:_LISTED])}{more}"
