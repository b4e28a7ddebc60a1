"""Thumbnails of samples, as far as their inputs are images."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trtq.data.samples import Samples
from trtq.report.record import Thumbnail

SIDE = 96
"""Pixels of the longer side."""

FEWEST_PIXELS = 8
"""An array whose sides are shorter is no image."""

MOST_IMAGES = 2
"""Inputs of a sample that are shown."""


def thumbnails(samples: Samples, number: int) -> tuple[Thumbnail, ...]:
    """The images of a sample: of its first row, where it has several.

    Raises:
        InputError: as `Samples.row`.
    """
    row = samples.row(number * samples.group)
    images = {name: pixels for name, array in row.items() if (pixels := pixels_of(array)) is not None}
    return tuple(Thumbnail(name, _png(pixels)) for name, pixels in list(images.items())[:MOST_IMAGES])


def pixels_of(array: NDArray) -> NDArray[np.uint8] | None:
    """An input of one row as pixels, uint8 (height, width, 1 or 3); None where it is no image.

    An image has one or three channels, in front of height and width or behind them. Its least value becomes
    black and its largest white, as nobody knows how it was normalized.
    """
    if array.ndim not in (3, 4) or array.dtype.kind not in "fiu" or (array.ndim == 4 and len(array) != 1):
        return None
    image = array[0] if array.ndim == 4 else array
    if image.shape[0] in (1, 3):
        image = image.transpose(1, 2, 0)
    if image.shape[2] not in (1, 3) or min(image.shape[:2]) < FEWEST_PIXELS:
        return None
    values = image.astype(np.float64)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high) and high > low):
        return None
    return np.rint(255 * (values - low) / (high - low)).astype(np.uint8)


def _png(pixels: NDArray[np.uint8]) -> str:
    """Base64 of a PNG whose longer side is at most `SIDE`."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    image.save(content, "png", optimize=True)
    return base64.b64encode(content.getvalue()).decode()
