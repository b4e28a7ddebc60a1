"""Asking the builder before anything takes long: whether it makes an engine of the model at all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trtq.backends.apart import try_build
from trtq.backends.builders import NO_ENGINE, builder, chosen
from trtq.backends.compiled import Compiled
from trtq.calibration.methods import AUTO
from trtq.errors import BuildError, MissingBackendError
from trtq.graph.model import save_model, weight_bytes
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.job import Job
from trtq.recovery.attempt import of_model, one_line
from trtq.scratch import scratch_folder

MOST_NODES = 2500
"""Models of more nodes take the builder longer than the searches that a refusal would spare."""

MOST_BYTES = 1 << 28
"""Models with more weights are not built on trial: that takes as long as the search for their ranges."""


@dataclass(frozen=True)
class Refusal:
    """What the builder has against a model.

    Attributes:
        model: what tells the refused model from others of the job (`_identity`).
        final: it refuses the model in float32 and without Q/DQ, too.
    """

    error: BuildError
    model: tuple[Any, ...]
    final: bool

    def of(self, job: Job, quantization: Quantization) -> BuildError | None:
        """What the builder has against a quantization; None where it builds that.

        It is asked again where that is another model than the one that it refused.
        """
        if self.final or _identity(job, quantization.plan) == self.model:
            return self.error
        return objection(job, quantization)


def refusal(job: Job, plan: Plan) -> Refusal | None:
    """What the builder has against the plan's Q/DQ model before there are ranges; None where it builds it.

    It is asked in a process of its own, which may crash. Where no ranges are searched for, because the recipe
    names a method, where the model is too large, and where no engine is wanted, it is not asked.

    Raises:
        InputError, MissingBackendError: an option, the profile or the machine does not suit the builder.
    """
    if job.recipe.backend == NO_ENGINE:
        return None
    graph = job.model.graph
    large = weight_bytes(graph) > MOST_BYTES or len(graph.nodes) > MOST_NODES
    if job.recipe.method != AUTO or large:
        return None
    ones = Quantization(job.model.graph, plan, dict.fromkeys(plan.tensors, np.float32(1)))
    if (error := objection(job, ones)) is None:
        return None
    bare = Quantization(job.model.graph, replace(plan, edges=[], weights=[]), {})
    floating = objection(job, bare) is not None
    also = "it builds the same model without Q/DQ: --exclude the nodes that it names"
    if floating:
        also = "it does not build the model in floating point either, so this is not due to quantization"
    remedy = "; ".join(filter(None, [error.remedy, also]))
    found = BuildError(error.problem, file=job.model.path, cause=error.cause, remedy=remedy)
    job.console.say("builder", f"{one_line(found)}; the job goes on without an engine, unless that changes")
    return Refusal(found, _identity(job, plan), floating and job.recipe.precision == "fp32")


def objection(job: Job, quantization: Quantization) -> BuildError | None:
    """What the builder, in a process of its own, has against a quantization; None where it builds it."""
    try:
        _compiled(job, quantization)
    except BuildError as error:
        return error
    return None


def compiled(job: Job, quantization: Quantization) -> Compiled | None:
    """What a quantization is compiled to, by a build on trial; None where the builder makes no engine, is not
    there or would take too long, or does not tell."""
    if job.recipe.backend == NO_ENGINE or weight_bytes(job.model.graph) > MOST_BYTES:
        return None
    try:
        made = _compiled(job, quantization)
    except (BuildError, MissingBackendError):
        return None
    return made if made.kernels else None


def asked(job: Job) -> list[Any]:
    """What decides what engines of the job are `compiled` to, for the cache; nothing where no builder is
    asked.

    Raises:
        MissingBackendError: the builder is not installed.
    """
    recipe = job.recipe
    if recipe.backend == NO_ENGINE:
        return []
    return [chosen(recipe.backend), builder(recipe.backend).version(), recipe.weights, recipe.target]


def _compiled(job: Job, quantization: Quantization) -> Compiled:
    """What the builder, in a process of its own, makes of a quantization.

    Raises:
        BuildError: it makes no engine; the error names the job's model.
        InputError, MissingBackendError: as the builder.
    """
    recipe = job.recipe
    with scratch_folder() as folder:
        path = folder / "model.onnx"
        save_model(quantization.delivered(weights=recipe.weights, rest=recipe.precision), path)
        try:
            return try_build(
                recipe.backend,
                path,
                profile=job.profile,
                targets=recipe.target,
                options=recipe.build_options(),
            )
        except BuildError as error:
            raise of_model(error, path, job.model.path) from error


def _identity(job: Job, plan: Plan) -> tuple[Any, ...]:
    """What of a plan, and of the precision of the rest, decides which Q/DQ model is built."""
    return plan.edges, plan.weights, [node.name for node in plan.float32], job.recipe.precision
