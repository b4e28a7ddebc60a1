"""A calibration table of TensorRT 10 or older becomes an explicit model: Q/DQ where `place` puts it.

Such a table names tensors of the ONNX model as it was before any fusion; the Q/DQ model has the same float32
scales, to the bit. `to_table` goes the other way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import trtq
from trtq.calibration.extents import measure_extents
from trtq.calibration.table import Table
from trtq.console import Console
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.files import PathLike
from trtq.graph.half_rules import Extent, float32_nodes
from trtq.graph.place import POOL, pattern_of, place
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.migration.fit import Fit, doubts, is_positional, require_complete
from trtq.migration.source import Source, observe
from trtq.recipe import Recipe

NO_RANGE = "no-range"
"""Rule of the plan for nodes that stay in floating point because the table has no row for an input."""


def quantize_with_table(
    source: Source,
    table: Table,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    rest: str = "fp32",
    observed: Mapping[str, float] | None = None,
    extents: Mapping[str, Extent] | None = None,
) -> tuple[Quantization, Fit]:
    """The model with the table's scales where `place` puts Q/DQ, and how the table fits it.

    A node that lacks the range of one of its inputs stays in floating point, and the plan says why; a
    residual addition or an average pooling that lacks it is not fused. Tables need not have the latter's.

    Args:
        include, exclude, input_shapes: as `place`.
        rest: precision of what is not quantized, "fp32" or "fp16".
        observed: row -> amax seen on data, to tell scales from other readings of the file.
        extents: float32 tensor -> its extent on data: decides what stays float32 with `rest` "fp16".

    Raises:
        InputError: the table was made for another model or lacks a range for every node; or as `place`.
    """
    model = source.model
    table.check_made_for(model.sha256, model.path)
    placing = functools.partial(place, model, include=include, input_shapes=input_shapes)
    plan, rows, missing = _plan_for(table, source, placing, exclude)
    scales = {tensor: table.scales[row] for tensor, row in rows.items()}
    if rest == "fp16":
        plan = replace(plan, float32=float32_nodes(model.graph, plan, scales, extents or {}))
    fit = Fit(
        rows=rows,
        missing={tensor: sorted(nodes) for tensor, nodes in missing.items()},
        unmatched=[row for row in table.scales if not source.holds(row) and not is_positional(row)],
        positional=[row for row in table.scales if is_positional(row)],
        colons=[row for row in table.scales if ":" in row],
        doubts=doubts(table, observed or {}, source.bounds()),
    )
    notes = {**table.metadata, "model": model.sha256, "trtq": trtq.__version__}
    return Quantization(model.graph, plan, scales, notes=notes), fit


def _plan_for(
    table: Table, source: Source, placing: Callable[..., Plan], exclude: Sequence[str]
) -> tuple[Plan, dict[str, str], dict[str, set[str]]]:
    """The largest placement that the table has all ranges for.

    The rules are applied again without the nodes that lack a range: an addition may then fuse with another
    layer, whose residual input has a row.

    Args:
        placing: `place` of the source's model, but for the patterns to exclude.

    Returns:
        the plan, range -> row that gives it, and range without a row -> nodes that need it.
    """
    wanted = plan = placing(exclude=exclude)
    lacking: dict[str, set[str]] = {}
    while True:
        rows = {tensor: row for tensor in plan.tensors if (row := _row_of(source, plan, tensor, table))}
        short = [edge for edge in plan.edges if edge.range not in rows and edge.rule != POOL]
        for edge in short:
            lacking.setdefault(edge.range, set()).add(edge.node)
        nodes = {edge.node for edge in short} & set(plan.int8_nodes)
        if not nodes:
            break
        if nodes >= set(plan.int8_nodes):
            raise InputError(
                "every node of the model lacks a range in the table",
                file=source.model.path,
                cause=f"it has no row for {', '.join(list(lacking)[:5])}; its rows are {_some(table.scales)}",
                remedy="give the fp32 model that the table was made for",
            )
        exclude = [*exclude, *(pattern_of(node) for node in sorted(nodes))]
        plan = placing(exclude=exclude)
    reasons = {
        node: f"the table has no row for '{tensor}'" for tensor, nodes in lacking.items() for node in nodes
    }
    left_out = set(wanted.int8_nodes) - set(plan.int8_nodes)
    decided = [
        replace(node, rule=NO_RANGE, reason=reasons[node.name]) if node.name in left_out else node
        for node in plan.nodes
    ]
    ranged = [edge for edge in plan.edges if edge.range in rows]
    return replace(plan, nodes=decided, edges=ranged), rows, lacking


def converted(
    source: Source,
    table: Table,
    recipe: Recipe,
    samples: Samples | None,
    console: Console,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    strict: PathLike | None = None,
) -> tuple[Quantization, Fit]:
    """`quantize_with_table` by a recipe's options; tells how the table fits.

    Args:
        samples: rows that show whether the table's rows are scales, and what has to stay float32.
        input_shapes: as `place`.
        strict: the table's file, where an incomplete or doubtful one is to be refused.

    Raises:
        InputError: as `quantize_with_table`, `observe` and `require_complete`.
    """
    observed = extents = None
    if samples is not None:
        observed = observe(source, table, samples)
        if recipe.precision == "fp16":
            extents = measure_extents(source.model.graph, samples)
    quantization, fit = quantize_with_table(
        source,
        table,
        include=recipe.include,
        exclude=recipe.exclude,
        input_shapes=input_shapes,
        rest=recipe.precision,
        observed=observed,
        extents=extents,
    )
    console.say("table", fit.text())
    if strict is not None:
        require_complete(fit, strict)
    return quantization, fit


def _row_of(source: Source, plan: Plan, tensor: str, table: Table) -> str | None:
    """The row for a range of the plan: the tensor's, or that of another one that takes its range from it."""
    sharing = (edge.tensor for edge in plan.edges if edge.range == tensor)
    return next((row for name in (tensor, *sharing) if (row := source.row(name, table))), None)


def _some(names: Collection[str]) -> str:
    """The first few names."""
    return ", ".join(list(names)[:5]) + (", …" if len(names) > 5 else "")
