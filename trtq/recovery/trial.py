"""Asking the builder before anything takes long: whether it makes an engine of the model at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trtq.backends.apart import try_build
from trtq.calibration.calibrate import is_calibrated
from trtq.calibration.methods import AUTO
from trtq.errors import BuildError
from trtq.graph.model import save_model, weight_bytes
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.job import Job
from trtq.recovery.attempt import of_model, one_line
from trtq.scratch import scratch_folder

MOST_BYTES = 1 << 28
"""Models with more weights are not built on trial: that takes as long as the search for their ranges."""


def refusal(job: Job, plan: Plan) -> BuildError | None:
    """What the builder has against the plan's Q/DQ model before there are ranges; None where it builds it.

    It is asked in a process of its own, which may crash. Where nothing is searched for, because the recipe
    names a method or the cache has the ranges, and where the model is too large, it is not asked.

    Raises:
        InputError, MissingBackendError: an option, the profile or the machine does not suit the builder.
    """
    large = weight_bytes(job.model.graph) > MOST_BYTES
    if job.recipe.method != AUTO or large or is_calibrated(job, plan):
        return None
    ones = Quantization(job.model.graph, plan, dict.fromkeys(plan.tensors, np.float32(1)))
    if (error := _tried(job, ones)) is None:
        return None
    floating = _tried(job, Quantization(job.model.graph, replace(plan, edges=[], weights=[]), {}))
    also = "it builds the same model without Q/DQ: --exclude the nodes that it names"
    if floating is not None:
        also = "it does not build the model in floating point either, so this is not due to quantization"
    remedy = "; ".join(filter(None, [error.remedy, also]))
    found = BuildError(error.problem, file=job.model.path, cause=error.cause, remedy=remedy)
    job.console.warn(f"{one_line(found)}; the job goes on without an engine")
    return found


def _tried(job: Job, quantization: Quantization) -> BuildError | None:
    recipe = job.recipe
    with scratch_folder() as folder:
        path = folder / "model.onnx"
        save_model(quantization.rewritten(weights=recipe.weights, rest=recipe.precision), path)
        try:
            try_build(
                recipe.backend,
                path,
                profile=job.profile,
                targets=recipe.target,
                options=recipe.build_options(),
            )
        except BuildError as error:
            return of_model(error, path, job.model.path)
    return None
