"""The ranges of a plan's tensors from the job's data: by one method, or by a measured choice."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import onnx_graphsurgeon as gs

import trtq
from trtq.backends.onnxruntime import simulation_fingerprint
from trtq.cache import Key
from trtq.calibration.methods import parse_method
from trtq.calibration.statistics import Statistics
from trtq.calibration.table import Table
from trtq.choose import CANDIDATES, Choice, choose_method, scales_from
from trtq.data.samples import Samples
from trtq.errors import about
from trtq.graph.plan import Plan
from trtq.graph.weights import graph_sha256
from trtq.job import Job
from trtq.parallel import collect_sharded
from trtq.quantization import Quantization
from trtq.refine import refine_ranges


@dataclass(frozen=True)
class Source:
    """A float graph to calibrate, and the hash that what is cached of it goes by."""

    graph: gs.Graph
    sha256: str

    @classmethod
    def changed(cls, graph: gs.Graph) -> Source:
        """A graph that is no longer the model's own."""
        return cls(graph, graph_sha256(graph))


def calibrate(job: Job, plan: Plan, source: Source | None = None) -> Quantization:
    """The plan's tensors with ranges by the recipe's method; from the cache where they are there.

    With `auto` every fourth sample is held back to measure on; the ranges are then made from all samples,
    which costs no further pass: the statistics of both parts add up.

    Args:
        source: what to calibrate; default: the job's model.
    """
    source = source or Source(job.model.graph, job.model.sha256)
    requested, data = job.recipe.method, job.data
    detail: dict[str, Any] = {"requested": requested, "tensors": plan.tensors, "quantized": plan.int8_nodes}
    detail["executor"] = simulation_fingerprint()
    if requested == "auto":  # the search sees where quantizers stand, and how much a run costs
        detail["edges"] = [(edge.node, edge.index, edge.range) for edge in plan.edges]
        detail["macs"] = [plan.batch, *(node.macs for node in plan.nodes)]
    if job.recipe.ignore_nonfinite:  # without it, what was made so is refused
        detail["ignore_nonfinite"] = True
    key = Key("table", source.sha256, data.hash, detail)
    bare = Quantization(source.graph, plan, {})
    if (content := job.cache.fetch(key)) is not None:
        notes = job.cache.notes(key)
        job.console.say("calibration", f"{notes['method']}, from the cache; nothing was run")
        return replace(bare, scales=Table.from_bytes(content).scales, notes=notes)
    notes = {"model": job.model.sha256, "data": data.hash, "rows": len(data)}
    notes |= {"trtq": trtq.__version__, "requested": requested}
    if requested == "auto":
        quantization = _search(job, bare, source)
    else:
        scales = scales_from(statistics_of(job, plan, data, source), parse_method(requested))
        quantization = replace(bare, scales=scales, notes={"method": str(parse_method(requested))})
    scales = {name: quantization.scales[name] for name in plan.tensors}
    notes |= quantization.notes
    job.cache.store(key, Table(scales).to_bytes(), notes)
    return replace(bare, scales=scales, notes=notes)


def statistics_of(job: Job, plan: Plan, samples: Samples, source: Source) -> Statistics:
    """Statistics of the plan's tensors over some rows, from the cache where they are there."""
    detail = {"tensors": sorted(plan.tensors), "executor": simulation_fingerprint()}
    key = Key("statistics", source.sha256, samples.hash, detail)
    if (content := job.cache.fetch(key)) is not None:
        job.console.say("statistics", f"{len(samples)} rows from the cache, nothing was run")
        return Statistics.from_bytes(content)
    started = time.perf_counter()
    with about(samples.source):
        statistics = collect_sharded(
            source.graph,
            plan.tensors,
            samples,
            parallel=job.recipe.parallel,
            cache=job.cache,
            key=key,
            console=job.console,
            threads=job.recipe.threads,
        )
    seconds = time.perf_counter() - started
    job.console.say("statistics", f"{len(samples)} rows, {len(plan.tensors)} tensors in {seconds:.1f} s")
    return statistics


def _search(job: Job, bare: Quantization, source: Source) -> Quantization:
    """`--method auto`: the best method for all, and for each tensor another if it does better with it.

    The ranges that the search changed are kept only if they do better on the rows held back, too.
    """
    plan, console = bare.plan, job.console
    fitting, held_back = job.parts
    statistics = statistics_of(job, plan, fitting, source)
    choice = choose_method(job.measure, bare, statistics)
    console.say("method", _choice_text(choice))
    others = [parse_method(name) for name in CANDIDATES if name != str(choice.method)]
    refined = refine_ranges(
        bare,
        statistics,
        choice.method,
        others,
        fitting,
        console,
        workers=job.recipe.threads,
        ignore_nonfinite=job.recipe.ignore_nonfinite,
    )
    before = choice.sqnr_db[str(choice.method)]
    own = scales_from(statistics, choice.method, refined.exceptions)
    after = job.measure.sqnr_db(replace(bare, scales=own), "ranges")
    exceptions = refined.exceptions if after > before else {}
    console.say(
        "ranges",
        f"{len(exceptions)} of {len(plan.tensors)} tensors do better with their own: "
        f"{before:.1f} -> {max(before, after):.1f} dB on the rows held back",
    )
    if job.enough:
        statistics.merge(statistics_of(job, plan, held_back, source))
    notes: dict[str, Any] = {
        "method": str(choice.method),
        "sqnr_db": dict(choice.sqnr_db),
        "sqnr_db_with_exceptions": after,
        "held_back": len(held_back),
        "exceptions": {tensor: str(method) for tensor, method in exceptions.items()},
    }
    return replace(bare, scales=scales_from(statistics, choice.method, exceptions), notes=notes)


def _choice_text(choice: Choice) -> str:
    """The methods tried, best first."""
    ranked = sorted(choice.sqnr_db.items(), key=lambda item: -item[1])
    tried = ", ".join(f"{name} {value:.1f} dB" for name, value in ranked)
    return f"{choice.method}: best of {tried} on {choice.rows} rows held back"
