"""ROIAlign_TRT (TensorRT's plugin/roiAlignPlugin): ONNX's RoiAlign with numbers in place of words."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtq_references.sampling import Array, corners

MAXIMUM, AVERAGE = 0, 1
"""Values of `mode`."""


def ROIAlign_TRT(
    features: Array,
    regions: Array,
    images: NDArray[np.integer],
    *,
    coordinate_transformation_mode: int = 1,
    mode: int = AVERAGE,
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Array:
    """Features pooled over regions, shape (regions, channels, output_height, output_width).

    Args:
        features: (batch, channels, height, width).
        regions: (regions, 4), corners x1, y1, x2, y2.
        images: (regions,), which image each region is of.
        coordinate_transformation_mode: 1 shifts coordinates by half a pixel, 0 does not.
        sampling_ratio: points of each bin and axis; 0: as many as the bin has pixels.
    """
    bins = (output_height, output_width)
    pooled = np.zeros((len(regions), features.shape[1], *bins), np.float32)
    for index, (region, image) in enumerate(zip(regions, images.reshape(-1), strict=True)):
        x1, y1, x2, y2 = region * np.float32(spatial_scale) - np.float32(coordinate_transformation_mode) / 2
        sizes = (y2 - y1, x2 - x1)
        if not coordinate_transformation_mode:  # such regions are at least a pixel large
            sizes = (max(sizes[0], np.float32(1)), max(sizes[1], np.float32(1)))
        counts = [
            sampling_ratio or max(int(np.ceil(size / number)), 0)
            for size, number in zip(sizes, bins, strict=True)
        ]
        y = _points(y1, sizes[0], bins[0], counts[0])
        x = _points(x1, sizes[1], bins[1], counts[1])
        pooled[index] = _pooled(features[int(image)], x, y, bins, mode)
    return pooled


def _points(start: np.float32, size: np.float32, bins: int, count: int) -> Array:
    """Positions along one axis, `count` in each bin, from the first bin to the last."""
    steps = (np.arange(bins * count, dtype=np.float32) + np.float32(0.5)) / np.float32(max(count, 1))
    return np.asarray(start + steps * (size / np.float32(bins)), np.float32)


def _pooled(features: Array, x: Array, y: Array, bins: tuple[int, int], mode: int) -> Array:
    """One region of one image (channels, height, width) -> (channels, *bins)."""
    if not len(x) or not len(y):
        return np.zeros((len(features), *bins), np.float32)
    weighted = _weighted(features, *np.meshgrid(x, y))
    shape = (len(features), bins[0], len(y) // bins[0], bins[1], len(x) // bins[1])
    if mode == AVERAGE:
        return np.asarray(weighted.sum(axis=0).reshape(shape).mean(axis=(2, 4)))
    return np.asarray(weighted.max(axis=0).reshape(shape).max(axis=(2, 4)))


def _weighted(features: Array, x: Array, y: Array) -> Array:
    """The four pixels around each point times their weights, shape (4, channels, *points).

    Points more than a pixel outside count as 0, others outside as the pixel at the border.
    """
    height, width = features.shape[1:]
    counted = (x >= -1) & (x <= width) & (y >= -1) & (y <= height)
    x, y = x.clip(0, width - 1), y.clip(0, height - 1)
    return np.stack(
        [
            features[:, rows.clip(0, height - 1), columns.clip(0, width - 1)] * (share * counted)
            for columns, rows, share in corners(x, y)
        ]
    )
