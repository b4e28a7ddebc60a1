"""`trtq calibrate`: a calibration table from data."""

from __future__ import annotations

import argparse

from trtq.cli.command import Command, console_of, recipe_of
from trtq.cli.options import CALIBRATION, PLACEMENT
from trtq.console import show
from trtq.errors import ExitCode
from trtq.paths import Output


def _calibrate(given: argparse.Namespace) -> int:
    from trtq.calibration.calibrate import calibrate, complete_table
    from trtq.job import Job

    recipe = recipe_of(given)
    output = recipe.require("model", "data", "output").output
    job = Job.open(recipe, console_of(given))
    table = complete_table(job, calibrate(job, job.place()))
    table.save(output)
    show(f"{output}: {len(table.scales)} tensors, method {table.metadata['method']}")
    return ExitCode.PASS


CALIBRATE = Command(
    "calibrate",
    _calibrate,
    ("model", "output", *CALIBRATION, "ignore_nonfinite", *PLACEMENT),
    required=("model", "data", "output"),
    examples=(
        "trtq calibrate model.onnx --data calib.npz -o calibration.cache",
        "trtq calibrate model.onnx --data images/ --recipe recipe.toml --method entropy -o calibration.cache",
    ),
    output=Output.TEXT,
    makes=(".json",),
)
