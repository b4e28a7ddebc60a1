"""The inner loop of calibration, compiled with numba: extrema and bin counts in one pass over memory."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

_CHUNK = 16384  # values that stay in the first-level caches between the two loops over them


@numba.njit(nogil=True, cache=True, boundscheck=False)
def count(
    bits: NDArray[np.int32],
    values: NDArray[np.float32],
    start: int,
    bins_per_unit: np.float32,
    limit: int,
    extrema: NDArray[np.int32],
    counts: NDArray[np.int64],
) -> int:
    """counts[floor(|v| * bins_per_unit)] += 1 for values[start:], a chunk at a time.

    Stops in front of the first chunk with a magnitude whose bits reach `limit` and returns that chunk's
    position, or `values.size` when all are counted. `extrema` becomes the lowest and highest of itself and
    of `ordered(v)` of all counted values and of that chunk. A float32's bits without the sign bit grow
    with its magnitude, so this runs on integers, where it vectorises and NaN sorts above infinity.

    Args:
        bits: int32 view of `values`, shape (n,).
    """
    while start < values.size:
        end = min(start + _CHUNK, values.size)
        low, high, largest = extrema[0], extrema[1], np.int32(0)
        for i in range(start, end):
            magnitude = bits[i] & np.int32(0x7FFFFFFF)
            ordered = bits[i] ^ ((bits[i] >> np.int32(31)) & np.int32(0x7FFFFFFF))
            largest = max(largest, magnitude)
            low = min(low, ordered)
            high = max(high, ordered)
        extrema[0], extrema[1] = low, high
        if largest >= limit:
            return start
        for i in range(start, end):
            counts[np.int64(abs(values[i]) * bins_per_unit)] += 1
        start = end
    return start
