"""Costs of an engine's layers, measured on what seems a machine with a GPU."""

from __future__ import annotations

from pathlib import Path

import onnx.parser
import pytest
from standin import make_plan

from trtq.backends.compiled import Compiled, CompiledLayer, CompiledTensor
from trtq.backends.record import sidecar
from trtq.backends.timing import Measuring
from trtq.cost.measured import time_engines
from trtq.files import sha256_file, write_json

NEGATION = onnx.parser.parse_model(
    '<ir_version: 9, opset_import: ["": 17]> g (float[n,3] x) => (float[n,3] y) { y = Neg(x) }'
)


def test_layers_add_up_to_the_engine(tmp_path: Path) -> None:
    """The stand-in's profiler shows one layer, of half a millisecond."""
    plan = tmp_path / "model.plan"
    plan.write_bytes(make_plan(NEGATION, profiles=[{"x": [[2, 3], [4, 3], [8, 3]]}]))
    x, y = (CompiledTensor(name, (-1, 3), "Float", "Row major linear FP32") for name in "xy")
    compiled = Compiled((CompiledLayer("layer", "PointWiseV2", (x,), (), (y,), ("Neg_0",)),), 4)
    about = {"builder": "tensorrt", "version": "10.16.1", "model": "m.onnx", "model_sha256": "0" * 64}
    write_json(
        sidecar(plan),
        {
            **about,
            "engine_sha256": sha256_file(plan),
            "targets": [],
            "profile": {},
            "compiled": compiled.to_json(),
        },
    )
    (engine,) = time_engines([plan], Measuring(warm_up_ms=5, duration_s=0.02, iterations=10))
    (layer,) = engine.layers
    assert (layer.name, layer.nodes, layer.compiled) == ("layer", ("Neg_0",), compiled.layers[0])
    assert (engine.precision, engine.batch) == ("fp32", 4)
    assert 0 < layer.microseconds <= 500
    assert layer.microseconds == pytest.approx(engine.microseconds)
