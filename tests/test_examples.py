"""The CI templates: what the action runs is run, and what both name exists."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import Case

EXAMPLES = Path(__file__).parents[1] / "examples" / "ci"


def loaded(path: Path) -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load(path.read_text())


@pytest.fixture
def job(small: Case, tmp_path: Path) -> Path:
    """A committed model with its recipe, and `trtq` on the path."""
    (tmp_path / "model.onnx").write_bytes(small.model.read_bytes())
    (tmp_path / "data.npz").write_bytes(small.data.read_bytes())
    (tmp_path / "recipe.toml").write_text(
        'model = "model.onnx"\ndata = "data.npz"\neval = "data.npz"\nmetric = "top1"\nmethod = "max"\n'
        'backend = "none"\noutput = "out"\nrecover = "none"\n'
    )
    program = tmp_path / "bin" / "trtq"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m trtq "$@"\n')
    program.chmod(0o755)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "outcome"),
    [("--max-drop 50%", 0, "pass"), ("--min-sqnr 150", 1, "fail"), ("--data none.npz", 2, "error")],
)
def test_the_action_ends_as_the_gate_does(arguments: str, code: int, outcome: str, job: Path) -> None:
    action = loaded(EXAMPLES / "github" / "action.yml")
    (step,) = (step for step in action["runs"]["steps"] if step.get("id") == "deploy")
    inputs = {"recipe": "recipe.toml", "output": "results", "arguments": arguments}
    assert inputs.keys() <= action["inputs"].keys()
    environment = {
        **os.environ,
        **{name.upper(): inputs[name] for name in inputs},
        "PATH": f"{job / 'bin'}:{os.environ['PATH']}",
        "RUNNER_TEMP": str(job),
        "GITHUB_OUTPUT": str(job / "output"),
        "GITHUB_STEP_SUMMARY": str(job / "summary"),
    }
    run = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=job, env=environment, capture_output=True)
    assert run.returncode == code, run.stderr
    assert (job / "output").read_text() == f"outcome={outcome}\n"
    assert (job / "results" / "junit.xml").exists()
    if code < 2:
        assert json.loads((job / "results" / "verdict.json").read_text())["outcome"] == outcome
        assert outcome.upper() in (job / "summary").read_text()


def test_the_templates_name_what_there_is() -> None:
    action = loaded(EXAMPLES / "github" / "action.yml")
    workflow = loaded(EXAMPLES / "github" / "workflows" / "int8.yml")
    (step,) = (s for s in workflow["jobs"]["gate"]["steps"] if s["uses"].endswith("/trtq"))
    assert step["with"].keys() <= action["inputs"].keys()
    template = loaded(EXAMPLES / "gitlab" / "trtq.gitlab-ci.yml")[".trtq"]
    asked = template["artifacts"]["reports"]["junit"]
    assert asked == "$TRTQ_OUTPUT/junit.xml"
    assert {"TRTQ_PACKAGE", "TRTQ_RECIPE", "TRTQ_OUTPUT", "TRTQ_ARGUMENTS"} <= template["variables"].keys()
