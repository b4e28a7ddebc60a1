"""A network whose one output mixes scales, and the noise of its components in plain float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from nets import net, normal
from numpy.typing import NDArray

BOXES, SCORES = slice(0, 4), slice(4, 12)


def mixed_net() -> onnx.ModelProto:
    """x (N, 16) -> y (N, 12): 4 coordinates up to hundreds of pixels, 8 scores up to 1.

    The input of the layer `cls` has an outlier channel that its weights hardly use: with maxima its INT8
    destroys the scores. All other layers do well.
    """
    gain, cls = np.ones(32, np.float32), normal(32, 8, seed=4)
    gain[0], cls[0] = 400.0, 0.0005
    return net(
        """
        g (float[N,16] x) => (float[N,12] y) {
            b = MatMul(x, w1)
            br = Relu(b)
            box = MatMul(br, w2)
            wide = Mul(box, stride)
            boxes = Add(wide, middle)
            k = MatMul(x, w3)
            kr = Relu(k)
            kg = Mul(kr, gain)
            cls = MatMul(kg, w4)
            scores = Sigmoid(cls)
            y = Concat<axis = 1>(boxes, scores)
        }
        """,
        w1=normal(16, 16, seed=1) / 4,
        w2=normal(16, 4, seed=2) / 4,
        w3=normal(16, 32, seed=3) / 4,
        w4=cls,
        gain=gain,
        stride=np.float32(80),
        middle=np.float32(320),
    )


def decibels(reference: NDArray, candidate: NDArray) -> float:
    """SQNR in dB, in float64."""
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    return float(10 * np.log10((r**2).sum() / ((r - c) ** 2).sum()))


def lowest_decibels(reference: NDArray, candidate: NDArray, groups: Sequence[slice | list[int]]) -> float:
    """Of groups of indices along axis 1, the lowest SQNR."""
    return min(decibels(reference[:, group], candidate[:, group]) for group in groups)
