"""What a fix did to the channels of a tensor, and how it is taken off again.

Fixes that cost an engine nothing (shifting, smoothing, equalization; trtq's own or another tool's) multiply
and shift the channels of a tensor, and what reads it makes up for that. The tensor then holds something else
under its old name: its difference from the fp32 model's is no error.

The float twin of the Q/DQ model (`graph.twin`) shows it: channel by channel, its tensor is `a·r + b` of the
fp32 model's `r`. Rounded weights may shift channels, too, and what tells the two apart is that the twin
still gives the fp32 model's outputs. That is a rule of thumb. It errs where rounding shifts the channels of a
branch that hardly counts, whose row then has too good a figure; and where the outputs suffer so much from
rounded weights that nothing proves a fix, the tensor is compared as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.simulation.finite import compared
from trtq.simulation.rows import Run
from trtq.simulation.similarity import MAX_SQNR_DB, decibels, scored

Array = NDArray[np.float64]

CHANGED_DB = 10.0
"""A fix changed a tensor if its twin is nearer to the fp32 model's by so many dB once factors and offsets are
taken off, and if the worst of the twin's outputs is nearer than it by as many: nine tenths of the difference
belong to the channels, and do not arrive. On the demo and on EfficientNet-Lite0 they gain 20 dB or more where
fixes changed a tensor, and up to 8 dB of what rounded weights did, which arrives."""


class Twin:
    """The tensors of the float twin beside those of the fp32 model and of the simulation, batch by batch.

    Args:
        run: of the twin.
        axes: tensor -> axis of its channels.
        outputs: those of the tensors that no fix may change.
    """

    def __init__(self, run: Run, axes: Mapping[str, int], outputs: Sequence[str]) -> None:
        self.run = run
        self._outputs = [name for name in outputs if name in axes]
        self._fits = {name: ChannelFit(axis) for name, axis in axes.items()}

    def add(self, fp32: Mapping[str, Any], twin: Mapping[str, Any], simulation: Mapping[str, Any]) -> None:
        """Take a batch: tensor -> values, of all three."""
        self._outputs = scored({name: fp32[name] for name in self._outputs})
        for name, fit in self._fits.items():
            fit.add(*(np.asarray(values[name], np.float64) for values in (fp32, twin, simulation)))

    def changed(self) -> dict[str, float]:
        """Tensors that a fix changed -> SQNR in dB of the simulation once that is taken off."""
        worst = min((self._fits[name].twin_db for name in self._outputs), default=-MAX_SQNR_DB)
        found = {}
        for name, fit in self._fits.items():
            undone = None if name in self._outputs else fit.undone_db()
            if undone is not None and min(undone[0], worst) >= fit.twin_db + CHANGED_DB:
                found[name] = undone[1]
        return found


class ChannelFit:
    """One tensor of the fp32 model, of the twin and of the simulation: sums over rows, channel by channel.

    Args:
        axis: of the channels.
    """

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._energy = self._noise = 0.0
        self._sums: Array | None = None
        self._alike = True

    def add(self, fp32: Array, twin: Array, simulation: Array) -> None:
        """Take the values of some rows."""
        r, c = compared(fp32, twin)
        _, k = compared(fp32, simulation)
        self._alike &= r.ndim > 1 and r.shape == c.shape == k.shape
        with np.errstate(invalid="ignore", over="ignore"):
            self._energy += float(np.sum(r**2))
            self._noise += difference(r, c)
            if not self._alike:
                return
            sums = self._products(r, c, k)
        self._alike = self._sums is None or self._sums.shape == sums.shape
        if self._alike:
            self._sums = sums if self._sums is None else self._sums + sums

    @property
    def twin_db(self) -> float:
        """SQNR in dB of the twin as it is."""
        return float(decibels(np.float64(self._energy), np.float64(self._noise)))

    def undone_db(self) -> tuple[float, float] | None:
        """SQNR in dB of the twin and of the simulation with the twin's factors and offsets taken off, against
        the fp32 model: of (x - b) / a against r, with `a` and `b` of each channel by least squares.

        None where there are too few values, or shapes differ.
        """
        if not self._alike or self._sums is None or (values := self._sums[0, 0, 0]) <= 2:
            return None
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            noises = [self._undone_noise(x, self._factors()) for x in (2, 3)]
        freedom = values / (values - 2)  # two numbers were fitted to the values of each channel
        twin, simulation = (
            float(decibels(np.float64(self._energy), np.float64(noise * freedom))) for noise in noises
        )
        return twin, simulation

    def _products(self, r: Array, c: Array, k: Array) -> Array:
        """Sums of the products of 1, r, c, k by each other, as (4, 4, channels)."""
        rows = [np.moveaxis(x, self._axis, -1).reshape(-1, x.shape[self._axis]) for x in (r, c, k)]
        rows = [np.ones_like(rows[0]), *rows]
        return np.array([[np.einsum("nc,nc->c", x, y) for y in rows] for x in rows])

    def _factors(self) -> Array:
        """Of each channel; 1 where most of what the twin's values vary by is something else than the fp32
        model's, as where the channel is constant there."""
        spread, together, varying = (self._centred(*pair) for pair in ((1, 1), (1, 2), (2, 2)))
        told = together**2 > spread * varying / 2
        return np.where(told, together / np.where(told, spread, 1), 1.0)

    def _centred(self, x: int, y: int) -> Array:
        """Sums of the products of two, less their means."""
        assert self._sums is not None
        s = self._sums
        return s[x, y] - s[0, x] * s[0, y] / s[0, 0]

    def _undone_noise(self, x: int, factor: Array) -> float:
        """Sum of ((x - b) / a - r)²: what is left around the means, and what the means are apart."""
        assert self._sums is not None
        count = self._sums[0, 0]
        around = self._centred(x, x) - 2 * factor * self._centred(1, x) + factor**2 * self._centred(1, 1)
        apart = (self._sums[0, x] - self._sums[0, 2]) ** 2 / count  # b is what the twin's mean is apart
        return float(np.sum((np.maximum(around, 0) + apart) / factor**2))


def channel_axis(node: gs.Node) -> int:
    """Where the output of a product, or of an activation behind one, has its channels."""
    makers = [node, *(t.inputs[0] for t in node.inputs if t.inputs)]
    return 1 if any("Conv" in maker.op for maker in makers) else -1


def difference(reference: Array, candidate: Array) -> float:
    """Sum of the squared errors. Nothing is alike where shapes differ: what selects gave another number."""
    return float(np.sum((reference - candidate if reference.shape == candidate.shape else reference) ** 2))
