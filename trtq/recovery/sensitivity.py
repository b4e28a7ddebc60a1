"""Sensitivity: what INT8 in each group of nodes does to the model's outputs (paper section 5.1).

Every group is measured: alone in INT8 with all others in fp32, as in the paper, or alone in fp32 with all
others in INT8, which also shows how groups act on each other. The fast ranking is the same measurement on
few rows: a group's noise is an average over many output values of each row already, so a handful of rows
ranks groups nearly like all of them do, at the cost of a few passes.

The noise of an output that mixes scales is that of its worst component, so a group of nodes counts by what it
does to scores, however large the boxes beside them are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from trtq.cache import Cache, Key
from trtq.console import Advance, Console
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.escapes import html_table
from trtq.files import PathLike, decode, read_own_json, sha256_json, write_bytes, write_json
from trtq.gate.metrics import Metric, load_metric
from trtq.graph.groups import groups
from trtq.graph.quantization import Quantization
from trtq.memory import Function
from trtq.recipe import Recipe
from trtq.scratch import scratch_folder
from trtq.simulation.pool import Pool
from trtq.simulation.session import simulation_fingerprint
from trtq.simulation.simulator import Effect, Mode, Score, Simulator
from trtq.simulation.workers import Shard, results

FORMAT = "trtq-sensitivity-1"

MOST_ROWS = 512
"""No more rows are measured on: they and their activations are kept in memory."""

SHARD_GROUPS = 4
"""Groups that a worker measures at a time, where there are several."""

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
            metric = [_value(effect.metric)] if self.metric else []
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
            whole += (
                f", {self.metric} {_value(self.int8.metric)}; in fp32: {self.metric} {_value(self.reference)}"
            )
        return "\n".join([_HEADINGS[self.mode], f"{self.rows} rows; {whole}", *lines])

    def __repr__(self) -> str:
        first = f", first {', '.join(self.effects[0].group.nodes)}" if self.effects else ""
        return f"<Sensitivity: {len(self.effects)} groups on {self.rows} rows{first}>"

    def _repr_html_(self) -> str:
        head = ("group", "operator", "SQNR dB", *([self.metric] if self.metric else []))
        rows = [
            (
                *(", ".join(effect.group.nodes), effect.group.op, f"{effect.sqnr_db:.1f}"),
                *([_value(effect.metric)] if self.metric else []),
            )
            for effect in self.effects
        ]
        return html_table(f"{self.rows} rows; {_HEADINGS[self.mode]}", rows, head)

    def to_json(self) -> dict[str, Any]:
        """The analysis as JSON values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Sensitivity:
        """The analysis in JSON values.

        Raises:
            ValueError: they are not an analysis of this format.
        """
        return decode(value, cls, format=FORMAT)

    def save(self, path: PathLike) -> None:
        """Write the analysis as JSON in one move."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: PathLike) -> Sensitivity:
        """Read an analysis.

        Raises:
            InputError: the file is missing, not JSON, or not an analysis.
        """
        return read_own_json(path, "sensitivity analysis", cls.from_json)


def analyse(
    quantization: Quantization,
    samples: Samples,
    cache: Cache,
    console: Console,
    *,
    recipe: Recipe | None = None,
    mode: Mode = "only",
    metric: Metric | None = None,
    fast: bool = False,
) -> Sensitivity:
    """Measure every group of a quantization, on `MOST_ROWS` rows at most.

    What is measured is kept in the cache at once: an interrupted analysis goes on where it stopped.

    Args:
        recipe: its `threads`, `parallel` and `ignore_nonfinite` say how rows are run and compared.
        metric: measured as well; it needs targets in `samples` unless it is label-free.
        fast: measure on a few rows only (`fast_rows`).

    Raises:
        InputError: the model does not run on the samples, or the metric does not suit them; as
            `workers.results`.
        MissingBackendError: the parallel backend's package is not installed.
    """
    recipe = recipe or Recipe()
    pool = recipe.parallel
    count = len(groups(quantization.graph, quantization.plan))
    available = min(len(samples), MOST_ROWS)
    samples = samples.spread(fast_rows(available, count) if fast else available)
    simulator = Simulator(
        quantization,
        samples,
        metric=metric,
        workers=recipe.threads,
        ignore_nonfinite=recipe.ignore_nonfinite,
    )
    key = Key.of(
        "sensitivity",
        model=quantization.plan.model,
        data=samples.hash,
        start=quantization.sha256,
        mode=mode,
        metric=metric.fingerprint if metric else None,
        executor=simulation_fingerprint(),
    )
    if pool is None:
        effects = measured(simulator, mode, cache, key, console)
    else:
        effects = _measured_in(pool, recipe.threads, simulator, metric, mode, cache, key, console)
    return Sensitivity(
        model=quantization.plan.model,
        data=samples.hash,
        rows=len(samples),
        mode=mode,
        metric=metric.name if metric else None,
        reference=metric.value(simulator.reference, dict(samples.targets)) if metric else None,
        int8=simulator.score(quantization.plan),
        effects=_ranked(effects, mode),
    )


def _ranked(effects: Sequence[Effect], mode: Mode) -> list[Effect]:
    """The most sensitive group first: by the metric where it was measured, then by the noise."""
    sign = 1 if mode == "only" else -1
    return sorted(
        effects, key=lambda e: (sign * (-math.inf if e.metric is None else e.metric), -sign * e.noise)
    )


def measured(
    simulator: Simulator,
    mode: Mode,
    cache: Cache,
    key: Key,
    console: Console,
    over: Callable[[], bool] = lambda: False,
) -> list[Effect]:
    """The effect of each group, in the order of the plan; those in the cache under `key` are read from it.

    Args:
        over: groups that are left once this is true are not measured and not among the effects.

    Raises:
        InputError: as `Simulator.score`.
    """
    found = _Found(simulator, cache, key)
    with console.progress("sensitivity", len(found.left), "group") as advance:
        for effect in simulator.effects(mode, found.left):
            found.add({effect.group.name: Score(effect.sqnr_db, effect.noise, effect.metric)})
            advance(1)
            if over():
                break
    return found.effects()


def known(quantization: Quantization, cache: Cache, key: Key) -> list[Effect]:
    """The effects that the cache has under `key`, in the order of the plan; nothing is measured."""
    stored = json.loads(cache.fetch(key) or b"{}")
    every = groups(quantization.graph, quantization.plan)
    return [Effect(group, *stored[group.name]) for group in every if group.name in stored]


def _measured_in(
    pool: Pool,
    threads: int | None,
    simulator: Simulator,
    metric: Metric | None,
    mode: Mode,
    cache: Cache,
    key: Key,
    console: Console,
) -> list[Effect]:
    """`measured` in a pool's workers, a few groups at a time.

    Args:
        threads: of each worker; None: its share (see `Pool.threads`).
    """
    if not simulator.quantization.storable:
        raise InputError("a model above 2 GB is not sent to workers", remedy="leave --parallel out")
    found = _Found(simulator, cache, key)
    names = [group.name for group in found.left]
    shards = [
        Shard(simulator.samples, None, len(part), (part,))
        for part in (names[i : i + SHARD_GROUPS] for i in range(0, len(names), SHARD_GROUPS))
    ]
    named = None if metric is None else (metric.given or metric.name, metric.fingerprint)
    content = simulator.quantization.to_bytes()
    with scratch_folder() as folder:
        path = folder / "quantization.npz"
        if pool.on_this_machine:
            write_bytes(path, content)
        sent = _Sent(sha256_json(key.to_json()), path if pool.on_this_machine else content, named)
        task = partial(_scores, sent, mode, pool.threads(threads))
        for _, scores in results(task, shards, pool, cache, console, "sensitivity", "group"):
            found.add({name: Score(*score) for name, score in json.loads(scores).items()})
    return found.effects()


class _Found:
    """The scores of groups measured so far, kept in the cache at once.

    Attributes:
        left: the groups that are not measured yet, in the order of the plan.
    """

    def __init__(self, simulator: Simulator, cache: Cache, key: Key) -> None:
        self._cache, self._key = cache, key
        self._every = groups(simulator.quantization.graph, simulator.quantization.plan)
        stored = json.loads(cache.fetch(key) or b"{}")
        self._scores = {name: Score(*score) for name, score in stored.items()}
        self.left = [group for group in self._every if group.name not in self._scores]

    def add(self, scores: Mapping[str, Score]) -> None:
        self._scores |= scores
        stored = {name: astuple(score) for name, score in self._scores.items()}
        self._cache.store(self._key, json.dumps(stored).encode())

    def effects(self) -> list[Effect]:
        """Those of the groups measured, in the order of the plan."""
        return [
            Effect(group, *astuple(self._scores[group.name]))
            for group in self._every
            if group.name in self._scores
        ]


@dataclass(frozen=True)
class _Sent:
    """A measurement as workers get it.

    Attributes:
        key: stands for all of it.
        quantization: its bytes, or the file that holds them.
        metric: name, or the function itself, and fingerprint.
    """

    key: str
    quantization: bytes | Path = field(compare=False)
    metric: tuple[str | Function, str] | None = field(compare=False)


def _scores(
    sent: _Sent, mode: Mode, threads: int, samples: Samples, advance: Advance | None, names: Sequence[str]
) -> bytes:
    """In a worker: group -> score, of the named groups, in JSON."""
    simulator = _simulator(sent, threads, _Rows(samples.hash, samples))
    every = groups(simulator.quantization.graph, simulator.quantization.plan)
    effects = simulator.effects(mode, [group for group in every if group.name in names])
    return json.dumps({e.group.name: (e.sqnr_db, e.noise, e.metric) for e in effects}).encode()


@dataclass(frozen=True)
class _Rows:
    hash: str
    samples: Samples = field(compare=False)


@lru_cache(maxsize=1)
def _simulator(sent: _Sent, threads: int, rows: _Rows) -> Simulator:
    """The simulator of this worker, whose passes serve all of its groups."""
    metric = None
    if sent.metric is not None:
        name, fingerprint = sent.metric
        metric = load_metric(name)
        if isinstance(name, str) and metric.fingerprint != fingerprint:
            raise InputError(f"a worker has another version of the metric {name}")
    content = sent.quantization if isinstance(sent.quantization, bytes) else sent.quantization.read_bytes()
    quantization = Quantization.from_bytes(content)
    return Simulator(  # the sender has checked that the reference is finite enough
        quantization, rows.samples, metric=metric, workers=threads, ignore_nonfinite=True
    )


def fast_rows(rows: int, count: int) -> int:
    """How many of `rows` rows the fast ranking of `count` groups is measured on."""
    return min(rows, max(FEWEST_ROWS, FAST_PASSES * rows // max(count, 1)))


def _value(metric: float | None) -> str:
    return "not finite" if metric is None else f"{metric:.4g}"
