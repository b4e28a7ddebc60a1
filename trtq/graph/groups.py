"""Groups: INT8 nodes that are left out together, because TensorRT fuses them into one kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_graphsurgeon as gs

from trtq.graph.plan import NodePlan, Plan

_BETWEEN = frozenset(
    {
        "Add",
        "Cast",
        "Clip",
        "Div",
        "Expand",
        "Identity",
        "Max",
        "Min",
        "Mul",
        "Reshape",
        "Slice",
        "Squeeze",
        "Sub",
        "Tanh",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
"""Operators between attention's products and its softmax: scale, mask, bias, reshapes."""


@dataclass(frozen=True)
class Group:
    """INT8 nodes that are left out together.

    Attributes:
        name: the first node's.
        nodes: names, in the order of the plan.
        op: the nodes' operators: `Conv`, or `MatMul+MatMul`.
        macs: multiply-accumulates of all nodes; None where they are not known.
    """

    name: str
    nodes: tuple[str, ...]
    op: str
    macs: int | None


def groups(graph: gs.Graph, plan: Plan) -> list[Group]:
    """The INT8 nodes of a plan as groups, in the order of the plan.

    The products of one attention (queries by keys, softmax by values) are one group: TensorRT's fused
    multi-head attention is INT8 with both or with neither. Every other node is a group of its own. The
    residual input of a Conv + Add is quantized for that Conv (see `place.leave_out`), so the addition
    belongs to the Conv's group. Projections that read one tensor (queries, keys and values) are separate
    groups: TensorRT merges them where all are of one precision and runs them one by one where not.

    Args:
        graph: the folded graph that `plan` is for.
    """
    planned = {node.name: node for node in plan.nodes if node.int8}
    together: dict[str, tuple[str, ...]] = {name: (name,) for name in planned}
    for node in graph.nodes:
        if node.op == "Softmax":
            found = {*_products(node, "inputs"), *_products(node, "outputs")} & planned.keys()
            members = tuple(name for name in planned if name in found and len(together[name]) == 1)
            together |= dict.fromkeys(members, members)
    return [_group([planned[name] for name in names]) for names in dict.fromkeys(together.values())]


def _group(nodes: Sequence[NodePlan]) -> Group:
    known = [node.macs for node in nodes if node.macs is not None]
    return Group(
        name=nodes[0].name,
        nodes=tuple(node.name for node in nodes),
        op="+".join(node.op for node in nodes),
        macs=sum(known) if len(known) == len(nodes) else None,
    )


def _products(softmax: gs.Node, side: Literal["inputs", "outputs"]) -> Iterator[str]:
    """MatMuls of two activations before or after a softmax, with nothing but `_BETWEEN` in between."""
    seen: set[str] = set()
    waiting = [softmax]
    while waiting:
        node = waiting.pop()
        for tensor in getattr(node, side):
            for neighbour in getattr(tensor, side):
                if neighbour.name in seen:
                    continue
                seen.add(neighbour.name)
                if neighbour.op in _BETWEEN:
                    waiting.append(neighbour)
                elif neighbour.op == "MatMul" and not any(
                    isinstance(t, gs.Constant) for t in neighbour.inputs
                ):
                    yield neighbour.name
