"""The verdict: is the candidate's accuracy within the allowed drop of the reference's?"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtq.data.batches import Arrays
from trtq.errors import ExitCode, InputError
from trtq.files import decode
from trtq.gate import intervals
from trtq.gate.in_the_way import InTheWay
from trtq.gate.metrics import Metric, NotFiniteScoreError, Scored, rows_per_sample
from trtq.gate.resampling import QUIETLY, Resampling
from trtq.simulation import finite, similarity
from trtq.simulation.outputs import Executor
from trtq.simulation.similarity import Part, Similarity
from trtq.simulation.values import AllValues, take_all

REPORTED_CONFIDENCE = 0.95
"""Level of the reported intervals and sample sizes where no confidence was asked for."""


class Outcome(enum.Enum):
    """What the gate says, a check, or both together."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"

    @property
    def exit_code(self) -> ExitCode:
        """What a command with this outcome returns."""
        return _EXIT_CODES[self]


_EXIT_CODES = {
    Outcome.PASS: ExitCode.PASS,
    Outcome.FAIL: ExitCode.FAIL,
    Outcome.INCONCLUSIVE: ExitCode.INCONCLUSIVE,
}

_WORST_LAST = (Outcome.PASS, Outcome.INCONCLUSIVE, Outcome.FAIL)


def overall(outcomes: Iterable[Outcome]) -> Outcome:
    """The one outcome of several: the worst; a pass where there are none."""
    return max(outcomes, key=_WORST_LAST.index, default=Outcome.PASS)


@dataclass(frozen=True)
class Check:
    """One more requirement besides the gate.

    Attributes:
        message: the option that asked for it, what was found and what is required.
    """

    name: str
    outcome: Outcome
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether it passed."""
        return self.outcome is Outcome.PASS

    def to_json(self) -> dict[str, Any]:
        """The check as JSON values."""
        return {**dataclasses.asdict(self), "outcome": self.outcome.value, "ok": self.ok}


@dataclass(frozen=True)
class Verdict:
    """What the gate found and what the checks beside it did. `outcome` is the one answer of all of them.

    Attributes:
        gate: what the gate itself says.
        metric: the metric as the user wrote it.
        reference, candidate: the metric's values; candidate and drops are None where the
            candidate's outputs were not finite.
        relative_drop: 1 - candidate / reference, negative for a gain.
        absolute_drop: reference - candidate.
        max_drop: the allowed relative drop.
        relative_interval, absolute_interval: two-sided intervals of the drops at level
            `confidence`, or `REPORTED_CONFIDENCE` without one.
        confidence: the one-sided level at which the margin had to be cleared; None: the point
            estimate decided.
        proved: whether the samples prove the drop to be below `max_drop` at that level.
        samples: how many samples were scored.
        samples_to_prove: how many would prove it if they went on like these; None: no number
            would, the estimate itself is beyond the margin.
        executor: what ran the candidate: the engine, or a simulation of it on the CPU.
        outputs: similarity of the candidate's outputs to the reference's, by output name.
        worst_samples: up to five sample numbers, least similar (lowest SQNR) first.
        notes: sentences for the reader.
        warnings: what makes the verdict, or the data it stands on, doubtful.
        checks: what else was asked for.
        in_the_way: what stands in the way of a pass, where it was looked for.
        draws: resamples that the intervals rest on where each took calls of the metric; None: they come from
            what each sample contributes.
    """

    gate: Outcome
    metric: str
    reference: float
    candidate: float | None
    relative_drop: float | None
    absolute_drop: float | None
    max_drop: float
    relative_interval: tuple[float, float] | None
    absolute_interval: tuple[float, float] | None
    confidence: float | None
    proved: bool
    samples: int
    samples_to_prove: int | None
    executor: Executor
    outputs: dict[str, Similarity]
    worst_samples: tuple[int, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    in_the_way: InTheWay | None = None
    draws: int | None = None

    @property
    def outcome(self) -> Outcome:
        """The gate's and every check's together: what exit code, files and terminal say."""
        return overall([self.gate, *(check.outcome for check in self.checks)])

    @property
    def exit_code(self) -> ExitCode:
        """The outcome's exit code."""
        return self.outcome.exit_code

    @property
    def passed(self) -> bool:
        """Whether the outcome is a pass."""
        return self.outcome is Outcome.PASS

    @property
    def lowest_sqnr_db(self) -> float:
        """The lowest SQNR of an output; -inf where none was measurable."""
        return min((output.sqnr_db for output in self.outputs.values()), default=-math.inf)

    @property
    def rank(self) -> tuple[bool, int, int, float]:
        """The higher, the better: all passed, the gate's outcome, how few checks are missed, and the drop;
        where the gate passes but a check does not, the SQNR."""
        quality = -math.inf if self.relative_drop is None else -self.relative_drop
        if self.gate is Outcome.PASS and not self.passed:
            quality = self.lowest_sqnr_db
        missed = sum(not check.ok for check in self.checks)
        return self.passed, -_WORST_LAST.index(self.gate), -missed, quality

    def with_checks(self, *checks: Check) -> Verdict:
        """This verdict with more checks."""
        return dataclasses.replace(self, checks=(*self.checks, *checks))

    def require_engine(self) -> Verdict:
        """This verdict if an engine ran; a simulated one becomes inconclusive, pass or fail.

        Checks that are not measured on the outputs are to be added after this.
        """
        if self.executor == "engine":
            return self
        message = (
            f"--require-engine: an engine was required, but this {self.outcome.value} was measured on a"
            " simulation"
        )
        return dataclasses.replace(
            self,
            gate=_without_fail(self.gate),
            checks=(
                *(dataclasses.replace(check, outcome=_without_fail(check.outcome)) for check in self.checks),
                Check("an engine ran", Outcome.INCONCLUSIVE, message),
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """The verdict as JSON values; every number is finite."""
        value = dataclasses.asdict(self)
        return (
            {"outcome": self.outcome.value}
            | value
            | {
                "gate": self.gate.value,
                "outputs": {
                    name: item | {"parts": list(item["parts"])} for name, item in value["outputs"].items()
                },
                "relative_interval": self.relative_interval and list(self.relative_interval),
                "absolute_interval": self.absolute_interval and list(self.absolute_interval),
                "worst_samples": list(self.worst_samples),
                "notes": list(self.notes),
                "warnings": list(self.warnings),
                "checks": [check.to_json() for check in self.checks],
                "in_the_way": self.in_the_way and self.in_the_way.to_json(),
            }
        )

    @classmethod
    def from_json(cls, value: Any) -> Verdict:
        """The inverse of `to_json`; files from before there were checks have no `gate`.

        Raises:
            InputError: the value is not a verdict, or its outcome is not that of its gate and checks.
        """
        try:
            outcome = decode(value, _Answer, closed=False).outcome
            fields = {"gate": value["outcome"], **_without(value, "outcome")}
            fields["checks"] = _each_without(value.get("checks", []), "ok")
            found = value.get("in_the_way")
            if isinstance(found, Mapping) and "obstacles" in found:
                fields["in_the_way"] = {**found, "obstacles": _each_without(found["obstacles"], "rank")}
            verdict = decode(fields, cls)
        except ValueError as error:
            raise InputError("this is not a verdict", cause=error) from error
        if verdict.outcome is not outcome:
            raise InputError(
                "the verdict contradicts itself",
                cause=f"its outcome is {outcome.value}, its gate and checks make {verdict.outcome.value}",
            )
        return verdict

    def headline(self) -> str:
        """The outcome in one line, with what it comes from."""
        missed = [check.message for check in self.checks if not check.ok]
        if self.passed:
            found = self.gate_line() + (", and all checks" if self.checks else "")
        elif self.gate is Outcome.PASS:
            found = "; ".join(missed)
        else:
            found = "; ".join([self.gate_line(), *missed])
        itself = {Outcome.PASS: "passes", Outcome.INCONCLUSIVE: "is inconclusive"}
        if self.gate is not self.outcome:
            found += f" (the gate itself {itself[self.gate]})"
        return f"{self.outcome.value.upper()}  {found}"

    def gate_line(self) -> str:
        """What the gate measured, in one line."""
        return f"{self.metric} on {self.samples} samples: {self._drop()}"

    def details(self) -> list[str]:
        """What there is to know besides the headline, line by line."""
        level = _percent(self.confidence or REPORTED_CONFIDENCE)
        lines = []
        if self.checks:
            lines.append(f"gate: {self.gate.value}, {self.gate_line()}")
            lines += [f"check: {check.outcome.value}, {check.message}" for check in self.checks]
        if self.relative_interval:
            low, high = (f"{100 * bound:.2f} %" for bound in self.relative_interval)
            rough = self.draws is not None and self.draws < intervals.ROUGH_BELOW
            lines.append(f"two-sided {level} interval of the drop: {low} to {high}" + ", rough" * rough)
        lines.append("measured on the " + ("engine" if self.executor == "engine" else "CPU, simulated"))
        for name, item in self.outputs.items():
            worst = f" (the worst of {len(item.parts)} components)" if item.parts else ""
            lines.append(f"output {name}: {_similarity_text(item)}{worst}")
            lines += [f"  {part.label}: {_similarity_text(part)}" for part in item.parts]
        if self.worst_samples:
            lines.append(f"least similar samples: {', '.join(map(str, self.worst_samples))}")
        return [*lines, *self.notes, *(self.in_the_way.lines() if self.in_the_way else ())]

    def text(self) -> str:
        """A few lines for a person, the headline first."""
        return "\n".join([self.headline(), *(f"  {line}" for line in self.details())])

    def _drop(self) -> str:
        if self.candidate is None or self.relative_drop is None:
            return f"reference {self.reference:.4f}, candidate not measurable"
        return (
            f"reference {self.reference:.4f}, candidate {self.candidate:.4f}, "
            f"relative drop {100 * self.relative_drop:.2f} %, allowed {_percent(self.max_drop)}"
        )


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
    sequences: Sequence[int] | None = None,
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
        sequences: first row of each sequence, from 0; None: rows do not depend on those before.

    Raises:
        InputError: outputs that cannot be compared or scored, or a margin that means nothing: a
            reference that scores 0 or less, or `sqnr`, whose decibels have no relative drop.
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
    starts = None if sequences is None else tuple(start // k for start in sequences if start % k == 0)
    gate = _Gate(reference, candidate, targets, metric, scored, max_drop, confidence, resampling, starts)
    plain = finite.all_compared(reference, candidate)
    outputs = similarity.compare(*plain)
    try:
        found = metric.scored(candidate, targets, reference)
    except NotFiniteScoreError as error:
        worst = similarity.worst_samples(*plain, samples)
        note = f"{metric.name} of the candidate is no number: {error.cause}"
        return dataclasses.replace(verdict, outputs=outputs, worst_samples=worst, notes=(note,))
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
            *gate.about_sequences(samples),
            *((metric.reads(reference, targets),) if metric.reads else ()),
            *finite.ignored(reference),
            *_not_compared(outputs, reference, metric),
        ),
        draws=evidence.draws,
    )


@dataclass(frozen=True)
class _Gate:
    """What both models gave and how it is judged; the arguments are those of `decide`.

    Attributes:
        starts: first sample of each sequence; None where each sample is by itself.
    """

    reference: AllValues
    candidate: AllValues
    targets: Arrays
    metric: Metric
    scored: Scored
    max_drop: float
    confidence: float | None
    resampling: Resampling | None
    starts: tuple[int, ...] | None

    @property
    def level(self) -> float:
        """Of the intervals."""
        return self.confidence or REPORTED_CONFIDENCE

    def about_sequences(self, samples: int) -> Iterator[str]:
        """What the evidence takes as one, where that is not a sample."""
        if self.starts is not None:
            yield (
                f"the {samples} samples are {len(self.starts)} sequences, which the interval takes as wholes;"
                f" less than {intervals.MIN_BOOTSTRAP_SAMPLES} prove nothing"
            )

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
        samples, _ = rows_per_sample(self.reference, self.targets)
        scores = [own for own in rows if own is not None]
        called = len(scores) < 2
        if called:
            values = self._resampled(found)
        elif (
            self.starts is None
            and metric.summarise is None
            and metric.needs_targets
            and np.isin(scores, (0, 1)).all()
        ):
            return intervals.binary_evidence(scores[0], scores[1], self.max_drop, self.level)
        else:
            flat = (own.reshape(samples, -1) for own in scores)
            means = intervals.bootstrap_means(*flat, starts=self.starts)
            values = [
                mean[:, 0] if metric.summarise is None else metric.summarise(mean.reshape(-1, *own.shape[1:]))
                for own, mean in zip(scores, means, strict=True)
            ]
        blocks = samples if self.starts is None else len(self.starts)
        evidence = intervals.bootstrap_evidence(
            values[0], values[1], self.margin(found), blocks, self.max_drop, self.level
        )
        needed = evidence.samples_to_prove
        return dataclasses.replace(
            evidence,
            draws=len(values[0]) if called else None,
            samples_to_prove=None if needed is None else math.ceil(needed * samples / blocks),
        )

    def _resampled(self, found: Scored) -> list[NDArray[np.float64]]:
        """The metric's values of both models on resamples; none where none are wanted."""
        samples, k = rows_per_sample(self.reference, self.targets)
        starts = range(samples) if self.starts is None else self.starts
        blocks = np.split(np.arange(samples), starts[1:])

        def on_blocks(draw: NDArray[np.int64]) -> tuple[float, float]:
            indices = np.concatenate([blocks[index] for index in draw])
            rows = (k * indices[:, None] + np.arange(k)).ravel()
            targets = {name: array[indices] for name, array in self.targets.items()}
            reference, candidate = (take_all(side, rows) for side in (self.reference, self.candidate))
            try:
                return self.metric.value(reference, targets), self.metric.value(candidate, targets)
            except InputError:  # it scored all samples; such as a curve that needs both classes
                return math.nan, math.nan

        if self.resampling is None:
            return [np.empty(0), np.empty(0)]
        return list(self.resampling.draws(len(blocks), on_blocks, self.scored.seconds + found.seconds))


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
        note = (
            f"{samples} samples prove a drop {side} {_percent(max_drop)} at one-sided {_percent(confidence)}"
        )
        enough = evidence.samples_to_prove if evidence.proved else None
        return f"{note} confidence" + (f"; about {enough} like these would" if enough is not None else "")
    note = f"{samples} samples cannot decide this at {_percent(confidence)} confidence"
    if evidence.samples_to_prove is not None:
        return f"{note}; about {evidence.samples_to_prove} like these would prove the pass"
    return f"{note}; on these the drop is not below the margin"


def _without_fail(outcome: Outcome) -> Outcome:
    return Outcome.INCONCLUSIVE if outcome is Outcome.FAIL else outcome


@dataclass(frozen=True)
class _Answer:
    """What `to_json` says beside the fields of a verdict."""

    outcome: Outcome


def _without(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A JSON object without what `to_json` says beside the fields."""
    return {name: item for name, item in value.items() if name != key}


def _each_without(value: Any, key: str) -> Any:
    """The objects in a JSON list without a key; what is something else stays, for `decode` to refuse."""
    if not isinstance(value, list):
        return value
    return [_without(item, key) if isinstance(item, Mapping) else item for item in value]


def _similarity_text(item: Similarity | Part) -> str:
    apart = item.not_compared if isinstance(item, Similarity) else 0
    exact = item.sqnr_db >= similarity.MAX_SQNR_DB
    noise = "exact" if exact else f"SQNR {item.sqnr_db:.1f} dB"
    found = f"cosine {item.cosine:.5f}, {noise}, largest error {item.max_abs_error:.4g}"
    return f"{found} where it can be compared, {apart} rows cannot" if apart else found


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g} %"
