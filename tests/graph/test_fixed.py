"""Inputs that are constants: the graph computes what the model does with that value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx.reference

from trtq.graph.fixed import deciding_inputs, with_fixed
from trtq.graph.fold import fold
from trtq.graph.model import export, load_model

BRANCHES = """<ir_version: 8, opset_import: ["": 17]>
g (float[N,2] x, int64 rate, float[N,2] other) => (float[N,2] y) <int64 sixteen = {16000}> {
  wide = Equal(rate, sixteen)
  z = If(wide) <
    then_branch = then () => (float[N,2] a) { a = Add(x, x) },
    else_branch = otherwise () => (float[N,2] b) { b = Neg(x) }
  >
  y = Mul(z, other)
}"""


def test_a_branch_is_taken(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(BRANCHES)
    onnx.save(proto, path := tmp_path / "m.onnx")
    model = load_model(path)
    assert deciding_inputs(model.graph) == {"rate"}
    before = [spec.name for spec in model.inputs]
    fixed = with_fixed(model, {"rate": np.array(8000)})
    fold(fixed.graph)
    assert {node.op for node in fixed.graph.nodes} == {"Neg", "Mul"}
    assert sorted(before) == sorted(spec.name for spec in fixed.inputs)
    assert fixed.sha256 not in (model.sha256, with_fixed(load_model(path), {"rate": np.array(1)}).sha256)
    x = np.random.default_rng(0).normal(size=(2, 3, 2)).astype(np.float32)
    feed = {"x": x[0], "other": x[1]}
    (found,) = onnx.reference.ReferenceEvaluator(export(fixed.graph)).run(None, feed)
    (expected,) = onnx.reference.ReferenceEvaluator(proto).run(None, feed | {"rate": np.array(8000)})
    np.testing.assert_array_equal(found, expected)


def test_without_values_nothing_changes(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(BRANCHES), path := tmp_path / "m.onnx")
    model = load_model(path)
    assert with_fixed(model, {}) is model


def test_inputs_that_decide_sizes(tmp_path: Path) -> None:
    """What is computed from a tensor's shape depends on no values."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N,6] x, float[2] size, float[6] gain) => (float[a,b] y, float[N,6] z) {
          whole = Cast<to=7>(size)  y = Reshape(x, whole)  s = Shape(gain)  e = Expand(gain, s)  z = Mul(x, e)
        }"""
    )
    onnx.save(proto, path := tmp_path / "m.onnx")
    assert deciding_inputs(load_model(path).graph) == {"size"}
