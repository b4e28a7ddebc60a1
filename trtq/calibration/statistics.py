"""Statistics of tensors: mergeable histograms of |x| whose result depends on the values alone.

A histogram covers [0, 2^exponent), the smallest power of two above the largest |x| seen, with 8192 equal
bins. Those below the 128th are split further, since the bulk may lie thousands of times below the largest
value: each octave (from one power of two to the next) has 128 bins of its own there, as it has from the 128th
equal bin to the 256th. 32 octaves are split like that; what is smaller, by 2^-38 of the range, is one bin.

When a larger value arrives the range doubles: equal bins merge in pairs, octaves move down by one, and the
lowest joins the bin of the smallest. Each bin lies in one of the wider range's, so that this is exact.
Counts are integers, so adding samples in any order, in batches of any size or in shards that are merged later
gives the same histogram to the bit. At least half of the equal bins (4096) lie below the largest |x|, and no
bin but the first is wider than 1/128 of the values in it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtq.arrays import read_arrays
from trtq.errors import InputError
from trtq.files import PathLike, read_bytes, write_bytes

EQUAL_BITS = 13
"""The range has 2^13 bins of equal width, but for those that octaves split."""

OCTAVE_BITS = 7
"""An octave has 2^7 bins; the equal bins from there on are at least as fine."""

OCTAVES = 32
"""How many octaves have bins of their own below those of the equal bins."""

BINS = 1 + (OCTAVES << OCTAVE_BITS) + (1 << EQUAL_BITS) - (1 << OCTAVE_BITS)

LANES = 8
"""Slots of the lowest bin, which holds the zeros; a power of two (see `kernels.count`)."""

_LOWEST_EXPONENT = EQUAL_BITS - OCTAVE_BITS + OCTAVES - 126  # the lowest octave is of normal float32

FEW = 4096
"""Values that a histogram keeps as they are before it counts them: a model of 20,000 small tensors would need
gigabytes of bins, nearly all empty."""

FORMAT = "trtq-statistics-3"


def _edges() -> NDArray[np.float64]:
    """Edges of the bins in widths of an equal bin, shape (BINS + 1,)."""
    inside = 1 + np.arange(1 << OCTAVE_BITS) / (1 << OCTAVE_BITS)
    octaves = 2.0 ** np.arange(OCTAVE_BITS - OCTAVES, OCTAVE_BITS)
    equal = np.arange(1 << OCTAVE_BITS, (1 << EQUAL_BITS) + 1)
    return np.concatenate([[0.0], np.outer(octaves, inside).ravel(), equal])


_EDGES = _edges()
_EQUAL = np.searchsorted(_EDGES, np.arange(1 << EQUAL_BITS))
"""Index of the first bin in each of the equal ones."""


class NonFiniteError(ValueError):
    """The array added to a histogram holds NaN or an infinity."""


@dataclass(slots=True)
class Histogram:
    """Counts of |x| in `BINS` bins over [0, 2**exponent), with the exact signed minimum and maximum.

    What is held is small where little was seen: the bins that are not empty; of the first `FEW` values that
    are added, the values; all bins only from then on. The counts do not depend on that.

    Attributes:
        exponent: the power of two that bounds |x|.
    """

    exponent: int = _LOWEST_EXPONENT
    _extrema: NDArray[np.int32] = field(default_factory=lambda: _extrema_of(math.inf, -math.inf))
    _bins: NDArray[np.uint16] = field(default_factory=lambda: np.zeros(0, np.uint16))
    _numbers: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    _few: list[NDArray[np.float32]] = field(default_factory=list)
    _waiting: int = 0  # values among the few
    _seen: tuple[float, float] = (math.inf, -math.inf)  # what the few lie between; not wider than the extrema
    _slots: NDArray[np.int64] | None = None  # (LANES - 1 + BINS,): the counts behind the kernel's zeros

    @classmethod
    def of(cls, counts: NDArray[np.int64], exponent: int, low: float, high: float) -> Histogram:
        """A histogram of these counts, int64 (BINS,)."""
        bins = np.flatnonzero(counts)
        return cls.of_bins(bins.astype(np.uint16), counts[bins], exponent, low, high)

    @classmethod
    def of_bins(
        cls, bins: NDArray[np.uint16], numbers: NDArray[np.int64], exponent: int, low: float, high: float
    ) -> Histogram:
        """A histogram of the bins that are not empty, ascending, with how many values lie in each."""
        return cls(exponent, _extrema_of(low, high), bins, numbers)

    @property
    def low(self) -> float:
        """The smallest x; +inf before the first value."""
        return float(_ordered(self._extrema).view(np.float32)[0]) + 0.0  # -0.0 becomes 0.0

    @property
    def high(self) -> float:
        """The largest x; -inf before the first value."""
        return float(_ordered(self._extrema).view(np.float32)[1]) + 0.0

    @property
    def counts(self) -> NDArray[np.int64]:
        """int64 (BINS,), read-only; bin i counts edges[i] <= |x| < edges[i + 1]."""
        counts = (self._all_slots() if self._slots is None else self._slots)[LANES - 1 :]
        counts.flags.writeable = False
        return counts

    @property
    def occupied(self) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """The bins that are not empty, ascending, and how many values lie in each."""
        if self._slots is None and not self._few:
            return self._bins, self._numbers
        counts = self.counts
        bins = np.flatnonzero(counts)
        return bins.astype(np.uint16), counts[bins]

    @property
    def edges(self) -> NDArray[np.float64]:
        """float64 (BINS + 1,), from 0 to 2**exponent in the tensor's unit, exact."""
        return _EDGES * math.ldexp(1.0, self.exponent - EQUAL_BITS)

    @property
    def amax(self) -> float:
        """Largest |x| seen, exact; 0.0 before the first value."""
        return max(0.0, -self.low, self.high)

    @property
    def total(self) -> int:
        """Number of values seen."""
        counted = self._numbers if self._slots is None else self._slots
        return int(counted.sum()) + self._waiting

    def equal_counts(self) -> NDArray[np.int64]:
        """Counts in 2**EQUAL_BITS bins of equal width over [0, 2**exponent)."""
        return np.add.reduceat(self.counts, _EQUAL)

    def add(self, values: NDArray[np.floating]) -> None:
        """Count every value of a float array of any shape.

        Raises:
            NonFiniteError: a value is NaN or infinite; the histogram is of no further use.
        """
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        if self._slots is None and not self._bins.size and self._waiting + flat.size <= FEW:
            self._keep(flat)
            return
        if self._slots is None:
            self._slots = self._all_slots()
            self._bins, self._numbers = self._bins[:0], self._numbers[:0]
            self._few, self._waiting = [], 0
        self._count(flat)

    def merge(self, other: Histogram) -> None:
        """Add the counts of `other`: exactly the histogram of both sets of values together."""
        exponent = max(self.exponent, other.exponent)
        if not self.total:
            self._bins, self._numbers = other.occupied
        elif not other.total:
            self._bins, self._numbers = self.occupied
        else:
            counts = _widened(self.counts, exponent - self.exponent)
            counts = counts + _widened(other.counts, exponent - other.exponent)
            bins = np.flatnonzero(counts)
            self._bins, self._numbers = bins.astype(np.uint16), counts[bins]
        self._few, self._waiting, self._slots, self.exponent = [], 0, None, exponent
        self._extrema = _extrema_of(min(self.low, other.low), max(self.high, other.high))

    def _keep(self, flat: NDArray[np.float32]) -> None:
        """Add values to the few."""
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())  # NaN where one is
        if not (math.isfinite(low) and math.isfinite(high)):
            raise _not_finite(flat)
        if low < self._seen[0] or high > self._seen[1]:
            self._seen = min(self.low, low), max(self.high, high)
            self._extrema = _extrema_of(*self._seen)
            if self.amax >= math.ldexp(1.0, self.exponent):
                self.exponent = _exponent_above(self.amax)
        self._few.append(flat.copy())
        self._waiting += flat.size

    def _all_slots(self) -> NDArray[np.int64]:
        """The slots of what is held."""
        made = Histogram(self.exponent, self._extrema.copy(), _slots=np.zeros(LANES - 1 + BINS, np.int64))
        assert made._slots is not None
        made._slots[LANES - 1 + self._bins.astype(np.intp)] = self._numbers
        if self._few:
            made._count(np.concatenate(self._few))
        return made._slots

    def _count(self, flat: NDArray[np.float32]) -> None:
        """Count values in the slots."""
        from trtq.calibration import kernels

        assert self._slots is not None
        position = kernels.count(flat, 0, self.exponent, self._extrema, self._slots)
        while position < flat.size:
            if not (math.isfinite(self.low) and math.isfinite(self.high)):
                raise _not_finite(flat)
            self._widen(_exponent_above(self.amax))
            position = kernels.count(flat, position, self.exponent, self._extrema, self._slots)

    def _widen(self, exponent: int) -> None:
        """Double the range of the slots until it reaches 2**exponent."""
        assert self._slots is not None
        counts = self._slots[LANES - 1 :]
        counts[:] = _widened(counts, exponent - self.exponent)
        self.exponent = exponent


def _widened(counts: NDArray[np.int64], shift: int) -> NDArray[np.int64]:
    """Counts, int64 (BINS,), over a range that is doubled `shift` times; each bin joins the one it then lies
    in."""
    if shift <= 0 or not counts.any():
        return counts
    target = np.searchsorted(_EDGES, np.ldexp(_EDGES[:-1], -shift), side="right") - 1
    first = np.flatnonzero(np.diff(target, prepend=-1))
    made = np.zeros_like(counts)
    made[target[first]] = np.add.reduceat(counts, first)
    return made


def _not_finite(flat: NDArray[np.float32]) -> NonFiniteError:
    return NonFiniteError(f"{np.count_nonzero(~np.isfinite(flat))} of {flat.size} values")


def _ordered(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """Float32 bits as integers of the same order, and back (it is its own inverse)."""
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def _extrema_of(low: float, high: float) -> NDArray[np.int32]:
    """Two float32 values as `kernels.count` has them."""
    return _ordered(np.array([low, high], np.float32).view(np.int32))


def _exponent_above(amax: float) -> int:
    """Smallest e with amax < 2**e, but at least the lowest exponent."""
    return max(math.frexp(amax)[1], _LOWEST_EXPONENT)


@dataclass
class Statistics:
    """Histograms by tensor name; one object per (model, data), saved as one `.npz`.

    Attributes:
        histograms: tensor name -> `Histogram`.
        rows: number of rows of data that were run.
    """

    histograms: dict[str, Histogram]
    rows: int = 0

    @classmethod
    def empty(cls, tensors: Any) -> Statistics:
        """Statistics of no data for the named tensors."""
        return cls({name: Histogram() for name in tensors})

    def merge(self, other: Statistics) -> None:
        """Add a shard: exactly the statistics of both sets of rows together.

        Raises:
            ValueError: the shards are of different tensors.
        """
        if self.histograms.keys() != other.histograms.keys():
            raise ValueError("statistics of different tensors do not add up")
        for name, histogram in self.histograms.items():
            histogram.merge(other.histograms[name])
        self.rows += other.rows

    def to_bytes(self) -> bytes:
        """The `.npz` file's bytes; equal statistics give equal bytes."""
        items = sorted(self.histograms.items())
        occupied = [histogram.occupied for _, histogram in items]
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            format=np.array(FORMAT),
            rows=np.array(self.rows, np.int64),
            tensors=np.array([name for name, _ in items], dtype=np.str_),
            exponents=np.array([h.exponent for _, h in items], np.int32),
            lows=np.array([h.low for _, h in items], np.float64),
            highs=np.array([h.high for _, h in items], np.float64),
            sizes=np.array([bins.size for bins, _ in occupied], np.int64),
            bins=np.concatenate([np.zeros(0, np.uint16), *(bins for bins, _ in occupied)]),
            counts=np.concatenate([np.zeros(0, np.int64), *(numbers for _, numbers in occupied)]),
        )
        return buffer.getvalue()

    def save(self, path: PathLike) -> None:
        """Write the statistics to `path` (`.npz`) in one move."""
        write_bytes(path, self.to_bytes())

    @classmethod
    def from_bytes(cls, content: bytes) -> Statistics:
        """Statistics from the bytes of their `.npz`.

        Raises:
            ValueError: they are not statistics of this format.
        """
        try:
            arrays = read_arrays(content)
            found = str(arrays["format"]) if "format" in arrays else None
            statistics = cls._from_arrays(arrays) if found == FORMAT else None
        except Exception as error:  # zipfile, zlib and numpy each raise their own
            raise ValueError(f"not statistics of trtq: {error!r}") from error
        if found is None:
            raise ValueError("not statistics of trtq: they name no format")
        if statistics is None:
            raise ValueError(f"the format is {found}, not {FORMAT}: collect them again")
        return statistics

    @classmethod
    def _from_arrays(cls, arrays: Mapping[str, NDArray]) -> Statistics:
        bins, counts, sizes = arrays["bins"], arrays["counts"], arrays["sizes"]
        exponents = arrays["exponents"]
        if not (bins.ndim == counts.ndim == 1 and len(bins) == len(counts) == sizes.sum()):
            raise ValueError(f"{len(bins)} bins and {len(counts)} counts are said to be {sizes.sum()}")
        if ((exponents < _LOWEST_EXPONENT) | (exponents > 128)).any() or (counts <= 0).any():
            raise ValueError("an exponent or a count is out of its range")
        if (sizes < 0).any() or (bins >= BINS).any():
            raise ValueError("a bin is out of its range")
        ends = np.cumsum(sizes)
        columns = zip(arrays["tensors"], exponents, arrays["lows"], arrays["highs"], ends, sizes, strict=True)
        histograms = {}
        for name, exponent, low, high, end, size in columns:
            part = slice(end - size, end)
            if (np.diff(bins[part].astype(np.int32)) <= 0).any():
                raise ValueError(f"the bins of {name} do not ascend")
            histograms[str(name)] = Histogram.of_bins(
                bins[part], counts[part], int(exponent), float(low), float(high)
            )
        return cls(histograms, int(arrays["rows"]))

    @classmethod
    def load(cls, path: PathLike) -> Statistics:
        """Read statistics from an `.npz`.

        Raises:
            InputError: the file is missing, damaged or not statistics.
        """
        try:
            return cls.from_bytes(read_bytes(path))
        except (OSError, ValueError) as error:
            raise InputError("cannot read the statistics", file=path, cause=error) from error
