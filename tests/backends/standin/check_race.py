"""`deploy` of the fastest engine on what seems a machine with a GPU: layers are timed, and engines race.

The stand-in for TensorRT runs plans and builds none, so what builds is stood in for here: a plan is its ONNX
model, compiled to one layer of all nodes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from jobs import Case, Run, conv_case, deploy_arguments, trtq_command
from standin import make_plan

from trtq.backends import tensorrt
from trtq.backends.compiled import Compiled, CompiledLayer, CompiledTensor
from trtq.backends.interface import Build, BuildOptions, Profile
from trtq.backends.record import write_record
from trtq.backends.timing import Measuring
from trtq.recovery import race

TAKES_MS = {"Int8": 1, "Half": 3}


def build(model: Path, engine: Path, *, profile: Profile, options: BuildOptions, **_: Any) -> Build:
    proto = onnx.load(model)
    shapes = {name: [list(shape) for shape in sizes] for name, sizes in profile.items()}
    kinds = {node.op_type for node in proto.graph.node}
    kind = "Int8" if "DequantizeLinear" in kinds else "Half"
    engine.write_bytes(make_plan(proto, profiles=[shapes], takes_ms=TAKES_MS[kind]))
    x, y = (CompiledTensor(name, (8, 8), kind, "Row major linear") for name in "xy")
    nodes = tuple(node.name for node in proto.graph.node)
    layer = CompiledLayer("layer", "CaskConvolution", (x,), (x,), (y,), nodes)
    built = Build(engine, (), Compiled((layer,), 8), ())
    write_record(
        built,
        builder="tensorrt",
        version="10.16.1",
        model=model,
        profiles=[profile],
        held={},
        options=options,
    )
    return built


@pytest.fixture(autouse=True)
def _builder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "build", build)
    for name in ("LAYERS", "RACE"):
        monkeypatch.setattr(race, name, Measuring(warm_up_ms=5, duration_s=0.05))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return conv_case(tmp_path, "N")


def deployed(case: Case, output: Path, *more: str) -> tuple[Run, Sequence[dict]]:
    options = ("--backend", "tensorrt", "--method", "max", *more)
    made = trtq_command(*deploy_arguments(case, output, *options))
    return made, json.loads((output / "workflow.json").read_text())


def test_layers_are_timed_engines_race_and_the_fastest_is_delivered(case: Case, tmp_path: Path) -> None:
    made, steps = deployed(case, tmp_path / "out")
    assert made.code == 0, made.err
    assert "layers of two engines timed on the GPU here" in made.err
    raced = {step["step"]: step["latency"] for step in steps}
    assert len(raced) >= 2
    assert "fp16 alone" in raced
    assert {latency["kind"] for latency in raced.values()} == {"measured"}
    (kept,) = (step for step in steps if step["kept"])
    assert kept["latency"]["microseconds"] == min(each["microseconds"] for each in raced.values())
    (chosen,) = (point for point in kept["front"] if point["chosen"])
    assert chosen["microseconds"] == kept["latency"]["microseconds"]
    assert kept["step"] != "fp16 alone"
    assert json.loads((tmp_path / "out" / "verdict.json").read_text())["executor"] == "engine"


def test_float16_alone_is_delivered_where_int8_is_slower(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "TAKES_MS", {"Int8": 3, "Half": 1})
    made, steps = deployed(case, tmp_path / "out")
    assert made.code == 0, made.err
    (kept,) = (step for step in steps if step["kept"])
    assert kept["step"] == "fp16 alone"
    assert "INT8 does not pay on this model and card" in made.err


def test_for_another_gpu_nothing_is_timed_here(case: Case, tmp_path: Path) -> None:
    made, steps = deployed(case, tmp_path / "out", "--gpu", "T4")
    assert made.code == 0, made.err
    assert "timed on the GPU here" not in made.err
    assert {step["latency"]["kind"] for step in steps} == {"modelled"}


def test_codes_are_fed_to_the_engine_and_read_from_it(case: Case, tmp_path: Path) -> None:
    """By its record the engine's input and output are codes; a float model's verdict comes out."""
    made, _ = deployed(case, tmp_path / "out", "--objective", "int8", "--io", "int8-in-out")
    assert made.code == 0, made.err
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert verdict["executor"] == "engine"
    assert verdict["outputs"]["classes_out"]["sqnr_db"] > 25
    record = json.loads((tmp_path / "out" / "model.plan.json").read_text())
    assert sorted(record["codes"]) == ["classes_out", "x"]
