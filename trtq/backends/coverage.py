"""What the plan wanted in INT8 against what the compiled engine runs in INT8."""

from __future__ import annotations

from dataclasses import dataclass

from trtq.backends.compiled import Compiled, int8_nodes
from trtq.graph.plan import NodePlan, Plan, listed, percent


@dataclass(frozen=True)
class Coverage:
    """The INT8 part of an engine.

    Attributes:
        int8: weighted nodes that the engine runs in INT8.
        missed: weighted nodes that were meant to and do not; their Q/DQ only costs.
        skipped: weighted nodes that the plan leaves in floating point, with the reason.
        mac_share: share of the multiply-accumulates of all weighted nodes that run in INT8, or None
            where those of a node are not known: a shape is not, it is in the body of an If, Loop or Scan
            (which may run any number of times), or what it does is not known.
        node_share: the same, counting nodes.
        unread: kernels of the builder's list that could not be read; nodes in them count as floating point.
    """

    int8: list[NodePlan]
    missed: list[NodePlan]
    skipped: list[NodePlan]
    mac_share: float | None
    node_share: float
    unread: int = 0

    @property
    def share(self) -> float:
        """Share of the multiply-accumulates, or of the nodes where those are not known."""
        return self.node_share if self.mac_share is None else self.mac_share

    def text(self) -> str:
        """A summary line, and one of the nodes that were meant to be INT8 and are not."""
        total = len(self.int8) + len(self.missed) + len(self.skipped)
        counted = "weighted nodes" if self.mac_share is None else "multiply-accumulates"
        lines = [
            f"{len(self.int8)} of {total} weighted nodes in INT8, {percent(self.share)} of the {counted}"
        ]
        if self.missed:
            lines.append(f"meant for INT8 but run in floating point: {listed(self.missed)}")
        if self.unread:
            lines.append(f"{self.unread} kernels could not be read; their nodes count as floating point")
        return "\n".join(lines)


def coverage(plan: Plan, compiled: Compiled) -> Coverage:
    """Compare a plan with the engine that was built from it."""
    running = int8_nodes(compiled.layers, [node.name for node in plan.nodes])
    return Coverage(
        int8=[n for n in plan.nodes if n.name in running],
        missed=[n for n in plan.nodes if n.int8 and n.name not in running],
        skipped=[n for n in plan.nodes if not n.int8 and n.name not in running],
        mac_share=plan.mac_share(set(running)),
        node_share=len(running) / len(plan.nodes) if plan.nodes else 0.0,
        unread=len(compiled.unread),
    )


def planned(plan: Plan) -> Coverage:
    """What an engine would run in INT8 that does as the plan says; for where there is none to ask."""
    int8 = plan.int8_nodes
    return Coverage(
        int8=[n for n in plan.nodes if n.int8],
        missed=[],
        skipped=[n for n in plan.nodes if not n.int8],
        mac_share=plan.mac_share(),
        node_share=len(int8) / len(plan.nodes) if plan.nodes else 0.0,
    )
