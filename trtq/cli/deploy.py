"""`trtq deploy`: the whole workflow."""

from __future__ import annotations

import argparse
import time

from trtq.cli.command import DECIDED, Command, console_of, recipe_of, said_in_folder
from trtq.cli.options import CALIBRATION, COST, ENGINE, GATE, PLACEMENT, RECOVERY
from trtq.console import show
from trtq.paths import DEPLOYED, RECIPE
from trtq.recipe import BUILD_OPTIONS, Recipe


def run_deploy(recipe: Recipe, given: argparse.Namespace) -> int:
    """Deploy a recipe and print what came of it."""
    from trtq.pipeline import deploy
    from trtq.report.next_steps import next_steps

    started = time.perf_counter()
    result = deploy(recipe, given.command_line, console_of(given))
    if len(result.steps) > 1:
        show("\n".join(result.step_lines()))
    if lines := result.front_lines():
        show("\n".join(lines))
    if result.verdict.in_the_way is not None:
        show("\n".join(result.verdict.in_the_way.lines()))
    seconds = time.perf_counter() - started
    made = "model.int8.onnx" if result.build is None else "model.plan"
    show(f"{result.folder}/report.html and {result.folder}/{made}, {seconds:.1f} s")
    engine = None if result.build is None else result.build.engine
    if steps := next_steps(result.verdict, result.folder / "model.int8.onnx", engine):
        show("\n".join(steps))
    show(result.verdict.headline())
    return result.exit_code


def _deploy(given: argparse.Namespace) -> int:
    return run_deploy(recipe_of(given), given)


WRITTEN = tuple(name for name in DEPLOYED if name != RECIPE)
"""What no input of the job may be."""

DEPLOY = Command(
    "deploy",
    _deploy,
    ("model", "output", *CALIBRATION, *GATE, *RECOVERY, *PLACEMENT, *COST, "io", *ENGINE, *BUILD_OPTIONS),
    required=("model", "data", "eval", "metric", "output"),
    examples=(
        "trtq deploy model.onnx --data calib.npz --eval eval.npz --metric top1 -o out",
        "trtq deploy model.onnx --data calib/ --eval eval.csv --metric m.py:score -o out --max-drop 0.5%",
        "trtq deploy --recipe out/recipe.toml",
    ),
    codes=DECIDED,
    makes=WRITTEN,
    said=said_in_folder,
)
