"""`trtq demo`: `trtq deploy` on the model and data that come with trtq."""

from __future__ import annotations

import argparse
from pathlib import Path

import trtq
from trtq.cli.command import DECIDED, Command, recipe_of, said_in_folder
from trtq.cli.deploy import WRITTEN, run_deploy
from trtq.cli.options import PLACEMENT, RECOVERY


def _demo(given: argparse.Namespace) -> int:
    folder = Path(trtq.__file__).parent / "demo"
    bundled = {
        "model": str(folder / "digits.onnx"),
        "data": str(folder / "calib.npz"),
        "eval": str(folder / "eval.npz"),
        "metric": "top1",
        "output": given.output or "trtq-demo",
    }
    return run_deploy(recipe_of(given).merged(bundled), given)


DEMO = Command(
    "demo",
    _demo,
    (
        *("output", "method", "budget", "max_drop", "confidence", "min_int8"),
        *RECOVERY,
        *PLACEMENT,
        *("target", "batch", "threads", "cache"),
    ),
    examples=("trtq demo", "trtq demo -o demo --method entropy --target 8.6"),
    codes=DECIDED,
    makes=WRITTEN,
    said=said_in_folder,
)
