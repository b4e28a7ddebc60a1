"""Tensors that do better with a range of their own, found with few runs (`--method auto`).

1. The noise that each tensor alone in INT8 makes in the outputs is measured exactly. A range of its own
   cannot save more than that, and one tensor often makes most of it.
2. The tensors are taken in this order, until all others together would not gain 0.1 dB if they saved the same
   part of their noise as those before them. Each tries the ranges beside its own and the outermost, with all
   other tensors in INT8 (in a large model first on few rows), takes the best of those that help, and goes on
   from there.

The tensor whose rounding matters most is not the one with the largest error of its own: what a residual
stream loses, every later layer sees.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trtq.budget import NO_BUDGET, Budget
from trtq.calibration.methods import Method, amax_of, scaled, scales_from
from trtq.calibration.search import Rows, Scales, Trials
from trtq.calibration.statistics import Histogram, Statistics
from trtq.console import Console
from trtq.data.batches import Arrays
from trtq.data.samples import Samples
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.graph.rewrite import scales_as_inputs, switches_as_inputs
from trtq.graph.selecting import instead_of_outputs
from trtq.numerics import scale_from_amax
from trtq.simulation.rows import Runner, Workers
from trtq.simulation.similarity import noise_db

FACTORS = (2.0, 1.6, 1.25, 0.8, 0.65, 0.5)
"""Multiples of the chosen method's amax that are tried beside the other methods."""

APART = 0.08
"""By how much ranges that are tried differ at least."""

BATCH = 4
"""Rows that run at once where the model leaves the choice."""

MAC_BUDGET, MOST_PASSES = 1.5e12, 10
"""The rows of a run are so many that the search should take this many multiply-accumulates, or passes over
the data, whichever are fewer; at twice as many it ends."""

MOST_PROMISING, DOUBT = 2, 1.02
"""Of the ranges that a tensor tries, so many that do best on few rows are run on all, unless they make more
than so many times the noise there."""

RUNS_PER_TENSOR, SHARE_OF_ROWS = 2, 4
"""How many runs the number of rows is chosen for, and the part of them that is run first."""

FEWEST_ROWS, MOST_ROWS, FEWEST_TENSORS = 8, 64, 8
"""Rows of a run, and how many tensors try ranges of their own, whatever that takes."""

LEAST_DB, LEAST_SUM_DB = 0.02, 0.1
"""The least gain of a range of its own, and of all tensors together: of those that were found, and of those
that are not looked at."""

LEAST_SHARE = 1 - 10 ** (-LEAST_SUM_DB / 10)
"""The part of the noise that is `LEAST_SUM_DB`."""


@dataclass(frozen=True)
class Refinement:
    """What the search found.

    Attributes:
        exceptions: tensors that do better with a method of their own -> that method; those that made the most
            noise first.
        shares: tensor -> its part of the noise that all make alone; the largest first.
        rows: how many rows ranges were compared on.
        runs: how often the model was run on rows.
        passes: all rows run, in passes over the data.
        whole: whether the search came to its end; if not, the budget was spent.
    """

    exceptions: Mapping[str, Method]
    shares: Mapping[str, float]
    rows: int
    runs: int
    passes: float
    whole: bool = True


def refine_ranges(
    quantization: Quantization,
    statistics: Statistics,
    start: Method,
    methods: Sequence[Method],
    samples: Samples,
    console: Console,
    *,
    workers: int | None = None,
    ignore_nonfinite: bool = False,
    budget: Budget = NO_BUDGET,
    shares: Mapping[str, float] | None = None,
) -> Refinement:
    """Ranges of their own for the tensors where they save noise in the outputs.

    The result depends on neither the number of workers nor, unless the budget is spent, the time it takes:
    every run is on one thread, and the number of rows follows from the model's multiply-accumulates.

    Args:
        quantization: its scales are not looked at.
        statistics: of the plan's tensors.
        start: the method for tensors that do no better with another.
        methods: the others to try, besides `FACTORS` of `start`.
        samples: the rows to measure on; an evenly spread part of them is used.
        workers: runs at once; default: one for each processor.
        ignore_nonfinite: measure only where the outputs are finite in fp32.
        budget: once it is spent, what was found until then is taken.
        shares: what `noise_shares` gave for a start like this one; None: it is measured.

    Raises:
        InputError: they are not finite, and `ignore_nonfinite` is not set.
    """
    rows, runs = _prepared(quantization, samples, console, workers, ignore_nonfinite, budget)
    current = scales_from(statistics, start)
    if shares is None:
        shares = _shares(quantization, rows, current, runs)
    shares = {tensor: share for tensor, share in shares.items() if tensor in quantization.plan.tensors}
    methods = [*methods, *(scaled(start, factor) for factor in FACTORS)]
    ladders = {
        tensor: _ladder(statistics.histograms[tensor], start, methods) for tensor in _worthwhile(shares)
    }
    wanted = [tensor for tensor in ladders if len(ladders[tensor]) > 1]
    found: dict[str, Method] = {}
    if wanted and runs.whole:
        found = _climb(
            Trials(rows, quantization), {t: ladders[t] for t in wanted}, shares, current, start, runs
        )
    return Refinement(found, shares, len(rows.samples), runs.count, runs.rows / len(samples), runs.whole)


def noise_shares(
    quantization: Quantization,
    samples: Samples,
    console: Console,
    *,
    workers: int | None = None,
    ignore_nonfinite: bool = False,
    budget: Budget = NO_BUDGET,
) -> dict[str, float]:
    """Tensor -> its part of the noise that all make alone in INT8; the largest first.

    Args:
        samples: the rows to measure on; few of them are used.
        budget: once it is spent, the tensors that are left are not measured.

    Raises:
        InputError: as `refine_ranges`.
    """
    rows, runs = _prepared(quantization, samples, console, workers, ignore_nonfinite, budget)
    return _shares(quantization, rows, quantization.scales, runs)


def _prepared(
    quantization: Quantization,
    samples: Samples,
    console: Console,
    workers: int | None,
    ignore_nonfinite: bool,
    budget: Budget,
) -> tuple[Rows, _Runs]:
    """The rows to compare on, and what runs them."""
    affordable = _affordable_rows(quantization.plan, len(samples))
    part = _spread(samples, _row_count(affordable, len(quantization.plan.tensors)))
    batch = min(max(len(part) // SHARE_OF_ROWS, 1), BATCH)
    rows = Rows(
        quantization.graph,
        part,
        batch=batch,
        threads=1,
        kept=True,
        ignore_nonfinite=ignore_nonfinite,
        tensors=instead_of_outputs(quantization.graph),
    )
    hasty = len(part) * RUNS_PER_TENSOR * len(quantization.plan.tensors) > affordable
    return rows, _Runs(rows, 2 * affordable, console, budget, Workers(workers), hasty)


class Alone:
    """One tensor of a quantization in INT8, with everything else in floating point, on rows: one session runs
    them all, as switches and scales are its inputs. Biases are those of the float model: corrections make up
    for what all tensors and weights do together."""

    def __init__(self, rows: Rows, quantization: Quantization) -> None:
        self._rows = rows
        plan = replace(quantization.plan, weights=[])
        scales = dict.fromkeys(plan.tensors, np.float32(1))
        graph = replace(quantization, plan=plan, scales=scales, corrections={}).rewritten()
        self._scales = scales_as_inputs(graph, plan)
        self._switches = switches_as_inputs(graph, plan)
        self._dtypes = {tensor.name: tensor.dtype for tensor in graph.inputs}
        self._runner = Runner(graph, rows.tensors, threads=rows.threads)

    def noise(self, tensor: str, scale: np.float32, first: int | None = None) -> float:
        """Noise of the outputs (see `similarity.Reference`).

        Args:
            first: how many batches are run; None: all.
        """
        given: Arrays = {name: np.array(t == tensor) for name, t in self._switches.items()}
        for name, t in self._scales.items():
            given[name] = np.array(scale if t == tensor else 1, self._dtypes[name])
        return self._rows.noise(self._rows.run(self._runner, given, first))


Ladder = Mapping[Method, np.float32]
"""Ranges of a tensor, the narrowest first: method -> scale."""


def _ladder(histogram: Histogram, start: Method, methods: Sequence[Method]) -> Ladder:
    """`start`, and of the other methods those whose amax is `APART` from its and from each other's."""
    found: dict[float, Method] = {}
    for method in [start, *methods]:
        amax = amax_of(method, histogram)
        if all(abs(amax / other - 1) >= APART for other in found):
            found[amax] = method
    return {found[amax]: np.float32(scale_from_amax(amax)) for amax in sorted(found)}


class _Runs:
    """What runs: several things at once, counted and timed.

    Attributes:
        count, rows: runs, and rows in them, so far.
        most: rows after which the search ends.
        hasty: ranges are looked at on few rows first, as the fewest rows for a run are too many.
        whole: False once the budget is spent and something was left.
    """

    def __init__(
        self,
        rows: Rows,
        most: float,
        console: Console,
        budget: Budget,
        workers: Workers,
        hasty: bool = False,
    ) -> None:
        self.hasty = hasty
        self._sizes, self.most = [batch.rows for batch in rows.batches()], most
        self._console, self._budget, self._workers = console, budget, workers
        self._seconds = 0.0
        self.count, self.rows, self.whole = 0, 0, True

    @property
    def left(self) -> int:
        """How many runs of all rows end the search."""
        return int(max(self.most - self.rows, 0) / sum(self._sizes))

    @property
    def few(self) -> int:
        """How many batches are few."""
        return max(len(self._sizes) // SHARE_OF_ROWS, 1)

    def of(
        self, noise: Callable[..., float], items: Sequence[Any], first: int | None = None
    ) -> Iterator[float]:
        """The noise of each item; of the first ones where the budget is spent meanwhile."""
        rows, started = sum(self._sizes[:first]), time.perf_counter()
        for done, found in enumerate(self._workers.map(lambda item: noise(*item, first=first), items), 1):
            self.count, self.rows = self.count + 1, self.rows + rows
            self._seconds = (time.perf_counter() - started) / done / rows
            yield found
            if self._budget.over:
                self.whole = False
                break

    def announce(self, what: str, count: int, first: int | None = None) -> None:
        """Say how many runs are coming, and how long that should take."""
        rows = sum(self._sizes[:first])
        seconds = count * rows * self._seconds
        self._console.say("ranges", f"{what}: up to {count} runs of {rows} rows, about {seconds:.0f} s")


def _shares(quantization: Quantization, rows: Rows, scales: Scales, runs: _Runs) -> dict[str, float]:
    """Tensor -> its part of the noise that all tensors make alone; the largest first."""
    alone = Alone(rows, quantization)
    items = [(tensor, scales[tensor]) for tensor in quantization.plan.tensors]
    noises = list(runs.of(alone.noise, items[:1], runs.few))
    runs.announce(f"what each of {len(items)} tensors alone adds to the noise", len(items) - 1, runs.few)
    noises += runs.of(alone.noise, items[1:], runs.few) if runs.whole else []
    total = sum(noises) or 1.0
    shares = {tensor: noise / total for (tensor, _), noise in zip(items, noises, strict=False)}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _worthwhile(shares: Mapping[str, float]) -> list[str]:
    """The first tensors, without the last that together could not gain `LEAST_SUM_DB`."""
    left = np.cumsum(list(shares.values())[::-1])[::-1]
    return [t for t, rest in zip(shares, left, strict=True) if rest > LEAST_SHARE]


def _climb(
    trials: Trials,
    ladders: Mapping[str, Ladder],
    shares: Mapping[str, float],
    current: Scales,
    start: Method,
    runs: _Runs,
) -> dict[str, Method]:
    """Tensor -> the method of its own that it ends with; all other tensors are in INT8 meanwhile."""
    (before,) = runs.of(trials.noise, [(current,)])
    (glance,) = runs.of(trials.noise, [(current,)], runs.few) if runs.hasty else (before,)
    best, looked_at = before, 0.0
    share = sum(shares[tensor] for tensor in ladders)
    text = f"{len(ladders)} of these, which add {share:.0%}, try ranges of their own"
    first = [min(len(ladder) - 1, 4) for ladder in ladders.values()]
    runs.announce(text, min(sum(first), sum(first[:FEWEST_TENSORS]) + runs.left))
    found: dict[str, Method] = {}
    for number, (tensor, ladder) in enumerate(ladders.items()):
        if number >= FEWEST_TENSORS and (
            runs.rows >= runs.most or _promised(1 - best / before, looked_at, share) < LEAST_SHARE
        ):
            break
        looked_at += shares[tensor]
        steps, at, seen = list(ladder), list(ladder).index(start), {start}
        wanted = {0, at - 1, at + 1, len(steps) - 1}
        while runs.whole:
            tried = [steps[i] for i in sorted(wanted) if 0 <= i < len(steps) and steps[i] not in seen]
            seen |= set(tried)
            ranges = [{**current, tensor: ladder[method]} for method in tried]
            if runs.hasty:
                glances = list(runs.of(trials.noise, [(scales,) for scales in ranges], runs.few))
                order = [i for i in np.argsort(glances)[:MOST_PROMISING] if glances[i] < glance * DOUBT]
            else:
                glances, order = [glance] * len(ranges), list(range(len(ranges)))
            noises = list(runs.of(trials.noise, [(ranges[i],) for i in order]))
            if not noises or noise_db(min(noises)) < noise_db(best) + LEAST_DB:
                break
            winner = order[int(np.argmin(noises))]
            best, glance, current = min(noises), glances[winner], ranges[winner]
            found[tensor], at = tried[winner], steps.index(tried[winner])
            wanted = {at - 1, at + 1}
    return found if noise_db(best) >= noise_db(before) + LEAST_SUM_DB else {}


def _promised(saved: float, looked_at: float, share: float) -> float:
    """The part of the noise that the tensors not looked at yet would save at the rate of those that were.

    Args:
        saved: part of the noise that these saved; `LEAST_SHARE` of it is added to both, as a prior.
        looked_at, share: what these make alone, and what all do.
    """
    return (share - looked_at) * (saved + LEAST_SHARE) / (looked_at + LEAST_SHARE)


def rows_of_search(plan: Plan, available: int) -> tuple[float, float]:
    """About how many rows `noise_shares` runs, and up to how many the rest of `refine_ranges`.

    Args:
        available: rows to measure on.
    """
    affordable, tensors = _affordable_rows(plan, available), len(plan.tensors)
    rows = min(_row_count(affordable, tensors), available)
    return tensors * max(rows // SHARE_OF_ROWS, 1), max(2 * affordable, FEWEST_TENSORS * rows)


def _affordable_rows(plan: Plan, available: int) -> float:
    """How many rows the search should run in all."""
    return min(MAC_BUDGET / max(plan.macs_per_row, 1), MOST_PASSES * available)


def _row_count(affordable: float, tensors: int) -> int:
    """How many rows a run has, if there are so many."""
    return int(min(max(affordable / RUNS_PER_TENSOR / max(tensors, 1), FEWEST_ROWS), MOST_ROWS))


def _spread(samples: Samples, rows: int) -> Samples:
    """About `rows` rows, as whole samples evenly spread over the data, and so is each part of them."""
    samples = samples.spread(rows)
    groups = range(len(samples) // samples.group)
    order = [group for first in range(SHARE_OF_ROWS) for group in groups[first::SHARE_OF_ROWS]]
    return samples.subset(order)
