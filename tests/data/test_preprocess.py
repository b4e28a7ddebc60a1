"""Preprocessing against arithmetic done by hand, and Pillow's own resize."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from trtq.data.preprocess import Preprocess, decode_image
from trtq.errors import InputError

PIXELS = np.array([[[0, 51, 255], [102, 204, 153]]], np.uint8)  # height 1, width 2, RGB


def made(row, **options):
    return Preprocess.parse("input", options)(row)


def test_scale_then_mean_then_std() -> None:
    row = made(PIXELS, scale="1/255", mean=[0.5, 0.0, 0.2], std=[0.5, 2.0, 0.8])
    assert row.dtype == np.float32
    # (0/255 - 0.5) / 0.5, (51/255) / 2, (255/255 - 0.2) / 0.8; (0.4 - 0.5) / 0.5, 0.8 / 2, (0.6 - 0.2) / 0.8
    np.testing.assert_allclose(row, [[[-1.0, 0.1, 1.0], [-0.2, 0.4, 0.5]]], rtol=1e-5)


def test_a_fraction_is_the_number_it_stands_for() -> None:
    np.testing.assert_array_equal(made(PIXELS, scale="1/255"), made(PIXELS, scale=1 / 255))
    np.testing.assert_array_equal(made(PIXELS, scale=2), PIXELS * np.float32(2))


def test_one_mean_and_std_for_all_channels() -> None:
    np.testing.assert_array_equal(made(PIXELS, mean=51, std=2), (PIXELS.astype(np.float32) - 51) / 2)


def test_layout_moves_the_channels() -> None:
    assert made(PIXELS, layout="NHWC").shape == (1, 2, 3)
    np.testing.assert_array_equal(made(PIXELS, layout="NCHW"), [[[0, 102]], [[51, 204]], [[255, 153]]])


def test_mean_goes_with_the_colors_after_they_are_swapped() -> None:
    row = made(PIXELS, color="BGR", mean=[255, 51, 0], layout="NCHW")
    np.testing.assert_array_equal(row[:, 0, 0], [0, 0, 0])


def test_nothing_asked_for_changes_nothing() -> None:
    row = made(PIXELS)
    assert row.dtype == np.uint8
    np.testing.assert_array_equal(row, PIXELS)


def test_rows_that_are_no_images_can_be_normalised() -> None:
    np.testing.assert_array_equal(made(np.array([2.0, 6.0]), mean=[1, 2], std=2), [0.5, 2.0])


def test_crop_is_centred() -> None:
    image = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    np.testing.assert_array_equal(made(image, crop=4), image[1:5, 2:6])
    np.testing.assert_array_equal(made(image, crop=[6, 2]), image[:, 3:5])


@pytest.mark.parametrize(("resize", "size"), [(10, (10, 20)), (40, (40, 80)), ([12, 16], (12, 16))])
def test_resize_is_pillows_and_keeps_the_ratio_of_a_shorter_side(resize, size) -> None:
    image = np.random.default_rng(1).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    expected = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(made(image, resize=resize), np.asarray(expected))
    turned = made(image.transpose(1, 0, 2), resize=10)
    assert turned.shape == (20, 10, 3)


def test_resize_comes_before_crop() -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    assert made(image, resize=10, crop=8).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": "a"},
        {"scale": "1/0"},
        {"mean": [[1, 2, 3]]},
        {"mean": []},
        {"mean": float("nan")},
        {"std": 0},
        {"std": [1, 0, 1]},
        {"layout": "CHW"},
        {"color": "GRAY"},
        {"resize": 0},
        {"resize": [1, 2, 3]},
        {"crop": 2.5},
        {"from": 3},
    ],
)
def test_values_that_are_refused(options) -> None:
    (option,) = options
    with pytest.raises(InputError, match=rf"\[preprocess.input\] {option} = "):
        Preprocess.parse("input", options)


def test_an_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="no option 'norm'") as caught:
        Preprocess.parse("input", {"norm": 1})
    assert "from, scale, mean, std, layout, resize, crop, color" in str(caught.value)


@pytest.mark.parametrize("shape", [(), (5,), (5, 5), (2, 5, 5, 3)])
@pytest.mark.parametrize("options", [{"layout": "NCHW"}, {"color": "BGR"}])
def test_images_need_their_three_axes(shape, options) -> None:
    with pytest.raises(InputError, match="height, width, channels"):
        made(np.zeros(shape, np.uint8), scale=1, **options)


@pytest.mark.parametrize("option", ["mean", "std"])
def test_one_value_per_channel(option) -> None:
    with pytest.raises(InputError, match=f"{option} has 2 values"):
        made(PIXELS, **{option: [1, 2]})


def half_to_even(value: Fraction) -> int:
    """The nearest integer; of two as near, the even one."""
    below = math.floor(value)
    above = value - below
    return below + (above > Fraction(1, 2) or (above == Fraction(1, 2) and below % 2 == 1))


def test_a_shorter_side_gives_torchvisions_size() -> None:
    """Resize(size): the shorter side becomes `size`, the longer size x long / short, cut to an integer."""
    rng = np.random.default_rng(0)
    for height, width, size in rng.integers(1, 500, (400, 3)).tolist():
        size = 1 + size % 64
        long = math.floor(size * Fraction(max(height, width), min(height, width)))
        if long > 3000:
            continue
        row = made(np.zeros((height, width), np.uint8), resize=size)
        assert row.shape == ((long, size) if width <= height else (size, long)), (height, width, size)


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (375, 500, 256, (256, 341)),  # 341.33
        (333, 500, 256, (256, 384)),  # 384.38
        (500, 375, 256, (341, 256)),
        (480, 641, 232, (232, 309)),  # 309.82, which rounds to 310
        (7, 7, 3, (3, 3)),
        (1, 3, 2, (2, 6)),
    ],
)
def test_sizes_worked_out_by_hand(height: int, width: int, size: int, expected: tuple[int, int]) -> None:
    assert made(np.zeros((height, width, 3), np.uint8), resize=size).shape == (*expected, 3)


def test_a_crop_begins_where_torchvisions_does() -> None:
    """CenterCrop: from (image - crop) / 2 on, a half rounded to the even neighbour; a smaller image stands in
    zeros, half of them before it (cut to an integer) and the rest behind.

    Pixels hold their row, their column and 1.
    """
    rng = np.random.default_rng(1)
    for height, width, *size in rng.integers(1, 60, (500, 4)).tolist():
        rows, columns = np.mgrid[:height, :width]
        image = np.stack([rows, columns, np.ones_like(rows)], axis=-1).astype(np.uint8)
        cropped = made(image, crop=size)
        assert cropped.shape == (*size, 3)
        begin = [
            half_to_even(Fraction(had - side, 2)) if had >= side else -((side - had) // 2)
            for had, side in zip((height, width), size, strict=True)
        ]
        for y, x in np.ndindex(*size):
            source = begin[0] + y, begin[1] + x
            inside = 0 <= source[0] < height and 0 <= source[1] < width
            assert tuple(cropped[y, x]) == ((*source, 1) if inside else (0, 0, 0)), (height, width, size)


@pytest.mark.parametrize(
    ("side", "begins"), [(10, 0), (9, 0), (8, 1), (7, 2), (6, 2), (5, 2), (3, 4), (1, 4)]
)
def test_margins_worked_out_by_hand(side: int, begins: int) -> None:
    """Half of 1, 3, 5, 7 and 9 pixels: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, 3.5 -> 4, 4.5 -> 4."""
    line = np.arange(10, dtype=np.uint8)[None].repeat(side, axis=0)
    np.testing.assert_array_equal(made(line, crop=side)[0], np.arange(begins, begins + side))


def test_an_image_smaller_than_the_crop_stands_in_zeros() -> None:
    image = np.array([[5, 6]], np.uint8)  # one row, two columns
    np.testing.assert_array_equal(
        made(image, crop=[2, 5]),
        [[0, 5, 6, 0, 0], [0, 0, 0, 0, 0]],  # 1 before and 2 behind; 0 and 1
    )
    np.testing.assert_array_equal(made(image, crop=[3, 1]), [[0], [5], [0]])  # (2 - 1) / 2 = 0.5 -> 0


def test_the_usual_evaluation_of_a_classifier() -> None:
    """Resize(256) and CenterCrop(224) of 500 x 333 pixels: 384 x 256, then from (80, 16) on."""
    image = np.random.default_rng(2).integers(0, 256, (500, 333, 3), dtype=np.uint8)
    resized = Image.fromarray(image).resize((256, 384), Image.Resampling.BILINEAR)
    expected = np.asarray(resized)[80:304, 16:240]
    np.testing.assert_array_equal(made(image, resize=256, crop=224), expected)


def test_one_channel_is_resized_as_a_plane() -> None:
    image = np.random.default_rng(3).integers(0, 256, (9, 12), dtype=np.uint8)
    np.testing.assert_array_equal(made(image[:, :, None], resize=5)[:, :, 0], made(image, resize=5))


def test_images_have_at_most_four_channels() -> None:
    with pytest.raises(InputError, match="1 to 4 channels"):
        made(np.zeros((4, 4, 5), np.uint8), resize=2)


def test_only_bytes_are_resized() -> None:
    with pytest.raises(InputError, match="uint8"):
        made(np.zeros((4, 4, 3), np.float32), resize=2)


def test_images_become_rgb(tmp_path) -> None:
    grey = np.array([[7, 200]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(decode_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, axis=2))
    Image.fromarray(PIXELS).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(decode_image(tmp_path / "rgb.png"), PIXELS)


@pytest.mark.parametrize("content", [b"no image", b"\x89PNG\r\n\x1a\n", None])
def test_a_file_that_is_no_image(content, tmp_path) -> None:
    file = tmp_path / "x.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match="cannot read the image"):
        decode_image(file)


@pytest.mark.parametrize("option", ["resize", "crop"])
@pytest.mark.parametrize("value", [[8], [8, 8, 3], []])
def test_a_size_is_one_number_or_two(option, value) -> None:
    with pytest.raises(InputError, match=option):
        Preprocess.parse("x", {option: value})


def test_gray_is_the_luma_of_the_pixels() -> None:
    pixels = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]]], np.uint8)
    row = Preprocess.parse("x", {"color": "gray", "layout": "NCHW"})(pixels)
    luma = pixels.astype(np.float64) @ [0.299, 0.587, 0.114]
    assert row.shape == (1, 1, 4)
    assert np.abs(row[0] - luma).max() <= 1
