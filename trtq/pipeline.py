"""The paper's workflow, end to end: every command is one of these steps or all of them in a row."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_graphsurgeon as gs

from trtq.backends.builders import NO_ENGINE, builder
from trtq.backends.coverage import Coverage
from trtq.backends.engine import input_specs
from trtq.backends.interface import Build
from trtq.calibration.calibrate import calibrate, complete_table
from trtq.calibration.extents import measure_extents
from trtq.calibration.foreign import read_table
from trtq.calibration.table import Table
from trtq.console import SILENT, Console
from trtq.data.samples import Samples
from trtq.errors import ExitCode, InputError
from trtq.escapes import html_table
from trtq.files import PathLike, staged_folder, write_json, write_text
from trtq.gate.evaluation import Evaluation, metric_of, warn_of_walls
from trtq.gate.looks import judging
from trtq.gate.metrics import load_metric
from trtq.gate.verdict import Check, Verdict
from trtq.graph import references
from trtq.graph.door import read_model
from trtq.graph.ends import codes_of
from trtq.graph.half_rules import Extent
from trtq.graph.model import Model
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.job import (
    Job,
    for_builder,
    open_cache,
    planned,
    prepare,
    samples_of,
    say_without_data,
    settled,
    with_files,
    with_timing_cache,
)
from trtq.migration.fit import require_complete
from trtq.migration.source import load_source
from trtq.migration.to_qdq import quantize_with_table
from trtq.paths import DEPLOYED, Output, check_recipe
from trtq.recipe import Recipe
from trtq.recovery.attempt import Attempt, Fruitless, with_interval
from trtq.recovery.diagnosis import diagnose
from trtq.recovery.ends import ends_of, host_lines, wanted_ends
from trtq.recovery.fixes.fix import beside_the_table, calibrated, changed_weights, is_made
from trtq.recovery.race import layers_timed
from trtq.recovery.sensitivity import Sensitivity, analyse
from trtq.recovery.speed import Point, front_lines, front_of, rest_of, speed_of
from trtq.recovery.trial import refusal
from trtq.recovery.workflow import best_of, recover
from trtq.report.gather import record_of
from trtq.report.html import write_report
from trtq.report.junit import Said, model_name, write_verdict
from trtq.report.manifest import manifest
from trtq.simulation.simulator import Mode


@dataclass(frozen=True)
class Deployment:
    """What `deploy` leaves behind.

    Attributes:
        best: the attempt whose files are in `folder`.
        steps: every step that the workflow tried, in order.
        front: plans between latency and accuracy, as in `workflow.json`; empty where INT8 was the objective.
    """

    folder: Path
    best: Attempt
    steps: tuple[Attempt | Fruitless, ...]
    front: tuple[Point, ...] = ()

    def __repr__(self) -> str:
        return f"<Deployment: {self.folder}, {' '.join(self.verdict.headline().split())}>"

    def _repr_html_(self) -> str:
        made = "engine" if self.build is not None else "model"
        rows = [
            ("folder", self.folder),
            ("outcome", " ".join(self.verdict.headline().split())),
            (made, self.build.engine if self.build is not None else self.folder / "model.int8.onnx"),
            ("in INT8", self.coverage.text()),
            ("steps", "\n".join(self.step_lines())),
            ("details", "\n".join(self.verdict.details())),
            ("report", self.folder / "report.html"),
        ]
        return html_table("trtq.deploy", rows)

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The steps that gave something to build and gate."""
        return tuple(step for step in self.steps if isinstance(step, Attempt))

    def step_lines(self) -> list[str]:
        """What came of each step, a line each."""
        return [_step_line(step, kept=step is self.best) for step in self.steps]

    def front_lines(self) -> list[str]:
        """The front as a table; none where INT8 was the objective."""
        return front_lines(self.front) if self.front else []

    @property
    def plan(self) -> Plan:
        """Which nodes are INT8, and why the others are not."""
        return self.best.quantization.plan

    @property
    def table(self) -> Table:
        """The scales of the activations, of those without a quantizer as well."""
        return Table.load(self.folder / "calibration.cache")

    @property
    def build(self) -> Build | None:
        """The engine and what was compiled; None where the builder makes none (the verdict says why)."""
        build = self.best.build
        return build and dataclasses.replace(build, engine=self.folder / "model.plan")

    @property
    def coverage(self) -> Coverage:
        """What the engine runs in INT8, or what the plan says where there is none."""
        return self.best.coverage

    @property
    def verdict(self) -> Verdict:
        """The gate's and all checks': the one outcome."""
        return self.best.verdict

    @property
    def checks(self) -> tuple[Check, ...]:
        """What was required besides the gate."""
        return self.verdict.checks

    @property
    def exit_code(self) -> ExitCode:
        """What the command returns."""
        return self.verdict.exit_code


def _step_line(step: Attempt | Fruitless, *, kept: bool) -> str:
    if isinstance(step, Fruitless):
        return f"{step.step}: {step.note}"
    found = " ".join(step.verdict.headline().split())
    return f"{step.step}{' (kept)' if kept else ''}: {found}"


def deploy(
    recipe: Recipe, command: str = "", console: Console = SILENT, *, save_data: bool = False
) -> Deployment:
    """Calibrate, quantize, build and gate a model; recover accuracy until the gate passes (paper section 6).

    Files left in the recipe's output folder: `model.int8.onnx`, `model.plan` (+ `.json`: what the engine
    runs), `calibration.cache` (+ `.json`: where the scales come from), `plan.json`, `verdict.json`,
    `junit.xml`, `report.html`, `report.json` (what only the report shows), `workflow.json` (every step
    tried), `recipe.toml`, `manifest.json`. They appear together at the end: a job that is interrupted leaves
    none, and goes on from its last finished step when run again. What an earlier job's files there said of
    its outcome goes first, and a job that ends with an error leaves it in `junit.xml` (`Said`). Where the
    builder makes no engine, everything else is there, the gate is simulated, and the verdict is a fail with
    the builder's message. With `NO_ENGINE` as backend there is none, and that is no fail.

    Args:
        command: the command line, for manifest and report.
        save_data: also write what is in memory (see `with_files`), for the recipe that is left there.

    Raises:
        InputError: an option, the model or the data cannot be used, or the results would replace an input.
        MissingBackendError: the builder is not installed.
    """
    check_recipe(recipe, Output.FOLDER, DEPLOYED)
    with Said.in_folder(recipe.output, recipe.model).by_this_job():
        return _deployed(recipe, command, console, save_data=save_data)


def _deployed(recipe: Recipe, command: str, console: Console, *, save_data: bool) -> Deployment:
    began = time.perf_counter()
    output = recipe.require("model", "data", "eval", "metric", "output").output
    if recipe.backend != NO_ENGINE:
        builder(recipe.backend).check_targets(recipe.target)
    metric_of(recipe)
    console = console.fresh()
    given, recipe = recipe, with_timing_cache(for_builder(recipe))
    job = Job.open(recipe, console)
    recipe, plan = job.recipe, job.place()
    speed = speed_of(job, plan, partial(layers_timed, job, plan))
    if speed is not None and recipe.plan is None:
        plan = speed.fastest(rest_of(recipe))
    evaluation = Evaluation.open(recipe, job.model.path, job.model.inputs, job.cache, console)
    job = dataclasses.replace(job, evaluation=evaluation.samples)
    console.say("data", f"{len(job.data)} rows to calibrate, {len(evaluation.samples)} to evaluate")
    job.warn_of_shared(evaluation.samples)
    job.warn_of_profiles()
    console.say("plan", plan.text())
    if speed is not None:
        console.say("latency", speed.text(plan, rest_of(recipe)))
    started, refused = time.perf_counter(), None if is_made(job, plan) else refusal(job, plan)
    with staged_folder(output, DEPLOYED) as folder:
        if save_data:
            given = with_files(given, job.model.inputs, folder)
        tried, job, evaluation, points = recover(
            job, plan, evaluation, recipe.recover, folder, refused, speed
        )
        attempts = [step for step in tried if isinstance(step, Attempt)]
        kept = best_of(attempts)
        first = judging(evaluation, recipe.confidence, first=True)
        in_the_way = diagnose(job, first, attempts, kept, time.perf_counter() - started)
        best = with_interval(kept, judging(evaluation, recipe.confidence, first=kept is attempts[0]))
        verdict = dataclasses.replace(best.verdict, in_the_way=in_the_way, warnings=tuple(console.warnings))
        best = dataclasses.replace(best, verdict=verdict)
        tried = [best if step is kept else step for step in tried]
        for path in list(best.folder.iterdir()):
            os.replace(path, folder / path.name)
        for attempt in attempts:
            shutil.rmtree(attempt.folder)
        if best.quantization.ends:
            codes = codes_of(read_model(folder / "model.int8.onnx").graph)
            console.say("io", "\n".join(host_lines(best.quantization, codes)))
        complete_table(job, best.quantization).save(folder / "calibration.cache")
        write_verdict(folder, best.verdict, model_name(recipe.model), time.perf_counter() - began)
        written = dataclasses.replace(given, inputs=recipe.inputs).dumps(beside=output)
        write_text(folder / "recipe.toml", written)
        front = [] if speed is None else front_of(speed, points, best.step, rest_of(job.recipe))
        taken = [{**step.to_json(), "kept": step is best} for step in tried]
        shown = {"front": [point.to_json() for point in front]}
        taken = [{**step, **shown} if front and step["kept"] else step for step in taken]
        write_json(folder / "workflow.json", taken)
        record_of(job, evaluation, attempts, best, command).save(folder / "report.json")
        write_report(folder)
        write_json(folder / "manifest.json", manifest(job, evaluation, command, folder))
    console.say("verdict", "\n".join(dataclasses.replace(best.verdict, in_the_way=None).details()))
    return Deployment(Path(output), best, tuple(tried), tuple(front))


def quantize(recipe: Recipe, table: PathLike | None, console: Console) -> tuple[Quantization, gs.Graph]:
    """The recipe's model with scales from a table, or calibrated on the recipe's data; and its Q/DQ graph in
    the precision and with the weights that the recipe asks for.

    Args:
        table: gives the scales; the data then tell only what float16 can hold.

    Raises:
        InputError: neither data nor table; the model, data or table cannot be used; the table lacks a scale.
    """
    recipe.require("model")
    if table is not None:
        if recipe.data is not None:
            recipe, _ = settled(recipe, console)
        quantization = _with_table(recipe, table, console)
        ends = wanted_ends(recipe, quantization.graph, read_table(table).scales)
        quantization = dataclasses.replace(quantization, ends=ends)
        say_without_data(recipe, console)
    elif recipe.data is not None:
        job = Job.open(recipe, console)
        recipe, quantization = job.recipe, calibrated(job, job.place())
        quantization = dataclasses.replace(quantization, ends=ends_of(job))
    else:
        raise InputError("nothing gives the scales", remedy="give --table or --data")
    return quantization, quantization.delivered(weights=recipe.weights, rest=recipe.precision)


def _with_table(recipe: Recipe, table: PathLike, console: Console) -> Quantization:
    """The recipe's model with scales from a table, which must have all that the plan needs."""
    given = _read_table(table, console)
    references.use(recipe.op_reference)
    if recipe.plan is None:
        source = load_source(recipe.require("model").model, rest=recipe.precision, feeding=recipe.feeding)
        quantization, fit = quantize_with_table(
            source,
            given,
            include=recipe.include,
            exclude=recipe.exclude,
            rest=recipe.precision,
            extents=_extents(recipe, source.model),
        )
        require_complete(fit, table)
        return quantization
    model = prepare(recipe)
    given.check_made_for(model.sha256, model.path)
    return Quantization(model.graph, planned(recipe, model), given.scales, notes=given.metadata)


def _extents(recipe: Recipe, model: Model) -> dict[str, Extent]:
    """How far the tensors of a folded model reach on the recipe's data, where that is asked for."""
    if recipe.data is None or recipe.precision == "fp32":
        return {}
    samples = samples_of(recipe, recipe.data, model, open_cache(recipe, SILENT), SILENT)
    return measure_extents(model.graph, samples, workers=recipe.threads)


def _read_table(path: PathLike, console: Console) -> Table:
    """A table to quantize by; warns where recovery changed the weights that its ranges were measured with, or
    made more than ranges."""
    table = read_table(path)
    if changed := changed_weights(table.metadata):
        console.warn(
            f"{path} belongs to weights that recovery changed ({', '.join(changed)}), and this model's are"
            " unchanged: take the model.int8.onnx that was written with it, or calibrate again"
        )
    elif held := beside_the_table(table.metadata):
        console.warn(
            f"{path} has ranges only: the {' and '.join(held)} of the job that wrote it are in its"
            " model.int8.onnx only; --data instead of --table makes them again"
        )
    return table


def gate(recipe: Recipe, reference: Path, candidate: Path, console: Console) -> tuple[Verdict, Samples]:
    """The verdict on a candidate, and the evaluation rows that it was measured on.

    Args:
        reference, candidate: ONNX models or engines.

    Raises:
        InputError, MissingBackendError: as `Evaluation.open` and `Evaluation.verdict`.
    """
    inputs = input_specs([reference, candidate], recipe.plugin_lib)
    cache = dataclasses.replace(open_cache(recipe, console), job=reference.name)
    evaluation = Evaluation.open(recipe, reference, inputs, cache, console)
    warn_of_walls(reference, console)
    return evaluation.published(evaluation.verdict(candidate)), evaluation.samples


def sensitivity(
    recipe: Recipe, console: Console, *, all_but_one: bool = False, fast: bool = False
) -> Sensitivity:
    """Calibrate the recipe's model and measure what INT8 in each group of its nodes does to the outputs.

    The outputs are compared on the recipe's evaluation data with its metric, or without those on the
    calibration data.

    Args:
        all_but_one: one group at a time in floating point and all others in INT8, not the other way round.
        fast: as for `analyse`.

    Raises:
        InputError: an option, the model or the data cannot be used.
    """
    metric = load_metric(recipe.metric) if recipe.metric is not None else None
    labelled = metric is not None and metric.needs_targets
    if (metric is None and recipe.eval is not None) or (labelled and recipe.eval is None):
        raise InputError(
            "--eval and a --metric with labels go together",
            remedy="give both, or neither: the outputs are then compared on the calibration data",
        )
    job = Job.open(recipe, console)
    samples = job.data
    if recipe.eval is not None:
        samples = samples_of(job.recipe, recipe.eval, job.model, job.cache, console)
        job.warn_of_shared(samples)
    if metric is not None and metric.needs_targets and not samples.targets:
        raise InputError(
            f"the metric '{metric.name}' needs targets, and the evaluation data has none",
            file=samples.source,
            remedy="add an array of labels, or leave --eval and --metric out",
        )
    calibrated = calibrate(job, job.place())
    mode: Mode = "all-but" if all_but_one else "only"
    return analyse(
        calibrated, samples, job.cache, console, recipe=recipe, mode=mode, metric=metric, fast=fast
    )
