"""Which tensors searches measure where outputs lie behind what selects by value."""

from __future__ import annotations

import numpy as np
import pytest
from nets import graph_of, net, normal, run, tensor

from trtq.graph.selecting import measured_tensors, sized_by_values, up_to_measured
from trtq.graph.shapes import infer_types

DETECTOR = """
    g (float[1,3,8,8] x) => (float[K,4] found, float[K] value, float[1,5,4,4] raw) {
        raw = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w)
        flat = Reshape(raw, rows)
        offsets, logits = Split<axis = 1>(flat, parts)
        scores = Sigmoid(logits)
        boxes = Transpose<perm = [0, 2, 1]>(offsets)
        picked = NonMaxSuppression(boxes, scores, most)
        which = Gather<axis = 1>(picked, column)
        boxes2 = Squeeze(boxes, zero)
        found = Gather<axis = 0>(boxes2, which)
        strength = Exp(logits)
        strength1 = Reshape(strength, one)
        value = Gather(strength1, which)
    }
"""
CONSTANTS = {
    "w": normal(5, 3, 3, 3),
    "rows": np.array([1, 5, 16]),
    "parts": np.array([4, 1]),
    "most": np.array([3]),
    "column": np.array(2),
    "zero": np.array([0]),
    "one": np.array([-1]),
}


def measured(text: str, **constants) -> list[str]:
    graph = graph_of(net(text, **constants))
    infer_types(graph)
    return measured_tensors(graph)


def test_what_goes_in_and_what_is_looked_up() -> None:
    found = measured(DETECTOR, **CONSTANTS)
    assert set(found) == {"raw", "boxes", "scores", "boxes2", "strength1"}


def test_the_part_in_front_computes_the_same() -> None:
    model = net(DETECTOR, **CONSTANTS)
    graph = graph_of(model)
    infer_types(graph)
    part = up_to_measured(graph)
    assert not {"NonMaxSuppression", "Gather"} & {node.op for node in part.nodes}
    assert len(graph.nodes) == 12
    feed = {"x": normal(1, 3, 8, 8, seed=1)}
    for name, values in run(part, feed).items():
        np.testing.assert_array_equal(values, tensor(model, name, feed))
    assert up_to_measured(part) is part


def test_without_what_selects_the_outputs_are_measured() -> None:
    text = "g (float[N,4] x) => (float[N,4] z, float[N,4] y) { y = Relu(x) z = TopK(y, k) }"
    assert measured("g (float[N,4] x) => (float[N,4] z, float[N,4] y) { y = Relu(x) z = Neg(y) }") == [
        "z",
        "y",
    ]
    assert measured(text.replace("z = TopK", "z, i = TopK"), k=np.array([4])) == ["z", "y"]


def test_what_nothing_computes_is_left_out() -> None:
    text = "g (float[N,4] x) => (float[N,4] x, float[3] w, float[N,4] y) { y = Relu(x) }"
    assert measured(text, w=normal(3)) == ["y"]
    assert measured("g (float[N,4] x) => (float[3] w) { y = Relu(x) }", w=normal(3)) == ["w"]


def test_the_second_of_two_stages_is_measured() -> None:
    """What a product follows has selected for it: its error is seen behind the product."""
    text = """
        g (float[1,3,8,8] x) => (float[K,2] y) {
            raw = Conv(x, w)
            flat = Reshape(raw, all)
            signs = Greater(flat, least)
            kept = Compress<axis = 0>(flat, signs)
            column = Unsqueeze(kept, last)
            y = MatMul(column, v)
        }
    """
    options = {
        "w": normal(2, 3, 3, 3),
        "all": np.array([-1]),
        "least": np.float32(0),
        "last": np.array([1]),
        "v": normal(1, 2),
    }
    assert measured(text, **options) == ["y"]
    again = text.replace(
        "y = MatMul(column, v)", "m = MatMul(column, v) n = Reshape(m, all) s = Greater(n, least)"
    )
    again = again.replace("(float[K,2] y)", "(float[K] y)").replace(
        "s = Greater(n, least)", "s = Greater(n, least) y = Compress(n, s)"
    )
    assert measured(again, **options) == ["n"]


@pytest.mark.parametrize("op", ["EfficientNMS_TRT", "BatchedNMSDynamic_TRT"])
def test_plugins_select_too(op: str) -> None:
    text = f"""
        g (float[1,9,4] b, float[1,9,2] s) => (int32[1,1] n, float[1,5,4] found) {{
            boxes = Neg(b)
            scores = Sigmoid(s)
            n, found = TRT.{op}(boxes, scores)
        }}
    """
    assert set(measured(text)) == {"boxes", "scores"}


def test_a_selection_inside_a_branch() -> None:
    text = """
        g (float[1,9,4] x, bool c) => (int64[K,2] y) {
            a = Relu(x)
            y = If (c) <
                then_branch = t () => (int64[K,3] p) { p = NonZero(a) },
                else_branch = e () => (int64[K,3] q) { q = NonZero(x) }
            >
        }
    """
    assert measured(text) == ["a"]


SIZED = {
    "as many as are above zero": (
        "float[M] y",
        "t = Greater(x, zero) f = Reshape(x, all) c = Reshape(t, all) y = Compress(f, c)",
    ),
    "their places": ("int64[M,2] y", "n = NonZero(x) y = Transpose(n)"),
    "a range as long as a value": (
        "int64[M] y",
        "m = ReduceMax<keepdims = 0>(x) n = Cast<to = 7>(m) y = Range(first, n, step)",
    ),
    "rows that a value repeats": ("float[M,4] y", "m = ReduceMax(x) n = Cast<to = 7>(m) y = Tile(x, n)"),
    "what is behind them": (
        "float[M] y",
        "n = NonZero(x) c = Cast<to = 1>(n) y = ReduceSum<keepdims = 0>(c, first_axis)",
    ),
    "as many turns as a value": (
        "float[M,4] y",
        "m = ReduceMax<keepdims = 0>(x) n = Cast<to = 7>(m)"
        " last, y = Loop (n, flag, x) < body = b (int64 i, bool go, float[K,4] h) =>"
        " (bool on, float[L,4] r, float[K,4] s)"
        " { r = Concat<axis = 0>(h, x) on = Identity(go) s = Relu(h) } >",
    ),
    "until a value says so": (
        "float[M,4] y",
        "y = Loop (three, flag, x) < body = b (int64 i, bool go, float[K,4] h) => (bool on, float[L,4] r)"
        " { r = Concat<axis = 0>(h, x) m = ReduceMax<keepdims = 0>(h) on = Cast<to = 9>(m) } >",
    ),
    "inside a branch": (
        "int64[M,2] y",
        "n = If (flag) < then_branch = t () => (int64[2,M] p) { p = NonZero(x) },"
        " else_branch = e () => (int64[2,M] q) { q = Identity(none) } >"
        " y = Transpose(n)",
    ),
}
BY_SHAPE = {
    "a row for each": ("float[N,4] y", "y = Relu(x)"),
    "a mask written back": (
        "float[N,4] y",
        "n = NonZero(x) t = Transpose(n) v = GatherND(x, t) y = ScatterND(x, t, v)",
    ),
    "the shape's own places": (
        "float[N,4] y",
        "s = Shape(x) o = ConstantOfShape<value = int64[1] {1}>(s) n = NonZero(o) t = Transpose(n)"
        " v = GatherND(x, t) y = Reshape(v, s)",
    ),
    "a number of the shape's": (
        "int64[M] y",
        "s = Shape(x) n = Gather(s, zero_index) y = Range(zero_index, n, step)",
    ),
    "a fixed number of turns": (
        "float[N,4] y",
        "y = Loop (three, flag, x) < body = b (int64 i, bool go, float[K,4] h) => (bool on, float[K,4] r)"
        " { r = Relu(h) on = Identity(go) } >",
    ),
    "as many for each, and one batch": ("float[N,2] y, int64[N,2] i", "y, i = TopK(x, two)"),
}
NUMBERS = {
    "zero": np.float32(0),
    "all": np.array([-1]),
    "first": np.int64(0),
    "zero_index": np.int64(0),
    "step": np.int64(1),
    "first_axis": np.array([0]),
    "flag": np.array(True),
    "none": np.zeros((2, 0), np.int64),
    "two": np.array([2]),
    "three": np.int64(3),
}


@pytest.mark.parametrize("case", [*SIZED, *BY_SHAPE])
def test_outputs_that_may_have_as_many_entries_as_rows_by_chance(case: str) -> None:
    outputs, nodes = (SIZED | BY_SHAPE)[case]
    model = net(f"g (float[N,4] x) => ({outputs}) {{ {nodes} }}", **NUMBERS)
    for _ in range(2):
        assert sized_by_values(model, {"x": 0}) == ({"y"} if case in SIZED else frozenset())
        model.graph.node.sort(key=lambda node: -ord(node.output[0][0]))  # another order


def test_weights_among_the_inputs_are_constants() -> None:
    text = "g (float[N,4] x, int64[1] all) => (float[M] y) { y = Reshape(x, all) }"
    assert sized_by_values(net(text, all=np.array([-1])), {}) == frozenset()
    assert sized_by_values(net(text), {}) == {"y"}
