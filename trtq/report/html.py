"""`report.html`: one self-contained page made from the files that `trtq deploy` leaves in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2

from trtq.backends.builders import NO_ENGINE, describe_engine
from trtq.backends.compiled import Compiled
from trtq.backends.coverage import Coverage, coverage, planned
from trtq.calibration.table import Table, metadata_path
from trtq.errors import InputError, about
from trtq.escapes import printable
from trtq.files import PathLike, decode, read_json, read_own_json, write_text
from trtq.gate.verdict import Outcome, Verdict
from trtq.gate.verdict import percent as verdict_percent
from trtq.graph.plan import Float32Node, Plan, percent
from trtq.numerics import INT8_MAX
from trtq.recipe import Recipe
from trtq.recovery.attempt import ENGINE_BUILT
from trtq.recovery.speed import Point
from trtq.report.pictures import KINDS, Bars, Drawing, Engine, Front, Interval, Values
from trtq.report.record import Record
from trtq.report.ways import Way, ways
from trtq.simulation.similarity import MAX_SQNR_DB


def write_report(folder: PathLike) -> Path:
    """Write `report.html` into a folder of results and return its path.

    Raises:
        InputError: a file of the results is missing or damaged.
    """
    folder = Path(folder)
    report = Report.of(folder)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_shown,
    )
    environment.filters["decibels"] = lambda value: "" if value is None else f"{value:.1f} dB"
    environment.filters["tenths"] = lambda value: "" if value is None else f"{value:.1%}"
    page = environment.get_template("report.html.j2").render(vars(report))
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _shown(value: object) -> object:
    """Text of others without control characters; markup of the template itself stays as it is."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


@dataclass(frozen=True)
class RecordedCheck:
    """A check in `workflow.json`."""

    name: str
    outcome: Outcome
    ok: bool
    message: str = ""


@dataclass(frozen=True)
class RecordedLatency:
    """What an engine costs, in `workflow.json`."""

    microseconds: float
    bytes: int
    kind: str
    source: str


@dataclass(frozen=True)
class RecordedStep:
    """A step in `workflow.json`; everything measured is None where there was nothing to gate."""

    step: str
    outcome: Outcome | None
    relative_drop: float | None
    sqnr_db: dict[str, float]
    int8_share: float | None
    kept: bool
    checks: tuple[RecordedCheck, ...]
    gate: Outcome | None = None
    metric: float | None = None
    int8_nodes: int | None = None
    given_away: float | None = None
    note: str = ""
    seconds: float = 0.0
    latency: RecordedLatency | None = None
    front: tuple[Point, ...] = ()
    in_the_way: Any = None


@dataclass(frozen=True)
class Step:
    """A step of the workflow: its figures, or why it gave nothing to measure.

    Attributes:
        outcome: None where there was nothing to gate.
        missed: the messages of the checks that it does not pass.
    """

    name: str
    kept: bool
    outcome: str | None
    missed: str
    drop: str
    noise: str
    share: str
    latency: str
    note: str

    @classmethod
    def of(cls, step: RecordedStep) -> Step:
        """A step of `workflow.json`."""
        if step.outcome is None:
            return cls(step.step, False, None, "", "", "", "", "", step.note)
        return cls(
            step.step,
            kept=step.kept,
            outcome=step.outcome.value,
            missed="; ".join(check.message for check in step.checks if not check.ok),
            drop="not finite" if step.relative_drop is None else f"{step.relative_drop:.2%}",
            noise=", ".join(f"{value:.1f}" for value in step.sqnr_db.values()),
            share="" if step.int8_share is None else percent(step.int8_share),
            latency="" if step.latency is None else f"{step.latency.microseconds:.1f} µs",
            note=step.note,
        )


@dataclass(frozen=True)
class RecordedLearning:
    """What the metadata of a table say of learning: dB before and after."""

    sqnr_db: tuple[float, float]
    steps: int


@dataclass(frozen=True)
class RecordedConfirmation:
    """What the metadata of a table say of ranges of their own: dB without and with them, on how many rows."""

    rows: int
    before_db: float
    after_db: float


@dataclass(frozen=True)
class RecordedChoice:
    """What the metadata of a table say of the choice among methods and fixes, in dB."""

    held_back: int
    sqnr_db: dict[str, float] = field(default_factory=dict)
    fixes: str | None = None
    fixes_sqnr_db: dict[str, float] = field(default_factory=dict)
    learned: RecordedLearning | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    exceptions: dict[str, str] = field(default_factory=dict)
    confirmed: RecordedConfirmation | None = None


@dataclass(frozen=True)
class Choice:
    """What was measured to choose methods and fixes, in dB on rows held back; the best first.

    Attributes:
        methods: none where the recipe names one.
        fixes: those that were taken; None: none were.
        learned: what learning gained, in words.
        left_out: node -> why it is in floating point.
        exceptions: tensor -> the method of its own.
        confirmed: what these gain together, in words.
    """

    held_back: int
    methods: Sequence[tuple[str, float]]
    fixes: str | None
    fixes_tried: Sequence[tuple[str, float]]
    learned: str | None
    left_out: Mapping[str, str]
    exceptions: Mapping[str, str]
    confirmed: str | None

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Choice | None:
        """What the metadata of a table say; None where neither methods nor fixes were compared.

        Raises:
            ValueError: one of them is not what it should be; the message names it.
        """
        if not (metadata.get("sqnr_db") or metadata.get("fixes_sqnr_db")):
            return None
        found = decode(metadata, RecordedChoice, closed=False)
        if found.exceptions and found.confirmed is None:
            raise ValueError("the key 'confirmed' is missing")
        learned = confirmed = None
        if found.learned is not None:
            before, after = found.learned.sqnr_db
            learned = f"Learned in {found.learned.steps} steps: {before:.2f} dB before, {after:.2f} dB after."
        if found.confirmed is not None:
            own = found.confirmed
            confirmed = f"{own.before_db:.2f} dB without, {own.after_db:.2f} dB with them on {own.rows} rows"
        return cls(
            held_back=found.held_back,
            methods=_best_first(found.sqnr_db),
            fixes=found.fixes,
            fixes_tried=_best_first(found.fixes_sqnr_db),
            learned=learned,
            left_out=found.left_out,
            exceptions=found.exceptions,
            confirmed=confirmed,
        )

    def bar(self, value: float) -> str:
        """The width of a method's bar, in percent of the best."""
        widest = max(*(value for _, value in self.methods), 1.0)
        return f"{100 * max(value, 0) / widest:.1f}"


@dataclass(frozen=True)
class Calibration:
    """Where the scales come from."""

    method: str
    rows: str
    choice: Choice | None

    @classmethod
    def of(cls, metadata: Mapping[str, Any], table: Path) -> Calibration:
        """What the metadata beside a table say.

        Raises:
            InputError: they are not what they should be.
        """
        try:
            choice = Choice.of(metadata)
        except ValueError as error:
            file = metadata_path(table)
            raise InputError("not a calibration table's metadata of trtq", file=file, cause=error) from error
        return cls(str(metadata.get("method", "unknown")), str(metadata.get("rows", "?")), choice)


@dataclass(frozen=True)
class Node:
    """A weighted node in the engine.

    Attributes:
        millions: of multiply-accumulates; empty where they are not known.
        int8: whether the engine runs it in INT8.
        missed: whether it was meant to and does not.
    """

    name: str
    op: str
    millions: str
    int8: bool
    missed: bool
    reason: str


@dataclass(frozen=True)
class Range:
    """The range of an activation."""

    tensor: str
    amax: str
    scale: str


@dataclass(frozen=True)
class Fact:
    """Something that stands in the head: what it is called, its value, and what belongs beside it."""

    name: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        title: what was deployed.
        record: None where another command than `deploy` made the folder, or an earlier version.
        summary: the verdict in one line, without its outcome.
        facts: the figures that matter most.
        ways: what to try next; empty where it passed.
        measured: what else there is to know of the accuracy, line by line.
        interval: None where none was measured.
        bars: the noise of each layer; None where nothing is known of it.
        front: None where there are not two points.
        steps: None where `deploy` left no record of them.
        engine: what was built, line by line.
        float32: nodes that stay float32 where the rest is float16.
    """

    title: str
    record: Record | None
    verdict: Verdict
    summary: str
    facts: Sequence[Fact]
    ways: Sequence[Way]
    measured: Sequence[str]
    interval: Interval | None
    bars: Bars | None
    front: Front | None
    steps: Sequence[Step] | None
    calibration: Calibration
    values: Sequence[Values]
    engine: Sequence[str]
    engines: Sequence[Engine]
    drawing: Drawing | None
    kinds: Mapping[str, str]
    nodes: Sequence[Node]
    float32: Sequence[Float32Node]
    ranges: Sequence[Range]

    @classmethod
    def of(cls, folder: Path) -> Report:
        """What the files of a folder of results say.

        Raises:
            InputError: one is missing or damaged.
        """
        if not (folder / "verdict.json").is_file():
            raise InputError(
                "the folder holds no results",
                file=folder,
                remedy="give one that 'trtq deploy -o' or 'trtq demo' wrote",
            )
        with about(folder / "verdict.json"):
            verdict = Verdict.from_json(read_json(folder / "verdict.json", "verdict"))
        record = Record.load(folder / "report.json") if (folder / "report.json").exists() else None
        recipe = Recipe.load(folder / "recipe.toml") if (folder / "recipe.toml").is_file() else None
        plan, table = Plan.load(folder / "plan.json"), Table.load(folder / "calibration.cache")
        compiled, covered, engine_lines = _engine(folder / "model.plan", plan, verdict, recipe)
        metadata = table.metadata
        if missing := [name for name in plan.tensors if name not in table.scales]:
            raise InputError(
                f"the table has no scale for tensor '{missing[0]}', which the plan quantizes",
                file=folder / "plan.json",
                cause="plan.json and calibration.cache are of different runs, or one was edited",
                remedy="run 'trtq deploy' again",
            )
        steps = _steps(folder / "workflow.json")
        return cls(
            title=verdict.metric if record is None else Path(record.model).name,
            record=record,
            verdict=verdict,
            summary=verdict.headline().removeprefix(verdict.outcome.value.upper()).strip(),
            facts=_facts(verdict, covered, compiled, steps),
            ways=[] if verdict.passed else ways(verdict, recipe, "" if record is None else record.command),
            measured=replace(verdict, in_the_way=None).details(),
            interval=Interval.of(verdict),
            bars=Bars.of_noise(record, verdict),
            front=_front(steps, verdict),
            steps=None if steps is None else [Step.of(step) for step in steps],
            calibration=Calibration.of(metadata, folder / "calibration.cache"),
            values=[] if record is None else [Values.of(tensor) for tensor in record.tensors],
            engine=engine_lines,
            engines=Engine.all_of(record, compiled),
            drawing=Drawing.of(record, plan, covered),
            kinds=KINDS,
            nodes=_nodes(plan, covered),
            float32=plan.float32,
            ranges=[
                Range(name, f"{float(table.scales[name]) * INT8_MAX:.5g}", f"{float(table.scales[name]):.6g}")
                for name in plan.tensors
            ],
        )


def _steps(path: Path) -> list[RecordedStep] | None:
    """Every step that the workflow took, where `deploy` left a record of them."""
    if not path.exists():
        return None
    return read_own_json(path, "record of the steps", lambda value: decode(value, list[RecordedStep]))


def _front(steps: Sequence[RecordedStep] | None, verdict: Verdict) -> Front | None:
    """The front that was recorded; where there is no latency, the attempts by what they have in INT8."""
    steps = steps or []
    recorded = [point for step in steps for point in step.front if point.shown]
    if recorded:
        return Front.of(recorded, verdict, latency=True)
    attempts = [
        Point(
            step.step, 0.0, 0, "", "",
            int8_share=step.int8_share,
            sqnr_db=min(step.sqnr_db.values(), default=None),
            relative_drop=step.relative_drop,
            passed=step.outcome is Outcome.PASS,
            chosen=step.kept,
        )
        for step in steps
        if step.outcome is not None
    ]  # fmt: skip
    return Front.of(attempts, verdict, latency=False)


def _facts(
    verdict: Verdict, covered: Coverage, compiled: Compiled | None, steps: Sequence[RecordedStep] | None
) -> list[Fact]:
    """What the head says in figures."""
    name = verdict.metric.rpartition(":")[2]
    candidate = "not finite" if verdict.candidate is None else f"{verdict.candidate:.4f}"
    facts = [Fact(name, candidate, f"{verdict.reference:.4f} in fp32")]
    if verdict.relative_drop is not None:
        facts.append(
            Fact("drop", f"{verdict.relative_drop:.2%}", f"{verdict_percent(verdict.max_drop)} allowed")
        )
    if verdict.outputs:
        exact = verdict.lowest_sqnr_db >= MAX_SQNR_DB
        facts.append(Fact("SQNR", "exact" if exact else f"{verdict.lowest_sqnr_db:.1f} dB", "of the outputs"))
    counted = "nodes" if covered.mac_share is None else "MACs"
    facts.append(Fact("in INT8", percent(covered.share), f"of the {counted}"))
    kept = next((step for step in steps or [] if step.kept), None)
    if kept is not None and kept.latency is not None:
        facts.append(Fact("latency", f"{kept.latency.microseconds:.1f} µs", kept.latency.kind))
    if compiled is not None:
        facts.append(Fact("kernels", str(compiled.kernels), "in the engine"))
    return facts


def _engine(
    path: Path, plan: Plan, verdict: Verdict, recipe: Recipe | None
) -> tuple[Compiled | None, Coverage, list[str]]:
    """What was compiled, what the engine runs in INT8, and what there is to say of it; where there is none,
    why.

    Raises:
        InputError: it is missing or damaged, or the record beside it is.
    """
    refused = [check.message for check in verdict.checks if check.name == ENGINE_BUILT]
    if not path.exists() and recipe is not None and recipe.backend == NO_ENGINE:
        refused = ["none was asked for (--backend none)"]
    if refused:
        covered = planned(plan)
        return (
            None,
            covered,
            ["no engine", *refused, *(f"as planned: {line}" for line in covered.text().splitlines())],
        )
    engine = describe_engine(path)
    if engine["build"] is None:
        raise InputError("the record of the engine is missing", file=f"{path}.json")
    compiled: Compiled = engine["build"]["compiled"]
    covered = coverage(plan, compiled)
    return compiled, covered, _engine_lines(engine, compiled, covered)


def _engine_lines(engine: Mapping[str, Any], compiled: Compiled, covered: Coverage) -> list[str]:
    targets = ", ".join(engine["targets"]) or "the builder's own"
    megabytes = compiled.bytes_moved() / 1e6
    return [
        f"{engine['backend']} {engine['version']}, {engine['bytes'] / 1e6:.1f} MB",
        f"built for compute capabilities {targets}",
        f"{compiled.kernels} kernels; about {megabytes:.1f} MB moved at batch {compiled.batch} (an estimate)",
        *covered.text().splitlines(),
    ]


def _nodes(plan: Plan, covered: Coverage) -> list[Node]:
    running = {node.name for node in covered.int8}
    nodes = []
    for node in plan.nodes:
        int8 = node.name in running
        missed = node.int8 and not int8
        reason = "its Q/DQ bought nothing" if missed else "" if int8 else node.reason
        millions = "" if node.macs is None else f"{node.macs / 1e6:.2f} M"
        nodes.append(Node(node.name, node.op, millions, int8, missed, reason))
    return nodes


def _best_first(figures: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(figures.items(), key=lambda item: -item[1])
