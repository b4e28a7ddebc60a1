"""Reaching the verdict: what both models gave on the same samples, scored, compared and judged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtq.data.batches import Arrays
from trtq.errors import InputError
from trtq.gate import intervals
from trtq.gate.metrics import Metric, NotFiniteScoreError, Scored, rows_per_sample
from trtq.gate.resampling import QUIETLY, Resampling
from trtq.gate.verdict import REPORTED_CONFIDENCE, Outcome, Verdict, percent
from trtq.simulation import finite, similarity
from trtq.simulation.outputs import Executor
from trtq.simulation.similarity import Similarity
from trtq.simulation.values import AllValues, take_all

UNREPEATED, RELATIVE_ROUNDING = 0.01, 1e-6
"""Parts of the margin, and of the metric, by which two calls of a user's function for the same outputs may
differ: on a GPU sums come in another order."""


def decide(
    reference: AllValues,
    candidate: AllValues,
    targets: Arrays,
    metric: Metric,
    *,
    max_drop: float = 0.01,
    confidence: float | None = None,
    executor: Executor,
    ignore_nonfinite: bool = False,
    scored: Scored | None = None,
    resampling: Resampling | None = QUIETLY,
    sequences: Sequence[int] = (),
) -> Verdict:
    """The verdict on a candidate, from both models' outputs on the same samples.

    Without `confidence` the point estimate decides (the paper's criterion). With it, pass and fail
    each have to be proved at that one-sided level; else the verdict is inconclusive. A candidate
    whose outputs are NaN or infinite anywhere fails.

    A label-free metric cannot compare samples of which the candidate gives another shape. They count as not
    at all alike, and where the gate fails by that alone, it is inconclusive.

    Args:
        reference, candidate: output name -> values, rows first, in the same order.
        targets: target name -> array, samples first; empty for a label-free metric.
        max_drop: the allowed relative drop, 0 to 1.
        confidence: 0.5 to 1, exclusive, or None.
        ignore_nonfinite: compare only where the reference is finite; the candidate has to be finite there.
        scored: what `score_reference` says, where it is known.
        resampling: of a metric that is a function of all samples; None: such a verdict has no interval.
        sequences: the first row of each sequence of rows, ascending from 0; none: each row is independent.

    Raises:
        InputError: outputs that cannot be compared or scored, or a margin that means nothing: a
            reference that scores 0 or less, or `sqnr`, whose decibels have no relative drop; or a user's
            function that gives another number when it is called again.
    """
    if not 0 <= max_drop < 1:
        raise InputError(f"the allowed drop must be between 0 and 1, not {max_drop}")
    if confidence is not None and not 0.5 < confidence < 1:
        raise InputError(f"the confidence must be between 0.5 and 1, not {confidence}")
    similarity.check_comparable(reference, candidate, ignore_nonfinite=ignore_nonfinite)
    scored = scored or score_reference(reference, targets, metric)
    candidate = finite.with_references(reference, candidate)
    samples, k = rows_per_sample(reference, targets)
    verdict = _unmeasured(metric, scored.value, max_drop, confidence, samples, executor)
    if (broken := finite.first_not_finite(candidate, reference)) is not None:
        name, row = broken
        note = f"output {name!r} of the candidate is NaN or infinite in sample {row // k}"
        return dataclasses.replace(verdict, worst_samples=(row // k,), notes=(note,))
    units = _units(sequences, samples, k)
    gate = _Gate(reference, candidate, targets, metric, scored, max_drop, confidence, resampling, units)
    plain = finite.all_compared(reference, candidate)
    outputs = similarity.compare(*plain)
    try:
        found = metric.scored(candidate, targets, reference)
    except NotFiniteScoreError as error:
        worst = similarity.worst_samples(*plain, samples)
        note = f"{metric.name} of the candidate is no number: {error.cause}"
        return dataclasses.replace(verdict, outputs=outputs, worst_samples=worst, notes=(note,))
    _check_repeats(metric, reference, targets, scored, max_drop)
    best = gate.at_best(found, outputs.values())
    evidence = gate.evidence(found, best)
    return dataclasses.replace(
        verdict,
        gate=gate.outcome(found, best, evidence),
        candidate=found.value,
        relative_drop=1 - found.value / scored.value,
        absolute_drop=scored.value - found.value,
        relative_interval=evidence.relative,
        absolute_interval=evidence.absolute,
        proved=evidence.proved,
        samples_to_prove=evidence.samples_to_prove,
        outputs=outputs,
        worst_samples=similarity.worst_samples(*plain, samples),
        notes=(
            *_evidence_notes(evidence, samples, max_drop, gate.level, found),
            *(_sequence_note(units, evidence) if sequences else ()),
            *((metric.reads(reference, targets),) if metric.reads else ()),
            *finite.ignored(reference),
            *_not_compared(outputs, reference, metric),
        ),
        draws=evidence.draws,
    )


@dataclass(frozen=True)
class _Gate:
    """What both models gave and how it is judged; the arguments are those of `decide`."""

    reference: AllValues
    candidate: AllValues
    targets: Arrays
    metric: Metric
    scored: Scored
    max_drop: float
    confidence: float | None
    resampling: Resampling | None
    units: intervals.Units

    @property
    def level(self) -> float:
        """Of the intervals."""
        return self.confidence or REPORTED_CONFIDENCE

    def margin(self, found: Scored) -> float:
        """How far the candidate's value is above the least that is allowed."""
        return found.value - (1 - self.max_drop) * self.scored.value

    def at_best(self, found: Scored, outputs: Iterable[Similarity]) -> Scored:
        """What the candidate would score if what cannot be compared were like the reference."""
        if self.metric.at_best is None or all(item.not_compared == 0 for item in outputs):
            return found
        hopeful = dataclasses.replace(self.metric, rows=self.metric.at_best)
        return hopeful.scored(self.candidate, self.targets, self.reference)

    def outcome(self, found: Scored, best: Scored, evidence: intervals.Evidence) -> Outcome:
        """What the gate says: by the evidence where a confidence was asked for, else by the values, of which
        the lower one has to pass and the higher one to fail.

        Args:
            found, best: with what cannot be compared at worst, and at best.
        """
        if self.confidence is not None:
            passed, failed = evidence.proved, evidence.refuted
        else:
            # The tolerance is for a drop that is exactly the margin but for rounding.
            passed, failed = self.margin(found) >= -1e-12, not self.margin(best) >= -1e-12
        return Outcome.PASS if passed else Outcome.FAIL if failed else Outcome.INCONCLUSIVE

    def evidence(self, found: Scored, best: Scored) -> intervals.Evidence:
        """What the samples say of the drop, whatever is true of what cannot be compared."""
        worst = self._evidence(found)
        if best is found:
            return worst
        hopeful = self._evidence(best)
        relative, absolute = (
            None if low is None or high is None else (low[0], high[1])
            for low, high in (
                (hopeful.relative, worst.relative),
                (hopeful.absolute, worst.absolute),
            )
        )
        return dataclasses.replace(worst, relative=relative, absolute=absolute, refuted=hopeful.refuted)

    def _evidence(self, found: Scored) -> intervals.Evidence:
        """What the samples say of the drop, by the method that suits the metric."""
        metric, rows = self.metric, [self.scored.rows, found.rows]
        units = self.units
        scores = [own for own in rows if own is not None]
        called = len(scores) < 2
        if called:
            values = self._resampled(found)
        elif metric.summarise is None and metric.needs_targets and self._counted(scores):
            return intervals.binary_evidence(scores[0], scores[1], self.max_drop, self.level, units.worth)
        else:
            means = intervals.bootstrap_means(units, *(own.reshape(units.samples, -1) for own in scores))
            values = [
                mean[:, 0] if metric.summarise is None else metric.summarise(mean.reshape(-1, *own.shape[1:]))
                for own, mean in zip(scores, means, strict=True)
            ]
        evidence = intervals.bootstrap_evidence(
            values[0], values[1], self.margin(found), units, self.max_drop, self.level
        )
        return dataclasses.replace(evidence, draws=len(values[0]) if called else None)

    def _counted(self, scores: list[NDArray[np.float64]]) -> bool:
        """Whether scores are right or wrong and are counted; of sequences, where few show a difference."""
        if not np.isin(scores, (0, 1)).all():
            return False
        differ = self.units.sums((scores[0] != scores[1]).astype(np.float64)[:, None])
        few = int(np.count_nonzero(differ)) < intervals.MIN_BOOTSTRAP_SAMPLES
        return few or self.units.count == self.units.samples

    def _resampled(self, found: Scored) -> list[NDArray[np.float64]]:
        """The metric's values of both models on resamples; none where none are wanted."""
        _, k = rows_per_sample(self.reference, self.targets)

        def on_units(drawn: NDArray[np.int64]) -> tuple[float, float]:
            indices = self.units.members(drawn)
            rows = (k * indices[:, None] + np.arange(k)).ravel()
            targets = {name: array[indices] for name, array in self.targets.items()}
            reference, candidate = (take_all(side, rows) for side in (self.reference, self.candidate))
            try:
                return self.metric.value(reference, targets), self.metric.value(candidate, targets)
            except InputError:  # it scored all samples; such as a curve that needs both classes
                return math.nan, math.nan

        if self.resampling is None:
            return [np.empty(0), np.empty(0)]
        return list(self.resampling.draws(self.units.count, on_units, self.scored.seconds + found.seconds))


def _units(sequences: Sequence[int], samples: int, k: int) -> intervals.Units:
    """What is independent: samples of k rows; with the first rows of sequences, those. A sample that lies in
    two of them makes one of the two."""
    starts = tuple(row // k for row in sequences if row % k == 0)
    return intervals.Units(starts, samples) if starts else intervals.Units.each(samples)


def _sequence_note(units: intervals.Units, evidence: intervals.Evidence) -> Iterator[str]:
    """How many sequences the samples are, and what that makes of the interval."""
    yield (
        f"the {units.samples} samples are {units.count} sequences, and these are what the interval takes as"
        " independent" + ("; one alone gives none" if units.count == 1 and not evidence.relative else "")
    )


def _unmeasured(
    metric: Metric,
    reference: float,
    max_drop: float,
    confidence: float | None,
    samples: int,
    executor: Executor,
) -> Verdict:
    """The verdict on a candidate whose outputs cannot be measured: a fail."""
    return Verdict(
        gate=Outcome.FAIL,
        metric=metric.name,
        reference=reference,
        candidate=None,
        relative_drop=None,
        absolute_drop=None,
        max_drop=max_drop,
        relative_interval=None,
        absolute_interval=None,
        confidence=confidence,
        proved=False,
        samples=samples,
        samples_to_prove=None,
        executor=executor,
        outputs={},
        worst_samples=(),
    )


def score_reference(reference: AllValues, targets: Arrays, metric: Metric) -> Scored:
    """The reference's value of the metric, which a relative drop is measured from.

    Raises:
        InputError: the outputs or targets do not suit the metric, the reference scores 0 or less, or the
            metric is `sqnr`, whose decibels have no relative drop.
    """
    check_decides(metric)
    scored = metric.scored(reference, targets, reference)
    if not scored.value > 0:
        raise InputError(
            f"the reference scores {scored.value:g} in {metric.name}",
            cause="a relative drop needs a reference above 0",
            remedy="check labels and preprocessing, or use a metric whose good values are positive",
        )
    return scored


def _check_repeats(
    metric: Metric, reference: AllValues, targets: Arrays, scored: Scored, max_drop: float
) -> None:
    """Refuse a user's function that does not give the reference's number again, now that it has seen the
    candidate's outputs: one that adds up over its calls, or draws at random.

    Raises:
        InputError: it gives another one.
    """
    if metric.function is None:
        return
    again = metric.value(reference, targets)
    if abs(again - scored.value) > max(UNREPEATED * max_drop, RELATIVE_ROUNDING) * abs(scored.value):
        raise InputError(
            f"the metric {metric.name!r} gave {scored.value:.6g} for the reference, and then {again:.6g}",
            cause="a drop between two models means nothing where one model alone gets two numbers",
            remedy="let the function depend on its arguments only: start from an empty state at each call"
            " (as 'reset()' of torchmetrics does), and draw no random numbers or always the same",
        )


def check_decides(metric: Metric) -> None:
    """Refuse a metric that has no relative drop.

    Raises:
        InputError: it is `sqnr`.
    """
    if metric.name.partition("@")[0] == "sqnr":
        raise InputError(
            "sqnr cannot decide: a relative drop of decibels means nothing",
            remedy="use cosine or a metric with labels; the SQNR is reported with every verdict",
        )


def _evidence_notes(
    evidence: intervals.Evidence, samples: int, max_drop: float, confidence: float, found: Scored
) -> Iterator[str]:
    """What the samples prove, and on how many resamples that rests where there was no time for all."""
    if evidence.relative is not None:
        yield _note(evidence, samples, max_drop, confidence)
    if evidence.unusable:
        total = evidence.draws or intervals.RESAMPLES
        yield f"the metric cannot score {evidence.unusable} of {total} resamples: they are left out"
    if evidence.draws is None or evidence.draws == intervals.RESAMPLES_OF_FUNCTION:
        return
    drawn = f"{evidence.draws} resamples were drawn" if evidence.draws else "no interval was resampled"
    yield (
        f"one call of the metric takes {found.seconds:.2g} s: {drawn}, {intervals.RESAMPLES_OF_FUNCTION} are"
        " usual; a function that returns one value for each sample needs none"
    )


def _not_compared(outputs: Mapping[str, Similarity], reference: AllValues, metric: Metric) -> Iterator[str]:
    """A sentence on the outputs of which the candidate gives rows of another shape, for each number of them,
    and one on what a label-free metric makes of such outputs."""
    for count in dict.fromkeys(item.not_compared for item in outputs.values() if item.not_compared):
        names = [name for name, item in outputs.items() if item.not_compared == count]
        yield (
            f"output {', '.join(map(repr, names))}: {count} of {len(reference[names[0]])} rows have another"
            " shape in the candidate, as behind what selects (NonMaxSuppression, NonZero), and cannot be"
            " compared"
        )
    apart = [name for name, item in outputs.items() if item.not_compared]
    if apart and metric.at_best is not None:
        yield (
            f"{metric.name} compares {', '.join(apart)} entry by entry: boxes that change places are noise,"
            " and rows of another shape are not alike at all; --metric detections matches boxes"
        )


def _note(evidence: intervals.Evidence, samples: int, max_drop: float, confidence: float) -> str:
    """What these samples prove, or how many would."""
    if evidence.proved or evidence.refuted:
        side = "below" if evidence.proved else "above"
        note = f"{samples} samples prove a drop {side} {percent(max_drop)} at one-sided {percent(confidence)}"
        enough = evidence.samples_to_prove if evidence.proved else None
        return f"{note} confidence" + (f"; about {enough} like these would" if enough is not None else "")
    note = f"{samples} samples cannot decide this at {percent(confidence)} confidence"
    if evidence.samples_to_prove is not None:
        return f"{note}; about {evidence.samples_to_prove} like these would prove the pass"
    return f"{note}; on these the drop is not below the margin"
