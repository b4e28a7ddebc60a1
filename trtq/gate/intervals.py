"""How sure a paired comparison is: intervals for the drop from reference to candidate.

The claim is non-inferiority (Wu et al. 2020 ask for 1 % relative):
candidate > (1 - max_drop) · reference. Both models see the same samples, so everything here is paired.

Two methods:

- right-or-wrong scores: the score test of a ratio of paired proportions (Nam & Blackwelder 2002;
  Tang, Tang & Chan 2003), and Tango's score interval (1998) for the absolute drop. Unlike the
  bootstrap they stay honest when the two models never disagree.
- everything else: the percentile bootstrap, whole samples resampled with a fixed seed.

Samples that follow each other in a sequence are not independent: an error goes on from one to the next.
Sequences are, so they are what is resampled then (the cluster bootstrap; Field & Welsh 2007, Journal of the
Royal Statistical Society B 69). Of right-or-wrong scores on which the models differ in few sequences the
bootstrap sees too little; there the score test takes all samples of a sequence for one (`Units.worth`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

RESAMPLES = 10_000
"""Bootstrap resamples when the metric is computed from per-sample rows."""

RESAMPLES_OF_FUNCTION = 1_000
"""Bootstrap resamples when each one is two calls of the metric, if there is time for as many."""

ROUGH_BELOW = 200
"""An interval of fewer resamples is rough: its ends rest on the outermost few."""

MIN_BOOTSTRAP_SAMPLES = 30
"""The bootstrap proves nothing on fewer samples: its tails are too short there."""

_SEED = 20040960
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Evidence:
    """What the samples say about the drop from reference to candidate.

    Attributes:
        relative: two-sided interval of 1 - candidate / reference; None if no draw was usable.
        absolute: two-sided interval of reference - candidate; None likewise.
        proved: the one-sided bound clears the margin: the drop is below it.
        refuted: the other one-sided bound is beyond the margin: the drop is above it.
        samples_to_prove: see `samples_to_prove`.
        draws: resamples of a metric that is called for each; None: the evidence comes from per-sample scores.
        unusable: resamples on which a value is not finite or the reference is not positive; left out.
    """

    relative: tuple[float, float] | None
    absolute: tuple[float, float] | None
    proved: bool
    refuted: bool
    samples_to_prove: int | None
    draws: int | None = None
    unusable: int = 0


@dataclass(frozen=True)
class Units:
    """What is independent of each other: each sample for itself, or sequences of samples.

    Attributes:
        starts: the first sample of each, ascending from 0.
        samples: how many there are in all.
    """

    starts: tuple[int, ...]
    samples: int

    @classmethod
    def each(cls, samples: int) -> Units:
        """Each sample for itself."""
        return cls(tuple(range(samples)), samples)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.starts)

    @property
    def worth(self) -> int:
        """How many independent samples they are worth if all samples of each were alike: fewer than there are
        where their sizes differ (Kish 1965)."""
        return self.samples**2 // int(np.sum(self.sizes**2))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Samples of each, int64 (count,)."""
        return np.diff([*self.starts, self.samples])

    def sums(self, rows: Float) -> Float:
        """The sum of each one's rows: (samples, k) -> (count, k)."""
        return rows if self.count == self.samples else np.add.reduceat(rows, self.starts, axis=0)

    def members(self, drawn: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples of some of them, one after the other."""
        ends = (*self.starts[1:], self.samples)
        return np.concatenate([np.arange(self.starts[unit], ends[unit]) for unit in drawn])


def samples_to_prove(z: float, samples: int, confidence: float = 0.95) -> int | None:
    """How many samples would prove the claim, if they went on like the `samples` seen.

    The test statistic z (estimate over its standard error) grows with the square root of the
    number of samples; this is the smallest number that takes it beyond the one-sided critical
    value. None when z <= 0: the estimate itself is on the wrong side.
    """
    if z <= 0:
        return None
    return math.floor(samples * (_critical(confidence) / z) ** 2) + 1


def binary_evidence(
    reference: Float, candidate: Float, max_drop: float, confidence: float, units: int | None = None
) -> Evidence:
    """Score-test evidence from right (1) or wrong (0) per sample, two arrays of shape (samples,).

    Args:
        max_drop: the allowed relative drop, 0 to 1; at least one reference score must be 1.
        confidence: of the one-sided claim, and of the two-sided intervals; 0.5 to 1, exclusive.
        units: how many samples they count as, in the same proportions; None: as many as they are.
    """
    n = units or len(reference)
    weight = n / len(reference)
    both = weight * int(np.sum((reference == 1) & (candidate == 1)))
    lost = weight * int(np.sum((reference == 1) & (candidate == 0)))
    gained = weight * int(np.sum((reference == 0) & (candidate == 1)))
    z = ratio_score(both, lost, gained, n, 1 - max_drop)
    low, high = ratio_interval(both, lost, gained, n, confidence)
    return Evidence(
        relative=(1 - high, 1 - low),
        absolute=tango_interval(lost, gained, n, confidence),
        proved=z > _critical(confidence),
        refuted=z < -_critical(confidence),
        samples_to_prove=samples_to_prove(z, len(reference), confidence),
    )


def ratio_score(both: float, lost: float, gained: float, samples: int, ratio: float) -> float:
    """Score statistic z of H0: p(candidate right) = ratio · p(reference right), paired samples.

    Positive z speaks for the candidate. The variance is taken at the restricted maximum of the
    multinomial likelihood, in closed form (Nam & Blackwelder 2002, Biometrics 58): with
    n = samples, z = (x_c - ratio·x_r) / sqrt(n·ratio·(p_lost + p_gained)), where p_lost is the
    larger root of (1 + ratio)·n·p² - B·p + lost·(1 - ratio)·(both + lost + gained)/n = 0,
    B = (both + lost)·(1 - ratio²) + lost + gained.

    Args:
        both, lost, gained: how many samples both models got right, only the reference did, only
            the candidate did.
        samples: all samples, those that both got wrong included.
        ratio: positive.
    """
    right = both + lost + gained
    a = (1 + ratio) * samples
    b = (both + lost) * (1 - ratio**2) + lost + gained
    c = lost * (1 - ratio) * right / samples
    p_lost = (b + math.sqrt(max(b * b - 4 * a * c, 0.0))) / (2 * a)
    p_gained = max((p_lost - (1 - ratio) * right / samples) / ratio, 0.0)
    difference = both + gained - ratio * (both + lost)
    variance = samples * ratio * (p_lost + p_gained)
    return difference / math.sqrt(variance) if variance > 0 else 0.0


def ratio_interval(
    both: float, lost: float, gained: float, samples: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Two-sided score interval of p(candidate right) / p(reference right); `ratio_score` inverted.

    The reference must be right at least once (both + lost > 0).
    """
    critical = _critical((1 + confidence) / 2)
    estimate = (both + gained) / (both + lost)

    def score(ratio: float) -> float:
        return ratio_score(both, lost, gained, samples, ratio)

    above = max(estimate, 1.0)
    while score(above) > -critical:
        above *= 2
    low = 0.0 if estimate == 0 else _crossing(lambda x: score(x) - critical, 1e-12, estimate)
    return low, _crossing(lambda x: score(x) + critical, max(estimate, 1e-12), above)


def tango_interval(lost: float, gained: float, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided score interval of p(lost) - p(gained), the absolute drop of paired proportions.

    Tango 1998, Statistics in Medicine 17, 891-908: z(Δ) = (lost - gained - nΔ) /
    sqrt(n·(2·p_gained + Δ·(1 - Δ))) with p_gained the restricted maximum-likelihood estimate.
    """
    critical = _critical((1 + confidence) / 2)
    estimate = (lost - gained) / samples

    def score(delta: float) -> float:
        b = -lost - gained + (2 * samples - lost + gained) * delta
        c = -gained * delta * (1 - delta)
        p_gained = (math.sqrt(max(b * b - 8 * samples * c, 0.0)) - b) / (4 * samples)
        variance = samples * (2 * p_gained + delta * (1 - delta))
        difference = lost - gained - samples * delta
        return difference / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, difference)

    edge = 1 - 1e-12
    low = -1.0 if estimate == -1 else _crossing(lambda x: score(x) - critical, -edge, estimate)
    high = 1.0 if estimate == 1 else _crossing(lambda x: score(x) + critical, estimate, edge)
    return low, high


def bootstrap_evidence(
    reference: Float, candidate: Float, estimate: float, units: Units, max_drop: float, confidence: float
) -> Evidence:
    """Percentile-bootstrap evidence from paired draws of the two values, each of shape (resamples,).

    Args:
        estimate: candidate - (1 - max_drop) · reference on the samples themselves.
        units: what was resampled.
        max_drop, confidence: as for `binary_evidence`.

    Draws on which a value is not finite or the reference is not positive are left out, and nothing is proved
    where those are more than half; nor is what the samples themselves contradict. Of fewer than
    `RESAMPLES_OF_FUNCTION` draws a bound is taken so far out that it errs on the safe side 19 times in 20:
    few draws prove less, never more.
    """
    usable = np.isfinite(reference) & np.isfinite(candidate) & (reference > 0)
    reference, candidate = reference[usable], candidate[usable]
    unusable = int((~usable).sum())
    if len(reference) == 0 or units.count == 1:
        return Evidence(None, None, False, False, None, unusable=unusable)
    margin = candidate - (1 - max_drop) * reference
    error = float(np.std(margin))
    z = estimate / error if error > 0 else math.copysign(math.inf, estimate) if estimate else 0.0
    tail = _safe_tail(1 - confidence, len(reference))
    enough = units.worth >= MIN_BOOTSTRAP_SAMPLES and tail > 0 and unusable <= len(reference)
    needed = samples_to_prove(z, units.samples, confidence)
    least = math.ceil(MIN_BOOTSTRAP_SAMPLES * units.samples / units.worth)
    return Evidence(
        relative=_percentiles(1 - candidate / reference, confidence),
        absolute=_percentiles(reference - candidate, confidence),
        proved=enough and estimate > 0 and bool(np.quantile(margin, tail) > 0),
        refuted=enough and estimate < 0 and bool(np.quantile(margin, 1 - tail) < 0),
        samples_to_prove=None if needed is None else max(needed, least),
        unusable=unusable,
    )


def bootstrap_means(units: Units, *rows: Float) -> list[Float]:
    """Mean rows of `RESAMPLES` resamples, the same resamples for every array: (resamples, k) each.

    Args:
        units: what is resampled.
        rows: float64 arrays of shape (samples, k).
    """
    drawn, sizes, sums = units.count, units.sizes.astype(np.float64), [units.sums(array) for array in rows]
    per_block = max(1, _BLOCK // drawn)
    means: list[list[Float]] = [[] for _ in rows]
    offsets = drawn * np.arange(per_block)[:, None]
    for draw in _resamples(drawn, RESAMPLES, per_block):
        count = len(draw)
        times = np.bincount((draw + offsets[:count]).ravel(), minlength=count * drawn)
        weights = times.reshape(count, drawn).astype(np.float64)
        weights /= (weights @ sizes)[:, None]
        for collected, array in zip(means, sums, strict=True):
            collected.append(weights @ array)
    return [np.concatenate(collected) for collected in means]


def bootstrap_calls(
    units: int,
    evaluate: Callable[[NDArray[np.int64]], tuple[float, float]],
    draws: int = RESAMPLES_OF_FUNCTION,
    advance: Callable[[int], object] = lambda done: None,
    over: Callable[[int], bool] = lambda done: False,
) -> Float:
    """`evaluate(indices)` on resamples: float64 of shape (2, draws); of fewer, the first ones.

    Args:
        units: how many there are to draw from.
        advance: called with how many were just done.
        over: number of draws done -> whether to stop there.
    """
    found: list[tuple[float, float]] = []
    for draw in _resamples(units, draws, 1):
        found.append(evaluate(draw[0]))
        advance(1)
        if over(len(found)):
            break
    return np.array(found, dtype=np.float64).reshape(-1, 2).T


def _resamples(samples: int, resamples: int, per_block: int) -> Iterator[NDArray[np.int64]]:
    """Blocks of resampled indices, (up to `per_block`, samples) each; the same on every run."""
    rng = np.random.default_rng(_SEED)
    for start in range(0, resamples, per_block):
        yield rng.integers(0, samples, (min(per_block, resamples - start), samples))


def _percentiles(draws: Float, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _safe_tail(tail: float, draws: int) -> float:
    """The share of the draws beyond which a bound lies that is no less strict than the exact one, 19 times in
    20; not positive where so few draws give none."""
    if draws >= RESAMPLES_OF_FUNCTION:
        return tail
    return tail - _critical(0.95) * math.sqrt(tail * (1 - tail) / draws)


def _critical(confidence: float) -> float:
    return NormalDist().inv_cdf(confidence)


def _crossing(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero between `low` and `high`, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
