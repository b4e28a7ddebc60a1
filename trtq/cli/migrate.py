"""`trtq migrate`: from TensorRT 10 with a calibration table to an explicit model and an engine."""

from __future__ import annotations

import argparse

from trtq.cli.command import DECIDED, Command, argument, console_of, recipe_of, said_in_folder
from trtq.cli.options import TABLE_FORMAT
from trtq.console import show
from trtq.paths import MIGRATED
from trtq.recipe import BUILD_OPTIONS


def _migrate(given: argparse.Namespace) -> int:
    from trtq.migration.migrate import migrate

    recipe = recipe_of(given)
    recipe.require("model", "output", table=given.table)
    result = migrate(
        recipe,
        given.table,
        encoding=given.encoding,
        strict=given.strict,
        command=given.command_line,
        console=console_of(given),
    )
    show(result.text())
    show(f"{result.folder}/model.int8.onnx and {result.folder}/model.plan")
    show(result.headline())
    return result.exit_code


MIGRATE = Command(
    "migrate",
    _migrate,
    (
        "model", "output", "data", "state", "eval", "metric", "max_drop", "confidence", "require_engine",
        "min_reference", "ignore_nonfinite", "include", "exclude", "weights", "rest", "backend", "target",
        "profile", "batch", "min_int8", "op_reference", "threads", "cache",
        *BUILD_OPTIONS,
    ),
    (
        argument("--table", path="read", metavar="TABLE", help="calibration table of that model"),
        *TABLE_FORMAT,
    ),
    required=("model", "table", "output"),
    examples=(
        "trtq migrate model.onnx --table calibration.cache -o out",
        "trtq migrate model.onnx --table calibration.cache -o out --eval eval.npz --metric top1",
    ),
    codes=DECIDED,
    makes=MIGRATED,
    said=said_in_folder,
)  # fmt: skip
