"""The inner loops of calibration, compiled with numba: each is one pass over memory."""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import int32
from numpy.typing import NDArray

from trtq.calibration.statistics import EQUAL_BITS, LANES, OCTAVE_BITS, OCTAVES

# Numba compiles these in. Its cache on disk notices a change of this file, not of theirs.
_SHIFT = int32(23 - OCTAVE_BITS)
_TURN = int32(LANES - 1)
_FIRST_EQUAL = int32(LANES + (OCTAVES << OCTAVE_BITS))
_OFFSET = int32(_FIRST_EQUAL - (1 << OCTAVE_BITS))

_TO_INTEGER = np.float32(1.5 * 2**23)  # added and taken away, it rounds to the nearest, ties to even

_CHUNK = 4096  # values whose bins stay in the first-level cache between the two loops over them


@numba.njit(nogil=True, cache=True, boundscheck=False)
def count(
    values: NDArray[np.float32],
    start: int,
    exponent: int,
    extrema: NDArray[np.int32],
    slots: NDArray[np.int64],
) -> int:
    """Count values[start:] in the bins of a `statistics.Histogram` over [0, 2**exponent), a chunk at a time.

    Stops in front of the first chunk with a magnitude of 2**exponent or more, or one that is not finite, and
    returns that chunk's position, or `values.size` when all are counted. `extrema` becomes the lowest and
    highest of itself and of `ordered(v)` of all counted values and of that chunk: a float32's bits as
    integers of the same order, which vectorise, and where NaN lies outside the infinities.

    Integers are cast to 32 bits after every operation (numba widens them), so that eight fit a register.
    Loops run over slices from their start: numba checks an index that may be negative at every access.

    Args:
        slots: int64 (LANES - 1 + BINS,), the counts behind `LANES` - 1 zeros; all but the last of the first
            bin's are 0 before and after.
    """
    limit = int32((exponent + 127) << 23)
    scale = np.float32(math.ldexp(1.0, EQUAL_BITS - exponent))
    lowest_octave = int32(exponent - EQUAL_BITS + OCTAVE_BITS - OCTAVES + 127)
    before_octaves = int32((lowest_octave << OCTAVE_BITS) - LANES)
    index = np.empty(_CHUNK, np.int32)
    while start < values.size:
        part = values[start : min(start + _CHUNK, values.size)]
        bits = part.view(np.int32)
        low, high = extrema[0], extrema[1]
        for i in range(part.size):
            magnitude = int32(bits[i] & int32(0x7FFFFFFF))
            ordered = int32(bits[i] ^ int32(int32(bits[i] >> int32(31)) & int32(0x7FFFFFFF)))
            low, high = min(low, ordered), max(high, ordered)
            equal = int32(int32(abs(part[i]) * scale) + _OFFSET)
            in_octave = int32(int32(magnitude >> _SHIFT) - before_octaves)
            in_turn = int32(int32(i) & _TURN)
            index[i] = equal if equal >= _FIRST_EQUAL else max(in_octave, in_turn)
        extrema[0], extrema[1] = low, high
        if max(high, int32(~low)) >= limit:  # ~ordered(v) are the bits of |v| for a negative v
            break
        for i in range(part.size):
            slots[np.uint32(index[i])] += 1
        start += part.size
    slots[LANES - 1] = slots[:LANES].sum()
    slots[: LANES - 1] = 0
    return start


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _quantize(values: NDArray[np.float32], scale: np.float32, codes: NDArray[np.float32]) -> None:
    """A function of its own, since its loop then vectorises."""
    low, high = np.float32(-128), np.float32(127)
    for i in range(codes.size):
        codes[i] = (min(max(values[i] / scale, low), high) + _TO_INTEGER) - _TO_INTEGER


@numba.njit(nogil=True, cache=True, boundscheck=False)
def add_sums(
    values: NDArray[np.float32],
    reads: NDArray[np.bool_],
    scales: NDArray[np.float32],
    sums: NDArray[np.float32],
) -> None:
    """Add up the rows of every plane that each kernel reads: their values, and their codes for each scale.

    Codes are `numerics.quantize`'s, and their sums exact below 2**24.

    Args:
        values: (planes, rows * columns), finite.
        reads: (rows, kernels).
        scales: (scales,), > 0.
        sums: (1 + scales, planes, kernels, columns); the first are of the values.
    """
    planes, rows, columns = values.shape[0], reads.shape[0], sums.shape[3]
    codes = np.empty(rows * columns, np.float32)
    for plane in range(planes):
        for number in range(sums.shape[0]):
            part = values[plane]
            if number > 0:
                _quantize(part, scales[number - 1], codes)
                part = codes
            for row in range(rows):
                line = part[row * columns : (row + 1) * columns]
                for kernel in range(reads.shape[1]):
                    if reads[row, kernel]:
                        for i in range(columns):
                            sums[number, plane, kernel, i] += line[i]
