"""`--rest fp16`, end to end: the gate's figure is that of a model which really computes in float16."""

from __future__ import annotations

import html
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx.parser
import onnx.reference
import pytest
from jobs import Run
from numpy.typing import NDArray

from trtq.calibration.calibrate import calibrate
from trtq.console import SILENT
from trtq.errors import InputError
from trtq.gate.evaluation import Evaluation
from trtq.job import Job
from trtq.recipe import Recipe
from trtq.simulation.narrow import holds_narrow

NORM = """norm (float[N,16,64] x) => (float[N,16,32] y) {
    h = MatMul(x, embed)
    m = ReduceMean<axes = [-1], keepdims = 1>(h)
    d = Sub(h, m)
    p = Pow(d, two)
    v = ReduceMean<axes = [-1], keepdims = 1>(p)
    ve = Add(v, eps)
    s = Sqrt(ve)
    n = Div(d, s)
    u = MatMul(n, w1)
    r = Relu(u)
    y = MatMul(r, w2)
}"""
"""A decomposed LayerNorm over a stream with two large dimensions, whose squares float16 cannot hold."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder, random = tmp_path_factory.mktemp("norm"), np.random.default_rng(0)
    gain = np.ones(64)
    gain[[3, 40]] = 400
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 13]> {NORM}')
    for name, values in {
        "embed": random.normal(0, 0.2, (64, 64)) * gain,
        "two": 2.0,
        "eps": 1e-5,
        "w1": random.normal(0, 0.15, (64, 128)),
        "w2": random.normal(0, 0.1, (128, 32)),
    }.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values, np.float32), name))
    for node in model.graph.node:
        node.name = node.output[0]
    onnx.save(model, folder / "model.onnx")
    for part, rows, seed in (("calib", 24, 1), ("eval", 16, 2)):
        x = np.random.default_rng(seed).normal(size=(rows, 16, 64)).astype(np.float32)
        np.savez(folder / f"{part}.npz", x=x)
    return Recipe(
        model=str(folder / "model.onnx"),
        data=str(folder / "calib.npz"),
        eval=str(folder / "eval.npz"),
        metric="cosine",
        method="max",
        rest="fp16",
        cache=str(folder / "cache"),
    )


def in_float16(model: Path, x: NDArray) -> NDArray:
    """The model's output by ONNX's reference implementation, which rounds float16 tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: NDArray = onnx.reference.ReferenceEvaluator(str(model)).run(None, {"x": x})[0]
    return found


def sqnr_db(expected: NDArray, found: NDArray) -> float:
    e, f = expected.astype(np.float64), found.astype(np.float64)
    return float(10 * np.log10((e**2).sum() / ((e - f) ** 2).sum()))


def test_what_leaves_float16_stays_float32_and_the_gate_says_what_is_true(
    recipe: Recipe, tmp_path: Path, trtq_run: Callable[..., Run]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    out = tmp_path / "out"
    run = trtq_run(
        *("deploy", recipe.model, "--data", recipe.data, "--eval", recipe.eval, "--metric", "cosine"),
        *("--method", "max", "--rest", "fp16", "--recover", "none", "--cache", tmp_path / "cache", "-o", out),
    )
    assert run.code == 0, run.err
    plan = json.loads((out / "plan.json").read_text())
    assert {(node["name"], node["rule"]) for node in plan["float32"]} >= {("p", "range"), ("v", "range")}
    assert "p (Pow): its output 'p' reaches" in run.err
    assert "its output 'p' reaches" in html.unescape((out / "report.html").read_text())
    x = np.load(str(recipe.eval))["x"]
    truth = sqnr_db(in_float16(Path(str(recipe.model)), x), in_float16(out / "model.int8.onnx", x))
    said = json.loads((out / "verdict.json").read_text())["outputs"]["y"]["sqnr_db"]
    assert truth > 25
    assert said == pytest.approx(truth, abs=0.5)


def test_the_gate_fails_what_overflows(recipe: Recipe) -> None:
    """The same quantization with nothing kept in float32: finite in float32, and false in float16."""
    job = Job.open(recipe, SILENT)
    evaluation = Evaluation.open(recipe, job.model.path, job.model.inputs, job.cache, SILENT)
    kept = calibrate(job, job.place())
    everything = replace(kept, plan=replace(kept.plan, float32=[]))
    assert evaluation.simulated(kept).passed
    assert not evaluation.simulated(everything).passed


def test_a_second_run_measures_nothing_anew(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.open(recipe, SILENT)
    first = calibrate(job, job.place())
    monkeypatch.setattr("trtq.calibration.calibrate.measure_extents", None)
    assert calibrate(job, job.place()).plan == first.plan


@pytest.fixture(scope="module")
def grows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model beside its data: an input that is squared reaches much further in evaluation than before."""
    folder, random = tmp_path_factory.mktemp("grows"), np.random.default_rng(0)
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N,32] x, float[N,16] z) => (float[N,16] y) {'
        " a = MatMul(x, w) s = Mul(z, z) y = Add(a, s) }"
    )
    weight = random.normal(0, 0.2, (32, 16)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    for node in model.graph.node:
        node.name = node.output[0]
    onnx.save(model, folder / "model.onnx")
    for part, rows, reach in (("calib", 24, 1), ("eval", 16, 300)):
        x = random.normal(size=(rows, 32)).astype(np.float32)
        np.savez(folder / f"{part}.npz", x=x, z=np.full((rows, 16), reach, np.float32))
    return folder


def deploy_grown(trtq_run: Callable[..., Run], grows: Path, output: Path, *more: str) -> Run:
    return trtq_run(
        *("deploy", grows / "model.onnx", "--data", grows / "calib.npz", "--eval", grows / "eval.npz"),
        *("--metric", "cosine", "--method", "max", "--recover", "none", "--cache", output / "cache"),
        *(*more, "-o", output / "out"),
    )


def test_what_fails_in_float16_alone_goes_back_to_float32(
    grows: Path, tmp_path: Path, trtq_run: Callable[..., Run]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    run = deploy_grown(trtq_run, grows, tmp_path)
    assert run.code == 0, run.err
    assert "in float16 the gate fails and in float32 it passes" in run.err
    steps = json.loads((tmp_path / "out" / "workflow.json").read_text())
    assert [(step["step"], step["outcome"], step["kept"]) for step in steps] == [
        ("calibrate", "fail", False),
        ("calibrate, rest fp32", "pass", True),
    ]
    written = onnx.load(tmp_path / "out" / "model.int8.onnx")
    assert not holds_narrow(written)
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["float32"] == []


def test_what_a_check_of_int8_fails_for_is_not_put_down_to_float16(
    tmp_path: Path, trtq_run: Callable[..., Run]
) -> None:
    """Half of the products are excluded, and all are required: float16 has no part in that."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N,32] x) => (float[N,32] y) {'
        " [first] a = MatMul(x, w) b = Relu(a) [second] y = MatMul(b, w) }"
    )
    random = np.random.default_rng(0)
    weight = random.normal(0, 0.2, (32, 32)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, tmp_path / "model.onnx")
    for part, rows in (("calib", 24), ("eval", 32)):
        np.savez(tmp_path / f"{part}.npz", x=random.normal(size=(rows, 32)).astype(np.float32))
    run = deploy_grown(trtq_run, tmp_path, tmp_path, "--exclude", "first", "--min-int8", "100%")
    assert run.code == 1, run.err
    assert "float16" not in run.err
    assert holds_narrow(onnx.load(tmp_path / "out" / "model.int8.onnx"))


def test_float16_that_was_asked_for_stays(grows: Path, tmp_path: Path, trtq_run: Callable[..., Run]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    run = deploy_grown(trtq_run, grows, tmp_path, "--rest", "fp16")
    assert run.code == 1, run.err
    assert holds_narrow(onnx.load(tmp_path / "out" / "model.int8.onnx"))


def test_float16_that_fails_without_int8_gives_way(
    recipe: Recipe, tmp_path: Path, trtq_run: Callable[..., Run]
) -> None:
    """A target that float16 cannot reach: the search for what to leave out has to go on in float32."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    run = trtq_run(
        *("deploy", recipe.model, "--data", recipe.data, "--eval", recipe.eval, "--metric", "cosine"),
        *("--method", "max", "--min-sqnr", "100", "--recover", "none", "--cache", tmp_path / "cache"),
        *("-o", tmp_path / "out"),
    )
    assert run.code == 1, run.err
    assert "float16 fails the gate without any INT8" in run.err
    steps = json.loads((tmp_path / "out" / "workflow.json").read_text())
    assert [step["step"] for step in steps] == ["calibrate", "calibrate, rest fp32"]


def test_a_model_that_cannot_be_upgraded_stays_float32(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half needs a newer opset; ONNX's converter does not know this one."""
    monkeypatch.setattr("trtq.job.FP16_SCALE_OPSET", 99)
    job = Job.open(replace(recipe, rest="auto"), SILENT)
    assert (job.recipe.rest, job.model.graph.opset) == ("fp32", 13)
    with pytest.raises(InputError, match="cannot be upgraded to 99"):
        Job.open(replace(recipe, rest="fp16"), SILENT)
