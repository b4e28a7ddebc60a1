"""The ranges of a plan's tensors from the job's data: by one method, or by a measured choice."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

import trtq
from trtq.cache import Key
from trtq.calibration.collect import collect_sharded
from trtq.calibration.effort import LEFT_OUT, STEP_SECONDS, Effort
from trtq.calibration.extents import MOST_ROWS, measure_extents, measure_reach
from trtq.calibration.methods import AUTO, Method, parse_method, scales_from
from trtq.calibration.mixed import mixed_tensors
from trtq.calibration.refine import refine_ranges, rows_of_search
from trtq.calibration.search import CANDIDATES, Choice, Rows, Trials, choose_method
from trtq.calibration.statistics import Statistics
from trtq.calibration.table import Table
from trtq.data.samples import Samples
from trtq.errors import InputError, about
from trtq.graph.half_rules import Extent, float32_nodes
from trtq.graph.model import Model
from trtq.graph.place import without_ranges
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.graph.selecting import instead_of_outputs
from trtq.graph.weights import graph_sha256
from trtq.job import Job
from trtq.numerics import has_scale, scale_from_amax
from trtq.simulation.rows import check_runs
from trtq.simulation.session import simulation_fingerprint
from trtq.simulation.workers import Work

NEVER_SEEN = "never-seen"
"""Rule of the plan for nodes that stay in floating point because calibration gives an input no range."""

LEAST_GAIN_DB, GAIN_OF_ONE_ROW_DB = 0.05, 0.5
"""What must be gained on the rows held back: the second over the square root of their number, since what few
rows gain is in part their own, and at least the first."""

MOST_HELD_BACK = 256
"""Rows held back that everything is scored on, evenly spread: more would not tell more."""

CUT_SHORT = "cut-short"
"""Note on ranges that more time might have made better; the cache does not keep them."""


@dataclass(frozen=True)
class FloatGraph:
    """A float graph to calibrate, and the hash in the cache keys of what is made from it."""

    graph: gs.Graph
    sha256: str

    @classmethod
    def of(cls, model: Model) -> FloatGraph:
        """A model's own graph."""
        return cls(model.graph, model.sha256)

    @classmethod
    def of_graph(cls, model: Model, graph: gs.Graph) -> FloatGraph:
        """A graph that may be the model's own."""
        return cls.of(model) if graph is model.graph else cls(graph, graph_sha256(graph))


def calibrate(job: Job, plan: Plan) -> Quantization:
    """The plan's tensors with ranges by the recipe's method; from the cache where they are there.

    With `auto` every fourth sample is held back to measure on; the ranges are then made from all samples,
    which costs no further pass: the statistics of both parts add up.

    What calibration gives no range is not quantized: the plan of the result records it, with a warning.
    Where the rest is to be float16, the plan also says what stays float32.

    Raises:
        InputError: no node is left in INT8; or as collecting and measuring.
    """
    return with_float32_nodes(job, _calibrated(job, plan))


def unquantized(job: Job, plan: Plan) -> Quantization:
    """A plan without INT8 nodes as what a step of the workflow takes: the model in floating point, with what
    stays float32 where the rest is float16.

    Raises:
        InputError: the model does not run on the data.
    """
    notes = {
        "model": job.model.sha256,
        "data": job.data.hash,
        "rows": len(job.data),
        "trtq": trtq.__version__,
    }
    bare = Quantization(job.model.graph, plan, {}, notes=notes | {"method": "none"})
    return with_float32_nodes(job, bare)


def with_float32_nodes(job: Job, made: Quantization) -> Quantization:
    """A quantization whose plan also says what stays float32, where the rest is to be float16.

    Raises:
        InputError: the model does not run on the job's data.
    """
    if not job.recipe.half:
        return made
    plan, source = made.plan, FloatGraph.of_graph(job.model, made.graph)
    given = {node.name for node in plan.float32}
    found = float32_nodes(source.graph, plan, made.scales, extents_of(job, source))
    float32 = [*plan.float32, *(node for node in found if node.name not in given)]
    made = replace(made, plan=replace(plan, float32=float32))
    if lines := made.plan.float32_lines():
        job.console.say("float32", "\n".join([f"{len(float32)} nodes stay float32:", *lines]))
    return made


def complete_table(job: Job, quantization: Quantization) -> Table:
    """The table of a quantization with a row for every other float tensor, whose range is its largest
    magnitude on the job's data.

    Q/DQ need the plan's rows only. TensorRT up to 10, quantizing by itself, runs a layer in INT8 only if all
    that it reads and writes has a scale. A tensor that is always zero, or not finite, has none, and none has
    what mixes ranges (`mixed_tensors`).

    Raises:
        InputError: the model does not run on the data.
    """
    source = FloatGraph.of_graph(job.model, quantization.graph)
    reached = reach_of(job, source, known_statistics(job, quantization.plan, source))
    mixed = mixed_tensors(quantization.graph, reached)
    others = {
        name: float(scale_from_amax(amax))
        for name, amax in reached.items()
        if math.isfinite(amax) and has_scale(amax) and name not in mixed
    }
    return Table.of(quantization, others)


def extents_of(job: Job, source: FloatGraph) -> dict[str, Extent]:
    """The extents of a graph's tensors over some of the job's data, from the cache where they are there.

    Raises:
        InputError: the model does not run on the data.
    """
    key = _figures_key(job, source, "extents", rows=MOST_ROWS)
    if (content := job.cache.fetch(key)) is not None:
        return {name: Extent(*figures) for name, figures in json.loads(content).items()}
    extents = measure_extents(source.graph, job.data, workers=job.recipe.threads)
    job.cache.store(key, json.dumps({name: astuple(extent) for name, extent in extents.items()}).encode())
    return extents


def reach_of(job: Job, source: FloatGraph, seen: Statistics | None = None) -> dict[str, float]:
    """Tensor -> its largest magnitude over all of the job's data, from the cache where it is there.

    Args:
        seen: statistics of some tensors over these data.

    Raises:
        InputError: the model does not run on the data.
    """
    key = _figures_key(job, source, "reach")
    if (content := job.cache.fetch(key)) is not None:
        found: dict[str, float] = json.loads(content)
        return found
    known = {} if seen is None else {name: histogram.amax for name, histogram in seen.histograms.items()}
    reach = measure_reach(source.graph, job.data, known, workers=job.recipe.threads)
    job.cache.store(key, json.dumps(reach).encode())
    return reach


def _figures_key(job: Job, source: FloatGraph, kind: str, **parts: object) -> Key:
    """Where figures of a graph's tensors over the job's data are kept."""
    return Key.of(
        kind, model=source.sha256, data=job.data.hash, opset=source.graph.opset,
        executor=simulation_fingerprint(), **parts,
    )  # fmt: skip


@dataclass(frozen=True)
class Ranges:
    """What the ranges of a plan's tensors on one float graph are made from.

    Attributes:
        bare: the graph, and the plan without the quantizers of tensors that calibration gives no range; its
            notes say where the data come from.
        fitting: statistics of the rows to fit on, which every search goes by.
        whole: of all rows, which the ranges are made from at last.
    """

    bare: Quantization
    fitting: Statistics
    whole: Statistics

    @classmethod
    def of(cls, job: Job, plan: Plan, source: FloatGraph) -> Ranges:
        """Collected on the job's data, with a warning for every tensor that they give no range.

        Raises:
            InputError: the model does not run, no node is left in INT8, or as collecting.
        """
        check_runs(job.model.path, job.data)
        fitting, whole = _both_statistics(job, plan.tensors, source)
        method = job.recipe.method
        reasons = rangeless(whole, method if isinstance(method, Method) else None)
        notes = {"model": job.model.sha256, "data": job.data.hash, "rows": len(job.data)}
        notes |= {"trtq": trtq.__version__, "requested": str(method)}
        notes |= {NEVER_SEEN: reasons} if reasons else {}
        bare = ranged(job, Quantization(source.graph, plan, {}, notes=notes), reasons)
        return cls(bare, fitting, whole)

    def of_changed(self, job: Job, source: FloatGraph, plan: Plan, tensors: Collection[str]) -> Ranges:
        """Those of another graph with its plan, whose tensors are the same but for the named ones; these are
        collected.

        A plan without INT8 nodes is possible.

        Raises:
            InputError: as collecting.
        """
        bare = replace(self.bare, graph=source.graph, plan=plan)
        changed = [tensor for tensor in plan.tensors if tensor in tensors]
        if not changed:
            return replace(self, bare=bare)
        parts = _both_statistics(job, changed, source)
        fitting, whole = (
            Statistics({**old.histograms, **new.histograms}, new.rows)
            for old, new in zip((self.fitting, self.whole), parts, strict=True)
        )
        return Ranges(without_ranges_of(bare, rangeless(parts[1])), fitting, whole)

    def fitted(self, method: Method) -> Quantization:
        """With scales by one method from the rows to fit on."""
        return self._with(scales_from(self.fitting, method))

    def made(self, method: Method, exceptions: Mapping[str, Method] | None = None) -> Quantization:
        """With scales from all rows, by one method or by the tensor's own among `exceptions`."""
        return self._with(scales_from(self.whole, method, exceptions))

    def _with(self, scales: Mapping[str, np.float32]) -> Quantization:
        return replace(self.bare, scales={name: scales[name] for name in self.bare.plan.tensors})


def _calibrated(job: Job, plan: Plan) -> Quantization:
    """`calibrate`, but for what stays float32."""
    bare, key = Quantization(job.model.graph, plan, {}), _table_key(job, plan)
    if (found := job.cache.fetch_noted(key)) is not None and serves(job, found[1]):
        content, notes = found
        bare = ranged(job, bare, notes.get(NEVER_SEEN, {}))
        job.console.say("calibration", f"{notes['method']}, from the cache; nothing was run")
        return replace(bare, scales=Table.from_bytes(content).scales, notes=notes)
    ranges = Ranges.of(job, plan, FloatGraph.of(job.model))
    rows = held_back(job) if job.recipe.method == AUTO else None
    choice, effort = best_method(job, ranges, rows), effort_of(job, plan)
    before = choice.sqnr_db.get(str(choice.method), math.nan)
    made = with_own_ranges(job, ranges, ranges.fitted(choice.method), choice, rows, before, effort)
    effort.say(job.console)
    if CUT_SHORT not in made.notes:
        job.cache.store(key, Table(made.scales).to_bytes(), made.notes)
    return made


def effort_of(job: Job, plan: Plan) -> Effort:
    """What calibration may take; a budget takes the place of the limit."""
    return Effort(job.model.graph, plan, len(job.data), bounded=job.recipe.budget is None)


def effort_of_step(job: Job, start: Quantization) -> Effort:
    """What a step of recovery may take."""
    bounded = job.recipe.budget is None
    return Effort(start.graph, start.plan, len(job.data), bounded=bounded, least=STEP_SECONDS)


def is_calibrated(job: Job, plan: Plan) -> bool:
    """Whether the cache has the ranges of the plan's tensors, so that `calibrate` runs nothing."""
    found = job.cache.fetch_noted(_table_key(job, plan))
    return found is not None and serves(job, found[1])


def serves(job: Job, notes: Mapping[str, Any]) -> bool:
    """Whether a result with these notes is what the job would make: with a budget nothing is left out."""
    return job.recipe.budget is None or LEFT_OUT not in notes


def rangeless(statistics: Statistics, method: Method | None = None) -> dict[str, str]:
    """Tensor -> why calibration gives it no range; a scale made up for it would pass unseen.

    Args:
        method: the one that gives all ranges; None: whichever does.
    """
    found = {}
    for tensor, histogram in statistics.histograms.items():
        if not histogram.total:
            found[tensor] = f"calibration saw no value of '{tensor}'"
        elif histogram.amax == 0:
            found[tensor] = f"calibration saw only zeros in '{tensor}'"
        elif not has_scale(histogram.amax):
            found[tensor] = (
                f"the largest magnitude that calibration saw in '{tensor}' is {histogram.amax:.2g},"
                " too small for a scale"
            )
        elif method is not None and not has_scale(method.amax(histogram)):
            found[tensor] = f"{method} keeps only zeros of '{tensor}'"
    return found


def without_ranges_of(quantization: Quantization, reasons: Mapping[str, str]) -> Quantization:
    """A quantization without the quantizers of the tensors that `rangeless` names."""
    plan = without_ranges(quantization.graph, quantization.plan, reasons, rule=NEVER_SEEN)
    return replace(quantization, plan=plan)


def ranged(job: Job, bare: Quantization, reasons: Mapping[str, str]) -> Quantization:
    """`without_ranges_of`, with a warning for each tensor.

    Raises:
        InputError: no node is left in INT8.
    """
    ranged = without_ranges_of(bare, reasons)
    if not ranged.plan.int8_nodes:
        raise InputError(
            "calibration leaves no node of the model in INT8",
            file=job.data.source,
            cause="; ".join(list(reasons.values())[:5]),
            remedy="give data that reach these tensors, or a table with their ranges (trtq quantize --table)",
        )
    for tensor, reason in reasons.items():
        nodes = dict.fromkeys(edge.node for edge in bare.plan.edges if edge.range == tensor)
        job.console.warn(
            f"{reason}: {', '.join(nodes)} read it in floating point; use data that reach it,"
            " or a table that has its range"
        )
    return ranged


def _table_key(job: Job, plan: Plan) -> Key:
    """What the ranges depend on: with `auto` also where quantizers stand and how much a run costs."""
    method = job.recipe.method
    search: dict[str, Any] = {}
    if method == AUTO:
        search = {
            "edges": [(edge.node, edge.index, edge.range, edge.rule) for edge in plan.edges],
            "weights": [(weight.node, weight.index, weight.axis) for weight in plan.weights],
            "macs": [node.macs for node in plan.nodes],
            "batch": plan.batch,
            "ignore_nonfinite": job.recipe.ignore_nonfinite,
        }
    return Key.of(
        "table",
        model=job.model.sha256,
        data=job.data.hash,
        opset=job.model.graph.opset,
        method=str(method),
        tensors=plan.tensors,
        quantized=plan.int8_nodes,
        executor=simulation_fingerprint(),
        **search,
    )


def _both_statistics(job: Job, tensors: Sequence[str], source: FloatGraph) -> tuple[Statistics, Statistics]:
    """Statistics of the rows to fit on, and of all rows.

    They are one with a fixed method. A tensor that only the rows held back have values of takes their
    histogram in both.
    """
    if job.recipe.method != AUTO or not job.enough:
        every = statistics_of(job, tensors, job.data, source)
        return every, every
    fitting, rest = (statistics_of(job, tensors, part, source) for part in job.parts)
    whole = Statistics.empty(tensors)
    whole.merge(fitting)
    whole.merge(rest)
    fitting.histograms |= {tensor: whole.histograms[tensor] for tensor in rangeless(fitting)}
    return fitting, whole


def known_statistics(job: Job, plan: Plan, source: FloatGraph) -> Statistics | None:
    """Statistics of the plan's tensors over all rows of the job as far as the cache has them; nothing is run.

    Returns:
        None where they are not in the cache.
    """
    for parts in ((job.data,), job.parts):
        statistics = Statistics.empty(plan.tensors)
        for part in parts:
            content = job.cache.fetch(_statistics_key(plan.tensors, part, source))
            if content is None:
                break
            statistics.merge(Statistics.from_bytes(content))
        else:
            return statistics
    return None


def keep_statistics(job: Job, ranges: Ranges) -> None:
    """Put statistics over all rows that were collected for one graph after the other into the cache."""
    source = FloatGraph.of_graph(job.model, ranges.bare.graph)
    key = _statistics_key(tuple(ranges.whole.histograms), job.data, source)
    job.cache.store(key, ranges.whole.to_bytes())


def _statistics_key(tensors: Sequence[str], samples: Samples, source: FloatGraph) -> Key:
    return Key.of(
        "statistics",
        model=source.sha256,
        data=samples.hash,
        opset=source.graph.opset,
        tensors=sorted(tensors),
        executor=simulation_fingerprint(),
    )


def statistics_of(job: Job, tensors: Sequence[str], samples: Samples, source: FloatGraph) -> Statistics:
    """Statistics of tensors over some rows, from the cache where they are there."""
    key = _statistics_key(tensors, samples, source)
    if (content := job.cache.fetch(key)) is not None:
        job.console.say("statistics", f"{len(samples)} rows from the cache, nothing was run")
        return Statistics.from_bytes(content)
    started = time.perf_counter()
    with about(samples.source):
        work = Work(key, job.cache, job.console, "statistics", job.recipe.parallel)
        statistics = collect_sharded(source.graph, tensors, samples, work, threads=job.recipe.threads)
    seconds = time.perf_counter() - started
    job.console.say("statistics", f"{len(samples)} rows, {len(tensors)} tensors in {seconds:.1f} s")
    return statistics


def held_back(job: Job) -> Rows:
    """The rows held back, or as many as are enough, to score quantizations of the job's model on.

    Raises:
        InputError: as `Rows`.
    """
    return _rows_of(job, job.parts[1].spread(MOST_HELD_BACK))


def _rows_of(job: Job, samples: Samples) -> Rows:
    recipe, tensors = job.recipe, instead_of_outputs(job.model.graph)
    with job.console.progress("fp32", len(samples)) as advance:
        return Rows(
            job.model.path if tensors is None else job.model.graph,
            samples,
            threads=recipe.threads,
            ignore_nonfinite=recipe.ignore_nonfinite,
            advance=advance,
            tensors=tensors,
        )


def best_method(job: Job, ranges: Ranges, rows: Rows | None) -> Choice:
    """The recipe's method, or with `auto` the one that does best for all tensors on the rows held back.

    Args:
        rows: those; only `auto` needs them.
    """
    if isinstance(job.recipe.method, Method):
        return Choice(job.recipe.method, {}, 0)
    assert rows is not None
    choice = choose_method(rows, ranges.bare, ranges.fitting, job.console, job.budget)
    job.console.say("method", _choice_text(choice))
    return choice


def with_own_ranges(
    job: Job,
    ranges: Ranges,
    start: Quantization,
    choice: Choice,
    rows: Rows | None,
    before: float,
    effort: Effort,
    shares: Mapping[str, float] | None = None,
) -> Quantization:
    """A quantization with scales from all rows: by the method that was chosen, and with `auto` by another for
    the tensors that do better with it.

    Of the ranges that the search changed those are kept that do better on other rows, too (see `_confirmed`).

    Args:
        start: the search begins here; it keeps its corrections of biases.
        rows: held back; only `auto` needs them.
        before: the SQNR of `start` in dB on these.
        effort: what the search may still take.
        shares: as for `refine_ranges`.

    Returns:
        with notes of the choice and the search; `CUT_SHORT` where the budget was spent meanwhile, and
        `LEFT_OUT`.
    """
    notes: dict[str, Any] = {**start.notes, "method": str(choice.method)}
    searched = job.recipe.method == AUTO and _fits_search(job, start.plan, effort, shares is None)
    notes |= {LEFT_OUT: list(effort.left_out)} if effort.left_out else {}
    if not searched:
        return replace(start, scales=ranges.made(choice.method).scales, notes=notes)
    assert rows is not None
    console, tensors = job.console, start.plan.tensors
    others = [parse_method(name) for name in CANDIDATES if name != str(choice.method)]
    started = time.perf_counter()
    refined = refine_ranges(
        start,
        ranges.fitting,
        choice.method,
        others,
        job.parts[0],
        console,
        workers=job.recipe.threads,
        ignore_nonfinite=job.recipe.ignore_nonfinite,
        budget=job.budget,
        shares=shares,
    )
    exceptions, confirmed = _confirmed(
        job, start, ranges.fitting, choice.method, refined.exceptions, rows, before
    )
    better = f"{len(exceptions)} of {len(tensors)} tensors do better with their own"
    if confirmed is not None:
        better += f": {confirmed.before_db:.1f} -> {confirmed.after_db:.1f} dB on {confirmed.rows} rows"
    console.say(
        "ranges",
        f"{better}; {refined.runs} runs ({refined.passes:.1f} passes over the data)"
        f" in {time.perf_counter() - started:.1f} s",
    )
    notes |= {
        "sqnr_db": dict(choice.sqnr_db),
        "confirmed": None if confirmed is None else asdict(confirmed),
        "held_back": choice.rows,
        "exceptions": {tensor: str(method) for tensor, method in exceptions.items()},
        "runs": refined.runs,
        "passes": round(refined.passes, 1),
    }
    if job.budget.over:
        console.warn("the budget was spent before the search for ranges was complete")
        notes[CUT_SHORT] = True
    return replace(start, scales=ranges.made(choice.method, exceptions).scales, notes=notes)


def _fits_search(job: Job, plan: Plan, effort: Effort, shares: bool) -> bool:
    """Whether the search for ranges of their own fits into what calibration may take.

    Args:
        shares: it measures these, too.
    """
    for_shares, others = rows_of_search(plan, len(job.parts[0]))
    parts = [effort.plain(0), effort.quantized(others), *([effort.alone(for_shares)] if shares else [])]
    return effort.takes("ranges of their own", *parts)


@dataclass(frozen=True)
class Confirmation:
    """What ranges of their own do for the outputs: their SQNR in dB before and after, on some rows."""

    rows: int
    before_db: float
    after_db: float


def _confirmed(
    job: Job,
    bare: Quantization,
    statistics: Statistics,
    start: Method,
    found: Mapping[str, Method],
    rows: Rows,
    before: float,
) -> tuple[dict[str, Method], Confirmation | None]:
    """The tensors whose own methods do better on other rows than those of the search: all that were found, or
    those that each do better with the ones before it; while the budget lasts. None where that gains too
    little.

    Args:
        rows: held back.
        before: the SQNR without them on these rows.
    """
    kept: dict[str, Method] = {}
    if not found:
        return kept, None
    trials = Trials(rows, bare)

    def sqnr_db(exceptions: Mapping[str, Method]) -> float:
        return trials.sqnr_db(scales_from(statistics, start, exceptions))

    best, together = before, sqnr_db(found)
    for tensor, method in found.items() if len(found) > 1 else ():
        if job.budget.over:
            break
        score = sqnr_db({**kept, tensor: method})
        if score > best:
            kept[tensor], best = method, score
    if together > best:
        kept, best = dict(found), together
    if best < before + least_gain_db(len(rows.samples)):
        kept, best = {}, before
    return kept, Confirmation(len(rows.samples), before, best)


def least_gain_db(rows: int) -> float:
    """What must be gained on so many rows held back for something to be kept."""
    return max(LEAST_GAIN_DB, GAIN_OF_ONE_ROW_DB / math.sqrt(rows))


def _choice_text(choice: Choice) -> str:
    """The methods tried, best first."""
    ranked = sorted(choice.sqnr_db.items(), key=lambda item: -item[1])
    tried = ", ".join(f"{name} {value:.1f} dB" for name, value in ranked)
    return f"{choice.method}: best of {tried} on {choice.rows} rows held back"
