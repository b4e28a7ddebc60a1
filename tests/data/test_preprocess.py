"""Preprocessing against arithmetic done by hand, and Pillow's own resize."""

from __future__ import annotations

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


def test_a_crop_larger_than_the_image() -> None:
    with pytest.raises(InputError, match="smaller than the crop"):
        made(PIXELS, crop=2)


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
