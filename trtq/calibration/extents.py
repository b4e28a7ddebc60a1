"""How far the values of every tensor of a model reach: what float16 can hold of them.

One pass over a few rows. The figures are computed inside the model, next to the tensors themselves, so
nothing but scalars leaves it and memory stays that of a plain run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

FIGURES = 4
"""Of a tensor: highest, lowest, energy and size (see `_Probe.of`)."""

_JOINED = 512
"""Figures that are joined by one node."""

_HIGHEST = float(np.finfo(np.float32).max)


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
    probed, tensors, searched = _probed(graph)
    if not tensors:  # a model that is all in float16
        return {}
    (output,) = probed.outputs

    def look(_: Batch, found: Arrays) -> NDArray[np.float64]:
        return np.asarray(found[output.name], np.float64).reshape(-1)

    part, split = samples.spread(rows), len(tensors) * FIGURES
    total: NDArray[np.float64] | None = None
    for found in Runner(probed).over(part, part.batches(), look, workers=workers):
        total = found if total is None else _joined(total, found, split)
    assert total is not None
    least = dict(zip(searched, total[split:].tolist(), strict=True))
    figures = total[:split].reshape(-1, FIGURES).tolist()
    return {
        name: Extent(low, high, least.get(name, _HIGHEST), energy, count)
        for name, (high, low, energy, count) in zip(tensors, figures, strict=True)
    }


def _joined(one: NDArray[np.float64], other: NDArray[np.float64], split: int) -> NDArray[np.float64]:
    """The figures of all rows from those of some and of others; smallest magnitudes from `split` on."""
    made = one + other  # energies and sizes add up
    made[:split:FIGURES] = np.maximum(one[:split:FIGURES], other[:split:FIGURES])
    made[1:split:FIGURES] = np.minimum(one[1:split:FIGURES], other[1:split:FIGURES])
    made[split:] = np.minimum(one[split:], other[split:])
    return made


def _probed(graph: gs.Graph) -> tuple[gs.Graph, list[str], list[str]]:
    """A copy of the graph whose output is one vector, the figures of its float32 tensors and behind them the
    smallest magnitudes of some; the names of all of them, and of those."""
    probed = graph.copy()
    made = [tensor for node in probed.nodes for tensor in node.outputs if tensor.name]
    hidden = View.of(graph).hidden
    tensors = [t for t in [*probed.inputs, *made] if t.dtype == np.float32 and t.name not in hidden]
    searched = [t for t in tensors if any(reads_singular(node, t) for node in t.outputs)]
    probe = _Probe(probed)
    figures = [figure for tensor in tensors for figure in probe.of(tensor)]
    figures += map(probe.smallest, searched)
    probed.outputs = [probe.joined(figures)] if figures else []
    return probed.toposort(), [tensor.name for tensor in tensors], [tensor.name for tensor in searched]


class _Probe:
    """Adds nodes that compute a tensor's figures, all scalars."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph, self._names = graph, Names(graph)
        self._zero = gs.Constant(self._names.tensor("probe/zero"), np.zeros((), np.float32))
        self._highest = gs.Constant(self._names.tensor("probe/highest"), np.array(_HIGHEST, np.float32))

    def of(self, tensor: gs.Tensor) -> list[gs.Tensor]:
        """The figures of a tensor: highest, lowest, energy and size."""
        size = self._node("Size", [tensor], dtype=np.int64)
        return [
            self._node("ReduceMax", [tensor], {"keepdims": 0}),
            self._node("ReduceMin", [tensor], {"keepdims": 0}),
            self._node("ReduceSumSquare", [tensor], {"keepdims": 0}),
            self._node("Cast", [size], {"to": onnx.TensorProto.FLOAT}),
        ]

    def joined(self, figures: Sequence[gs.Tensor]) -> gs.Variable:
        """One vector of figures in place of an output for each.

        They are joined in parts: ONNX Runtime's time for a node grows with the square of its inputs.
        """
        parts = [figures[first : first + _JOINED] for first in range(0, len(figures), _JOINED)]
        return self._node("Concat", [self._vector(part) for part in parts], {"axis": 0})

    def _vector(self, figures: Sequence[gs.Tensor]) -> gs.Variable:
        sequence = self._node("SequenceConstruct", figures, dtype=None)
        return self._node("ConcatFromSequence", [sequence], {"axis": 0, "new_axis": 1})

    def smallest(self, tensor: gs.Tensor) -> gs.Variable:
        """The smallest magnitude of a tensor that is not zero."""
        magnitude = self._node("Abs", [tensor])
        is_zero = self._node("Equal", [magnitude, self._zero], dtype=np.bool_)
        nonzero = self._node("Where", [is_zero, self._highest, magnitude])
        return self._node("ReduceMin", [nonzero], {"keepdims": 0})

    def _node(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        attributes: Mapping[str, int] | None = None,
        dtype: type | None = np.float32,
    ) -> gs.Variable:
        output = gs.Variable(self._names.tensor(f"{inputs[0].name}/{op}"), dtype)
        name = self._names.node(output.name)
        self._graph.nodes.append(gs.Node(op, name, dict(attributes or {}), list(inputs), [output]))
        return output
