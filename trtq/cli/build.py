"""`trtq build`: an engine from an ONNX model."""

from __future__ import annotations

import argparse

from trtq.calibration.table import ALGORITHMS
from trtq.cli.command import DECIDED, Command, argument, console_of, recipe_of
from trtq.cli.options import ENGINE
from trtq.console import show
from trtq.errors import ExitCode
from trtq.paths import BUILT, Output
from trtq.recipe import BUILD_OPTIONS


def _build(given: argparse.Namespace) -> int:
    from trtq.build import build

    built = build(recipe_of(given), given.table, given.calibrator, console_of(given))
    engine, kernels = built.build.engine, built.build.compiled.kernels
    show(f"{engine}: {engine.stat().st_size / 1e6:.1f} MB, {kernels} kernels")
    show("\n".join([built.coverage.text(), *built.notes]))
    if built.check is None:
        return ExitCode.PASS
    show(f"{built.check.outcome.value.upper()}  {built.check.message}")
    return built.check.outcome.exit_code


BUILD = Command(
    "build",
    _build,
    (
        *("model", "output", "data", "state", "rest", "op_reference", "include", "exclude"),
        *ENGINE,
        *BUILD_OPTIONS,
    ),
    (
        argument(
            "--table", path="read", metavar="TABLE", help="implicit INT8 with this table (TensorRT ≤ 10.16)"
        ),
        argument(
            "--calibrator",
            choices=ALGORITHMS,
            help="implicit INT8, measured by this calibrator of TensorRT's on --data (TensorRT ≤ 10.16)",
        ),
    ),
    required=("model", "output"),
    examples=(
        "trtq build model.int8.onnx -o model.plan --target 8.6 --target 8.9",
        "trtq build model.onnx -o model.plan --backend tensorrt --table calibration.cache",
    ),
    codes=DECIDED,
    output=Output.FILE,
    makes=BUILT,
)
