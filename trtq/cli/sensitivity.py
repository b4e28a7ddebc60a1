"""`trtq sensitivity`: what INT8 in each layer does to the outputs."""

from __future__ import annotations

import argparse

from trtq.cli.command import Command, argument, console_of, recipe_of
from trtq.errors import ExitCode, InputError


def _sensitivity(given: argparse.Namespace) -> int:
    from trtq.calibration.calibrate import calibrate
    from trtq.data.load import load_samples
    from trtq.gate.metrics import load_metric
    from trtq.job import Job
    from trtq.recovery.sensitivity import analyse

    recipe, console = recipe_of(given), console_of(given)
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
        samples = load_samples(recipe.eval, tuple(job.model.inputs), recipe.preprocess)
        job.warn_of_shared(samples)
    if metric is not None and metric.needs_targets and not samples.targets:
        raise InputError(
            f"the metric '{metric.name}' needs targets, and the evaluation data has none",
            file=samples.source,
            remedy="add an array of labels, or leave --eval and --metric out",
        )
    result = analyse(
        calibrate(job, job.place()),
        samples,
        job.cache,
        console,
        mode="all-but" if given.all_but_one else "only",
        metric=metric,
        fast=given.fast,
        workers=recipe.threads,
        parallel=recipe.parallel,
        ignore_nonfinite=recipe.ignore_nonfinite,
    )
    if recipe.output is not None:
        result.save(recipe.output)
    print(result.text())
    return ExitCode.PASS


SENSITIVITY = Command(
    "sensitivity",
    "rank the layers by what INT8 in each of them does to the outputs",
    _sensitivity,
    (
        "model",
        "output",
        "data",
        "method",
        "eval",
        "metric",
        "ignore_nonfinite",
        "plan",
        "include",
        "exclude",
        "cache",
        "threads",
        "parallel",
    ),
    (
        argument("--fast", action="store_true", help="rank on a few rows, at the cost of a few passes"),
        argument(
            "--all-but-one",
            action="store_true",
            help="leave one layer at a time in floating point, with all others in INT8",
        ),
    ),
)
