"""`trtq sensitivity`: what INT8 in each layer does to the outputs."""

from __future__ import annotations

import argparse

from trtq.cli.command import Command, argument, console_of, recipe_of
from trtq.console import show
from trtq.errors import ExitCode
from trtq.paths import Output


def _sensitivity(given: argparse.Namespace) -> int:
    from trtq.pipeline import sensitivity

    recipe = recipe_of(given)
    result = sensitivity(recipe, console_of(given), all_but_one=given.all_but_one, fast=given.fast)
    if recipe.output is not None:
        result.save(recipe.output)
    show(result.text())
    return ExitCode.PASS


SENSITIVITY = Command(
    "sensitivity",
    _sensitivity,
    (
        *("model", "output", "data", "state", "method", "eval", "metric", "ignore_nonfinite"),
        *("plan", "include", "exclude", "op_reference", "cache", "threads", "parallel"),
    ),
    (
        argument("--fast", action="store_true", help="rank on a few rows, at the cost of a few passes"),
        argument(
            "--all-but-one",
            action="store_true",
            help="leave one layer at a time in floating point, with all others in INT8",
        ),
    ),
    required=("model", "data"),
    examples=(
        "trtq sensitivity model.onnx --data calib.npz",
        "trtq sensitivity model.onnx --data calib.npz --eval eval.npz --metric top1 -o sensitivity.json",
    ),
    output=Output.TEXT,
)
