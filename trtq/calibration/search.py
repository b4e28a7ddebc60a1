"""`--method auto`: which method suits the model, and which tensors do better with a range of their own.

No calibration method wins everywhere (paper table 5), so all are tried and measured: `choose_method` compares
the methods with each other, and `refine_ranges` then lets each tensor, in the order of the graph, try every
other method and some narrower ranges. The tensor whose rounding matters most is not the one with the largest
error of its own: what a residual stream loses, every later layer sees.

Both measure the signal-to-quantization-noise ratio of the model's outputs. It tells methods apart on a few
dozen rows, where a task metric cannot, and needs no labels. Ranges are fitted on one part of the calibration
data and methods compared on the part held back; the evaluation data are never looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from trtq.calibration.methods import Method, amax_of, parse_method, scaled, scales_from
from trtq.calibration.statistics import Statistics
from trtq.console import Advance, Console
from trtq.data.batches import Arrays, Batch
from trtq.data.samples import Samples
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.graph.rewrite import scales_as_inputs
from trtq.graph.selecting import instead_of_outputs
from trtq.numerics import scale_from_amax
from trtq.simulation.finite import check_reference
from trtq.simulation.rows import Runner, Workers
from trtq.simulation.similarity import Reference

CANDIDATES = ("max", "entropy", "mse", "percentile:99.9", "percentile:99.99", "percentile:99.999")
"""The paper's candidates (section 6) and the least mean squared error."""

NARROWER = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Factors on the chosen method's amax that are tried as well."""

FEWEST_ROWS, MOST_ROWS = 16, 256
MAC_BUDGET = 2e12
"""The search for ranges uses as many rows as fit into this many multiply-accumulates, within those bounds."""

LEAST_GAIN_DB = 0.01

BATCH, SEARCH_BATCH = 16, 8
"""Rows that run at once where the model leaves the choice: in a run by itself, and among many at once."""

Scales = Mapping[str, np.float32]
"""Tensor -> scale, of all tensors of a plan."""


class Rows:
    """Rows to score quantizations on: by their outputs, against those of the float model.

    Attributes:
        tensors: names of the tensors that are scored; None: the model's outputs.

    Args:
        model: the float model, a file or a graph. It runs once; its session, with all the weights, is closed
            before another one opens.
        samples: the rows.
        batch: rows to run at once where the model leaves the choice.
        threads: threads within an operator; None: all cores.
        kept: whether batches stay in memory and are scored as they come, for many runs on few rows. Otherwise
            every run reads them again and scores the outputs of all rows together.
        ignore_nonfinite: measure only where the float model's outputs are finite.
        advance: called with the number of rows that the float model just ran.
        tensors: of both models, to score instead of the outputs (`selecting.instead_of_outputs`), as far as
            they are finite.

    Raises:
        InputError: the model does not run on the rows, or its outputs are not finite.
    """

    def __init__(
        self,
        model: Path | gs.Graph,
        samples: Samples,
        *,
        batch: int = BATCH,
        threads: int | None = None,
        kept: bool = False,
        ignore_nonfinite: bool = False,
        advance: Advance | None = None,
        tensors: Sequence[str] | None = None,
    ) -> None:
        self.samples, self.threads, self.tensors = samples, threads, tensors
        runner, pairs = Runner(model, tensors, threads=threads), []
        taken = list(runner.batches(samples, batch)) if kept else runner.batches(samples, batch)
        self._kept = taken if isinstance(taken, list) else None
        for part in taken:
            pairs.append((replace(part, feed={}, padding=0), _own_rows(part, runner.on(part, samples))))
            if advance is not None:
                advance(part.rows)
        self._batch = batch if any(part.rows > 1 for part, _ in pairs) else 1
        outputs = list(self._parts([outputs for _, outputs in pairs]))
        origins = [part for part, _ in pairs] if len(outputs) == len(pairs) else [None]
        for origin, arrays in zip(origins, outputs, strict=True):
            ignored = ignore_nonfinite or tensors is not None
            check_reference(arrays, ignore_nonfinite=ignored, samples=samples, batch=origin)
        self._reference = Reference(outputs)

    def sqnr_db(self, quantization: Quantization, console: Console, label: str) -> float:
        """SQNR of a quantization's outputs together (see `similarity.Reference`).

        Args:
            label: what the progress is called.
        """
        with console.progress(label, len(self.samples)) as advance:
            return Trials(self, quantization).sqnr_db(quantization.scales, advance=advance)

    def batches(self) -> Iterable[Batch]:
        """The rows, put together for a run."""
        return self.samples.batches(self._batch) if self._kept is None else self._kept

    def score(self, outputs: Iterable[Arrays]) -> float:
        """SQNR of a run's outputs, which may end early."""
        return self._reference.sqnr_db(self._parts(outputs))

    def _parts(self, outputs: Iterable[Arrays]) -> Iterable[Arrays]:
        """Outputs as they are compared: batch by batch, or all rows together if their shapes allow it."""
        if self._kept is not None:
            return outputs
        found = list(outputs)
        shapes = {tuple((name, a.shape[1:]) for name, a in batch.items() if a.ndim) for batch in found}
        if len(shapes) > 1 or len(next(iter(shapes))) < len(found[0]):
            return found
        return [{name: np.concatenate([batch[name] for batch in found]) for name in found[0]}]


class Trials:
    """A quantization with any scales, on rows: one session runs them all, as scales are its inputs.

    Args:
        quantization: its scales are not looked at.
    """

    def __init__(self, rows: Rows, quantization: Quantization) -> None:
        self._rows = rows
        plan = quantization.plan
        graph = replace(quantization, scales=dict.fromkeys(plan.tensors, np.float32(1))).rewritten()
        self._inputs = scales_as_inputs(graph, plan)
        self._dtypes = {tensor.name: tensor.dtype for tensor in graph.inputs}
        self._runner = Runner(graph, rows.tensors, threads=rows.threads)

    def sqnr_db(self, scales: Scales, first: int | None = None, advance: Advance | None = None) -> float:
        """SQNR of the outputs together.

        Args:
            first: how many batches are run; None: all.
            advance: called with the number of rows just done.
        """
        given = {name: np.array(scales[t], self._dtypes[name]) for name, t in self._inputs.items()}

        def outputs() -> Iterator[Arrays]:
            for batch in islice(self._rows.batches(), first):
                fed = replace(batch, feed=batch.feed | given)
                yield _own_rows(batch, self._runner.on(fed, self._rows.samples))
                if advance is not None:
                    advance(batch.rows)

        return self._rows.score(outputs())


def _own_rows(batch: Batch, outputs: Arrays) -> Arrays:
    """A batch's outputs without those of rows that only fill it up."""
    return {name: batch.own(array) for name, array in outputs.items()}


@dataclass(frozen=True)
class Choice:
    """What was tried.

    Attributes:
        method: the best one.
        sqnr_db: candidate -> SQNR of the outputs together on the rows held back.
        rows: how many rows were held back.
    """

    method: Method
    sqnr_db: Mapping[str, float]
    rows: int


def choose_method(rows: Rows, quantization: Quantization, statistics: Statistics, console: Console) -> Choice:
    """The candidate with the best outputs on rows held back; the earlier one if two are equal.

    Args:
        quantization: its scales are not looked at.
        statistics: of rows that are not among those held back.
    """
    trials = Trials(rows, quantization)
    scores = {}
    for name in CANDIDATES:
        with console.progress(name, len(rows.samples)) as advance:
            scores[name] = trials.sqnr_db(scales_from(statistics, parse_method(name)), advance=advance)
    best = max(scores, key=scores.__getitem__)
    return Choice(parse_method(best), scores, len(rows.samples))


@dataclass(frozen=True)
class Refinement:
    """What the search found.

    Attributes:
        exceptions: tensors that do better with a method of their own -> that method.
        rows: how many rows were run.
        runs: how many ranges were tried.
    """

    exceptions: Mapping[str, Method]
    rows: int
    runs: int


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
) -> Refinement:
    """One pass of coordinate search over the tensors' ranges.

    What does not look better on a quarter of the rows is not measured on the rest. The result depends on
    neither the number of workers nor the time it takes: every run is on one thread, and the number of rows
    follows from the model's multiply-accumulates.

    Args:
        quantization: its scales are not looked at.
        statistics: of the plan's tensors.
        start: the method for tensors that do no better with another.
        methods: the others to try, besides `NARROWER` ranges of `start`.
        samples: the rows to measure on; an evenly spread part of them is used.
        workers: runs at once; default: one for each processor.
        ignore_nonfinite: measure only where the outputs are finite in fp32.

    Raises:
        InputError: they are not finite, and `ignore_nonfinite` is not set.
    """
    plan = quantization.plan
    methods = [*methods, *(scaled(start, factor) for factor in NARROWER)]
    options = {tensor: _options(tensor, statistics, methods, start) for tensor in plan.tensors}
    runs = sum(len(tried) for tried in options.values())
    samples = _spread(samples, rows := _row_count(plan, runs, len(samples)))
    part = Rows(
        quantization.graph,
        samples,
        batch=SEARCH_BATCH,
        threads=1,
        kept=True,
        ignore_nonfinite=ignore_nonfinite,
        tensors=instead_of_outputs(quantization.graph),
    )
    trials, few = Trials(part, quantization), max(len(list(part.batches())) // 4, 1)
    current: Scales = scales_from(statistics, start)
    glance, best = trials.sqnr_db(current, few), trials.sqnr_db(current)
    exceptions: dict[str, Method] = {}
    pool = Workers(workers)
    with console.progress("ranges", runs, "run") as advance:
        for tensor, tried in options.items():
            ranges = {method: {**current, tensor: scale} for method, scale in tried.items()}
            found = pool.map(partial(trials.sqnr_db, first=few), ranges.values())
            glances = dict(zip(ranges, found, strict=True))
            promising = [method for method in ranges if glances[method] > glance]
            measured = pool.map(trials.sqnr_db, [ranges[method] for method in promising])
            scores = dict(zip(promising, measured, strict=True))
            advance(len(ranges))
            if scores and max(scores.values()) > best + LEAST_GAIN_DB:
                method = max(scores, key=scores.__getitem__)
                best, glance, current = scores[method], glances[method], ranges[method]
                exceptions[tensor] = method
    return Refinement(exceptions, rows, runs)


def _options(
    tensor: str, statistics: Statistics, methods: Sequence[Method], start: Method
) -> dict[Method, np.float32]:
    """Methods whose scale for the tensor differs by 1 % or more from `start`'s and from each other's."""
    histogram = statistics.histograms[tensor]
    seen = [float(scale_from_amax(amax_of(start, histogram)))]
    options: dict[Method, np.float32] = {}
    for method in methods:
        scale = scale_from_amax(amax_of(method, histogram))
        if all(abs(float(scale) / other - 1) >= 0.01 for other in seen):
            seen.append(float(scale))
            options[method] = np.float32(scale)
    return options


def _row_count(plan: Plan, runs: int, available: int) -> int:
    per_row = sum(node.macs or 0 for node in plan.nodes) / max(plan.batch, 1)
    affordable = MAC_BUDGET / max(per_row * runs, 1)
    return int(min(available, MOST_ROWS, max(FEWEST_ROWS, affordable)))


def _spread(samples: Samples, rows: int) -> Samples:
    """About `rows` rows, as whole samples evenly spread over the data, and so is each quarter of them."""
    samples = samples.spread(rows)
    groups = range(len(samples) // samples.group)
    order = [group for first in range(4) for group in groups[first::4]]
    return samples.subset(order)
