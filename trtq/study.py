"""The paper's tables for one model: calibration methods (5), weights (4), partial quantization, QAT (7)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from trtq.calibration.calibrate import FloatGraph, calibrate, rangeless, statistics_of, without_ranges_of
from trtq.calibration.methods import AUTO, Method, parse_method, scales_from
from trtq.calibration.statistics import Statistics
from trtq.console import SILENT, Console
from trtq.errors import InputError, MissingBackendError
from trtq.escapes import html_table
from trtq.files import PathLike, atomic_path, decode, read_own_json, staged_folder, write_json, write_text
from trtq.gate.evaluation import Evaluation, metric_of
from trtq.graph.evaluate import fold_constants
from trtq.graph.place import place
from trtq.graph.plan import Plan, percent
from trtq.graph.quantization import Quantization, WeightScales
from trtq.graph.shapes import infer_types
from trtq.graph.surgery import cleaned, in_order
from trtq.job import Job, opt_shapes, unfolded
from trtq.numerics import scale_from_amax
from trtq.recipe import Recipe
from trtq.recovery.partial import Search
from trtq.recovery.speed import speed_of
from trtq.recovery.workflow import learned
from trtq.simulation.similarity import overall_sqnr_db

FORMAT = "trtq-study-1"

FRONT = "Latency against accuracy, the fastest plan first"
MOST_CORNERS = 8
"""Plans of the front that are run."""

METHODS = (
    "max",
    "entropy",
    "percentile:99.9",
    "percentile:99.99",
    "percentile:99.999",
    "percentile:99.9999",
    "mse",
)
"""The columns of the paper's table 5, and the least mean squared error."""


@dataclass(frozen=True)
class Row:
    """One quantization of the model.

    Attributes:
        metric: its value; None where the outputs were not finite.
        drop: relative to fp32.
        sqnr_db: of the outputs together on the evaluation data (`similarity.overall_sqnr_db`).
        floating_point: weighted nodes left in floating point.
        int8_share: share of the multiply-accumulates planned for INT8; None where they are not known.
        microseconds: of one inference, where something tells.
    """

    name: str
    metric: float | None
    drop: float | None
    sqnr_db: float | None
    floating_point: int
    int8_share: float | None
    microseconds: float | None = None


@dataclass(frozen=True)
class Study:
    """All rows, by table, and what they were measured on; saved as `study.json`.

    Attributes:
        tables: title -> rows.
        notes: why a table is missing.
    """

    model: str
    metric: str
    fp32: float
    samples: int
    tables: Mapping[str, Sequence[Row]]
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """The study as JSON values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Study:
        """The study in JSON values.

        Raises:
            ValueError: they are not a study of this format.
        """
        return decode(value, cls, format=FORMAT)

    @classmethod
    def load(cls, path: PathLike) -> Study:
        """Read a study.

        Raises:
            InputError: the file is missing, not JSON, or not a study.
        """
        return read_own_json(path, "study", cls.from_json)

    def __repr__(self) -> str:
        rows = sum(map(len, self.tables.values()))
        found = f"{self.metric} {self.fp32:.4f} in fp32"
        return f"<Study: {self.model}, {len(self.tables)} tables of {rows} rows, {found}>"

    def _repr_html_(self) -> str:
        head = ("", "metric", "drop", "SQNR dB", "in floating point", "INT8 MACs", "latency µs")
        return "".join(
            html_table(title, [_cells(row) for row in rows], head) for title, rows in self.tables.items()
        )

    def text(self) -> str:
        """The tables for a person."""
        lines = [f"{self.model}: {self.metric} {self.fp32:.4f} in fp32 on {self.samples} samples"]
        for title, rows in self.tables.items():
            width = max(len(row.name) for row in rows)
            lines += ["", title, f"  {'':<{width}}    metric     drop  SQNR dB  float  int8 MACs  latency µs"]
            for name, value, drop, noise, floating_point, share, latency in map(_cells, rows):
                lines.append(
                    f"  {name:<{width}}  {value:>8}  {drop:>7}  {noise:>7}  {floating_point:>5}  {share:>9}"
                    f"  {latency:>10}".rstrip()
                )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _cells(row: Row) -> tuple[str, str, str, str, str, str, str]:
    """A row as text."""
    return (
        row.name,
        "-" if row.metric is None else f"{row.metric:.4f}",
        "-" if row.drop is None else f"{row.drop:.2%}",
        "-" if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
        str(row.floating_point),
        "" if row.int8_share is None else percent(row.int8_share),
        "" if row.microseconds is None else f"{row.microseconds:.1f}",
    )


def study(recipe: Recipe, console: Console) -> Study:
    """Measure every table.

    The first three tables are always made; partial quantization and learning stop when the budget is spent.

    Raises:
        InputError: an option, the model or the data cannot be used.
    """
    recipe.require("model", "data", "eval", "metric")
    metric_of(recipe)
    recipe = replace(recipe, rest="fp32")  # as the paper
    job = Job.open(recipe, console)
    evaluation = Evaluation.open(recipe, job.model.path, job.model.inputs, job.cache, console)
    job.warn_of_shared(evaluation.samples)
    return _Study(job, evaluation).run()


def write_study(study: Study, folder: PathLike, console: Console) -> list[str]:
    """Write `study.json`, `study.txt` and, with Matplotlib, `study.svg` into a folder; their names."""
    with staged_folder(folder) as staged:
        write_json(staged / "study.json", study.to_json())
        write_text(staged / "study.txt", study.text() + "\n")
        try:
            plot(study, staged / "study.svg")
        except MissingBackendError as error:
            console.warn(str(error))
        return sorted(path.name for path in staged.iterdir())


@dataclass(frozen=True)
class _Study:
    job: Job
    evaluation: Evaluation

    def run(self) -> Study:
        job, plan = self.job, self.job.place()
        source = FloatGraph.of(job.model)
        best = calibrate(self.job, plan)
        statistics = statistics_of(job, plan.tensors, job.data, source)
        bare = Quantization(source.graph, plan, {})
        methods = [self.row(name, _by_method(bare, statistics, parse_method(name))) for name in METHODS]
        if job.recipe.method == AUTO:
            methods.append(self.row("auto", best))
        tables = {"Calibration methods, all layers INT8 (paper table 5)": methods}
        notes: list[str] = []
        tables["Weights alone in INT8 (paper table 4)"] = list(self.weights(plan, notes))
        if curve := list(self.curve(best, notes)):
            tables["Layers left in floating point, most noise per multiply-accumulate first"] = curve
        if front := list(self.front(plan, best, notes)):
            tables[FRONT] = front
        if (taught := self.learned(best, notes)) is not None:
            tables["Learned with the fp32 model as the teacher (paper table 7)"] = [
                self.row("calibrated", best),
                self.row("learned", taught),
            ]
        evaluation = self.evaluation
        return Study(
            job.model.path.name,
            evaluation.metric.name,
            evaluation.value,
            len(evaluation.samples) // evaluation.samples.group,
            tables,
            notes,
        )

    def row(self, name: str, quantization: Quantization) -> Row:
        verdict, plan = self.evaluation.simulated(quantization), quantization.plan
        found = [output.sqnr_db for output in verdict.outputs.values()]
        row = Row(
            name,
            verdict.candidate,
            verdict.relative_drop,
            overall_sqnr_db(found) if found else None,
            len(plan.nodes) - len(plan.int8_nodes),
            plan.mac_share(),
        )
        drop = "not finite" if row.drop is None else f"drop {row.drop:.2%}"
        self.job.console.say("study", f"{name}: {drop}")
        return row

    def weights(self, plan: Plan, notes: list[str]) -> Iterator[Row]:
        """Weights per channel and per tensor, with BatchNormalization folded and without."""
        forms = [("folded", self.job.model.graph, plan)]
        recipe, model = self.job.recipe, unfolded(self.job.recipe)
        fold_constants(model.graph)
        in_order(cleaned(model.graph))
        infer_types(model.graph)
        if any(node.op == "BatchNormalization" for node in model.graph.nodes):
            if recipe.plan is None:
                shapes = opt_shapes(model, self.job.profile)
                placed = place(model, include=recipe.include, exclude=recipe.exclude, input_shapes=shapes)
                forms.append(("not folded", model.graph, placed))
            else:
                notes.append("weights are compared with BatchNormalization folded only, as in the given plan")
        else:
            notes.append("the model has no BatchNormalization: it never had any, or it is already folded")
        for folding, graph, placed in forms:
            quantization = Quantization(graph, replace(placed, edges=[]), {})
            per_tensor = replace(quantization, weight_scales=_per_tensor(quantization))
            yield self.row(f"per channel, {folding}", quantization)
            yield self.row(f"per tensor, {folding}", per_tensor)

    def curve(self, start: Quantization, notes: list[str]) -> Iterator[Row]:
        """Accuracy against the number of groups left in floating point: 0, 1, 2, 4, ... while time lasts."""
        if self.job.budget.over:
            notes.append("the budget was spent before partial quantization")
            return
        search = Search(self.job, start, self.job.key("sensitivity", start))
        count = 0
        while count <= len(search):
            yield self.row(f"{count} of {len(search)} groups", search.first(count))
            count = 2 * count or 1
            if self.job.budget.over and count <= len(search):
                notes.append("the budget was spent before the curve of partial quantization was complete")
                return

    def front(self, plan: Plan, start: Quantization, notes: list[str]) -> Iterator[Row]:
        """The fastest plans for falling noise, where something tells what layers cost."""
        speed = speed_of(replace(self.job, console=SILENT), plan)
        if speed is None:
            return
        search = Search(self.job, start, self.job.key("sensitivity", start), speed=speed)
        if not search.whole:
            notes.append("the budget was spent before the front of latency and accuracy")
            return
        found = search.front()
        wanted = min(len(found), MOST_CORNERS)
        for index in range(wanted):
            corner, quantization = found[index * (len(found) - 1) // max(wanted - 1, 1)]
            row = self.row(f"{len(corner.left_out)} of {len(search)} left out", quantization)
            yield replace(row, microseconds=corner.microseconds)
        latency = speed.latency(plan, "fp32")
        notes.append(f"latencies are {latency.kind} ({latency.source}), beside float32")

    def learned(self, start: Quantization, notes: list[str]) -> Quantization | None:
        if self.job.budget.over:
            notes.append("the budget was spent before learning")
            return None
        try:
            return learned(self.job, start).quantization
        except (InputError, MissingBackendError) as error:
            notes.append(f"nothing was learned: {error.problem}")
            return None


def _by_method(bare: Quantization, statistics: Statistics, method: Method) -> Quantization:
    """All ranges by one method; a tensor that it gives no range is not quantized."""
    ranged = without_ranges_of(bare, rangeless(statistics, method))
    return replace(ranged, scales=scales_from(statistics, method))


def _per_tensor(quantization: Quantization) -> WeightScales:
    """One scale for all channels of each weight."""
    tensors = quantization.graph.tensors()
    scales = {}
    for weight in quantization.plan.weights:
        values = tensors[weight.tensor].values
        one = scale_from_amax(np.abs(values).max(initial=0.0))
        scales[weight.tensor, weight.axis] = np.full(values.shape[weight.axis], one, np.float32)
    return scales


def plot(study: Study, path: PathLike) -> None:
    """Draw the tables: drop of the metric by method, and by multiply-accumulates left in floating point.

    Args:
        path: `.svg` or `.png`.

    Raises:
        MissingBackendError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingBackendError(
            "Matplotlib is not installed, so the study has no plot", remedy="pip install 'trtq[study]'"
        ) from error
    heights = [0.28 * len(rows) + 0.8 for rows in study.tables.values()]
    figure = Figure(figsize=(7, sum(heights) + 0.4), layout="constrained")
    figure.suptitle(f"{study.model}: {study.metric} {study.fp32:.4f} in fp32")
    grid = figure.subplots(len(heights), squeeze=False, height_ratios=heights)
    for axes, (title, rows) in zip(grid[:, 0], study.tables.items(), strict=True):
        drops = [math.nan if row.drop is None else 100 * row.drop for row in rows]
        axes.set_title(title, fontsize="medium")
        if title == FRONT:
            _plot_front(axes, rows, study.metric)
            continue
        bars = axes.barh([row.name for row in rows], drops, color="#18794e")
        noise = ["" if row.sqnr_db is None else f"{row.sqnr_db:.1f} dB" for row in rows]
        axes.bar_label(bars, noise, padding=3, fontsize="small")
        axes.margins(x=0.15)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel(f"relative drop of {study.metric}, %; SQNR of the outputs beside it")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=str(path).rpartition(".")[2])


def _plot_front(axes: Any, rows: Sequence[Row], metric: str) -> None:
    """Latency to the right, the drop upwards, and the SQNR beside each plan."""
    shown = [row for row in rows if row.drop is not None and row.microseconds is not None]
    points = [(row.microseconds, 100 * (row.drop or 0.0)) for row in shown]
    axes.plot(*zip(*points, strict=True), marker="o", color="#18794e")
    for row, point in zip(shown, points, strict=True):
        noise = "" if row.sqnr_db is None else f"{row.sqnr_db:.1f} dB"
        axes.annotate(noise, point, textcoords="offset points", xytext=(4, 4), fontsize="small")
    axes.margins(x=0.15, y=0.25)
    axes.set_xlabel("latency of one inference, µs")
    axes.set_ylabel(f"drop of {metric}, %")
