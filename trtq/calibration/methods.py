"""Calibration methods: each turns a histogram of |x| into amax, the largest magnitude kept (paper 3.3).

All methods are pure functions of the same statistics. Values above amax saturate; the symmetric scale
is amax / 127 (`numerics.scale_from_amax`). Where the position inside a bin matters, the values of a bin
are taken as spread evenly over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trtq.calibration.statistics import Histogram, Statistics
from trtq.errors import InputError
from trtq.numerics import has_scale, scale_from_amax

Float64 = NDArray[np.float64]

LEVELS = 128
"""Magnitudes an INT8 code can hold: 0 ... 127."""


AUTO: Final = "auto"
"""What stands for a measured choice among methods."""


@dataclass(frozen=True)
class Method:
    """A calibration method: `max`, `entropy`, `mse` or `percentile:P`; equal where the names are."""

    name: str
    amax: Callable[[Histogram], float] = field(compare=False)

    def __str__(self) -> str:
        return self.name


def parse_method(text: str) -> Method:
    """The method named by `text`, whatever its case, blanks and form of the number.

    Raises:
        InputError: unknown name, or a percentile outside (0, 100].
    """
    name, _, parameter = text.strip().lower().partition(":")
    if name in _PLAIN and not parameter:
        return Method(name, _PLAIN[name])
    if name == "percentile":
        try:
            percentile = float(parameter)
        except ValueError:
            percentile = math.nan
        if 0 < percentile <= 100:
            number = repr(percentile).removesuffix(".0")
            return Method(f"percentile:{number}", lambda h: amax_percentile(h, percentile))
    raise InputError(
        f"unknown calibration method '{text}'",
        remedy="use max, entropy, mse, percentile:P with 0 < P <= 100, e.g. percentile:99.99, or auto",
    )


def amax_of(method: Method, histogram: Histogram) -> float:
    """A method's amax; the largest |x| where the method keeps nothing but zeros, as a percentile of a tensor
    that is nearly always zero does. Then only a tensor that is always zero has no range."""
    amax = method.amax(histogram)
    return amax if has_scale(amax) else histogram.amax


def scales_from(
    statistics: Statistics, method: Method, exceptions: Mapping[str, Method] | None = None
) -> dict[str, np.float32]:
    """Tensor -> float32 scale (amax / 127) by one method, or by the tensor's own among `exceptions`.

    Tensors that no method has a range for are left out (see `amax_of`).
    """
    exceptions = exceptions or {}
    found = {
        name: amax_of(exceptions.get(name, method), histogram)
        for name, histogram in statistics.histograms.items()
    }
    return {name: np.float32(scale_from_amax(amax)) for name, amax in found.items() if has_scale(amax)}


def scaled(method: Method, factor: float) -> Method:
    """`method` with its amax multiplied by `factor`, but never above the largest |x|."""
    return Method(f"{method}*{factor:g}", lambda h: min(method.amax(h) * factor, h.amax))


def amax_max(histogram: Histogram) -> float:
    """The largest |x| seen, exactly (paper 3.3, "Max")."""
    return histogram.amax


def amax_percentile(histogram: Histogram, percentile: float) -> float:
    """The magnitude below which `percentile` % of the values lie (paper 3.3, "Percentile")."""
    wanted = histogram.total * percentile / 100
    if wanted <= 0:
        return histogram.amax
    counts, edges = histogram.counts, histogram.edges
    cumulative = np.cumsum(counts)
    index = int(np.searchsorted(cumulative, wanted))
    if index >= cumulative.size:
        return histogram.amax
    inside = (wanted - (cumulative[index] - counts[index])) / counts[index]
    return float(min(edges[index] + inside * (edges[index + 1] - edges[index]), histogram.amax))


def amax_entropy(histogram: Histogram) -> float:
    """The amax that minimises KL(P || Q) between the values and their INT8 image (paper 3.3, "Entropy").

    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017, on 2048 to 4096 bins below the largest
    |x|. For every candidate of i >= 128 bins, P is the first i bins with all larger values added to the
    last one; Q is the first i bins without them, merged into 128 levels of i // 128 bins (the last level
    takes the rest) whose mass is spread evenly over those of their bins that P does not leave empty;
    amax = (i + 0.5) bins. Four things the talk leaves open: the first bin takes the count of the second,
    as in NVIDIA's pytorch-quantization, because the exact zeros behind a ReLU cost nothing at any scale;
    a last bin that is empty but for the larger values counts as one that P does not leave empty, so that
    an outlier behind a gap does not make every candidate but itself infinitely bad; a last level that Q
    leaves without mass where P has some gets that of the least occupied bin, but at most 1/10000 of all;
    and a candidate must keep half of the values, since P and Q agree perfectly where everything saturates.
    Of equals the lowest is taken.

    No candidate lies below 1/32 of the range, by the algorithm's own definition: every one of its first 128
    bins is a level, so that it sees no rounding there. For a bulk that lies further below the largest |x|
    there are the percentiles and the mean squared error.
    """
    counts, width = _trimmed(histogram, 2 * 2048)
    if counts.size <= LEVELS:  # zeros, or too small for more bins
        return histogram.amax
    counts[0] = counts[1]
    mass = _cumulative(counts)
    total = mass[-1]
    least = min(counts[counts > 0].min(), total / 10000)
    occupied = _cumulative(counts > 0)
    plogp = _cumulative(counts * np.log(np.maximum(counts, 1)))

    def level_cost(level_mass: Float64, q_mass: Float64, bins: Float64) -> Float64:
        """Sum of P * log Q over a level, before both are normalised."""
        return level_mass * np.log(np.where(q_mass > 0, q_mass, 1.0) / np.maximum(bins, 1))

    divergences = []
    for merged in range(1, counts.size // LEVELS + 1):
        candidates = np.arange(merged * LEVELS, min((merged + 1) * LEVELS, counts.size + 1))
        edges = np.arange(LEVELS) * merged
        levels = np.diff(mass[edges])
        shared = level_cost(levels, levels, np.diff(occupied[edges])).sum()
        start, last = edges[-1], candidates - 1
        kept = mass[candidates]
        kept_last, tail = kept - mass[start], total - kept
        p_last = counts[last] + tail
        added = np.where((kept_last == 0) & (tail > 0), least, 0.0)
        bins_last = occupied[candidates] - occupied[start] + ((counts[last] == 0) & (tail > 0))
        cross = shared + level_cost(kept_last + tail, kept_last + added, bins_last)
        own = plogp[last] + p_last * np.log(np.maximum(p_last, 1))
        divergence = (own - cross) / total + np.log((kept + added) / total)
        divergences.append(np.where(2 * kept < total, math.inf, divergence))
    divergence = np.concatenate(divergences)
    best = LEVELS + int(np.argmax(divergence <= divergence.min() + 1e-12))
    return min((best + 0.5) * width, histogram.amax)


def amax_mse(histogram: Histogram) -> float:
    """The amax whose INT8 grid has the least mean squared error, rounding and saturation together.

    The error of every candidate (from the largest |x| downwards in steps of 1 %, as far as one can be the
    best, and then of 0.1 % around the best) is exact for values spread evenly inside their bins: the moments
    of a piecewise constant density between the rounding boundaries. See Sung et al. 2015 and Banner et al.
    2018 (ACIQ) for the criterion.
    """
    if histogram.amax == 0:
        return 0.0
    steps = math.ceil(math.log(_least_mse_amax(histogram) / histogram.amax, 0.99))
    best = histogram.amax
    for exponents in (np.arange(steps + 1), np.linspace(-1, 1, 21)):
        candidates = np.minimum(best * 0.99**exponents, histogram.amax)
        best = float(candidates[int(np.argmin(_squared_errors(histogram, candidates)))])
    return best


def _least_mse_amax(histogram: Histogram) -> float:
    """A magnitude at or below the amax of least squared error.

    For any m with p values above it and q below, m as amax rather than some lower a saves each of the p at
    least (m - a)^2, and costs each of the q at most half a step squared, (m / 254)^2. So no a is best with
    m - a > sqrt(q / p) * m / 254.
    """
    used = int(np.flatnonzero(histogram.counts)[-1]) + 1
    counts, edges = histogram.counts[:used], histogram.edges
    above = np.cumsum(counts[::-1])[::-1]
    below = above[0] - above
    bounds = edges[:used] * (1 - np.sqrt(below / above) / (2 * (LEVELS - 1)))
    return float(min(max(bounds.max(), edges[1]), histogram.amax))


def _squared_errors(histogram: Histogram, candidates: Float64) -> Float64:
    """Sum of the squared errors of rounding and saturation for every candidate amax."""
    counts, edges = histogram.counts.astype(np.float64), histogram.edges
    density = counts / np.diff(edges)
    step = candidates[:, None] / (LEVELS - 1)
    boundaries = np.concatenate([(np.arange(LEVELS) - 0.5).clip(0) * step, np.full_like(step, edges[-1])], 1)
    boundaries = boundaries.clip(0, edges[-1])
    bins = np.searchsorted(edges[:-1], boundaries, side="right") - 1
    inside = density[bins]

    def moments(k: int) -> Float64:
        """Integral of |x|^k over every level of every candidate."""
        powers = edges ** (k + 1)
        below = _cumulative(density * np.diff(powers) / (k + 1))[bins]
        return np.diff(below + inside * (boundaries ** (k + 1) - powers[bins]) / (k + 1), axis=1)

    m0, m1, m2 = (moments(k) for k in range(3))
    level = np.arange(LEVELS) * step
    return (m2 - 2 * level * m1 + level**2 * m0).sum(axis=1)


def sqnr_db(histogram: Histogram, amax: float) -> float:
    """Signal-to-quantization-noise ratio of a tensor's own values in INT8 with this amax, in dB: rounding and
    saturation together, exact for values spread evenly inside their bins.

    It says nothing of what that noise does further on. inf for a tensor of zeros.
    """
    counts, edges = histogram.counts, histogram.edges
    low, high = edges[:-1], edges[1:]
    signal = float((counts * (low * low + low * high + high * high)).sum() / 3)
    error = float(_squared_errors(histogram, np.array([amax]))[0])
    return 10 * math.log10(signal / error) if signal > 0 and error > 0 else math.inf


_PLAIN: dict[str, Callable[[Histogram], float]] = {
    "max": amax_max,
    "entropy": amax_entropy,
    "mse": amax_mse,
}


def _trimmed(histogram: Histogram, most: int) -> tuple[Float64, float]:
    """Counts up to the largest |x|, merged in pairs to at most `most` bins, and their width."""
    counts = histogram.equal_counts()
    width = math.ldexp(1.0, histogram.exponent) / counts.size
    used = int(histogram.amax / width) + 1
    while used > most:
        counts, width, used = counts.reshape(-1, 2).sum(axis=1), 2 * width, (used + 1) // 2
    return counts[:used].astype(np.float64), width


def _cumulative(values: NDArray) -> Float64:
    """Running sum with a leading zero: [k] is the sum of the first k values."""
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
