"""An attempt: one quantization written, built and gated, with all that the result folder will hold of it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtq.backends.builders import NO_ENGINE, builder
from trtq.backends.coverage import Coverage, coverage, planned
from trtq.backends.engine import why_not_loaded
from trtq.backends.interface import Build, Profile, find_gpu
from trtq.calibration.table import Table
from trtq.console import Console
from trtq.cost.interface import Latency
from trtq.errors import BuildError
from trtq.files import PathLike
from trtq.gate.evaluation import Evaluation
from trtq.gate.verdict import Check, Outcome, Verdict
from trtq.graph.foreign import View
from trtq.graph.model import save_model
from trtq.graph.plan import Plan, percent
from trtq.graph.quantization import Quantization
from trtq.job import Job
from trtq.recipe import Recipe
from trtq.recovery.partial import given_away

ENGINE_BUILT = "the builder makes an engine"
"""The check that fails where it does not."""


@dataclass(frozen=True)
class Attempt:
    """What one step of the workflow came to.

    Attributes:
        step: which one.
        folder: where its `model.int8.onnx`, `model.plan`, `plan.json` and `calibration.cache` are.
        build: None where the builder makes no engine, for which the verdict says why, or none is wanted; the
            coverage is then the plan's.
        accuracy: what the gate says, with the checks on the outputs, on whatever it was measured.
        on_engine: the checks on what the engine runs, or what the plan has where no engine is wanted.
        verdict: both together, or inconclusive where an engine is required and none ran.
        seconds: that the step took, with building and gating.
        latency: what the engine costs, where something tells.
    """

    step: str
    quantization: Quantization
    folder: Path
    build: Build | None
    coverage: Coverage
    accuracy: Verdict
    on_engine: tuple[Check, ...]
    verdict: Verdict
    seconds: float
    latency: Latency | None = None

    @property
    def measured(self) -> Verdict:
        """The gate and all checks, on whatever they were measured: what the workflow goes by."""
        return self.accuracy.with_checks(*self.on_engine)

    @property
    def has_int8(self) -> bool:
        """Whether some of it is planned for INT8."""
        return bool(self.quantization.plan.int8_nodes)

    @property
    def worth(self) -> tuple[Any, ...]:
        """The higher, the better: it has an engine, passes, and of those that pass is the fastest; then by
        the gate and the checks (`Verdict.rank`)."""
        passed = self.measured.passed
        speed = -self.latency.microseconds if passed and self.latency else 0.0
        return self.build is not None, passed, speed, self.measured.rank

    @property
    def refused(self) -> tuple[Check, ...]:
        """The check that says why the builder makes no engine; empty where it does, or none is wanted."""
        return tuple(check for check in self.verdict.checks if check.name == ENGINE_BUILT)

    def to_json(self) -> dict[str, Any]:
        """The figures of the attempt, for `workflow.json`."""
        verdict = self.verdict
        return {
            "step": self.step,
            "outcome": verdict.outcome.value,
            "gate": verdict.gate.value,
            "metric": verdict.candidate,
            "relative_drop": verdict.relative_drop,
            "sqnr_db": {name: output.sqnr_db for name, output in verdict.outputs.items()},
            "int8_nodes": len(self.quantization.plan.int8_nodes),
            "int8_share": self.coverage.share,
            "given_away": given_away(self.quantization.plan),
            "checks": [check.to_json() for check in verdict.checks],
            "note": self.quantization.remark,
            "seconds": round(self.seconds, 1),
            "latency": self.latency and _figures(self.latency),
            "in_the_way": verdict.in_the_way and verdict.in_the_way.to_json(),
        }


def _figures(latency: Latency) -> dict[str, Any]:
    """A latency without its kernels, as JSON values."""
    return {
        "microseconds": latency.microseconds,
        "bytes": latency.bytes,
        "kind": latency.kind,
        "source": latency.source,
    }


@dataclass(frozen=True)
class Fruitless:
    """A step of the workflow that gave nothing to build and gate.

    Attributes:
        note: why, with the figures.
        seconds: that it took.
    """

    step: str
    note: str
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """For `workflow.json`, with the keys of an attempt."""
        return {
            **dict.fromkeys(("outcome", "gate", "metric", "relative_drop")),
            **dict.fromkeys(("int8_nodes", "int8_share", "given_away")),
            "step": self.step,
            "sqnr_db": {},
            "checks": [],
            "note": self.note,
            "seconds": round(self.seconds, 1),
            "latency": None,
            "in_the_way": None,
        }


def attempt(
    step: str,
    quantization: Quantization,
    job: Job,
    evaluation: Evaluation,
    folder: Path,
    started: float,
    refusal: BuildError | None = None,
) -> Attempt:
    """Write, build and gate a quantization.

    Args:
        folder: made here.
        started: `time.perf_counter` when the step began.
        refusal: what the builder said of this model before; it is not asked again.

    Raises:
        InputError, MissingBackendError: as the builder and the gate, but for a `BuildError`: what the builder
            does not make an engine of is gated on the CPU, and fails the check `ENGINE_BUILT`.
    """
    recipe, console = job.recipe, job.console
    folder.mkdir()
    write(quantization, Table.of(quantization), recipe, folder)
    made = refusal or _build_or_refusal(job, quantization.plan, folder)
    build = made if isinstance(made, Build) else None
    covered = planned(quantization.plan) if build is None else coverage(quantization.plan, build.compiled)
    console.say("engine", _engine_text(build, covered))
    comparable = build is not None and not View.of(job.model.graph).walls
    on_gpu = comparable and engine_runs_here(folder / "model.plan", recipe.plugin_lib, console)
    accuracy = evaluation.verdict(folder / ("model.plan" if on_gpu else "model.int8.onnx"), final=False)
    on_engine: tuple[Check, ...] = ()
    if not isinstance(made, BuildError) and recipe.min_int8 is not None:
        on_engine = (share_check(covered, recipe.min_int8, planned_only=build is None),)
    verdict = evaluation.published(accuracy).with_checks(*on_engine)
    if isinstance(made, BuildError):
        verdict = verdict.with_checks(Check(ENGINE_BUILT, Outcome.FAIL, one_line(made)))
    console.say(step, verdict.headline())
    seconds = time.perf_counter() - started
    return Attempt(step, quantization, folder, build, covered, accuracy, on_engine, verdict, seconds)


def with_interval(kept: Attempt, evaluation: Evaluation) -> Attempt:
    """The attempt with the interval of its drop, which only the one that is kept is worth where it has to be
    resampled."""
    if kept.accuracy.draws != 0:
        return kept
    on_engine = kept.accuracy.executor == "engine"
    model = kept.folder / ("model.plan" if on_engine else "model.int8.onnx")
    accuracy = evaluation.verdict(model, again=True)
    verdict = evaluation.published(accuracy).with_checks(*kept.on_engine, *kept.refused)
    return replace(kept, accuracy=accuracy, verdict=verdict)


def _build_or_refusal(job: Job, plan: Plan, folder: Path) -> Build | BuildError | None:
    """The engine of the model in a folder, or what the builder has against it, with a warning; None where no
    engine is wanted."""
    if job.recipe.backend == NO_ENGINE:
        return None
    try:
        build = build_in(folder, job.recipe, job.profile, plan)
    except BuildError as error:
        job.console.warn(one_line(error))
        return error
    for note in build.notes:
        job.console.warn(note)
    return build


def _engine_text(build: Build | None, covered: Coverage) -> str:
    if build is None:
        return "none; the gate is simulated"
    size = build.engine.stat().st_size / 1e6
    return f"{size:.1f} MB, {build.compiled.kernels} kernels\n{covered.text()}"


def write(quantization: Quantization, table: Table, recipe: Recipe, folder: Path) -> None:
    """Write a quantization's model, plan and table into a folder."""
    int8 = quantization.delivered(weights=recipe.weights, rest=recipe.precision)
    save_model(int8, folder / "model.int8.onnx")
    quantization.plan.save(folder / "plan.json")
    table.save(folder / "calibration.cache")


def build_in(folder: Path, recipe: Recipe, profile: Profile, plan: Plan) -> Build:
    """Build the engine of the model that `write` left in a folder, beside it.

    Raises:
        BuildError, InputError, MissingBackendError: as the builder; a `BuildError` names the recipe's model.
    """
    int8 = folder / "model.int8.onnx"
    try:
        return builder(recipe.backend).build(
            int8,
            folder / "model.plan",
            profile=profile,
            further=recipe.profiles[1:],
            targets=recipe.target,
            options=recipe.build_options(),
            float32=[node.name for node in plan.float32],
        )
    except BuildError as error:
        raise of_model(error, int8, recipe.require("model").model) from error


def of_model(error: BuildError, tried: Path, model: PathLike) -> BuildError:
    """An error about a file that will be gone, as one about the user's model."""
    cause = None if error.cause is None else error.cause.replace(str(tried), os.fspath(model))
    return BuildError(error.problem, file=model, cause=cause, remedy=error.remedy)


def one_line(error: BuildError) -> str:
    """What a builder says, in one line."""
    cause = "; ".join((error.cause or "").split("\n"))
    return ": ".join(filter(None, [error.problem, cause])) + (f" ({error.remedy})" if error.remedy else "")


def share_check(covered: Coverage, least: float, *, planned_only: bool = False) -> Check:
    """Whether the engine runs at least the share `least` in INT8, or without an engine the plan has it."""
    what = "without an engine, the plan has" if planned_only else "the engine runs"
    message = f"--min-int8: {what} {percent(covered.share)} in INT8, at least {least:.1%} is required"
    outcome = Outcome.PASS if covered.share >= least else Outcome.FAIL
    return Check(f"int8 share at least {least:.1%}", outcome, message)


def engine_runs_here(engine: Path, plugins: Sequence[str], console: Console) -> bool:
    """Whether the engine itself can be gated here; warns where there is a GPU and it does not load."""
    gpu = find_gpu()
    if gpu is None:
        return False
    problem = why_not_loaded(engine, plugins)
    if problem is not None:
        console.warn(f"the gate simulates the engine, which does not run on {gpu.name}: {problem}")
    return problem is None
