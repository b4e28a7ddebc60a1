"""The inner loop of calibration, compiled with numba: extrema and bin counts in one pass over memory."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

_CHUNK = 4096  # values that stay in the first-level cache between the two loops over them


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
    of `ordered(v)` of all counted values and of that chunk: a float32's bits as integers of the same order,
    which vectorise, and where NaN lies outside the infinities.

    Both loops run over slices from their start: numba checks an index that may be negative at every access.

    Args:
        bits: int32 view of `values`, shape (n,).
    """
    while start < values.size:
        end = min(start + _CHUNK, values.size)
        low, high = extrema[0], extrema[1]
        chunk = bits[start:end]
        for i in range(chunk.size):
            ordered = chunk[i] ^ ((chunk[i] >> np.int32(31)) & np.int32(0x7FFFFFFF))
            low = min(low, ordered)
            high = max(high, ordered)
        extrema[0], extrema[1] = low, high
        if max(high, ~low) >= limit:  # ~ordered(v) are the bits of |v| for a negative v
            return start
        part = values[start:end]
        for i in range(part.size):
            counts[np.uint32(abs(part[i]) * bins_per_unit)] += 1
        start = end
    return start
