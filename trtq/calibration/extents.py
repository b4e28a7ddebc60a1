"""How far the values of every tensor of a model reach: what float16 can hold of them.

One pass over a few rows. The figures are computed inside the model, next to the tensors themselves, so
nothing but scalars leaves it and memory stays that of a plain run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.data.batches import Arrays, Batch
from trtq.data.samples import Samples
from trtq.graph.foreign import View
from trtq.graph.half_rules import Extent, reads_singular
from trtq.graph.names import Names
from trtq.simulation.rows import Runner

MOST_ROWS = 32
"""Rows that the rules of half look at, evenly spread over the data; they leave headroom for all others."""

_JOINED = 512
"""Figures that are joined by one node."""

_HIGHEST = float(np.finfo(np.float32).max)

_JOINS = {
    "highest": np.maximum,
    "lowest": np.minimum,
    "energy": np.add,
    "size": np.add,
    "smallest": np.minimum,
}
"""How each of `_Probe.outputs` of some rows joins that of others."""


def measure_extents(
    graph: gs.Graph, samples: Samples, *, rows: int = MOST_ROWS, workers: int | None = None
) -> dict[str, Extent]:
    """Tensor -> its extent over an evenly spread part of the samples, of each float32 tensor that a node of
    the graph makes, and of each float32 input.

    Args:
        graph: folded; is not changed.
        rows: about how many are looked at.
        workers: rows run at once; default: one for each processor.

    Raises:
        InputError: the model does not run on the data.
    """
    tensors, searched = _looked_at(graph)
    if not tensors:  # a model that is all in float16
        return {}
    probe = _Probe(Names(graph), tensors, searched)

    def look(_: Batch, found: Arrays) -> dict[str, NDArray[np.float64]]:
        return {kind: np.asarray(found[name], np.float64) for kind, name in probe.outputs.items()}

    part = samples.spread(rows)
    runner = Runner(graph, list(probe.outputs.values()), edit=probe.add_to)
    total: dict[str, NDArray[np.float64]] = {}
    for found in runner.over(part, part.batches(), look, workers=workers):
        total = {kind: _JOINS[kind](total[kind], new) if total else new for kind, new in found.items()}
    high, low, energy, count = (total[kind].tolist() for kind in ("highest", "lowest", "energy", "size"))
    smallest = total["smallest"].tolist() if searched else []
    least = dict(zip(searched, smallest, strict=True))
    return {
        name: Extent(low[i], high[i], least.get(name, _HIGHEST), energy[i], count[i])
        for i, name in enumerate(tensors)
    }


def _looked_at(graph: gs.Graph) -> tuple[list[str], list[str]]:
    """The graph's float32 tensors that can be computed, and those of them whose smallest magnitude counts."""
    made = [tensor for node in graph.nodes for tensor in node.outputs if tensor.name]
    hidden = View.of(graph).hidden
    tensors = [t for t in [*graph.inputs, *made] if t.dtype == np.float32 and t.name not in hidden]
    searched = [t for t in tensors if any(reads_singular(node, t) for node in t.outputs)]
    return [tensor.name for tensor in tensors], [tensor.name for tensor in searched]


class _Probe:
    """Nodes that compute figures of tensors, all scalars, and join them.

    Attributes:
        outputs: figure -> name of the vector that has it of every tensor; the smallest magnitude that is not
            zero, it has of those that are searched.
    """

    def __init__(self, names: Names, tensors: Sequence[str], searched: Sequence[str]) -> None:
        self._names, self._tensors, self._searched = names, tensors, searched
        kinds = [kind for kind in _JOINS if searched or kind != "smallest"]
        self.outputs = {kind: names.tensor(f"probe/{kind}") for kind in kinds}

    def add_to(self, graph: onnx.GraphProto) -> None:
        """Add the nodes to a graph, in place."""
        self._graph = graph
        zero, highest = (self._names.tensor(f"probe/{kind}") for kind in ("zero", "most"))
        for name, value in ((zero, 0.0), (highest, _HIGHEST)):
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.float32), name))
        reduced = {"highest": "ReduceMax", "lowest": "ReduceMin", "energy": "ReduceSumSquare"}
        for kind, op in reduced.items():
            self._join(kind, [self._node(op, [tensor], keepdims=0) for tensor in self._tensors])
        self._join("size", [self._node("Size", [tensor]) for tensor in self._tensors])
        if self._searched:
            self._join("smallest", [self._smallest(tensor, zero, highest) for tensor in self._searched])

    def _smallest(self, tensor: str, zero: str, highest: str) -> str:
        """The smallest magnitude of a tensor that is not zero."""
        magnitude = self._node("Abs", [tensor])
        is_zero = self._node("Equal", [magnitude, zero])
        return self._node("ReduceMin", [self._node("Where", [is_zero, highest, magnitude])], keepdims=0)

    def _join(self, kind: str, scalars: Sequence[str]) -> None:
        """One vector of scalars in place of an output for each.

        They are joined in parts: ONNX Runtime's time for a node grows with the square of its inputs.
        """
        parts = [scalars[first : first + _JOINED] for first in range(0, len(scalars), _JOINED)]
        self._node("Concat", [self._vector(part) for part in parts], self.outputs[kind], axis=0)

    def _vector(self, scalars: Sequence[str]) -> str:
        sequence = self._node("SequenceConstruct", scalars)
        return self._node("ConcatFromSequence", [sequence], axis=0, new_axis=1)

    def _node(self, op: str, inputs: Sequence[str], output: str | None = None, **attributes: int) -> str:
        output = output or self._names.tensor(f"{inputs[0]}/{op}")
        node = self._graph.node.add(op_type=op, name=self._names.node(output), input=inputs, output=[output])
        for name, value in attributes.items():
            node.attribute.add(name=name, type=onnx.AttributeProto.INT, i=value)
        return output
