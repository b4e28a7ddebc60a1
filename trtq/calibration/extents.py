"""How far the values of every tensor of a model reach: what float16 can hold of them.

One pass over a few rows. The figures are computed inside the model, next to the tensors themselves, so
nothing but scalars leaves it and memory stays that of a plain run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.data.batches import Arrays, Batch
from trtq.data.samples import Samples
from trtq.graph.half_rules import Extent, reads_singular
from trtq.graph.names import Names
from trtq.simulation.rows import Runner

MOST_ROWS = 32
"""Rows that are looked at, evenly spread over the data; the rules leave headroom for all others."""

_HIGHEST = float(np.finfo(np.float32).max)


class _Figures(NamedTuple):
    """Names of the outputs that hold a tensor's figures."""

    high: str
    low: str
    energy: str
    size: str
    smallest: str


def measure_extents(graph: gs.Graph, samples: Samples, *, workers: int | None = None) -> dict[str, Extent]:
    """Tensor -> its extent over an evenly spread part of the samples, of each float32 tensor that a node of
    the graph makes, and of each float32 input.

    Args:
        graph: folded; is not changed.
        workers: rows run at once; default: one for each processor.

    Raises:
        InputError: the model does not run on the data.
    """
    probed, figures = _probed(graph)
    names = [name for of_tensor in figures.values() for name in of_tensor]

    def look(_: Batch, found: Arrays) -> NDArray[np.float64]:
        return np.array([found[name] for name in names], np.float64).reshape(len(figures), -1)

    if not figures:  # a model in half
        return {}
    part = samples.spread(MOST_ROWS)
    rows = np.stack(list(Runner(probed).over(part, part.batches(), look, workers=workers)))
    return {name: _joined(rows[:, index]) for index, name in enumerate(figures)}


def _joined(rows: NDArray[np.float64]) -> Extent:
    """The extent of all rows from the figures of each, shape (rows, figures)."""
    high, low, energy, size, smallest = rows.T
    return Extent(
        low=float(low.min()),
        high=float(high.max()),
        smallest=float(smallest.min()),
        energy=float(energy.sum()),
        count=float(size.sum()),
    )


def _probed(graph: gs.Graph) -> tuple[gs.Graph, Mapping[str, _Figures]]:
    """A copy of the graph that has the figures of its float32 tensors as its outputs."""
    probed = graph.copy()
    made = [tensor for node in probed.nodes for tensor in node.outputs if tensor.name]
    tensors = [t for t in [*probed.inputs, *made] if t.dtype == np.float32]
    probe = _Probe(probed)
    figures = {tensor.name: probe.of(tensor) for tensor in tensors}
    probed.outputs = probe.outputs
    return probed.toposort(), figures


class _Probe:
    """Adds nodes that compute a tensor's figures, all scalars."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph, self._names = graph, Names(graph)
        self._zero = gs.Constant(self._names.tensor("probe/zero"), np.zeros((), np.float32))
        self._highest = gs.Constant(self._names.tensor("probe/highest"), np.array(_HIGHEST, np.float32))
        self.outputs: list[gs.Variable] = []

    def of(self, tensor: gs.Tensor) -> _Figures:
        """The figures of a tensor; its smallest magnitude that is not zero only where a rule looks at it."""
        searched = any(reads_singular(node, tensor) for node in tensor.outputs)
        size = self._node("Size", [tensor], dtype=np.int64)
        found = [
            self._node("ReduceMax", [tensor], {"keepdims": 0}),
            self._node("ReduceMin", [tensor], {"keepdims": 0}),
            self._node("ReduceSumSquare", [tensor], {"keepdims": 0}),
            self._node("Cast", [size], {"to": onnx.TensorProto.FLOAT}),
            self._smallest(tensor) if searched else self._node("Identity", [self._highest]),
        ]
        self.outputs += found
        return _Figures(*(output.name for output in found))

    def _smallest(self, tensor: gs.Tensor) -> gs.Variable:
        magnitude = self._node("Abs", [tensor])
        is_zero = self._node("Equal", [magnitude, self._zero], dtype=np.bool_)
        nonzero = self._node("Where", [is_zero, self._highest, magnitude])
        return self._node("ReduceMin", [nonzero], {"keepdims": 0})

    def _node(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        attributes: Mapping[str, int] | None = None,
        dtype: type = np.float32,
    ) -> gs.Variable:
        output = gs.Variable(self._names.tensor(f"{inputs[0].name}/{op}"), dtype)
        name = self._names.node(output.name)
        self._graph.nodes.append(gs.Node(op, name, dict(attributes or {}), list(inputs), [output]))
        return output
