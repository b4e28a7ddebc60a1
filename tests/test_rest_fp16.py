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
from trtq.gate.evaluation import Evaluation
from trtq.job import Job
from trtq.recipe import Recipe

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
