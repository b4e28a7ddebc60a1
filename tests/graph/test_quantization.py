"""A quantization as bytes and as a hash: everything that it is made of counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from trtq.graph import quantization as module
from trtq.graph.fold import fold
from trtq.graph.model import export, load_model
from trtq.graph.place import leave_out, place
from trtq.graph.quantization import Correction, Quantization
from trtq.simulation.session import simulation_session

RANDOM = np.random.default_rng(5)
X = RANDOM.normal(size=(4, 6)).astype(np.float32)


@pytest.fixture
def quantization(tmp_path: Path) -> Quantization:
    """y = relu(x a) b + bias."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N,6] x) => (float[N,3] y) {
            h = MatMul(x, a)
            r = Relu(h)
            p = MatMul(r, b)
            y = Add(p, bias)
        }"""
    )
    for name, shape in {"a": (6, 5), "b": (5, 3), "bias": (3,)}.items():
        values = RANDOM.normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(proto, tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx")
    fold(model.graph)
    plan = place(model)
    add = next(node for node in model.graph.nodes if node.op == "Add")
    product = add.inputs[0].inputs[0].name
    return Quantization(
        model.graph,
        plan,
        {name: np.float32(0.02) for name in plan.tensors},
        {("b", 1): np.full(3, 0.03, np.float32)},
        {product: Correction(add.name, 1, np.ones(3, np.float32))},
        notes={"method": "max"},
    )


def _run(quantization: Quantization) -> np.ndarray:
    content = export(quantization.rewritten()).SerializeToString()
    return simulation_session(content, threads=1).run(None, {"x": X})[0]


def test_bytes_hold_everything(quantization: Quantization) -> None:
    again = Quantization.from_bytes(quantization.to_bytes())
    assert again.plan == quantization.plan
    assert again.notes == quantization.notes
    assert again.to_bytes() == quantization.to_bytes()
    assert again.sha256 == quantization.sha256
    assert np.array_equal(_run(again), _run(quantization))


def test_everything_changes_the_hash(quantization: Quantization) -> None:
    graph, plan = quantization.graph.copy(), quantization.plan
    graph.tensors()["a"].values = graph.tensors()["a"].values * np.float32(1.001)
    (name, correction) = next(iter(quantization.corrections.items()))
    others = [
        replace(quantization, graph=graph),
        replace(quantization, plan=leave_out(quantization.graph, plan, {plan.int8_nodes[0]: "by hand"})),
        replace(quantization, scales={tensor: np.float32(0.03) for tensor in plan.tensors}),
        replace(quantization, weight_scales={("b", 1): np.full(3, 0.04, np.float32)}),
        replace(quantization, corrections={name: replace(correction, values=2 * correction.values)}),
        replace(quantization, notes={"method": "entropy"}),
    ]
    assert len({quantization.sha256, *(other.sha256 for other in others)}) == 1 + len(others)
    assert replace(quantization, graph=quantization.graph.copy()).sha256 == quantization.sha256


def test_large_weights_are_not_stored(quantization: Quantization, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 4 * (6 * 5 + 5 * 3 + 3)
    monkeypatch.setattr(module, "PROTOBUF_LIMIT", weights + 1)
    assert quantization.storable
    monkeypatch.setattr(module, "PROTOBUF_LIMIT", weights)
    assert not quantization.storable
    assert len(quantization.sha256) == 64
