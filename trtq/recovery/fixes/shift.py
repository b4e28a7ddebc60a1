"""Channel-wise shifting: centre what is quantized symmetrically, at no cost (Wei et al. 2023, "Outlier
Suppression+").

INT8 activations have zero-point 0, so a channel that lies to one side of zero wastes half of the codes, and
if it is the largest, half of every channel's. A constant per channel can leave an activation through the bias
(or LayerNorm's beta) that makes it and come back through the biases of what reads it:

    y = x + b          y' = x + (b - d)
    z = W·y + c        z  = W·y' + (c + W·d)

A residual addition that reads y gives d back through the bias of its other operand. That is what makes it
work in post-LayerNorm transformers, where no scale can be folded. What a Clip with constant bounds makes is
shifted with its bounds. Where a reader pads with zeros, the shift is not exact, and nothing is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from trtq.calibration.refine import LEAST_SHARE
from trtq.data.samples import Samples
from trtq.graph.names import Names
from trtq.graph.place import readers
from trtq.graph.plan import Plan
from trtq.recovery.fixes.channels import (
    Bias,
    Changed,
    Vector,
    added_bias,
    behind,
    bias_of,
    channel_axis,
    collect_channels,
    is_linear,
    padding,
    private,
    set_constant,
    weight_matrix,
)


@dataclass(frozen=True)
class _Change:
    """What is added to a bias for a shift of the tensor by d, and the tensors that are other ones then."""

    bias: Bias
    amount: Callable[[Vector], Vector]
    tensors: set[str]


@dataclass(frozen=True)
class _Move:
    """All that must change for a tensor to be shifted, and the Clip that makes it, if one does."""

    changes: list[_Change]
    clip: gs.Node | None

    @property
    def axis(self) -> int:
        return self.changes[0].bias.axis


def shift(
    graph: gs.Graph,
    plan: Plan,
    samples: Samples,
    *,
    workers: int | None = None,
    shares: Mapping[str, float] | None = None,
) -> Changed | None:
    """A copy of the graph whose quantized activations are centred channel by channel, where that is free.

    It computes the same outputs up to rounding, and names are unchanged; the ranges of the tensors that
    changed must be measured again. None where nothing can be shifted.

    Args:
        graph: folded, float32; is not changed.
        plan: of that graph.
        samples: the middle of each channel's range is measured on an evenly spread part of them.
        workers: rows run at once; default: one for each processor.
        shares: tensor -> its part of the outputs' noise; where what can be shifted makes too little of it to
            gain 0.1 dB, nothing is.
    """
    graph, names = graph.copy(), Names(graph)
    tensors = graph.tensors()
    moves = {name: move for name in plan.tensors if (move := _move(graph, tensors[name])) is not None}
    changed = set[str]().union(*(change.tensors for move in moves.values() for change in move.changes))
    if not moves or (shares is not None and sum(shares.get(t, 0.0) for t in changed) < LEAST_SHARE):
        return None
    channels = collect_channels(graph, {name: move.axis for name, move in moves.items()}, samples, workers)
    for name, move in moves.items():
        low, high = (bound.astype(np.float64) for bound in (channels[name].low, channels[name].high))
        middle = (low + high) / 2
        if move.clip is not None:
            middle[:] = (low.min() + high.max()) / 2
            for index in (1, 2):
                set_constant(move.clip, index, move.clip.inputs[index].values - middle[0], names)
        for change in move.changes:
            change.bias.add(change.amount(middle), names)
    return Changed(graph, frozenset(changed), plan)


def _move(graph: gs.Graph, tensor: gs.Tensor) -> _Move | None:
    clip = _clip(graph, tensor)
    made = _maker(graph, tensor if clip is None else clip.inputs[0])
    if made is None or tensor in graph.outputs:
        return None
    changes = [_Change(made, lambda d: -d, _between(made, tensor))]
    for node in readers(tensor):
        change = _given_back(graph, tensor, node, made)
        if change is None:
            return None
        changes.append(change)
    return _Move(changes, clip)


def _clip(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The Clip with constant bounds that makes the tensor."""
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.op != "Clip" or not private(graph, node.inputs[0]):
        return None
    bounds = node.inputs[1:]
    return node if len(bounds) == 2 and all(isinstance(t, gs.Constant) for t in bounds) else None


def _maker(graph: gs.Graph, tensor: gs.Tensor) -> Bias | None:
    """A bias that is added to all of the tensor's values, and to nothing else."""
    if len(tensor.inputs) != 1:
        return None
    node = tensor.inputs[0]
    if node.op == "LayerNormalization" or (node.op in ("Conv", "Gemm") and is_linear(node)):
        return bias_of(graph, node)
    if node.op == "Add":
        return added_bias(node) or next(filter(None, (_operand(graph, t) for t in node.inputs)), None)
    return None


def _operand(graph: gs.Graph, tensor: gs.Tensor) -> Bias | None:
    return _maker(graph, tensor) if private(graph, tensor) else None


def _given_back(graph: gs.Graph, tensor: gs.Tensor, node: gs.Node, made: Bias) -> _Change | None:
    """How a reader of the shifted tensor makes up for it; None where it cannot."""
    if node.op == "Add":
        other = node.inputs[0] if node.inputs[1] is tensor else node.inputs[1]
        bias = _operand(graph, other)
        if bias is None or (bias.axis, bias.size) != (made.axis, made.size):
            return None
        return _Change(bias, lambda d: d, _between(bias, other))
    if not is_linear(node) or node.inputs[0] is not tensor or padding(node) != ():
        return None
    bias, (groups, _, inputs, _) = bias_of(graph, node), weight_matrix(node).shape
    if bias is None or (channel_axis(node), groups * inputs) != (made.axis, made.size):
        return None
    own = {node.outputs[0].name} if bias.node is not node else set()
    return _Change(bias, lambda d: behind(node, d), own)


def _between(bias: Bias, tensor: gs.Tensor) -> set[str]:
    """The tensor, and those that lead to it from where the bias is added."""
    at = bias.node.outputs[0]
    found = {at.name}
    while at is not tensor:
        at = at.outputs[0].outputs[0]
        found.add(at.name)
    return found
