"""From an image, or any array in the data, to a row of a model's input, as a recipe spells it out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtq.errors import InputError, shown
from trtq.files import PathLike
from trtq.graph.codes import Image

VERSION = 2
"""Version of what the options mean, part of the data's hash; 2: resizes and crops as torchvision does."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pixels in a file, and nothing that is interpreted, as EPS is by Ghostscript."""

MOST_PIXELS = 1 << 27
"""Of an image, and of what it is resized or cropped to."""

OPTIONS = ("from", "scale", "mean", "std", "layout", "resize", "crop", "color")


@dataclass(frozen=True)
class Preprocess:
    """`[preprocess.<input>]` of a recipe: called with a row of the data, it gives a row of the input.

    The steps, in this order, each only if it is asked for:

    - `from`: the array of the data that is read (default: the input's own name);
    - `resize`: shorter side in pixels, or [height, width] (bilinear with antialiasing);
    - `crop`: centre crop to a side in pixels, or [height, width]; a smaller image gets a margin of zeros;
    - `color`: "RGB" (as images are read), "BGR", or "gray" (one channel, ITU-R 601 luma);
    - `scale`: factor, a number or a fraction such as "1/255";
    - `mean`, `std`: subtracted, then divided by; a number, or one per channel;
    - `layout`: "NCHW" moves the channels from last to first; "NHWC" leaves them last.

    `resize` and `crop` are torchvision's `Resize` and `CenterCrop` of a PIL image, to the pixel: models that
    were trained with those have to be calibrated and judged on the same. `scale`, `mean` or `std` make the
    row float32. Until `layout`, rows are (height, width, channels).
    """

    name: str
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, name: str, options: Mapping[str, Any]) -> Preprocess:
        """Check the options of `[preprocess.<name>]`.

        Raises:
            InputError: an unknown option, or a value that is not valid.
        """
        if not isinstance(options, Mapping):
            raise InputError(
                f"preprocess.{name} is {shown(options)}, not a table", remedy=f"use {', '.join(OPTIONS)}"
            )
        checks: dict[str, Callable[[Any], object]] = {
            "from": lambda v: isinstance(v, str) or _fail(),
            "scale": _number,
            "mean": _per_channel,
            "std": lambda v: np.all(_per_channel(v) != 0) or _fail(),
            "layout": lambda v: v in ("NCHW", "NHWC") or _fail(),
            "color": lambda v: v in ("RGB", "BGR", "gray") or _fail(),
            "resize": _size,
            "crop": _size,
        }
        for option, value in options.items():
            if option not in checks:
                raise InputError(
                    f"[preprocess.{name}] has no option '{option}'", remedy=f"use {', '.join(OPTIONS)}"
                )
            try:
                checks[option](value)
            except (TypeError, ValueError, ArithmeticError) as error:
                raise InputError(f"[preprocess.{name}] {option} = {shown(value)} is not valid") from error
        return cls(name, dict(options))

    @property
    def source(self) -> str:
        """The array of the data that is read."""
        return str(self.options.get("from", self.name))

    def __call__(self, row: NDArray) -> NDArray:
        """A row of the model's input from a row of the data."""
        options = self.options
        self._check_axes(row)
        if "resize" in options or "crop" in options:
            row = _resize_and_crop(row, options.get("resize"), options.get("crop"))
        if options.get("color") == "gray":
            row = _gray(row)
        if options.get("color") == "BGR":
            row = row[..., ::-1]
        if {"scale", "mean", "std"} & options.keys():
            row = row.astype(np.float32) * np.float32(_number(options.get("scale", 1)))
            row = (row - _per_channel(options.get("mean", 0))) / _per_channel(options.get("std", 1))
        if options.get("layout") == "NCHW":
            row = np.moveaxis(row, -1, 0)
        return row

    def image(self) -> Image:
        """How the input is made of pixels, once they have their size, colours and layout."""
        options = self.options

        def factor(name: str, default: float) -> Any:
            values = _per_channel(options.get(name, default))
            if values.ndim and options.get("layout") == "NCHW":
                values = values[:, None, None]
            return values.tolist()

        return Image(_number(options.get("scale", 1)), factor("mean", 0), factor("std", 1))

    def _check_axes(self, row: NDArray) -> None:
        """Refuse a row that lacks the axes that the options need, rather than mix up its pixels."""
        if row.ndim != 3 and {"layout", "color"} & self.options.keys():
            raise InputError(
                f"`layout` and `color` take rows of (height, width, channels), not of shape {row.shape}",
                remedy=f"take them out of the recipe's [preprocess.{self.name}], or reshape the data",
            )
        channels = row.shape[-1] if row.ndim else 1
        for option in ("mean", "std"):
            count = _per_channel(self.options.get(option, 0)).size
            if count not in (1, channels):
                raise InputError(
                    f"[preprocess.{self.name}] {option} has {count} values for rows of shape {row.shape}",
                    remedy="give one number, or one per channel; the channels are the last axis of the data",
                )


def decode_image(path: PathLike) -> NDArray[np.uint8]:
    """An image file as uint8 (height, width, 3), RGB. What it is its content says, whatever its name.

    Raises:
        InputError: the file is missing, no image of `FORMATS`, damaged, or of more than `MOST_PIXELS`.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # every format's reader raises its own
        raise InputError(
            "cannot read the image", file=path, cause=error, remedy=f"give one of {', '.join(FORMATS)}"
        ) from error


def _resize_and_crop(row: NDArray, resize: Any, crop: Any) -> NDArray:
    if row.dtype != np.uint8 or row.ndim not in (2, 3):
        raise InputError(f"resize and crop take uint8 images, not {row.dtype} of shape {row.shape}")
    if resize is not None:
        row = _resized(row, _resized_size(row.shape[:2], resize))
    if crop is not None:
        row = _center_crop(row, (crop, crop) if isinstance(crop, int) else crop)
    return row


def _resized_size(shape: Sequence[int], resize: Any) -> tuple[int, int]:
    """Height and width after `resize`; one number is the shorter side's, and the longer one is cut to an
    integer, as in torchvision."""
    if not isinstance(resize, int):
        return resize[0], resize[1]
    height, width = shape
    if width <= height:
        return resize * height // width, resize
    return resize, resize * width // height


def _resized(row: NDArray, size: tuple[int, int]) -> NDArray[np.uint8]:
    """An image (height, width) or (height, width, channels) of another size, by Pillow."""
    from PIL import Image

    if size[0] * size[1] > MOST_PIXELS:
        raise InputError(f"resize makes {size[0]} x {size[1]} pixels of a row of shape {row.shape}")
    single = row.ndim == 3 and row.shape[2] == 1
    try:
        image = Image.fromarray(row[:, :, 0] if single else row)
    except TypeError as error:
        raise InputError(
            f"resize takes images of 1 to 4 channels, not rows of shape {row.shape}",
            remedy="rows are (height, width, channels)",
        ) from error
    resized = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))
    return resized[:, :, None] if single else resized


def _center_crop(row: NDArray, size: Sequence[int]) -> NDArray:
    """The middle of an image; where it is smaller, zeros are put around it first, as in torchvision.

    An odd pixel of margin goes where Python's `round` (half to even) puts it; one of padding to the end.
    """
    missing = [max(side - had, 0) for side, had in zip(size, row.shape, strict=False)]
    if any(missing):
        padding = [(count // 2, (count + 1) // 2) for count in missing]
        row = np.pad(row, [*padding, *[(0, 0)] * (row.ndim - 2)])
    top, left = (round((had - side) / 2) for side, had in zip(size, row.shape, strict=False))
    return row[top : top + size[0], left : left + size[1]]


def _gray(row: NDArray) -> NDArray[np.uint8]:
    from PIL import Image

    if row.dtype != np.uint8 or row.shape[2] != 3:
        raise InputError(f'color = "gray" takes uint8 RGB images, not {row.dtype} of shape {row.shape}')
    return np.asarray(Image.fromarray(row).convert("L"))[:, :, None]


def _number(value: Any) -> float:
    """A finite number, or the value of a fraction such as "1/255"."""
    above, slash, below = value.partition("/") if isinstance(value, str) else (value, "", "")
    number = float(above) / float(below if slash else 1)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(value)
    return number


def _per_channel(value: Any) -> NDArray[np.float32]:
    """A number as shape (), or one per channel as shape (channels,)."""
    if any(isinstance(v, bool) for v in (value if isinstance(value, list) else [value])):
        raise ValueError(value)
    values = np.asarray(value, np.float32)
    if values.ndim > 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(value)
    return values


def _size(value: Any) -> None:
    sides = [value, value] if isinstance(value, int) else value
    if len(sides) != 2 or any(type(s) is not int or s < 1 for s in sides) or math.prod(sides) > MOST_PIXELS:
        raise ValueError(value)


def _fail() -> object:
    raise ValueError
