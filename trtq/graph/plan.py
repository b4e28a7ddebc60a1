"""The plan: which nodes are INT8 and why the others are not, and where the quantizers go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trtq.files import PathLike, decode, read_own_json, write_json

FORMAT = "trtq-plan-1"

BY_COST = "cost"
"""The rule of nodes that stay in floating point because INT8 would not make the engine faster there."""

INSERTED = "/affine"
"""What stands behind the name of a tensor in the name of the one that a fix inserted behind it."""

RESTORED = "/restored"
"""What stands behind the name of an Add in the name of the Mul that a fix inserted in front of it."""

MOST_LISTED = 3
"""So many nodes are named in a line of text; the files have all."""


@dataclass(frozen=True)
class NodePlan:
    """A weighted node: quantized or not, by which rule, and the reason in words."""

    name: str
    op: str
    int8: bool
    rule: str
    reason: str
    macs: int | None = None


@dataclass(frozen=True)
class Edge:
    """An activation that is quantized, per tensor, in front of input `index` of `node`.

    Attributes:
        range: the tensor whose range it takes; another one where an operator in between only moves values.
    """

    tensor: str
    node: str
    index: int
    rule: str
    range: str


@dataclass(frozen=True)
class Weight:
    """A constant that is quantized per channel along `axis`, for input `index` of `node`."""

    tensor: str
    node: str
    index: int
    axis: int


@dataclass(frozen=True)
class Float32Node:
    """A node that stays float32 where the rest becomes float16, by which rule, and the reason in words."""

    name: str
    op: str
    rule: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The placement of one model; saved as `plan.json`.

    Attributes:
        model: SHA-256 of the fp32 model.
        nodes: every weighted node.
        edges: activations to quantize; several edges of one tensor share one Q/DQ pair.
        weights: constants to quantize.
        batch: the batch size for which multiply-accumulates are counted.
        float32: every node that stays float32 where what is not quantized is float16.
    """

    model: str
    nodes: list[NodePlan]
    edges: list[Edge]
    weights: list[Weight]
    batch: int = 1
    float32: list[Float32Node] = field(default_factory=list)

    @property
    def tensors(self) -> list[str]:
        """Activations that need a range, in the order of the graph, each once."""
        return list(dict.fromkeys(edge.range for edge in self.edges))

    @property
    def int8_nodes(self) -> list[str]:
        """Names of the nodes meant to run in INT8."""
        return [node.name for node in self.nodes if node.int8]

    @property
    def inputs(self) -> set[tuple[str, int]]:
        """The quantized inputs: node, and index of the input."""
        return {(edge.node, edge.index) for edge in self.edges} | {(w.node, w.index) for w in self.weights}

    @property
    def macs_per_row(self) -> float:
        """Multiply-accumulates of one row; those that are not known count as 0."""
        return sum(node.macs or 0 for node in self.nodes) / max(self.batch, 1)

    def rows_within(self, macs: float, fewest: int, most: int) -> int:
        """How many rows take so many multiply-accumulates, from `fewest` to `most`."""
        return int(min(max(macs / max(self.macs_per_row, 1), fewest), most))

    def float32_lines(self) -> list[str]:
        """What stays float32, one line for all nodes of a rule: the first of them, and how many more."""
        lines = []
        for rule in dict.fromkeys(node.rule for node in self.float32):
            first, *more = (node for node in self.float32 if node.rule == rule)
            others = f", and {len(more)} more by the rule '{rule}'" if more else ""
            lines.append(f"{first.name} ({first.op}): {first.reason}{others}")
        return lines

    def mac_share(self, names: set[str] | None = None) -> float | None:
        """Share of the model's multiply-accumulates in the named nodes (default: those planned for INT8).

        None where the multiply-accumulates of a node are not known.
        """
        names = set(self.int8_nodes) if names is None else names
        if any(node.macs is None for node in self.nodes) or not self.nodes:
            return None
        total = sum(node.macs or 0 for node in self.nodes)
        return sum(node.macs or 0 for node in self.nodes if node.name in names) / total if total else None

    def text(self) -> str:
        """How much goes to INT8, and what stays in floating point and why, for a person."""
        share = self.mac_share()
        of_macs = "" if share is None else f", {percent(share)} of the multiply-accumulates"
        lines = [f"{len(self.int8_nodes)} of {len(self.nodes)} weighted nodes to INT8{of_macs}"]
        lines += [f"in floating point: {line}" for line in by_reason([n for n in self.nodes if not n.int8])]
        lines += [f"in float32: {line}" for line in self.float32_lines()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The plan in JSON values.

        Raises:
            ValueError: they are not a plan of this format.
        """
        plan = decode(value, cls, format=FORMAT)
        if plan.batch < 1:
            raise ValueError(f"`batch`: expected a number from 1, got {plan.batch}")
        return plan

    def save(self, path: PathLike) -> None:
        """Write `plan.json` in one move."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: PathLike) -> Plan:
        """Read a plan.

        Raises:
            InputError: the file is missing, not JSON, or not a plan.
        """
        remedy = "correct that line, or take a plan.json as 'trtq deploy' wrote it"
        return read_own_json(path, "plan", cls.from_json, remedy)


def by_reason(nodes: Sequence[NodePlan], most: int = MOST_LISTED) -> list[str]:
    """A line for each reason: the nodes that have it, as `listed`, and the reason; of those left out by cost,
    which have figures of their own, one line with the first one's."""
    alike: dict[str, list[NodePlan]] = {}
    for node in nodes:
        alike.setdefault(
            node.rule if node.rule == BY_COST and most == MOST_LISTED else node.reason, []
        ).append(node)
    return [f"{listed(same, most)}: {same[0].reason}" for same in alike.values()]


def listed(nodes: Sequence[NodePlan], most: int = MOST_LISTED) -> str:
    """The first of some nodes, and how many more there are."""
    text = ", ".join(f"{node.name} ({node.op})" for node in nodes[:most])
    return f"{text} and {len(nodes) - most} more" if len(nodes) > most else text


def percent(share: float) -> str:
    """A share as text, to a tenth of a percent; only the whole is 100.0%."""
    return f"{share if share >= 1 else min(share, 0.999):.1%}"
