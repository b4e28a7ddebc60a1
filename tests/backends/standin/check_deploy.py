"""`deploy` where the real TensorRT for RTX builds and does not run: the stand-in driver is none for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import Case, Run, conv_case, deploy_arguments, trtq_command

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return conv_case(tmp_path, "N")


def deployed(case: Case, output: Path, *more: str) -> Run:
    return trtq_command(*deploy_arguments(case, output, "--target", "8.6", "--method", "max", *more))


def test_the_gate_is_simulated_and_says_why(case: Case, tmp_path: Path) -> None:
    run = deployed(case, tmp_path / "out")
    assert run.code == 0, run.err
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert verdict["executor"] == "simulation"
    (warning,) = (text for text in verdict["warnings"] if "does not run on Stand-in GPU" in text)
    assert "cudaError" in warning  # TensorRT's own words
    assert (tmp_path / "out" / "model.plan").exists()


def test_without_the_engine_nothing_is_proved_where_it_is_required(case: Case, tmp_path: Path) -> None:
    run = deployed(case, tmp_path / "out", "--require-engine")
    assert run.code == 3, run.err
    assert json.loads((tmp_path / "out" / "verdict.json").read_text())["outcome"] == "inconclusive"


def test_a_gate_of_the_plan_says_what_is_missing(case: Case, tmp_path: Path) -> None:
    deployed(case, tmp_path / "out")
    plan = tmp_path / "out" / "model.plan"
    run = trtq_command("gate", case.model, plan, "--eval", case.data, "--metric", "cosine")
    assert run.code == 4
    assert "the engine does not load on this machine" in run.err
    assert "cudaError" in run.err


def test_tensor_by_tensor_the_simulation_stands(case: Case, tmp_path: Path) -> None:
    deployed(case, tmp_path / "out")
    gate = [
        "gate",
        case.model,
        tmp_path / "out" / "model.int8.onnx",
        "--eval",
        case.data,
        "--metric",
        "cosine",
    ]
    run = trtq_command(*gate, "--tensors", tmp_path / "tensors.json")
    assert run.code == 0, run.err
    assert "did not run" in run.out
    assert "Simulation only, the engine failed: the engine does not load" in run.out
    written = json.loads((tmp_path / "tensors.json").read_text())
    assert written["engine"] is None
    assert "cudaError" in written["failure"]
    assert all(tensor["simulation_db"] > 10 for tensor in written["tensors"])


def test_tensors_of_an_engine_cannot_be_compared(case: Case, tmp_path: Path) -> None:
    (plan := tmp_path / "m.plan").write_bytes(b"a plan")
    run = trtq_command(
        *("gate", case.model, plan, "--eval", case.data, "--metric", "cosine"),
        *("--tensors", tmp_path / "tensors.json"),
    )
    assert run.code == 2
    assert "an engine shows its outputs only" in run.err


def test_tensor_by_tensor_plugin_libraries_are_loaded(case: Case, tmp_path: Path) -> None:
    deployed(case, tmp_path / "out")
    models = [case.model, tmp_path / "out" / "model.int8.onnx"]
    run = trtq_command(
        *("gate", *models, "--eval", case.data, "--metric", "cosine"),
        *("--tensors", tmp_path / "tensors.json", "--plugin-lib", tmp_path / "missing.so"),
    )
    assert run.code == 0, run.err
    failure = json.loads((tmp_path / "tensors.json").read_text())["failure"]
    assert "the plugin library cannot be loaded" in failure
