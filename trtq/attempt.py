"""An attempt: one quantization written, built and gated, with all that the result folder will hold of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtq.backends.builders import builder
from trtq.backends.interface import Build, find_gpu
from trtq.console import Console
from trtq.coverage import Coverage, coverage
from trtq.errors import ExitCode, InputError
from trtq.evaluation import Evaluation
from trtq.files import write_json, write_text
from trtq.gate.verdict import Outcome, Verdict, parse_fraction
from trtq.graph.model import save_model
from trtq.graph.plan import percent
from trtq.job import Job
from trtq.quantization import Quantization
from trtq.recipe import Recipe
from trtq.report.junit import Check, junit_xml


@dataclass(frozen=True)
class Attempt:
    """What one step of the workflow came to.

    Attributes:
        step: which one.
        folder: where its `model.int8.onnx`, `model.plan`, `plan.json`, `calibration.cache`, `verdict.json`
            and `junit.xml` are.
        measured: what the gate says.
        verdict: that, or inconclusive where an engine is required and none ran.
        seconds: that the step took, with building and gating.
    """

    step: str
    quantization: Quantization
    folder: Path
    build: Build
    coverage: Coverage
    measured: Verdict
    verdict: Verdict
    checks: tuple[Check, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the gate and every other check passed, on whatever it was measured."""
        return self.measured.passed and all(check.ok for check in self.checks)

    @property
    def exit_code(self) -> ExitCode:
        """The verdict's, unless it passes and another check fails."""
        if self.verdict.exit_code is ExitCode.PASS and not all(check.ok for check in self.checks):
            return ExitCode.FAIL
        return self.verdict.exit_code

    @property
    def rank(self) -> tuple[bool, int, int, float]:
        """The higher, the better: all passed, the gate's outcome, checks that passed, and the drop; where the
        gate passes but a check does not, the SQNR."""
        outcomes = [Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.PASS]
        drop = self.measured.relative_drop
        passed = sum(check.ok for check in self.checks)
        quality = -math.inf if drop is None else -drop
        if self.measured.passed and not self.ok:
            quality = min((output.sqnr_db for output in self.measured.outputs.values()), default=0.0)
        return self.ok, outcomes.index(self.measured.outcome), passed, quality

    def to_json(self) -> dict[str, Any]:
        """The figures of the attempt, for `workflow.json`."""
        verdict = self.verdict
        return {
            "step": self.step,
            "outcome": verdict.outcome.value,
            "metric": verdict.candidate,
            "relative_drop": verdict.relative_drop,
            "sqnr_db": {name: output.sqnr_db for name, output in verdict.outputs.items()},
            "int8_nodes": len(self.quantization.plan.int8_nodes),
            "int8_share": self.coverage.share,
            "checks": [check._asdict() for check in self.checks],
            "seconds": round(self.seconds, 1),
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
    int8 = folder / "model.int8.onnx"
    save_model(quantization.rewritten(weights=recipe.weights, rest=recipe.rest), int8)
    quantization.plan.save(folder / "plan.json")
    quantization.table().save(folder / "calibration.cache")
    build = builder(recipe.backend).build(
        int8,
        folder / "model.plan",
        profile=job.profile,
        targets=recipe.target,
        options=recipe.build_options(),
    )
    covered = coverage(quantization.plan, build.compiled)
    size = build.engine.stat().st_size / 1e6
    console.say("engine", f"{size:.1f} MB, {build.compiled.kernels} kernels\n{covered.text()}")
    measured = evaluation.verdict(build.engine if engine_runs_here(recipe, console) else int8)
    verdict, checks = evaluation.published(measured), tuple(_checks(recipe, covered, measured))
    write_json(folder / "verdict.json", verdict.to_json())
    write_text(folder / "junit.xml", junit_xml(verdict, checks))
    seconds = time.perf_counter() - started
    done = Attempt(step, quantization, folder, build, covered, measured, verdict, checks, seconds)
    console.say(step, "\n".join([verdict.text().splitlines()[0], *(c.message for c in checks)]))
    return done


def _checks(recipe: Recipe, covered: Coverage, verdict: Verdict) -> Iterator[Check]:
    if recipe.min_int8 is not None:
        yield share_check(covered, parse_share(recipe.min_int8))
    if recipe.min_sqnr is not None:
        lowest = min((output.sqnr_db for output in verdict.outputs.values()), default=0.0)
        message = f"the outputs have {lowest:.1f} dB, at least {recipe.min_sqnr:g} dB were asked for"
        yield Check(f"SQNR at least {recipe.min_sqnr:g} dB", lowest >= recipe.min_sqnr, message)


def share_check(covered: Coverage, least: float) -> Check:
    """Whether the engine runs at least the share `least` in INT8."""
    message = f"the engine runs {percent(covered.share)} in INT8, at least {least:.1%} were asked for"
    return Check(f"int8 share at least {least:.1%}", covered.share >= least, message)


def parse_share(text: str) -> float:
    """The fraction that "90%" or "0.9" means.

    Raises:
        InputError: not a number from 0 to 100 %.
    """
    share = parse_fraction(text)
    if not 0 <= share <= 1:
        raise InputError(f"{text!r} is no share", remedy="write it as 90% or 0.9")
    return share


def engine_runs_here(recipe: Recipe, console: Console) -> bool:
    """Whether the engine can be gated itself; otherwise its ONNX model is simulated, and says so."""
    gpu = find_gpu()
    if gpu is None:
        return False
    if gpu.compute_capability in builder(recipe.backend).check_targets(recipe.target):
        return True
    console.warn(f"{gpu.name} ({gpu.compute_capability}) is no target of the engine; the gate simulates it")
    return False
