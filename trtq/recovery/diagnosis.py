"""What stands in the way of a pass: each layer's share of the harm, and an `--exclude` line that would pass.

The groups of the quantization are ranked by the noise that each alone in INT8 makes in the outputs, on
calibration rows; the workflow's own measurement is used where there is one. The first of that ranking are
then left out, as few as let the simulated gate pass, and what is printed was tried as it would run: with a
plan and ranges of its own.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trtq.budget import Budget
from trtq.gate.evaluation import Evaluation
from trtq.gate.in_the_way import InTheWay, Obstacle
from trtq.gate.verdict import Verdict
from trtq.graph.groups import groups
from trtq.graph.place import leave_out, pattern_of
from trtq.graph.plan import NodePlan, Plan
from trtq.graph.quantization import Quantization
from trtq.job import Job, planned
from trtq.recovery.attempt import Attempt
from trtq.recovery.fixes.fix import calibrated
from trtq.recovery.partial import rows_to_search
from trtq.recovery.sensitivity import fast_rows, known, measured
from trtq.simulation.simulator import Effect, Simulator

MOST_LISTED, LEAST_SHARE = 10, 0.005
"""How many groups are named, and which share of the noise is worth naming."""

LEAST_SECONDS = 30.0
"""Looking for what is in the way may take as long as the workflow did, or this long where that was less."""

MOST_CHECKED = 3
"""How often a set that passes with the old ranges is recalibrated to see whether it still does."""


def diagnose(
    job: Job,
    evaluation: Evaluation,
    attempts: Sequence[Attempt],
    kept: Attempt,
    seconds: float,
) -> InTheWay | None:
    """What stands in the way of the attempt that is kept; None where that passes.

    Args:
        seconds: that the workflow took. Once the job's budget is spent, no set of layers is tried any more.

    Raises:
        InputError: as the simulator and the gate.
    """
    if kept.measured.passed:
        return None
    floating = tuple(_in_floating_point(kept))
    if kept.accuracy.passed:
        return InTheWay("not accuracy, but the nodes that run in floating point", floating)
    limit = Budget(time.perf_counter() + max(seconds, LEAST_SECONDS))
    whole = max(
        (a for a in attempts if "left_out" not in a.quantization.notes), key=lambda a: a.accuracy.rank
    )
    diagnosis = _Diagnosis(job, evaluation, whole, limit)
    without = diagnosis.without_int8()
    if without is not None and not without.passed:
        return InTheWay(
            f"INT8 is not the cause: with no layer in INT8 the outcome is {without.outcome.value}, too",
            advice=without.gate_line(),
        )
    found = diagnosis.run()
    missed = [] if all(check.ok for check in kept.on_engine) else floating
    return replace(found, obstacles=(*found.obstacles, *missed))


@dataclass(frozen=True)
class _Diagnosis:
    """Looking for what is in the way of the attempt `whole`, whose layers are all in INT8 that may be."""

    job: Job
    evaluation: Evaluation
    whole: Attempt
    limit: Budget

    @property
    def over(self) -> bool:
        """Whether there is no time to try more sets."""
        return self.job.budget.over or self.limit.over

    def without_int8(self) -> Verdict | None:
        """What the gate says with every layer in floating point, in the precision that the rest has; None
        where that is the reference itself, which passes by its point estimate."""
        job = self.job
        if job.recipe.precision == "fp32":
            itself = job.model.path
            return None if job.recipe.confidence is None else self.evaluation.verdict(itself)
        plan = job.place()
        bare = leave_out(job.model.graph, plan, dict.fromkeys(plan.int8_nodes, "left out to measure"))
        return self.evaluation.simulated(Quantization(job.model.graph, bare, {}))

    def run(self) -> InTheWay:
        """The groups in order, and a way round them."""
        start = self.whole.quantization
        count = len(groups(start.graph, start.plan))
        effects, rows = self._effects(count)
        ranked = sorted(effects, key=lambda effect: -effect.noise)
        # Learned weights are not the teacher's: their own noise is in every figure.
        shared = ranked[-1].noise if "learned" in start.notes else 0.0
        total = sum(effect.noise - shared for effect in effects) or 1.0
        shares = {effect.group.name: (effect.noise - shared) / total for effect in ranked}
        named = [e for i, e in enumerate(ranked) if not i or shares[e.group.name] >= LEAST_SHARE]
        obstacles = tuple(
            Obstacle(
                effect.group.nodes,
                effect.group.op,
                effect.sqnr_db,
                shares[effect.group.name],
                _share(effect.group.macs, start.plan.nodes),
            )
            for effect in named[:MOST_LISTED]
        )
        how_many = f"{count}" if len(effects) == count else f"{len(effects)} of {count}"
        what = f"{how_many} layers, each alone in INT8 on {rows} calibration rows, after '{self.whole.step}'"
        options, advice = self._way_round(ranked)
        return InTheWay(what, obstacles, options, advice)

    def _effects(self, count: int) -> tuple[list[Effect], int]:
        """The effect of each group alone, and on how many rows it was measured: on few, unless the workflow
        did already."""
        job, start = self.job, self.whole.quantization
        rows = rows_to_search(job, start)
        effects = known(start, job.cache, job.key("sensitivity", start))
        if len(effects) == count:
            return effects, len(rows)
        few = rows.spread(fast_rows(len(rows), count))
        simulator = Simulator(
            start,
            few,
            teacher=job.model.graph,
            workers=job.recipe.threads,
            ignore_nonfinite=job.recipe.ignore_nonfinite,
        )
        key = job.key("sensitivity", start, rows=len(few))
        return measured(simulator, "only", job.cache, key, job.console, lambda: self.limit.over), len(few)

    def _way_round(self, ranked: Sequence[Effect]) -> tuple[str | None, str]:
        """Options with which the job would pass, and how they were tried; or why there are none."""
        if self.job.recipe.plan is not None:
            return None, "the given plan decides what is INT8: set 'int8' to false for these nodes there"
        if len(ranked) < 2:
            return None, "it is the only layer in INT8: nothing can be left out"
        count, checked = self._fewest(ranked), 0
        after = None
        while count is not None and count < len(ranked) and checked < MOST_CHECKED:
            nodes = [node for effect in ranked[:count] for node in effect.group.nodes]
            patterns = (*self.job.recipe.exclude, *map(pattern_of, nodes))
            recipe = replace(self.job.recipe, exclude=patterns)
            plan = planned(recipe, self.job.model, self.job.profile)
            options = self._options(patterns, plan)
            if self._accepted(calibrated(replace(self.job, recipe=recipe), plan)):
                return options, "would pass, simulated"
            after, checked, count = after or options, checked + 1, count + 1
            if self.over:
                break
        if after is not None and self.whole.step != "calibrate":
            return after, f"would pass, simulated, after the step '{self.whole.step}'"
        reason = "no set of layers is known that would pass if left in floating point"
        if self.over:
            reason += ": time ran out before one was found"
        steps = self.job.recipe.recover
        if "partial" not in steps:
            reason += f"; run without --recover {','.join(steps) or 'none'} to search for one"
        return None, reason

    def _fewest(self, ranked: Sequence[Effect]) -> int | None:
        """How many of the first groups to leave out so that the simulated gate passes: the number is doubled
        until it does, then bisected.

        Returns:
            None where no number does, or there was no time.
        """
        failing, passing = 0, None
        while passing is None and not self.over:
            count = min(2 * failing or 1, len(ranked) - 1)
            if self._passes_without(ranked[:count]):
                passing = count
            elif count == len(ranked) - 1:
                return None
            else:
                failing = count
        while passing is not None and passing - failing > 1 and not self.over:
            middle = (failing + passing) // 2
            if self._passes_without(ranked[:middle]):
                passing = middle
            else:
                failing = middle
        return passing

    def _passes_without(self, left_out: Sequence[Effect]) -> bool:
        start = self.whole.quantization
        nodes = {node: "left out to measure" for effect in left_out for node in effect.group.nodes}
        return self._accepted(replace(start, plan=leave_out(start.graph, start.plan, nodes)))

    def _accepted(self, candidate: Quantization) -> bool:
        verdict = self.evaluation.simulated(candidate)
        left = len(candidate.plan.nodes) - len(candidate.plan.int8_nodes)
        self.job.console.say("in the way", f"{left} layers in floating point: {verdict.headline()}")
        return verdict.passed

    def _options(self, patterns: Sequence[str], plan: Plan) -> str:
        """The patterns as options, with the share that is then in INT8 where a larger one was asked for."""
        given = [
            f"--exclude {shlex.quote(p)}" if p[0] != "-" else f"--exclude={shlex.quote(p)}" for p in patterns
        ]
        least, share = self.job.recipe.min_int8, plan.mac_share()
        if least is not None and share is not None and share < least:
            given.append(f"--min-int8 {math.floor(1000 * share) / 10:g}%")
        return " ".join(given)


def _in_floating_point(kept: Attempt) -> list[Obstacle]:
    """The nodes that the engine runs in floating point, the most multiply-accumulates first."""
    covered, nodes = kept.coverage, kept.quantization.plan.nodes
    found = [(node, "its Q/DQ bought nothing") for node in covered.missed]
    found += [(node, node.reason) for node in covered.skipped]
    found.sort(key=lambda item: -(item[0].macs or 0))
    return [
        Obstacle((node.name,), node.op, None, None, _share(node.macs, nodes), f"in floating point: {reason}")
        for node, reason in found[:MOST_LISTED]
    ]


def _share(macs: int | None, nodes: Sequence[NodePlan]) -> float | None:
    """A share of the multiply-accumulates of some nodes; None where they are not known."""
    total = sum(node.macs or 0 for node in nodes)
    return macs / total if macs is not None and total else None
