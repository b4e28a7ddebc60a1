"""Bilinear interpolation of feature maps at points between their pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def corners(x: Array, y: Array) -> list[tuple[NDArray[np.intp], NDArray[np.intp], Array]]:
    """The four pixels around each point, as columns, rows and weights; pixel centers are at whole numbers."""
    left, top = np.floor(x), np.floor(y)
    right_share, low_share = (x - left).astype(np.float32), (y - top).astype(np.float32)
    left_index, top_index = left.astype(np.intp), top.astype(np.intp)
    return [
        (left_index, top_index, (1 - right_share) * (1 - low_share)),
        (left_index + 1, top_index, right_share * (1 - low_share)),
        (left_index, top_index + 1, (1 - right_share) * low_share),
        (left_index + 1, top_index + 1, right_share * low_share),
    ]


def inside(columns: NDArray[np.intp], rows: NDArray[np.intp], height: int, width: int) -> NDArray[np.bool_]:
    """Which pixels lie in a map."""
    return (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
