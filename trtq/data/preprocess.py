"""From an image, or any array in the data, to a row of a model's input, as a recipe spells it out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtq.errors import InputError
from trtq.files import PathLike

OPTIONS = ("from", "scale", "mean", "std", "layout", "resize", "crop", "color")


@dataclass(frozen=True)
class Preprocess:
    """`[preprocess.<input>]` of a recipe: called with a row of the data, it gives a row of the input.

    The steps, in this order, each only if it is asked for:

    - `from`: the array of the data that is read (default: the input's own name);
    - `resize`: shorter side in pixels, or [height, width] (bilinear with antialiasing);
    - `crop`: centre crop to a side in pixels, or [height, width];
    - `color`: "RGB" (as images are read), "BGR", or "gray" (one channel, ITU-R 601 luma);
    - `scale`: factor, a number or a fraction such as "1/255";
    - `mean`, `std`: subtracted, then divided by; a number, or one per channel;
    - `layout`: "NCHW" moves the channels from last to first; "NHWC" leaves them last.

    `scale`, `mean` or `std` make the row float32. Until `layout`, rows are (height, width, channels).
    """

    name: str
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, name: str, options: Mapping[str, Any]) -> Preprocess:
        """Check the options of `[preprocess.<name>]`.

        Raises:
            InputError: an unknown option or a value that is not one.
        """
        if not isinstance(options, Mapping):
            raise InputError(
                f"preprocess.{name} is {options!r}, not a table", remedy=f"use {', '.join(OPTIONS)}"
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
                raise InputError(f"[preprocess.{name}] {option} = {value!r} is not valid") from error
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

    def _check_axes(self, row: NDArray) -> None:
        """Refuse a row without the axes that the options speak of, rather than mix up its pixels."""
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
    """An image file as uint8 (height, width, 3), RGB.

    Raises:
        InputError: the file is missing or no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError("cannot read the image", file=path, cause=error) from error


def _resize_and_crop(row: NDArray, resize: Any, crop: Any) -> NDArray:
    from PIL import Image

    if row.dtype != np.uint8 or row.ndim not in (2, 3):
        raise InputError(f"resize and crop take uint8 images, not {row.dtype} of shape {row.shape}")
    if resize is not None:
        height, width = row.shape[:2]
        if isinstance(resize, int):
            factor = resize / min(height, width)
            height, width = round(height * factor), round(width * factor)
        else:
            height, width = resize
        row = np.asarray(Image.fromarray(row).resize((width, height), Image.Resampling.BILINEAR))
    if crop is not None:
        height, width = (crop, crop) if isinstance(crop, int) else crop
        if row.shape[0] < height or row.shape[1] < width:
            raise InputError(f"an image of {row.shape[0]}x{row.shape[1]} is smaller than the crop {crop}")
        top, left = (row.shape[0] - height) // 2, (row.shape[1] - width) // 2
        row = row[top : top + height, left : left + width]
    return row


def _gray(row: NDArray) -> NDArray[np.uint8]:
    from PIL import Image

    if row.dtype != np.uint8 or row.shape[2] != 3:
        raise InputError(f'color = "gray" takes uint8 RGB images, not {row.dtype} of shape {row.shape}')
    return np.asarray(Image.fromarray(row).convert("L"))[:, :, None]


def _number(value: Any) -> float:
    """A finite number, or the fraction that such as "1/255" means."""
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
    if len(sides) != 2 or any(type(s) is not int or s < 1 for s in sides):
        raise ValueError(value)


def _fail() -> object:
    raise ValueError
