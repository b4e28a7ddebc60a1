"""Functions of a model's own, as ONNX Runtime runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from nets import loaded, normal, run

HEAD = '<ir_version: 10, opset_import: ["": 20, "pkg": 1]> g (float[N,8] x) => (float[N,8] y)'

MODELS = {
    "nested": """{ h = pkg.outer(x, w) y = pkg.outer(h, v) }
        <opset_import: ["": 20, "pkg": 1], domain: "pkg"> outer (a, b) => (c) {
            m = pkg.inner(a, b) c = pkg.inner(m, b) }
        <opset_import: ["": 20], domain: "pkg"> inner (a, b) => (c) { m = MatMul(a, b) c = Relu(m) }""",
    "in a body": """{
            s = ReduceSum<keepdims = 0>(x) z = Constant<value = float {0}>() c = Greater(s, z)
            y = If(c) <then_branch = t () => (float[N,8] t1) { t1 = pkg.block(x, w) },
                       else_branch = e () => (float[N,8] e1) { e1 = pkg.block(x, v) }> }
        <opset_import: ["": 20], domain: "pkg"> block (a, b) => (c) { m = MatMul(a, b) c = Relu(m) }""",
    "an input left out": """{ y = pkg.block(x, "", w) }
        <opset_import: ["": 20], domain: "pkg"> block (a, low, b) => (c) {
            m = MatMul(a, b) c = Clip(m, low) }""",
    "an attribute": """{ y = pkg.block<alpha = 0.3>(x, w) }
        <opset_import: ["": 20], domain: "pkg"> block <alpha> (a, b) => (c) {
            m = MatMul(a, b) c = LeakyRelu<alpha: float = @alpha>(m) }""",
    "a default": """{ y = pkg.outer(x, w) }
        <opset_import: ["": 20, "pkg": 1], domain: "pkg"> outer (a, b) => (c) { c = pkg.block(a, b) }
        <opset_import: ["": 20], domain: "pkg"> block <alpha: float = 0.25> (a, b) => (c) {
            m = MatMul(a, b) c = LeakyRelu<alpha: float = @alpha>(m) }""",
}


X, W, V = (normal(3, 8, seed=5), normal(8, 8, seed=0), normal(8, 8, seed=1))


def model_of(text: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f"{HEAD} {text}")
    for name, values in {"w": W, "v": V}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_functions_are_written_out(name: str, tmp_path: Path) -> None:
    model = model_of(MODELS[name])
    graph = loaded(model, tmp_path).graph
    assert {node.domain or "" for body in (graph, *graph.subgraphs()) for node in body.nodes} == {""}
    np.testing.assert_allclose(run(graph, {"x": X})["y"], run(model, {"x": X})["y"], atol=1e-6)


def test_a_function_of_another_opset_is_converted(tmp_path: Path) -> None:
    """The axes of ReduceMean have become an input."""
    model = model_of(
        """{ y = pkg.block(x, w) }
        <opset_import: ["": 17], domain: "pkg"> block (a, b) => (c) {
            m = MatMul(a, b) n = ReduceMean<axes = [1]>(m) c = Sub(m, n) }"""
    )
    expected = X @ W - (X @ W).mean(axis=1, keepdims=True)
    found = run(loaded(model, tmp_path).graph, {"x": X})["y"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
