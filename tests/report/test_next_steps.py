"""What to do with the files of a job that passed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from trtq.files import sha256_file
from trtq.gate.decision import decide
from trtq.gate.metrics import load_metric
from trtq.gate.verdict import Outcome, Verdict
from trtq.report.next_steps import next_steps


@pytest.fixture
def passed() -> Verdict:
    outputs = {"y": np.eye(8)}
    return decide(outputs, outputs, {"labels": np.arange(8)}, load_metric("top1"), executor="simulation")


def engine_of(builder: str, folder: Path) -> Path:
    engine = folder / "model.plan"
    engine.write_bytes(b"plan")
    record = {
        "engine_sha256": sha256_file(engine),
        "builder": builder,
        "version": "9.8.7",
        "model": "model.int8.onnx",
        "model_sha256": "",
        "targets": [],
        "profile": {},
        "compiled": {"layers": [], "batch": 1, "unread": []},
    }
    (folder / "model.plan.json").write_text(json.dumps(record))
    return engine


@pytest.mark.parametrize(
    ("builder", "says"),
    [
        ("tensorrt-rtx", "model.plan: TensorRT for RTX 9.8.7 (Python's tensorrt_rtx), and no TensorRT"),
        ("tensorrt", "model.plan: TensorRT 9.8.7 (Python's tensorrt, trtexec --loadEngine="),
    ],
)
def test_a_plan_is_for_the_runtime_that_built_it(builder, says, passed, tmp_path):
    first, second, third = next_steps(passed, tmp_path / "model.int8.onnx", engine_of(builder, tmp_path))
    assert first.startswith(f"next  {says}")
    assert f"trtexec --onnx={tmp_path}/model.int8.onnx" in second
    assert "trtq gate" in third  # the verdict is of the simulation


def test_an_engine_that_ran_needs_no_gate(passed, tmp_path):
    ran = dataclasses.replace(passed, executor="engine")
    assert "gate" not in " ".join(next_steps(ran, tmp_path / "m.onnx", engine_of("tensorrt", tmp_path)))


def test_without_an_engine_the_model_is_all_there_is(passed):
    (only,) = next_steps(passed, Path("out/model.int8.onnx"))
    assert only.startswith("next  model.int8.onnx: ")


def test_what_failed_goes_nowhere(passed):
    assert next_steps(dataclasses.replace(passed, gate=Outcome.FAIL), Path("model.int8.onnx")) == []
