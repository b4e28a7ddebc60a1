"""What the weights of a convolution's kernel read, axis by axis."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray


def windows(node: gs.Node, sizes: Sequence[int]) -> list[NDArray[np.int64]]:
    """For each spatial axis of a Conv, the place that each weight along it reads at each output position:
    (positions, kernel), read-only; -1 where it reads padding.

    Args:
        sizes: of its input, along these axes.
    """
    return [_along(*axis) for axis in _axes(node, sizes)]


def reads(node: gs.Node, sizes: Sequence[int]) -> list[NDArray[np.float64]]:
    """For each of these axes, at which part of the output positions each weight along it reads each place:
    (size, kernel), read-only."""
    return [_reads(*axis) for axis in _axes(node, sizes)]


def _axes(node: gs.Node, sizes: Sequence[int]) -> Iterator[tuple[int, int, int, int, int, int, str]]:
    kernel, attributes = node.inputs[1].shape[2:], node.attrs
    axes = len(kernel)
    steps, gaps = (attributes.get(name) or [1] * axes for name in ("strides", "dilations"))
    pads, automatic = attributes.get("pads") or [0] * 2 * axes, attributes.get("auto_pad", "NOTSET")
    return zip(
        sizes, kernel, steps, gaps, pads[:axes], pads[axes:], itertools.repeat(automatic, axes), strict=True
    )


@functools.lru_cache(maxsize=256)
def _along(
    size: int, kernel: int, step: int, gap: int, before: int, behind: int, automatic: str
) -> NDArray[np.int64]:
    window = (kernel - 1) * gap + 1
    if automatic == "VALID":
        before = behind = 0
    elif automatic.startswith("SAME"):
        padding = max((-(-size // step) - 1) * step + window - size, 0)
        before = padding // 2 if automatic == "SAME_UPPER" else padding - padding // 2
        behind = padding - before
    first = np.arange(0, size + before + behind - window + 1, step) - before
    places = first[:, None] + gap * np.arange(kernel)
    places[(places < 0) | (places >= size)] = -1
    places.flags.writeable = False
    return places


@functools.lru_cache(maxsize=256)
def _reads(size: int, kernel: int, *how: Any) -> NDArray[np.float64]:
    places = _along(size, kernel, *how)
    found = np.zeros((size + 1, kernel))  # the last one is of padding
    found[places, np.arange(kernel)] = 1 / len(places)
    found.flags.writeable = False
    return found[:-1]
