"""The commands: each reads its options, calls one step of the pipeline, and prints the result."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from trtq.calibration.table import ALGORITHMS
from trtq.cli import convert
from trtq.cli.bench import BENCH
from trtq.cli.command import Command, argument, console_of, recipe_of
from trtq.cli.migrate import MIGRATE
from trtq.cli.sensitivity import SENSITIVITY
from trtq.cli.study import STUDY
from trtq.errors import ExitCode, InputError
from trtq.files import write_json, write_text
from trtq.recipe import BUILD_OPTIONS, Recipe

if TYPE_CHECKING:
    from trtq.recovery.attempt import Attempt, Fruitless

_PLACEMENT = ("plan", "include", "exclude", "weights", "rest")
_CALIBRATION = ("data", "method", "cache", "threads", "parallel")
_ENGINE = ("backend", "target", "profile", "batch", "min_int8")
_TENSOR_SAMPLES = 16
_GATE = ("eval", "metric", "max_drop", "confidence", "require_engine", "min_reference", "ignore_nonfinite")
_RECOVERY = ("min_sqnr", "recover", "budget", "labels")


def _deploy(given: argparse.Namespace) -> int:
    return _run_deploy(recipe_of(given), given)


def _run_deploy(recipe: Recipe, given: argparse.Namespace) -> int:
    from trtq.pipeline import deploy

    started = time.perf_counter()
    result = deploy(recipe, given.command_line, console_of(given))
    if len(result.steps) > 1:
        print("\n".join(_step_line(step, result.best) for step in result.steps))
    if result.verdict.in_the_way is not None:
        print("\n".join(result.verdict.in_the_way.lines()))
    print(
        f"{result.folder}/report.html and {result.folder}/model.plan, {time.perf_counter() - started:.1f} s"
    )
    print(result.verdict.headline())
    return result.exit_code


def _step_line(step: Attempt | Fruitless, best: Attempt) -> str:
    """What came of a step, in one line."""
    from trtq.recovery.attempt import Fruitless

    if isinstance(step, Fruitless):
        return f"{step.step}: {step.note}"
    found = " ".join(step.verdict.headline().split())
    return f"{step.step}{' (kept)' if step is best else ''}: {found}"


def _demo(given: argparse.Namespace) -> int:
    folder = Path(__file__).parent.parent / "demo"
    bundled = {
        "model": str(folder / "digits.onnx"),
        "data": str(folder / "calib.npz"),
        "eval": str(folder / "eval.npz"),
        "metric": "top1",
        "output": given.output or "trtq-demo",
    }
    return _run_deploy(recipe_of(given).merged(bundled), given)


def _calibrate(given: argparse.Namespace) -> int:
    from trtq.pipeline import quantize

    recipe = recipe_of(given)
    output = recipe.require("model", "data", "output").output
    table = quantize(recipe, None, console_of(given)).table
    table.save(output)
    print(f"{output}: {len(table.scales)} tensors, method {table.metadata['method']}")
    return ExitCode.PASS


def _quantize(given: argparse.Namespace) -> int:
    from trtq.graph.model import save_model
    from trtq.pipeline import plan_text, quantize

    recipe = recipe_of(given)
    output = recipe.require("model", "output").output
    if given.table is not None and given.data is not None:
        raise InputError("give either --table or --data", remedy="a table has the scales, data make them")
    quantized = quantize(recipe, given.table, console_of(given))
    save_model(quantized.graph, output)
    print(f"{output}: {plan_text(quantized.plan)}")
    return ExitCode.PASS


def _build(given: argparse.Namespace) -> int:
    from trtq import pipeline
    from trtq.backends.builders import builder
    from trtq.backends.coverage import coverage
    from trtq.data.load import load_samples
    from trtq.graph.model import load_model
    from trtq.graph.place import placed
    from trtq.job import opt_shapes, profile_for
    from trtq.recovery.attempt import share_check

    recipe = recipe_of(given)
    required = recipe.require("model", "output")
    if given.table is not None or given.calibrator is not None:
        built, plan = pipeline.build_implicit(recipe, given.table, given.calibrator)
    elif recipe.include or recipe.exclude:
        raise InputError(
            "--include and --exclude belong to implicit quantization here",
            remedy="an explicit model has its Q/DQ where 'trtq quantize --exclude' put it",
        )
    else:
        model = load_model(required.model)
        data = load_samples(recipe.data, model.inputs, recipe.preprocess) if recipe.data else None
        profile = profile_for(model, recipe, data)
        plan = placed(model, opt_shapes(model, profile))
        with pipeline.in_precision(model, recipe.rest, data) as source:
            built = builder(recipe.backend).build(
                source,
                required.output,
                profile=profile,
                targets=recipe.target,
                options=recipe.build_options(),
            )
    covered = coverage(plan, built.compiled)
    print(f"{built.engine}: {built.engine.stat().st_size / 1e6:.1f} MB, {built.compiled.kernels} kernels")
    print(covered.text())
    if recipe.min_int8 is None:
        return ExitCode.PASS
    check = share_check(covered, recipe.min_int8)
    print(f"{check.outcome.value.upper()}  {check.message}")
    return check.outcome.exit_code


def _gate(given: argparse.Namespace) -> int:
    from trtq.gate.evaluation import Evaluation
    from trtq.gate.tensors import compare_three
    from trtq.job import open_cache
    from trtq.report.junit import junit_xml
    from trtq.simulation.outputs import input_specs

    recipe, console = recipe_of(given), console_of(given)
    reference, candidate = Path(given.reference), Path(given.candidate)
    inputs = input_specs([reference, candidate])
    evaluation = Evaluation.open(recipe, reference, inputs, open_cache(recipe, console), console)
    verdict = evaluation.published(evaluation.verdict(candidate))
    if given.json:
        write_json(given.json, verdict.to_json())
    if given.junit:
        write_text(given.junit, junit_xml(verdict))
    if given.tensors:
        samples = evaluation.samples
        few = samples.subset(range(min(_TENSOR_SAMPLES, len(samples) // samples.group)))
        compared = compare_three(reference, candidate, few, threads=recipe.threads)
        write_json(given.tensors, compared.to_json())
        print(compared.text())
    print("\n".join([*verdict.details(), verdict.headline()]))
    return verdict.exit_code


def _inspect(given: argparse.Namespace) -> int:
    from trtq.report.inspection import inspect

    found = inspect(given.file)
    print(json.dumps(found.to_json(), indent=2) if given.json else found.text())
    return ExitCode.PASS


def _cache(given: argparse.Namespace) -> int:
    from trtq.cache import Cache, default_root

    if given.action == "convert":
        return convert.run(given)
    if given.source is not None:
        raise InputError(f"'{given.action}' takes no SOURCE", remedy="only 'trtq cache convert' does")
    root = recipe_of(given).cache
    cache = Cache(Path(root) if root else default_root())
    entries = list(cache.entries())
    if given.action == "prune":
        if not given.days >= 0:
            raise InputError(f"--days is {given.days}", remedy="use a number from 0")
        age = 86400 * given.days
        removed = cache.prune(lambda e: not e.problem and time.time() - e.path.stat().st_mtime < age)
        print(f"{len(removed)} of {len(entries)} entries removed from {cache.root}")
        return ExitCode.PASS
    if given.action == "show":
        for entry in entries:
            known = {**entry.notes, **entry.key}
            print(json.dumps({"path": str(entry.path), "problem": entry.problem, **known}, indent=2))
        return ExitCode.PASS
    shown = entries if given.action == "list" else [e for e in entries if e.problem]
    for entry in shown:
        what = entry.key.get("method") or str(entry.key.get("executor", "")).partition(":")[0]
        state = entry.problem or "ok"
        print(f"{entry.size:>12,}  {state:<4}  {entry.path.relative_to(cache.root)}  {what}")
    damaged = sum(entry.problem is not None for entry in entries)
    print(f"{len(entries)} entries, {damaged} damaged, in {cache.root}")
    return ExitCode.FAIL if given.action == "verify" and damaged else ExitCode.PASS


def _report(given: argparse.Namespace) -> int:
    from trtq.report.html import write_report

    print(write_report(given.folder))
    return ExitCode.PASS


def _doctor(given: argparse.Namespace) -> int:
    from trtq.backends.doctor import as_text, diagnose

    print(as_text(diagnose()))
    return ExitCode.PASS


COMMANDS: tuple[Command, ...] = (
    Command(
        "demo",
        "run the main job on a bundled model and data: calibrate, quantize, build, gate",
        _demo,
        (
            *("output", "method", "max_drop", "confidence", "min_int8"),
            *_RECOVERY,
            *_PLACEMENT,
            *("target", "batch", "threads", "cache"),
        ),
    ),
    Command(
        "deploy",
        "the whole workflow: an fp32 model and data become an INT8 engine and a verdict",
        _deploy,
        ("model", "output", *_CALIBRATION, *_GATE, *_RECOVERY, *_PLACEMENT, *_ENGINE, *BUILD_OPTIONS),
    ),
    Command(
        "calibrate",
        "make a calibration table from data",
        _calibrate,
        ("model", "output", *_CALIBRATION, "ignore_nonfinite", *_PLACEMENT),
    ),
    Command(
        "quantize",
        "insert Q/DQ: write an explicit INT8 model",
        _quantize,
        ("model", "output", *_CALIBRATION, "ignore_nonfinite", *_PLACEMENT),
        (argument("--table", metavar="TABLE", help="take the scales from this table"),),
    ),
    Command(
        "build",
        "build an engine from an ONNX model and say what it runs in INT8",
        _build,
        ("model", "output", "data", "rest", "include", "exclude", *_ENGINE, *BUILD_OPTIONS),
        (
            argument("--table", metavar="TABLE", help="implicit INT8 with this table (TensorRT ≤ 10.16)"),
            argument(
                "--calibrator",
                choices=ALGORITHMS,
                help="implicit INT8, measured by this calibrator of TensorRT's on --data (TensorRT ≤ 10.16)",
            ),
        ),
    ),
    Command(
        "gate",
        "compare a candidate's accuracy with a reference's and decide",
        _gate,
        (*_GATE, "batch", "threads", "parallel", "cache"),
        (
            argument("reference", metavar="REFERENCE", help="the fp32 ONNX model, or an engine"),
            argument("candidate", metavar="CANDIDATE", help="the quantized ONNX model, or an engine"),
            argument("--json", metavar="F", help="write the verdict as JSON"),
            argument("--junit", metavar="F", help="write the verdict as JUnit XML"),
            argument(
                "--tensors",
                metavar="F",
                help="compare ONNX models tensor by tensor as well: fp32, simulation, engine (GPU)",
            ),
        ),
    ),
    Command(
        "inspect",
        "describe a model, plan, table, engine or statistics file",
        _inspect,
        arguments=(
            argument("file", metavar="FILE"),
            argument("--json", action="store_true", help="print JSON"),
        ),
    ),
    Command(
        "cache",
        "list, show, verify or prune what is cached; convert tables to Q/DQ models and back",
        _cache,
        ("cache", *convert.OPTIONS),
        (
            argument("action", choices=("list", "show", "verify", "prune", "convert")),
            *convert.ARGUMENTS,
            argument("--days", type=float, default=30.0, help="prune: keep entries younger than this (30)"),
        ),
    ),
    Command(
        "report",
        "write report.html again from a folder of results",
        _report,
        arguments=(argument("folder", metavar="DIR"),),
    ),
    SENSITIVITY,
    STUDY,
    MIGRATE,
    BENCH,
    Command("doctor", "what is installed, what works here, and what to install for the rest", _doctor),
)
