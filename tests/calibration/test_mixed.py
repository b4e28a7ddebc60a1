"""Which tensors of a detector's end have no one scale: by their operands' ranges, worked by hand."""

from __future__ import annotations

import onnx
import pytest
from nets import graph_of

from trtq.calibration.mixed import mixed_tensors

NET = """g (float[1,3,4,4] x) => (float[1,n,6] out)
    <float[4,3,1,1] w = {1,1,1,1,1,1,1,1,1,1,1,1}, int64[3] shape = {0, 6, -1}> {
    boxes = Conv(x, w)
    logits = Slice(boxes, first, second, axis)
    scores = Sigmoid(logits)
    joined = Concat<axis = 1>(boxes, scores)
    flat = Reshape(joined, shape)
    out = Transpose<perm = [0, 2, 1]>(flat)
}"""


def net(text: str = NET) -> onnx.ModelProto:
    constants = "int64[1] first = {0}, int64[1] second = {2}, int64[1] axis = {1}, "
    header = '<ir_version: 8, opset_import: ["" : 17]>'
    return onnx.parser.parse_model(header + text.replace("<float[4,3", f"<{constants}float[4,3"))


RANGES = {
    "x": 1.0,
    "boxes": 160.0,
    "logits": 9.0,
    "scores": 1.0,
    "joined": 160.0,
    "flat": 160.0,
    "out": 160.0,
}


def test_boxes_beside_scores_and_what_is_moved_from_there() -> None:
    assert mixed_tensors(graph_of(net()), RANGES) == {"joined", "flat", "out"}


@pytest.mark.parametrize(("largest", "mixed"), [(9.9, False), (10.0, True)])
def test_ranges_that_are_alike_share_a_scale(largest: float, mixed: bool) -> None:
    assert bool(mixed_tensors(graph_of(net()), {**RANGES, "boxes": largest})) is mixed


def test_in_front_of_a_product_all_share_one_scale() -> None:
    text = NET.replace("out = Transpose<perm = [0, 2, 1]>(flat)", "out = MatMul(flat, flat)")
    assert mixed_tensors(graph_of(net(text)), RANGES) == set()


def test_what_computes_with_mixed_values_is_on_its_own() -> None:
    text = NET.replace("out = Transpose<perm = [0, 2, 1]>(flat)", "out = Tanh(flat)")
    assert mixed_tensors(graph_of(net(text)), RANGES) == {"joined", "flat"}
