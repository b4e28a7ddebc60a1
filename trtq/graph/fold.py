"""GraphSurgeon passes that make the fp32 graph simpler. Its function stays the same but for float32 rounding.

They run before anything is measured: TensorRT wants BatchNorm folded before Q/DQ goes in (it must see
Conv, not Conv + BatchNorm, between two quantizers), and a zero Pad in front of a Conv is a kernel of its
own that the Conv's own padding makes needless. Per-channel weight scales do not change under folding
(paper section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.graph.contrib import expand_contrib
from trtq.graph.einsum import einsum_to_matmul
from trtq.graph.evaluate import fold_constants
from trtq.graph.functions import expand_functions, holds_functions
from trtq.graph.names import Names
from trtq.graph.sequences import take_from_sequences
from trtq.graph.shapes import infer_types
from trtq.graph.surgery import cleaned, in_order
from trtq.graph.weights import is_plain


def fold(graph: gs.Graph) -> None:
    """Run every folding pass in order, in place, then infer the dtypes and shapes of all tensors."""
    for optimize in PASSES:
        optimize(graph)
        in_order(cleaned(graph))
    infer_types(graph)


def fold_functions(graph: gs.Graph) -> None:
    """Write operators as smaller ones where TensorRT needs that (see `trtq.graph.functions`)."""
    if holds_functions(graph):
        fold_constants(graph)
        infer_types(graph)
        while expand_functions(graph):
            infer_types(graph)


def fold_batch_norm(graph: gs.Graph) -> None:
    """Fold BatchNormalization into the Conv, ConvTranspose or Gemm that alone feeds it.

    W' = W * g and b' = (b - mean) * g + beta with g = gamma / sqrt(var + eps), in float64.
    """
    names = Names(graph)
    for norm in [n for n in graph.nodes if n.op == "BatchNormalization"]:
        producer = _sole_producer(graph, norm.inputs[0])
        if producer is None or producer.op not in ("Conv", "ConvTranspose", "Gemm"):
            continue
        weight, *bias = producer.inputs[1:]
        foldable = all(isinstance(t, gs.Constant) and is_plain(t) for t in (weight, *bias, *norm.inputs[1:5]))
        training = norm.attrs.get("training_mode", 0) or len([t for t in norm.outputs if t.name]) > 1
        if not foldable or training:
            continue
        gamma, beta, mean, variance = (t.values.astype(np.float64) for t in norm.inputs[1:5])
        gain = gamma / np.sqrt(variance + norm.attrs.get("epsilon", 1e-5))
        old_bias = bias[0].values.astype(np.float64) if bias else np.zeros_like(gain)
        if producer.op == "Gemm":
            old_bias = old_bias * producer.attrs.get("beta", 1.0)
        with np.errstate(over="ignore"):
            dtype, values = weight.values.dtype, weight.values.astype(np.float64)
            new_weight = _scale_output_channels(producer, values, gain).astype(dtype)
            new_bias = ((old_bias - mean) * gain + beta).astype(dtype)
        if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):  # beyond the dtype's range
            continue
        if producer.op == "Gemm":
            producer.attrs["beta"] = 1.0
        producer.inputs = [
            producer.inputs[0],
            gs.Constant(names.tensor(f"{norm.name}/folded_weight"), new_weight),
            gs.Constant(names.tensor(f"{norm.name}/folded_bias"), new_bias),
        ]
        producer.outputs = [norm.outputs[0]]
        norm.outputs = []


def fold_zero_pad(graph: gs.Graph) -> None:
    """Move a constant zero Pad of the spatial axes into the `pads` of the Convs that read it."""
    for conv in [n for n in graph.nodes if n.op == "Conv" and n.inputs[0].inputs]:
        pad = conv.inputs[0].inputs[0]
        if pad.op != "Pad" or conv.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            continue
        weight = conv.inputs[1]
        pads = _spatial_pads(pad, None if weight.shape is None else len(weight.shape))
        if pads is None:
            continue
        explicit = conv.attrs.pop("auto_pad", "NOTSET") == "NOTSET"
        own = np.asarray(conv.attrs.get("pads", 0) if explicit else 0)
        conv.attrs["pads"] = [int(p) for p in own + pads]
        conv.inputs[0] = pad.inputs[0]


PASSES: list[Callable[[gs.Graph], None]] = [
    expand_contrib,
    fold_functions,
    einsum_to_matmul,
    fold_constants,
    take_from_sequences,
    fold_batch_norm,
    fold_zero_pad,
]


def _sole_producer(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The node that makes `tensor`, if exactly one consumer reads it."""
    if len(tensor.inputs) != 1 or len(tensor.outputs) != 1 or tensor in graph.outputs:
        return None
    return tensor.inputs[0]


def _scale_output_channels(
    node: gs.Node, weight: NDArray[np.float64], gain: NDArray[np.float64]
) -> NDArray[np.float64]:
    if node.op == "Conv":
        return weight * gain.reshape(-1, *[1] * (weight.ndim - 1))
    if node.op == "Gemm":
        return weight * (gain[:, None] if node.attrs.get("transB", 0) else gain)
    # ConvTranspose: (in, out / groups, ...); the groups lie one after the other along axis 0.
    groups = node.attrs.get("group", 1)
    split = weight.reshape(groups, -1, *weight.shape[1:])
    gains = gain.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
    return (split * gains).reshape(weight.shape)


def _spatial_pads(pad: gs.Node, rank: int | None) -> NDArray[np.int64] | None:
    """The `pads` of a Pad that only adds zeros to spatial axes of a rank-`rank` tensor, else None."""
    pads, value, axes = (pad.inputs[i] if len(pad.inputs) > i else None for i in (1, 2, 3))
    absent = value is None or value.name == ""
    if rank is None or pad.attrs.get("mode", "constant") != "constant" or not isinstance(pads, gs.Constant):
        return None
    if not absent and not (isinstance(value, gs.Constant) and is_plain(value) and np.all(value.values == 0)):
        return None
    amounts = pads.values.reshape(2, -1)
    if axes is not None and axes.name:
        if not isinstance(axes, gs.Constant):
            return None
        every = np.zeros((2, rank), np.int64)
        every[:, axes.values] = amounts
        amounts = every
    if amounts.shape[1] != rank or np.any(amounts < 0) or np.any(amounts[:, :2]):
        return None
    return amounts[:, 2:].reshape(-1)
