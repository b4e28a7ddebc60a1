"""Batches: every row once, in order, never two shapes together."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trtq.data.batches import batches, single_rows


@given(widths=st.lists(st.integers(1, 3), max_size=20), lowest=st.integers(1, 4), extra=st.integers(0, 4))
def test_rows_come_out_as_they_went_in(widths: list[int], lowest: int, extra: int) -> None:
    rows = [{"x": np.full((1, width), index)} for index, width in enumerate(widths)]
    seen = 0
    for batch in batches(rows, lowest + extra, lowest):
        x = batch.feed["x"]
        assert batch.start == seen
        assert lowest <= len(x) <= lowest + extra
        assert len(x) == batch.rows + batch.padding
        assert {widths[batch.start + i] for i in range(batch.rows)} == {x.shape[1]}
        expected = [*range(seen, seen + batch.rows), *[seen + batch.rows - 1] * batch.padding]
        assert x[:, 0].tolist() == expected
        seen += batch.rows
    assert seen == len(rows)


def test_batches_are_as_full_as_they_can_be() -> None:
    rows = [{"x": np.zeros((1, 2))}] * 7
    assert [batch.rows for batch in batches(rows, 3)] == [3, 3, 1]
    assert [batch.padding for batch in batches(rows, 3, 3)] == [0, 0, 2]


@given(
    values=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    highest=st.integers(1, 5),
    lowest=st.integers(1, 3),
    filled=st.booleans(),
)
def test_rows_come_back_from_batches(values: list[int], highest: int, lowest: int, filled: bool) -> None:
    """Wherever the batch is; a value without one is the same for all rows of a batch."""
    axes = {"first": 0, "second": 1, "none": None}
    rows = [
        {
            "first": np.full((1, 2), index),
            "second": np.full((3, 1, 2), index),
            "none": np.full((2, 2), value),
        }
        for index, value in enumerate(values)
    ]
    found = list(batches(rows, max(highest, lowest), lowest, axes))
    assert all((batch.feed["none"] == values[batch.start]).all() for batch in found)
    singles = [single for batch in found for single in single_rows(batch, filled=filled)]
    assert [single.start for single in singles] == list(range(len(rows)))
    for row, single in zip(rows, singles, strict=True):
        times = single.rows + single.padding
        np.testing.assert_array_equal(single.feed["first"], np.repeat(row["first"], times, 0))
        np.testing.assert_array_equal(single.feed["second"], np.repeat(row["second"], times, 1))
        np.testing.assert_array_equal(single.feed["none"], row["none"])
