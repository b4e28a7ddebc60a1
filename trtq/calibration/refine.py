"""The range of each tensor by its effect on the outputs: a search beyond one method for all.

The tensor whose rounding matters most is not the one with the largest error of its own: what a residual
stream loses, every later layer sees. So, after one method is chosen for all, each tensor in the order of
the graph tries every other method and some narrower ranges, and keeps the one with the best
signal-to-quantization-noise ratio of the model's outputs. Scales are run-time inputs of one session, and
what does not look better on a quarter of the rows is not measured on the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import onnx_graphsurgeon as gs

from trtq.calibration.choose import amax_of, scales_from
from trtq.calibration.methods import Method, scaled
from trtq.calibration.statistics import Statistics
from trtq.console import Console
from trtq.data.batches import Arrays, Batch
from trtq.data.samples import Samples
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.graph.rewrite import scales_as_inputs
from trtq.numerics import scale_from_amax
from trtq.simulation.finite import check_reference
from trtq.simulation.processors import processors
from trtq.simulation.rows import Runner
from trtq.simulation.similarity import Reference

NARROWER = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Factors on the chosen method's amax that are tried as well."""

FEWEST_ROWS, MOST_ROWS = 16, 256
MAC_BUDGET = 2e12
"""Rows are as many as fit into this many multiply-accumulates for the whole search, within those bounds."""

LEAST_GAIN_DB = 0.01
BATCH = 8


@dataclass(frozen=True)
class Refinement:
    """What the search found: the tensors that do better with a method of their own."""

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

    The result depends on neither the number of workers nor the time it takes: every run is on one thread,
    and the number of rows follows from the model's multiply-accumulates.

    Args:
        quantization: its scales are not looked at.
        statistics: of the plan's tensors.
        start: the method for tensors that no other does better for.
        methods: the others to try, besides `NARROWER` ranges of `start`.
        samples: the rows to measure on; an evenly spread part of them is used.
        workers: runs at once; default: one for each processor.
        ignore_nonfinite: measure only where the outputs are finite in fp32.

    Raises:
        InputError: they are not finite, and nothing was said of it.
    """
    plan = quantization.plan
    options = {
        tensor: _options(
            tensor, statistics, [*methods, *(scaled(start, factor) for factor in NARROWER)], start
        )
        for tensor in plan.tensors
    }
    runs = sum(len(tried) for tried in options.values())
    rows = _row_count(plan, runs, len(samples))
    samples = _spread(samples, rows)
    part, expected = _outputs(quantization.graph, samples)
    for batch, outputs in zip(part, expected, strict=True):
        check_reference(outputs, ignore_nonfinite=ignore_nonfinite, samples=samples, batch=batch)
    reference = Reference(expected)
    current = scales_from(statistics, start)
    quantized = replace(quantization, scales=current).rewritten()
    inputs = scales_as_inputs(quantized, plan)
    dtypes = {tensor.name: tensor.dtype for tensor in quantized.inputs}
    runner = Runner(quantized)
    exceptions: dict[str, Method] = {}

    def score(scales: Mapping[str, np.float32], count: int) -> float:
        """SQNR of the outputs together over the first `count` batches."""
        given = {name: np.array(scales[tensor], dtypes[name]) for tensor, name in inputs.items()}
        return reference.sqnr_db(runner.run(batch.feed | given) for batch in part[:count])

    few, every = max(len(part) // 4, 1), len(part)
    glance, best = score(current, few), score(current, every)
    with (
        ThreadPoolExecutor(workers or processors()) as pool,
        console.progress("ranges", runs, "run") as advance,
    ):
        for tensor, tried in options.items():
            trials = {method: {**current, tensor: scale} for method, scale in tried.items()}
            glances = dict(zip(trials, pool.map(score, trials.values(), repeat(few)), strict=True))
            promising = [method for method in trials if glances[method] > glance]
            measured = pool.map(score, [trials[method] for method in promising], repeat(every))
            scores = dict(zip(promising, measured, strict=True))
            advance(len(trials))
            if scores and max(scores.values()) > best + LEAST_GAIN_DB:
                method = max(scores, key=scores.__getitem__)
                best, glance, current = scores[method], glances[method], trials[method]
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


def _outputs(graph: gs.Graph, samples: Samples) -> tuple[list[Batch], list[Arrays]]:
    """The batches, and a graph's outputs of each; its session, with all the weights, is then closed."""
    runner = Runner(graph)
    part = list(runner.batches(samples, BATCH))
    return part, [runner.on(batch, samples) for batch in part]
