"""What the report's pictures show, as the template takes it: texts and positions."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from trtq.backends.compiled import Compiled
from trtq.backends.coverage import Coverage
from trtq.gate.verdict import Outcome, Verdict
from trtq.graph.plan import Plan, percent
from trtq.recovery.speed import HEADINGS, Point, sources_of
from trtq.report import charts
from trtq.report.charts import Mark, Scale
from trtq.report.lanes import Row, blocks_of
from trtq.report.record import IN_USE, GraphNode, Record, TensorValues

REFERENCE = "FP32"
"""Name of the reference among the points of the front."""

SHORT_GRAPH = 40
"""Blocks of a graph of so many nodes are open from the start."""

MOST_OPS = 5
"""So many operators of a block are named."""

BENT = 8
"""The axis of the drop is bent where one is more than so many times the allowed drop."""


@dataclass(frozen=True)
class Interval:
    """The drop with its interval and the margin that it must stay under, as positions in percent."""

    zero: str
    allowed: str
    low: str
    high: str
    width: str
    drop: str
    outcome: str
    text: str
    allowed_text: str

    @classmethod
    def of(cls, verdict: Verdict) -> Interval | None:
        """The interval of a verdict, if it has one."""
        if verdict.relative_interval is None or verdict.relative_drop is None:
            return None
        low, high = verdict.relative_interval
        values = (low, high, verdict.max_drop, verdict.relative_drop, 0.0)
        scale = Scale(*charts.padded(values))
        return cls(
            zero=charts.percent(scale.at(0.0)),
            allowed=charts.percent(scale.at(verdict.max_drop)),
            low=charts.percent(scale.at(low)),
            high=charts.percent(scale.at(high)),
            width=charts.percent(scale.at(high) - scale.at(low)),
            drop=charts.percent(scale.at(verdict.relative_drop)),
            outcome=verdict.gate.value,
            text=f"drop {verdict.relative_drop:.2%}, interval {low:.2%} to {high:.2%}",
            allowed_text=f"{verdict.max_drop:.4g}" if verdict.max_drop > 1 else f"{verdict.max_drop:.2%}",
        )


@dataclass(frozen=True)
class Bar:
    """A line of a chart of bars; `width` in percent of the longest."""

    names: tuple[str, ...]
    op: str
    width: str
    value: str
    more: tuple[str, ...]


@dataclass(frozen=True)
class Bars:
    """A chart of bars.

    Attributes:
        title, text: what it shows.
        heads: headings of its columns.
        rest: what it leaves out.
        measured: whether it is of the noise in the outputs, which stands in the way of a pass.
    """

    title: str
    text: str
    heads: tuple[str, ...]
    bars: Sequence[Bar]
    rest: str = ""
    measured: bool = True

    @classmethod
    def of_noise(cls, record: Record | None, verdict: Verdict) -> Bars | None:
        """The noise of each layer; where it was not measured, what each tensor loses by itself."""
        if record is not None and record.noise is not None and record.noise.layers:
            noise = record.noise
            widest = noise.layers[0].share or 1.0
            rest = noise.count - len(noise.layers)
            return cls(
                "Noise of each layer",
                f"Noise that each layer alone in INT8 makes in the outputs, of the {noise.count} measured on"
                f" {noise.rows} calibration rows after the step '{noise.step}'.",
                ("layer", "of the noise", "alone", "of the MACs"),
                [
                    Bar(
                        layer.nodes,
                        layer.op,
                        charts.percent(100 * layer.share / widest),
                        f"{layer.share:.1%}",
                        (f"{layer.sqnr_db:.1f} dB", _share(layer.mac_share)),
                    )
                    for layer in noise.layers
                ],
                f"{rest} more make less each." if rest else "",
            )
        found = verdict.in_the_way
        ranked = [o for o in found.obstacles if o.noise_share is not None] if found else []
        if found and ranked:
            widest = max(obstacle.noise_share or 0.0 for obstacle in ranked) or 1.0
            return cls(
                "Noise of each layer",
                f"Noise that each layer makes in the outputs: {found.what}.",
                ("layer", "of the noise", "alone", "of the MACs"),
                [
                    Bar(
                        obstacle.nodes,
                        obstacle.op,
                        charts.percent(100 * (obstacle.noise_share or 0.0) / widest),
                        f"{obstacle.noise_share:.1%}",
                        (_decibels(obstacle.sqnr_db), _share(obstacle.mac_share)),
                    )
                    for obstacle in ranked
                ],
            )
        return None if record is None else cls._of_tensors(record.tensors, record.tensor_count)

    @classmethod
    def _of_tensors(cls, tensors: Sequence[TensorValues], count: int) -> Bars | None:
        """What tensors lose, where the noise in the outputs was not measured."""
        lost = {tensor: t.sqnr_db for tensor in tensors for t in tensor.thresholds if t.method == IN_USE}
        known = {tensor: value for tensor, value in lost.items() if value is not None}
        if not known:
            return None
        worst = min(known.values())
        rest = count - len(known)
        return cls(
            "Rounding and saturation of each tensor",
            "What each quantized tensor loses by itself: its noise against the worst one's, relative to its"
            " signal. What it does to the outputs was not measured, as nothing had to be left out;"
            " 'trtq sensitivity' measures it.",
            ("tensor", "SQNR of its values", "largest |x|", "INT8 up to"),
            [
                Bar(
                    (tensor.tensor,),
                    "",
                    charts.percent(100 * 10 ** ((worst - value) / 10)),
                    f"{value:.1f} dB",
                    (f"{tensor.amax:.4g}", f"{_in_use(tensor):.4g}"),
                )
                for tensor, value in known.items()
            ],
            f"{rest} more lose less." if rest else "",
            measured=False,
        )


def _in_use(tensor: TensorValues) -> float:
    return next((t.amax for t in tensor.thresholds if t.method == IN_USE), tensor.amax)


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"


@dataclass(frozen=True)
class Dot:
    """A point of the front: its number in chart and table, its position in percent, or none where it was not
    measured, and its row in the table."""

    number: int
    x: str
    y: str
    outcome: str
    chosen: bool
    cells: tuple[str, ...]
    remark: str


@dataclass(frozen=True)
class Front:
    """Latency, or the share in INT8, against the drop, or the SQNR.

    Attributes:
        drawn: whether two points or more were measured; else there is the table only.
        margin: where the allowed drop lies; None: the chart is of SQNR.
    """

    text: str
    x_label: str
    y_label: str
    x_ticks: Sequence[Mark]
    y_ticks: Sequence[Mark]
    margin: Mark | None
    dots: Sequence[Dot]
    heads: tuple[str, ...]
    drawn: bool

    @classmethod
    def of(cls, points: Sequence[Point], verdict: Verdict, *, latency: bool) -> Front | None:
        """The front through some points; None where there are not two to compare.

        Args:
            latency: whether their microseconds are known; else the chart is of the share in INT8.
        """
        points = [_with_reference(point) for point in points]
        xs = [point.microseconds if latency else 100 * (point.int8_share or 0.0) for point in points]
        drops = [point.relative_drop for point in points if point.relative_drop is not None]
        noises = [point.sqnr_db for point in points if point.sqnr_db is not None]
        by_drop = len(drops) > 1 and (max(drops) - min(drops) > 1e-4 or len(noises) < 2)
        ys = [point.relative_drop if by_drop else point.sqnr_db for point in points]
        shown = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
        if len(points) < 2 or (len(shown) < 2 and not latency):
            return None
        x_scale = Scale(*charts.padded([x for x, _ in shown] or xs))
        y_scale, y_marks = _y_axis([y for _, y in shown] or [0.0], verdict.max_drop if by_drop else None)
        unit = "µs" if latency else "%"
        return cls(
            text=f"Latency is {sources_of(points)}."
            if latency
            else "No source of latency was given (--gpu NAME, or"
            " profiles of trtexec), so the share in INT8 stands for speed.",
            x_label="latency, µs (further left is faster)" if latency else "multiply-accumulates in INT8, %",
            y_label="drop of the metric (higher up is better)" if by_drop else "SQNR of the outputs, dB",
            x_ticks=[
                Mark(charts.percent(x_scale.at(x)), f"{x:g} {unit}" if i == 0 else f"{x:g}")
                for i, x in enumerate(charts.ticks(x_scale.low, x_scale.high))
                if latency or 0 <= x <= 100
            ],
            y_ticks=y_marks,
            margin=Mark(charts.percent(y_scale.at(verdict.max_drop)), f"allowed {verdict.max_drop:.2%}")
            if by_drop
            else None,
            dots=[
                Dot(
                    number,
                    charts.percent(x_scale.at(x)),
                    "" if y is None else charts.percent(y_scale.at(y)),
                    "" if point.passed is None else (Outcome.PASS if point.passed else Outcome.FAIL).value,
                    point.chosen,
                    (point.name, *point.cells()[0 if latency else 1 : len(HEADINGS) - 1]),
                    "the reference" if point.name == REFERENCE else "not run",
                )
                for number, (point, x, y) in enumerate(zip(points, xs, ys, strict=True), 1)
            ],
            heads=("plan", *HEADINGS[0 if latency else 1 : len(HEADINGS) - 1]),
            drawn=len(shown) > 1,
        )


def _with_reference(point: Point) -> Point:
    """A point with what is known without running it: the reference does not drop."""
    if point.name == REFERENCE and point.relative_drop is None:
        return replace(point, relative_drop=0.0)
    return point


def _y_axis(values: Sequence[float], max_drop: float | None) -> tuple[Scale, list[Mark]]:
    """The axis upwards; position 0 is the top. Of drops, the smallest is at the top, and where some are far
    beyond the margin, the axis bends so that both can be seen."""
    if max_drop is None:
        low, high = charts.padded(values)
        scale = Scale(high, low, operator.neg)
        return scale, [Mark(charts.percent(scale.at(y)), f"{y:g} dB") for y in charts.ticks(low, high)]
    unit, known = max(max_drop, 1e-3), [*values, max_drop, 0.0]
    low, high = charts.padded(known)
    if high <= BENT * unit:
        scale, marks = Scale(low, high), charts.ticks(low, high)
    else:
        low, high = (unit * math.sinh(end) for end in charts.padded([math.asinh(y / unit) for y in known]))
        scale = Scale(low, high, lambda y: math.asinh(y / unit))
        steps = (f * 10**n for n in range(6) for f in (1, 2, 5))
        marks = [y for y in (0.0, *(unit * step for step in steps)) if y <= high and y != unit]
    return scale, [Mark(charts.percent(scale.at(y)), f"{100 * y:g}%") for y in marks]


@dataclass(frozen=True)
class Cut:
    """A threshold in a histogram: its position in percent, and its row in the table."""

    method: str
    kind: str
    at: str
    amax: str
    beyond: str
    noise: str


@dataclass(frozen=True)
class Values:
    """A tensor's histogram."""

    tensor: str
    readers: str
    path: str
    bars: int
    amax: str
    cuts: Sequence[Cut]

    @classmethod
    def of(cls, tensor: TensorValues) -> Values:
        """The picture of a tensor."""
        readers = ", ".join(tensor.readers[:3]) + (
            f" and {len(tensor.readers) - 3} more" if len(tensor.readers) > 3 else ""
        )
        return cls(
            tensor.tensor,
            f"read by {readers}; from {tensor.low:.4g} to {tensor.high:.4g}",
            charts.bars_path(tensor.counts),
            len(tensor.counts),
            f"{tensor.amax:.4g}",
            [
                Cut(
                    threshold.method,
                    "use" if threshold.method == IN_USE else f"m{index}",
                    charts.percent(100 * threshold.amax / tensor.amax),
                    f"{threshold.amax:.4g}",
                    f"{threshold.beyond:.2%}"
                    if threshold.beyond >= 5e-5
                    else "0"
                    if threshold.beyond == 0
                    else f"{1e6 * threshold.beyond:.0f} ppm",
                    "exact" if threshold.sqnr_db is None else f"{threshold.sqnr_db:.1f} dB",
                )
                for index, threshold in enumerate(tensor.thresholds)
            ],
        )


@dataclass(frozen=True)
class Engine:
    """A row of the comparison of engines; widths in percent of the largest."""

    name: str
    kernels: str
    kernels_width: str
    megabytes: str
    megabytes_width: str
    source: str

    @classmethod
    def all_of(cls, record: Record | None, compiled: Compiled | None) -> list[Engine]:
        """What is known of engines of the model, side by side."""
        found = [(c.engine, c.kernels, c.bytes, "modelled") for c in record.costs] if record else []
        if compiled is not None:
            found.append(("this engine", compiled.kernels, compiled.bytes_moved(), "as built"))
        if len(found) < 2:
            return []
        most, largest = max(k for _, k, _, _ in found) or 1, max(b for _, _, b, _ in found) or 1
        return [
            cls(
                name,
                str(kernels),
                charts.percent(100 * kernels / most),
                f"{moved / 1e6:.2f}",
                charts.percent(100 * moved / largest),
                source,
            )
            for name, kernels, moved, source in found
        ]


KINDS = {
    "int8": "INT8",
    "quantized": "no weights, reads through Q/DQ",
    "float": "floating point",
    "float32": "kept in float32",
    "missed": "meant for INT8, runs in floating point",
    "other": "no weights, as its neighbours",
    "end": "input or output",
}
"""How a node is coloured, and what that means."""


@dataclass(frozen=True)
class Line:
    """A node in the drawing of the graph: its lines, where its dot stands, and its texts."""

    kind: str
    name: str
    op: str
    note: str
    path: str
    x: str


@dataclass(frozen=True)
class Part:
    """A block of the drawing: its first and last node, and what is in it."""

    first: str
    last: str
    text: str
    width: int
    lines: Sequence[Line]


@dataclass(frozen=True)
class Drawing:
    """The graph, coloured by precision.

    Attributes:
        cells: of each node, in order, its kind and its name.
        counts: kind -> how many nodes.
        open: whether the blocks are open from the start.
    """

    cells: Sequence[tuple[str, str]]
    counts: Mapping[str, int]
    parts: Sequence[Part]
    open: bool
    row: int = charts.ROW

    @classmethod
    def of(cls, record: Record | None, plan: Plan, covered: Coverage) -> Drawing | None:
        """The drawing of a recorded graph; only the cells of its weighted nodes where it is too large."""
        if record is None:
            return None
        kinds, notes = _kinds(plan, covered)
        nodes = record.nodes or tuple(GraphNode(node.name, node.op, ()) for node in plan.nodes)
        cells = [(_kind(node, kinds), node.name) for node in nodes]
        blocks = blocks_of([node.inputs for node in record.nodes])
        parts = [_part(block.rows, charts.LANE * block.width, nodes, cells, notes) for block in blocks]
        counts = Counter(kind for kind, _ in cells)
        return cls(
            cells,
            {kind: counts[kind] for kind in KINDS if counts[kind]},
            parts,
            open=len(nodes) <= SHORT_GRAPH,
        )


def _kinds(plan: Plan, covered: Coverage) -> tuple[dict[str, str], dict[str, str]]:
    """Node -> its kind, and what there is to say of it."""
    kinds = dict.fromkeys((edge.node for edge in plan.edges), "quantized")
    kinds |= {node.name: "float32" for node in plan.float32}
    kinds |= {node.name: "float" for node in covered.skipped if kinds.get(node.name) != "float32"}
    kinds |= {node.name: "missed" for node in covered.missed}
    kinds |= {node.name: "int8" for node in covered.int8}
    notes = {node.name: node.reason for node in covered.skipped}
    notes |= {node.name: node.reason for node in plan.float32}
    notes |= {node.name: "its Q/DQ bought nothing" for node in covered.missed}
    return kinds, notes


def _kind(node: GraphNode, kinds: Mapping[str, str]) -> str:
    return "end" if node.op in ("input", "output") else kinds.get(node.name, "other")


def _part(
    rows: Sequence[Row],
    width: int,
    nodes: Sequence[GraphNode],
    cells: Sequence[tuple[str, str]],
    notes: Mapping[str, str],
) -> Part:
    ops = Counter(nodes[row.node].op for row in rows).most_common()
    told = [f"{count} {op}" if count > 1 else op for op, count in ops[:MOST_OPS]]
    named = [nodes[row.node].name for row in rows]
    return Part(
        named[0],
        named[-1],
        ", ".join([*told, *(["…"] if len(ops) > MOST_OPS else [])]),
        width,
        list(_lines(rows, nodes, cells, notes)),
    )


def _lines(
    rows: Sequence[Row],
    nodes: Sequence[GraphNode],
    cells: Sequence[tuple[str, str]],
    notes: Mapping[str, str],
) -> Iterator[Line]:
    for row in rows:
        node = nodes[row.node]
        told = [notes[node.name]] if notes.get(node.name) else []
        if row.undrawn:
            told.append("reads " + ", ".join(nodes[source].name for source in row.undrawn[:3]))
        yield Line(
            cells[row.node][0],
            node.name,
            node.op,
            "; ".join(told),
            charts.flow_path(row.lane, row.through, row.into, row.out),
            f"{charts.lane_x(row.lane):g}",
        )
