"""`trtq build`, `gate`, `cache convert` and `bench` on the demo's results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from jobs import Deployed, Run

import trtq
from trtq.calibration.table import Table
from trtq.errors import ExitCode
from trtq.graph.plan import Plan
from trtq.migration.implied import implied
from trtq.migration.source import load_source

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

MODEL = Path(trtq.__file__).parent / "demo" / "digits.onnx"
CALIB, EVAL = MODEL.with_name("calib.npz"), MODEL.with_name("eval.npz")

Command = Callable[..., Run]


def test_build_in_fp16_computes_in_half(trtq_run: Command, tmp_path: Path) -> None:
    run = trtq_run("build", MODEL, "--rest", "fp16", "-o", tmp_path / "fp16.plan")
    assert run.code == ExitCode.PASS
    record = json.loads((tmp_path / "fp16.plan.json").read_text())
    computing = [
        x for x in record["compiled"]["layers"] if x["kind"] in ("correlation", "gemm", "runtime_fusion")
    ]
    assert computing
    assert all(t["datatype"] == "Half" for layer in computing for t in layer["inputs"])


def test_build_in_fp16_is_the_default_where_data_tell_what_it_can_hold(
    trtq_run: Command, tmp_path: Path
) -> None:
    def datatypes(*options: object) -> set[str]:
        run = trtq_run("build", MODEL, *options, "-o", tmp_path / "m.plan")
        assert run.code == ExitCode.PASS, run.err
        layers = json.loads((tmp_path / "m.plan.json").read_text())["compiled"]["layers"]
        return {t["datatype"] for layer in layers for t in layer["constants"] if len(t["dims"]) == 4}

    assert datatypes("--data", CALIB) == {"Half"}
    assert datatypes() == {"Float"}
    assert datatypes("--data", CALIB, "--rest", "fp32") == {"Float"}


def test_build_does_not_convert_what_is_quantized(trtq_run: Command, demo: Deployed, tmp_path: Path) -> None:
    run = trtq_run("build", demo.folder / "model.int8.onnx", "--rest", "fp16", "-o", tmp_path / "x.plan")
    assert run.code == ExitCode.BAD_INPUT
    assert "quantized already" in run.err


@pytest.mark.parametrize("extra", [("--table", "calibration.cache"), ("--calibrator", "MinMaxCalibration")])
def test_implicit_quantization_needs_full_tensorrt(
    extra: tuple[str, str], trtq_run: Command, demo: Deployed, tmp_path: Path
) -> None:
    run = trtq_run("build", MODEL, extra[0], str(demo.folder / extra[1]) if "." in extra[1] else extra[1],
                  "-o", tmp_path / "x.plan")  # fmt: skip
    assert run.code == ExitCode.BAD_INPUT
    assert "tensorrt-rtx has no implicit quantization" in run.err
    assert list(tmp_path.glob("x.plan*")) == []


def test_options_that_a_builder_lacks_are_refused(trtq_run: Command, tmp_path: Path) -> None:
    run = trtq_run("build", MODEL, "--dla-core", "0", "-o", tmp_path / "x.plan")
    assert run.code == ExitCode.BAD_INPUT
    assert "dla_core" in run.err or "--dla-core" in run.err


def test_gate_compares_tensor_by_tensor(trtq_run: Command, demo: Deployed, tmp_path: Path) -> None:
    run = trtq_run(
        "gate", MODEL, demo.folder / "model.int8.onnx", "--eval", EVAL, "--metric", "top1",
        "--tensors", tmp_path / "tensors.json",
    )  # fmt: skip
    assert run.code == ExitCode.PASS
    compared = json.loads((tmp_path / "tensors.json").read_text())["tensors"]
    assert len(compared) > 17
    assert all(row["simulation_db"] > 10 for row in compared)
    assert any(row["changed"] for row in compared)
    assert not compared[-1]["changed"]
    assert "* A fix changed what it holds" in run.out


def test_two_engines_need_a_gpu(trtq_run: Command, demo: Deployed) -> None:
    plan = demo.folder / "model.plan"
    run = trtq_run("gate", plan, plan, "--eval", EVAL, "--metric", "top1")
    assert run.code == ExitCode.MISSING_BACKEND
    assert "GPU" in run.err


def test_tables_go_to_models_and_back_to_the_bit(trtq_run: Command, demo: Deployed, tmp_path: Path) -> None:
    table = demo.folder / "calibration.cache"
    own = trtq_run("quantize", MODEL, "--table", table, "-o", tmp_path / "own.onnx")
    assert own.code == ExitCode.PASS
    to_model = trtq_run("cache", "convert", table, "--model", MODEL, "-o", tmp_path / "q.onnx")
    back = trtq_run("cache", "convert", tmp_path / "q.onnx", "-o", tmp_path / "back.cache", "--for", "8.6.1")
    assert (to_model.code, back.code) == (ExitCode.PASS, ExitCode.PASS)
    assert (tmp_path / "q.onnx").read_bytes() == (tmp_path / "own.onnx").read_bytes()
    found = Table.load(tmp_path / "back.cache")
    assert found.header == "TRT-8601-EntropyCalibration2"
    rows, ranges = Table.load(table).scales, Plan.load(demo.folder / "plan.json").tensors
    # what Flatten gives has Q/DQ, too, with the range of what it moves
    assert dict(found.scales) == {**{name: rows[name] for name in ranges}, "flatten": rows["pool"]}


def test_a_table_has_every_float_tensor(trtq_run: Command, demo: Deployed, tmp_path: Path) -> None:
    """TensorRT that quantizes by itself wants scales of all that an INT8 layer reads and writes."""
    rows = Table.load(demo.folder / "calibration.cache").scales
    source = load_source(MODEL)
    tensors = [t for t in source.model.graph.tensors().values() if isinstance(t, gs.Variable)]
    assert {tensor.name for tensor in tensors if tensor.dtype == np.float32} == set(rows)
    assert not implied(source, Table(rows)).missing
    session = onnxruntime.InferenceSession(MODEL)
    logits = session.run(["logits"], {"image": np.load(CALIB)["image"]})[0]
    assert rows["logits"] == pytest.approx(np.abs(logits).max() / 127, rel=1e-5)
    calibrated = trtq_run("calibrate", MODEL, "--data", CALIB, "-o", tmp_path / "own.cache")
    assert calibrated.code == ExitCode.PASS
    assert set(Table.load(tmp_path / "own.cache").scales) == set(rows)


def test_migrate_gates_what_the_table_gives(trtq_run: Command, demo: Deployed, tmp_path: Path) -> None:
    run = trtq_run(
        "migrate", MODEL, "--table", demo.folder / "calibration.cache", "--eval", EVAL, "--metric", "top1",
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert run.code == ExitCode.PASS
    assert "against fp32: PASS" in run.out
    assert {"model.int8.onnx", "model.plan", "migration.json", "verdict.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_bench_without_a_gpu_says_that_it_is_static(trtq_run: Command, demo: Deployed) -> None:
    run = trtq_run("bench", demo.folder / "model.plan")
    assert run.code == ExitCode.PASS
    assert "Static comparison: read from what was compiled, nothing was run" in run.out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("deploy", "out/recipe.toml"), "MODEL is a recipe"),
        (("cache", "list", "something"), "takes no SOURCE"),
        (("bench", "model.plan", "--iterations", "0"), "--iterations is 0"),
        (("bench", "model.plan", "--int8", "m.onnx"), "--int8 belongs to --three"),
        (("build", MODEL, "--exclude", "op:Gemm", "-o", "x.plan"), "belong to implicit quantization"),
    ],
)
def test_what_a_command_would_ignore_is_refused(
    arguments: tuple[object, ...], problem: str, trtq_run: Command
) -> None:
    run = trtq_run(*arguments)
    assert run.code == ExitCode.BAD_INPUT
    assert problem in run.err


def test_the_cache_of_a_recipe_is_listed(trtq_run: Command, demo: Deployed, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(f'cache = "{demo.cache}"\n', encoding="utf-8")
    run = trtq_run("cache", "list", "--recipe", tmp_path / "r.toml")
    assert run.code == ExitCode.PASS
    assert "quantization-" in run.out
