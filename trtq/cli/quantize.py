"""`trtq quantize`: an explicit INT8 model, with Q/DQ."""

from __future__ import annotations

import argparse

from trtq.cli.command import Command, argument, console_of, recipe_of
from trtq.cli.options import CALIBRATION, PLACEMENT
from trtq.console import show
from trtq.errors import ExitCode
from trtq.paths import Output


def _quantize(given: argparse.Namespace) -> int:
    from trtq.graph.model import save_model
    from trtq.pipeline import quantize

    recipe = recipe_of(given)
    output = recipe.require("model", "output").output
    quantization, graph = quantize(recipe, given.table, console_of(given))
    save_model(graph, output)
    show(f"{output}: {quantization.plan.text()}")
    return ExitCode.PASS


QUANTIZE = Command(
    "quantize",
    _quantize,
    ("model", "output", *CALIBRATION, "recover", "ignore_nonfinite", *PLACEMENT, "io"),
    (
        argument(
            "--table",
            path="read",
            metavar="TABLE",
            help="take the scales from this table; --data then tells only what float16 can hold",
        ),
    ),
    required=("model", ("data", "table"), "output"),
    examples=(
        "trtq quantize model.onnx --data calib.npz -o model.int8.onnx",
        "trtq quantize model.onnx --table calibration.cache -o model.int8.onnx --exclude '/head/*'",
    ),
    output=Output.FILE,
    makes=(".data",),
)
