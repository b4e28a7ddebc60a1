"""Label-free fixes that cost nothing at run time: what helps on the rows held back is kept.

`shift` and `smooth` change the float graph without changing its function, so that its activations quantize
better; it is then calibrated again. `bias` makes up for the mean error that is left, and comes last: it
belongs to the ranges it was measured with. What helps one network harms another, and `shift` may pay only
together with `bias`, so every combination is measured. From the best of them `rescale` goes on: it inserts
scales where none can be folded, as far as the engine gains no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import onnx_graphsurgeon as gs

from trtq.calibration.calibrate import (
    FloatGraph,
    calibrate,
    held_back,
    rangeless,
    statistics_of,
    without_ranges_of,
)
from trtq.calibration.methods import AUTO, parse_method, scales_from
from trtq.calibration.search import Rows, choose_method
from trtq.console import SILENT
from trtq.data.samples import Samples
from trtq.graph.quantization import Quantization
from trtq.job import Job
from trtq.recovery.fixes.bias import correct_biases
from trtq.recovery.fixes.rescale import rescale
from trtq.recovery.fixes.shift import shift
from trtq.recovery.fixes.smooth import smooth
from trtq.recovery.made import Made

PASSES: tuple[tuple[str, Callable[..., gs.Graph | None]], ...] = (("shift", shift), ("smooth", smooth))
"""Passes that leave the function as it is, in the order in which they are applied."""

LEAST_GAIN_DB = 0.05


def fix(job: Job, start: Quantization) -> Made:
    """The quantization with the combination of fixes that does best on the rows held back.

    The rows to fit on decide how the graph is changed; what is kept is calibrated again, by the recipe's
    method and from all rows.

    Returns:
        nothing where no fix helps, and what was tried; once the job's budget is spent, nothing more is.
    """
    fitting, _ = job.parts
    rows = held_back(job)
    found = {"as calibrated": rows.sqnr_db(start, job.console, "calibrated")}
    candidates: dict[str, Quantization] = {}
    for wanted in product((False, True), repeat=len(PASSES)):
        if job.budget.over:
            break
        names = [name for (name, _), use in zip(PASSES, wanted, strict=True) if use]
        changed = _changed(job, rows, start, names)
        if changed is None:
            continue
        for last in ([], ["bias"]):
            if names or last:
                label = " + ".join([*names, *last])
                candidate = _corrected(job, changed, fitting) if last else changed
                found[label] = rows.sqnr_db(candidate, job.console, label)
                candidates[label] = changed
    best, after = max(found.items(), key=lambda item: item[1])
    kept, taken = start, list[str]()
    if after >= found["as calibrated"] + LEAST_GAIN_DB:
        kept, taken = candidates[best], best.split(" + ")
        if kept.graph is not start.graph:
            kept = calibrate(job, start.plan, FloatGraph.changed(kept.graph))
    made = _corrected(job, kept, job.data) if "bias" in taken else kept
    if not job.budget.over and (scaled := rescale(job, kept)) is not None:
        names = [*(name for name in taken if name != "bias"), "rescale"]
        for last in ([], ["bias"]):
            candidate = _corrected(job, scaled, job.data) if last else scaled
            name = " + ".join([*names, *last])
            found[name] = rows.sqnr_db(candidate, job.console, name)
            if found[name] >= after + LEAST_GAIN_DB:
                made, after, taken = candidate, found[name], [*names, *last]
    ranked = sorted(found.items(), key=lambda item: -item[1])
    tried = ", ".join(f"{name} {value:.1f} dB" for name, value in ranked)
    job.console.say("fixes", tried)
    whole = not job.budget.over
    if not taken:
        return Made(None, whole, f"nothing helped: {tried}")
    notes = {**made.notes, "fixes": " + ".join(taken), "fixes_sqnr_db": found}
    return Made(replace(made, notes=notes), whole)


def _changed(job: Job, rows: Rows, start: Quantization, names: list[str]) -> Quantization | None:
    """The start with its graph changed by some passes; None where one of them has nothing to do.

    Args:
        rows: held back, to choose a method on where the recipe names none.
    """
    graph, (fitting, _) = start.graph, job.parts
    for name, change in PASSES:
        if name in names:
            made = change(graph, start.plan, fitting, workers=job.recipe.threads)
            if made is None:
                return None
            graph = made
    if not names:
        return start
    statistics = statistics_of(job, start.plan, fitting, FloatGraph.changed(graph))
    method, search = parse_method(start.notes["method"]), job.recipe.method == AUTO
    reasons = rangeless(statistics, None if search else method)
    changed = without_ranges_of(replace(start, graph=graph), reasons)
    if not changed.plan.int8_nodes:
        return None
    if search:
        method = choose_method(rows, changed, statistics, job.console, job.budget).method
    return replace(changed, scales=scales_from(statistics, method))


def _corrected(job: Job, quantization: Quantization, samples: Samples) -> Quantization:
    return correct_biases(quantization, samples, SILENT, workers=job.recipe.threads)
