"""Factors and middles that a place for them may get, by what its channels are like (see `affine`).

- A depthwise convolution has one scale per channel for its weights, so no factor costs them anything: it is
  the range of the channel.
- Elsewhere large factors cost the weights what small ones cost the activation: SmoothQuant's balance (see
  `smooth`), with the exponent for which the error behind the weights is least.

A middle gives what lies to one side of zero, as behind nearly all activation functions, the codes of the
other side: one bit more. Scale and zero-point are the paper's (Wu et al. 2020, equations 3 and 4): zero has a
code of its own.

Channels that hardly occur in the calibration data have no range to speak of, and others in use may have them
large. No factor is therefore below `LEAST_FACTOR` of the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.numerics import fake_quantize, scale_from_amax, scale_from_width
from trtq.recovery.fixes.channels import Channels, Vector
from trtq.recovery.fixes.sites import Affine, Site
from trtq.recovery.fixes.smooth import EXPONENTS, NARROWER, balanced, by_input, error_behind, rounding_noise

MOST_VALUES = 1 << 20
"""Of so many values of a tensor options are compared; of wide ones at fewer positions."""

LEAST_FACTOR = 1 / 256
"""Factors below this share of a tensor's largest are raised to it."""


@dataclass(frozen=True, eq=False)
class Option:
    """Factors of a site, with middles or without, and a range.

    Attributes:
        values: of the tensor, (positions, channels).
        factors: what the tensor is divided by, (channels,); None: 1.
        low, high: ends of each channel's range, (channels,); zero is within. Without middles, high = -low.
        usual: the median of each channel, or the zero that a Pad puts there; what lies far from it is cut off
            first.
        centred: whether a middle is subtracted.
        part: of the widest channel's range, which is the range of all; what does not fit is cut off.
        share: error behind the readers' weights, as a share of what it is without this.
    """

    values: NDArray[np.float32]
    factors: Vector | None
    low: Vector
    high: Vector
    usual: Vector
    centred: bool
    part: float = 1.0
    share: float = 1.0

    @property
    def scale(self) -> np.float32:
        """Of the changed tensor."""
        if self.centred:
            return scale_from_width(self._width)
        return np.float32(scale_from_amax(self._width / 2))

    @property
    def affine(self) -> Affine:
        """What becomes of the tensor."""
        if not self.centred:
            return Affine(self.factors)
        factors, scale = self._all_factors, float(self.scale)
        low, high = _cut(self.low, self.high, self.usual, self._width * factors)
        zeros = np.rint((low + high) / 2 / (scale * factors) + 0.5)
        return Affine(self.factors, _as_in_half(zeros * scale) * factors)

    @property
    def noise(self) -> Vector:
        """Mean squared error of each changed channel, (channels,)."""
        return rounding_noise(self.affine.of(self.values), self.scale)

    @property
    def mean(self) -> Vector:
        """What each changed channel is on average in INT8, (channels,)."""
        rounded = fake_quantize(self.affine.of(self.values), self.scale)
        return rounded.mean(axis=0, dtype=np.float64)

    def widened(self, by: float) -> Option:
        """With a range so many times as wide, up to the widest channel's; `share` grows as its noise does."""
        other = replace(self, part=min(self.part * by, 1))
        before, after = self.noise.sum(), other.noise.sum()
        return replace(other, share=self.share * after / before if before else self.share)

    @property
    def _all_factors(self) -> Vector:
        return np.ones(self.low.shape) if self.factors is None else self.factors

    @property
    def _width(self) -> float:
        return float(((self.high - self.low) / self._all_factors).max()) * self.part


def _cut(low: Vector, high: Vector, usual: Vector, width: Vector) -> tuple[Vector, Vector]:
    """Ranges no wider than `width`: first the side farther from what is usual is cut off, then both."""
    below, above = usual - low, high - usual
    reach = np.maximum(width - np.minimum(below, above), width / 2)
    return usual - np.minimum(below, reach), usual + np.minimum(above, reach)


def options(site: Site, readers: Sequence[gs.Node], channels: Channels, amax: float) -> list[Option]:
    """Factors and middles that leave less error behind the readers' weights than none do, the least error
    first, each with the range that leaves least.

    Args:
        amax: of the tensor's range as it is.
    """
    values, none = channels.values[:: -(-channels.values.size // MOST_VALUES)], np.zeros(site.channels)
    usual = none if site.pads else np.median(values, axis=0).astype(np.float64)
    low, high = (np.asarray(end, np.float64) for end in (channels.low, channels.high))
    largest = np.maximum(-low, high)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    weights = np.max([np.abs(by_input(node)).max(axis=0) for node in readers], axis=0)

    def kinds(low: Vector, high: Vector, usual: Vector, centred: bool) -> Iterator[Option]:
        own = (high - low) / 2
        for factors in (own, *(balanced(own, weights, exponent) for exponent in EXPONENTS)):
            yield Option(values, _held(factors), low, high, usual, centred)

    def error(option: Option) -> float:
        noise, factors = option.noise, np.ones(site.channels) if option.factors is None else option.factors
        return sum(error_behind(node, channels.power, noise, factors) for node in readers)

    def ranged(option: Option) -> Option:
        return min((replace(option, part=p) for p in NARROWER), key=lambda option: option.noise.sum())

    plain = Option(values, None, none - amax, none + amax, none, False)
    tried = list(map(ranged, kinds(-largest, largest, none, False)))
    if site.takes_middle:
        tried.append(Option(values, None, np.maximum(low, -amax), np.minimum(high, amax), usual, True))
        tried += map(ranged, kinds(low, high, usual, True))
    whole, found = error(plain), list[Option]()
    for option in tried:
        share = error(option) / whole if whole else 1
        if share < 1 and all(abs(share - other.share) > 0.02 * other.share for other in found):
            found.append(replace(option, values=channels.values, share=share))
    return sorted(found, key=lambda option: option.share)


def _held(factors: Vector) -> Vector:
    """Factors that are not too small, about a geometric mean of 1."""
    if not factors.max() > 0:
        return np.ones(factors.shape)
    factors = np.maximum(factors, factors.max() * LEAST_FACTOR)
    return 1 / _as_in_half(np.exp(np.log(factors).mean()) / factors)


def _as_in_half(values: Vector) -> Vector:
    """The values to the 11 bits that float16 has, whatever their size: a constant that an engine rounds makes
    an error that is the same at every position."""
    fractions, exponents = np.frexp(values)
    rounded: Vector = np.ldexp(np.rint(fractions * 2048) / 2048, exponents)
    return rounded
