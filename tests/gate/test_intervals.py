"""Intervals against scipy, closed forms, a grid-searched likelihood and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from trtq.gate.intervals import (
    Units,
    binary_evidence,
    bootstrap_calls,
    bootstrap_evidence,
    bootstrap_means,
    ratio_interval,
    ratio_score,
    samples_to_prove,
    tango_interval,
)


@pytest.mark.parametrize(("lost", "gained"), [(5, 3), (0, 7), (9, 0)])
def test_ratio_one_is_mcnemar(lost, gained):
    assert ratio_score(50, lost, gained, 100, 1.0) == pytest.approx(
        (gained - lost) / math.sqrt(lost + gained)
    )


@pytest.mark.parametrize("table", [(60, 7, 3, 30), (80, 0, 0, 20), (10, 5, 0, 1), (3, 1, 8, 40)])
@pytest.mark.parametrize("ratio", [0.8, 0.99, 1.2])
def test_ratio_score_uses_the_restricted_maximum_likelihood(table, ratio):
    """The variance is the one at the maximum that a numeric optimizer finds."""
    both, lost, gained, neither = table
    n = sum(table)
    right = (n - neither) / n

    def cells(p_lost):  # both margins follow from the constraint and from p(neither) being free
        p_both = (right - (1 + ratio) * p_lost) / ratio
        return p_both, p_lost, right - p_both - p_lost

    def cost(p_lost):
        return -sum(
            k * math.log(max(p, 1e-300))
            for k, p in zip((both, lost, gained), cells(p_lost), strict=True)
            if k
        )

    low, high = max(0.0, (1 - ratio) * right), right / (1 + ratio)
    best = optimize.minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-12})
    _, p_lost, p_gained = cells(best.x)
    expected = (both + gained - ratio * (both + lost)) / math.sqrt(n * ratio * (p_lost + p_gained))
    assert ratio_score(both, lost, gained, n, ratio) == pytest.approx(expected, rel=1e-4)


def test_models_that_never_disagree_still_need_samples():
    """z = sqrt(right (1 - r) / r) by hand: 268 right answers prove 1 % at 95 %, 267 do not."""
    assert ratio_score(300, 0, 0, 400, 0.99) == pytest.approx(math.sqrt(300 * 0.01 / 0.99))
    scores = np.ones(268)
    assert binary_evidence(scores, scores, 0.01, 0.95).proved
    few = binary_evidence(scores[:267], scores[:267], 0.01, 0.95)
    assert not few.proved
    assert few.samples_to_prove == 268


@pytest.mark.parametrize("table", [(60, 7, 3, 30), (80, 0, 2, 20), (10, 5, 0, 1), (0, 3, 0, 9)])
def test_ratio_interval_inverts_the_score(table):
    both, lost, gained, _ = table
    n = sum(table)
    critical = stats.norm.ppf(0.975)
    low, high = ratio_interval(both, lost, gained, n)
    assert ratio_score(both, lost, gained, n, high) == pytest.approx(-critical, abs=1e-6)
    if both + gained:
        assert ratio_score(both, lost, gained, n, low) == pytest.approx(critical, abs=1e-6)
    else:
        assert low == 0


@pytest.mark.parametrize(("right", "n"), [(90, 100), (60, 100), (5, 5)])
def test_tango_against_wilson(right, n):
    """With a candidate that is never right where the reference is wrong and the reference always
    right, the drop is one binomial proportion and the score interval is Wilson's (as long as the
    restricted likelihood puts nothing on the empty cell, as it does in these tables)."""
    lost = n - right
    low, high = tango_interval(lost, 0, n)
    wilson = stats.binomtest(lost, n).proportion_ci(method="wilson")
    assert high == pytest.approx(wilson.high, abs=1e-9)
    if lost:
        assert low == pytest.approx(wilson.low, abs=1e-9)


def test_tango_solves_its_own_equation_with_a_numeric_maximum():
    """Both limits have |z| = 1.96, the nuisance parameter maximised numerically."""
    lost, gained, n = 12, 2, 44
    for limit in tango_interval(lost, gained, n):

        def cost(p, delta=limit):
            return -(lost * math.log(p + delta) + gained * math.log(p) + 30 * math.log(1 - 2 * p - delta))

        bounds = (max(0, -limit) + 1e-12, (1 - limit) / 2 - 1e-12)
        p = optimize.minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-13}).x
        variance = n * (2 * p + limit * (1 - limit))
        assert abs(lost - gained - n * limit) / math.sqrt(variance) == pytest.approx(1.95996, abs=1e-4)


def test_swapping_the_models_mirrors_tango():
    low, high = tango_interval(9, 4, 60)
    assert tango_interval(4, 9, 60) == pytest.approx((-high, -low))


def test_the_score_test_keeps_its_level_at_the_margin():
    """At a drop of exactly the margin, at most about 5 % of the experiments may claim a pass."""
    rng = np.random.default_rng(7)
    n, ratio = 500, 0.95
    p_both, p_lost = 0.72, 0.08  # the reference is right in 0.80, the candidate in 0.76
    p = [p_both, p_lost, 0.76 - p_both, 1 - 0.76 - p_lost]
    tables = rng.multinomial(n, p, size=4000)
    z = np.array([ratio_score(both, lost, gained, n, ratio) for both, lost, gained, _ in tables.tolist()])
    assert 0.04 < np.mean(z > 1.645) < 0.06
    assert 0.04 < np.mean(z < -1.645) < 0.06


def test_intervals_cover():
    rng = np.random.default_rng(8)
    n, p = 150, [0.75, 0.09, 0.05, 0.11]
    tables = rng.multinomial(n, p, size=800).tolist()
    ratio = (p[0] + p[2]) / (p[0] + p[1])
    relative = [ratio_interval(a, b, c, n) for a, b, c, _ in tables]
    absolute = [tango_interval(b, c, n) for _, b, c, _ in tables]
    assert 0.93 < np.mean([low < ratio < high for low, high in relative]) < 0.97
    assert 0.93 < np.mean([low < p[1] - p[2] < high for low, high in absolute]) < 0.97


def test_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(9)
    reference = rng.uniform(0.5, 1, 200)
    candidate = reference * 0.97 + rng.normal(0, 0.05, 200)
    means = bootstrap_means(Units.each(len(reference)), reference[:, None], candidate[:, None])
    estimate = candidate.mean() - 0.99 * reference.mean()
    evidence = bootstrap_evidence(means[0][:, 0], means[1][:, 0], estimate, Units.each(200), 0.01, 0.95)
    expected = stats.bootstrap(
        (reference, candidate),
        lambda r, c, axis: 1 - c.mean(axis=axis) / r.mean(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        random_state=1,
    ).confidence_interval
    assert evidence.relative == pytest.approx((expected.low, expected.high), abs=5e-4)
    assert evidence.refuted


def test_bootstrap_is_paired_and_repeatable():
    rows = np.random.default_rng(1).uniform(size=(50, 2))
    first, second = bootstrap_means(Units.each(len(rows)), rows, rows)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, bootstrap_means(Units.each(len(rows)), rows)[0])
    assert first.std(axis=0) == pytest.approx(rows.std(axis=0) / math.sqrt(50), rel=0.05)


def test_bootstrap_covers():
    rng = np.random.default_rng(3)
    hits = []
    for _ in range(100):
        reference = rng.uniform(0.6, 1, 60)
        candidate = reference - rng.exponential(0.02, 60)
        means = bootstrap_means(Units.each(len(reference)), reference[:, None], candidate[:, None])
        low, high = bootstrap_evidence(means[0][:, 0], means[1][:, 0], 0, Units.each(60), 0.01, 0.95).absolute
        hits.append(low < 0.02 < high)
    assert np.mean(hits) > 0.87


def test_few_samples_prove_nothing_by_bootstrap():
    draws = np.ones(1000)
    assert not bootstrap_evidence(draws, draws, 0.01, Units.each(29), 0.01, 0.95).proved
    assert bootstrap_evidence(draws, draws, 0.01, Units.each(30), 0.01, 0.95).proved


def test_unusable_draws_are_left_out():
    reference = np.array([np.nan, 0.0, 1.0, 1.0])
    evidence = bootstrap_evidence(reference, np.full(4, 0.9), -0.09, Units.each(40), 0.01, 0.95)
    assert evidence.relative == pytest.approx((0.1, 0.1))
    assert bootstrap_evidence(reference[:2], reference[:2], 1, Units.each(40), 0.01, 0.95).relative is None


def test_bootstrap_calls_passes_whole_resamples():
    draws = bootstrap_calls(10, lambda indices: (float(indices.sum()), float(len(indices))))
    assert draws.shape == (2, 1000)
    assert set(draws[1]) == {10.0}
    assert draws[0].mean() == pytest.approx(45, abs=1)


def test_samples_to_prove_is_the_smallest_that_does():
    mean, sd, n = 0.004, 0.2, 500
    needed = samples_to_prove(mean / (sd / math.sqrt(n)), n)
    bound = stats.norm.ppf(0.95) * sd
    assert mean - bound / math.sqrt(needed) > 0 > mean - bound / math.sqrt(needed - 1) - 1e-15
    assert samples_to_prove(0.0, n) is None
    assert samples_to_prove(-1.0, n) is None


def test_sequences_by_hand():
    units = Units((0, 3, 4), 6)
    assert (units.count, units.sizes.tolist()) == (3, [3, 1, 2])
    assert units.worth == 2  # 36 / (9 + 1 + 4) = 2.57
    rows = np.arange(12.0).reshape(6, 2)
    np.testing.assert_array_equal(units.sums(rows), [[6, 9], [6, 7], [18, 20]])
    np.testing.assert_array_equal(units.members(np.array([2, 0, 2])), [4, 5, 0, 1, 2, 4, 5])
    assert Units.each(7).worth == 7


def test_samples_that_are_all_alike_in_their_sequences_prove_no_more_than_one_each():
    """Five of each: the same resamples, and so the same means, as of one of each."""
    rows = np.random.default_rng(10).uniform(size=(40, 3))
    sequences = Units(tuple(range(0, 200, 5)), 200)
    np.testing.assert_allclose(
        bootstrap_means(sequences, rows.repeat(5, axis=0))[0], bootstrap_means(Units.each(40), rows)[0]
    )


def test_long_sequences_count_for_more():
    """A resample's mean is over the samples of the sequences drawn: against the samples themselves."""
    units, rows = Units((0, 4, 5), 12), np.random.default_rng(11).uniform(size=(12, 1))
    means = bootstrap_means(units, rows)[0][:, 0]
    values = [rows[units.members(np.array(d))].mean() for d in np.ndindex(3, 3, 3)]
    np.testing.assert_allclose(np.unique(means.round(9)), np.unique(np.round(values, 9)))
    assert means.mean() == pytest.approx(np.mean(values), abs=0.005)


@pytest.mark.slow
def test_intervals_of_sequences_cover():
    """Errors that last a whole sequence: of 60 sequences of 1 to 9 samples, against taking samples for
    independent."""
    rng = np.random.default_rng(12)
    covered = np.zeros(2)
    for _ in range(100):
        sizes = rng.integers(1, 10, 60)
        starts = tuple((np.cumsum(sizes) - sizes).tolist())
        samples = int(sizes.sum())
        candidate = (1 - rng.exponential(0.05, 60)).repeat(sizes) + rng.normal(0, 0.01, samples)
        for which, units in enumerate((Units(starts, samples), Units.each(samples))):
            one, means = bootstrap_means(units, np.ones((samples, 1)), candidate[:, None])
            low, high = bootstrap_evidence(one[:, 0], means[:, 0], 0, units, 0.01, 0.95).absolute
            covered[which] += low < 0.05 < high
    assert covered[0] >= 88
    assert covered[1] <= 75


def test_answers_count_as_what_they_are_worth():
    """400 right answers prove 1 %; those of 40 sequences that are all right do not: 268 would be needed."""
    scores = np.ones(400)
    assert binary_evidence(scores, scores, 0.01, 0.95).proved
    few = binary_evidence(scores, scores, 0.01, 0.95, units=40)
    assert not few.proved
    assert few.relative == pytest.approx(binary_evidence(scores[:40], scores[:40], 0.01, 0.95).relative)
    assert 2670 < few.samples_to_prove <= 2680


def test_one_sequence_gives_no_interval():
    draws = np.full(1000, 0.9)
    evidence = bootstrap_evidence(draws, draws, 0.01, Units((0,), 500), 0.01, 0.95)
    assert (evidence.relative, evidence.proved) == (None, False)
