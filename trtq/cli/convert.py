"""`trtq cache convert`: tables to Q/DQ models and back, other versions' headers, other tools' caches."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from trtq.calibration.table import ALGORITHMS, Table, version_number
from trtq.cli.command import argument, console_of, recipe_of
from trtq.cli.options import TABLE_FORMAT
from trtq.console import Console, show
from trtq.errors import ExitCode, InputError
from trtq.recipe import Recipe

OPTIONS = ("output", "data", "state", "include", "exclude", "weights", "rest")

ARGUMENTS = (
    argument(
        "source", path="read", nargs="?", metavar="SOURCE", help="convert: a table, or a Q/DQ model (.onnx)"
    ),
    argument(
        "--model",
        metavar="MODEL",
        help="convert a table: the fp32 model to put Q/DQ into; otherwise only entries of this model: its"
        " file, the name that its file had (with * and ?), or the first digits of its SHA-256",
    ),
    argument("--for", dest="tensorrt", metavar="VERSION", help="TensorRT that will read the table: 10.16"),
    argument("--algorithm", choices=ALGORITHMS, help="calibrator class that will read the table"),
    *TABLE_FORMAT,
)


def run(given: argparse.Namespace) -> int:
    """Convert by what is given: a model to a table, a table to a model, or a table to a table."""
    recipe, console = recipe_of(given), console_of(given)
    if given.source is None:
        raise InputError("nothing to convert", remedy="trtq cache convert SOURCE -o OUT")
    output = recipe.require("output").output
    version = None if given.tensorrt is None else version_number(given.tensorrt)
    if Path(given.source).suffix == ".onnx":
        if recipe.model is not None:
            raise InputError("--model belongs to a table, and SOURCE is a model", remedy="leave --model out")
        return _write(_from_model(given.source), output, version, given.algorithm)
    from trtq.calibration.foreign import read_table

    table = read_table(given.source, given.encoding)
    if "caution" in table.metadata:
        console.warn(table.metadata["caution"])
    if recipe.model is None:
        return _write(table, output, version, given.algorithm)
    if version is not None or given.algorithm is not None:
        raise InputError("--for and --algorithm belong to a table, and the result is a model")
    return _to_model(table, recipe, given, console)


def _from_model(path: str) -> Table:
    from trtq.graph.model import load_model
    from trtq.migration.to_table import table_of

    return table_of(load_model(path))


def _write(table: Table, output: str, version: int | None, algorithm: str | None) -> int:
    if Path(output).suffix == ".onnx":
        raise InputError("a table becomes a model only with --model", remedy="give the fp32 model")
    table = dataclasses.replace(
        table, version=version or table.version, algorithm=algorithm or table.algorithm
    )
    table.save(output)
    show(f"{output}: {len(table.scales)} rows, {table.header}")
    return ExitCode.PASS


def _to_model(table: Table, recipe: Recipe, given: argparse.Namespace, console: Console) -> int:
    from trtq.graph.model import save_model
    from trtq.job import open_cache, samples_of
    from trtq.migration.source import load_source
    from trtq.migration.to_qdq import converted

    required = recipe.require("model", "output")
    if recipe.rest == "auto":
        recipe = dataclasses.replace(recipe, rest="fp32")
    source = load_source(required.model, rest=recipe.precision, feeding=recipe.feeding)
    samples = None
    if recipe.data is not None:
        cache = open_cache(recipe, console)
        samples = samples_of(recipe, recipe.data, source.model, cache, console)
    strict = given.source if given.strict else None
    quantization, _ = converted(source, table, recipe, samples, console, strict=strict)
    if samples is None:
        console.say("table", "its magnitudes were not checked against data: give --data")
    save_model(quantization.rewritten(weights=recipe.weights, rest=recipe.precision), required.output)
    show(f"{required.output}: {quantization.plan.text()}")
    return ExitCode.PASS
