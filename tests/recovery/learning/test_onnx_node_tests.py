"""The operators over PyTorch against ONNX's own node tests, whose outputs were written with NumPy."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx.backend.test.loader import load_model_tests

from trtq.errors import InputError

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra qat)")

from trtq.recovery.learning.torch_graph import OPERATORS, TorchGraph  # noqa: E402 (needs torch)

TYPES = {getattr(onnx.TensorProto, name) for name in ("FLOAT", "INT32", "INT64", "BOOL")}

FIRST_OUTPUT = {"LayerNormalization", "MaxPool"}
"""Statistics and indices, their other outputs, are for training and unpooling: learning reads none."""

REFUSED = {
    "AveragePool with dilations",
    "BatchNormalization in training mode",
    "ConvTranspose with auto_pad or output_shape",
    "Dropout in training mode",
    "GatherND with batch_dims",
    "LSTM with lengths or peepholes",
    "Resize 'cubic' or antialiased",
    "Resize 'linear' or antialiased",
    "Resize that keeps the aspect ratio",
    "Resize with tf_crop_and_resize coordinates",
    "unusual recurrent attributes",
}
"""Forms that learning refuses, by the reason that it gives."""

ELSEWHERE = {
    "test_resize_downsample_scales_linear_align_corners": "ONNX Runtime counts in whole output pixels",
    "test_reduce_max_empty_set": "the maximum of nothing",
    "test_reduce_max_empty_set_bool": "the maximum of nothing",
    "test_reduce_min_empty_set": "the minimum of nothing",
}
"""Tests left out, and why."""


def why_not(case: Any) -> str:
    """Why a test is none of torch_graph's; empty if it is."""
    nodes, values = case.model.graph.node, [*case.model.graph.input, *case.model.graph.output]
    if case.name in ELSEWHERE:
        return ELSEWHERE[case.name]
    if any(node.op_type not in OPERATORS or node.domain for node in nodes):
        return "another operator"
    if any(value.type.tensor_type.elem_type not in TYPES for value in values):
        return "another type"
    return ""


def outcome(case: Any) -> str:
    """`matches`, the reason of a refusal, or what is wrong."""
    model, (inputs, expected) = case.model, case.data_sets[0]
    if len(model.graph.node) == 1 and model.graph.node[0].op_type in FIRST_OUTPUT:
        del model.graph.output[1:]
    feeds = {
        value.name: torch.from_numpy(np.array(x)) for value, x in zip(model.graph.input, inputs, strict=True)
    }
    try:
        with torch.no_grad():
            found = TorchGraph(gs.import_onnx(model))(feeds)
    except InputError as error:
        return str(error.cause)
    for value, y in zip(model.graph.output, expected, strict=False):
        actual = found[value.name].numpy()
        if (actual.shape, actual.dtype) != (np.shape(y), np.asarray(y).dtype):
            return f"{case.name}: {actual.dtype}{actual.shape} instead of {np.asarray(y).dtype}{np.shape(y)}"
        if not np.allclose(actual, y, rtol=case.rtol, atol=1e-6, equal_nan=True):
            return f"{case.name}: other values"
    return "matches"


@pytest.mark.slow  # ONNX computes all its tests, those of other operators too
@pytest.mark.filterwarnings("ignore")
def test_onnx_node_tests() -> None:
    cases = load_model_tests(kind="node")
    outcomes = Counter(outcome(case) for case in cases if not why_not(case))
    assert outcomes.keys() - {"matches"} == REFUSED
    assert outcomes["matches"] > 650


def test_operators_that_only_old_opsets_have() -> None:
    """Upsample to twice the width: every pixel twice."""
    values = np.array([[[[1, 2, 3]]]], np.float32)
    graph = gs.Graph(opset=9)
    x, y = gs.Variable("x", np.float32, values.shape), gs.Variable("y", np.float32)
    scales = gs.Constant("scales", np.array([1, 1, 1, 2], np.float32))
    graph.nodes = [gs.Node("Upsample", "node", {"mode": "nearest"}, [x, scales], [y])]
    graph.inputs, graph.outputs = [x], [y]
    assert TorchGraph(graph)({"x": torch.from_numpy(values)})["y"].tolist() == [[[[1, 1, 2, 2, 3, 3]]]]


def test_a_mask_that_is_read_must_be_known() -> None:
    """MaxPool's second output, the indices, is refused by name where a node reads it."""
    x, y, at = (
        gs.Variable("x", np.float32, (1, 1, 2)),
        gs.Variable("y", np.float32),
        gs.Variable("at", np.int64),
    )
    graph = gs.Graph(
        [gs.Node("MaxPool", "pool", {"kernel_shape": [2]}, [x], [y, at])],
        inputs=[x],
        outputs=[y, at],
        opset=17,
    )
    with pytest.raises(InputError, match=r"'pool' \(MaxPool\)"):
        TorchGraph(graph)({"x": torch.zeros(1, 1, 2)})
