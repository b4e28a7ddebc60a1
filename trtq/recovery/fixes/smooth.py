"""Channel-wise scaling: difficulty moved from activations to weights, at no cost.

Activations have one scale per tensor, so one large channel costs all others their precision; weights have one
per output channel. Where every node between what makes an activation and what reads it commutes with a
positive factor per channel, the factors fold into the constants on both ends:

    y = W1·x        y' = (W1 / s)·x
    z = W2·y        z  = (W2 * s)·y'

This is SmoothQuant (Xiao et al. 2022: out of LayerNorm's gamma and beta into the linear layers behind it) and
cross-layer equalization (Nagel et al. 2019: between two convolutions through a ReLU) in one: a *stream* is a
set of activations that must share their factors, with all nodes that make and read them. It may be the
residual stream of a whole stage. A Clip with bounds or a SiLU does not commute; a stream with one, or with
any operator not listed here, is left alone. What exporters write for a GELU ends with a product with 0.5,
which takes factors.

Behind a normalization of a post-norm transformer the residual Add cannot be scaled, since the next
normalization mixes channels. It gets back what it read before from a Mul behind the quantizer:

    y ─┬─ W·y                     y' = y / s ── Q/DQ ─┬─ (W * s)·y'
       └─ Add                                         └─ Mul s ── Add

That is the one operator that this puts into the graph, and no kernel of the engine: TensorRT for RTX 1.7.1
runs what is pointwise between a product and a normalization in one, and makes 71 kernels of MiniLM with these
and without. An Add that fuses with a Conv is not touched.

Two kinds of factors are tried. SmoothQuant's balance (equation 4), s = amax_x^a / amax_w^(1 - a) per channel,
suits what the weights in front make. Where few channels are far larger than all others, as in transformers,
those alone are divided, by what they exceed the next largest by (`tamed`): MiniLM has one channel at 28 and
nearly all below 4. Behind a GELU that is all that is done: to balance all channels takes the room from those
that the calibration rows hardly excite. Of all these each stream takes the factors for which the error of its
own quantizers, seen behind the readers' weights, is least.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.calibration.refine import LEAST_SHARE
from trtq.data.samples import Samples
from trtq.graph.names import Names
from trtq.graph.place import readers
from trtq.graph.plan import RESTORED, Plan
from trtq.graph.surgery import in_order
from trtq.numerics import amax_per_channel, fake_quantize, scale_from_amax
from trtq.recovery.fixes.channels import (
    Changed,
    Channels,
    Vector,
    along,
    channel_axis,
    collect_channels,
    is_linear,
    set_constant,
    weight_matrix,
)

EXPONENTS = (0.25, 0.5, 0.75, 1.0)
"""Values of `a` that are tried, besides leaving a stream as it is."""

OUTLIERS, LEAST_OTHERS = (1, 2, 4, 8, 16, 32), 4
"""How many channels are taken for outliers, one number after the other, and how many others there are at
least for each of them."""

ROWS = 128
"""Rows, evenly spread, that channels are looked at on, since outliers are rare: on every fifth evaluation row
of MiniLM 19.8 dB (ranges by mse), with 32 rows 15.9."""

MOST_WEIGHTS = 1 << 20
"""Of so many weights the error behind them is taken; of larger layers with fewer outputs."""

MOST_FACTOR = 1e3
"""Factors are kept within this and its inverse, about their geometric mean."""

NARROWER = tuple(0.8**k for k in range(8))
"""Parts of the largest magnitude that are tried as a range."""

COMMUTING_OPS = frozenset({"Identity", "LeakyRelu", "Relu"})
"""Operators of one input that commute with a positive factor per channel."""

POOLING_OPS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
"""The same, where axis 1 holds the channels."""

NORMALIZATIONS = frozenset({"LayerNormalization", "RMSNormalization"})


@dataclass
class Stream:
    """Activations that can only be scaled together, and what makes and reads them.

    Attributes:
        axis: where all of them have their channels.
        channels: how many.
        tensors: their names.
        makers: nodes whose output is scaled by their constants.
        readers: linear nodes that read a tensor of the stream.
        constants: (node, input) of constants that are added on the way.
        restored: (Add, input) that get back what the stream was before: None where Adds take part in it.
    """

    axis: int
    channels: int
    tensors: list[str] = field(default_factory=list)
    makers: list[gs.Node] = field(default_factory=list)
    readers: list[gs.Node] = field(default_factory=list)
    constants: list[tuple[gs.Node, int]] = field(default_factory=list)
    restored: list[tuple[gs.Node, int]] | None = None

    @property
    def balanced(self) -> bool:
        """Whether all makers have channels of their own, which weights can be balanced with."""
        constants = (n.inputs[_factor_index(n)] for n in self.makers if n.op in ("Mul", "Div"))
        return all(constant.values.size == self.channels for constant in constants)


def smooth(
    graph: gs.Graph,
    plan: Plan,
    samples: Samples,
    *,
    workers: int | None = None,
    shares: Mapping[str, float] | None = None,
) -> Changed | None:
    """A copy of the graph whose streams are scaled, each as is best for its quantizers.

    It computes the same outputs up to rounding, and names are unchanged; the ranges of the tensors that
    changed must be measured again. None where nothing can be scaled to advantage.

    Args:
        graph: folded, float32; is not changed.
        plan: of that graph.
        samples: channels are measured on an evenly spread part of them.
        workers: rows run at once; default: one for each processor.
        shares: tensor -> its part of the outputs' noise; where the streams would not save 0.1 dB of it, by
            what their own errors fall by, nothing is scaled.
    """
    graph = graph.copy()
    quantized = {edge.tensor for edge in plan.edges}
    streams = [s for s in find_streams(graph) if quantized & set(s.tensors)]
    axes = {name: stream.axis for stream in streams for name in stream.tensors if name in quantized}
    least = 0.0 if shares is None else LEAST_SHARE
    if not axes or (shares is not None and sum(shares.get(name, 0.0) for name in axes) < least):
        return None
    channels = collect_channels(graph, axes, samples, workers, ROWS)
    changed, saved, muls = set[str](), 0.0, dict[tuple[str, int], str]()
    for stream in streams:
        found = best_factors(stream, channels, plan)
        if found is not None:
            muls |= scale_stream(graph, stream, found.values)
            changed |= set(stream.tensors)
            share = 1.0 if shares is None else sum(shares.get(name, 0.0) for name in stream.tensors)
            saved += found.saved * share
    if not changed or saved < least:
        return None
    edges = [
        replace(edge, node=muls[edge.node, edge.index], index=0) if (edge.node, edge.index) in muls else edge
        for edge in plan.edges
    ]
    return Changed(graph, frozenset(changed), replace(plan, edges=edges))


def find_streams(graph: gs.Graph) -> list[Stream]:
    """Every stream of a folded graph, in the order of the graph."""
    streams: list[Stream] = []
    seen: set[str] = set()
    for node in graph.nodes:
        if not is_linear(node) or node.inputs[0].name in seen:
            continue
        stream = _stream(graph, node)
        if stream is not None:
            streams.append(stream)
            seen.update(stream.tensors)
    return streams


def _stream(graph: gs.Graph, reader: gs.Node) -> Stream | None:
    """The stream that a linear node reads; None where a factor cannot be folded."""
    groups, _, inputs, _ = weight_matrix(reader).shape
    axis, channels = channel_axis(reader), groups * inputs
    whole = _walked(graph, reader, Stream(axis, channels))
    return whole or _walked(graph, reader, Stream(axis, channels, restored=[]))


def _walked(graph: gs.Graph, reader: gs.Node, stream: Stream) -> Stream | None:
    """A stream with all that takes part in it, from one of its readers on."""
    waiting = [reader.inputs[0]]
    while waiting:
        tensor = waiting.pop()
        if tensor.name in stream.tensors:
            continue
        if tensor in graph.outputs or len(tensor.inputs) != 1:
            return None
        stream.tensors.append(tensor.name)
        linked = _linked(stream, tensor.inputs[0], None)
        for node in readers(tensor):
            linked = None if linked is None else _extend(linked, _linked(stream, node, tensor))
        if linked is None:
            return None
        waiting += linked
    return stream


def _extend(found: list[gs.Tensor], more: list[gs.Tensor] | None) -> list[gs.Tensor] | None:
    return None if more is None else found + more


def _linked(stream: Stream, node: gs.Node, tensor: gs.Tensor | None) -> list[gs.Tensor] | None:
    """Note a node's part in the stream; the other tensors that it takes along, or None where it cannot be.

    Args:
        tensor: the tensor of the stream that it reads; None: it makes one.
    """
    if tensor is None and _can_make(stream, node):
        stream.makers.append(node)
        return []
    if tensor is not None and is_linear(node) and node.inputs[0] is tensor:
        stream.readers.append(node)
        groups, _, inputs, _ = weight_matrix(node).shape
        return [] if (channel_axis(node), groups * inputs) == (stream.axis, stream.channels) else None
    if node.op in COMMUTING_OPS or (node.op in POOLING_OPS and stream.axis == 1 and len(node.outputs) == 1):
        return [node.inputs[0], node.outputs[0]]
    if node.op == "Add":
        for index, operand in enumerate(node.inputs):
            if isinstance(operand, gs.Constant):
                if (node, index) not in stream.constants:
                    stream.constants.append((node, index))
                other = node.inputs[1 - index]
                return [other, node.outputs[0]] if _fits(stream, operand, node.outputs[0]) else None
        if stream.restored is not None:
            return None if tensor is None else _restored(stream.restored, node, tensor)
        both = all(_has_channels(stream, operand) for operand in node.inputs)  # none is broadcast along them
        aligned = stream.axis == -1 or len({len(operand.shape or ()) for operand in node.inputs}) == 1
        return [*node.inputs, node.outputs[0]] if both and aligned else None
    return None


def _restored(adds: list[tuple[gs.Node, int]], node: gs.Node, tensor: gs.Tensor) -> list[gs.Tensor] | None:
    """Note an Add that reads a tensor as it was before scaling; None where it would no longer be fused."""
    if any(maker.op == "Conv" for operand in node.inputs for maker in operand.inputs):
        return None
    adds += [(node, index) for index, operand in enumerate(node.inputs) if operand is tensor]
    return []


def _can_make(stream: Stream, node: gs.Node) -> bool:
    """Whether factors for the node's output can be folded into its constants."""
    if is_linear(node):
        bias_folds = len(node.inputs) < 3 or isinstance(node.inputs[2], gs.Constant)
        return channel_axis(node) == stream.axis and bias_folds
    if node.op in NORMALIZATIONS:
        constant = all(isinstance(t, gs.Constant) and len(t.shape) == 1 for t in node.inputs[1:])
        return constant and stream.axis == -1
    if node.op in ("Mul", "Div"):
        constant = node.inputs[_factor_index(node)]
        sizes = (1, stream.channels)
        fitting = isinstance(constant, gs.Constant) and np.prod(constant.shape, dtype=int) in sizes
        return fitting and _fits(stream, constant, node.outputs[0])
    return False


def _factor_index(node: gs.Node) -> int:
    """Which operand of a Mul or Div may be a constant factor."""
    return 0 if node.op == "Mul" and isinstance(node.inputs[0], gs.Constant) else 1


def _fits(stream: Stream, constant: gs.Constant, tensor: gs.Tensor) -> bool:
    """Whether a constant broadcasts against the tensor without giving it another shape."""
    return _has_channels(stream, tensor) and len(constant.shape) <= len(tensor.shape)


def _has_channels(stream: Stream, tensor: gs.Tensor) -> bool:
    shape = tensor.shape
    return shape is not None and len(shape) > 1 and shape[stream.axis] == stream.channels


# --- folding ------------------------------------------------------------------------------------------------


def scale_stream(graph: gs.Graph, stream: Stream, factors: Vector) -> dict[tuple[str, int], str]:
    """Divide every tensor of the stream by `factors`, shape (channels,), and make up for it; in place.

    Returns:
        (Add, input) -> the Mul that was inserted there.
    """
    names = Names(graph)
    ranks = {name: len(tensor.shape or ()) for name, tensor in graph.tensors().items()}
    for node in stream.makers:
        rank = ranks[node.outputs[0].name]
        if is_linear(node):
            scale_linear(node, 1 / factors, names, output=True)
            for index in range(2, len(node.inputs)):
                set_constant(node, index, node.inputs[index].values / factors, names)
        elif node.op in NORMALIZATIONS:
            for index in range(1, len(node.inputs)):
                set_constant(node, index, node.inputs[index].values / factors, names)
        else:
            index = _factor_index(node)
            vector = along(factors if node.op == "Div" else 1 / factors, stream.axis, rank)
            set_constant(node, index, node.inputs[index].values * vector, names)
    for node, index in stream.constants:
        vector = along(1 / factors, stream.axis, ranks[node.outputs[0].name])
        set_constant(node, index, node.inputs[index].values * vector, names)
    for node in stream.readers:
        scale_linear(node, factors, names, output=False)
    inserted = {}
    for node, index in stream.restored or ():
        scaled = node.inputs[index]
        restored = gs.Variable(names.tensor(f"{node.name}{RESTORED}"), scaled.dtype, scaled.shape)
        vector = along(factors, stream.axis, ranks[scaled.name]).astype(np.float32)
        operands = [scaled, gs.Constant(names.tensor(f"{restored.name}/factors"), vector)]
        graph.nodes.append(gs.Node("Mul", names.node(restored.name), {}, operands, [restored]))
        node.inputs[index] = restored
        inserted[node.name, index] = graph.nodes[-1].name
    if inserted:
        in_order(graph)
    return inserted


def scale_linear(node: gs.Node, factors: Vector, names: Names, *, output: bool) -> None:
    """Multiply the weights of a linear node's outputs, or of its inputs, by factors; in place."""
    set_constant(node, 1, scaled_weight(node, factors, output=output), names)


def scaled_weight(node: gs.Node, factors: Vector, *, output: bool) -> NDArray[np.float64]:
    """The weights of a linear node with those of its outputs, or of its inputs, multiplied by factors."""
    weight: NDArray[np.float64] = node.inputs[1].values.astype(np.float64)
    if node.op == "Conv" and not output:
        groups, outputs, inputs, _ = weight_matrix(node).shape
        each = np.repeat(factors.reshape(groups, 1, inputs), outputs, axis=1).reshape(-1, inputs)
        return weight * each.reshape(*each.shape, *[1] * (weight.ndim - 2))
    axis = 0 if node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB", 0)) == output else 1
    return weight * along(factors, axis, weight.ndim)


# --- choosing the factors -----------------------------------------------------------------------------------


class Factors(NamedTuple):
    """Factors of a stream, shape (channels,), and the part of its error that they save."""

    values: Vector
    saved: float


def best_factors(stream: Stream, channels: Mapping[str, Channels], plan: Plan) -> Factors | None:
    """The factors with the least error; None where the stream is best left alone.

    Args:
        channels: of those tensors of the stream that are quantized.
        plan: says which readers are.
    """
    int8, inputs = set(plan.int8_nodes), plan.inputs
    readers = [node for node in stream.readers if node.name in int8 and node.inputs[0].name in channels]
    if not readers:
        return None
    adds = [node.inputs[index].name for node, index in stream.restored or () if (node.name, index) in inputs]
    powers = {name: channels[name].power for name in (*adds, *(node.inputs[0].name for node in readers))}
    amax = np.max([channels[name].amax for name in stream.tensors if name in channels], axis=0)
    weights = np.max([np.abs(by_input(node)).max(axis=0) for node in readers], axis=0)
    exponents = EXPONENTS if stream.balanced else ()
    tried = [np.ones(stream.channels), *(balanced(amax, weights, a) for a in exponents), *tamed(amax)]
    errors = []
    for factors in tried:
        noises = {name: quantization_noise(channels[name].values, factors) for name in powers}
        sources = [node.inputs[0].name for node in readers]
        behind = [
            error_behind(n, powers[t], noises[t], factors) for n, t in zip(readers, sources, strict=True)
        ]
        errors.append(sum(behind) + sum(_restored_error(powers[t], noises[t], factors) for t in adds))
    best = int(np.argmin(errors))
    return Factors(tried[best], 1 - errors[best] / errors[0]) if best else None


def balanced(amax: Vector, weights: Vector, exponent: float) -> Vector:
    """SmoothQuant's equation 4, with 1 where a channel is dead on either side."""
    alive = (amax > 0) & (weights > 0)
    factors = np.ones(amax.shape)
    factors[alive] = amax[alive].astype(np.float64) ** exponent / weights[alive] ** (1 - exponent)
    factors[alive] /= np.exp(np.log(factors[alive]).mean()) if alive.any() else 1
    return np.clip(factors, 1 / MOST_FACTOR, MOST_FACTOR)


def tamed(amax: Vector) -> Iterator[Vector]:
    """Factors that bring the largest channels down to the range of the others, for each number of `OUTLIERS`.

    All other channels keep the room that they have, which data to come may need.
    """
    ranked = np.sort(amax)[::-1]
    for count in OUTLIERS:
        if len(ranked) > LEAST_OTHERS * count and ranked[count] > 0:
            yield np.maximum(amax.astype(np.float64) / ranked[count], 1)


def by_input(node: gs.Node) -> NDArray[np.float64]:
    """Weights as (outputs of a group * kernel, inputs)."""
    matrix = weight_matrix(node)
    return matrix.transpose(1, 3, 0, 2).reshape(-1, matrix.shape[0] * matrix.shape[2])


def error_behind(node: gs.Node, power: Vector, noise: Vector, factors: Vector) -> float:
    """Quantization noise over signal at a reader's output, its inputs taken as uncorrelated.

    Args:
        power: mean square of each input channel before scaling.
        noise: `quantization_noise` of each with the factors.
    """
    weight = weight_matrix(node)
    weight = weight[:, :: -(-weight.size // MOST_WEIGHTS)]
    groups, _, inputs, _ = weight.shape
    scaled = weight * factors.reshape(groups, 1, inputs, 1)
    rows = scaled.reshape(-1, inputs * scaled.shape[3]).astype(np.float32)
    rounded = fake_quantize(rows, scale_from_amax(amax_per_channel(rows, 0)), axis=0, narrow=True)
    lost = np.square(rounded - rows, dtype=np.float64).reshape(weight.shape)

    def through(energy: NDArray[np.float64], power: Vector) -> float:
        return float((energy.sum(axis=(1, 3)).reshape(-1) * power).sum())

    signal = through(weight**2, power)
    return (through(scaled**2, noise) + through(lost, power / factors**2)) / signal if signal else 0.0


def _restored_error(power: Vector, noise: Vector, factors: Vector) -> float:
    """The same at what an Add gets back."""
    signal = float(power.sum())
    return float((noise * factors**2).sum()) / signal if signal else 0.0


def quantization_noise(values: NDArray[np.float32], factors: Vector) -> Vector:
    """Mean squared error of each channel divided by its factor, under the per-tensor range for which the
    whole error is least; (channels,) from (positions, channels)."""
    values = np.divide(values, factors, dtype=np.float32, casting="same_kind")
    amax = np.abs(values).max(initial=0.0)
    return min((rounding_noise(values, scale_from_amax(amax * part)) for part in NARROWER), key=np.sum)


def rounding_noise(values: NDArray[np.float32], scale: NDArray[np.float32] | np.float32) -> Vector:
    """Mean squared error of each channel in INT8 with a scale; (channels,) from (positions, channels)."""
    ratio = values / scale
    ratio -= np.clip(np.rint(ratio), -128, 127)
    error: Vector = np.einsum("ij,ij->j", ratio, ratio) * np.float64(scale) ** 2 / max(len(values), 1)
    return error
