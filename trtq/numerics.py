"""The paper's quantization arithmetic (Wu et al. 2020, section 3) in NumPy.

Convention: this package uses ONNX's and TensorRT's `scale`, which divides (`x_q = x / scale`);
the paper's `s` multiplies, so `scale = 1 / s`. Rounding is half to even everywhere, as in
ONNX QuantizeLinear and TensorRT.

Quantization is symmetric, which the paper calls *scale* quantization (eq. 5-9): TensorRT takes no
zero-point. The codes of `bits` b are -(2^(b-1) - 1) ... 2^(b-1) - 1 for weights (`narrow=True`), and
-2^(b-1) ... 2^(b-1) - 1 where TensorRT's Quantize saturates activations.

`scale` is a scalar (per tensor) or a 1-D array along `axis` (per channel).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.floating]
Int = NDArray[np.signedinteger]

INT8_MAX = 127
"""Largest INT8 code; a symmetric scale is amax / 127."""


def integer_range(bits: int = 8, narrow: bool = True) -> tuple[int, int]:
    """Lowest and highest code of a signed `bits`-wide integer; `narrow` drops the lowest (paper 3.1.2)."""
    if not 2 <= bits <= 16:
        raise ValueError(f"bits must be between 2 and 16, not {bits}")
    high = 2 ** (bits - 1) - 1
    return (-high if narrow else -high - 1), high


def scale_from_amax(amax: ArrayLike, bits: int = 8) -> NDArray[np.float32]:
    """Symmetric scale of the range [-amax, amax]: amax / (2^(b-1) - 1), float32 (paper eq. 5).

    An amax of 0 (a tensor or channel that is all zero) gives scale 1: TensorRT wants every scale
    positive, and any scale represents zeros exactly. An amax so small that the scale would
    underflow float32 gives the smallest normal float32.
    """
    amax = np.asarray(amax, dtype=np.float64)
    if not np.all(np.isfinite(amax)) or np.any(amax < 0):
        raise ValueError("amax must be finite and not negative")
    scale = np.maximum(amax / integer_range(bits)[1], np.finfo(np.float32).tiny)
    return np.where(amax == 0, 1.0, scale).astype(np.float32)


def scale_from_width(width: float, bits: int = 8) -> np.float32:
    """Scale of a range that is not symmetric, of width high - low: width / (2^b - 1) (paper eq. 3).

    Zero and underflow are as in `scale_from_amax`.
    """
    low, high = integer_range(bits, narrow=False)
    return np.float32(scale_from_amax(width * high / (high - low), bits))


def has_scale(amax: float, bits: int = 8) -> bool:
    """Whether the range [-amax, amax] has a symmetric scale that is a normal float32; zeros do not, nor do
    values so small that the scale underflows."""
    return amax / integer_range(bits)[1] >= np.finfo(np.float32).tiny


def amax_per_channel(x: ArrayLike, axis: int | None) -> Float:
    """Largest |x|: shape () for `axis=None` (per tensor), else shape (channels,) along `axis`."""
    x = np.asarray(x)
    if axis is None:
        return np.asarray(np.max(np.abs(x), initial=0.0))
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    return np.asarray(np.max(np.abs(x), axis=others, initial=0.0))


def quantize(
    x: ArrayLike,
    scale: ArrayLike,
    *,
    axis: int | None = None,
    bits: int = 8,
    narrow: bool = False,
) -> Int:
    """Integer codes clip(round(x / scale)) (paper eq. 7; ONNX QuantizeLinear with zero-point 0).

    Args:
        x: float array of any shape.
        scale: positive; scalar, or (channels,) along `axis`.
        axis: the channel axis, or None for one scale per tensor.
        bits: width of the codes, 2 to 16.
        narrow: clip at -(2^(b-1) - 1) as the paper does for weights, not at -2^(b-1).

    Returns:
        int8 for up to 8 bits, else int16; `x`'s shape. The division is done in `x`'s precision
        (float32 for float16), as ONNX Runtime does.
    """
    x = np.asarray(x)
    if x.dtype == np.float16 or not np.issubdtype(x.dtype, np.floating):
        x = x.astype(np.float32)
    low, high = integer_range(bits, narrow)
    divisor = _along(np.asarray(scale, dtype=x.dtype), axis, x.ndim)
    if not np.all(divisor > 0):
        raise ValueError("scale must be positive")
    return np.clip(np.rint(x / divisor), low, high).astype(np.int8 if bits <= 8 else np.int16)


def dequantize(codes: ArrayLike, scale: ArrayLike, *, axis: int | None = None) -> Float:
    """codes * scale in `scale`'s float dtype (paper eq. 9; ONNX DequantizeLinear with zero-point 0)."""
    codes, scale = np.asarray(codes), np.asarray(scale)
    dtype = scale.dtype if np.issubdtype(scale.dtype, np.floating) else np.dtype(np.float64)
    exact = codes.astype(np.int32) * _along(scale, axis, codes.ndim)  # in float64
    return exact.astype(dtype)  # rounded once


def fake_quantize(
    x: ArrayLike,
    scale: ArrayLike,
    *,
    axis: int | None = None,
    bits: int = 8,
    narrow: bool = False,
) -> Float:
    """Quantize and dequantize: `x` on the integer grid, in `scale`'s dtype (paper section 3.1)."""
    codes = quantize(x, scale, axis=axis, bits=bits, narrow=narrow)
    return dequantize(codes, scale, axis=axis)


def _along(values: NDArray, axis: int | None, ndim: int) -> NDArray:
    """`values` reshaped so that it broadcasts along `axis` of an array of rank `ndim`."""
    if values.ndim == 0:
        return values
    if axis is None:
        raise ValueError("per-channel parameters need an axis")
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)
