"""Boxes as corners x1, y1, x2, y2 in the last axis: areas and overlaps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def ordered(boxes: Array) -> Array:
    """The boxes with the smaller coordinates first."""
    return np.concatenate(
        [np.minimum(boxes[..., :2], boxes[..., 2:]), np.maximum(boxes[..., :2], boxes[..., 2:])], axis=-1
    )


def overlaps(box: Array, boxes: Array, pixel: float = 0.0, shared: float = 0.0) -> Array:
    """Intersection over union of one box (4,) with others (n, 4), shape (n,); 0 where they do not touch.

    Args:
        pixel: what is added to the sides of boxes, 1 where coordinates name pixels that belong to the box.
        shared: what is added to the sides of intersections.
    """
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    sides = high - low
    touching = (sides >= 0).all(axis=1)
    intersection = np.where(touching, (sides + np.float32(shared)).prod(axis=1), 0)
    union = _area(box, pixel) + _area(boxes, pixel) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def _area(boxes: Array, pixel: float) -> Array:
    return np.asarray((boxes[..., 2:] - boxes[..., :2] + np.float32(pixel)).prod(axis=-1))
