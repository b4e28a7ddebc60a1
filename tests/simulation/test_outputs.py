from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import net, normal, saved
from onnx import TensorProto, helper

from trtq.errors import InputError
from trtq.simulation.outputs import Outputs, run_model
from trtq.simulation.values import joined, stacked


class Rows:
    """Samples over a list of rows."""

    alone, sequences = False, None

    def __init__(self, rows):
        self._rows = rows
        self.source = "rows"
        self.length = len(rows)
        self.axes = dict.fromkeys(rows[0] if rows else (), 0)

    def __len__(self):
        return self.length

    def rows(self):
        return iter(self._rows)

    def where(self, batch):
        return f"rows {batch.start} to {batch.start + batch.rows - 1}"


def rows_of(array, name="x"):
    return Rows([{name: array[i : i + 1]} for i in range(len(array))])


def save(path, nodes, shape, out_shape, dtype=TensorProto.FLOAT):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", dtype, out_shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def batch_of_every_row(path, batch="n"):
    """y[i] = the number of rows in the batch: shows how rows were batched."""
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=1),
        helper.make_node("Mul", ["zero_x", "s"], ["y"]),
        helper.make_node("Div", ["x", "x"], ["zero_x"]),
    ]
    return save(path, [nodes[2], nodes[0], nodes[1]], [batch, 1], [batch, 1])


@pytest.mark.parametrize("batch_size", [None, 1, 4, 100])
def test_rows_keep_their_order(tmp_path, batch_size):
    model = save(tmp_path / "m.onnx", [helper.make_node("Neg", ["x"], ["y"])], ["n", 3], ["n", 3])
    x = np.random.default_rng(0).normal(size=(37, 3)).astype(np.float32)
    done = []
    found = run_model(model, rows_of(x), batch_size=batch_size, threads=1, progress=done.append)
    np.testing.assert_array_equal(found.arrays["y"], -x)
    assert found.executor == "simulation"
    assert sum(done) == 37
    assert max(done) == min(batch_size or 16, 37)


def test_a_fixed_batch_is_filled_up_and_trimmed(tmp_path):
    model = batch_of_every_row(tmp_path / "m.onnx", batch=4)
    found = run_model(model, rows_of(np.ones((6, 1), np.float32)))
    np.testing.assert_array_equal(found.arrays["y"], np.full((6, 1), 4.0))
    few = run_model(model, rows_of(np.ones((6, 1), np.float32)), batch_size=2)
    np.testing.assert_array_equal(few.arrays["y"], np.full((6, 1), 4.0))
    with pytest.raises(InputError, match="at most 4 rows"):
        run_model(model, rows_of(np.ones((6, 1), np.float32)), batch_size=5)


def test_rows_of_different_shapes_are_not_mixed(tmp_path):
    nodes = [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=1)]
    model = save(tmp_path / "m.onnx", nodes, ["n", "length"], ["n", 1])
    proto = onnx.load(model)
    proto.graph.initializer.append(helper.make_tensor("axes", TensorProto.INT64, [1], [1]))
    onnx.save(proto, model)
    lengths = [3, 3, 5, 3, 2, 2]
    samples = Rows([{"x": np.ones((1, length), np.float32)} for length in lengths])
    done = []
    found = run_model(model, samples, progress=done.append)
    np.testing.assert_array_equal(found.arrays["y"][:, 0], lengths)
    assert done == [2, 1, 1, 2]


def test_outputs_of_other_shapes_are_a_list(tmp_path):
    model = save(tmp_path / "m.onnx", [helper.make_node("Neg", ["x"], ["y"])], ["n", "l"], ["n", "l"])
    rows = [normal(1, length, seed=i) for i, length in enumerate((3, 3, 4, 3))]
    found = run_model(model, Rows([{"x": row} for row in rows])).arrays["y"]
    assert isinstance(found, list)
    for own, row in zip(found, rows, strict=True):
        np.testing.assert_array_equal(own, -row[0])


NOT_BY_ROW = """
    g (float[N,6,2] x) => (float[] s, float[6,N,2] turned, float[M,2] picked, float[1,3] priors, int64[K] w,
                           bool[N,6] positive) <float[1,3] priors = {1, 2, 3}, int64[3] w = {7, 8, 9}> {
        s = ReduceMax<keepdims = 0>(x)
        turned = Transpose<perm = [1, 0, 2]>(x)
        zero = Constant<value = float {0}>()
        positives = Greater(x, zero)
        all = Constant<value = int64[2] {-1, 2}>()
        flat = Reshape(x, all)
        column = Constant<value = int64 {0}>()
        first = Gather<axis = 2>(positives, column)
        positive = Identity(first)
        one = Constant<value = int64[1] {-1}>()
        condition = Reshape(first, one)
        picked = Compress<axis = 0>(flat, condition)
    }
"""
"""A scalar, sequences first, rows by value, two constants, and one output that has a row for each row."""


@pytest.mark.parametrize("batch_size", [None, 1, 6])
def test_outputs_of_any_shape_are_those_of_each_row(tmp_path, batch_size):
    """Six time steps in batches of six: the first axis has the batch's size by chance."""
    model = saved(net(NOT_BY_ROW), tmp_path)
    x = normal(20, 6, 2)
    found = run_model(model, rows_of(x), batch_size=batch_size).arrays
    np.testing.assert_array_equal(found["s"], x.max(axis=(1, 2)))
    np.testing.assert_array_equal(found["turned"], x[:, :, None])
    np.testing.assert_array_equal(found["positive"], x[:, :, 0] > 0)
    np.testing.assert_array_equal(found["priors"], np.tile(np.float32([[1, 2, 3]]), (20, 1)))
    np.testing.assert_array_equal(found["w"], np.tile([7, 8, 9], (20, 1)))
    assert isinstance(found["picked"], list)
    for own, row in zip(found["picked"], x, strict=True):
        np.testing.assert_array_equal(own, row[row[:, 0] > 0])


def test_a_row_of_which_nothing_is_found_and_scalars_by_chance(tmp_path):
    """0, 1 and 2 rows found: what has one row has no batch axis either; the model fixes a batch of 1."""
    text = "g (float[1,2] x) => (float[M] y) { zero = Constant<value = float {0}>() c = Greater(x, zero)"
    text += " f = Constant<value = int64[1] {-1}>() flat = Reshape(x, f) b = Reshape(c, f)"
    model = saved(net(text + " y = Compress<axis = 0>(flat, b) }"), tmp_path)
    x = np.array([[1, -1], [-1, -2], [3, 4], [-5, 6]], np.float32)
    found = run_model(model, rows_of(x)).arrays["y"]
    assert [own.tolist() for own in found] == [[1], [], [3, 4], [6]]
    same = run_model(model, rows_of(x[[0, 3]])).arrays["y"]
    np.testing.assert_array_equal(same, [[1], [6]])


ABOVE_ZERO = """
    g (float[N,3] x) => (float[M] y) {
        zero = Constant<value = float {0}>()
        above = Greater(x, zero)
        one = Constant<value = int64[1] {-1}>()
        flat = Reshape(x, one)
        condition = Reshape(above, one)
        y = Compress<axis = 0>(flat, condition)
    }
"""


@pytest.mark.parametrize("batch_size", [None, 1, 2, 4])
def test_as_many_boxes_as_rows_are_no_rows(tmp_path, batch_size):
    """One is found in the first row and in the middle one, and 4 in all 4."""
    model = saved(net(ABOVE_ZERO), tmp_path)
    x = np.array([[1, -1, -1], [-1, -1, -2], [3, -1, -1], [-5, 6, 7]], np.float32)
    found = run_model(model, rows_of(x), batch_size=batch_size).arrays["y"]
    assert [own.tolist() for own in found] == [[1], [], [3], [6, 7]]


def test_one_box_for_each_row_is_a_row(tmp_path):
    model = saved(net(ABOVE_ZERO), tmp_path)
    x = np.array([[1, -1, -1], [-1, 2, -2], [3, -1, -1]], np.float32)
    np.testing.assert_array_equal(run_model(model, rows_of(x)).arrays["y"], [1, 2, 3])


MIXING = {
    "the mean of the batch": "m = ReduceMean<axes = [0]>(x) y = Sub(x, m)",
    "the row before": "y = CumSum(x, zero)",
    "the row behind": "y = CumSum<reverse = 1>(x, zero)",
    "one scale for the batch": "q, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(q, s, z)",
    "each other": "t = Transpose(x) a = MatMul(x, t) b = Softmax(a) y = MatMul(b, x)",
}


@pytest.mark.parametrize("batch", ["N", 4])
@pytest.mark.parametrize("mixing", MIXING)
def test_rows_that_are_not_independent_are_found_out(tmp_path, mixing, batch):
    rows = f"float[{batch},3]"
    text = f"g ({rows} x) => ({rows} y, {rows} own) {{ {MIXING[mixing]} own = Relu(x) }}"
    model = saved(net(text, zero=np.int64(0)), tmp_path)
    found = run_model(model, rows_of(normal(11, 3)), batch_size=4)
    assert found.mixed == ("y",)
    assert Outputs.from_bytes(found.to_bytes()).mixed == ("y",)
    if batch == "N":
        assert run_model(model, rows_of(normal(11, 3)), batch_size=1).mixed == ()


def test_rounding_mixes_no_rows(tmp_path):
    """Products of rows alone are computed in another order than those of a batch, and a quantizer behind them
    makes steps of it."""
    text = """
        g (float[N,512] x) => (float[N,64] y) {
            a = MatMul(x, w)
            q = QuantizeLinear(a, s)
            y = DequantizeLinear(q, s)
        }
    """
    model = saved(net(text, w=normal(512, 64), s=np.float32(1e-4)), tmp_path)
    assert run_model(model, rows_of(normal(64, 512, seed=1))).mixed == ()


def test_an_output_that_is_an_input_is_none_of_the_models(tmp_path):
    model = saved(net("g (float[N,2] x) => (float[N,2] x, float[N,2] y) { y = Neg(x) }"), tmp_path)
    found = run_model(model, rows_of(normal(6, 2))).arrays
    assert list(found) == ["y"]
    same = saved(net("g (float[N,2] x) => (float[N,2] x) { y = Neg(x) }"), tmp_path)
    assert list(run_model(same, rows_of(normal(6, 2))).arrays) == ["x"]


def test_a_fixed_batch_may_have_outputs_that_never_change(tmp_path):
    model = saved(
        net("g (float[4,2] x) => (float[4,2] y, float[3] p) <float[3] p = {1, 2, 3}> { y = Neg(x) }"),
        tmp_path,
    )
    x = normal(6, 2)
    found = run_model(model, rows_of(x)).arrays
    np.testing.assert_array_equal(found["y"], -x)
    np.testing.assert_array_equal(found["p"], np.tile(np.float32([1, 2, 3]), (6, 1)))
    turned = saved(net("g (float[4,2] x) => (float[2,4] y) { y = Transpose<perm = [1, 0]>(x) }"), tmp_path)
    with pytest.raises(InputError, match="'y' does not have one row per sample") as caught:
        run_model(turned, rows_of(x))
    assert "batch of 1" in caught.value.remedy


shapes = st.lists(st.lists(st.integers(0, 3), min_size=0, max_size=3).map(tuple), min_size=1, max_size=6)


@given(st.lists(shapes, min_size=1, max_size=3), st.sampled_from([np.float32, np.int64, np.bool_]))
def test_any_outputs_go_to_bytes_and_back(outputs, dtype):
    """Equal outputs give equal bytes, and what comes back is equal, whatever the rows' shapes and ranks."""
    arrays = {
        f"y/{i}": stacked([normal(*shape, seed=i).astype(dtype) for shape in rows])
        for i, rows in enumerate(outputs)
    }
    there = Outputs(arrays, "engine")
    back = Outputs.from_bytes(there.to_bytes())
    assert back.to_bytes() == there.to_bytes()
    assert back.executor == "engine"
    for name, values in arrays.items():
        assert type(back.arrays[name]) is type(values)
        for own, expected in zip(back.arrays[name], values, strict=True):
            np.testing.assert_array_equal(own, expected, strict=True)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=8), st.data())
def test_parts_are_the_whole_however_they_are_cut(lengths, data):
    """Shards of rows found: a shard of only single ones looks as if they had a batch axis."""
    rows = [normal(length, 2, seed=i) for i, length in enumerate(lengths)]
    cut = data.draw(st.integers(1, len(rows) - 1))

    def part(own):
        return np.concatenate(own) if all(len(row) == 1 for row in own) else stacked(own)

    found = joined([part(rows[:cut]), part(rows[cut:])])
    expected = part(rows)
    assert type(found) is type(expected)
    for own, row in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own, row)


def test_inputs_that_do_not_fit(tmp_path, capfd):
    model = save(tmp_path / "m.onnx", [helper.make_node("Neg", ["x"], ["y"])], ["n", 3], ["n", 3])
    with pytest.raises(InputError, match="no array for input 'x'"):
        run_model(model, rows_of(np.ones((4, 3), np.float32), "z"))
    for wrong in (np.ones((4, 3)), np.ones((4, 5), np.float32)):
        with pytest.raises(InputError, match="does not run on rows 0 to 3 of the data") as caught:
            run_model(model, rows_of(wrong))
        assert caught.value.file == "rows"
    with pytest.raises(InputError, match="no rows"):
        run_model(model, Rows([]))
    for length in (3, 5):
        samples = rows_of(np.ones((4, 3), np.float32))
        samples.length = length
        with pytest.raises(InputError, match=f"did not give the {length} rows"):
            run_model(model, samples)
    with pytest.raises(InputError, match="batch size"):
        run_model(model, rows_of(np.ones((4, 3), np.float32)), batch_size=0)
    assert capfd.readouterr() == ("", "")


def test_extra_arrays_are_left_alone(tmp_path):
    model = save(tmp_path / "m.onnx", [helper.make_node("Neg", ["x"], ["y"])], ["n", 3], ["n", 3])
    row = {"x": np.ones((1, 3), np.float32), "unused": np.ones((1, 9))}
    assert run_model(model, Rows([row])).arrays["y"].shape == (1, 3)


def test_text_is_no_output_to_compare(tmp_path):
    cast = net("g (float[n,2] x) => (string[n,2] names) { names = Cast <to = 8> (x) }", opset=17)
    model = saved(cast, tmp_path)
    with pytest.raises(InputError, match="output 'names' holds text"):
        run_model(model, rows_of(np.ones((3, 2), np.float32)))
