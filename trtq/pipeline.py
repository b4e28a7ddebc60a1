"""The paper's workflow, end to end: every command is one of these steps or all of them in a row."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from trtq.backends.builders import builder, chosen
from trtq.backends.coverage import Coverage
from trtq.backends.interface import Build
from trtq.calibration.calibrate import calibrate
from trtq.calibration.extents import measure_extents
from trtq.calibration.foreign import read_table
from trtq.calibration.table import Table
from trtq.console import SILENT, Console
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.errors import ExitCode, InputError
from trtq.files import PathLike, sha256_file, staged_folder, write_json, write_text
from trtq.gate.evaluation import Evaluation, metric_of
from trtq.gate.verdict import Check, Verdict
from trtq.graph.fold import fold
from trtq.graph.half_rules import half_by_rules
from trtq.graph.model import FP16_SCALE_OPSET, Model, load_model, save_model
from trtq.graph.place import place
from trtq.graph.plan import Plan, percent
from trtq.graph.quantization import Quantization
from trtq.job import Job, opt_shapes, planned, prepare, profile_for
from trtq.migration.convert import load_source, quantize_with_table, require_complete
from trtq.recipe import Recipe
from trtq.recovery.attempt import Attempt, Fruitless, write_verdict
from trtq.recovery.budget import Budget
from trtq.recovery.diagnosis import diagnose
from trtq.recovery.workflow import recover
from trtq.report.html import write_report


@dataclass(frozen=True)
class Deployment:
    """What `deploy` leaves behind.

    Attributes:
        best: the attempt whose files are in `folder`.
        steps: every step that the workflow tried, in order.
    """

    folder: Path
    best: Attempt
    steps: tuple[Attempt | Fruitless, ...]

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The steps that gave something to build and gate."""
        return tuple(step for step in self.steps if isinstance(step, Attempt))

    @property
    def plan(self) -> Plan:
        """Which nodes are INT8, and why the others are not."""
        return self.best.quantization.plan

    @property
    def table(self) -> Table:
        """The scales of the activations."""
        return self.best.quantization.table()

    @property
    def build(self) -> Build:
        """The engine and what was compiled."""
        return dataclasses.replace(self.best.build, engine=self.folder / "model.plan")

    @property
    def coverage(self) -> Coverage:
        """What the engine runs in INT8."""
        return self.best.coverage

    @property
    def verdict(self) -> Verdict:
        """The gate's and all checks': the one outcome."""
        return self.best.verdict

    @property
    def checks(self) -> tuple[Check, ...]:
        """What was asked for beside the gate."""
        return self.verdict.checks

    @property
    def exit_code(self) -> ExitCode:
        """What the command returns."""
        return self.verdict.exit_code


def deploy(recipe: Recipe, command: str = "", console: Console = SILENT) -> Deployment:
    """Calibrate, quantize, build and gate a model; recover accuracy until the gate passes (paper section 6).

    Files left in the recipe's output folder: `model.int8.onnx`, `model.plan` (+ `.json`: what the engine
    runs), `calibration.cache` (+ `.json`: where the scales come from), `plan.json`, `verdict.json`,
    `junit.xml`, `report.html`, `workflow.json` (every step tried), `recipe.toml`, `manifest.json`. They
    appear together at the end: a job that fails or is interrupted leaves none, and goes on from its last
    finished step when run again.

    Args:
        command: the command line, for the manifest.

    Raises:
        InputError: an option, the model or the data cannot be used.
        MissingBackendError: the builder is not installed.
    """
    output = recipe.require("model", "data", "eval", "metric", "output").output
    builder(recipe.backend).check_targets(recipe.target)
    budget = Budget.of(recipe.budget)
    metric_of(recipe)
    console = console.fresh()
    job = Job.open(recipe, console)
    plan = job.place()
    evaluation = Evaluation.open(recipe, job.model.path, job.model.inputs, job.cache, console)
    console.say("data", f"{len(job.data)} rows to calibrate, {len(evaluation.samples)} to evaluate")
    job.warn_of_shared(evaluation.samples)
    console.say("plan", plan_text(plan))
    started = time.perf_counter()
    with staged_folder(output) as folder:
        tried = recover(job, plan, evaluation, recipe.recover, budget, folder)
        attempts = [step for step in tried if isinstance(step, Attempt)]
        kept = max(attempts, key=lambda attempt: attempt.measured.rank)
        in_the_way = diagnose(job, evaluation, attempts, kept, budget, time.perf_counter() - started)
        verdict = dataclasses.replace(kept.verdict, in_the_way=in_the_way, warnings=tuple(console.warnings))
        best = dataclasses.replace(kept, verdict=verdict)
        tried = [best if step is kept else step for step in tried]
        for path in list(best.folder.iterdir()):
            os.replace(path, folder / path.name)
        for attempt in attempts:
            shutil.rmtree(attempt.folder)
        write_verdict(folder, best.verdict)
        write_text(folder / "recipe.toml", recipe.dumps())
        record = [{**step.to_json(), "kept": step is best} for step in tried]
        write_json(folder / "workflow.json", record)
        write_report(folder)
        write_json(folder / "manifest.json", manifest(job, evaluation, command, folder))
    console.say("verdict", "\n".join(dataclasses.replace(best.verdict, in_the_way=None).details()))
    return Deployment(Path(output), best, tuple(tried))


@dataclass(frozen=True)
class Quantized:
    """A Q/DQ graph, where its Q/DQ stands, and the scales it has."""

    graph: gs.Graph
    plan: Plan
    table: Table


def quantize(recipe: Recipe, table: PathLike | None, console: Console) -> Quantized:
    """The recipe's model with Q/DQ: scales from a table, or calibrated on the recipe's data.

    Raises:
        InputError: neither data nor table; the model, data or table cannot be used; the table lacks a scale.
    """
    path = recipe.require("model").model
    if table is not None:
        given = _read_table(table, console)
        if recipe.plan is None:
            source = load_source(path, rest=recipe.rest)
            explicit = quantize_with_table(
                source,
                given,
                include=recipe.include,
                exclude=recipe.exclude,
                weights=recipe.weights,
                rest=recipe.rest,
            )
            require_complete(explicit.fit, table)
            return Quantized(explicit.graph, explicit.plan, explicit.table)
        model = prepare(recipe)
        given.check_made_for(model.sha256, model.path)
        quantization = Quantization(model.graph, planned(recipe, model), given.scales, notes=given.metadata)
    elif recipe.data is not None:
        job = Job.open(recipe, console)
        quantization = calibrate(job, job.place())
    else:
        raise InputError("there is nothing to take the scales from", remedy="give --table or --data")
    graph = quantization.rewritten(weights=recipe.weights, rest=recipe.rest)
    return Quantized(graph, quantization.plan, quantization.table())


def _read_table(path: PathLike, console: Console) -> Table:
    """A table to quantize by; warns where recovery changed the weights that its ranges were measured with."""
    table = read_table(path)
    if changed := [step for step in ("fixes", "learned") if step in table.metadata]:
        console.warn(
            f"{path} belongs to weights that recovery changed ({', '.join(changed)}), and those of the model"
            " given here are not: take the model.int8.onnx that was written with it, or calibrate again"
        )
    return table


def build_implicit(recipe: Recipe, table: PathLike | None, algorithm: str | None) -> tuple[Build, Plan]:
    """An engine that TensorRT 8.6 to 10.16 quantizes by itself, and the plan whose exclusions it obeys.

    Args:
        table: the scales; TensorRT measures nothing then.
        algorithm: the calibrator of TensorRT's that measures them on the recipe's data otherwise; the table
            it makes is kept beside the engine as `<engine>.cache`.

    Raises:
        InputError: another backend; both or neither of table and calibrator; or as the builder.
        MissingBackendError: TensorRT, PyCUDA or a GPU is missing.
    """
    output = recipe.require("model", "output").output
    if chosen(recipe.backend) != "tensorrt":
        raise InputError(
            f"{chosen(recipe.backend)} has no implicit quantization",
            remedy="use --backend tensorrt (8.6 to 10.16), or quantize explicitly: trtq quantize --table",
        )
    from trtq.backends import calibrators, tensorrt

    model = prepare(recipe)
    data = load_samples(recipe.data, model.inputs, recipe.preprocess) if recipe.data else None
    profile = profile_for(model, recipe, data)
    plan = place(
        model, include=recipe.include, exclude=recipe.exclude, input_shapes=opt_shapes(model, profile)
    )
    if table is not None and algorithm is None:
        given = read_table(table)
        given.check_made_for(model.sha256, model.path)
        make: Callable[[Any], Any] = partial(calibrators.table_calibrator, table=given)
    elif table is None and algorithm is not None and data is not None:
        make = partial(
            calibrators.data_calibrator,
            algorithm=algorithm,
            samples=data,
            model=model.sha256,
            batch_size=plan.batch,
            cache=Path(f"{output}.cache"),
        )
    else:
        raise InputError("give either --table, or --calibrator with --data")
    floating_point = [node.name for node in plan.nodes if not node.int8]
    with tempfile.TemporaryDirectory(prefix="trtq-") as folder:
        folded = Path(folder) / model.path.name
        save_model(model.graph, folded)
        build = tensorrt.build(
            folded,
            output,
            profile=profile,
            targets=recipe.target,
            options=recipe.build_options(),
            implicit=tensorrt.Implicit(make, floating_point),
        )
    return build, plan


@contextlib.contextmanager
def in_precision(model: Model, rest: str, samples: Samples | None = None) -> Iterator[Path]:
    """The file of a model in fp32 as it is, or of its conversion to fp16 while the context lasts.

    Args:
        samples: rows on which to measure what has to stay float32.

    Raises:
        InputError: fp16 is asked for and the model is quantized already, or cannot be converted.
    """
    if rest == "fp32":
        yield model.path
        return
    if model.is_quantized:
        raise InputError(
            "the model is quantized already and stays in its precision",
            file=model.path,
            remedy="quantize the fp32 model with --rest fp16",
        )
    upgraded = load_model(model.path, opset=FP16_SCALE_OPSET)
    fold(upgraded.graph)
    with tempfile.TemporaryDirectory(prefix="trtq-") as folder:
        path = Path(folder) / model.path.name
        extents = measure_extents(upgraded.graph, samples) if samples else {}
        save_model(half_by_rules(upgraded.graph, extents), path)
        yield path


def plan_text(plan: Plan) -> str:
    """What the plan does, in a few lines."""
    share = plan.mac_share()
    of_macs = "" if share is None else f", {percent(share)} of the multiply-accumulates"
    lines = [f"{len(plan.int8_nodes)} of {len(plan.nodes)} weighted nodes to INT8{of_macs}"]
    lines += [f"in floating point: {n.name} ({n.op}): {n.reason}" for n in plan.nodes if not n.int8]
    lines += [f"in float32: {line}" for line in plan.float32_lines()]
    return "\n".join(lines)


def manifest(job: Job, evaluation: Evaluation, command: str, folder: Path) -> dict[str, Any]:
    """What went in and what came out: hashes, versions and the exact command."""
    model, data, rows, metric = job.model, job.data, evaluation.samples, evaluation.metric
    return {
        "command": command,
        "versions": versions(job.recipe),
        "inputs": {
            "model": {"file": str(model.path), "sha256": model.sha256},
            "data": {"source": data.source, "rows": len(data), "sha256": data.hash},
            "eval": {"source": rows.source, "rows": len(rows), "sha256": rows.hash},
            "metric": {"name": metric.name, "fingerprint": metric.fingerprint},
        },
        "outputs": hashes_of(folder),
    }


def versions(recipe: Recipe) -> dict[str, str]:
    """Versions of everything that the results depend on."""
    packages = ("trtq", "numpy", "numba", "onnx", "onnx-graphsurgeon", "onnxruntime", "polygraphy", "pillow")
    backend = chosen(recipe.backend)
    return {name: version(name) for name in packages} | {backend: builder(backend).version()}


def hashes_of(folder: Path) -> dict[str, Any]:
    """File name -> SHA-256 and size of every file in a folder, for the manifest."""
    return {
        path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
    }
