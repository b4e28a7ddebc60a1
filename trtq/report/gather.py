"""What `deploy` knows at its end and the report shows: looked up, nothing is run on the data again."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.calibration.calibrate import FloatGraph, known_statistics
from trtq.calibration.methods import amax_of, parse_method, sqnr_db
from trtq.calibration.search import CANDIDATES
from trtq.calibration.statistics import Histogram, Statistics
from trtq.cost.fused import Fused, fuse
from trtq.cost.interface import Rest
from trtq.cost.placed import placed
from trtq.gate.evaluation import Evaluation
from trtq.graph.groups import groups
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.graph.shapes import concrete_shapes
from trtq.job import Job, opt_shapes
from trtq.numerics import INT8_MAX, has_scale
from trtq.recovery.attempt import Attempt
from trtq.recovery.partial import rows_to_search
from trtq.recovery.sensitivity import fast_rows, known
from trtq.recovery.speed import builder_of, rest_of
from trtq.report.manifest import versions
from trtq.report.record import (
    IN_USE,
    Cost,
    Data,
    GraphNode,
    LayerNoise,
    Noise,
    Record,
    Sample,
    TensorValues,
    Threshold,
)
from trtq.report.thumbnails import thumbnails
from trtq.simulation.simulator import Effect

MOST_LAYERS = 40
"""Layers whose noise is kept, the noisiest first."""

MOST_TENSORS = 24
"""Tensors whose values are kept, those first that lose most."""

BARS = 64
"""Bars of a tensor's histogram."""

MOST_NODES = 2000
"""A graph of more nodes is not drawn."""


def record_of(
    job: Job, evaluation: Evaluation, attempts: Sequence[Attempt], best: Attempt, command: str
) -> Record:
    """What there is to show of a job whose attempt `best` is delivered."""
    quantization = best.quantization
    tensors = _tensors(job, attempts, quantization)
    nodes, count = graph_nodes(quantization.graph, MOST_NODES)
    return Record(
        made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=command,
        model=str(job.recipe.model),
        sha256=job.model.sha256,
        data=Data(job.data.source, len(job.data)),
        eval=Data(evaluation.samples.source, len(evaluation.samples)),
        versions=versions(job.recipe),
        noise=_noise(job, attempts, best),
        tensors=tensors,
        tensor_count=len(quantization.plan.tensors),
        samples=_samples(evaluation, best),
        costs=_costs(job, quantization),
        batch=quantization.plan.batch,
        nodes=nodes,
        node_count=count,
    )


def _noise(job: Job, attempts: Sequence[Attempt], best: Attempt) -> Noise | None:
    """The noise of each layer where the workflow or the diagnosis measured it, which they do only where the
    first attempt does not pass: of the delivered attempt, or of the last one before it."""
    if len(attempts) == 1 and best.measured.passed:
        return None
    others = [attempt for attempt in reversed(attempts) if attempt is not best]
    for attempt in (best, *others):
        start = attempt.quantization
        count = len(groups(start.graph, start.plan))
        every = len(rows_to_search(job, start))
        few, whole = fast_rows(every, count), job.key("sensitivity", start)
        fast = replace(whole, entries={**whole.entries, "rows": few})
        for rows, key in ((every, whole), (few, fast)):
            if effects := known(start, job.cache, key):
                return Noise(attempt.step, rows, _layers(effects, start.plan), len(effects))
    return None


def _layers(effects: Sequence[Effect], plan: Plan) -> tuple[LayerNoise, ...]:
    ranked = sorted(effects, key=lambda effect: -effect.noise)[:MOST_LAYERS]
    total = sum(effect.noise for effect in effects)
    macs = sum(node.macs or 0 for node in plan.nodes)
    return tuple(
        LayerNoise(
            nodes=effect.group.nodes,
            op=effect.group.op,
            sqnr_db=effect.sqnr_db,
            share=effect.noise / total if total else 0.0,
            mac_share=effect.group.macs / macs if macs and effect.group.macs is not None else None,
        )
        for effect in ranked
    )


def _tensors(job: Job, attempts: Sequence[Attempt], quantization: Quantization) -> tuple[TensorValues, ...]:
    """The quantized tensors that lose most, where their statistics are in the cache."""
    statistics = _statistics(job, attempts, quantization)
    if statistics is None:
        return ()
    plan, found = quantization.plan, {}
    for tensor in plan.tensors:
        histogram, amax = statistics.histograms.get(tensor), float(quantization.scales[tensor]) * INT8_MAX
        if histogram is not None and has_scale(histogram.amax):
            found[tensor] = (sqnr_db(histogram, amax), histogram, amax)
    most = sorted(found, key=lambda tensor: found[tensor][0])[:MOST_TENSORS]
    return tuple(tensor_values(tensor, *found[tensor][1:], _readers(plan, tensor)) for tensor in most)


def _statistics(job: Job, attempts: Sequence[Attempt], quantization: Quantization) -> Statistics | None:
    """Statistics of the delivered graph, which were collected for a plan that may have had more quantizers;
    None of one whose weights were learned, where none are."""
    source = FloatGraph.of_graph(job.model, quantization.graph)
    plans = (quantization.plan, *(attempt.quantization.plan for attempt in attempts), job.place())
    found = (known_statistics(job, plan, source) for plan in plans)
    return next((statistics for statistics in found if statistics is not None), None)


def _readers(plan: Plan, tensor: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(edge.node for edge in plan.edges if edge.range == tensor))


def tensor_values(
    tensor: str, histogram: Histogram, amax: float, readers: Sequence[str] = ()
) -> TensorValues:
    """A tensor's histogram in `BARS` bars up to its largest magnitude, and where every method cuts it off.

    Args:
        amax: of the range in use.
    """
    thresholds = {IN_USE: amax} | {name: amax_of(parse_method(name), histogram) for name in CANDIDATES}
    return TensorValues(
        tensor=tensor,
        readers=tuple(readers),
        counts=tuple(_bars(histogram).tolist()),
        amax=histogram.amax,
        low=histogram.low,
        high=histogram.high,
        thresholds=tuple(
            Threshold(name, value, _beyond(histogram, value), _finite(sqnr_db(histogram, value)))
            for name, value in thresholds.items()
        ),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _below(histogram: Histogram, magnitudes: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many values lie below magnitudes, for values spread evenly inside their bins."""
    return np.interp(magnitudes, histogram.edges, np.concatenate([[0], np.cumsum(histogram.counts)]))


def _bars(histogram: Histogram) -> NDArray[np.int64]:
    """Counts of |x| in bars of equal width up to the largest; all values are counted."""
    below = _below(histogram, np.linspace(0, histogram.amax, BARS + 1))
    below[-1] = histogram.total
    whole = np.rint(below).astype(np.int64)
    return whole[1:] - whole[:-1]


def _beyond(histogram: Histogram, amax: float) -> float:
    """Share of the values above a magnitude."""
    if amax >= histogram.amax:
        return 0.0
    return 1 - float(_below(histogram, np.array([amax]))[0]) / histogram.total


def _samples(evaluation: Evaluation, best: Attempt) -> tuple[Sample, ...]:
    """The least similar samples that have an image."""
    found = ((number, thumbnails(evaluation.samples, number)) for number in best.verdict.worst_samples)
    return tuple(Sample(number, images) for number, images in found if images)


def _costs(job: Job, quantization: Quantization) -> tuple[Cost, ...]:
    """Kernels and bytes of engines of the model: without INT8, with all of it, and as delivered."""
    plan, rest = quantization.plan, rest_of(job.recipe)
    shapes, builder = opt_shapes(job.model, job.profile), builder_of(job.recipe)

    def fused_of(graph: gs.Graph) -> Fused:
        return fuse(graph, concrete_shapes(graph, shapes))

    def cost(name: str, fused: Fused, plan: Plan, rest: Rest) -> Cost:
        kernels = placed(fused, plan, rest, builder)
        loads = [
            load for each in kernels for load in (each.load, *each.after, *(b.load for b in each.before))
        ]
        return Cost(name, len(loads), sum(load.bytes for load in loads))

    whole, fused = job.place(), fused_of(job.model.graph)
    bare = replace(whole, nodes=[replace(n, int8=False) for n in whole.nodes], edges=[], weights=[])
    found = [cost("FP32", fused, bare, "fp32"), cost("FP16", fused, bare, "fp16")]
    if whole.int8_nodes:
        found.append(cost(f"every layer that can in INT8, the rest {rest.upper()}", fused, whole, rest))
    if plan.int8_nodes and plan.inputs != whole.inputs:
        delivered = fused if quantization.graph is job.model.graph else fused_of(quantization.graph)
        found.append(cost(f"as delivered, the rest {rest.upper()}", delivered, plan, rest))
    return tuple(found)


def graph_nodes(graph: gs.Graph, most: int) -> tuple[tuple[GraphNode, ...], int]:
    """The nodes of a graph, with its inputs as nodes of their own, in an order in which they can run.

    Args:
        most: a larger graph gives none.

    Returns:
        the nodes, and how many there are.
    """
    ordered = list(_runnable(graph))
    if len(ordered) > most:
        return (), len(ordered)
    made: dict[str, int] = {}
    nodes: list[GraphNode] = []
    for tensor in graph.inputs:
        made[tensor.name] = len(nodes)
        nodes.append(GraphNode(tensor.name, "input", ()))
    for node in ordered:
        inputs = dict.fromkeys(made[t.name] for t in node.inputs if t.name in made)
        made |= dict.fromkeys((t.name for t in node.outputs if t.name), len(nodes))
        nodes.append(GraphNode(node.name, node.op, tuple(inputs)))
    ends = [tensor.name for tensor in graph.outputs if tensor.name in made]
    nodes += [GraphNode(name, "output", (made[name],)) for name in ends]
    return tuple(nodes), len(ordered)


def _runnable(graph: gs.Graph) -> Iterator[gs.Node]:
    """The nodes of a graph in its own order, but each behind those that it reads from."""
    owner = {tensor.name: node for node in graph.nodes for tensor in node.outputs}
    done: set[int] = set()
    for last in graph.nodes:
        waiting = [last]
        while waiting:
            node = waiting[-1]
            before = [owner[t.name] for t in node.inputs if t.name in owner and id(owner[t.name]) not in done]
            if id(node) in done or not before:
                waiting.pop()
                if id(node) not in done:
                    done.add(id(node))
                    yield node
            else:
                waiting += before
