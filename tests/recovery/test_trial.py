"""A builder that makes no engine: asked before the search, and all but the engine is there afterwards."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from jobs import Case, Run, conv_case, deploy_arguments, refused_case, save_case, trtq_command

from trtq.cli.main import main
from trtq.console import SILENT
from trtq.errors import BuildError, ExitCode
from trtq.graph.place import leave_out
from trtq.graph.plan import Float32Node, Plan
from trtq.graph.quantization import Quantization
from trtq.job import Job
from trtq.recipe import Recipe
from trtq.recovery.trial import refusal

LEFT = {
    *("calibration.cache", "calibration.cache.json", "junit.xml", "manifest.json", "model.int8.onnx"),
    *("plan.json", "recipe.toml", "report.html", "report.json", "verdict.json", "workflow.json"),
}


@pytest.fixture(autouse=True)
def _builder() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def deployed(case: Case, folder: Path, *more: object) -> Run:
    cache = ("--cache", folder.parent / "cache")
    return trtq_command(*deploy_arguments(case, folder, "--max-drop", "50%", *cache, *more))


@pytest.mark.parametrize("method", ["auto", "max"])
def test_what_the_builder_refuses_is_calibrated_and_gated(method: str, tmp_path: Path) -> None:
    case, folder = refused_case(tmp_path), tmp_path / "out"
    folder.mkdir()
    (folder / "model.plan").write_bytes(b"an engine of an earlier job")
    run = deployed(case, folder, "--method", method)
    assert run.code == ExitCode.FAIL
    last = run.out.strip().splitlines()[-1]
    assert last.startswith("FAIL  TensorRT for RTX cannot parse the model: node 'determinant' (Det)")
    assert "the gate itself passes" in last
    assert {path.name for path in folder.iterdir()} == LEFT
    verdict = json.loads((folder / "verdict.json").read_text())
    assert (verdict["gate"], verdict["outcome"], verdict["executor"]) == ("pass", "fail", "simulation")
    assert "no engine" in (folder / "report.html").read_text()
    assert main(["report", str(folder)]) == ExitCode.PASS
    if method == "auto":
        lines = run.err.splitlines()
        asked = next(i for i, line in enumerate(lines) if "goes on without an engine" in line)
        assert asked < next(i for i, line in enumerate(lines) if line.strip().startswith("statistics"))
        assert "in floating point either" in lines[asked]


def normalizing_case(folder: Path) -> Case:
    """Two convolutions around a MeanVarianceNormalization, which TensorRT's parser takes in float32 only."""
    random = np.random.default_rng(0)
    x, h, a, y = (gs.Variable(name, np.float32) for name in "xhay")
    x.shape, y.shape = [8, 3, 8, 8], [8, 4, 1, 1]
    first = gs.Constant("v", random.normal(size=(4, 3, 3, 3)).astype(np.float32))
    second = gs.Constant("w", random.normal(size=(4, 4, 6, 6)).astype(np.float32))
    nodes = [
        gs.Node("Conv", "first", {}, [x, first], [h]),
        gs.Node("MeanVarianceNormalization", "normalize", {}, [h], [a]),
        gs.Node("Conv", "second", {}, [a, second], [y]),
    ]
    rows = random.normal(size=(48, 3, 8, 8)).astype(np.float32)
    return save_case(gs.Graph(nodes, [x], [y], opset=17), folder, {"x": rows})


@pytest.mark.parametrize("method", ["auto", "max"])
def test_float16_that_the_builder_refuses_gives_way(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were there no rule that keeps the normalization in float32."""
    monkeypatch.setattr("trtq.graph.half_rules._SQUARE_INSIDE", frozenset())
    case = normalizing_case(tmp_path)
    run = deployed(case, tmp_path / "out", "--method", method)
    assert run.code == ExitCode.PASS, run.err
    assert (tmp_path / "out" / "model.plan").is_file()
    assert "the builder refuses the model in float16 and not in float32" in run.err
    run = deployed(case, tmp_path / "half", "--method", method, "--rest", "fp16")
    assert run.code == ExitCode.FAIL
    assert "Half and Float" in run.out


def test_what_was_refused_on_trial_is_asked_for_again_where_it_has_changed(tmp_path: Path) -> None:
    """On trial nothing is known of ranges; then the rules keep the normalization in float32."""
    run = deployed(normalizing_case(tmp_path), tmp_path / "out")
    assert run.code == ExitCode.PASS, run.err
    assert "goes on without an engine, unless that changes" in run.err
    assert "warning     TensorRT" not in run.err
    assert (tmp_path / "out" / "model.plan").is_file()
    assert {n.name: n.rule for n in Plan.load(tmp_path / "out" / "plan.json").float32}.keys() == {"normalize"}


def test_only_the_model_that_was_refused_is_not_asked_for_again(tmp_path: Path) -> None:
    """With the normalization in float16 the builder refuses this model whatever is quantized."""
    case = normalizing_case(tmp_path)
    recipe = Recipe(
        model=str(case.model),
        data=str(case.data),
        rest="fp16",
        cache=str(tmp_path / "cache"),
        target=("8.6",),
    )
    job = Job.open(recipe, SILENT)
    plan = job.place()
    found = refusal(job, plan)
    assert found is not None

    def asked(other: Plan) -> BuildError | None:
        ones = dict.fromkeys(plan.tensors, np.float32(1))
        return found.of(job, Quantization(job.model.graph, other, ones))

    assert asked(plan) is found.error
    less = asked(leave_out(job.model.graph, plan, {"second": "left out here"}))
    assert less is not None
    assert less is not found.error
    node = Float32Node("normalize", "MeanVarianceNormalization", "rule", "reason")
    assert asked(replace(plan, float32=[node])) is None


def test_no_message_names_a_folder_that_is_gone(tmp_path: Path) -> None:
    run = deployed(refused_case(tmp_path), tmp_path / "out")
    texts = [run.out, run.err, *(p.read_text() for p in (tmp_path / "out").iterdir() if p.suffix != ".onnx")]
    for text in texts:
        assert not re.search(r"attempt\d|\.part|/trtq-", text)


def test_what_builds_is_not_warned_of(tmp_path: Path) -> None:
    run = deployed(conv_case(tmp_path, "N"), tmp_path / "out")
    assert run.code == ExitCode.PASS
    assert "engine of" not in run.err
    assert (tmp_path / "out" / "model.plan").is_file()


def test_a_bad_profile_is_found_before_anything_runs(tmp_path: Path) -> None:
    run = deployed(refused_case(tmp_path), tmp_path / "out", "--profile", "nothing:1x32,8x32,32x32")
    assert run.code == ExitCode.BAD_INPUT
    assert "statistics" not in run.err


@pytest.mark.slow
def test_a_crash_of_the_builder_leaves_the_results(tmp_path: Path) -> None:
    """The builder's library aborts in the process that tries it: the job's own never loads it."""
    case, folder = conv_case(tmp_path, "N"), tmp_path / "out"
    (tmp_path / "crashing").mkdir()
    (tmp_path / "crashing" / "sitecustomize.py").write_text(
        "import sys\nif 'trtq.backends.apart' in ' '.join(sys.orig_argv):\n    import os; os.abort()\n"
    )
    arguments = [str(a) for a in deploy_arguments(case, folder, "--cache", tmp_path / "cache")]
    path = [str(tmp_path / "crashing"), *sys.path]
    done = subprocess.run(
        [sys.executable, "-m", "trtq", *arguments],
        env={"PATH": "", "PYTHONPATH": ":".join(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == ExitCode.FAIL, done.stderr
    assert "SIGABRT" in done.stdout.splitlines()[-1]
    assert {p.name for p in folder.iterdir()} == LEFT


@pytest.mark.parametrize(("limit", "asked"), [("MOST_NODES", False), ("MOST_BYTES", False), (None, True)])
def test_large_models_are_not_built_on_trial(
    limit: str | None, asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, calls = conv_case(tmp_path, "N"), []
    job = Job.open(Recipe(model=str(case.model), data=str(case.data), cache=str(tmp_path)), SILENT)
    monkeypatch.setattr("trtq.recovery.trial.objection", lambda *given: calls.append(given))
    if limit is not None:
        monkeypatch.setattr(f"trtq.recovery.trial.{limit}", 0)
    assert refusal(job, job.place()) is None
    assert bool(calls) == asked
