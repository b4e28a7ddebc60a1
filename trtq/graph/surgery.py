"""Copying, sorting and cleaning GraphSurgeon graphs of many nodes.

What comes out is what `Graph.copy`, `Graph.toposort` and `Graph.cleanup` make. Those look at every node and
tensor many times and sort by recursion, which a long chain of nodes ends. Graphs with bodies (If, Loop, Scan)
are left to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import TypeVar

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.util.misc import SynchronizedList

Part = TypeVar("Part", gs.Node, gs.Tensor)


def holds_bodies(graph: gs.Graph) -> bool:
    """Whether a node of the graph is an If, Loop or Scan."""
    return any(isinstance(value, gs.Graph) for node in graph.nodes for value in node.attrs.values())


def copied(graph: gs.Graph) -> gs.Graph:
    """A copy of a graph with nodes and tensors of its own; values and attributes are shared."""
    if holds_bodies(graph):
        return graph.copy()
    made = [tensor for node in graph.nodes for tensor in node.outputs]
    read = [tensor for node in graph.nodes for tensor in node.inputs]
    read += graph.outputs
    constants = (tensor for tensor in read if isinstance(tensor, gs.Constant))
    named = {t.name: t for t in chain(read, made, graph.inputs, constants)}  # the last of a name counts
    tensors = {name: _bare(tensor) for name, tensor in named.items() if name}

    def of(around: Iterable[gs.Tensor]) -> list[gs.Tensor]:
        return [tensors[t.name] if t.name else gs.Variable.empty() for t in around]

    nodes = []
    for node in graph.nodes:
        new = _bare(node)
        new.__dict__["attrs"] = type(node.attrs)(node.attrs)
        for tensor in _filled(new.inputs, of(node.inputs)):
            list.append(tensor.outputs, new)
        for tensor in _filled(new.outputs, of(node.outputs)):
            list.append(tensor.inputs, new)
        nodes.append(new)
    return gs.Graph(
        nodes,
        of(graph.inputs),
        of(graph.outputs),
        name=graph.name,
        doc_string=graph.doc_string,
        opset=graph.opset,
        import_domains=graph.import_domains,
        functions=graph.functions,
        ir_version=graph.ir_version,
    )


def in_order(graph: gs.Graph) -> gs.Graph:
    """The graph itself, its nodes sorted by how many nodes lie in front of each, in place.

    Raises:
        OnnxGraphSurgeonException: the graph has a cycle.
    """
    nodes = {id(node): node for node in graph.nodes}
    levels = None if holds_bodies(graph) or graph.functions else _levels(nodes)
    if levels is None:
        return graph.toposort()
    graph.nodes = [nodes[number] for number in sorted(levels, key=levels.__getitem__)]
    return graph


def cleaned(graph: gs.Graph) -> gs.Graph:
    """The graph itself, without the nodes that no output needs, in place. All inputs stay."""
    if holds_bodies(graph) or graph.functions:
        return graph.cleanup()
    for tensor in graph.inputs:
        tensor.inputs.clear()
    nodes = {id(node): node for node in graph.nodes}
    used: set[int] = set()
    waiting = list(graph.outputs)
    while waiting:
        for node in waiting.pop().inputs:
            if id(node) in nodes and id(node) not in used:
                used.add(id(node))
                waiting.extend(tensor for tensor in node.inputs if tensor.inputs)
    for node in graph.nodes:
        if id(node) not in used:
            node.inputs.clear()
            node.outputs.clear()
    graph.nodes = [node for node in graph.nodes if id(node) in used]
    return graph


def _levels(nodes: Mapping[int, gs.Node]) -> dict[int, int] | None:
    """Node, by its `id` -> the most nodes on a path to it; what a node reads comes before it.

    None where there is a cycle.
    """
    levels: dict[int, int] = {}
    begun: set[int] = set()
    for last in nodes.values():
        waiting = [last]
        while waiting:
            node = waiting[-1]
            if id(node) in levels:
                waiting.pop()
                continue
            makers = [m for t in node.inputs if t.name for m in t.inputs if id(m) in nodes]
            missing = [maker for maker in makers if id(maker) not in levels]
            if not missing:
                levels[id(node)] = max((levels[id(maker)] + 1 for maker in makers), default=0)
                waiting.pop()
            elif id(node) in begun:  # it waits for itself
                return None
            else:
                begun.add(id(node))
                waiting.extend(reversed(missing))
    return levels


def _bare(part: Part) -> Part:
    """A copy of a node or a tensor that nothing is connected to."""
    new = object.__new__(type(part))
    new.__dict__.update(part.__dict__)
    for side, other in (("inputs", "outputs"), ("outputs", "inputs")):
        new.__dict__[side] = SynchronizedList(new, other, ())
    if isinstance(part, gs.Constant):
        new.__dict__["data_location"] = None  # where the file had it
    return new


def _filled(side: SynchronizedList, parts: list[gs.Tensor]) -> list[gs.Tensor]:
    list.extend(side, parts)
    return parts
