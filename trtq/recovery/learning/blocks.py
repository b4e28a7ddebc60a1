"""A graph in blocks: parts that a single tensor connects.

Where everything that quantization changes passes through one tensor, a network can be cut: a residual
block, or half of a transformer's layer, is then a part that can be learned on its own, with what the fp32
network has at the cut as the target (block reconstruction, Li et al. 2021).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from trtq.recovery.learning.torch_graph import TorchGraph


@dataclass(frozen=True)
class Block:
    """A part of a graph.

    Attributes:
        nodes: in the order of the graph. What they read is a constant, an input of the model, made by one of
            them, or `source`.
        source: the only output of the block before; None: this one is the first.
        outputs: the tensor in front of the next block, or of the last one those of the model.
    """

    nodes: tuple[gs.Node, ...]
    source: str | None
    outputs: tuple[str, ...]


def in_blocks(graph: TorchGraph, quantized: Collection[str], weighted: Collection[str]) -> list[Block]:
    """A graph in the smallest blocks that have a weighted node each, one behind the other.

    What does not lie behind a quantizer is what it is in fp32, such as an attention mask: every block makes
    what it needs of that anew, and it is in the way of no cut.

    Args:
        quantized: names of the nodes that read something quantized.
        weighted: those of them with quantized weights.
    """
    last = {tensor.name: i for i, node in enumerate(graph.nodes) for tensor in node.inputs}
    last |= dict.fromkeys(graph.outputs, len(graph.nodes))
    changed: set[str] = set()
    live: set[str] = set()
    cuts: list[tuple[int, str]] = []
    newest: tuple[int, str] | None = None
    has_weights = False
    for i, node in enumerate(graph.nodes):
        if node.name in weighted:
            if newest is not None:
                cuts.append(newest)
                newest = None
            has_weights = True
        if node.name in quantized or not changed.isdisjoint(tensor.name for tensor in node.inputs):
            changed |= {tensor.name for tensor in node.outputs}
        made = {tensor.name for tensor in node.outputs} & changed
        live = {name for name in live | made if last.get(name, -1) > i}
        if has_weights and len(live) == 1 and live.isdisjoint(graph.outputs):
            newest = i + 1, next(iter(live))
    ends = [*(end for end, _ in cuts), len(graph.nodes)]
    sources = [None, *(name for _, name in cuts)]
    outputs = [*((name,) for _, name in cuts), tuple(graph.outputs)]
    return [
        Block(_needed(graph.nodes[:end], made, source), source, made)
        for end, source, made in zip(ends, sources, outputs, strict=True)
    ]


def _needed(nodes: Iterable[gs.Node], outputs: Iterable[str], source: str | None) -> tuple[gs.Node, ...]:
    """The nodes that make `outputs` of `source` and of the model's inputs."""
    wanted, found = set(outputs), []
    for node in reversed(list(nodes)):
        made = {tensor.name for tensor in node.outputs}
        if made & wanted and source not in made:
            found.append(node)
            wanted |= {tensor.name for tensor in node.inputs if tensor.name}
    return tuple(reversed(found))
