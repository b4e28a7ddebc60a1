"""`trtq cache convert`: tables to Q/DQ models and back, other versions' headers, other tools' caches."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from trtq.calibration.table import ALGORITHMS, ENCODINGS, Table, version_number
from trtq.cli.command import argument, console_of, recipe_of
from trtq.console import Console
from trtq.errors import ExitCode, InputError
from trtq.recipe import Recipe

OPTIONS = ("output", "data", "include", "exclude", "weights", "rest")

READING = (
    argument(
        "--encoding",
        choices=tuple(ENCODINGS),
        default="scale",
        help="what the table's rows hold, where it is not TensorRT's big-endian scale",
    ),
    argument("--strict", action="store_true", help="a table that lacks a scale or is doubtful is an error"),
)
"""Arguments of every command that reads a table from elsewhere."""

ARGUMENTS = (
    argument("source", nargs="?", metavar="SOURCE", help="convert: a table, or a Q/DQ model (.onnx)"),
    argument("--model", metavar="MODEL", help="convert a table: the fp32 model to put Q/DQ into"),
    argument("--for", dest="tensorrt", metavar="VERSION", help="TensorRT that will read the table: 10.16"),
    argument("--algorithm", choices=ALGORITHMS, help="calibrator class that will read the table"),
    *READING,
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
    from trtq.migration.convert import table_of

    return table_of(load_model(path))


def _write(table: Table, output: str, version: int | None, algorithm: str | None) -> int:
    if Path(output).suffix == ".onnx":
        raise InputError("a table becomes a model only with --model", remedy="give the fp32 model")
    table = dataclasses.replace(
        table, version=version or table.version, algorithm=algorithm or table.algorithm
    )
    table.save(output)
    print(f"{output}: {len(table.scales)} rows, {table.header}")
    return ExitCode.PASS


def _to_model(table: Table, recipe: Recipe, given: argparse.Namespace, console: Console) -> int:
    from trtq import pipeline
    from trtq.calibration.extents import measure_extents
    from trtq.data.load import load_samples
    from trtq.graph.model import save_model
    from trtq.migration import convert

    required = recipe.require("model", "output")
    source = convert.load_source(required.model, rest=recipe.rest)
    observed = extents = None
    if recipe.data is not None:
        samples = load_samples(recipe.data, source.model.inputs, recipe.preprocess)
        observed = convert.observe(source, table, samples)
        if recipe.rest == "fp16":
            extents = measure_extents(source.model.graph, samples)
    explicit = convert.quantize_with_table(
        source,
        table,
        include=recipe.include,
        exclude=recipe.exclude,
        weights=recipe.weights,
        rest=recipe.rest,
        observed=observed,
        extents=extents,
    )
    console.say("table", explicit.fit.text())
    if observed is None:
        console.say("table", "its magnitudes were not checked against data: give --data")
    if given.strict:
        convert.require_complete(explicit.fit, given.source)
    save_model(explicit.graph, required.output)
    print(f"{required.output}: {pipeline.plan_text(explicit.plan)}")
    return ExitCode.PASS
