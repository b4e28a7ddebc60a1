"""An attempt: one quantization written, built and gated, with all that the result folder will hold of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtq.backends.builders import builder
from trtq.backends.coverage import Coverage, coverage
from trtq.backends.interface import Build, Profile, find_gpu
from trtq.calibration.table import Table
from trtq.console import Console
from trtq.gate.evaluation import Evaluation
from trtq.gate.verdict import Check, Outcome, Verdict
from trtq.graph.model import save_model
from trtq.graph.plan import percent
from trtq.graph.quantization import Quantization
from trtq.job import Job
from trtq.recipe import Recipe


@dataclass(frozen=True)
class Attempt:
    """What one step of the workflow came to.

    Attributes:
        step: which one.
        folder: where its `model.int8.onnx`, `model.plan`, `plan.json` and `calibration.cache` are.
        accuracy: what the gate says, with the checks on the outputs, on whatever it was measured.
        on_engine: the checks on what the engine runs.
        verdict: both together, or inconclusive where an engine is required and none ran.
        seconds: that the step took, with building and gating.
    """

    step: str
    quantization: Quantization
    folder: Path
    build: Build
    coverage: Coverage
    accuracy: Verdict
    on_engine: tuple[Check, ...]
    verdict: Verdict
    seconds: float

    @property
    def measured(self) -> Verdict:
        """The gate and all checks, on whatever they were measured: what the workflow goes by."""
        return self.accuracy.with_checks(*self.on_engine)

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
            "checks": [check.to_json() for check in verdict.checks],
            "note": self.quantization.remark,
            "seconds": round(self.seconds, 1),
            "in_the_way": verdict.in_the_way and verdict.in_the_way.to_json(),
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
            **dict.fromkeys(("outcome", "gate", "metric", "relative_drop", "int8_nodes", "int8_share")),
            "step": self.step,
            "sqnr_db": {},
            "checks": [],
            "note": self.note,
            "seconds": round(self.seconds, 1),
            "in_the_way": None,
        }


def attempt(
    step: str, quantization: Quantization, job: Job, evaluation: Evaluation, folder: Path, started: float
) -> Attempt:
    """Write, build and gate a quantization.

    Args:
        folder: made here.
        started: `time.perf_counter` when the step began.

    Raises:
        InputError, MissingBackendError: as the builder and the gate.
    """
    recipe, console = job.recipe, job.console
    folder.mkdir()
    build = write_and_build(quantization, Table.of(quantization), recipe, job.profile, folder)
    covered = coverage(quantization.plan, build.compiled)
    size = build.engine.stat().st_size / 1e6
    console.say("engine", f"{size:.1f} MB, {build.compiled.kernels} kernels\n{covered.text()}")
    runs_here = engine_runs_here(recipe, console)
    accuracy = evaluation.verdict(build.engine if runs_here else folder / "model.int8.onnx", final=False)
    on_engine = () if recipe.min_int8 is None else (share_check(covered, recipe.min_int8),)
    verdict = evaluation.published(accuracy).with_checks(*on_engine)
    console.say(step, verdict.headline())
    seconds = time.perf_counter() - started
    return Attempt(step, quantization, folder, build, covered, accuracy, on_engine, verdict, seconds)


def with_interval(kept: Attempt, evaluation: Evaluation) -> Attempt:
    """The attempt with the interval of its drop, which only the one that is kept is worth where it has to be
    resampled."""
    if kept.accuracy.draws != 0:
        return kept
    engine = kept.accuracy.executor == "engine"
    accuracy = evaluation.verdict(kept.build.engine if engine else kept.folder / "model.int8.onnx")
    verdict = evaluation.published(accuracy).with_checks(*kept.on_engine)
    return replace(kept, accuracy=accuracy, verdict=verdict)


def write_and_build(
    quantization: Quantization, table: Table, recipe: Recipe, profile: Profile, folder: Path
) -> Build:
    """Write a quantization's model, plan and table into a folder, and build the engine there.

    Raises:
        InputError, MissingBackendError: as the builder.
    """
    int8 = folder / "model.int8.onnx"
    save_model(quantization.rewritten(weights=recipe.weights, rest=recipe.rest), int8)
    quantization.plan.save(folder / "plan.json")
    table.save(folder / "calibration.cache")
    return builder(recipe.backend).build(
        int8,
        folder / "model.plan",
        profile=profile,
        targets=recipe.target,
        options=recipe.build_options(),
    )


def share_check(covered: Coverage, least: float) -> Check:
    """Whether the engine runs at least the share `least` in INT8."""
    message = (
        f"--min-int8: the engine runs {percent(covered.share)} in INT8, at least {least:.1%} is required"
    )
    outcome = Outcome.PASS if covered.share >= least else Outcome.FAIL
    return Check(f"int8 share at least {least:.1%}", outcome, message)


def engine_runs_here(recipe: Recipe, console: Console) -> bool:
    """Whether the engine itself can be gated here; warns if it is built for other GPUs than the one here."""
    gpu = find_gpu()
    if gpu is None:
        return False
    if gpu.compute_capability in builder(recipe.backend).check_targets(recipe.target):
        return True
    console.warn(f"the engine is not built for {gpu.name} ({gpu.compute_capability}); the gate simulates it")
    return False
