"""InstanceNormalization_TRT (TensorRT's plugin/instanceNormalizationPlugin)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trtq_references.sampling import Array


def InstanceNormalization_TRT(
    values: Array,
    scale: Array | None = None,
    shift: Array | None = None,
    *,
    epsilon: float = 1e-5,
    scales: Sequence[float] = (),
    bias: Sequence[float] = (),
    relu: int = 0,
    alpha: float = 0.0,
) -> Array:
    """Each channel of each image (batch, channels, ...) normalized by its own mean and variance.

    Args:
        scale, shift: (channels,), where they are inputs (version 3); else they are `scales` and `bias`.
        relu: whether a leaky ReLU with slope `alpha` follows.
    """
    axes = tuple(range(2, values.ndim))
    gain = np.asarray(scales if scale is None else scale, np.float32)
    offset = np.asarray(bias if shift is None else shift, np.float32)
    across = (1, -1, *[1] * len(axes))
    centered = values - values.mean(axis=axes, keepdims=True)
    variance = np.square(centered).mean(axis=axes, keepdims=True)
    normalized = centered / np.sqrt(variance + np.float32(epsilon))
    result = normalized * gain.reshape(across) + offset.reshape(across)
    return np.where(result < 0, np.float32(alpha) * result, result) if relu else result
