"""`trtq bench`: time engines on the GPU, or compare what was compiled where there is none."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from trtq.cli.command import Command, argument, console_of, recipe_of
from trtq.console import show
from trtq.errors import ExitCode, InputError
from trtq.files import write_json
from trtq.paths import THREE
from trtq.recipe import BUILD_OPTIONS, Recipe


def _bench(given: argparse.Namespace) -> int:
    from trtq.backends import bench
    from trtq.backends.interface import find_gpu
    from trtq.backends.timing import Measuring

    recipe = recipe_of(given)
    how = Measuring(given.warm_up, given.duration, given.iterations)
    for name, value in (("--duration", how.duration_s), ("--warm-up", how.warm_up_ms)):
        if not 0 <= value < math.inf:
            raise InputError(f"{name} is {value}", remedy="use a number from 0")
    if how.iterations < 1:
        raise InputError(f"--iterations is {how.iterations}", remedy="use a number from 1")
    ignored = [name for name in ("data", "int8", "table", "output") if getattr(given, name) is not None]
    if ignored and not given.three:
        raise InputError(f"--{ignored[0]} belongs to --three", remedy="add --three, or leave it out")
    gpu = find_gpu()
    engines = _build_three(recipe, given) if given.three else [Path(e) for e in given.engines]
    if gpu is not None:
        console_of(given).say(
            "caution", "a plan file is code and runs now: load only plans you built or trust"
        )
    results = bench.benchmark(engines, on_gpu=gpu is not None, how=how, plugins=recipe.plugin_lib)
    show(bench.text_of(results))
    if gpu is not None and any(result.timing for result in results):
        show(f"Measured on {gpu.name}, compute capability {gpu.compute_capability}.")
    if given.json:
        write_json(given.json, {"gpu": gpu.name if gpu else None, "engines": [r.to_json() for r in results]})
    return ExitCode.PASS


def _build_three(recipe: Recipe, given: argparse.Namespace) -> list[Path]:
    """FP32, FP16 and INT8 engines of one model, in the output folder."""
    from trtq.build import build_three

    if len(given.engines) != 1 or recipe.output is None:
        raise InputError(
            "--three takes one fp32 ONNX model and a folder", remedy="trtq bench M.onnx --three -o DIR"
        )
    recipe = recipe.merged({"model": given.engines[0]})
    builds = build_three(recipe, given.int8, given.table, console_of(given))
    return [build.engine for build in builds.values()]


BENCH = Command(
    "bench",
    _bench,
    (
        *("output", "data", "state", "method", "op_reference", "cache", "threads"),
        *("include", "exclude", "weights", "rest"),
        *("backend", "target", "profile", "batch"),
        *BUILD_OPTIONS,
    ),
    (
        argument(
            "engines",
            path="read",
            nargs="+",
            metavar="ENGINE",
            help="plan files; with --three an fp32 ONNX model",
        ),
        argument("--three", action="store_true", help="build FP32, FP16 and INT8 engines into -o DIR first"),
        argument("--int8", path="read", metavar="MODEL", help="--three: the model with Q/DQ"),
        argument("--table", path="read", metavar="TABLE", help="--three: take the scales from this table"),
        argument("--warm-up", type=float, default=200, metavar="MS", help="run so long before (200)"),
        argument("--duration", type=float, default=3, metavar="S", help="time each engine this long (3)"),
        argument("--iterations", type=int, default=10, metavar="N", help="and at least this often (10)"),
        argument("--json", path="written", metavar="F", help="write the results as JSON"),
    ),
    required=("engines",),
    examples=(
        "trtq bench out/model.plan",
        "trtq bench model.onnx --three --data calib.npz -o bench --target 8.6",
    ),
    makes=THREE,
)
