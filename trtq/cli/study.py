"""`trtq study`: the paper's tables for the user's model."""

from __future__ import annotations

import argparse
from pathlib import Path

from trtq.cli.command import Command, console_of, recipe_of
from trtq.errors import ExitCode, MissingBackendError
from trtq.files import staged_folder, write_json, write_text


def _study(given: argparse.Namespace) -> int:
    from trtq.gate.evaluation import Evaluation, metric_of
    from trtq.job import Job
    from trtq.recovery.budget import Budget
    from trtq.study import plot, study

    recipe, console = recipe_of(given), console_of(given)
    recipe.require("model", "data", "eval", "metric")
    budget = Budget.of(recipe.budget)
    metric_of(recipe)
    job = Job.open(recipe, console)
    evaluation = Evaluation.open(recipe, job.model.path, job.model.inputs, job.cache, console)
    job.warn_of_shared(evaluation.samples)
    result = study(job, evaluation, budget)
    print(result.text())
    if recipe.output is not None:
        with staged_folder(recipe.output) as folder:
            write_json(folder / "study.json", result.to_json())
            write_text(folder / "study.txt", result.text() + "\n")
            try:
                plot(result, folder / "study.svg")
            except MissingBackendError as error:
                console.warn(str(error))
            written = ", ".join(sorted(path.name for path in folder.iterdir()))
        print(f"{Path(recipe.output)}: {written}")
    return ExitCode.PASS


STUDY = Command(
    "study",
    "the paper's tables for your model: methods, weights, partial quantization, learning",
    _study,
    (
        *("model", "output", "data", "eval", "metric", "method", "plan", "include", "exclude"),
        *("min_reference", "ignore_nonfinite", "budget", "labels", "batch", "cache", "threads", "parallel"),
    ),
)
