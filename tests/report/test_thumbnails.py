"""Which inputs are images, and what their thumbnails show."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from trtq.data.samples import Samples
from trtq.graph.inputs import InputSpec
from trtq.report.thumbnails import SIDE, pixels_of, thumbnails


def ramp(*shape: int) -> NDArray[np.float32]:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(
    "shape", [(1, 3, 16, 20), (1, 1, 16, 20), (1, 16, 20, 3), (1, 16, 20, 1), (3, 16, 20)]
)
def test_channels_in_front_or_behind(shape: tuple[int, ...]) -> None:
    pixels = pixels_of(ramp(*shape))
    assert pixels is not None
    assert pixels.shape == (16, 20, 3 if 3 in shape else 1)
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize(
    "array",
    [
        ramp(1, 64),
        ramp(1, 4, 16, 16),  # four channels
        ramp(1, 3, 4, 4),  # too small to show
        ramp(2, 3, 16, 16),  # two rows
        np.zeros((1, 3, 16, 16), np.float32),  # nothing to see
        np.full((1, 3, 16, 16), np.nan, np.float32),
        np.zeros((1, 3, 16, 16), bool),
    ],
)
def test_what_is_no_image(array: NDArray) -> None:
    assert pixels_of(array) is None


def test_a_normalized_image_is_itself_again() -> None:
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image[0, 0], image[0, 1] = 0, 255
    normalized = ((image / 255 - 0.45) / 0.22).astype(np.float32).transpose(2, 0, 1)[None]
    assert np.array_equal(pixels_of(normalized), image)


def test_thumbnails_are_small_and_of_the_samples_first_row() -> None:
    rows = [ramp(1, 200, 300) * (1 if index == 2 else -1) for index in range(4)]  # two rows a sample
    spec = InputSpec("x", np.dtype(np.float32), ("N", 1, 200, 300))
    samples = Samples("made up", (spec,), {"x": rows}, {"label": np.zeros(2)}, "0")
    (thumbnail,) = thumbnails(samples, 1)
    image = Image.open(io.BytesIO(base64.b64decode(thumbnail.png)))
    assert thumbnail.input == "x"
    assert image.size == (SIDE, SIDE * 2 // 3)
    shown = np.asarray(image)
    assert shown[0, 0] < shown[-1, -1]  # row 2, the one that rises
