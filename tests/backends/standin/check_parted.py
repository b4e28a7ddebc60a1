"""`deploy` where the builder makes engines that do not compute their models, as one on an H200 did."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from check_race import build
from jobs import Case, Run, conv_case, deploy_arguments, trtq_command
from onnx import numpy_helper

from trtq.backends import tensorrt
from trtq.backends.interface import Build

Damaged = Callable[[onnx.ModelProto], bool]


def has_int8(proto: onnx.ModelProto) -> bool:
    return any(node.op_type == "DequantizeLinear" for node in proto.graph.node)


def has_half(proto: onnx.ModelProto) -> bool:
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in proto.graph.initializer)


def has_bias(proto: onnx.ModelProto) -> bool:
    """As the model does not: the correction of biases gives the convolution one."""
    return any(node.op_type == "Conv" and len(node.input) == 3 for node in proto.graph.node)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[[Damaged], None]:
    """Engines of some models are to be wrong: their last weights are zeros."""

    def install(damaged: Damaged) -> None:
        def wrong_build(model: Path, engine: Path, **options: Any) -> Build:
            proto = onnx.load(model)
            if not damaged(proto):
                return build(model, engine, **options)
            (weight,) = (t for t in proto.graph.initializer if t.name.startswith("fc") and len(t.dims) == 2)
            weight.CopyFrom(
                numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(weight)), weight.name)
            )
            other = engine.with_name("wrong.onnx")
            onnx.save(proto, other)
            return build(other, engine, **options)

        monkeypatch.setattr(tensorrt, "build", wrong_build)

    return install


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return conv_case(tmp_path, "N")


def deployed(case: Case, output: Path, *more: str) -> tuple[Run, Sequence[dict]]:
    options = ("--backend", "tensorrt", "--method", "max", "--objective", "int8", "--max-drop", "10%", *more)
    made = trtq_command(*deploy_arguments(case, output, *options))
    assert made.code in (0, 1), made.err
    return made, json.loads((output / "workflow.json").read_text())


def kept(steps: Sequence[dict]) -> str:
    (name,) = (str(step["step"]) for step in steps if step["kept"])
    return name


def test_float16_is_left_where_the_engine_is_wrong_with_it(
    case: Case, tmp_path: Path, wrong: Callable[[Damaged], None]
) -> None:
    wrong(lambda proto: has_int8(proto) and has_half(proto))
    made, steps = deployed(case, tmp_path / "out")
    assert made.code == 0, made.err
    assert "the engine of 'calibrate' does not compute its model" in made.err
    assert kept(steps) == "calibrate, rest fp32"
    assert [step["outcome"] for step in steps] == ["fail", "pass"]


def test_the_fixes_are_left_where_the_engine_is_wrong_with_them(
    case: Case, tmp_path: Path, wrong: Callable[[Damaged], None]
) -> None:
    wrong(lambda proto: has_int8(proto) and has_bias(proto))
    made, steps = deployed(case, tmp_path / "out")
    assert made.code == 0, made.err
    assert [step["step"] for step in steps] == ["calibrate", "calibrate, rest fp32", "calibrate, no fixes"]
    assert kept(steps) == "calibrate, no fixes"


def test_no_accuracy_is_recovered_where_every_engine_is_wrong(
    case: Case, tmp_path: Path, wrong: Callable[[Damaged], None]
) -> None:
    wrong(has_int8)
    made, steps = deployed(case, tmp_path / "out")
    assert made.code == 1
    assert json.loads((tmp_path / "out" / "verdict.json").read_text())["executor"] == "engine"
    assert [step["note"] for step in steps if step["step"] in ("fix", "partial", "learn")] == [
        "not tried: the engine does not compute its model"
    ] * 3


def test_what_quantization_costs_is_not_laid_to_the_engine(
    case: Case, tmp_path: Path, wrong: Callable[[Damaged], None]
) -> None:
    wrong(lambda proto: False)
    made, _ = deployed(case, tmp_path / "out", "--min-sqnr", "60", "--recover", "none")
    assert made.code == 1
    assert "does not compute its model" not in made.err
