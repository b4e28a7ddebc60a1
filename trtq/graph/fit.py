"""Whether a plan, which may have been edited by hand, can be carried out on a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import onnx_graphsurgeon as gs

from trtq.errors import InputError
from trtq.graph.place import FLOATS, output_axis, unquantizable
from trtq.graph.plan import INSERTED, RESTORED, Edge, NodePlan, Plan, Weight
from trtq.graph.products import product

_TAKE_OUT = "take that line out of the plan, or take the plan as it was written"
_LEAVE_OUT = "to keep a node out of INT8 set its 'int8' to false; more INT8 takes a new plan"


def of_model(plan: Plan, graph: gs.Graph) -> Plan:
    """A plan as it is for the model's own graph: a fix may have inserted tensors, for which those stand that
    the model has there."""
    nodes = {node.name: node for node in graph.nodes}

    def own(edge: Edge) -> Edge:
        add = nodes.get(edge.node.removesuffix(RESTORED))
        if edge.node not in nodes and add is not None:
            names = [tensor.name for tensor in add.inputs]
            index = names.index(edge.tensor) if edge.tensor in names else edge.index
            return replace(edge, node=add.name, index=index)
        inputs = nodes[edge.node].inputs if edge.node in nodes else []
        name = inputs[edge.index].name if 0 <= edge.index < len(inputs) else edge.tensor
        inserted = edge.tensor == edge.range and edge.tensor.startswith(f"{name}{INSERTED}")
        return replace(edge, tensor=name, range=name) if inserted else edge

    return replace(plan, edges=[own(edge) for edge in plan.edges])


def check_fits(plan: Plan, graph: gs.Graph) -> None:
    """Check that a plan fits the model and lists nothing twice.

    Args:
        graph: folded, not quantized.

    Raises:
        InputError: a node, tensor, input or axis that the model does not have, or that cannot be quantized;
            two entries for one thing; an INT8 node without its quantizers, or quantizers that make a node
            INT8 that the plan does not list as such.
    """
    nodes = {node.name: node for node in graph.nodes}
    within = {node.name: node for body in graph.subgraphs(recursive=True) for node in body.nodes}
    for planned in plan.nodes:
        _check_node(planned, graph, nodes.get(planned.name) or within.get(planned.name))
    tensors = graph.tensors()
    for edge in plan.edges:
        _check_edge(edge, nodes, tensors)
    for weight in plan.weights:
        _check_weight(weight, nodes, graph)
    _check_unique(plan)
    _check_quantizers(plan, nodes)


def _check_unique(plan: Plan) -> None:
    items: list[Edge | Weight] = [*plan.edges, *plan.weights]
    if name := _twice(node.name for node in plan.nodes):
        raise _unfit(f"'{name}' is listed twice among its nodes", _TAKE_OUT)
    if where := _twice(f"input {item.index} of '{item.node}'" for item in items):
        raise _unfit(f"{where} has two quantizers", _TAKE_OUT)
    ranges: dict[str, str] = {}
    for edge in plan.edges:
        if ranges.setdefault(edge.tensor, edge.range) != edge.range:
            raise _unfit(
                f"input {edge.index} of '{edge.node}' has a second range for '{edge.tensor}': that of"
                f" '{edge.range}', after that of '{ranges[edge.tensor]}'",
                "all edges of a tensor share one quantizer: give them one range",
            )


def _twice(names: Iterable[str]) -> str | None:
    """The first value that occurs more than once, if any."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _check_node(planned: NodePlan, graph: gs.Graph, node: gs.Node | None) -> None:
    name = planned.name
    if node is None:
        raise _unfit(f"the model has no node '{name}'")
    if node.op != planned.op:
        raise _unfit(f"'{name}' is a {planned.op} in the plan and a {node.op} in the model")
    if planned.int8 and product(node) is None:
        raise _unfit(f"'{name}' ({node.op}) is not a weighted node: nothing in it could run in INT8")
    if planned.int8 and not any(node is top for top in graph.nodes):
        raise _unfit(f"'{name}' is in the body of an If, Loop or Scan, where no quantizer goes")
    if planned.int8 and (reason := unquantizable(node, graph)):
        raise _unfit(f"'{name}' ({node.op}) cannot be INT8: {reason}")


def _check_item(item: Edge | Weight, nodes: Mapping[str, gs.Node]) -> gs.Tensor:
    """The tensor that an edge or weight quantizes."""
    where = f"input {item.index} of '{item.node}'"
    if item.node not in nodes:
        raise _unfit(f"the model has no node '{item.node}'")
    inputs = nodes[item.node].inputs
    if not 0 <= item.index < len(inputs) or inputs[item.index].name != item.tensor:
        raise _unfit(f"{where} is not '{item.tensor}'")
    tensor = inputs[item.index]
    if isinstance(tensor, gs.Constant) != isinstance(item, Weight):
        raise _unfit(f"{where} is {'no' if isinstance(item, Weight) else 'a'} constant")
    _check_float(tensor)
    return tensor


def _check_float(tensor: gs.Tensor) -> None:
    if tensor.dtype is not None and tensor.dtype not in FLOATS:
        raise _unfit(f"'{tensor.name}' is {tensor.dtype}, not float32 or float16", _TAKE_OUT)


def _check_edge(edge: Edge, nodes: Mapping[str, gs.Node], tensors: Mapping[str, gs.Tensor]) -> None:
    _check_item(edge, nodes)
    if edge.range not in tensors:
        raise _unfit(f"the model has no tensor '{edge.range}'")
    if isinstance(tensors[edge.range], gs.Constant):
        raise _unfit(f"'{edge.range}', whose range '{edge.tensor}' is to take, is a constant")
    _check_float(tensors[edge.range])


def _check_weight(weight: Weight, nodes: Mapping[str, gs.Node], graph: gs.Graph) -> None:
    tensor, node = _check_item(weight, nodes), nodes[weight.node]
    if not 0 <= weight.axis < len(tensor.shape):
        raise _unfit(f"'{weight.tensor}' has no axis {weight.axis}")
    if product(node) is None or weight.index > 1 or unquantizable(node, graph):
        raise _unfit(f"'{weight.tensor}' is not a weight of an INT8 product: '{node.name}' is a {node.op}")
    if weight.axis != (axis := output_axis(node, weight.index)):
        raise _unfit(
            f"axis {weight.axis} of '{weight.tensor}' is not the output channels of '{node.name}'",
            f"set its 'axis' to {axis}: only scales of a {node.op}'s output channels factor out",
        )


def _check_quantizers(plan: Plan, nodes: Mapping[str, gs.Node]) -> None:
    """INT8 nodes have both quantizers; nodes that have both are INT8, or were until somebody edited it."""
    items: list[Edge | Weight] = [*plan.edges, *plan.weights]
    quantized = {(item.node, item.index) for item in items}
    for name in plan.int8_nodes:
        for index in range(2):
            if (name, index) not in quantized:
                raise _unfit(f"'{name}' is to be INT8, but its input {index} has no quantizer")
    meant = {node.name for node in plan.nodes if node.int8 or node.rule == "weighted"}
    for name in dict.fromkeys(item.node for item in items):
        whole = (name, 0) in quantized and (name, 1) in quantized
        if product(nodes[name]) is not None and whole and name not in meant:
            raise _unfit(
                f"'{name}' has both quantizers, so it would run in INT8, but is not INT8 among its nodes",
                "take its edges and weights out of the plan, or list it with 'int8' true",
            )


def _unfit(cause: str, remedy: str = _LEAVE_OUT) -> InputError:
    return InputError("the plan does not fit the model", cause=cause, remedy=remedy)
