"""A model with a custom operator between two convolutions, and data."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

random = np.random.default_rng(0)
weights = {
    "first": random.normal(0, 0.3, (16, 3, 3, 3)),
    "second": random.normal(0, 0.1, (8, 16, 3, 3)),
}
graph = helper.make_graph(
    [
        helper.make_node("Conv", ["x", "first"], ["a"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Swish", ["a"], ["b"], "swish", domain="mine", beta=1.5),
        helper.make_node("Conv", ["b", "second"], ["y"], "conv2", pads=[1, 1, 1, 1]),
    ],
    "custom",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 16, 16])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8, 16, 16])],
    [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
)
model = helper.make_model(
    graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)], ir_version=10
)
onnx.save(model, "model.onnx")
for name, count in (("calib.npz", 128), ("eval.npz", 200)):
    np.savez(name, x=random.normal(size=(count, 3, 16, 16)).astype(np.float32))
