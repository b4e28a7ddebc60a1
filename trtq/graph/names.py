"""Names for what a pass adds to a graph: unused ones, so that they never clash with the model's."""

from __future__ import annotations

import onnx_graphsurgeon as gs


class Names:
    """Gives names that nothing has yet, and none of them twice.

    All tensors (inputs, outputs and constants, too) are one namespace and all nodes another. The bodies of
    If, Loop and Scan count: they see the tensors around them.

    Args:
        graphs: what has names already; tensors that are added to them later by other means are not seen.
    """

    def __init__(self, *graphs: gs.Graph) -> None:
        bodies = [body for graph in graphs for body in (graph, *graph.subgraphs(recursive=True))]
        nodes = [node for body in bodies for node in body.nodes]
        tensors = {tensor.name for node in nodes for tensor in (*node.inputs, *node.outputs)}
        tensors |= {tensor.name for body in bodies for tensor in (*body.inputs, *body.outputs)}
        self._nodes = dict.fromkeys((node.name for node in nodes), 0)
        self._tensors = dict.fromkeys(tensors, 0)

    def tensor(self, wish: str) -> str:
        """The wanted name for a tensor if it is free, else the name with a number appended."""
        return _take(wish, self._tensors)

    def node(self, wish: str) -> str:
        """The same for a node."""
        return _take(wish, self._nodes)


def _take(wish: str, taken: dict[str, int]) -> str:
    """The first name that is free; `taken` holds the last number that was tried behind each."""
    name, suffix = wish, taken.get(wish, 0)
    while name in taken:
        suffix += 1
        name = f"{wish}_{suffix}"
    taken[wish] = suffix
    taken.setdefault(name, 0)
    return name
