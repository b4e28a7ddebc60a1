"""Rows, casts, groups and subsets, on arrays whose contents are known."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.graph.inputs import InputSpec, fixed_batch


class Apart:
    """A column whose rows are read one by one, unlike those of an array."""

    def __init__(self, rows):
        self._rows = rows

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index]


def samples_of(rows, dtype=np.float32, shape=("N", None), **targets):
    spec = InputSpec("x", np.dtype(dtype), shape)
    return Samples("here.npz", (spec,), {"x": rows}, targets, "0" * 64)


def only_row(array, dtype, **options):
    (feed,) = samples_of(array, dtype, **options).rows()
    return feed["x"]


def test_rows_have_a_leading_axis_and_the_models_dtype() -> None:
    array = np.arange(12, dtype=np.float64).reshape(4, 3)[:, ::-1]
    feeds = list(samples_of(array).rows())
    assert [feed["x"].shape for feed in feeds] == [(1, 3)] * 4
    for feed, expected in zip(feeds, array, strict=True):
        assert feed["x"].dtype == np.float32
        assert feed["x"].flags.c_contiguous
        np.testing.assert_array_equal(feed["x"][0], expected)


@pytest.mark.parametrize(
    ("source", "model"),
    [
        (np.float64, np.float32),
        (np.float16, np.float32),
        (np.float32, np.float16),
        (np.int32, np.int64),
        (np.int64, np.int32),
        (np.uint8, np.int64),
        (bool, np.int64),
        (bool, bool),
    ],
)
def test_casts_that_keep_the_values(source, model) -> None:
    array = np.array([[0, 1, 1]], source)
    row = only_row(array, model)
    assert row.dtype == model
    np.testing.assert_array_equal(row, array)


@pytest.mark.parametrize(
    ("array", "model"),
    [
        (np.array([[3.0]]), np.int64),
        (np.array([[3]], np.uint8), np.float32),
        (np.array([[3]]), bool),
        (np.array([["3"]]), np.int64),
    ],
)
def test_casts_between_kinds_are_refused(array, model) -> None:
    with pytest.raises(InputError, match=rf"row 0 of input 'x' is {array.dtype}"):
        only_row(array, model)


@pytest.mark.parametrize(
    ("value", "source", "model"),
    [
        (65520.0, np.float32, np.float16),
        (1e39, np.float64, np.float32),
        (2**31, np.int64, np.int32),
        (-1, np.int64, np.uint8),
    ],
)
def test_values_that_do_not_fit_the_models_dtype_are_refused(value, source, model) -> None:
    with pytest.raises(InputError, match=f"beyond the model's {np.dtype(model)}"):
        only_row(np.array([[value]], source), model)


def test_the_largest_values_that_fit_are_kept() -> None:
    assert only_row(np.array([[65504.0]], np.float32), np.float16) == 65504
    assert only_row(np.array([[2**31 - 1]]), np.int32) == 2**31 - 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_named(value) -> None:
    array = np.zeros((4, 3), np.float32)
    array[2, 1] = value
    rows = samples_of(array).rows()
    next(rows), next(rows)
    with pytest.raises(InputError, match="row 2 of input 'x' holds NaN or infinite") as caught:
        next(rows)
    assert caught.value.file == "here.npz"


@pytest.mark.parametrize("shape", [("N", 4), ("N",), ("N", 3, 1)])
def test_shapes_that_the_model_does_not_take(shape) -> None:
    with pytest.raises(InputError, match=r"row 0 of input 'x' has shape \(3,\)"):
        only_row(np.zeros((1, 3), np.float32), np.float32, shape=shape)


def test_row_shapes_row_by_row() -> None:
    ragged = [np.zeros(3, np.float32), np.zeros(5, np.float32), np.zeros(3, np.float32)]
    assert samples_of(ragged).row_shapes() == {"x": [(3,), (5,), (3,)]}
    assert samples_of(np.zeros((4, 7), np.float32)).row_shapes() == {"x": [(7,)] * 4}
    assert samples_of(ragged, shape=("N", 3)).row_shapes() == {"x": [(3,)] * 3}
    assert samples_of(ragged).subset([0, 2]).row_shapes() == {"x": [(3,), (3,)]}


def numbered(groups: int, k: int) -> Samples:
    """Row r holds r; the target of group g is 10 g."""
    rows = np.arange(groups * k, dtype=np.float32)[:, None]
    return samples_of(rows, label=10 * np.arange(groups))


def values(samples: Samples) -> list[int]:
    return [int(feed["x"].item()) for feed in samples.rows()]


def test_a_subset_takes_whole_groups_and_their_targets() -> None:
    picked = numbered(groups=4, k=3).subset([2, 0])
    assert picked.group == 3
    assert values(picked) == [6, 7, 8, 0, 1, 2]
    assert picked.targets["label"].tolist() == [20, 0]
    again = picked.subset([1])
    assert values(again) == [0, 1, 2]
    assert again.targets["label"].tolist() == [0]


def test_the_hash_of_a_subset_is_its_own() -> None:
    samples = numbered(groups=4, k=1)
    assert samples.subset([0, 1]).hash == samples.subset(np.array([0, 1])).hash
    assert len({samples.hash, *(samples.subset(g).hash for g in ([0, 1], [1, 0], [0], [2]))}) == 5


@given(groups=st.integers(1, 30), k=st.integers(1, 4), every=st.integers(2, 6))
def test_a_split_is_disjoint_complete_and_strided(groups: int, k: int, every: int) -> None:
    kept, held_back = numbered(groups, k).split(every)
    assert sorted(values(kept) + values(held_back)) == list(range(groups * k))
    assert len(held_back) == k * (groups // every)
    for part in (kept, held_back):
        assert [v // k * 10 for v in values(part)[::k]] == part.targets["label"].tolist()
    assert values(held_back)[:k] == (list(range((every - 1) * k, every * k)) if groups >= every else [])


def test_without_targets_a_group_is_a_row() -> None:
    assert samples_of(np.zeros((6, 1), np.float32)).group == 1


def test_an_input_that_is_one_number_per_row() -> None:
    samples = samples_of(np.array([5, 6, 7]), np.int64, ("N",))
    assert [row["x"].shape for row in samples.rows()] == [(1,)] * 3
    assert [int(row["x"][0]) for row in samples.rows()] == [5, 6, 7]


@pytest.mark.parametrize(
    ("shapes", "fixed"),
    [
        ([("N", 3)], None),
        ([(None, 3), ()], None),
        ([(7, 3)], 7),
        ([("N", 3), (7, 2)], 7),
    ],
)
def test_the_batch_that_inputs_fix(shapes, fixed) -> None:
    assert fixed_batch(InputSpec("x", np.dtype(np.float32), shape) for shape in shapes) == fixed


def test_parts_of_samples_take_a_few_bytes_a_row() -> None:
    """Positions are numbers in an array, however often a part of a part is taken."""
    count = 200_000
    rows = np.broadcast_to(np.float32(1), (count, 4))
    samples = Samples("rows", (InputSpec("x", np.dtype(np.float32), ("N", 4)),), {"x": rows}, {}, "hash")
    tracemalloc.start()
    try:
        fitting, held_back = samples.split()
        some = fitting.subset(range(0, len(fitting), 2)).spread(1000)
        assert len(samples.fed_shapes("x")) == count
        assert tracemalloc.get_traced_memory()[1] < 64 * count
    finally:
        tracemalloc.stop()
    assert [some.row_number(i) for i in range(3)] == [0, 200, 400]
    assert held_back.row_number(len(held_back) - 1) == count - 1


def test_a_part_has_a_hash_of_its_own() -> None:
    rows = np.zeros((8, 4), np.float32)
    samples = Samples("rows", (InputSpec("x", np.dtype(np.float32), ("N", 4)),), {"x": rows}, {}, "hash")
    assert (
        samples.subset([1, 2]).hash
        == samples.subset(np.array([1, 2])).hash
        == samples.subset(range(1, 3)).hash
    )
    assert len({samples.subset(g).hash for g in ([], [0], [0, 1], [1, 0])}) == 4


@given(
    st.sampled_from([(), (3,), (2, 0), (5, 4000)]),
    st.sampled_from([np.float32, np.float64]),
    st.lists(st.integers(0, 29), min_size=1, max_size=30),
)
def test_rows_of_an_array_are_those_that_are_read_one_by_one(shape, dtype, picked) -> None:
    array = np.random.default_rng(0).normal(size=(30, *shape)).astype(dtype)
    dims = ("N", *[None] * len(shape))
    found = samples_of(array, shape=dims).subset(picked).rows()
    expected = samples_of(Apart(array), shape=dims).subset(picked).rows()
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine["x"], theirs["x"])
        assert mine["x"].dtype == theirs["x"].dtype == np.float32
        assert mine["x"].shape == theirs["x"].shape == (1, *shape)
        assert mine["x"].flags.c_contiguous


def test_rows_of_an_array_are_given_up_to_the_one_that_is_refused() -> None:
    array = np.zeros((30, 3), np.float32)
    array[17, 1] = np.nan
    rows = samples_of(array).rows()
    assert [next(rows)["x"].shape for _ in range(17)] == [(1, 3)] * 17
    with pytest.raises(InputError, match="row 17 of input 'x' holds NaN"):
        next(rows)


def test_a_scalar_of_each_row_is_an_array() -> None:
    """ONNX Runtime takes no NumPy scalars."""
    spec = InputSpec("x", np.dtype(np.int64), (), batch_axis=None)
    rows = list(Samples("here.npz", (spec,), {"x": np.full(20, 16)}, {}, "0" * 64).rows())
    assert [row["x"].tolist() for row in rows] == [16] * 20
    assert {type(row["x"]) for row in rows} == {np.ndarray}
