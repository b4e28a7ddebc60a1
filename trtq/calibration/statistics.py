"""Statistics of tensors: mergeable histograms of |x| whose result depends on the values alone.

A histogram has `BINS` equal bins over [0, 2^exponent), the smallest power of two above the largest
|x| seen. When a larger value arrives the range doubles and neighbouring bins merge, which is exact:
floor(floor(t) / 2) = floor(t / 2). Counts are integers, so adding samples in any order, in batches of
any size or in shards that are merged later gives the same histogram to the bit, and at least half of
the bins (4096) lie below the largest |x|.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtq.errors import InputError
from trtq.files import PathLike, write_bytes

BINS = 8192
_LOWEST_EXPONENT = -100  # BINS / 2^exponent must stay a finite float32

FORMAT = "trtq-statistics-1"


class NonFiniteError(ValueError):
    """The array added to a histogram holds NaN or an infinity."""


@dataclass(slots=True)
class Histogram:
    """Counts of |x| in `BINS` bins over [0, 2**exponent), with the exact signed minimum and maximum.

    Attributes:
        counts: int64 (BINS,); bin i counts i <= |x| * BINS / 2**exponent < i + 1.
        exponent: the power of two that bounds |x|.
        low, high: the smallest and largest x; +inf and -inf before the first value.
    """

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    exponent: int = _LOWEST_EXPONENT
    low: float = math.inf
    high: float = -math.inf

    @property
    def amax(self) -> float:
        """Largest |x| seen, exact; 0.0 before the first value."""
        return max(0.0, -self.low, self.high)

    @property
    def total(self) -> int:
        """Number of values seen."""
        return int(self.counts.sum())

    @property
    def bin_width(self) -> float:
        """Width of a bin in the tensor's unit."""
        return math.ldexp(1.0, self.exponent) / BINS

    def add(self, values: NDArray[np.floating]) -> None:
        """Count every value of a float array of any shape.

        Raises:
            NonFiniteError: a value is NaN or infinite; the histogram is of no further use.
        """
        from trtq.calibration import kernels

        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        extrema = _ordered(np.array([self.low, self.high], np.float32).view(np.int32))
        position = 0
        while True:
            limit = _bits_of_power(self.exponent)
            scale = np.float32(1 / self.bin_width)
            position = kernels.count(flat.view(np.int32), flat, position, scale, limit, extrema, self.counts)
            low, high = (float(x) + 0.0 for x in _ordered(extrema).view(np.float32))  # -0.0 becomes 0.0
            if not (math.isfinite(low) and math.isfinite(high)) and flat.size:
                raise NonFiniteError(f"{np.count_nonzero(~np.isfinite(flat))} of {flat.size} values")
            self.low, self.high = low, high
            if position == flat.size:
                return
            self._widen(_exponent_above(self.amax))

    def merge(self, other: Histogram) -> None:
        """Add the counts of `other`: exactly the histogram of both sets of values together."""
        self._widen(other.exponent)
        widened = Histogram(other.counts.copy(), other.exponent)
        widened._widen(self.exponent)
        self.counts += widened.counts
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def _widen(self, exponent: int) -> None:
        """Double the range until it reaches 2**exponent; each doubling merges pairs of bins."""
        shift = exponent - self.exponent
        if shift <= 0:
            return
        self.exponent = exponent
        merged = min(shift, BINS.bit_length() - 1)
        sums = self.counts.reshape(-1, 1 << merged).sum(axis=1)
        self.counts[:] = 0
        self.counts[: sums.size] = sums


def _ordered(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """Float32 bits as integers of the same order, and back (it is its own inverse)."""
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def _bits_of_power(exponent: int) -> int:
    """Bits of the float32 2**exponent, exponent in -126 ... 128 (infinity)."""
    return (exponent + 127) << 23


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
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            format=np.array(FORMAT),
            rows=np.array(self.rows, np.int64),
            tensors=np.array([name for name, _ in items], dtype=np.str_),
            exponents=np.array([h.exponent for _, h in items], np.int32),
            lows=np.array([h.low for _, h in items], np.float64),
            highs=np.array([h.high for _, h in items], np.float64),
            counts=np.array([h.counts for _, h in items], np.int64).reshape(len(items), BINS),
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
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return cls._from_arrays(dict(arrays))
        except Exception as error:  # zipfile, zlib and numpy each raise their own
            raise ValueError(f"not statistics of trtq: {error!r}") from error

    @classmethod
    def _from_arrays(cls, arrays: Mapping[str, NDArray]) -> Statistics:
        if str(arrays["format"]) != FORMAT:
            raise ValueError(f"the format is {arrays['format']}, not {FORMAT}")
        counts = arrays["counts"].astype(np.int64)
        if counts.ndim != 2 or counts.shape[1] != BINS:
            raise ValueError(f"counts have shape {counts.shape}, not (tensors, {BINS})")
        columns = zip(arrays["tensors"], arrays["exponents"], arrays["lows"], arrays["highs"], strict=True)
        return cls(
            {
                str(name): Histogram(counts[i], int(exponent), float(low), float(high))
                for i, (name, exponent, low, high) in enumerate(columns)
            },
            int(arrays["rows"]),
        )

    @classmethod
    def load(cls, path: PathLike) -> Statistics:
        """Read statistics from an `.npz`.

        Raises:
            InputError: the file is missing, damaged or not statistics.
        """
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise InputError("cannot read the statistics", file=path, cause=error) from error
