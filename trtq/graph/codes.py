"""What the numbers of 8-bit model inputs and outputs stand for (see `trtq.graph.ends`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtq.errors import InputError

IMAGE_SLACK = 0.01
"""How far from an integer a pixel may be that is computed back from its normalized value."""


@dataclass(frozen=True)
class Code:
    """What the numbers of an input or output stand for: `number * scale + offset`.

    Attributes:
        dtype: `int8`, or `uint8` of an image.
        scale, offset: float32 of shape (), or such that they broadcast against the tensor.
    """

    dtype: str
    scale: NDArray[np.float32]
    offset: NDArray[np.float32]

    def encoded(self, values: NDArray) -> NDArray:
        """Numbers for floats; integers are taken for numbers already.

        int8 are rounded to the nearest, ties to even, and saturate: what QuantizeLinear does.

        Raises:
            InputError: the values are not those of an image's pixels.
        """
        if values.dtype.kind != "f":
            return values
        if self.dtype == "int8":
            return np.clip(np.rint(values.astype(np.float32) / self.scale), -128, 127).astype(np.int8)
        exact = (values.astype(np.float32) - self.offset) / self.scale
        pixels = np.rint(exact)
        if np.abs(exact - pixels).max(initial=0) > IMAGE_SLACK or not ((pixels >= 0) & (pixels <= 255)).all():
            raise InputError(
                "the values of an image input are not those of pixels from 0 to 255",
                remedy="give images as uint8, with scale, mean and std in the recipe's [preprocess.<input>]",
            )
        return pixels.astype(np.uint8)

    def decoded(self, numbers: NDArray) -> NDArray[np.float32]:
        """float32 of numbers."""
        return (numbers.astype(np.float32) * self.scale + self.offset).astype(np.float32)

    def host_line(self, name: str, *, output: bool = False) -> str:
        """What the host's program does, as a line of Python."""
        scale = np.format_float_positional(self.scale.reshape(-1)[0], unique=True)
        if output:
            return f"{name}.astype(np.float32) * np.float32({scale})"
        if self.dtype == "int8":
            return f"np.clip(np.rint({name} / np.float32({scale})), -128, 127).astype(np.int8)"
        return f"{name}  # uint8 pixels as they are: the engine scales and normalizes them"

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"type": self.dtype, "scale": self.scale.tolist(), "offset": self.offset.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Code:
        """The inverse of `to_json`."""
        scale, offset = (np.array(value[name], np.float32) for name in ("scale", "offset"))
        return cls(str(value["type"]), scale, offset)


@dataclass(frozen=True)
class Image:
    """How an input is made of pixels: `(pixels * factor - mean) / std`, in float32.

    Attributes:
        mean, std: nested lists that broadcast against the input.
    """

    factor: float
    mean: Any
    std: Any
