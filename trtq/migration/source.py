"""The fp32 model that a calibration table belongs to, and which of its tensors a row stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import onnx_graphsurgeon as gs

from trtq.calibration.collect import collect
from trtq.calibration.table import Table
from trtq.data.feeding import NO_FEEDING, Feeding
from trtq.data.samples import Samples
from trtq.files import PathLike
from trtq.graph.fixed import with_fixed
from trtq.graph.fold import fold
from trtq.graph.model import FP16_SCALE_OPSET, LOWEST_OPSET, Model, load_model
from trtq.graph.place import FLOATS, MOVING_OPS, only_moved
from trtq.graph.surgery import copied

OBSERVED_SAMPLES = 16
"""Samples that are run to tell scales from other readings of a table."""

_SAME_VALUES = MOVING_OPS - {"Gather", "MaxPool", "Slice", "Split"} | {"Cast", "Dropout"}
"""Operators whose output has all the values of their input, so that its row is the input's as well."""

_BOUNDS = {"Sigmoid": 1.0, "HardSigmoid": 1.0, "Softmax": 1.0, "Tanh": 1.0}


@dataclass(frozen=True)
class Source:
    """An fp32 model for a table.

    Attributes:
        model: folded.
        original: the graph as the table's TensorRT saw it, before folding.
    """

    model: Model
    original: gs.Graph

    @cached_property
    def _tensors(self) -> dict[str, gs.Tensor]:
        return {**self.model.graph.tensors(), **self.original.tensors()}

    def row(self, tensor: str, table: Table) -> str | None:
        """The row that gives `tensor` its scale: its own, that of a tensor with the same values (reshaped,
        transposed, padded with zeros, ...), or that of one it takes all its values from; the nearest first.
        """
        if tensor not in self._tensors:  # made by a pass; it stands for nothing in the original
            return None
        nearby = (*self._same(self._tensors[tensor]), *self._origins(self._tensors[tensor]))
        return next((t.name for t in nearby if t.name in table.scales), None)

    def holds(self, name: str) -> bool:
        """Whether the model has a tensor of this name."""
        return name in self._tensors

    def bounds(self) -> dict[str, float]:
        """Tensors whose largest magnitude the operator in front of them limits -> that limit."""
        found = {}
        for node in self.model.graph.nodes:
            limit = _BOUNDS.get(node.op)
            if node.op == "Clip":
                limit = _clip_bound(node)
            if limit:
                found[node.outputs[0].name] = limit
        return found

    @staticmethod
    def _same(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
        """`tensor` and those behind it that have all of its values and no others but zero."""
        waiting = [tensor]
        while waiting:
            yield (current := waiting.pop(0))
            for node in current.outputs:
                keeps = node.op in _SAME_VALUES and node.inputs[0] is current
                if keeps and (node.op in ("Cast", "Dropout") or only_moved(node.outputs[0])):
                    waiting.append(node.outputs[0])

    @staticmethod
    def _origins(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
        """The tensors in front of `tensor` that hold all of its values, perhaps with others."""
        while tensor.inputs and (tensor.inputs[0].op in ("Cast", "Dropout") or only_moved(tensor)):
            tensor = tensor.inputs[0].inputs[0]
            yield tensor


def load_source(path: PathLike, *, rest: str = "fp32", feeding: Feeding = NO_FEEDING) -> Source:
    """The fp32 model that a table belongs to, before and after folding.

    Args:
        feeding: its inputs of a fixed value are constants.

    Raises:
        InputError: as `load_model`, or a value does not suit its input.
    """
    model = load_model(path, opset=FP16_SCALE_OPSET if rest == "fp16" else LOWEST_OPSET)
    model = with_fixed(model, feeding.constants(model.inputs))
    original = copied(model.graph)
    fold(model.graph)
    return Source(model, original)


def observe(source: Source, table: Table, samples: Samples) -> dict[str, float]:
    """Row -> largest magnitude of its tensor on a few samples, for rows whose tensors are still there.

    Raises:
        InputError: the model does not run on the samples.
    """
    tensors = source.model.graph.tensors()
    rows = [
        name for name in table.scales if isinstance(t := tensors.get(name), gs.Variable) and t.dtype in FLOATS
    ]
    some = samples.subset(range(min(OBSERVED_SAMPLES, len(samples) // samples.group)))
    return {name: h.amax for name, h in collect(source.model.graph, rows, some).histograms.items()}


def _clip_bound(node: gs.Node) -> float | None:
    """Largest magnitude of a Clip with two constant limits."""
    limits = node.inputs[1:3]
    if len(limits) < 2 or not all(isinstance(t, gs.Constant) for t in limits):
        return None
    return max(abs(float(t.values)) for t in limits)
