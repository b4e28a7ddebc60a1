"""How far the values of every tensor of a model reach: what float16 can hold of them, and what a scale needs.

One pass over a few rows, or over all where the largest magnitudes are enough. The figures are computed inside
the model, next to the tensors themselves, so nothing but scalars leaves it and memory stays that of a plain
run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.data.batches import Arrays, Batch
from trtq.data.samples import Samples
from trtq.graph.foreign import View
from trtq.graph.half_rules import Extent, amax_of, reads_singular
from trtq.graph.names import Names
from trtq.simulation.rows import Runner

MOST_ROWS = 32
"""Rows that the rules of half look at, evenly spread over the data; they leave headroom for all others."""

_JOINED = 512
"""Figures that are joined by one node."""

_SMALL = 1 << 12
"""Values of a tensor that is looked at together with others of its shape."""

_FEWEST_ALIKE = 8
"""Tensors of one shape that are worth a copy of their values to need fewer nodes."""

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
    kinds = [kind for kind in _JOINS if searched or kind != "smallest"]
    probe = _Probe(graph, tensors, searched, kinds)
    total = probe.measured(samples.spread(rows), workers)
    if not total:
        return {}
    high, low, energy, count = (total[kind].tolist() for kind in ("highest", "lowest", "energy", "size"))
    least = dict(zip(probe.searched, total["smallest"].tolist() if searched else [], strict=True))
    found_of = {
        name: Extent(low[i], high[i], least.get(name, _HIGHEST), energy[i], count[i])
        for i, name in enumerate(probe.tensors)
    }
    return {tensor.name: found_of[tensor.name] for tensor in tensors}


def measure_reach(
    graph: gs.Graph,
    samples: Samples,
    known: Mapping[str, float] = MappingProxyType({}),
    *,
    workers: int | None = None,
) -> dict[str, float]:
    """`Extent.amax` over all of the samples, of each tensor of `measure_extents`: less to compute of each.

    Args:
        known: that of some tensors, which are not looked at again.

    Raises:
        InputError: the model does not run on the data.
    """
    tensors, _ = _looked_at(graph)
    probe = _Probe(
        graph, [tensor for tensor in tensors if tensor.name not in known], [], ("highest", "lowest")
    )
    total, found = probe.measured(samples, workers), dict(known)
    if total:
        ends = zip(total["lowest"].tolist(), total["highest"].tolist(), strict=True)
        found |= zip(probe.tensors, (amax_of(low, high) for low, high in ends), strict=True)
    return {tensor.name: found[tensor.name] for tensor in tensors}


def _looked_at(graph: gs.Graph) -> tuple[list[gs.Tensor], list[gs.Tensor]]:
    """The graph's float32 tensors that can be computed, and those of them whose smallest magnitude counts."""
    made = [tensor for node in graph.nodes for tensor in node.outputs if tensor.name]
    hidden = View.of(graph).hidden
    tensors = [t for t in [*graph.inputs, *made] if t.dtype == np.float32 and t.name not in hidden]
    searched = [t for t in tensors if any(reads_singular(node, t) for node in t.outputs)]
    return tensors, searched


def _alike(tensors: Sequence[gs.Tensor]) -> list[list[str]]:
    """The tensors in groups: small ones of one shape, up to `_JOINED`, and all others alone.

    Sizes that only a run tells are alike where they have the name of the rows.
    """
    groups: list[list[str]] = []
    shapes: dict[tuple[int | str, ...], list[str]] = {}
    for tensor in tensors:
        shape = tuple(tensor.shape or ())
        inner = shape[1:] if shape and isinstance(shape[0], str) else shape
        if shape and all(isinstance(size, int) and size > 0 for size in inner) and math.prod(inner) <= _SMALL:
            shapes.setdefault(shape, []).append(tensor.name)
        else:
            groups.append([tensor.name])
    for names in shapes.values():
        if len(names) < _FEWEST_ALIKE:
            groups += [[name] for name in names]
        else:
            groups += [names[first : first + _JOINED] for first in range(0, len(names), _JOINED)]
    return groups


class _Probe:
    """Nodes that compute figures of tensors and join them.

    Attributes:
        tensors, searched: in the order of the figures.
        outputs: figure -> name of the vector that has it of every tensor; the smallest magnitude that is not
            zero, it has of those that are searched.

    Args:
        graph: folded; is not changed.
        searched: the tensors whose smallest magnitude counts.
        kinds: the figures, of `_JOINS`.
    """

    def __init__(
        self,
        graph: gs.Graph,
        tensors: Sequence[gs.Tensor],
        searched: Sequence[gs.Tensor],
        kinds: Sequence[str],
    ) -> None:
        self._source, self._names = graph, Names(graph)
        self.searched = [tensor.name for tensor in searched]
        self._groups = sorted(_alike(tensors), key=lambda group: len(group) > 1)
        self.tensors = [name for group in self._groups for name in group]
        self.outputs = {kind: self._names.tensor(f"probe/{kind}") for kind in kinds}

    def measured(self, samples: Samples, workers: int | None) -> dict[str, NDArray[np.float64]]:
        """Each figure of every tensor, over all of the samples; empty where there is no tensor, as in a model
        that is all in float16."""

        def look(_: Batch, found: Arrays) -> dict[str, NDArray[np.float64]]:
            return {kind: np.asarray(found[name], np.float64) for kind, name in self.outputs.items()}

        total: dict[str, NDArray[np.float64]] = {}
        if not self.tensors:
            return total
        runner = Runner(self._source, list(self.outputs.values()), edit=self._add_to)
        for found in runner.over(samples, samples.batches(), look, workers=workers):
            total = {kind: _JOINS[kind](total[kind], new) if total else new for kind, new in found.items()}
        return total

    def _add_to(self, graph: onnx.GraphProto) -> None:
        """Add the nodes to a graph, in place."""
        self._graph = graph
        alone = [group[0] for group in self._groups if len(group) == 1]
        stacks = [self._stacked(group) for group in self._groups if len(group) > 1]
        reduced = {"highest": "ReduceMax", "lowest": "ReduceMin", "energy": "ReduceSumSquare"}
        for kind, op in reduced.items():
            if kind not in self.outputs:
                continue
            scalars = [self._node(op, [tensor], keepdims=0) for tensor in alone]
            self._join(kind, scalars, [self._by_row(op, stack) for stack in stacks])
        if "size" in self.outputs:
            alike = [
                [self._node("Size", [group[0]])] * len(group) for group in self._groups if len(group) > 1
            ]
            sizes = [self._node("Size", [tensor]) for tensor in alone]
            self._join("size", sizes, [self._vector(part) for part in alike])
        if "smallest" in self.outputs:
            zero, most = self._constant("zero", np.float32(0)), self._constant("most", np.float32(_HIGHEST))
            self._join("smallest", [self._smallest(tensor, zero, most) for tensor in self.searched], [])

    def _stacked(self, group: Sequence[str]) -> str:
        """The values of tensors of one shape, a row of a matrix each."""
        shape = self._constant("rows", np.array([len(group), -1]))
        return self._node("Reshape", [self._vector(group), shape])

    def _by_row(self, op: str, matrix: str) -> str:
        """A figure of each row."""
        if self._source.opset >= 18:
            return self._node(op, [matrix, self._constant("axis", np.array([1]))], keepdims=0)
        return self._node(op, [matrix], keepdims=0, axes=[1])

    def _constant(self, name: str, value: np.ndarray | np.generic) -> str:
        name = self._names.tensor(f"probe/{name}")
        self._graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def _smallest(self, tensor: str, zero: str, highest: str) -> str:
        """The smallest magnitude of a tensor that is not zero."""
        magnitude = self._node("Abs", [tensor])
        is_zero = self._node("Equal", [magnitude, zero])
        return self._node("ReduceMin", [self._node("Where", [is_zero, highest, magnitude])], keepdims=0)

    def _join(self, kind: str, scalars: Sequence[str], vectors: Sequence[str]) -> None:
        """One vector of scalars, and of what is in vectors already, in place of an output for each.

        They are joined in parts: ONNX Runtime's time for a node grows with the square of its inputs.
        """
        parts = [scalars[first : first + _JOINED] for first in range(0, len(scalars), _JOINED)]
        self._node("Concat", [*map(self._vector, parts), *vectors], self.outputs[kind], axis=0)

    def _vector(self, scalars: Sequence[str]) -> str:
        sequence = self._node("SequenceConstruct", scalars)
        return self._node("ConcatFromSequence", [sequence], axis=0, new_axis=1)

    def _node(self, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        output = output or self._names.tensor(f"{inputs[0]}/{op}")
        node = self._graph.node.add(op_type=op, name=self._names.node(output), input=inputs, output=[output])
        for name, value in attributes.items():
            node.attribute.append(onnx.helper.make_attribute(name, value))
        return output
