"""GridSample as a custom operator, for models whose ONNX opset is older than 16, where it became standard.

mmcv exports it as `grid_sampler` with PyTorch's numbers for modes; other exporters with ONNX's words.
"""

from __future__ import annotations

import numpy as np

from trtq_references.sampling import Array, corners, inside

_MODES: dict[int | str, str] = {0: "bilinear", 1: "nearest", "linear": "bilinear"}
_PADDINGS: dict[int | str, str] = {0: "zeros", 1: "border", 2: "reflection"}


def GridSample(
    values: Array,
    grid: Array,
    *,
    mode: int | str = "bilinear",
    padding_mode: int | str = "zeros",
    align_corners: int = 0,
) -> Array:
    """Feature maps (batch, channels, height, width) sampled at points, shape (batch, channels, *points).

    Args:
        grid: (batch, rows, columns, 2), x and y from -1 to 1 over a map.
        mode: bilinear (0) or nearest (1).
        padding_mode: what is outside is zeros (0), the border (1) or a reflection (2).
        align_corners: whether -1 and 1 are the centers of the outermost pixels, or their outer edges.
    """
    way, padding = _MODES.get(mode, mode), _PADDINGS.get(padding_mode, padding_mode)
    if way not in ("bilinear", "nearest"):
        raise ValueError(f"the mode {way} is not supported: bilinear and nearest are")
    height, width = values.shape[2:]
    x = _pixels(grid[..., 0], width, align_corners)
    y = _pixels(grid[..., 1], height, align_corners)
    if padding == "border":
        x, y = x.clip(0, width - 1), y.clip(0, height - 1)
    elif padding == "reflection":
        x, y = _reflected(x, width, align_corners), _reflected(y, height, align_corners)
    around = corners(x, y)
    if way == "nearest":
        around = [(np.rint(x).astype(np.intp), np.rint(y).astype(np.intp), np.ones_like(x))]
    result = np.zeros((*values.shape[:2], *grid.shape[1:3]), np.float32)
    images = np.arange(len(values))[:, None, None]
    for columns, rows, share in around:
        counted = share * inside(columns, rows, height, width)
        pixels = values[images, :, rows.clip(0, height - 1), columns.clip(0, width - 1)]
        result += np.moveaxis(pixels * counted[..., None], -1, 1)
    return result


def grid_sampler(
    values: Array,
    grid: Array,
    *,
    interpolation_mode: int = 0,
    padding_mode: int = 0,
    align_corners: int = 0,
) -> Array:
    """`GridSample` under the name and with the attributes that mmcv gives it."""
    return GridSample(
        values, grid, mode=interpolation_mode, padding_mode=padding_mode, align_corners=align_corners
    )


def _pixels(positions: Array, size: int, align_corners: int) -> Array:
    """Positions from -1 to 1 as pixels, whose centers are at whole numbers."""
    if align_corners:
        return np.asarray((positions + 1) / 2 * (size - 1), np.float32)
    return np.asarray(((positions + 1) * size - 1) / 2, np.float32)


def _reflected(positions: Array, size: int, align_corners: int) -> Array:
    """Positions folded back into a map at its outermost centers, or at its outer edges."""
    low, span = (0.0, size - 1.0) if align_corners else (-0.5, float(size))
    if span == 0:
        return np.zeros_like(positions)
    distance = np.abs(positions - np.float32(low)) % np.float32(2 * span)
    folded = np.minimum(distance, np.float32(2 * span) - distance) + np.float32(low)
    return np.asarray(folded.clip(0, size - 1), np.float32)
