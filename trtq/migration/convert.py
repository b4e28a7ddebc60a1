"""Calibration tables <-> Q/DQ models, in both directions without loss.

A table of TensorRT 10 or older names tensors of the ONNX model as it was before any fusion; an explicit model
has the same scales in QuantizeLinear nodes. `quantize_with_table` goes one way and `table_of` the other; both
keep the float32 scales to the bit. `Fit` says how well a table suits a model before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

import trtq
from trtq.calibration.collect import collect
from trtq.calibration.extents import measure_extents
from trtq.calibration.table import ENCODINGS, Table
from trtq.console import Console
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.files import PathLike
from trtq.graph.evaluate import fold_constants
from trtq.graph.fold import fold
from trtq.graph.half_rules import Extent, float32_nodes
from trtq.graph.model import FP16_SCALE_OPSET, LOWEST_OPSET, QDQ_OPS, Model, load_model
from trtq.graph.place import FLOATS, MOVING_OPS, POOL, only_moved, place
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.numerics import INT8_MAX
from trtq.recipe import Recipe

NO_RANGE = "no-range"
"""Rule of the plan for nodes that stay in floating point because the table has no row for an input."""

_POSITIONAL = re.compile(r"\(Unnamed Layer\* \d+\) \[.*")

_SAME_VALUES = MOVING_OPS - {"Gather", "MaxPool", "Slice", "Split"} | {"Cast", "Dropout"}
"""Operators whose output has all the values of their input, so that its row is the input's as well."""

OBSERVED_SAMPLES = 16
"""Samples that are run to tell scales from other readings of a table."""

_BOUNDS = {"Sigmoid": 1.0, "HardSigmoid": 1.0, "Softmax": 1.0, "Tanh": 1.0}

_ANY_AMAX = (1e-4, 1e4)
"""Where the amax of an activation lies if nothing else is known about it."""


@dataclass(frozen=True)
class Fit:
    """How a table fits a model: the coverage report before anything is written.

    Attributes:
        rows: tensor whose range the Q/DQ model needs -> row that gives it; of another name where that row's
            tensor has the same values, or those that this one was moved from.
        missing: tensor without a scale -> nodes that therefore stay in floating point, or do not fuse.
        unmatched: rows that match no tensor of the model.
        positional: rows named `(Unnamed Layer* N) [...]`, which shift with any edit of the graph; not used.
        colons: names that hold a colon, which other tools cut in the wrong place.
        doubts: what speaks against the rows being scales at all, with the evidence.
    """

    rows: Mapping[str, str]
    missing: Mapping[str, Sequence[str]]
    unmatched: Sequence[str]
    positional: Sequence[str]
    colons: Sequence[str]
    doubts: Sequence[str]

    @property
    def complete(self) -> bool:
        """Whether every tensor has its scale, from rows that can be scales."""
        return not self.missing and not self.doubts

    def text(self) -> str:
        """The report for a person; at most three names of each kind."""
        moved = [f"{tensor} from {row}" for tensor, row in self.rows.items() if tensor != row]
        lacking = [f"{tensor} (for {', '.join(nodes)})" for tensor, nodes in self.missing.items()]
        lines = [f"{len(self.rows)} of {len(self.rows) + len(self.missing)} tensors have their scale"]
        for what, names in (
            ("from the row of a tensor with the same or moved values", moved),
            ("without a scale, so in floating point", lacking),
            ("rows that match no tensor of the model", list(self.unmatched)),
            ("positional rows, which are not used", list(self.positional)),
            ("names with a colon", list(self.colons)),
        ):
            if names:
                lines.append(f"{len(names)} {what}: {'; '.join(names[:3])}{'; …' if len(names) > 3 else ''}")
        return "\n".join([*lines, *(f"doubtful: {doubt}" for doubt in self.doubts)])

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self) | {"complete": self.complete}


@dataclass(frozen=True)
class Source:
    """An fp32 model for a table.

    Attributes:
        model: folded.
        original: the graph as the table's TensorRT saw it, before folding.
    """

    model: Model
    original: gs.Graph

    @cached_property
    def _tensors(self) -> dict[str, gs.Tensor]:
        return {**self.model.graph.tensors(), **self.original.tensors()}

    def row(self, tensor: str, table: Table) -> str | None:
        """The row that gives `tensor` its scale: its own, that of a tensor with the same values (reshaped,
        transposed, padded with zeros, ...), or that of one it takes all its values from; the nearest first.
        """
        if tensor not in self._tensors:  # made by a pass; it stands for nothing in the original
            return None
        nearby = (*self._same(self._tensors[tensor]), *self._origins(self._tensors[tensor]))
        return next((t.name for t in nearby if t.name in table.scales), None)

    def holds(self, name: str) -> bool:
        """Whether the model has a tensor of this name."""
        return name in self._tensors

    def bounds(self) -> dict[str, float]:
        """Tensors whose largest magnitude the operator in front of them limits -> that limit."""
        found = {}
        for node in self.model.graph.nodes:
            limit = _BOUNDS.get(node.op)
            if node.op == "Clip":
                limit = _clip_bound(node)
            if limit:
                found[node.outputs[0].name] = limit
        return found

    @staticmethod
    def _same(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
        """`tensor` and those behind it that have all of its values and no others but zero."""
        waiting = [tensor]
        while waiting:
            yield (current := waiting.pop(0))
            for node in current.outputs:
                keeps = node.op in _SAME_VALUES and node.inputs[0] is current
                if keeps and (node.op in ("Cast", "Dropout") or only_moved(node.outputs[0])):
                    waiting.append(node.outputs[0])

    @staticmethod
    def _origins(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
        """The tensors in front of `tensor` that hold all of its values, perhaps with others."""
        while tensor.inputs and (tensor.inputs[0].op in ("Cast", "Dropout") or only_moved(tensor)):
            tensor = tensor.inputs[0].inputs[0]
            yield tensor


@dataclass(frozen=True)
class Explicit:
    """A Q/DQ model made from a table.

    Attributes:
        graph: with Q/DQ.
        plan: where Q/DQ went; `NO_RANGE` is the rule of nodes left out for lack of a row.
        table: the scales that were used, by the tensors of the plan.
        fit: how the table fits the model.
    """

    graph: gs.Graph
    plan: Plan
    table: Table
    fit: Fit


def load_source(path: PathLike, *, rest: str = "fp32") -> Source:
    """The fp32 model that a table belongs to, before and after folding.

    Raises:
        InputError: as `load_model`.
    """
    model = load_model(path, opset=FP16_SCALE_OPSET if rest == "fp16" else LOWEST_OPSET)
    original = model.graph.copy()
    fold(model.graph)
    return Source(model, original)


def observe(source: Source, table: Table, samples: Samples) -> dict[str, float]:
    """Row -> largest magnitude of its tensor on a few samples, for rows whose tensors are still there.

    Raises:
        InputError: the model does not run on the samples.
    """
    tensors = source.model.graph.tensors()
    rows = [
        name for name in table.scales if isinstance(t := tensors.get(name), gs.Variable) and t.dtype in FLOATS
    ]
    some = samples.subset(range(min(OBSERVED_SAMPLES, len(samples) // samples.group)))
    return {name: h.amax for name, h in collect(source.model.graph, rows, some).histograms.items()}


def quantize_with_table(
    source: Source,
    table: Table,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    weights: str = "int8",
    rest: str = "fp32",
    observed: Mapping[str, float] | None = None,
    extents: Mapping[str, Extent] | None = None,
) -> Explicit:
    """The explicit model with the table's scales where `place` puts Q/DQ.

    A node that lacks the range of one of its inputs stays in floating point, with that reason in the plan; a
    residual addition or an average pooling that lacks it is not fused. Tables need not have the latter's.

    Args:
        include, exclude, input_shapes: as `place`.
        weights: as `rewrite`.
        rest: precision of what is not quantized, "fp32" or "fp16".
        observed: row -> amax seen on data, to tell scales from other readings of the file.
        extents: float32 tensor -> its extent on data: decides what stays float32 with `rest` "fp16".

    Raises:
        InputError: the table was made for another model or gives no node all of its ranges; or as `place`
            and `rewrite`.
    """
    table.check_made_for(source.model.sha256, source.model.path)
    first = plan = place(source.model, include=include, exclude=exclude, input_shapes=input_shapes)
    lacking: dict[str, set[str]] = {}
    while True:
        rows = {tensor: row for tensor in plan.tensors if (row := _row_of(source, plan, tensor, table))}
        short = [edge for edge in plan.edges if edge.range not in rows and edge.rule != POOL]
        for edge in short:
            lacking.setdefault(edge.range, set()).add(edge.node)
        nodes = {edge.node for edge in short if edge.node in plan.int8_nodes}
        if not nodes:
            break
        if nodes >= set(plan.int8_nodes):
            raise InputError(
                "the table gives no node of the model all of its ranges",
                file=source.model.path,
                cause=f"it has no row for {', '.join(list(lacking)[:5])}; its rows are {_some(table.scales)}",
                remedy="give the fp32 model that the table was made for",
            )
        exclude = [*exclude, *nodes]
        plan = place(source.model, include=include, exclude=exclude, input_shapes=input_shapes)
    reasons = {
        node: f"the table has no row for '{tensor}'" for tensor, nodes in lacking.items() for node in nodes
    }
    wanted = set(first.int8_nodes)
    plan = replace(
        plan,
        edges=[edge for edge in plan.edges if edge.range in rows],
        nodes=[
            replace(node, rule=NO_RANGE, reason=reasons[node.name])
            if not node.int8 and node.name in wanted
            else node
            for node in plan.nodes
        ],
    )
    used = Table(
        {tensor: table.scales[row] for tensor, row in rows.items()},
        table.version,
        table.algorithm,
        {**table.metadata, "model": source.model.sha256, "trtq": trtq.__version__},
    )
    fit = Fit(
        rows=rows,
        missing={tensor: sorted(nodes) for tensor, nodes in lacking.items()},
        unmatched=[row for row in table.scales if not source.holds(row) and not _POSITIONAL.fullmatch(row)],
        positional=[row for row in table.scales if _POSITIONAL.fullmatch(row)],
        colons=[row for row in table.scales if ":" in row],
        doubts=doubts(table, observed or {}, source.bounds()),
    )
    if rest == "fp16":
        kept = float32_nodes(source.model.graph, plan, used.scales, extents or {})
        plan = replace(plan, float32=kept)
    quantization = Quantization(source.model.graph, plan, used.scales)
    return Explicit(quantization.rewritten(weights=weights, rest=rest), plan, used, fit)


def doubts(table: Table, observed: Mapping[str, float], bounds: Mapping[str, float]) -> list[str]:
    """What speaks against the rows being scales, with the evidence; nothing if they can be.

    Each row's amax is held against what is known of its tensor: the amax seen on data, else the bound of
    the operator that makes it (sigmoid, softmax, ReLU6, ...), else any magnitude that activations have.
    Where most rows contradict it, and almost none would if the file were read in another way, that is it.

    Args:
        observed: row -> amax seen on data.
        bounds: row -> largest magnitude that the tensor can have.
    """
    rows = [name for name in table.scales if not _POSITIONAL.fullmatch(name)]
    known = {name: _plausible(name, observed, bounds) for name in rows}
    if any(name in observed or name in bounds for name in rows):
        known = {name: limits for name, limits in known.items() if limits != _ANY_AMAX}
    if not known:
        return []

    def amax(name: str, encoding: str) -> float:
        with np.errstate(all="ignore"):
            return float(ENCODINGS[encoding](table.scales[name])) * INT8_MAX

    def wrong(encoding: str) -> list[str]:
        return [name for name, (low, high) in known.items() if not low <= amax(name, encoding) <= high]

    contradicting = wrong("scale")
    if 2 * len(contradicting) < len(known):
        return []
    examples = "; ".join(
        f"'{name}': amax {amax(name, 'scale'):.4g}, expected {known[name][0]:.3g} to {known[name][1]:.3g}"
        for name in contradicting[:3]
    )
    evidence = f"{len(contradicting)} of {len(known)} ranges cannot be right ({examples})"
    better = {encoding: len(wrong(encoding)) for encoding in ENCODINGS if encoding != "scale"}
    best = min(better, key=better.__getitem__)
    if 10 * better[best] > len(known):
        return [evidence]
    return [f"{evidence}; read as --encoding {best}, {better[best]} of them would contradict it"]


def require_complete(fit: Fit, table: PathLike) -> None:
    """Refuse a table that lacks a scale or cannot be right.

    Raises:
        InputError: `fit` is not complete.
    """
    if not fit.complete:
        raise InputError(
            "the table is incomplete or doubtful",
            file=table,
            cause=fit.text(),
            remedy="calibrate again; or leave --strict out, and nodes without a range stay in floating point",
        )


def converted(
    source: Source,
    table: Table,
    recipe: Recipe,
    samples: Samples | None,
    console: Console,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    strict: PathLike | None = None,
) -> Explicit:
    """The explicit model with the table's scales, by a recipe's options; tells how the table fits.

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
        if recipe.rest == "fp16":
            extents = measure_extents(source.model.graph, samples)
    explicit = quantize_with_table(
        source,
        table,
        include=recipe.include,
        exclude=recipe.exclude,
        input_shapes=input_shapes,
        weights=recipe.weights,
        rest=recipe.rest,
        observed=observed,
        extents=extents,
    )
    console.say("table", explicit.fit.text())
    if strict is not None:
        require_complete(explicit.fit, strict)
    return explicit


def table_of(model: Model, *, version: int = 101601, algorithm: str = "EntropyCalibration2") -> Table:
    """The table of a Q/DQ model, whoever made it: one row for each activation that is quantized.

    A row is named like the fp32 model's tensor: the one in front of QuantizeLinear and of a cast, as trtq
    puts it into models in half, or the model output behind Q/DQ. Scales keep their bits; float16 is widened.
    uint8 with zero-point 128 is int8 with zero-point 0; uint8 with zero-point 0 reaches up to 255 x scale,
    which the row covers with a scale of 255 / 127 of it.

    Args:
        model: as loaded; not changed.
        version, algorithm: the header's.

    Raises:
        InputError: the model has no quantized activation, or one with a per-channel scale, another
            zero-point, another type than 8-bit integers, a scale that is not a positive finite constant, or
            two scales.
    """
    graph = model.graph.copy()
    fold_constants(graph)
    activations = _activations(graph)
    scales: dict[str, np.float32] = {}
    for node in graph.nodes:
        if node.op != "QuantizeLinear" or node.inputs[0].name not in activations:
            continue
        name, scale = _original_name(node, graph), _scale_of(node, model)
        if scales.setdefault(name, scale) != scale:
            raise _refused(model, name, f"it is quantized with two scales, {scales[name]} and {scale}")
    if not scales:
        raise InputError(
            "the model has no quantized activations",
            file=model.path,
            cause="no QuantizeLinear reads a tensor that depends on the model's inputs",
            remedy="give a Q/DQ model",
        )
    source = {"method": "from Q/DQ", "source": model.path.name, "source_sha256": model.sha256}
    return Table(scales, version, algorithm, {**source, "trtq": trtq.__version__})


def _row_of(source: Source, plan: Plan, tensor: str, table: Table) -> str | None:
    """The row for a range of the plan: the tensor's, or that of another one that takes its range from it."""
    sharing = (edge.tensor for edge in plan.edges if edge.range == tensor)
    return next((row for name in (tensor, *sharing) if (row := source.row(name, table))), None)


def _plausible(name: str, observed: Mapping[str, float], bounds: Mapping[str, float]) -> tuple[float, float]:
    """Lowest and highest amax that a table may give a tensor; calibration clips outliers, data may be few."""
    if observed.get(name):
        return observed[name] / 16, observed[name] * 4
    if name in bounds:
        return bounds[name] / 1000, bounds[name] * 1.05
    return _ANY_AMAX


def _clip_bound(node: gs.Node) -> float | None:
    """Largest magnitude of a Clip with two constant limits."""
    limits = node.inputs[1:3]
    if len(limits) < 2 or not all(isinstance(t, gs.Constant) for t in limits):
        return None
    return max(abs(float(t.values)) for t in limits)


def _original_name(quantizer: gs.Node, graph: gs.Graph) -> str:
    """The name that the quantized tensor has in the fp32 model."""
    outputs = {tensor.name for tensor in graph.outputs}
    for consumer in quantizer.outputs[0].outputs:
        if consumer.op == "DequantizeLinear" and consumer.outputs[0].name in outputs:
            return consumer.outputs[0].name  # who quantizes a model output renames what was in front of it
    tensor = quantizer.inputs[0]
    while tensor.inputs:
        node = tensor.inputs[0]
        cast = node.op == "Cast" and node.inputs[0].dtype in FLOATS
        if not cast and node.op not in QDQ_OPS:
            break
        tensor = node.inputs[0]
    return tensor.name


def _activations(graph: gs.Graph) -> set[str]:
    """Names of the tensors that depend on a model input; the others are weights, perhaps behind operators."""
    names = {tensor.name for tensor in graph.inputs}
    for node in graph.toposort().nodes:
        if any(tensor.name in names for tensor in node.inputs):
            names.update(tensor.name for tensor in node.outputs)
    return names


def _scale_of(node: gs.Node, model: Model) -> np.float32:
    """The symmetric int8 scale of a QuantizeLinear."""
    name = node.inputs[0].name
    scale, *zero_points = node.inputs[1:]
    zero_point = next((t for t in zero_points if t.name), None)
    if not all(isinstance(t, gs.Constant) for t in (scale, zero_point) if t is not None):
        raise _refused(model, name, "its scale or zero-point is computed, not a constant")
    if scale.values.size != 1:
        cause = f"it has {scale.values.size} scales; TensorRT quantizes activations per tensor"
        raise _refused(model, name, cause)
    zeros = np.zeros((), np.uint8) if zero_point is None else zero_point.values
    value, zero = scale.values.astype(np.float32).reshape(()), zeros.reshape(-1)[0]
    if zeros.dtype not in (np.int8, np.uint8):
        raise _refused(model, name, f"it is quantized to {zeros.dtype}, not to 8-bit integers")
    if not (np.isfinite(value) and value > 0):
        raise _refused(model, name, f"its scale is {value}, not a positive finite number")
    if zero not in ((0,) if zeros.dtype == np.int8 else (0, 128)):
        raise _refused(model, name, f"its zero-point is {zero}; TensorRT quantizes symmetrically")
    if zeros.dtype == np.uint8 and zero == 0:
        return np.float32(np.float64(value) * 255 / 127)
    return np.float32(value)


def _refused(model: Model, tensor: str, cause: str) -> InputError:
    return InputError(
        f"the quantizer of '{tensor}' cannot be a row of a calibration table",
        file=model.path,
        cause=cause,
        remedy="quantize activations symmetrically, per tensor, to int8",
    )


def _some(names: Mapping[str, Any]) -> str:
    """The first few names."""
    return ", ".join(list(names)[:5]) + (", …" if len(names) > 5 else "")
