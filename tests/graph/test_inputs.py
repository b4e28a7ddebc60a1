"""Which axis of an input is the batch, and the shapes of rows and feeds that follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from trtq.graph.inputs import InputSpec, fits, fixed_batch, guess_batch_axes

Dims = tuple[int | str | None, ...]


def specs(*shapes: Dims) -> list[InputSpec]:
    return [InputSpec(f"x{i}", np.dtype(np.float32), shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("inputs", "outputs", "axes"),
    [
        ([("N", 3)], [("N", 5)], [0]),
        ([(None, 3)], [None], [0]),
        ([(1, 3)], [(1, 5)], [0]),
        ([(8, 3, 4), (8, 2)], [(8, 5)], [0, 0]),
        ([(8, 3, 4)], [(800, 4)], [0]),  # 100 boxes for each of 8 images
        ([(6, 3, 4), (6, 4, 4), ()], [(1, 6, 4)], [None, None, None]),  # six cameras, one answer
        ([(1, 40), (2, 1, 32)], [(1, 10), (2, 1, 32)], [0, None]),  # a state of two layers
        ([(None, None), (2, None, 128), ()], [(None, 1)], [0, None, None]),  # Silero VAD
        ([("N", 576), (2, "N", 128), (2, "M", 4)], [None], [0, 1, None]),  # the batch by its name
        ([("T", "N", 24), (1, "N", 32)], [("T", "N", 20)], [1, 1]),  # time first
        ([("time", "batch", 24)], [("time", "batch", 20)], [1]),
        ([("N", "L"), ("N", "L")], [("N", 5)], [0, 0]),
        ([("N", 3, "H", "W"), ("M", 2)], [None], [0, 0]),
        ([("batch", 3), ("2*batch", 4)], [None], [0, 0]),
        ([("N", "T"), ("N",), (3,)], [("N", 1, "S")], [0, 0, None]),  # Piper: tokens, lengths, scales
    ],
)
def test_the_batch_axes_that_shapes_suggest(
    inputs: list[Dims], outputs: Sequence[Dims | None], axes: list[int | None]
) -> None:
    assert [spec.batch_axis for spec in guess_batch_axes(specs(*inputs), outputs)] == axes


@pytest.mark.parametrize("axis", [0, 1, 2, None])
def test_rows_and_feeds(axis: int | None) -> None:
    (spec,) = specs(("a", "b", "c"))
    spec = spec._replace(batch_axis=axis)
    feed = np.zeros((2, 3, 4)) if axis is None else np.stack([np.zeros((2, 3))] * 4, axis)
    row = feed.shape if axis is None else (2, 3)
    assert spec.row_shape(feed.shape) == row
    assert spec.fed_shape(row, 4) == feed.shape
    assert len(spec.row_dims) == len(row)


def test_the_batch_along_another_axis() -> None:
    (state,) = specs((2, 4, 32))
    assert fixed_batch([state._replace(batch_axis=1)]) == 4
    assert fixed_batch([state._replace(batch_axis=None)]) is None


def test_what_fits() -> None:
    assert fits((2, None, "w"), (2, 5, 7))
    assert not fits((2, None), (3, 5))
    assert not fits((2,), (2, 1))
    assert fits((), ())
