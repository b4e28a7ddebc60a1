"""Sensitivity: what INT8 in each group of nodes does to the model's outputs (paper section 5.1).

Every group is measured: alone in INT8 with all others in fp32, as in the paper, or alone in fp32 with all
others in INT8, which also shows how groups act on each other. The fast ranking is the same measurement on
few rows: a group's noise is an average over many output values of each row already, so a handful of rows
ranks groups nearly like all of them do, at the cost of a few passes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trtq.cache import Cache, Key
from trtq.console import Console
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.files import PathLike, read_json, write_json
from trtq.gate.metrics import Metric
from trtq.graph.groups import Group, groups
from trtq.quantization import Quantization
from trtq.simulator import Effect, Mode, Score, Simulator

FORMAT = "trtq-sensitivity-1"

MOST_ROWS = 512
"""No more rows are measured on: they and their activations are kept in memory."""

FAST_PASSES, FEWEST_ROWS = 3, 8
"""The fast ranking runs all groups together over this many times the rows, on at least so many each."""

_HEADINGS = {
    "only": "one group in INT8 at a time, all others in fp32; the most sensitive first",
    "all-but": "one group in fp32 at a time, all others in INT8; the one that helps most first",
}


@dataclass(frozen=True)
class Sensitivity:
    """The analysis of one quantization; saved as JSON.

    Attributes:
        model, data: SHA-256 of the fp32 model and of the rows measured on.
        rows: how many those are.
        metric: its name; None: label-free.
        reference: the metric's value in fp32.
        int8: the score with every group in INT8.
        effects: the most sensitive group first: by the metric where there is one, then by the noise.
    """

    model: str
    data: str
    rows: int
    mode: Mode
    metric: str | None
    reference: float | None
    int8: Score
    effects: list[Effect]

    def text(self) -> str:
        """A table, the most sensitive group first."""
        table = [["SQNR dB", "noise", *([self.metric] if self.metric else []), "MACs", "op", "group"]]
        for effect in self.effects:
            metric = [] if effect.metric is None else [f"{effect.metric:.4g}"]
            macs = "?" if effect.group.macs is None else f"{effect.group.macs:,}"
            nodes = ", ".join(effect.group.nodes)
            table.append(
                [f"{effect.sqnr_db:.1f}", f"{effect.noise:.2e}", *metric, macs, effect.group.op, nodes]
            )
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([*map(str.rjust, row[:-2], widths), row[-2].ljust(widths[-2]), row[-1]])
            for row in table
        ]
        whole = f"every group in INT8: {self.int8.sqnr_db:.1f} dB"
        if self.metric is not None:
            whole += f", {self.metric} {self.int8.metric:.4g}; in fp32: {self.metric} {self.reference:.4g}"
        return "\n".join([_HEADINGS[self.mode], f"{self.rows} rows; {whole}", *lines])

    def to_json(self) -> dict[str, Any]:
        """The analysis as JSON values."""
        return {"format": FORMAT, **asdict(self), "int8": self.int8._asdict()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Sensitivity:
        """The analysis in JSON values.

        Raises:
            KeyError, TypeError, ValueError: they are not an analysis of this format.
        """
        if value["format"] != FORMAT:
            raise ValueError(f"the format is {value['format']}, not {FORMAT}")
        fields = {name: item for name, item in value.items() if name != "format"}
        return cls(
            **fields | {"int8": Score(**value["int8"]), "effects": [_effect(e) for e in value["effects"]]}
        )

    def save(self, path: PathLike) -> None:
        """Write the analysis as JSON in one move."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: PathLike) -> Sensitivity:
        """Read an analysis.

        Raises:
            InputError: the file is missing, not JSON, or not an analysis.
        """
        try:
            return cls.from_json(read_json(path, "sensitivity analysis"))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("not a sensitivity analysis of trtq", file=path, cause=repr(error)) from error


def analyse(
    quantization: Quantization,
    samples: Samples,
    cache: Cache,
    console: Console,
    *,
    mode: Mode = "only",
    metric: Metric | None = None,
    fast: bool = False,
    workers: int | None = None,
) -> Sensitivity:
    """Measure every group of a quantization, on `MOST_ROWS` rows at most.

    What is measured is kept in the cache at once: an interrupted analysis goes on where it was.

    Args:
        metric: is measured, too; needs targets in `samples` unless it is label-free.
        fast: measure on a few rows only (`fast_rows`).
        workers: batches run at once; default: one for each processor.

    Raises:
        InputError: the model does not run on the samples, or the metric does not suit them.
    """
    count = len(groups(quantization.graph, quantization.plan))
    available = min(len(samples), MOST_ROWS)
    samples = samples.spread(fast_rows(available, count) if fast else available)
    simulator = Simulator(quantization, samples, metric=metric, workers=workers)
    detail = {"mode": mode, "metric": metric.fingerprint if metric else None}
    key = Key("sensitivity", quantization.sha256, samples.hash, detail)
    effects = measured(simulator, mode, cache, key, console)
    sign = 1 if mode == "only" else -1
    return Sensitivity(
        model=quantization.plan.model,
        data=samples.hash,
        rows=len(samples),
        mode=mode,
        metric=metric.name if metric else None,
        reference=metric.value(simulator.reference, dict(samples.targets)) if metric else None,
        int8=simulator.score(quantization.plan),
        effects=sorted(effects, key=lambda e: (sign * (e.metric or 0.0), -sign * e.noise)),
    )


def measured(
    simulator: Simulator,
    mode: Mode,
    cache: Cache,
    key: Key,
    console: Console,
    over: Callable[[], bool] = lambda: False,
) -> list[Effect]:
    """The effect of each group, in the order of the plan; those that the cache has under `key` from there.

    Args:
        over: groups that are left once this is true are not measured and not among the effects.

    Raises:
        InputError: as `Simulator.score`.
    """
    every = groups(simulator.quantization.graph, simulator.quantization.plan)
    known = {name: Score(*score) for name, score in json.loads(cache.fetch(key) or b"{}").items()}
    left = [group for group in every if group.name not in known]
    with console.progress("sensitivity", len(left), "group") as advance:
        for effect in simulator.effects(mode, left):
            known[effect.group.name] = Score(effect.sqnr_db, effect.noise, effect.metric)
            cache.store(key, json.dumps(known).encode())
            advance(1)
            if over():
                break
    return [Effect(group, *known[group.name]) for group in every if group.name in known]


def fast_rows(rows: int, count: int) -> int:
    """How many of `rows` rows the fast ranking of `count` groups is measured on."""
    return min(rows, max(FEWEST_ROWS, FAST_PASSES * rows // max(count, 1)))


def _effect(value: Mapping[str, Any]) -> Effect:
    group = {**value["group"], "nodes": tuple(value["group"]["nodes"])}
    return Effect(**{**value, "group": Group(**group)})
