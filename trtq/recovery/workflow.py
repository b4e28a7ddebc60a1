"""The workflow of the paper's section 6: what follows calibration until the gate passes.

1. Calibrate every layer, with the fixes that cost nothing at run time (`fixes`). 2. Fix what is left, at the
cost of operators. 3. Leave the cheapest layers in floating point that bring the outputs close enough
(`partial`). 4. If that is not enough, or too little stays in INT8, learn ranges, biases and weights with the
fp32 model as the teacher (`learn`), and try 3 again from there.

Each step is built and gated like the first, and its result is kept in the cache: a job that was interrupted
goes on from its last finished step. Only the calibration data decide what a step does. Of the evaluation data
it learns how far the gate was from passing, and whether the metric is clearly worse behind a fix: what that
takes from a proof is counted (`trtq.gate.looks`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from trtq.cache import Key, remove
from trtq.calibration.calibrate import calibrate, unquantized
from trtq.calibration.effort import TOO_LONG
from trtq.errors import InputError, MissingBackendError
from trtq.files import sha256_json
from trtq.gate.drift import gap
from trtq.gate.evaluation import Evaluation
from trtq.gate.looks import judging
from trtq.gate.verdict import Verdict
from trtq.graph.groups import groups
from trtq.graph.place import SPARING, leave_out
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.job import Job
from trtq.recovery.attempt import Attempt, Fruitless, attempt
from trtq.recovery.ends import ends_of
from trtq.recovery.fixes.fix import HELD_BACK_DB, calibrated, fix
from trtq.recovery.learning.learn import Checkpoint, learn
from trtq.recovery.made import Made, made_once
from trtq.recovery.partial import Search, given_away, is_searchable
from trtq.recovery.race import raced
from trtq.recovery.speed import Point, Speed, is_for_this_gpu, pays, rest_of
from trtq.recovery.trial import Refusal, asked, objection
from trtq.simulation.similarity import noise_db

LEAST_RATIO = 1 / 256
"""Partial quantization does not try to get below this share of the noise."""

PARTED_DB = 6.0
"""An engine that is this much noisier than its model on the CPU does not compute that model."""

ABOUT = 1.35
"""Times the latency of the fastest plan: what is said to be within runs in the race on the GPU, too. What
layers take one by one is not what an engine takes: on an H200 a plan said to take 98 µs took 129, and one
with every layer in INT8, said to take 129, took 123."""

MOST_GATES, CLOSE = 8, 1.25
"""How often partial quantization asks the gate how much noise is little enough, and how close is enough."""

MOST_REFINED = 3
"""How often a set that passes is searched a cheaper one for, with less noise each time."""


def recover(
    job: Job,
    plan: Plan,
    evaluation: Evaluation,
    steps: Collection[str],
    folder: Path,
    refusal: Refusal | None = None,
    speed: Speed | None = None,
) -> Recovered:
    """Every step that was tried, in order; the workflow stops at the first that passes the gate and checks.

    Where the fastest engine is wanted, the one in floating point alone is among the steps where it is faster
    than what passes, or nothing does.

    Args:
        plan: where the fastest engine is wanted, the fastest plan.
        steps: those of `recipe.STEPS` that may be taken.
        folder: each attempt's files go into a folder of their own in it.
        refusal: what the builder said of the plan's model on trial.
        speed: what engines cost, where the fastest is wanted.

    Raises:
        InputError, MissingBackendError: as calibrating, building and gating.
    """
    workflow = _Workflow(job, evaluation, steps, folder, refusal, speed)
    if speed is not None and not plan.int8_nodes:
        workflow.attempt(*workflow.without_int8())
        if workflow.job is not job:  # float16 fails the gate: beside float32 INT8 may pay
            plan = speed.fastest(rest_of(workflow.job.recipe))
    if plan.int8_nodes:
        workflow.quantize(plan)
    if speed is not None and workflow.int8_does_not_pay(speed):
        workflow.attempt(*workflow.without_int8())
    if speed is not None and is_for_this_gpu(job.recipe):
        workflow.race(speed)
    return Recovered(workflow.done, workflow.job, workflow.evaluation, workflow.points)


def in_float32(job: Job, evaluation: Evaluation) -> tuple[Job, Evaluation]:
    """The same with what is not quantized in float32."""
    recipe = replace(job.recipe, rest="fp32")
    return replace(job, recipe=recipe), replace(evaluation, recipe=recipe)


def noise_ratio(verdict: Verdict, min_sqnr: float | None, confidence: float | None) -> float:
    """The share of its noise that a quantization may keep, as a first guess, to pass the gate.

    The drop of a metric is taken as proportional to the noise r of the outputs, and its uncertainty, which
    comes from the samples that the two models answer differently, to sqrt(r). The gate should then pass with
    a margin of one standard error; with a confidence the bound itself has to clear it.

    Args:
        min_sqnr: the SQNR in dB that every output has to reach, too.
    """
    ratio = 1.0
    if verdict.relative_drop is None:
        ratio = 1 / 16
    else:
        drop = verdict.relative_drop
        error = verdict.relative_interval[1] - drop if verdict.relative_interval else 0.0
        error *= 1.0 if confidence is not None else 0.5
        if drop + error > verdict.max_drop:
            drop = max(drop, 1e-6)
            root = (math.sqrt(error**2 + 4 * drop * verdict.max_drop) - error) / (2 * drop)
            ratio = min(root**2, 0.9)
    if min_sqnr is not None and verdict.outputs:
        ratio = min(ratio, 10 ** ((verdict.lowest_sqnr_db - min_sqnr) / 10))
    return max(ratio, LEAST_RATIO)


def is_worse(verdict: Verdict, other: Verdict) -> bool:
    """Whether the metric is worse than in another verdict by more than the gate allows, or unlike there
    cannot be computed: outputs that are nearer to fp32's on the whole may decide worse."""
    if other.relative_drop is None or verdict.relative_drop is None:
        return other.relative_drop is not None and verdict.relative_drop is None
    return verdict.relative_drop > other.relative_drop + verdict.max_drop


def can_leave_out(quantization: Quantization, least: float) -> bool:
    """Whether something can go into floating point with a share `least` left in INT8."""
    plan = quantization.plan
    total = sum(node.macs or 0 for node in plan.nodes)
    spare = (plan.mac_share() or 1.0) - least
    return any(edge.rule in SPARING for edge in plan.edges) or any(
        group.macs is None or group.macs <= spare * total for group in groups(quantization.graph, plan)
    )


def learned(job: Job, start: Quantization) -> Made:
    """A quantization with ranges, biases and weights learned on the job's data; None if it is no better.

    A run that was interrupted, or ended by the budget, goes on from its last epoch.

    Raises:
        InputError, MissingBackendError: as `learn`.
    """
    key = job.key("checkpoint", start, labels=job.recipe.labels)
    fitting, held_back = job.parts
    result = learn(
        start,
        job.model.graph,
        fitting,
        held_back,
        job.console,
        recipe=job.recipe,
        budget=job.budget,
        checkpoint=Checkpoint(job.cache.fetch(key), lambda state: job.cache.store(key, state)),
    )
    if result.whole:
        remove(job.cache.path(key))
    text = f"{result.before_db:.1f} -> {result.after_db:.1f} dB on the rows held back"
    job.console.say("learn", f"{result.steps} steps: {text}")
    if result.quantization is start:
        return Made(None, result.whole, f"nothing learned in {result.steps} steps is better: {text}")
    notes = {
        **start.notes,
        "learned": {"steps": result.steps, "sqnr_db": [result.before_db, result.after_db]},
    }
    return Made(replace(result.quantization, notes=notes), result.whole)


def best_of(attempts: Sequence[Attempt]) -> Attempt:
    """The one to deliver: of most `Attempt.worth`, but floating point alone where that passes as well and
    INT8 does not surely pay."""
    best = max(attempts, key=lambda tried: tried.worth)
    for tried in attempts:
        if tried.has_int8 or tried.latency is None or best.latency is None or not best.measured.passed:
            continue
        if tried.worth[:2] == best.worth[:2] and not pays(best.latency, tried.latency):
            return tried
    return best


class Recovered(NamedTuple):
    """What came of the workflow.

    Attributes:
        steps: every one that was tried, in order.
        job, evaluation: as they were at last (`in_float32`).
        points: what was seen of latency and accuracy, where the fastest engine is wanted.
    """

    steps: list[Attempt | Fruitless]
    job: Job
    evaluation: Evaluation
    points: list[Point]


@dataclass
class _Workflow:
    """The steps so far, and what they are made with.

    Attributes:
        speed: what engines cost, where the fastest is wanted.
        set_aside: what partial quantization made before learning, where it gives away too much.
        points: what was seen of latency and accuracy.
        parted: the builder makes no engine that computes its model: better ranges or weights mend none.
    """

    job: Job
    evaluation: Evaluation
    steps: Collection[str]
    folder: Path
    refusal: Refusal | None
    speed: Speed | None = None
    done: list[Attempt | Fruitless] = field(default_factory=list)
    set_aside: Quantization | None = None
    points: list[Point] = field(default_factory=list)
    parted: bool = False

    @property
    def attempts(self) -> list[Attempt]:
        """The steps that gave something to build and gate."""
        return [tried for tried in self.done if isinstance(tried, Attempt)]

    @property
    def passed(self) -> bool:
        """Whether an attempt with INT8 passes the gate and the checks."""
        return any(tried.measured.passed and tried.has_int8 for tried in self.attempts)

    @property
    def judge(self) -> Evaluation:
        """The evaluation as it judges the next candidate that may be delivered."""
        first = not self.attempts
        if first and not self.steps and self.speed is None and self.job.recipe.rest != "auto":
            return self.evaluation  # no other can follow
        return judging(self.evaluation, self.job.recipe.confidence, first=first)

    def quantize(self, plan: Plan) -> None:
        """Calibrate a plan, and recover accuracy until the gate passes."""
        job, ends = self.job, ends_of(self.job)
        whole = self.attempt("calibrate", lambda: Made(replace(calibrated(job, plan), ends=ends), True))
        assert whole is not None
        if self.parts(whole):
            whole = self.unfixed(plan) or whole
            self.parted = self.parts(whole)
        start = whole
        self.warn_of_gap(whole)
        if self.wants("fix"):
            start = self.attempt("fix", lambda: self.fix(whole)) or whole
            if is_worse(start.measured, whole.measured):
                job.console.say(
                    "fix", f"clearly worse by the metric: what follows starts from '{whole.step}'"
                )
                start = whole
        if self.wants("partial"):
            self.attempt("partial", lambda: self.frugal(self.partial("partial", start)))
        if self.wants("learn"):
            taught = self.attempt("learn", lambda: self.learn(start))
            if taught is not None and self.wants("partial", "learn, partial"):
                self.attempt("learn, partial", lambda: self.partial("learn, partial", taught))
        if self.set_aside is not None and not self.passed:
            self.attempt("partial after all", lambda: Made(self.set_aside, True))

    def without_int8(self) -> tuple[str, Callable[[], Made]]:
        """The name of the step that leaves INT8 out, and what it makes."""
        assert self.speed is not None
        plan, job = self.speed.without_int8, self.job
        name = f"{rest_of(job.recipe)} alone"
        return name, lambda: Made(replace(unquantized(job, plan), ends=ends_of(job)), True)

    def int8_does_not_pay(self, speed: Speed) -> bool:
        """Whether the engine in floating point is to be tried: it was not, and no attempt with INT8 passes,
        or none that does is faster; with a warning."""
        if any(not tried.has_int8 for tried in self.attempts):
            return False
        alone = speed.latency(speed.without_int8, rest := rest_of(self.job.recipe))
        passing = [t.latency for t in self.attempts if t.measured.passed and t.latency is not None]
        if any(pays(latency, alone) for latency in passing):
            return False
        found = "passes, so there is"
        if passing:
            best = min(latency.microseconds for latency in passing)
            found = f"is surely faster ({best:.1f} µs) than"
        self.job.console.warn(
            f"INT8 does not pay on this model and card: no plan with INT8 {found} {rest.upper()} alone"
            f" ({alone.microseconds:.1f} µs, {alone.kind})"
        )
        return True

    def wants(self, step: str, name: str | None = None) -> bool:
        """Whether a step of `recipe.STEPS` is to be taken now; a step that there is no time for is recorded.

        Args:
            name: what this round of it is called, if not like the step.
        """
        if self.passed or step not in self.steps:
            return False
        if self.parted:
            self.done.append(Fruitless(name or step, "not tried: the engine does not compute its model"))
            return False
        if self.job.budget.over:
            self.job.console.warn(f"the budget is spent: '{name or step}' is not tried")
            self.done.append(Fruitless(name or step, "not tried: the budget was spent"))
            return False
        return True

    def warn_of_gap(self, done: Attempt) -> None:
        """Warn where an attempt does differently on the evaluation data and on calibration rows held back."""
        on_gpu = done.measured.executor == "engine"
        ran = done.folder / ("model.plan" if on_gpu else "model.int8.onnx")
        seen = done.quantization.notes.get(HELD_BACK_DB)
        if (text := gap(self.job, self.evaluation, done.measured, ran, seen)) is not None:
            self.job.console.warn(text)

    def attempt(self, step: str, make: Callable[[], Made]) -> Attempt | None:
        """What `make` gives, built and gated; None where it gives nothing."""
        started = time.perf_counter()
        quantization, _, reason = make()
        if quantization is None:
            self.job.console.say(step, reason)
            self.done.append(Fruitless(step, reason, time.perf_counter() - started))
            return None
        self.warn_of_share(step, quantization.plan)
        folder = self.folder / f"attempt{len(self.done)}"
        refused = None if self.refusal is None else self.refusal.of(self.job, quantization)
        tried = attempt(step, quantization, self.job, self.judge, folder, started, refused)
        if self.speed is not None:
            tried = replace(tried, latency=self.speed.latency(quantization.plan, rest_of(self.job.recipe)))
            self.points.append(self.seen(step, quantization.plan, tried.measured))
        self.done.append(tried)
        if self.leaves_half(tried):
            return self.attempt(f"{step}, rest fp32", lambda: Made(_without_half(quantization), True))
        return tried

    def parts(self, tried: Attempt) -> bool:
        """Whether an engine fails the gate that its own model passes on the CPU, by outputs that are
        `PARTED_DB` noisier or not finite; with a warning.

        Such an engine is the builder's doing, not quantization's: with TensorRT 8.5.3 on an H200 one of
        EfficientNet-Lite0 in INT8 and float16 classified .0025 of the images right, and its model .8925.
        """
        if tried.accuracy.passed or tried.accuracy.executor != "engine":
            return False
        expected = self.evaluation.simulated(tried.quantization)
        found, simulated = tried.accuracy.lowest_sqnr_db, expected.lowest_sqnr_db
        if not expected.passed or (tried.accuracy.outputs and found > simulated - PARTED_DB):
            return False
        seen = f"{found:.1f} dB" if tried.accuracy.outputs else "outputs that cannot be compared"
        self.job.console.warn(
            f"the engine of '{tried.step}' does not compute its model, which passes on the CPU with"
            f" {simulated:.1f} dB: the engine has {seen}. 'trtq gate MODEL model.int8.onnx --tensors"
            " tensors.json' shows where they part"
        )
        return True

    def unfixed(self, plan: Plan) -> Attempt | None:
        """A plan without the free fixes, whose graph is the user's, where they are part of calibration."""
        job = self.job
        if "fix" not in job.recipe.recover:
            return None
        name = "calibrate, no fixes"
        return self.attempt(name, lambda: Made(replace(calibrate(job, plan), ends=ends_of(job)), True))

    def leaves_half(self, tried: Attempt) -> bool:
        """Whether float16 is what the builder refuses or the gate fails for, and the recipe leaves it open;
        then on with float32.

        It is what the gate fails for where the same quantization passes with the rest in float32, or where
        float16 alone, without INT8, does not. Where the fastest engine is wanted only the latter counts:
        there may be a plan beside float16 that passes, and float32 is slower. An engine that does not compute
        its model (`parts`) counts in any case.
        """
        if self.job.recipe.rest != "auto" or self.job.recipe.precision == "fp32":
            return False
        if tried.accuracy.passed and not tried.refused:
            return False
        job, evaluation = in_float32(self.job, self.evaluation)
        judge = judging(evaluation, job.recipe.confidence, first=False)
        quantization, plan = tried.quantization, tried.quantization.plan
        bare = leave_out(quantization.graph, plan, dict.fromkeys(plan.int8_nodes, "left out to measure"))
        if tried.refused and objection(job, _without_half(quantization)) is None:
            self.refusal, found = None, "the builder refuses the model in float16 and not in float32"
        elif tried.accuracy.passed:
            return False
        elif tried.has_int8 and self.parts(tried):
            found = "with float16 beside INT8 the engine does not compute its model"
        elif self.speed is None and judge.simulated(_without_half(quantization)).passed:
            found = "in float16 the gate fails and in float32 it passes"
        elif not self.evaluation.simulated(replace(quantization, plan=bare)).passed:
            found = "float16 fails the gate without any INT8"
        else:
            return False
        self.job, self.evaluation = job, evaluation
        job.console.warn(
            f"{found}: what is not quantized stays float32 (--rest fp16 would keep it in float16)"
        )
        return True

    def fix(self, start: Attempt) -> Made:
        """The start with the label-free fixes that help and are not free."""
        recipe = self.job.recipe
        return made_once(
            self.job,
            "fix",
            start.quantization,
            lambda first: fix(self.job, first),
            method=str(recipe.method),
            rest=[recipe.precision, recipe.lower_precision],
            builder=asked(self.job),
        )

    def learn(self, start: Attempt) -> Made:
        """The start with ranges, biases and weights learned, where that is possible here."""
        try:
            return made_once(
                self.job,
                "learn",
                start.quantization,
                lambda first: learned(self.job, first),
                labels=self.job.recipe.labels,
            )
        except (InputError, MissingBackendError) as error:
            self.job.console.warn(f"nothing can be learned: {error}")
            remedy = f" ({error.remedy})" if error.remedy else ""
            return Made(None, False, f"nothing can be learned: {error.problem}{remedy}")

    def partial(self, step: str, start: Attempt) -> Made:
        """The start with the cheapest groups in floating point that let the gate pass; where none do, with
        those that come nearest."""
        recipe, evaluation = self.job.recipe, self.evaluation
        least = 0.0 if recipe.min_int8 is None else recipe.min_int8
        if start.coverage.share < least or not can_leave_out(start.quantization, least):
            return Made(None, True, f"no layer can be left out with {least:.1%} in INT8")
        entries: dict[str, Any] = {
            "evaluation": evaluation.samples.hash,
            "metric": evaluation.metric.fingerprint,
            "measured": sha256_json(start.measured.to_json()),
            "gate": [recipe.max_drop, recipe.confidence, recipe.min_sqnr, least, recipe.precision],
            **({} if self.speed is None else {"speed": self.speed.identity}),
        }
        seen = len(self.points)
        made = made_once(
            self.job, step, start.quantization, lambda _: self._searched(start, least), **entries
        )
        self._keep_front(self.job.key("front", start.quantization, step=step, **entries), seen, made.whole)
        return made

    def _keep_front(self, key: Key, seen: int, whole: bool) -> None:
        """Store the points that a search added after the first `seen`, or take those of when it ran."""
        if not (walked := self.points[seen:]):
            content = self.job.cache.fetch(key) or b"[]"
            self.points += [Point(**point) for point in json.loads(content)]
        elif whole:
            self.job.cache.store(key, json.dumps([point.to_json() for point in walked]).encode())

    def _searched(self, start: Attempt, least: float) -> Made:
        """`partial`, with a share `least` in INT8.

        How little noise is little enough is bisected with the (simulated) gate, by sets that are found
        quickly; which groups to leave out for it, the calibration data say alone. For what is enough the
        cheapest set is searched. Where no set passes, the inputs that cost no multiply-accumulates are all
        left out; and where that does not pass either, the best of all tried is taken, if it is better than
        the start.
        """
        job, recipe = self.job, self.job.recipe
        if not is_searchable(job, start.quantization):
            return Made(None, False, TOO_LONG)
        key = job.key("sensitivity", start.quantization)
        search = Search(job, start.quantization, key, speed=self.speed)
        if not search.whole:
            return Made(None, False, "the budget was spent before every layer was measured")
        if self.speed is not None:
            self.points += self.corners(search, self.speed)
        needed = partial(noise_ratio, min_sqnr=recipe.min_sqnr, confidence=recipe.confidence)
        ratio, failing, enough, best = needed(start.measured), 1.0, 0.0, None
        tried: list[tuple[Verdict, Quantization]] = []
        for _ in range(MOST_GATES):
            candidate = search.cheapest(ratio, roughly=True)
            if _too_little(candidate.plan, least):
                candidate = search.cheapest(ratio)
            verdict = None if _too_little(candidate.plan, least) else self.simulated(candidate)
            if verdict is not None and not verdict.passed:
                failing = min(ratio, max(search.left(candidate), LEAST_RATIO))
                tried.append((verdict, candidate))
            else:
                enough, best = ratio, candidate if verdict is not None else best
            if self.job.budget.over or failing == LEAST_RATIO or (enough and failing < CLOSE * enough):
                break
            if enough:
                ratio = math.sqrt(failing * enough)
            elif verdict is not None:
                ratio = max(failing * min(needed(verdict), 0.5), LEAST_RATIO)
        if best is None and search.free and not self.job.budget.over:
            candidate = search.leaving_out(search.free)
            verdict = self.simulated(candidate)
            best = candidate if verdict.passed else None
            tried.append((verdict, candidate))
        elif best is not None and self.speed is None:
            best = self._refined(search, enough, best)
        whole = not self.job.budget.over
        return Made(best, whole) if best is not None else _nearest(tried, start, least, whole)

    def _refined(self, search: Search, ratio: float, rough: Quantization) -> Quantization:
        """A cheaper set than a rough one that passes: with `ratio` of the noise if it passes, too, else with
        less, down to what the rough one leaves."""
        least = search.left(rough)
        for _ in range(MOST_REFINED):
            if self.job.budget.over:
                break
            candidate = search.cheapest(ratio)
            if search.price(candidate) >= search.price(rough):
                break
            if self.simulated(candidate).passed:
                return candidate
            if ratio <= least:
                break
            ratio = max(ratio / CLOSE, least)
        return rough

    def corners(self, search: Search, speed: Speed) -> list[Point]:
        """The front with INT8 that a search has walked, by what groups do alone; nothing of it was gated."""
        rest = rest_of(self.job.recipe)
        return [
            replace(
                speed.point(f"{len(corner.left_out)} left out, estimated", quantization.plan, rest),
                estimated_sqnr_db=noise_db(corner.noise) if corner.noise > 0 else None,
            )
            for corner, quantization in search.front()
            if quantization.plan.int8_nodes
        ]

    def frugal(self, made: Made) -> Made:
        """What partial quantization made; set aside for the time being where it gives away more than the
        recipe's limit and learning may do better."""
        limit = self.job.recipe.partial_limit
        if made.quantization is None or "learn" not in self.steps or self.job.budget.over:
            return made
        if (share := given_away(made.quantization.plan)) <= limit:
            return made
        self.set_aside = made.quantization
        return Made(
            None,
            made.whole,
            f"set aside: it would give away {share:.1%} of the multiply-accumulates, more than"
            f" --partial-limit {limit:.0%}; 'learn' is tried first",
        )

    def warn_of_share(self, step: str, plan: Plan) -> None:
        """Warn of a plan that gives away more than the recipe's limit."""
        share, limit = given_away(plan), self.job.recipe.partial_limit
        if share > limit:
            self.job.console.warn(
                f"'{step}' gives away {share:.1%} of the multiply-accumulates to floating point, more than"
                f" --partial-limit {limit:.0%}: there is little left for INT8 to speed up; look at the layers"
                " that were left out, or set --min-int8"
            )

    def simulated(self, candidate: Quantization) -> Verdict:
        """What the gate says of a candidate on the CPU."""
        verdict = self.judge.simulated(candidate)
        noise = ", ".join(f"{output.sqnr_db:.1f} dB" for output in verdict.outputs.values())
        left = len(candidate.notes["left_out"])
        self.job.console.say("gate", f"{left} left out: {verdict.headline()}, {noise}")
        if self.speed is not None:
            self.points.append(self.seen(f"{left} left out", candidate.plan, verdict))
        return verdict

    def race(self, speed: Speed) -> None:
        """Let the engines that pass run against each other on the GPU here, where they run: those with INT8,
        the one with all of it if it is said to be about as fast, and the one in floating point."""
        if self.job.budget.over or not any(t.accuracy.executor == "engine" for t in self.attempts):
            return
        rest = rest_of(self.job.recipe)
        best = min(point.microseconds for point in self.points)
        every = speed.latency(speed.plan, rest).microseconds
        if every <= ABOUT * best and all(
            t.quantization.plan.edges != speed.plan.edges for t in self.attempts
        ):
            job, ends = self.job, ends_of(self.job)
            self.attempt("every layer", lambda: Made(replace(calibrated(job, speed.plan), ends=ends), True))
        if all(tried.has_int8 for tried in self.attempts):
            self.attempt(*self.without_int8())
        passing = [tried for tried in self.attempts if tried.measured.passed and tried.build is not None]
        if len(passing) < 2:
            return
        timed = {t.step: t for t in raced(passing, self.job.recipe.plugin_lib, self.job.console)}
        self.done = [timed.get(tried.step, tried) for tried in self.done]
        latencies = {step: tried.latency for step, tried in timed.items()}
        self.points = [point.timed(latencies.get(point.name)) for point in self.points]
        winner = best_of(list(timed.values()))
        if not winner.has_int8:
            self.job.console.warn(
                f"INT8 does not pay on this model and card: '{winner.step}' is the fastest engine that passes"
            )

    def seen(self, name: str, plan: Plan, verdict: Verdict) -> Point:
        """Where a plan lies between speed and accuracy, by the gate's figures."""
        assert self.speed is not None
        return replace(
            self.speed.point(name, plan, rest_of(self.job.recipe)),
            sqnr_db=verdict.lowest_sqnr_db if verdict.outputs else None,
            relative_drop=verdict.relative_drop,
            passed=verdict.passed,
        )


def _without_half(quantization: Quantization) -> Quantization:
    """The same for a rest in float32, of which no node has to be kept."""
    return replace(quantization, plan=replace(quantization.plan, float32=[]))


def _too_little(plan: Plan, least: float) -> bool:
    """Whether nothing, or less than the share `least`, is left in INT8."""
    share = plan.mac_share()
    return not plan.int8_nodes or (share is not None and share < least)


def _nearest(tried: list[tuple[Verdict, Quantization]], start: Attempt, least: float, whole: bool) -> Made:
    """The best of the sets that do not pass, if it is better than the start; what it reaches in any case."""
    limits = f" with {least:.1%} in INT8" if least else ""
    reason = f"no set of layers{limits} brings the outputs close enough"
    if not tried:
        return Made(None, whole, reason)
    verdict, nearest = max(tried, key=lambda item: item[0].rank)
    drop = "outputs that are not finite"
    if verdict.relative_drop is not None:
        drop = f"a drop of {verdict.relative_drop:.1%} and {verdict.lowest_sqnr_db:.1f} dB"
    reason += f"; the best tried, {len(nearest.notes['left_out'])} left out, reaches {drop}"
    if verdict.rank <= start.measured.rank:
        return Made(None, whole, f"{reason}, which is no better than '{start.step}'")
    return Made(nearest.with_remark(reason), whole)
