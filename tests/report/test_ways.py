"""What the report says to try."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest
from jobs import Deployed

from trtq.gate.in_the_way import InTheWay, Obstacle
from trtq.gate.verdict import Outcome, Verdict
from trtq.recipe import Recipe
from trtq.report.ways import ways

FOUND = InTheWay(
    "1 layer", (Obstacle(("a b",), "Conv", 3.0, 1.0, None),), "--exclude 'a b'", "would pass, simulated"
)


@pytest.fixture
def failed(demo: Deployed) -> Verdict:
    verdict = Verdict.from_json(json.loads((demo.folder / "verdict.json").read_text()))
    return replace(verdict, gate=Outcome.FAIL, in_the_way=FOUND)


def commands(verdict: Verdict, recipe: Recipe, command: str) -> list[list[str]]:
    return [shlex.split(way.command) for way in ways(verdict, recipe, command) if way.command]


def test_what_was_tried_and_passed_comes_first(failed: Verdict) -> None:
    found = commands(failed, Recipe(model="m.onnx", data="my data.npz"), "trtq deploy m.onnx -o out")
    assert found == [
        ["trtq", "deploy", "m.onnx", "-o", "out", "--exclude", "a b"],
        ["trtq", "sensitivity", "m.onnx", "--data", "my data.npz"],
    ]


def test_called_from_python_the_recipe_stands_for_the_command(failed: Verdict) -> None:
    (first, *_) = commands(failed, Recipe(), "")
    assert first == ["trtq", "deploy", "--recipe", "recipe.toml", "-o", "again", "--exclude", "a b"]


def test_steps_that_were_left_out(failed: Verdict) -> None:
    verdict = replace(failed, in_the_way=None)
    (way, *_) = ways(verdict, Recipe(recover=("fix",)), "trtq deploy m.onnx --recover fix")
    assert "partial, learn" in way.why
    assert way.command == "trtq deploy m.onnx --recover fix --recover fix,partial,learn"


def test_an_open_gate_asks_for_samples(failed: Verdict) -> None:
    verdict = replace(failed, gate=Outcome.INCONCLUSIVE, in_the_way=None, samples_to_prove=4321)
    assert ["4321" in way.why for way in ways(verdict, Recipe(), "")] == [True]
