"""GroupNorm of ONNX Runtime (`com.microsoft`), of which its CPU has no kernel."""

from __future__ import annotations

import numpy as np

from trtq_references.sampling import Array


def GroupNorm(
    values: Array,
    gamma: Array,
    beta: Array,
    *,
    groups: int,
    epsilon: float = 1e-5,
    activation: int = 0,
    channels_last: int = 1,
) -> Array:
    """Groups of channels normalized by the mean and variance of each image; SiLU behind it with `activation`.

    Args:
        values: (batch, height, width, channels), or with the channels second.
    """
    x = values if channels_last else np.moveaxis(values, 1, -1)
    grouped = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    centered = grouped - grouped.mean(axis=(1, 3), keepdims=True)
    variance = np.square(centered).mean(axis=(1, 3), keepdims=True)
    normalized = centered / np.sqrt(variance + np.float32(epsilon))
    result = normalized.reshape(x.shape) * gamma + beta
    if activation:
        result = result / (1 + np.exp(-result))
    result = result.astype(values.dtype)
    return result if channels_last else np.moveaxis(result, -1, 1)
