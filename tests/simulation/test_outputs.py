from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from trtq.errors import InputError
from trtq.simulation.outputs import run_model


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


def test_outputs_that_change_shape_are_refused(tmp_path):
    model = save(tmp_path / "m.onnx", [helper.make_node("Neg", ["x"], ["y"])], ["n", "l"], ["n", "l"])
    samples = Rows([{"x": np.ones((1, length), np.float32)} for length in (3, 4)])
    with pytest.raises(InputError, match="changes its shape"):
        run_model(model, samples)


def test_an_output_without_rows_is_refused(tmp_path):
    nodes = [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)]
    model = save(tmp_path / "m.onnx", nodes, ["n", 3], [])
    with pytest.raises(InputError, match="one row per sample"):
        run_model(model, rows_of(np.ones((4, 3), np.float32)))


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
