"""The verdict: is the candidate's accuracy within the allowed drop of the reference's?"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trtq.errors import ExitCode, InputError
from trtq.escapes import html_table
from trtq.files import decode
from trtq.gate import intervals
from trtq.gate.in_the_way import InTheWay
from trtq.simulation import similarity
from trtq.simulation.outputs import Executor
from trtq.simulation.similarity import Part, Similarity

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
        return f"{self.metric} on {self.samples} samples: {self.drop_text()}"

    def details(self) -> list[str]:
        """What there is to know besides the headline, line by line."""
        level = percent(self.confidence or REPORTED_CONFIDENCE)
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

    def __repr__(self) -> str:
        return f"<Verdict: {' '.join(self.headline().split())}>"

    def _repr_html_(self) -> str:
        return html_table(" ".join(self.headline().split()), [(line,) for line in self.details()])

    def drop_text(self) -> str:
        """Both models' values of the metric and the drop, or that there is none."""
        if self.candidate is None or self.relative_drop is None:
            return f"reference {self.reference:.4f}, candidate not measurable"
        return (
            f"reference {self.reference:.4f}, candidate {self.candidate:.4f}, "
            f"relative drop {100 * self.relative_drop:.2f} %, allowed {percent(self.max_drop)}"
        )


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


def percent(fraction: float) -> str:
    """A share as text: 0.01 -> "1 %"."""
    return f"{100 * fraction:.4g} %"
