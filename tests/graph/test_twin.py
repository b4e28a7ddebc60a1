"""The float twin of a Q/DQ model, against the same products in numpy."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from trtq.graph.twin import float_twin
from trtq.simulation.rows import Runner

CODES = np.random.default_rng(1).integers(-127, 128, (4, 3)).astype(np.int8)
X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_activations_are_passed_on_and_weights_stay_rounded(dtype: type) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=kind),
        helper.make_node("QuantizeLinear", ["h", "s", "z"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize"),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["w"], "weights"),
        helper.make_node("MatMul", ["d", "w"], ["m"], "matmul"),
        helper.make_node("QuantizeLinear", ["m", "s", "z"], ["mq"], "quantize_output"),
        helper.make_node("DequantizeLinear", ["mq", "s", "z"], ["y"], "dequantize_output"),
    ]
    scale = np.asarray(0.25, dtype)
    constants = [
        numpy_helper.from_array(value, name)
        for name, value in {"s": scale, "z": np.int8(0), "codes": CODES}.items()
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", kind, ["N", 3])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    given = gs.import_onnx(onnx.shape_inference.infer_shapes(model))
    twin = float_twin(given)
    assert twin.tensors().keys() == given.tensors().keys()
    assert [node.op for node in given.nodes].count("QuantizeLinear") == 2  # the graph itself is unchanged
    found = Runner(twin, ["d", "w", "y"]).run({"x": X})
    assert np.array_equal(found["d"], X.astype(dtype))
    assert np.array_equal(found["w"], CODES * scale)
    assert found["y"].dtype == dtype
    expected = X.astype(dtype).astype(np.float64) @ (CODES * 0.25)
    np.testing.assert_allclose(found["y"], expected, rtol=0, atol=1e-4 if dtype is np.float32 else 0.1)
