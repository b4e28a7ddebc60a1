"""Several candidates on the same samples: a proof is worth what it says, however many are tried."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from trtq.gate.intervals import ratio_score
from trtq.gate.looks import MOST_LATER, level_of

SAMPLES, MARGIN, JOBS = 3000, 0.01, 600


@pytest.fixture(scope="module")
def scores() -> NDArray[np.float64]:
    """z of candidates whose true drop is just the margin, (jobs, 1 + MOST_LATER): of 90 % right answers 1.9 %
    are lost and 1 % gained, by each candidate on samples of its own."""
    random = np.random.default_rng(0)
    kinds = random.multinomial(SAMPLES, [0.9 - 0.019, 0.019, 0.01, 0.1 - 0.01], size=(JOBS, 1 + MOST_LATER))
    found = [ratio_score(*counts[:3], SAMPLES, 1 - MARGIN) for counts in kinds.reshape(-1, 4).tolist()]
    return np.reshape(found, (JOBS, 1 + MOST_LATER))


def passing(scores: NDArray[np.float64], levels: list[float]) -> float:
    """The share of jobs of which any candidate clears the margin at its level."""
    return float((scores > [NormalDist().inv_cdf(level) for level in levels]).any(axis=1).mean())


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_first_to_pass_is_as_rarely_wrong_as_one_alone(
    scores: NDArray[np.float64], confidence: float
) -> None:
    error = 1 - confidence
    spread = 3 * (error / JOBS) ** 0.5
    alone = passing(scores[:, :1], [confidence])
    assert alone < error + spread
    first, later = (level_of(confidence, first=first) for first in (True, False))
    assert passing(scores, [first, *[later] * MOST_LATER]) < error + spread
    assert passing(scores[:, :10], [confidence] * 10) > 4 * error


def test_the_levels_share_the_error() -> None:
    first, later = (level_of(0.95, first=first) for first in (True, False))
    assert first == pytest.approx(0.96)
    assert (1 - first) + MOST_LATER * (1 - later) == pytest.approx(0.05)
    assert level_of(1 - 2**-53, first=False) < 1
