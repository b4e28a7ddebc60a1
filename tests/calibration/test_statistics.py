"""Histograms against a plain float64 one; only the values count; files come back or are refused."""

from __future__ import annotations

import io
import math
import tracemalloc
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from trtq.calibration.statistics import BINS, FEW, FORMAT, Histogram, NonFiniteError, Statistics
from trtq.errors import InputError

CHUNK = 16384
"""Values that the kernel takes at once."""

LARGEST = float(np.finfo(np.float32).max)
SMALLEST = 2.0**-149


def histogram(*parts: NDArray) -> Histogram:
    made = Histogram()
    for part in parts:
        made.add(part)
    return made


def bytes_of(made: Histogram) -> bytes:
    return Statistics({"x": made}).to_bytes()


def reference(x: NDArray) -> tuple[NDArray[np.int64], int]:
    """Counts of |x| below the smallest power of two above it, and its exponent, by the bins' definition.

    Of 8192 equal bins those from the 128th on are as they are; the 32 octaves below have 128 bins each.
    """
    magnitudes = np.abs(x.astype(np.float64).ravel())
    exponent = -88
    while magnitudes.size and magnitudes.max() >= 2.0**exponent:
        exponent += 1
    position = magnitudes * (8192 / 2.0**exponent)
    index = np.zeros(position.size, np.int64)
    for octave in range(32):
        low = 2.0 ** (octave - 25)
        here = (position >= low) & (position < 2 * low)
        index[here] = 1 + 128 * octave + np.floor((position[here] - low) / (low / 128)).astype(np.int64)
    here = position >= 128
    index[here] = 1 + 128 * 32 + np.floor(position[here]).astype(np.int64) - 128
    return np.bincount(index, minlength=BINS), exponent


def draw(kind: str, size: int, seed: int = 0) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    values = {
        "normal": lambda: random.normal(size=size),
        "growing": lambda: random.normal(size=size) * np.logspace(-6, 6, size),
        "shrinking": lambda: random.normal(size=size) * np.logspace(6, -6, size),
        "relu": lambda: np.maximum(random.normal(size=size), 0),
        "any bits": lambda: random.integers(-0x7F7FFFFF, 0x7F7FFFFF, size).astype(np.int32).view(np.float32),
        "denormal": lambda: random.normal(size=size) * 1e-40,
        "huge": lambda: random.uniform(-1, 1, size) * 1e38,
        "zeros": lambda: np.zeros(size),
        "constant": lambda: np.full(size, -2.5),
        "powers of two": lambda: 2.0 ** random.integers(-20, 20, size),
    }[kind]()
    values = values.astype(np.float32)
    return np.where(np.isfinite(values), values, np.float32(1))


KINDS = [
    "normal",
    "growing",
    "shrinking",
    "relu",
    "any bits",
    "denormal",
    "huge",
    "zeros",
    "constant",
    "powers of two",
]

finite = arrays.arrays(
    np.float32,
    st.integers(0, 60),
    elements=st.floats(-LARGEST, LARGEST, width=32) | st.sampled_from([0.0, -0.0]),
)


# -- counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 1000, 3 * CHUNK + 17])
def test_counts_extrema_and_range_are_those_of_float64(kind: str, size: int) -> None:
    x = draw(kind, size)
    made = histogram(x)
    counts, exponent = reference(x)
    np.testing.assert_array_equal(made.counts, counts)
    assert made.exponent == exponent
    assert (made.low, made.high, made.amax, made.total) == (x.min(), x.max(), np.abs(x).max(), size)


@given(finite)
def test_counts_of_any_floats(x: NDArray) -> None:
    made = histogram(x)
    counts, exponent = reference(x)
    np.testing.assert_array_equal(made.counts, counts)
    assert made.exponent == exponent
    assert made.amax == (np.abs(x).max() if x.size else 0)


@pytest.mark.parametrize("power", [-88, -20, -1, 0, 1, 13, 126])
@pytest.mark.parametrize("nudge", [-1, 0, 1])
def test_values_around_a_power_of_two(power: int, nudge: int) -> None:
    value = np.float32(2.0**power)
    if nudge:
        value = np.nextafter(value, np.float32(nudge * np.inf))
    made = histogram(np.array([value]))
    assert made.exponent == (power if nudge < 0 else power + 1)
    (occupied,) = np.flatnonzero(made.counts)
    assert made.edges[occupied] <= value < made.edges[occupied + 1]


def test_edges() -> None:
    """Every bin is as wide as 1/8192 of the range, or 1/256 to 1/128 of its values if that is finer."""
    made = histogram(np.array([1.5], np.float32))
    edges, widths = made.edges, np.diff(made.edges)
    assert (edges.size, edges[0], edges[1], edges[-1]) == (BINS + 1, 0, 2.0**-37, 2)
    assert (np.diff(edges) > 0).all()
    finest = np.minimum(2.0 ** np.floor(np.log2(edges[1:-1])) / 128, 2 / 8192)
    np.testing.assert_array_equal(widths[1:], finest)
    assert (edges.astype(np.float32) == edges).all()


@given(st.floats(2.0**-88, LARGEST, width=32))
def test_at_least_4096_bins_lie_below_amax(amax: float) -> None:
    made = histogram(np.array([amax, -amax / 3, 0], np.float32))
    assert made.amax / np.diff(made.edges).max() >= 4096


@pytest.mark.parametrize("kind", KINDS)
def test_counts_in_equal_bins(kind: str) -> None:
    x = draw(kind, 3000)
    made = histogram(x)
    index = np.floor(np.abs(x.astype(np.float64)) * (8192 / 2.0**made.exponent)).astype(np.int64)
    np.testing.assert_array_equal(made.equal_counts(), np.bincount(index, minlength=8192))


@given(finite, st.integers(-126, 127), st.integers(-126, 127))
def test_the_bulk_is_resolved_however_large_the_largest_is(x: NDArray, bulk: int, largest: int) -> None:
    """What is not 2^38 times below the range lies in a bin of at most 1/128 of its size."""
    x = np.append(np.ldexp(x / np.float32(LARGEST), bulk), np.float32(2.0**largest))
    made = histogram(x)
    edges = made.edges
    index = np.searchsorted(edges, np.abs(x), side="right") - 1
    np.testing.assert_array_equal(made.counts, np.bincount(index, minlength=BINS))
    resolved = np.abs(x) >= 2.0 ** (made.exponent - 38)
    widths = np.diff(edges)[index]
    assert (widths <= np.abs(x) / 128)[resolved].all()
    assert (index[~resolved] == 0).all()


def test_the_ends_of_float32() -> None:
    made = histogram(np.array([LARGEST, -SMALLEST], np.float32))
    assert (made.low, made.high, made.exponent) == (-SMALLEST, LARGEST, 128)
    assert made.counts[0] == made.counts[-1] == 1


@pytest.mark.parametrize("size", [1, 7, 8, 9, CHUNK, CHUNK + 3])
def test_zeros_and_tiny_values_are_counted_in_one_bin(size: int) -> None:
    """The kernel counts them in turns, in slots that are empty again afterwards."""
    x = np.where(np.arange(size) % 3 == 0, SMALLEST, 0).astype(np.float32)
    made = histogram(x, x, np.ones(1, np.float32))
    assert made.counts[0] == 2 * size
    assert made.counts.sum() == made.total == 2 * size + 1


def test_nothing() -> None:
    for empty in (np.zeros(0, np.float32), np.zeros((3, 0, 2), np.float16)):
        made = histogram(empty)
        assert (made.low, made.high, made.amax, made.total) == (math.inf, -math.inf, 0.0, 0)
        full = histogram(empty, np.ones(3, np.float32), empty)
        assert bytes_of(full) == bytes_of(histogram(np.ones(3, np.float32)))


def test_shapes_strides_and_dtypes_do_not_count() -> None:
    x = draw("normal", 4 * 30 * 20).astype(np.float16).reshape(4, 30, 20)
    expected = bytes_of(histogram(x.astype(np.float32).ravel()))
    for same in (x, x.astype(np.float64), np.asfortranarray(x), x[::-1, :, ::-1], x.swapaxes(0, 2)):
        assert bytes_of(histogram(same)) == expected
    assert histogram(np.float32(-3.0)).low == -3  # a scalar


# -- NaN and infinities

NON_FINITE = {
    "NaN": 0x7FC00000,
    "-NaN": 0xFFC00000,
    "signalling NaN": 0x7F800001,
    "-signalling NaN": 0xFF800001,
    "inf": 0x7F800000,
    "-inf": 0xFF800000,
}


@pytest.mark.parametrize("bits", NON_FINITE.values(), ids=NON_FINITE)
@pytest.mark.parametrize("position", [0, 100, CHUNK - 1, CHUNK, 2 * CHUNK + 5])
@pytest.mark.parametrize("kind", ["normal", "growing", "zeros"])
def test_values_that_are_not_finite_are_refused(bits: int, position: int, kind: str) -> None:
    x = draw(kind, 2 * CHUNK + 6)
    x.view(np.uint32)[position] = bits
    with pytest.raises(NonFiniteError, match=f"1 of {x.size} values"):
        histogram(x)
    with pytest.raises(NonFiniteError, match=f"1 of {x.size} values"):
        histogram(draw("huge", 10), x)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_that_are_not_finite(value: float, dtype: type) -> None:
    with pytest.raises(NonFiniteError, match="2 of 3 values"):
        histogram(np.array([value, 1, value], dtype))


# -- order, batches, shards


def merged(parts: Iterable[NDArray]) -> Histogram:
    total = Histogram()
    for part in parts:
        total.merge(histogram(part))
    return total


@given(finite, st.randoms(use_true_random=False), st.data())
def test_order_batches_and_shards_never_count(x: NDArray, random, data) -> None:
    expected = bytes_of(histogram(x))
    order = list(range(x.size))
    random.shuffle(order)
    cuts = sorted(data.draw(st.lists(st.integers(0, x.size), max_size=4)))
    parts = np.split(x[order], cuts)
    assert bytes_of(histogram(*parts)) == expected
    assert bytes_of(merged(parts)) == expected
    assert bytes_of(merged(reversed(parts))) == expected
    pairs = [merged(parts[::2]), merged(parts[1::2])]
    pairs[0].merge(pairs[1])
    assert bytes_of(pairs[0]) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [100, CHUNK + 1, 5 * CHUNK])
def test_long_arrays_in_any_pieces(kind: str, size: int) -> None:
    x = draw(kind, size)
    expected = bytes_of(histogram(x))
    shuffled = np.random.default_rng(1).permutation(x)
    assert bytes_of(histogram(shuffled)) == expected
    for pieces in (2, 7, 50):
        assert bytes_of(histogram(*np.array_split(shuffled, pieces))) == expected
        assert bytes_of(merged(np.array_split(shuffled, pieces))) == expected


def test_the_sign_of_zero_does_not_count() -> None:
    plus, minus = np.array([0.0], np.float32), np.array([-0.0], np.float32)
    expected = bytes_of(histogram(plus, plus))
    for parts in ((plus, minus), (minus, plus), (minus, minus)):
        assert bytes_of(histogram(*parts)) == expected
        assert bytes_of(histogram(np.concatenate(parts))) == expected
        assert bytes_of(merged(parts)) == expected


@pytest.mark.parametrize(
    "exponents",
    [(-200, 100), (0, 1), (0, 6), (0, 7), (0, 13), (0, 14), (0, 31), (0, 38), (0, 45), (100, -140)],
)
def test_shards_of_very_different_ranges(exponents: tuple[int, int]) -> None:
    parts = [np.ldexp(draw("normal", 500, seed).astype(np.float32), e) for seed, e in enumerate(exponents)]
    both = merged(parts)
    assert bytes_of(both) == bytes_of(histogram(np.concatenate(parts)))
    np.testing.assert_array_equal(both.counts, reference(np.concatenate(parts))[0])


def test_merging_leaves_the_other_one_as_it_was() -> None:
    small, large = histogram(draw("normal", 100)), histogram(draw("huge", 100))
    before = bytes_of(small)
    large.merge(small)
    assert bytes_of(small) == before
    small.merge(large)
    assert bytes_of(large) == bytes_of(histogram(draw("normal", 100), draw("huge", 100)))


# -- statistics of several tensors


def some_statistics() -> Statistics:
    return Statistics(
        {
            name: histogram(draw(kind, 999))
            for name, kind in (("b", "normal"), ("a: ü/1", "relu"), ("0", "huge"))
        },
        rows=17,
    )


def test_statistics_add_up() -> None:
    total, shards = Statistics.empty(["a", "b"]), []
    rows = [{"a": draw("normal", 50, i), "b": draw("growing", 20, i)} for i in range(6)]
    for part in (rows[:1], rows[1:5], [], rows[5:]):
        shard = Statistics.empty(["b", "a"])
        for row in part:
            for name, values in row.items():
                shard.histograms[name].add(values)
            shard.rows += 1
        shards.append(shard)
    for shard in shards:
        total.merge(shard)
    whole = {name: histogram(*(row[name] for row in rows)) for name in "ab"}
    assert total.to_bytes() == Statistics(whole, 6).to_bytes()


def test_statistics_of_different_tensors_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="different tensors"):
        Statistics.empty(["a"]).merge(Statistics.empty(["a", "b"]))


def test_file_round_trip(tmp_path: Path) -> None:
    statistics = some_statistics()
    statistics.save(tmp_path / "s.npz")
    assert (tmp_path / "s.npz").read_bytes() == statistics.to_bytes()
    again = Statistics.load(tmp_path / "s.npz")
    assert again.to_bytes() == statistics.to_bytes()
    assert again.rows == 17
    for name, made in statistics.histograms.items():
        other = again.histograms[name]
        np.testing.assert_array_equal(other.counts, made.counts)
        assert (other.exponent, other.low, other.high) == (made.exponent, made.low, made.high)
    again.merge(statistics)  # what was read can be added to
    assert again.histograms["b"].total == 2 * 999


def test_statistics_of_nothing_round_trip() -> None:
    for nothing in (Statistics({}), Statistics.empty(["x"])):
        again = Statistics.from_bytes(nothing.to_bytes())
        assert again.to_bytes() == nothing.to_bytes()
        assert all(h.amax == 0 and h.total == 0 for h in again.histograms.values())


def refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot read the statistics") as caught:
        Statistics.load(path)
    assert caught.value.file == str(path)
    assert caught.value.cause


def npz(**changed) -> bytes:
    """Statistics of one tensor, four ones and five twos, with some arrays changed; None leaves one out."""
    stored = dict(np.load(io.BytesIO(bytes_of(histogram(np.repeat([1, 2], [4, 5]))))))
    buffer = io.BytesIO()
    np.savez(buffer, **{k: v for k, v in {**stored, **changed}.items() if v is not None})
    return buffer.getvalue()


def test_damaged_files(tmp_path: Path) -> None:
    path, content = tmp_path / "s.npz", some_statistics().to_bytes()
    for length in (0, 1, 4, 100, len(content) // 2, len(content) - 30, len(content) - 1):
        refused(path, content[:length])
    refused(path, b"TRT-101601-EntropyCalibration2\nx: 3c010a14\n")
    with pytest.raises(InputError, match="cannot read the statistics"):
        Statistics.load(tmp_path / "missing.npz")
    with pytest.raises(InputError, match="cannot read the statistics"):
        Statistics.load(tmp_path)


def test_a_changed_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    """The archive's own checksums cover the arrays, though not such things as their dates."""
    content = bytes_of(histogram(draw("normal", 200)))
    path = tmp_path / "s.npz"
    noticed = 0
    for position in range(0, len(content), 5):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        try:
            assert Statistics.load(path).to_bytes() == content
        except InputError:
            noticed += 1
    assert noticed > len(content) / 5 / 2


@pytest.mark.parametrize(
    "changed",
    [
        {"format": None},
        {"format": np.array("trtq-statistics-4")},
        {"counts": None},
        {"counts": np.ones((1, 2), np.int64)},
        {"counts": np.ones(1, np.int64)},
        {"counts": np.zeros(2, np.int64)},
        {"counts": np.array([-1, 10])},
        {"bins": np.array([5, 5], np.uint16)},
        {"bins": np.array([0, BINS], np.uint16)},
        {"sizes": np.array([3])},
        {"sizes": np.array([-1, 3])},
        {"lows": np.zeros(2)},
        {"exponents": np.zeros(0, np.int32)},
        {"exponents": np.array([129])},
        {"exponents": np.array([-89])},
        {"tensors": np.array([{}], object)},
        {"rows": np.array([1, 2])},
    ],
    ids=str,
)
def test_archives_of_something_else(tmp_path: Path, changed: dict) -> None:
    assert Statistics.from_bytes(npz()).histograms["x"].total == 9
    refused(tmp_path / "s.npz", npz(**changed))


def test_statistics_of_an_earlier_format_are_refused_by_name(tmp_path: Path) -> None:
    """Format 1 had equal bins only, under the same names."""
    path = tmp_path / "s.npz"
    refused(path, npz(format=np.array("trtq-statistics-1"), counts=np.zeros((1, 8192), np.int64)))
    with pytest.raises(InputError, match="the format is trtq-statistics-1, not trtq-statistics-3"):
        Statistics.load(path)


def test_other_files_of_numpy(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    refused(tmp_path / "s.npz", buffer.getvalue())
    with zipfile.ZipFile(tmp_path / "z.npz", "w") as archive:
        archive.writestr("format.npy", f"{FORMAT}")
    refused(tmp_path / "s.npz", (tmp_path / "z.npz").read_bytes())


@pytest.mark.parametrize(
    "sizes", [(1, 2), (FEW, 1), (1, FEW), (FEW + 1, 5), (FEW + 1, FEW + 1), (3, 0), (0, 3)]
)
def test_how_counts_are_held_changes_nothing(sizes: tuple[int, int]) -> None:
    """Few values are kept as they are, many are counted, and what was merged or read holds occupied bins."""
    random = np.random.default_rng(0)
    first = random.standard_normal(sizes[0]).astype(np.float32)
    second = random.standard_normal(sizes[1]).astype(np.float32) * 1000
    whole = np.concatenate([first, second])
    stored = Statistics.from_bytes(Statistics({"x": histogram(first)}).to_bytes()).histograms["x"]
    merged, added, read = histogram(first), histogram(first, second), stored
    merged.merge(histogram(second))
    read.add(second)
    for made in (merged, added, read):
        np.testing.assert_array_equal(made.counts, reference(whole)[0])
        assert (made.exponent, made.total) == (reference(whole)[1], whole.size)
        assert (made.low, made.high) == (whole.min(), whole.max())


def test_memory_of_few_values_is_theirs() -> None:
    """A histogram of 100 values takes a small part of what all bins take."""
    x = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    tracemalloc.start()
    try:
        made = [histogram(x) for _ in range(100)]
        assert all(h.total == 100 for h in made)
        assert tracemalloc.get_traced_memory()[0] / 100 < BINS * 8 / 50
    finally:
        tracemalloc.stop()


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=4), min_size=1, max_size=60))
def test_many_small_parts_are_the_whole(parts: list[list[float]]) -> None:
    """Also once other histograms were added, and their values lie further out."""
    arrays = [np.array(part, np.float32) for part in parts]
    whole = np.concatenate([*arrays, np.array([5e3, -7e3], np.float32), *arrays])
    made = histogram(*arrays)
    made.merge(histogram(np.array([5e3, -7e3], np.float32)))
    again = histogram(*arrays)
    again.merge(made)
    counts, exponent = reference(whole)
    assert (again.exponent, again.low, again.high) == (exponent, whole.min(), whole.max())
    np.testing.assert_array_equal(again.counts, counts)
    assert again.total == whole.size
