"""What passes that change an activation channel by channel share: statistics per channel, and constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.data.batches import Arrays, Batch
from trtq.data.samples import Samples
from trtq.graph.names import Names
from trtq.graph.plan import Plan
from trtq.simulation.rows import Runner

Vector = NDArray[np.float64]
"""Of each channel."""

MOST_ROWS = 32
"""Rows whose channels are looked at, evenly spread over the data."""

MOST_POSITIONS = 1024
"""Positions of a tensor (pixels, tokens) that are kept, evenly spread over the rows."""


class Changed(NamedTuple):
    """A float graph whose function is as before, the tensors whose values are not, and its plan."""

    graph: gs.Graph
    tensors: frozenset[str]
    plan: Plan


@dataclass(frozen=True)
class Channels:
    """An activation over some rows, channel by channel.

    Attributes:
        low, high: float32 (channels,); the smallest and largest value of each.
        values: float32 (positions, channels); evenly spread.
    """

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    values: NDArray[np.float32]

    @property
    def amax(self) -> NDArray[np.float32]:
        """Largest magnitude of each channel."""
        return np.maximum(-self.low, self.high)

    @property
    def power(self) -> Vector:
        """Mean square of each channel."""
        return np.square(self.values, dtype=np.float64).mean(axis=0)


def collect_channels(
    graph: gs.Graph,
    axes: Mapping[str, int],
    samples: Samples,
    workers: int | None = None,
    rows: int = MOST_ROWS,
) -> dict[str, Channels]:
    """Tensor -> its channels over an evenly spread part of the samples.

    Args:
        graph: is not changed.
        axes: tensor -> axis of its channels; a tensor that the graph computes.
        workers: rows run at once; default: one for each processor.
        rows: about how many are looked at.
    """
    samples = samples.spread(rows)
    part = list(samples.batches())
    each = max(MOST_POSITIONS // len(part), 1)

    def look(_: Batch, found: Arrays) -> list[Channels]:
        return [_channels(found[name], axis, each) for name, axis in axes.items()]

    looked = Runner(graph, list(axes)).over(samples, part, look, workers=workers)
    parts = list(zip(*looked, strict=True))
    return {name: _joined(parts_of) for name, parts_of in zip(axes, parts, strict=True)}


def _channels(values: NDArray, axis: int, each: int) -> Channels:
    matrix = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis]).astype(np.float32, copy=False)
    kept = np.linspace(0, len(matrix) - 1, min(each, len(matrix))).astype(np.int64)
    return Channels(matrix.min(axis=0), matrix.max(axis=0), matrix[kept])


def _joined(parts: Sequence[Channels]) -> Channels:
    return Channels(
        np.min([part.low for part in parts], axis=0),
        np.max([part.high for part in parts], axis=0),
        np.concatenate([part.values for part in parts]),
    )


# --- constants that scale or shift channels ------------------------------------------------------


def is_linear(node: gs.Node) -> bool:
    """Whether a node multiplies its first input by a constant that no other node reads, and adds a bias."""
    if node.op not in ("Conv", "Gemm", "MatMul") or not isinstance(node.inputs[1], gs.Constant):
        return False
    attributes, rank = node.attrs, len(node.inputs[1].shape)
    if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1 or attributes.get("beta", 1.0) != 1:
        return False
    return len(node.inputs[1].outputs) == 1 and (node.op != "MatMul" or rank == 2)


def channel_axis(node: gs.Node) -> int:
    """The axis of a linear node's (or a normalization's) activations that holds the channels."""
    return 1 if node.op == "Conv" else -1


def weight_matrix(node: gs.Node, weight: NDArray | None = None) -> NDArray[np.float64]:
    """A linear node's weights, or others in their place, as (groups, outputs / groups, inputs / groups,
    kernel), in float64."""
    weight = (node.inputs[1].values if weight is None else weight).astype(np.float64)
    if node.op == "Conv":
        groups = node.attrs.get("group", 1)
        return weight.reshape(groups, -1, weight.shape[1], int(np.prod(weight.shape[2:], dtype=int)))
    return (weight if node.attrs.get("transB", 0) else weight.T)[None, :, :, None]


def behind(node: gs.Node, vector: Vector, weight: NDArray | None = None) -> Vector:
    """What a linear node without a bias, by its weights or others, makes of an input that is the same at
    every position, (outputs,) from (inputs,); at its borders only if it does not pad."""
    matrix = weight_matrix(node, weight).sum(axis=3)
    product: Vector = matrix @ vector.reshape(len(matrix), -1, 1)
    return product.reshape(-1)


def padding(node: gs.Node) -> tuple[int, ...] | None:
    """The zeros that a linear node adds around its input, as ONNX's `pads`, () for none; None where the
    input's size decides."""
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    pads = tuple(node.attrs.get("pads", ()))
    return pads if any(pads) else ()


@dataclass(frozen=True)
class Bias:
    """The constant, one value per channel of the last axis of it, that a node adds: input `index` of `node`.

    Attributes:
        size: channels.
        axis: where the tensor that it is added to has them.
    """

    node: gs.Node
    index: int
    size: int
    axis: int

    def make(self, names: Names) -> None:
        """Add a constant of zeros where there is none yet."""
        if len(self.node.inputs) <= self.index:
            zeros = np.zeros(self.size, np.float32)
            self.node.inputs.append(gs.Constant(names.tensor(f"{self.node.name}/bias"), zeros))

    @property
    def values(self) -> NDArray[np.float32]:
        """The constant's values."""
        values: NDArray[np.float32] = self.node.inputs[self.index].values
        return values

    def add(self, vector: NDArray[np.float64], names: Names) -> None:
        """Add to the constant."""
        self.make(names)
        set_constant(self.node, self.index, self.values + vector, names)


def bias_of(graph: gs.Graph, node: gs.Node) -> Bias | None:
    """The bias of a linear node or a LayerNormalization; a MatMul's is in the Add behind it."""
    if node.op == "MatMul":
        output = node.outputs[0]
        return added_bias(output.outputs[0]) if private(graph, output) else None
    if node.op == "LayerNormalization":
        size = int(np.prod(node.inputs[1].shape)) if len(node.inputs[1].shape) == 1 else 0
    else:
        size = int(np.prod(weight_matrix(node).shape[:2]))
    present = len(node.inputs) > 2
    if not size or (present and not isinstance(node.inputs[2], gs.Constant)):
        return None
    return Bias(node, 2, size, channel_axis(node))


def added_bias(node: gs.Node) -> Bias | None:
    """The bias that an Add of a vector is."""
    for index, tensor in enumerate(node.inputs):
        if node.op == "Add" and isinstance(tensor, gs.Constant) and len(tensor.shape) == 1:
            return Bias(node, index, tensor.shape[0], -1) if tensor.shape[0] > 1 else None
    return None


def along(vector: NDArray, axis: int, rank: int) -> NDArray:
    """A vector reshaped so that it broadcasts along `axis` of an array of rank `rank`."""
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)


def private(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether one node alone reads the tensor."""
    return len(tensor.outputs) == 1 and tensor not in graph.outputs


def set_constant(node: gs.Node, index: int, values: NDArray, names: Names) -> None:
    """Give input `index` of a node other values; other nodes that read the same constant keep theirs.

    A constant of this node alone keeps its name, as a plan may refer to it.
    """
    old = node.inputs[index]
    values = np.asarray(values, old.values.dtype)
    if len(old.outputs) == 1:
        old.values = values
    else:
        node.inputs[index] = gs.Constant(names.tensor(f"{node.name}/input_{index}"), values)
