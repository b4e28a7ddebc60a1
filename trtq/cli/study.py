"""`trtq study`: the paper's tables for the user's model."""

from __future__ import annotations

import argparse
from pathlib import Path

from trtq.cli.command import Command, console_of, recipe_of
from trtq.cli.options import COST
from trtq.console import show
from trtq.errors import ExitCode


def _study(given: argparse.Namespace) -> int:
    from trtq.study import study, write_study

    recipe, console = recipe_of(given), console_of(given)
    result = study(recipe, console)
    show(result.text())
    if recipe.output is not None:
        show(f"{Path(recipe.output)}: {', '.join(write_study(result, recipe.output, console))}")
    return ExitCode.PASS


STUDY = Command(
    "study",
    _study,
    (
        *("model", "output", "data", "state", "eval", "metric", "method", "plan", "include", "exclude"),
        *("min_reference", "ignore_nonfinite", "budget", "labels", "batch", "op_reference"),
        *("cache", "threads", "parallel"),
        *COST,
    ),
    required=("model", "data", "eval", "metric"),
    examples=("trtq study model.onnx --data calib.npz --eval eval.npz --metric top1 -o study",),
    makes=("study.json", "study.txt", "study.svg"),
)
