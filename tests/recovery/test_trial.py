"""A builder that makes no engine: asked before the search, and all but the engine is there afterwards."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import Case, Run, conv_case, deploy_arguments, refused_case, trtq_command

from trtq.cli.main import main
from trtq.errors import ExitCode

LEFT = {
    *("calibration.cache", "calibration.cache.json", "junit.xml", "manifest.json", "model.int8.onnx"),
    *("plan.json", "recipe.toml", "report.html", "verdict.json", "workflow.json"),
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
