"""MultiscaleDeformableAttnPlugin_TRT (TensorRT's plugin/multiscaleDeformableAttnPlugin; Deformable DETR)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtq_references.sampling import Array, corners, inside


def MultiscaleDeformableAttnPlugin_TRT(
    value: Array,
    spatial_shapes: NDArray[np.integer],
    level_start_index: NDArray[np.integer],
    sampling_locations: Array,
    attention_weights: Array,
) -> Array:
    """Weighted sums of feature maps at sampled points, shape (batch, queries, heads, channels).

    Args:
        value: (batch, positions of all maps, heads, channels).
        spatial_shapes: (maps, 2), height and width.
        level_start_index: (maps,), where each map begins among the positions.
        sampling_locations: (batch, queries, heads, maps, points, 2), x and y from 0 to 1 over a map; what is
            outside counts as 0.
        attention_weights: (batch, queries, heads, maps, points).
    """
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    result = np.zeros((batch, queries, heads, channels), np.float32)
    images = np.arange(batch)[:, None, None, None]
    all_heads = np.arange(heads)[None, None, :, None]
    for level, (height, width) in enumerate(spatial_shapes.astype(int)):
        start = int(level_start_index[level])
        x = sampling_locations[:, :, :, level, :, 0] * np.float32(width) - np.float32(0.5)
        y = sampling_locations[:, :, :, level, :, 1] * np.float32(height) - np.float32(0.5)
        for columns, rows, share in corners(x, y):
            counted = share * inside(columns, rows, height, width) * attention_weights[:, :, :, level]
            position = start + rows.clip(0, height - 1) * width + columns.clip(0, width - 1)
            result += (value[images, position, all_heads] * counted[..., None]).sum(axis=3)
    return result
