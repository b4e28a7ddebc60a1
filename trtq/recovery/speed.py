"""The fastest engine: which plan that is by the figures at hand, and why the others are not.

Where something says what layers cost (`trtq.cost`), a group of nodes goes to INT8 only where that makes the
engine faster, the reformats around it counted. The engine without any INT8 is always among the candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import onnx_graphsurgeon as gs

from trtq.backends.builders import NO_ENGINE, chosen, runs_on
from trtq.backends.interface import Gpu, find_gpu
from trtq.cost.gpus import gpu_named
from trtq.cost.interface import Builder, CostSource, Latency, Rest
from trtq.cost.placement import Fastest, Latencies
from trtq.cost.sources import source_for
from trtq.cost.timed import TimedEngine
from trtq.errors import InputError
from trtq.graph.place import leave_out
from trtq.graph.plan import BY_COST, Plan, percent
from trtq.job import Job, opt_shapes
from trtq.recipe import Recipe

UNSURE = 0.03
"""A gain over floating point alone that is less than this share is none where it is only modelled: the
model's error is larger, and the engine without INT8 is the accurate one."""

WORTH_SAYING = 0.05
"""Microseconds: less is no difference to a person."""


@dataclass(frozen=True)
class Point:
    """A plan between speed and accuracy.

    Attributes:
        name: what it is, for a person.
        microseconds, bytes: of one inference (`trtq.cost.interface.Latency`).
        kind, source: where the figures come from: measured, imported or modelled.
        int8_share: of the multiply-accumulates; None where they are not known.
        sqnr_db: lowest of the outputs on the evaluation data; None where it was not run.
        relative_drop: of the metric there.
        passed: whether it passes the gate and the checks.
        chosen: whether it is what was delivered.
        estimated_sqnr_db: on calibration rows, as if what each group adds to the noise alone added up.
    """

    name: str
    microseconds: float
    bytes: int
    kind: str
    source: str
    int8_share: float | None = None
    sqnr_db: float | None = None
    relative_drop: float | None = None
    passed: bool | None = None
    chosen: bool = False
    estimated_sqnr_db: float | None = None

    @property
    def shown(self) -> bool:
        """Whether it is worth a line for a person: it was run, or is a mark to compare with."""
        return self.sqnr_db is not None or self.name in NAMED

    def timed(self, latency: Latency | None) -> Point:
        """The point with another latency, if there is one."""
        if latency is None:
            return self
        source = latency.source
        return replace(self, microseconds=latency.microseconds, kind=latency.kind, source=source)

    def cells(self) -> list[str]:
        """The figures as text, empty where there are none, and the name."""
        drop, noise, share = self.relative_drop, self.sqnr_db, self.int8_share
        return [
            f"{self.microseconds:.1f} µs",
            "" if drop is None else f"{drop:.2%}",
            "" if noise is None else f"{noise:.1f} dB",
            "" if share is None else percent(share),
            self.name + (" (chosen)" if self.chosen else ""),
        ]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Speed:
    """What engines of a job's model cost.

    Attributes:
        graph: the job's folded model.
        plan: what could be INT8 of it.
    """

    graph: gs.Graph
    plan: Plan
    source: CostSource

    @property
    def identity(self) -> list[Any]:
        """What tells the figures from others, for the cache."""
        figures = [self.latency(plan, "fp16").microseconds for plan in (self.plan, self.without_int8)]
        return [self.source.kind, self.source.name, *figures]

    def latency(self, plan: Plan, rest: Rest) -> Latency:
        """What the engine of a plan costs."""
        return self.source.latency(plan, rest)

    @cached_property
    def without_int8(self) -> Plan:
        """The plan without any INT8."""
        nodes = dict.fromkeys(self.plan.int8_nodes, "the engine is without INT8")
        return leave_out(self.graph, self.plan, nodes, rule=BY_COST)

    def fastest(self, rest: Rest) -> Plan:
        """The fastest plan, which may be that without any INT8; its nodes say what INT8 would cost there."""
        latencies = Latencies(self.graph, self.plan, self.source, rest)
        left_out, everything = Fastest(latencies).left_out(), frozenset(latencies.units)
        alone, here = latencies.latency(everything), latencies.latency(left_out)
        reasons = reasons_of(latencies, left_out)
        if left_out != everything and not pays(here, alone):
            gain = 1 - here.microseconds / alone.microseconds
            little = (
                f"INT8 would save {gain:.1%} of the engine's time by the model, which is within its error"
            )
            reasons = dict.fromkeys(everything, little) | reasons
        nodes = {node: reason for name, reason in reasons.items() for node in latencies.units[name]}
        return leave_out(self.graph, self.plan, nodes, rule=BY_COST)

    def text(self, chosen: Plan, rest: Rest) -> str:
        """What floating point, INT8 wherever it can be, and a plan cost, for a person."""
        bare, here = self.without_int8, self.latency(chosen, rest)
        found = {
            "FP32": self.latency(bare, "fp32"),
            **({"FP16": self.latency(bare, "fp16")} if rest == "fp16" else {}),
            "every layer that can in INT8": self.latency(self.plan, rest),
            "this plan": here,
        }
        figures = ", ".join(f"{name} {latency.microseconds:.1f} µs" for name, latency in found.items())
        lines = [f"{figures} ({here.kind}: {here.source})"]
        if not chosen.int8_nodes:
            lines.append(f"INT8 does not pay on this model and card: {rest.upper()} alone is the fastest")
        return "\n".join(lines)

    def points(self, rest: Rest) -> list[Point]:
        """Floating point alone, and INT8 wherever it can be."""
        bare = self.without_int8
        found = [self.point("FP32", bare, "fp32")]
        if rest == "fp16":
            found.append(self.point("FP16", bare, "fp16"))
        return [*found, self.point("every layer that can in INT8", self.plan, rest)]

    def point(self, name: str, plan: Plan, rest: Rest) -> Point:
        """A plan's point, nothing run."""
        latency = self.latency(plan, rest)
        return Point(
            name, latency.microseconds, latency.bytes, latency.kind, latency.source, plan.mac_share()
        )


def pays(latency: Latency, alone: Latency) -> bool:
    """Whether an engine with INT8 is surely faster than the one in floating point alone."""
    least = UNSURE if "modelled" in (latency.kind, alone.kind) else 0.0
    return latency.microseconds < (1 - least) * alone.microseconds


def rest_of(recipe: Recipe) -> Rest:
    """What an engine of the recipe computes in beside INT8."""
    return "fp16" if recipe.half else "fp32"


def speed_of(job: Job, plan: Plan, timed: Callable[[], Sequence[TimedEngine]] = lambda: ()) -> Speed | None:
    """What engines of the job's model cost, where its recipe wants the fastest; None where it wants INT8.

    Args:
        plan: of all that can be INT8.
        timed: engines of the model, timed on the GPU here; asked for where the recipe names no other source.

    Raises:
        InputError: latency is asked for, and nothing tells any; it is asked for together with a least share
            of INT8; as `source_for`.
    """
    recipe, console = job.recipe, job.console
    named = recipe.gpu or recipe.profile_json or recipe.layer_info
    if recipe.objective == "latency" and recipe.min_int8 is not None:
        raise InputError(
            "--min-int8 does not go with --objective latency",
            cause="the fastest engine may have less in INT8",
            remedy="leave one of them out",
        )
    if recipe.objective == "int8" or (recipe.objective is None and recipe.min_int8 is not None):
        return None
    card = None if named else find_gpu()
    other = None if card is None or _runs_on(recipe, card.compute_capability) else card
    if not named and (card is None or other is not None):
        if recipe.objective == "latency":
            raise InputError(
                "nothing tells what layers cost: --objective latency needs a GPU here, or another source",
                cause=None if other is None else _refused(recipe, other),
                remedy="name the GPU that the engine is for (--gpu L4), or give --profile-json and"
                " --layer-info of trtexec",
            )
        why = "" if other is None else f"; {_refused(recipe, other)}"
        console.say(
            "objective", f"int8: every layer that can{why}; --gpu NAME would let the fastest plan be chosen"
        )
        return None
    try:
        source = source_for(
            job.model.graph,
            opt_shapes(job.model, job.profile),
            measured=() if named else timed(),
            profiles=recipe.profile_json,
            layer_infos=recipe.layer_info,
            gpu=recipe.gpu or (card.name if card and known(card.name) else None),
            builder=builder_of(recipe),
            int8_inputs=_int8_inputs(job),
        )
    except InputError as error:
        if named or recipe.objective == "latency":
            raise
        console.say("objective", f"int8: every layer that can; {error.problem}")
        return None
    if source is None:
        console.say("objective", "int8: every layer that can; nothing tells what layers cost on the GPU here")
        return None
    return Speed(job.model.graph, plan, source)


def _int8_inputs(job: Job) -> list[str]:
    """The inputs that the host quantizes, where all that reads them is INT8."""
    quantized = job.recipe.io in ("int8", "int8-in-out")
    return [tensor.name for tensor in job.model.graph.inputs] if quantized else []


def known(card: str) -> bool:
    """Whether there is a data sheet of a GPU."""
    try:
        gpu_named(card)
    except InputError:
        return False
    return True


def is_for_this_gpu(recipe: Recipe) -> bool:
    """Whether the engine is to be fast on the GPU here, and not on another one that the recipe names."""
    card = find_gpu()
    if card is None or recipe.profile_json or not _runs_on(recipe, card.compute_capability):
        return False
    return recipe.gpu is None or (known(card.name) and gpu_named(recipe.gpu) == gpu_named(card.name))


def builder_of(recipe: Recipe) -> Builder:
    """Whose kernels the engine has that is to be fast: TensorRT's where none is built here, or where TensorRT
    for RTX, which is here, does not run on the GPU that the recipe names."""
    if recipe.gpu is not None:
        major, minor = divmod(gpu_named(recipe.gpu).capability, 10)
        if not _runs_on(recipe, f"{major}.{minor}"):
            return "tensorrt"
    if recipe.backend == NO_ENGINE:
        return "tensorrt"
    return "tensorrt-rtx" if chosen(recipe.backend) == "tensorrt-rtx" else "tensorrt"


def _runs_on(recipe: Recipe, capability: str) -> bool:
    """Whether the recipe's engine runs on GPUs of a compute capability; true where it builds none."""
    return recipe.backend == NO_ENGINE or runs_on(chosen(recipe.backend), capability)


def _refused(recipe: Recipe, gpu: Gpu) -> str:
    """That the recipe's engine does not run on the GPU here."""
    return f"{chosen(recipe.backend)} does not run on {gpu.name}, compute capability {gpu.compute_capability}"


def reasons_of(latencies: Latencies, left_out: frozenset[str]) -> dict[str, str]:
    """Unit that is left out -> what INT8 in it alone would cost, in words."""
    here = latencies.latency(left_out)
    return {
        name: _reason(here, latencies.latency(left_out - {name}))
        for name in latencies.units
        if name in left_out
    }


def _reason(here: Latency, there: Latency) -> str:
    """Why a unit stays in floating point, by what the engine costs without and with it in INT8."""
    more = there.microseconds - here.microseconds
    reformats = sum(part.reformats_us for part in there.parts) - sum(part.reformats_us for part in here.parts)
    count = sum(part.reformats_us > 0 for part in there.parts) - sum(
        part.reformats_us > 0 for part in here.parts
    )
    if more < WORTH_SAYING:
        return "INT8 saves nothing here"
    said = f"INT8 costs {more:.1f} µs more here"
    if reformats < more / 2:
        return f"{said}: the kernels are not faster"
    many = {1: "a reformat", 2: "two reformats", 3: "three reformats"}.get(count, "reformats")
    return f"{said}: {many}"


def front_of(speed: Speed, points: list[Point], step: str, rest: Rest) -> list[Point]:
    """The front for `workflow.json`: floating point alone, INT8 wherever it can be, and what was tried, as
    far as nothing else is better in both latency and SQNR.

    Args:
        points: of all that was tried.
        step: whose result was delivered.
    """
    found = [replace(point, chosen=point.name == step) for point in points]
    bare = {point.name.split()[0]: point for point in found if point.name.endswith(" alone")}
    plain = [point for point in speed.points(rest) if point.name.lower() not in bare]
    distinct = {
        (point.microseconds, point.sqnr_db, point.estimated_sqnr_db): point for point in (*plain, *found)
    }
    return pareto(list(distinct.values()))


def pareto(points: list[Point]) -> list[Point]:
    """The points that no other one beats in both latency and SQNR, and those that were never run, by
    latency."""

    def beaten(point: Point) -> bool:
        return any(
            other.sqnr_db is not None
            and point.sqnr_db is not None
            and other.microseconds <= point.microseconds
            and other.sqnr_db >= point.sqnr_db
            and (other.microseconds, other.sqnr_db) != (point.microseconds, point.sqnr_db)
            for other in points
        )

    kept = [point for point in points if point.chosen or point.name in NAMED or not beaten(point)]
    return sorted(kept, key=lambda point: point.microseconds)


NAMED = ("FP32", "FP16", "every layer that can in INT8")
"""Points that are shown in any case."""


HEADINGS = ("latency", "drop", "SQNR", "INT8", "plan")
"""Of `Point.cells`."""


def front_lines(front: Sequence[Point]) -> list[str]:
    """Points as a table, with where the figures come from."""
    table = [list(HEADINGS), *(point.cells() for point in front if point.shown)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        f"latency against accuracy ({sources_of(front)})",
        *("  ".join([*map(str.rjust, row[:-1], widths), row[-1]]).rstrip() for row in table),
    ]


def sources_of(front: Sequence[Point]) -> str:
    """Where the figures of points come from, each source once."""
    return "; ".join(dict.fromkeys(f"{point.kind}: {point.source}" for point in front))
