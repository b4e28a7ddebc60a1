"""Calibration methods against slow, plain references on the values themselves, and their invariants."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from trtq.calibration.methods import (
    _least_mse_amax,
    amax_entropy,
    amax_max,
    amax_mse,
    amax_percentile,
    parse_method,
    scaled,
)
from trtq.calibration.search import CANDIDATES
from trtq.calibration.statistics import BINS, Histogram
from trtq.errors import InputError
from trtq.numerics import scale_from_amax
from trtq.study import METHODS as STUDIED

METHODS = ["max", "entropy", "mse", "percentile:99.9", "percentile:99.99"]


def histogram(x: NDArray) -> Histogram:
    made = Histogram()
    made.add(np.asarray(x, np.float32))
    return made


def times(made: Histogram, factor: int) -> Histogram:
    """The histogram of every value seen `factor` times."""
    return Histogram.of(made.counts * factor, made.exponent, made.low, made.high)


def amaxes(made: Histogram) -> dict[str, float]:
    return {name: parse_method(name).amax(made) for name in METHODS}


@functools.cache
def draw(kind: str, size: int = 50000, seed: int = 0) -> NDArray:
    random = np.random.default_rng(seed)
    return np.asarray(
        {
            "normal": lambda: random.normal(size=size),
            "relu": lambda: np.maximum(random.normal(size=size), 0),
            "laplace": lambda: random.laplace(size=size),
            "exponential": lambda: random.exponential(size=size),
            "uniform": lambda: random.uniform(-1, 1, size),
            "t3": lambda: random.standard_t(3, size),
            "cauchy": lambda: random.standard_cauchy(size),
            "lognormal": lambda: random.lognormal(0, 2, size),
            "bimodal": lambda: np.r_[random.normal(size=size), random.normal(50, 1, size // 100)],
            "gap": lambda: np.r_[random.normal(size=size), 60.0, 61.0],
            "uniform and a gap": lambda: np.r_[random.uniform(size=size), 20.0],
            "sparse": lambda: np.r_[np.zeros(size), random.exponential(size=300)],
            "codes": lambda: random.integers(0, 256, size),
            "forty": lambda: random.normal(size=40),
            "one": lambda: np.array([-3.7]),
            "two": lambda: np.r_[np.ones(1000), 100.0],
            "two halves": lambda: np.r_[np.ones(10), np.full(10, 100.0)],
            "two values": lambda: np.array([1.0, 100.0]),
            "constant": lambda: np.full(9, 0.3),
            "powers of two": lambda: 2.0 ** random.integers(-6, 7, size),
            "gelu": lambda: (lambda z: z / (1 + np.exp(-1.702 * z)))(random.normal(size=size)),
        }[kind](),
        np.float32,
    )


CONTINUOUS = [
    "normal",
    "relu",
    "laplace",
    "exponential",
    "uniform",
    "t3",
    "cauchy",
    "lognormal",
    "bimodal",
    "gap",
    "uniform and a gap",
    "gelu",
]
DISCRETE = ["sparse", "codes", "forty", "one", "two", "two halves", "two values", "constant", "powers of two"]


# -- entropy


def reference_divergences(x: NDArray) -> tuple[NDArray, float]:
    """KL(P || Q) for every number of kept bins, [i] for i, and the width of a bin.

    Migacz's algorithm on 2049 to 4096 bins, with explicit P and Q for every candidate.
    """
    magnitudes = np.abs(x.astype(np.float64))
    width = 2.0 ** math.frexp(magnitudes.max())[1] / 4096
    bins = np.bincount((magnitudes / width).astype(int)).astype(np.float64)
    bins[0] = bins[1]
    total = bins.sum()
    divergences = np.full(bins.size + 1, np.inf)
    for i in range(128, bins.size + 1):
        kept = bins[:i]
        if kept.sum() < total / 2:
            continue
        p = kept.copy()
        p[-1] += bins[i:].sum()
        not_empty = p > 0
        starts = (i // 128) * np.arange(128)
        level_of = np.minimum(np.arange(i) // (i // 128), 127)
        mass = np.add.reduceat(kept, starts)
        spread_over = np.add.reduceat(not_empty.astype(float), starts)
        if mass[-1] == 0 and spread_over[-1] > 0:
            mass[-1] = min(bins[bins > 0].min(), total / 10000)
        q = np.where(not_empty, mass[level_of] / np.maximum(spread_over[level_of], 1), 0)
        p, q = p[not_empty] / p.sum(), q[not_empty] / q.sum()
        divergences[i] = np.sum(p * np.log(p / q))
    return divergences, width


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONTINUOUS + DISCRETE)
def test_entropy_is_the_brute_force_minimum(kind: str) -> None:
    for seed, factor in enumerate((1.0, 1.37, 1.9)):  # amax anywhere between two powers of two
        x = draw(kind, 20000, seed) * np.float32(factor)
        divergences, width = reference_divergences(x)
        best = int(np.argmax(divergences <= divergences.min() + 1e-12))
        assert amax_entropy(histogram(x)) == min((best + 0.5) * width, np.abs(x).max())


def test_entropy_of_128_bins_is_their_maximum() -> None:
    """Every bin is a level of its own: P = Q, and clipping gains nothing."""
    counts = np.random.default_rng(0).integers(0, 1000, 128)
    every = np.zeros(BINS, np.int64)
    every[np.searchsorted(Histogram(exponent=13).edges, np.arange(128))] = counts
    made = Histogram.of(every, 13, 0.0, 127.5)
    np.testing.assert_array_equal(made.equal_counts()[:128], counts)  # of width 1
    assert amax_entropy(made) == 127.5


def test_entropy_of_uniform_values_is_their_maximum() -> None:
    for high in (1.0, 1.3, 1.99):
        x = np.linspace(-high, high, 1 << 17)
        assert amax_entropy(histogram(x)) == np.float32(high)


@pytest.mark.parametrize("outlier", [12.0, 40.0, 100.0, 1000.0])
@pytest.mark.parametrize("count", [1, 3])
def test_an_outlier_behind_a_gap_is_not_picked_for_an_infinite_divergence(outlier: float, count: int) -> None:
    """Every candidate inside the gap has an empty last bin with the outlier's mass on top."""
    x = np.r_[draw("normal"), np.full(count, outlier)]
    assert amax_entropy(histogram(x)) < max(6.0, outlier / 16)


def test_entropy_ignores_zeros() -> None:
    x = draw("relu")
    assert amax_entropy(histogram(x)) == amax_entropy(histogram(np.r_[x, np.zeros(10**6)]))


@pytest.mark.parametrize("ratio", [1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("count", [1, 10])
def test_with_the_bulk_far_below_the_largest_value_every_method_gives_a_range(
    ratio: float, count: int
) -> None:
    x = np.r_[draw("normal"), np.full(count, ratio)]
    for name, amax in amaxes(histogram(x)).items():
        assert 0 < amax <= np.float32(ratio), name
        assert amax >= np.percentile(np.abs(x), 99), name


# -- mean squared error


def squared_error(x: NDArray, amax: float) -> float:
    """Mean squared error of rounding and saturation, on the values themselves."""
    scale = amax / 127
    magnitudes = np.abs(x.astype(np.float64))
    return float(np.mean((np.minimum(np.rint(magnitudes / scale), 127) * scale - magnitudes) ** 2))


def check_mse(x: NDArray) -> None:
    made = histogram(x)
    candidates = made.amax * 0.99 ** np.arange(552)
    errors = np.array([squared_error(x, amax) for amax in candidates])
    amax = amax_mse(made)
    two_steps = abs(math.log(amax / candidates[errors.argmin()]) / math.log(0.99)) < 2.01
    assert two_steps or squared_error(x, amax) <= 1.01 * errors.min()


def integrated_error(made: Histogram, amax: float) -> float:
    """Squared error by explicit integrals: each bin is cut at the rounding boundaries inside it."""
    step, edges = amax / 127, made.edges
    cuts = np.union1d(edges, [(k - 0.5) * step for k in range(1, 128) if (k - 0.5) * step < edges[-1]])
    middles = (cuts[:-1] + cuts[1:]) / 2
    values = np.minimum(np.floor(middles / step + 0.5), 127) * step
    cubes = (cuts[1:] - values) ** 3 - (cuts[:-1] - values) ** 3
    bins = np.searchsorted(edges, middles) - 1
    return float(np.sum(made.counts[bins] / np.diff(edges)[bins] * cubes / 3))


def reference_mse(made: Histogram) -> float:
    """The best candidate down to amax / 256 in steps of 1 %, then in tenths of a step on both sides."""
    best = made.amax
    for steps in (np.arange(552), np.arange(-10, 11) / 10):
        candidates = [min(float(best * 0.99**step), made.amax) for step in steps]
        best = min(candidates, key=lambda amax: integrated_error(made, amax))
    return best


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONTINUOUS + DISCRETE)
def test_mse_is_the_minimum_of_explicit_integrals(kind: str) -> None:
    made = histogram(draw(kind, 20000))
    assert amax_mse(made) == pytest.approx(reference_mse(made), rel=1e-12)


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_mse_is_the_brute_force_minimum_over_the_values(kind: str) -> None:
    for factor in (1.0, 1.6):
        check_mse(draw(kind, 20000) * np.float32(factor))


@pytest.mark.parametrize("ratio", [10.0, 1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("count", [1, 20])
def test_mse_with_heavy_outliers(ratio: float, count: int) -> None:
    check_mse(np.r_[draw("normal", 20000), np.full(count, ratio)])


def test_mse_clips_what_is_rare_enough() -> None:
    """One value of a million at the tenfold: clipping it to 5 costs 25e-6, the finer steps gain 5e-4."""
    x = np.r_[draw("normal", 10**6), 10.0]
    assert 3.5 < amax_mse(histogram(x)) < 10
    assert amax_mse(histogram(draw("normal", 1000))) > 0.8 * np.abs(draw("normal", 1000)).max()


def test_mse_of_values_on_the_grid_is_their_maximum() -> None:
    """Any smaller range saturates the largest code and moves the others off the grid."""
    x = np.repeat(np.arange(128), 50) * np.float32(2**-5)
    assert amax_mse(histogram(x)) == pytest.approx(127 / 32, rel=0.011)
    assert amax_mse(histogram(np.full(9, 0.3))) == np.float32(0.3)


# -- percentiles


@pytest.mark.parametrize("kind", CONTINUOUS + DISCRETE)
@pytest.mark.parametrize("percentile", ["50", "90", "99", "99.9", "99.99", "99.999", "100"])
def test_percentile_is_the_ranked_value_to_a_bin(kind: str, percentile: str) -> None:
    x = draw(kind)
    made = histogram(x)
    rank = max(math.ceil(Fraction(percentile) * x.size / 100), 1)  # the inverse of the empirical CDF
    expected = np.sort(np.abs(x))[rank - 1]
    upper = int(np.searchsorted(made.edges, expected, side="right"))
    width = made.edges[upper] - made.edges[upper - 1]
    assert amax_percentile(made, float(percentile)) == pytest.approx(expected, abs=width)


def reference_percentile(made: Histogram, percentile: float) -> float:
    """Walk up the bins until enough values are passed, then go into the last one by its share."""
    wanted, passed = made.total * percentile / 100, 0
    for index, count in enumerate(made.counts.tolist()):
        if passed + count >= wanted:
            low, high = made.edges[index : index + 2]
            return min(low + (wanted - passed) / count * (high - low), made.amax)
        passed += count
    return made.amax


@pytest.mark.parametrize("kind", CONTINUOUS + DISCRETE)
@pytest.mark.parametrize("percentile", [0.1, 50, 99.9, 99.99, 99.999, 100])
def test_percentile_is_the_walk_up_the_bins(kind: str, percentile: float) -> None:
    made = histogram(draw(kind))
    assert amax_percentile(made, percentile) == reference_percentile(made, percentile)


@pytest.mark.parametrize("kind", CONTINUOUS + DISCRETE)
def test_the_hundredth_percentile_is_the_maximum(kind: str) -> None:
    made = histogram(draw(kind))
    assert amax_percentile(made, 100) == amax_max(made) == np.abs(draw(kind)).max()


def test_percentiles_by_hand() -> None:
    """Ten values, one in each of ten bins: the k-th tenth ends where the k-th bin does.

    From 512 on bins are 1/8 wide, 2^10 / 2^13; from 2 to 4 there are 128, which makes them 1/64 wide.
    """
    for start, width in ((512, 1 / 8), (2, 1 / 64)):
        x = start + width * (np.arange(10) + 0.5)
        made = histogram(np.append(x, 1000.0))
        counts = made.counts.copy()
        counts[-1 - 8 * 24] -= 1  # the bin of 1000 is [1000, 1000 + 1/8)
        made = Histogram.of(counts, made.exponent, made.low, made.high)
        assert made.total == 10
        for k in range(1, 11):
            assert amax_percentile(made, 10 * k) == pytest.approx(start + width * k)
            assert amax_percentile(made, 10 * k - 5) == pytest.approx(start + width * (k - 0.5))


# -- a bulk that lies far below the largest value


def bulk(kind: str, size: int = 10000) -> NDArray[np.float32]:
    """Values at evenly spaced quantiles of a distribution of unit scale, in float32."""
    p = (np.arange(size) + 0.5) / size
    return np.asarray(
        {
            "normal": lambda: [NormalDist().inv_cdf(q) for q in p],
            "laplace": lambda: -np.sign(p - 0.5) * np.log(1 - 2 * np.abs(p - 0.5)),
            "t2": lambda: (2 * p - 1) / np.sqrt(2 * p * (1 - p)),
            "relu": lambda: [max(NormalDist().inv_cdf(q), 0) for q in p],
        }[kind](),
        np.float32,
    )


BULKS = ["normal", "laplace", "t2", "relu"]
RATIOS = [10.0, 100.0, 6e3, 2e4, 1e6, 1e8]


@pytest.mark.parametrize("kind", BULKS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_percentiles_of_a_bulk_far_below_the_largest_value(kind: str, ratio: float) -> None:
    x = np.append(bulk(kind), np.float32(ratio))
    ranked = np.sort(np.abs(x))
    for percentile in (60, 90, 99, 99.9, 99.99):
        expected = ranked[math.ceil(Fraction(str(percentile)) * x.size / 100) - 1]
        assert amax_percentile(histogram(x), percentile) == pytest.approx(expected, rel=0.01), percentile


@pytest.mark.parametrize("kind", BULKS)
@pytest.mark.parametrize("ratio", RATIOS[:-1])
@pytest.mark.parametrize("clipped", [True, False])
def test_mse_of_a_bulk_far_below_the_largest_value(kind: str, ratio: float, clipped: bool) -> None:
    """The error of the range found is within 0.1 % of the least one, by the values in float64.

    The bulk is seen often enough for clipping one larger value to be best, or once, where it seldom is.
    """
    x = bulk(kind)
    often = int(max(1, ratio**2 / 10)) if clipped else 1
    made = times(histogram(x), often)
    made.merge(histogram(np.array([ratio])))

    def error(amax: float) -> float:
        return often * x.size * squared_error(x, amax) + squared_error(np.float32([ratio]), amax)

    coarse = np.append(np.geomspace(0.5, made.amax, round(32 * math.log(2 * made.amax))), made.amax)
    best = coarse[np.argsort([error(amax) for amax in coarse])[:3]]
    fine = np.outer(best, np.linspace(31 / 32, 33 / 32, 65)).ravel().clip(0, made.amax)
    least = min(map(error, fine))
    amax = amax_mse(made)
    assert error(amax) <= 1.001 * least
    if clipped and ratio >= 6e3:
        assert amax < ratio / 20


@pytest.mark.parametrize("kind", CONTINUOUS + DISCRETE)
def test_no_amax_below_those_tried_has_the_least_error(kind: str) -> None:
    """The bound on what is tried, by the values: everything below it is worse than some amax above it."""
    for x in (draw(kind, 1000), np.append(draw(kind, 1000), np.abs(draw(kind, 1000)).max() * 1000)):
        made = histogram(x)
        bound = _least_mse_amax(made)
        assert 0 < bound <= made.amax
        edges = np.append(made.edges[(made.edges >= bound) & (made.edges < made.amax)], made.amax)
        above = min(squared_error(x, amax) for amax in edges)
        assert all(above <= squared_error(x, bound * part) for part in np.linspace(0.02, 0.999, 300))


# -- all methods


@pytest.mark.parametrize("kind", CONTINUOUS + DISCRETE)
def test_no_range_is_empty_or_above_the_maximum(kind: str) -> None:
    x = draw(kind)
    for name, amax in amaxes(histogram(x)).items():
        assert 0 < amax <= np.abs(x).max(), name
        assert isinstance(amax, float), name


@pytest.mark.parametrize("kind", CONTINUOUS + DISCRETE)
@pytest.mark.parametrize("power", [-60, -3, 1, 70])
def test_powers_of_two_scale_exactly(kind: str, power: int) -> None:
    x = draw(kind)
    expected = {name: math.ldexp(amax, power) for name, amax in amaxes(histogram(x)).items()}
    assert amaxes(histogram(np.ldexp(x, power))) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("kind", CONTINUOUS)
@pytest.mark.parametrize("factor", [0.7, 1.1, 3.0])
def test_other_factors_scale_to_a_bin(kind: str, factor: float) -> None:
    """Entropy is left out: its minimum is flat, and jumps with the position of the bins.

    That of the squared error is flat, too: of its candidates, 1 % apart, the next but one may win.
    """
    before, after = (histogram(draw(kind).astype(np.float64) * f) for f in (1, factor))
    for name in ("max", "mse", "percentile:99.9"):
        method = parse_method(name)
        slack = 2 * np.diff(after.edges).max() + 0.0202 * method.amax(after) * (name == "mse")
        assert method.amax(after) == pytest.approx(factor * method.amax(before), rel=1e-6, abs=slack), name


@pytest.mark.parametrize("kind", CONTINUOUS + DISCRETE)
def test_signs_and_order_do_not_count(kind: str) -> None:
    x = draw(kind)
    random = np.random.default_rng(1)
    flipped = random.permutation(x) * random.choice([-1, 1], x.size)
    assert amaxes(histogram(flipped)) == amaxes(histogram(x))


@pytest.mark.parametrize("kind", CONTINUOUS + DISCRETE)
@pytest.mark.parametrize("factor", [2, 3, 1000, 2**36])
def test_seeing_everything_again_does_not_count(kind: str, factor: int) -> None:
    made = histogram(draw(kind, 10000))
    assert amaxes(times(made, factor)) == pytest.approx(amaxes(made), rel=1e-9)


@pytest.mark.parametrize("count", [1, 5, 2**40])
def test_zeros_have_no_range_and_scale_one(count: int) -> None:
    for made in (
        times(histogram(np.zeros(1)), count),
        times(histogram(np.array([-0.0])), count),
        Histogram(),
    ):
        assert amaxes(made) == dict.fromkeys(METHODS, 0.0)
        assert scale_from_amax(list(amaxes(made).values())).tolist() == [1.0] * len(METHODS)


@pytest.mark.parametrize("value", [2.0**-149, 1e-40, 1e-30, 1.0, 2.0, np.nextafter(2, 0), 0.1, 3e38])
@pytest.mark.parametrize("count", [1, 2, 2**40])
def test_a_constant_is_kept_as_it_is(value: float, count: int) -> None:
    made = times(histogram(np.array([-value])), count)
    for name, amax in amaxes(made).items():
        assert amax == pytest.approx(float(np.float32(value)), rel=1e-3 if value > 2e-31 else 1), name
        assert amax > 0, name


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), st.integers(0, 40))
def test_any_values_have_ranges_within_them(values: list[float], power: int) -> None:
    made = times(histogram(np.array(values)), 2**power)
    largest = max(map(abs, values))
    for name, amax in amaxes(made).items():
        assert (0 < amax <= largest) or amax == largest == 0, name


# -- names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("max", "max"),
        (" Entropy ", "entropy"),
        ("MSE", "mse"),
        ("percentile:99.99", "percentile:99.99"),
        ("Percentile: 100", "percentile:100"),
        ("percentile:1e-3", "percentile:0.001"),
        ("PERCENTILE:99.90", "percentile:99.9"),
        ("percentile:+9.99e1 ", "percentile:99.9"),
        ("percentile:1e-7", "percentile:1e-07"),
        ("percentile:99.99999999999999", "percentile:99.99999999999999"),
    ],
)
def test_names(text: str, name: str) -> None:
    method = parse_method(text)
    assert (method.name, str(method)) == (name, name)
    assert str(parse_method(method.name)) == name


def test_methods_of_one_name_are_equal() -> None:
    assert parse_method("percentile:99.90") == parse_method(" Percentile:99.9")
    assert len({parse_method(text) for text in ("max", "MAX", "mse", "percentile:5", "percentile:5.0")}) == 3
    assert parse_method("max") != parse_method("mse")
    assert scaled(parse_method("MSE"), 0.5) == scaled(parse_method("mse"), 0.50)
    assert scaled(parse_method("mse"), 0.5) != scaled(parse_method("mse"), 0.6)


@given(st.floats(0, 100, exclude_min=True))
def test_every_spelling_of_a_percentile_is_one_method(percentile: float) -> None:
    for text in (repr(percentile), f"{percentile:.17e}", f"{percentile:.1100f}"):
        name = parse_method(f"percentile:{text}").name
        assert name == parse_method(name).name
        assert float(name.removeprefix("percentile:")) == percentile


def test_what_is_no_method_is_refused() -> None:
    for text in ("nope", "auto", "auto:1", ""):
        with pytest.raises(InputError, match="unknown calibration method"):
            parse_method(text)


@pytest.mark.parametrize("name", [*CANDIDATES, *STUDIED])
def test_names_in_the_code_are_spelled_like_that(name: str) -> None:
    assert parse_method(name).name == name


def test_names_are_of_their_methods() -> None:
    made = histogram(draw("laplace"))
    expected = [
        amax_max(made),
        amax_entropy(made),
        amax_mse(made),
        amax_percentile(made, 99.9),
        amax_percentile(made, 99.99),
    ]
    assert list(amaxes(made).values()) == expected
    assert len(set(expected)) == len(expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "minmax",
        "max:1",
        "entropy:99",
        "percentile",
        "percentile:",
        "percentile:0",
        "percentile:-1",
        "percentile:100.1",
        "percentile:nan",
        "percentile:inf",
        "percentile:high",
        "percentile:99,9",
        "99.9",
    ],
)
def test_names_of_no_method(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_method(text)
    assert f"'{text}'" in caught.value.problem
    assert "percentile:99.99" in str(caught.value.remedy)


def test_scaled() -> None:
    made = histogram(draw("laplace"))
    method = parse_method("mse")
    assert scaled(method, 0.5).amax(made) == 0.5 * method.amax(made)
    assert scaled(method, 100).amax(made) == made.amax
    assert str(scaled(method, 0.5)) == "mse*0.5"
