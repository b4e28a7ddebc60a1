"""The paper's workflow, end to end: every command is one of these steps or all of them in a row."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

import trtq
from trtq.backends import tensorrt_rtx
from trtq.backends.interface import OPT_BATCH, Build, Profile, find_gpu, parse_profile, profiles_from
from trtq.cache import Cache, Key, default_root
from trtq.calibration.collect import collect
from trtq.calibration.methods import parse_method
from trtq.calibration.statistics import Statistics
from trtq.calibration.table import Table
from trtq.choose import Choice, choose_method, scales_from
from trtq.console import SILENT, Console
from trtq.coverage import Coverage, coverage
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.errors import ExitCode, InputError
from trtq.evaluation import outputs_of
from trtq.files import PathLike, sha256_file, write_json, write_text
from trtq.gate.metrics import Metric, load_metric
from trtq.gate.verdict import Verdict, decide, parse_margin
from trtq.graph.fold import fold
from trtq.graph.half import convert_to_half
from trtq.graph.model import FP16_SCALE_OPSET, LOWEST_OPSET, Model, load_model, save_model
from trtq.graph.place import place
from trtq.graph.plan import Plan
from trtq.graph.rewrite import rewrite
from trtq.recipe import Recipe
from trtq.report.html import write_report
from trtq.report.junit import Check, junit_xml

FEWEST_TO_SPLIT = 16
"""With fewer samples `auto` measures on the rows it takes the ranges from."""


@dataclass(frozen=True)
class Deployment:
    """What `deploy` leaves behind; `exit_code` is what the command returns."""

    folder: Path
    plan: Plan
    table: Table
    build: Build
    coverage: Coverage
    verdict: Verdict
    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> ExitCode:
        """The verdict's, unless it passes and another check fails."""
        if self.verdict.exit_code is ExitCode.PASS and not all(check.ok for check in self.checks):
            return ExitCode.FAIL
        return self.verdict.exit_code


def deploy(recipe: Recipe, command: str = "", console: Console = SILENT) -> Deployment:
    """Calibrate, quantize, build and gate a model; leave everything in the recipe's output folder.

    Files: `model.int8.onnx`, `model.plan` (+ `.json`: what the engine runs), `calibration.cache` (+ `.json`:
    where the scales come from), `plan.json`, `verdict.json`, `junit.xml`, `report.html`, `recipe.toml`,
    `manifest.json`. They appear together at the end: a job that fails or is interrupted leaves none.

    Args:
        command: the command line, for the manifest.

    Raises:
        InputError: an option, the model or the data cannot be used.
        MissingBackendError: the builder is not installed.
    """
    recipe.need("model", "data", "eval", "metric", "output")
    assert recipe.data is not None
    assert recipe.eval is not None
    assert recipe.output is not None
    tensorrt_rtx.check_targets(recipe.target)
    max_drop, metric = parse_margin(recipe.max_drop), _metric(recipe)
    least = None if recipe.min_int8 is None else parse_share(recipe.min_int8)
    cache = open_cache(recipe, console)
    model = prepare(recipe)
    data = load_samples(recipe.data, model.inputs, recipe.preprocess)
    evaluation = load_samples(recipe.eval, model.inputs, recipe.preprocess)
    if metric.needs_targets and not evaluation.targets:
        raise InputError(
            f"the metric '{metric.name}' needs targets, and the evaluation data has none",
            file=recipe.eval,
            remedy="add an array of labels, or use the metric 'cosine', which needs none",
        )
    console.say("data", f"{len(data)} rows to calibrate, {len(evaluation)} to evaluate")
    profile = profile_for(model, recipe, data)
    plan = place(
        model, include=recipe.include, exclude=recipe.exclude, input_shapes=_opt_shapes(model, profile, data)
    )
    console.say("plan", plan_text(plan))
    graph = convert_to_half(model.graph) if recipe.rest == "fp16" else model.graph
    table = calibrate(model, graph, plan, data, recipe, cache, console)
    with _staging(Path(recipe.output)) as folder:
        int8 = folder / "model.int8.onnx"
        save_model(rewrite(graph, plan, table.scales, weights=recipe.weights), int8)
        plan.save(folder / "plan.json")
        table.save(folder / "calibration.cache")
        write_text(folder / "recipe.toml", recipe.dumps())
        build = tensorrt_rtx.build(int8, folder / "model.plan", profile=profile, targets=recipe.target)
        covered = coverage(plan, build.compiled)
        size = build.engine.stat().st_size / 1e6
        console.say("engine", f"{size:.1f} MB, {build.compiled.kernels} kernels\n{covered.text()}")
        checks = () if least is None else (_share_check(covered, least),)
        candidate = build.engine if _engine_runs_here(recipe, console) else int8
        verdict = gate(
            model.path,
            candidate,
            evaluation,
            metric,
            cache,
            console,
            reference_sha256=model.sha256,
            max_drop=max_drop,
            recipe=recipe,
        )
        write_json(folder / "verdict.json", verdict.to_json())
        write_text(folder / "junit.xml", junit_xml(verdict, checks))
        write_report(folder)
        write_json(folder / "manifest.json", manifest(recipe, command, model, data, evaluation, folder))
    console.say("verdict", "\n".join([verdict.text(), *(check.message for check in checks if not check.ok)]))
    output = Path(recipe.output)
    build = dataclasses.replace(build, engine=output / "model.plan")
    return Deployment(output, plan, table, build, covered, verdict, checks)


def prepare(recipe: Recipe) -> Model:
    """The recipe's model, loaded and folded."""
    recipe.need("model")
    assert recipe.model is not None
    model = load_model(recipe.model, opset=FP16_SCALE_OPSET if recipe.rest == "fp16" else LOWEST_OPSET)
    fold(model.graph)
    return model


def calibrate(
    model: Model,
    graph: gs.Graph,
    plan: Plan,
    data: Samples,
    recipe: Recipe,
    cache: Cache,
    console: Console,
) -> Table:
    """The table of the plan's tensors, by the recipe's method; from the cache where it is there.

    With `auto` every fourth sample is held back to measure the methods on; the scales are then those of the
    best method on all samples, which costs no further pass: the statistics of both parts add up.

    Args:
        graph: `model`'s graph in the precision of the rest, for measuring the methods.
    """
    metadata: dict[str, Any] = {
        "method": recipe.method,
        "model": model.sha256,
        "data": data.hash,
        "rows": len(data),
        "trtq": trtq.__version__,
    }
    key = Key(
        "table",
        model.sha256,
        data.hash,
        {"method": recipe.method, "tensors": plan.tensors, "weights": recipe.weights, "rest": recipe.rest},
    )
    if (content := cache.fetch(key)) is not None:
        stored = Table.load(cache.path(key))
        console.say("calibration", f"from the cache, nothing was run ({stored.metadata['method']})")
        return dataclasses.replace(stored, metadata={k: v for k, v in stored.metadata.items()})
    if recipe.method == "auto":
        fitting, held_back = data.split() if len(data) // data.group >= FEWEST_TO_SPLIT else (data, data)
        fitted = statistics_of(model, plan, fitting, recipe, cache, console)
        choice = choose_method(
            model, graph, plan, fitted, held_back, cache, console,
            weights=recipe.weights, threads=recipe.threads,
        )  # fmt: skip
        console.say("method", choice_text(choice))
        metadata |= {"method": str(choice.method), "tried": dict(choice.sqnr_db), "held_back": choice.rows}
        method = choice.method
        statistics = Statistics.empty(plan.tensors)
        statistics.merge(fitted)
        if held_back is not fitting:
            statistics.merge(statistics_of(model, plan, held_back, recipe, cache, console))
    else:
        method = parse_method(recipe.method)
        statistics = statistics_of(model, plan, data, recipe, cache, console)
    scales = scales_from(statistics, method)
    table = Table({name: scales[name] for name in plan.tensors}, metadata=metadata)
    return table


def statistics_of(
    model: Model, plan: Plan, data: Samples, recipe: Recipe, cache: Cache, console: Console
) -> Statistics:
    """Statistics of the plan's tensors over the data, from the cache where they are there."""
    key = Key("statistics", model.sha256, data.hash, {"tensors": sorted(plan.tensors)})
    if (content := cache.fetch(key)) is not None:
        console.say("statistics", f"{len(data)} rows from the cache, nothing was run")
        return Statistics.from_bytes(content)
    started = time.perf_counter()
    with console.progress("statistics", len(data)) as advance:
        statistics = collect(model.graph, plan.tensors, data, workers=recipe.threads, progress=advance)
    cache.store(key, statistics.to_bytes())
    seconds = time.perf_counter() - started
    console.say("statistics", f"{len(data)} rows, {len(plan.tensors)} tensors in {seconds:.1f} s")
    return statistics
