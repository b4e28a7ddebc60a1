"""Einsum as MatMul where it is one product, against NumPy's einsum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import graph_of, net, normal, run
from numpy.typing import NDArray

from trtq.graph.fold import fold

Shape = tuple[int, ...]


def einsum(equation: str, x: Sequence[int | str], w: NDArray | None) -> onnx.ModelProto:
    """y = Einsum(x, w), or of x with itself; every axis of x that is a string may have any size."""
    operands = "x, x" if w is None else "x, w"
    shape = ",".join(map(str, x))
    text = f'g (float[{shape}] x) => (float[] y) {{ y = Einsum<equation = "{equation}">({operands}) }}'
    return net(text, **({} if w is None else {"w": w}))


def folded_ops(equation: str, x: Sequence[int | str], w: NDArray | None, values: NDArray) -> list[str]:
    """The operators that an Einsum becomes, whose result is NumPy's."""
    graph = graph_of(onnx.shape_inference.infer_shapes(einsum(equation, x, w)))
    fold(graph)
    expected = np.einsum(equation, values, values if w is None else w)
    found = run(graph, {"x": values})["y"]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max(initial=0)))
    return [node.op for node in graph.nodes]


@pytest.mark.parametrize(
    ("equation", "x", "w", "extra"),
    [
        ("ij,jk->ik", (5, 4), (4, 3), 0),
        ("ij,jk", (5, 4), (4, 3), 0),
        ("ij, kj -> ik", (5, 4), (3, 4), 0),
        ("ji,jk->ki", (4, 5), (4, 3), 2),
        ("nsd,dk->nsk", (2, 5, 4), (4, 3), 0),
        ("nsd,dk->skn", (2, 5, 4), (4, 3), 1),
        ("dk,nsd->nsk", (4, 3), (2, 5, 4), 0),
        ("nqd,nkd->nqk", (2, 5, 4), None, 1),
        ("bhqd,bhkd->bhqk", (2, 3, 5, 4), None, 1),
        ("bqhd,bkhd->bhqk", (2, 5, 3, 4), None, 2),
        ("bhqk,bkhd->bqhd", (2, 3, 5, 5), (2, 5, 3, 4), 1),
        ("...j,jk->...k", (2, 5, 4), (4, 3), 0),
        ("...qd,...kd->...qk", (2, 3, 5, 4), None, 1),
        ("...ij,...jk", (2, 5, 4), (2, 4, 3), 0),
        ("...ij,...jk->...ik", (2, 5, 4), (1, 4, 3), 0),
        ("bqd,dhk->bqhk", (2, 5, 4), (4, 3, 2), 1),  # Flax's projections to heads
        ("bqhd,hdo->bqo", (2, 5, 3, 4), (3, 4, 6), 1),  # and back
        ("bhqd,bkd->bhqk", (2, 3, 5, 4), (2, 6, 4), 2),  # keys that all heads share
        ("bqhd,bkd->bhqk", (2, 5, 3, 4), (2, 6, 4), 3),
    ],
)
def test_one_product_becomes_matmul(equation: str, x: Shape, w: Shape | None, extra: int) -> None:
    """Every axis but the last two may have any size; `extra`: nodes that move values around the MatMul."""
    free = [chr(65 + i) if i < len(x) - 2 else size for i, size in enumerate(x)]
    found = folded_ops(equation, free, None if w is None else normal(*w, seed=1), normal(*x))
    assert found.count("MatMul") == 1
    assert set(found) <= {"MatMul", "Transpose", "Reshape"}
    assert len(found) - 1 == extra


@pytest.mark.parametrize(
    ("equation", "x", "w"),
    [
        ("ij,ij->ij", (5, 4), (5, 4)),
        ("ij,jk->i", (5, 4), (4, 3)),
        ("ij,kl->ik", (5, 4), (4, 3)),
        ("nij,nij->n", (2, 5, 4), (2, 5, 4)),
        ("ii,ik->ik", (4, 4), (4, 3)),
        ("ij,jk->ik", (5, 1), (4, 3)),  # NumPy repeats the one value
        ("...j,...j->...", (5, 4), (5, 4)),
    ],
)
def test_any_other_einsum_stays(equation: str, x: Shape, w: Shape) -> None:
    assert folded_ops(equation, x, normal(*w, seed=1), normal(*x)) == ["Einsum"]


def test_axes_of_unknown_size_are_not_merged() -> None:
    """Of rows and columns that become one axis each, only one may have any size."""
    found = folded_ops("bhqd,bkd->bhqk", ("B", "H", "Q", "D"), normal(2, 6, 4), normal(2, 3, 5, 4))
    assert found == ["Einsum"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_product_is_that_of_numpy(data: st.DataObject) -> None:
    """Axes of all four kinds in any number and order, and of any size; the ellipsis in the place of some."""
    letters = iter("abcdefghij")
    kinds = ["".join(next(letters) for _ in range(data.draw(st.integers(low, 2)))) for low in (0, 1, 1, 1)]
    batch, rows, summed, columns = kinds
    shuffled = [
        "".join(data.draw(st.permutations(axes)))
        for axes in (batch + rows + summed, batch + summed + columns, batch + rows + columns)
    ]
    sizes = {axis: data.draw(st.integers(2, 4)) for axis in "".join(kinds)}
    equation = "{},{}->{}".format(*shuffled)
    x, w = (tuple(sizes[axis] for axis in term) for term in shuffled[:2])
    assert "Einsum" not in folded_ops(equation, x, normal(*w, seed=1), normal(*x))
