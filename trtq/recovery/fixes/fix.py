"""Label-free fixes: what helps on the rows held back is kept.

A pass changes the float graph without changing its function, so that its activations quantize better; the
ranges of what it changed are then measured again. The bias correction makes up for the mean error that is
left. It comes last, since it belongs to the ranges it was measured with, and every pass is judged with it:
what a pass gains is often no more than a mean error that a bias takes away for nothing. So is the rounding of
weights, which changes neither the float graph nor a scale. Both are judged without them, too: the mean error
may be that of a few positions, such as tokens that are outliers, or of padding, and no error of the others.

These put no operator into the engine: they are part of calibration (`calibrated`). Scales and zero-points
that are inserted where none can be folded do (`affine`): they are a step of the workflow, for what does not
pass without them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from trtq.cache import Key
from trtq.calibration.calibrate import (
    CUT_SHORT,
    MOST_HELD_BACK,
    NEVER_SEEN,
    FloatGraph,
    Ranges,
    best_method,
    calibrate,
    effort_of,
    held_back,
    is_calibrated,
    keep_statistics,
    least_gain_db,
    ranged,
    serves,
    with_float32_nodes,
    with_own_ranges,
)
from trtq.calibration.effort import LEFT_OUT, TOO_LONG, Effort
from trtq.calibration.methods import AUTO, Method, parse_method
from trtq.calibration.refine import noise_shares, rows_of_search
from trtq.calibration.search import CANDIDATES, Choice, Rows, choose_method
from trtq.console import SILENT
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.graph.weights import graph_sha256
from trtq.job import Job
from trtq.recovery.fixes.affine import insert_affine, is_affordable
from trtq.recovery.fixes.bias import MeanInputs, correct_biases, mean_inputs
from trtq.recovery.fixes.channels import Changed
from trtq.recovery.fixes.rounding import round_weights
from trtq.recovery.fixes.shift import shift
from trtq.recovery.fixes.smooth import smooth
from trtq.recovery.made import Made


class Pass(NamedTuple):
    """A free change of the float graph that leaves its function as it is.

    Attributes:
        name: in notes and reports.
        change: from (graph, plan, samples) to another graph with the same names; None where it has nothing to
            do.
    """

    name: str
    change: Callable[..., Changed | None]


PASSES = (Pass("shift", shift), Pass("smooth", smooth))
"""In the order in which they are tried."""

AFFINE, ROUNDING, BIAS = "affine", "rounding", "bias"
"""What inserted operators, the rounding of weights and the bias correction are called beside the passes."""

JUDGED_MACS, JUDGED_ROWS = 1e10, (32, 256)
"""Multiply-accumulates of the rows that biases are corrected and weights rounded on to judge what is tried,
and the fewest and most of these rows; biases that are kept are corrected on twice as many. EfficientNet-Lite0
reaches 22.2 dB with those of 32 rows, 22.1 with 64 and with 100."""

CLOSE_DB, MOST_METHODS = 1.0, 3
"""With `auto`, biases are corrected with so many methods that are so close to the best. Where they gain more
than this, nothing more is judged without them."""

AS_CALIBRATED = "as calibrated"

FIXES, FIXES_DB, HELD_BACK_DB = "fixes", "fixes_sqnr_db", "held_back_sqnr_db"
"""Notes of a quantization: what fixed it, and on the rows held back the SQNR of all that was tried, and that
of the outputs with what was kept."""


def calibrated(job: Job, plan: Plan) -> Quantization:
    """The plan's tensors with ranges by the recipe's method, and the free fixes that help unless the recipe
    turns them off; from the cache where they are there.

    The method comes first, then the fixes, then with `auto` the ranges that tensors have of their own: a
    search for those would otherwise go after mean errors that a bias takes away for nothing.

    Raises:
        InputError: as `calibrate`.
    """
    if "fix" not in job.recipe.recover:
        return calibrate(job, plan)
    bare = Quantization(job.model.graph, plan, {})
    if (known := _known(job, plan)) is not None:
        made = _on_graph_of(job, known)
        ranged(job, bare, made.notes.get(NEVER_SEEN, {}))
        job.console.say("calibration", f"{made.notes['method']}, from the cache; nothing was run")
    else:
        work = _Work.of(job, plan)
        if not work.fits_any():
            work.effort.say(job.console)
            made = calibrate(job, plan)
            left_out = [*work.effort.left_out, *made.notes.get(LEFT_OUT, [])]
            return replace(made, notes={**made.notes, LEFT_OUT: left_out})
        started = time.perf_counter()
        ranges = Ranges.of(job, plan, FloatGraph.of(job.model))
        try:
            rows = held_back(job)
            found = _improved(job, ranges, best_method(job, ranges, rows), rows, work)
            made = _finished(job, found, rows, work.effort)
        except InputError as error:
            if job.recipe.method == AUTO:
                raise
            job.console.warn(f"no fix is tried, since nothing tells what helps: {error.problem}")
            return calibrate(job, plan)
        seconds, plain = time.perf_counter() - started, rows.seconds * len(job.data)
        job.console.say("calibration", f"{seconds:.1f} s, as long as {seconds / plain:.0f} plain passes")
        work.effort.say(job.console)
        if CUT_SHORT not in made.notes and made.storable:
            job.cache.store(_key(job, plan), made.to_bytes())
    return with_float32_nodes(job, made)


def is_made(job: Job, plan: Plan) -> bool:
    """Whether the cache has what `calibrated` returns, so that it runs nothing."""
    if "fix" not in job.recipe.recover:
        return is_calibrated(job, plan)
    fixed = _Work.of(job, plan).fits_any()
    return _known(job, plan) is not None if fixed else is_calibrated(job, plan)


def fix(job: Job, start: Quantization) -> Made:
    """What `calibrated` gives, with scales and zero-points inserted where none can be folded, as far as the
    engine gains no kernel; weights are then rounded and biases corrected again, if that helps.

    Returns:
        nothing where that does not help on the rows held back, and what was tried.
    """
    if not is_affordable(job, start):
        return Made(None, False, TOO_LONG)
    before = str(start.notes.get(FIXES, AS_CALIBRATED))
    changed = None if job.budget.over else insert_affine(job, start)
    if changed is None:
        return Made(None, not job.budget.over, "no place was found where inserted operators help")
    names = [name for name in before.split(" + ") if name not in (AS_CALIBRATED, ROUNDING, BIAS)]
    names.append(AFFINE)
    bare = replace(changed, corrections={}, codes={})
    rounded = round_weights(bare, _judged(job, bare.plan), workers=job.recipe.threads)
    means, made = mean_inputs([bare], job.data, SILENT, workers=job.recipe.threads), {before: start}
    if not start.corrections:
        made[" + ".join([*names, ROUNDING] if changed.codes else names)] = changed
    for own, variant in ((BIAS, bare), (f"{ROUNDING} + {BIAS}", rounded)):
        made[" + ".join([*names, own])] = means.corrected(variant)
    rows = held_back(job)
    tried = {name: rows.sqnr_db(q, job.console, name) for name, q in made.items()}
    after = max(tried, key=lambda name: tried[name])
    text = ", ".join(f"{name} {value:.1f} dB" for name, value in tried.items())
    job.console.say("fixes", text)
    if tried[after] < tried[before] + least_gain_db(len(rows.samples)):
        return Made(None, not job.budget.over, f"nothing helped: {text}")
    corrected = made[after]
    notes = {**corrected.notes, FIXES: after, FIXES_DB: {**start.notes.get(FIXES_DB, {}), **tried}}
    return Made(replace(corrected, notes=notes), not job.budget.over)


def changed_weights(notes: Mapping[str, Any]) -> list[str]:
    """What changed the weights that a table's ranges were measured with, by its notes.

    Corrected biases and codes change no range.
    """
    passes = [name for name in str(notes.get(FIXES, "")).split(" + ") if name not in ("", BIAS, ROUNDING)]
    return [*passes, *(step for step in ("learned",) if step in notes)]


def beside_the_table(notes: Mapping[str, Any]) -> list[str]:
    """What a job made that its table, with these notes, cannot hold: it changes no range."""
    names = str(notes.get(FIXES, "")).split(" + ")
    return [
        text for name, text in ((ROUNDING, "rounded weights"), (BIAS, "corrected biases")) if name in names
    ]


def _key(job: Job, plan: Plan) -> Key:
    bare = Quantization(job.model.graph, plan, {})
    return job.key("quantization", bare, step="calibrated", method=str(job.recipe.method))


def _known(job: Job, plan: Plan) -> Quantization | None:
    """What the cache has of `calibrated`."""
    if (content := job.cache.fetch(_key(job, plan))) is None:
        return None
    made = Quantization.from_bytes(content)
    return made if serves(job, made.notes) else None


def _on_graph_of(job: Job, made: Quantization) -> Quantization:
    """The same on the model's own graph, if its graph is equal to that."""
    same = graph_sha256(made.graph) == graph_sha256(job.model.graph)
    return replace(made, graph=job.model.graph) if same else made


@dataclass(frozen=True)
class _Work:
    """What the fixes take of what calibration may take.

    Attributes:
        fitting, held: rows to fit on, and rows held back to score on.
        judged: rows that biases are corrected on to judge.
    """

    effort: Effort
    plan: Plan
    fitting: int
    held: int
    judged: int

    @classmethod
    def of(cls, job: Job, plan: Plan) -> _Work:
        fitting, held = (len(part) for part in job.parts)
        return cls(effort_of(job, plan), plan, fitting, min(held, MOST_HELD_BACK), _rows_to_judge(job, plan))

    def fits_any(self) -> bool:
        """Whether one fix fits, with what it is compared with, and with the biases corrected at the end."""
        e = self.effort
        parts = [e.plain(self.held), e.quantized(self.held), e.corrected(self.judged), e.quantized(self.held)]
        return e.takes("fixes", *parts, e.corrected(2 * self.judged))

    def fits_choice(self) -> bool:
        """Whether all methods can be compared again."""
        return self.effort.takes("methods again", len(CANDIDATES) * self.effort.quantized(self.held))

    def fits(self, what: Method | Pass | None, label: str, *, first: bool) -> bool:
        """Whether a step fits; the first one, which `fits_any` counted, does."""
        e = self.effort
        parts = [e.quantized(self.held)]
        if isinstance(what, Pass):  # channels, statistics of both parts
            parts += [e.corrected(self.judged), e.plain(0), e.plain(self.fitting), e.plain(self.held)]
        elif what is None:  # moments, and codes for each layer
            parts += [e.plain(self.judged)]
        return first or e.takes(label, *parts)

    def fits_shares(self) -> bool:
        """Whether passes can be told what each tensor alone adds to the noise."""
        rows, _ = rows_of_search(self.plan, self.fitting)
        return self.effort.takes("the noise of each tensor alone", self.effort.alone(rows))


@dataclass(frozen=True)
class _Improved:
    """What passes did to a graph.

    Attributes:
        quantization: with those that help, and ranges from the rows to fit on.
        ranges: of its graph.
        choice: the method of these ranges.
        names: what helps: passes in their order, then rounding and the bias correction.
        sqnr_db: on the rows held back.
        tried: SQNR in dB on the rows held back of everything that was tried.
        shares: tensor -> its part of the noise; None where no pass asked for it.
        whole: False where the budget was spent before everything was.
    """

    quantization: Quantization
    ranges: Ranges
    choice: Choice
    names: tuple[str, ...]
    sqnr_db: float
    tried: Mapping[str, float]
    shares: Mapping[str, float] | None
    whole: bool

    def text(self) -> str:
        """What was tried, the best first."""
        ranked = sorted(self.tried.items(), key=lambda item: -item[1])
        return ", ".join(f"{label} {value:.1f} dB" for label, value in ranked)


def _improved(job: Job, ranges: Ranges, choice: Choice, rows: Rows, work: _Work) -> _Improved:
    """The passes that help on the rows held back, one on top of the other, each with biases corrected, and
    without where these gain little.

    Biases come first, with each method that they may make the best one: what is left of the noise behind them
    is another than what the methods were compared by. Where passes do as well without them, the methods are
    compared again on the graph that these made: on MiniLM, where few channels are far larger than all others,
    percentile:99.999 is 0.5 dB behind mse, and 0.7 dB better once these are scaled down. Steps that are too
    much work are left out.
    """
    started, tried, whole = time.perf_counter(), dict[str, float](), True
    judged = _judged(job, ranges.bare.plan)
    method, names, kept = choice.method, tuple[str, ...](), ranges.fitted(choice.method)
    best = choice.sqnr_db.get(str(method), math.nan)
    if math.isnan(best):
        best = rows.sqnr_db(kept, job.console, AS_CALIBRATED)
    tried[AS_CALIBRATED], least = best, least_gain_db(len(rows.samples))
    methods = _contenders(choice)
    steps: list[Method | Pass | None] = [*methods, *PASSES, None]
    means: MeanInputs | None = None  # what layers of `kept` read
    shares: Mapping[str, float] | None = None
    measured = False

    def measured_means(*quantizations: Quantization) -> MeanInputs:
        return mean_inputs(quantizations, judged, SILENT, workers=job.recipe.threads)

    for what in steps:
        if job.budget.over:
            job.console.warn("the budget was spent before every fix was tried")
            whole = False
            break
        if not work.fits(what, _named(what), first=what is steps[0]):
            continue
        if what is None and job.recipe.method == AUTO:
            passes = tuple(name for name in names if name != BIAS)
            unbiased = tried.get(" + ".join(passes), -math.inf)
            if unbiased >= best - least and work.fits_choice():
                again = choose_method(rows, ranges.bare, ranges.fitting, job.console, job.budget)
                tried |= {" + ".join((name, *passes)): db for name, db in again.sqnr_db.items()}
                if (reached := again.sqnr_db[str(again.method)]) >= best + least:
                    kept, names, best, method = ranges.fitted(again.method), passes, reached, again.method
                    means = None
        wanted, other = tuple(name for name in names if name not in (BIAS, ROUNDING)), None
        if isinstance(what, Method):
            changed = ranges.fitted(what)
            means = means or measured_means(*map(ranges.fitted, methods))  # one pass is enough for all
            read = means
        elif isinstance(what, Pass):
            if not measured:
                shares, measured = _shares(job, kept) if work.fits_shares() else None, True
            other = _changed(job, ranges, what, shares)
            if other is None:
                continue
            changed, wanted = other.fitted(method), (*wanted, what.name)
            read = measured_means(changed)
        else:
            changed = replace(kept, corrections={})
            rounded = round_weights(changed, judged, workers=job.recipe.threads)
            if rounded is changed:
                continue
            changed, wanted = rounded, (*wanted, ROUNDING)
            read = means or measured_means(changed)
        corrected = read.corrected(changed)
        variants = {} if corrected is changed else {(*wanted, BIAS): corrected}
        if wanted and not (BIAS in names and best > tried[AS_CALIBRATED] + CLOSE_DB):
            variants[wanted] = changed
        for own, variant in variants.items():
            label = " + ".join((str(what), *own) if isinstance(what, Method) else own)
            tried[label] = rows.sqnr_db(variant, job.console, label)
            if tried[label] >= best + least:
                kept, names, best = variant, own, tried[label]
                method = what if isinstance(what, Method) else method
                ranges = ranges if other is None else other
                means = read
    found = _Improved(kept, ranges, replace(choice, method=method), names, best, tried, shares, whole)
    seconds = time.perf_counter() - started
    job.console.say("fixes", f"{found.text()}, on {len(rows.samples)} rows held back in {seconds:.1f} s")
    return found


def _judged(job: Job, plan: Plan) -> Samples:
    """Rows to fit on that are enough to judge by."""
    return job.parts[0].spread(_rows_to_judge(job, plan))


def _rows_to_judge(job: Job, plan: Plan) -> int:
    return min(plan.rows_within(JUDGED_MACS, *JUDGED_ROWS), len(job.parts[0]))


def _corrected(job: Job, made: Quantization) -> Quantization:
    """A quantization that is kept, with its biases corrected."""
    samples = job.data.spread(2 * _rows_to_judge(job, made.plan))
    return correct_biases(made, samples, SILENT, workers=job.recipe.threads)


def _named(what: Method | Pass | None) -> str:
    """A step of `_improved`, for messages."""
    if isinstance(what, Pass):
        return what.name
    return ROUNDING if what is None else f"{what} + {BIAS}"


def _contenders(choice: Choice) -> list[Method]:
    """The method that was chosen, and those close behind it."""
    least = max(choice.sqnr_db.values(), default=0.0) - CLOSE_DB
    ranked = sorted(choice.sqnr_db, key=lambda name: -choice.sqnr_db[name])
    others = [name for name in ranked if choice.sqnr_db[name] >= least and name != str(choice.method)]
    return [choice.method, *map(parse_method, others[: MOST_METHODS - 1])]


def _shares(job: Job, start: Quantization) -> Mapping[str, float]:
    """Tensor -> its part of the noise that all make alone."""
    return noise_shares(
        start,
        job.parts[0],
        job.console,
        workers=job.recipe.threads,
        ignore_nonfinite=job.recipe.ignore_nonfinite,
        budget=job.budget,
    )


def _changed(job: Job, ranges: Ranges, change: Pass, shares: Mapping[str, float] | None) -> Ranges | None:
    """Ranges of their graph changed by a pass; None where the pass has nothing to do, where what it changes
    makes too little of the noise to matter, or where no node is left in INT8."""
    plan, workers = ranges.bare.plan, job.recipe.threads
    made = change.change(ranges.bare.graph, plan, job.parts[0], workers=workers, shares=shares)
    if made is None:
        return None
    changed = ranges.of_changed(job, FloatGraph.of_graph(job.model, made.graph), made.plan, made.tensors)
    return changed if changed.bare.plan.int8_nodes else None


def _finished(job: Job, found: _Improved, rows: Rows, effort: Effort) -> Quantization:
    """What helps, with its own ranges found and its biases corrected."""
    if found.ranges.bare.graph is not job.model.graph:
        keep_statistics(job, found.ranges)
    start = replace(found.quantization, notes=found.ranges.bare.notes)
    made = with_own_ranges(job, found.ranges, start, found.choice, rows, found.sqnr_db, effort, found.shares)
    if BIAS in found.names:
        made = _corrected(job, made)
    notes = {**made.notes, "held_back": len(rows.samples), FIXES_DB: dict(found.tried)}
    notes |= {FIXES: " + ".join(found.names)} if found.names else {}
    notes |= {HELD_BACK_DB: found.sqnr_db} if rows.tensors is None else {}
    notes |= {} if found.whole else {CUT_SHORT: True}
    return replace(made, notes=notes)
