"""A sample of the hostile inputs, and the streams and names that are no attack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile.inputs import all_cases, calibrate, gate, write_suitable
from hostile.trial import faults
from jobs import trtq_command

SAMPLE = 12
"""Of so many cases the default tests have one."""

CASES = list(all_cases())


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in CASES]
    assert len(names) > 1000
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", CASES[::SAMPLE], ids=lambda case: case.name[:60])
def test_a_hostile_input_is_refused_with_one_message(case, tmp_path: Path) -> None:
    assert faults(case, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1, SAMPLE))
def test_so_is_every_other(start: int, tmp_path: Path) -> None:
    found = {}
    for number, case in enumerate(CASES[start::SAMPLE]):
        folder = tmp_path / str(number)
        folder.mkdir()
        if wrong := faults(case, folder):
            found[case.name] = wrong
    assert found == {}


def test_what_is_not_hostile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases fail for what is hostile in them, and for nothing else."""
    write_suitable(tmp_path)
    monkeypatch.chdir(tmp_path)
    for arguments in (calibrate(), calibrate(), gate("--json", "v.json", "--junit", "v.xml")):
        run = trtq_command(*arguments)
        assert run.code == 0, run.err
    assert json.loads((tmp_path / "v.json").read_text())["outcome"] == "pass"


def test_results_may_go_to_standard_output_alone(tmp_path: Path) -> None:
    write_suitable(tmp_path)
    trtq = [sys.executable, "-m", "trtq"]
    with (tmp_path / "out").open("wb") as out:  # which /dev/stdout leads to
        subprocess.run([*trtq, *gate("--json", "/dev/stdout")], cwd=tmp_path, stdout=out, check=True)
    assert json.loads((tmp_path / "out").read_text())["outcome"] == "pass"
    done = subprocess.run(
        [*trtq, *calibrate("-o", "/dev/stdout")], cwd=tmp_path, capture_output=True, check=True
    )
    assert done.stdout.startswith(b"TRT-")
    assert done.stdout.count(b"\n") == len(done.stdout.splitlines())
    assert Path("/dev/stdout").is_symlink()


def test_a_recipe_among_the_results_may_be_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_suitable(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    os.rename("t.cache", "results/plan.json")
    (tmp_path / "results" / "recipe.toml").write_text("method = 'max'\n")
    judged = (
        "deploy",
        "m.onnx",
        "--data",
        "d.npz",
        "--eval",
        "none.npz",
        "--metric",
        "cosine",
        "-o",
        "results",
    )
    run = trtq_command(*judged, "--recipe", "results/recipe.toml")
    assert "would replace" not in run.err
    run = trtq_command(*judged, "--plan", "results/plan.json")
    assert "--output would replace an input, --plan" in run.err
