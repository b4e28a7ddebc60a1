"""Batches: every row once, in order, never two shapes together."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trtq.data.batches import batches


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
