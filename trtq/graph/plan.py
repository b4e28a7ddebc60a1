"""The plan: which nodes are INT8 and why the others are not, and where the quantizers go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar, get_type_hints

import onnx_graphsurgeon as gs

from trtq.errors import InputError
from trtq.files import PathLike, read_own_json, write_json

FORMAT = "trtq-plan-1"

_T = TypeVar("_T")


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

    def mac_share(self, names: set[str] | None = None) -> float | None:
        """Share of the model's multiply-accumulates in the named nodes (default: those planned for INT8).

        None where the multiply-accumulates of a node are not known.
        """
        names = set(self.int8_nodes) if names is None else names
        if any(node.macs is None for node in self.nodes) or not self.nodes:
            return None
        total = sum(node.macs or 0 for node in self.nodes)
        return sum(node.macs or 0 for node in self.nodes if node.name in names) / total if total else None

    def check_fits(self, graph: gs.Graph) -> None:
        """Make sure that a plan, which may have been edited, can be carried out.

        Args:
            graph: folded, not quantized.

        Raises:
            InputError: a quantizer names something that the graph has not, or an INT8 node lacks a quantizer.
        """
        nodes, tensors = {node.name: node for node in graph.nodes}, graph.tensors()
        items: list[Edge | Weight] = [*self.edges, *self.weights]
        for item in items:
            where = f"input {item.index} of '{item.node}'"
            if item.node not in nodes:
                raise _unfit(f"the model has no node '{item.node}'")
            inputs = nodes[item.node].inputs
            if not 0 <= item.index < len(inputs) or inputs[item.index].name != item.tensor:
                raise _unfit(f"{where} is not '{item.tensor}'")
            if isinstance(inputs[item.index], gs.Constant) != isinstance(item, Weight):
                raise _unfit(f"{where} is {'no' if isinstance(item, Weight) else 'a'} constant")
            if isinstance(item, Weight) and not 0 <= item.axis < len(inputs[item.index].shape):
                raise _unfit(f"'{item.tensor}' has no axis {item.axis}")
            if isinstance(item, Edge) and item.range not in tensors:
                raise _unfit(f"the model has no tensor '{item.range}'")
        quantized = {(item.node, item.index) for item in items}
        for name in self.int8_nodes:
            if name not in nodes:
                raise _unfit(f"the model has no node '{name}'")
            for index in range(2):
                if (name, index) not in quantized:
                    raise _unfit(f"'{name}' is to be INT8, but its input {index} has no quantizer")

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The plan in JSON values.

        Raises:
            KeyError, TypeError, ValueError: they are not a plan of this format.
        """
        if value["format"] != FORMAT:
            raise ValueError(f"the format is {value['format']}, not {FORMAT}")
        if not isinstance(value["model"], str) or not isinstance(value["batch"], int) or value["batch"] < 1:
            raise ValueError("'model' or 'batch' is not what it should be")
        return cls(
            value["model"],
            [_read(NodePlan, node) for node in value["nodes"]],
            [_read(Edge, edge) for edge in value["edges"]],
            [_read(Weight, weight) for weight in value["weights"]],
            value["batch"],
            [_read(Float32Node, node) for node in value.get("float32", [])],
        )

    def save(self, path: PathLike) -> None:
        """Write `plan.json` in one move."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: PathLike) -> Plan:
        """Read a plan.

        Raises:
            InputError: the file is missing, not JSON, or not a plan.
        """
        return read_own_json(path, "plan", cls.from_json)


def percent(share: float) -> str:
    """A share for a person, to a tenth of a percent; 100.0% is said of the whole only."""
    return f"{share if share >= 1 else min(share, 0.999):.1%}"


def _read(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """A dataclass from JSON values, which have to have its fields' types."""
    for name, wanted in get_type_hints(kind).items():
        if name in values and not isinstance(values[name], wanted):
            raise ValueError(f"'{name}' is {values[name]!r}")
    return kind(**values)


def _unfit(cause: str) -> InputError:
    return InputError(
        "the plan does not fit the model",
        cause=cause,
        remedy="to keep a node out of INT8 set its 'int8' to false; more INT8 takes a new plan",
    )
