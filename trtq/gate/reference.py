"""Whether the reference's score means anything: near chance, labels or preprocessing are wrong.

Chance is what the reference scores with the labels of other samples. It needs no theory of the metric, and a
model that always gives one answer cannot hide behind labels that are mostly that answer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from trtq.data.batches import Arrays
from trtq.gate.metrics import Metric
from trtq.simulation.values import AllValues, take_all

TRIALS = 16
"""How often the labels are shuffled."""

MOST_VALUES = 1 << 24
"""Most output values scored in one trial: of larger outputs, an evenly spread part of the samples."""

LEAST_ABOVE = 0.05
"""A score is near chance below this part of the way from chance to 1 ..."""

LEAST_DEVIATIONS = 3.0
"""... or within this many standard deviations of what the trials scored."""


def doubt(metric: Metric, outputs: AllValues, targets: Arrays, value: float) -> str | None:
    """What is doubtful about the reference's value of a metric; None if nothing is, or it cannot be told.

    Only the built-in metrics with labels can be judged so.

    Args:
        outputs: the reference's.
        value: the reference's value.
    """
    if metric.labels is None:
        return None
    labels = metric.labels(targets)
    if len(labels) < 2:
        return None
    scored = labels[labels >= 0]
    if scored.size and (only := int(scored.min())) == scored.max():
        return (
            f"every label of the evaluation data is {only}: a model that always answers {only} scores best in"
            f" {metric.name}; evaluate on samples of every class"
        )
    scores = np.array(list(_by_chance(metric, outputs, targets, len(labels))))
    chance, deviation = float(scores.mean()), float(scores.std(ddof=1))
    if value >= chance + max(LEAST_DEVIATIONS * deviation, LEAST_ABOVE * (1 - chance)):
        return None
    return (
        f"the reference scores {value:.4g} in {metric.name} on {len(labels)} samples, and {chance:.4g} with"
        " the labels of other samples: that is chance, or near it; check the preprocessing and the labels"
    )


def _by_chance(metric: Metric, outputs: AllValues, targets: Arrays, samples: int) -> Iterator[float]:
    """Values of the metric where every sample has the labels of another one."""
    random = np.random.default_rng(0)
    values = sum(np.size(row) for own in outputs.values() for row in own) // samples
    count = min(max(MOST_VALUES // max(values, 1), 2), samples)
    part = np.arange(count) * samples // count
    outputs = take_all(outputs, part)
    for _ in range(TRIALS):
        dealt = part[_derangement(count, random)]
        yield metric.value(outputs, {name: array[dealt] for name, array in targets.items()})


def _derangement(count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """A random order of `count` >= 2 in which none keeps its place."""
    order = random.permutation(count)
    found = np.empty(count, np.int64)
    found[order] = np.roll(order, random.integers(1, count))
    return found
