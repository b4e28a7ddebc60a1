"""What the layers of a compiled engine have to do, from what the engine inspector lists of them."""

from __future__ import annotations

import math
import re

from trtq.backends.compiled import CompiledLayer, CompiledTensor
from trtq.cost.fused import Gemm
from trtq.cost.interface import Precision
from trtq.cost.roofline import Load, converted

PRECISIONS: dict[str, Precision] = {"Int8": "int8", "Half": "fp16", "BFloat16": "fp16", "Float": "fp32"}
_WIDTHS = {"two": 2, "four": 4, "eight": 8, "sixteen": 16, "thirty-two": 32}
_WIDE = re.compile(rf"({'|'.join(_WIDTHS)}) wide channel|channel % (\d+) == 0", re.IGNORECASE)
_MOVES = ("Shuffle", "Slice", "Padding")
_WEIGHTS = ("weights", "convweights")


def layer_load(layer: CompiledLayer, batch: int = 1) -> Load:
    """What a layer has to do.

    Products are told by shapes and the number of weights: k is weights per output channel, and where that is
    less than the channels of the input, the convolution is depthwise or grouped.

    Args:
        batch: stands for dynamic dimensions.
    """
    sizes = [listed_bytes(tensor, batch) for tensor in (*layer.inputs, *layer.outputs)]
    sizes += [tensor.size(batch) for tensor in layer.constants]
    gemm = _gemm(layer, batch) if layer.computes else None
    weights = _weights(layer)
    operands = [weights] if weights else layer.inputs
    known = [PRECISIONS[tensor.datatype] for tensor in operands if tensor.datatype in PRECISIONS]
    precision: Precision = known[0] if known else "fp32"
    if gemm is not None and len(layer.inputs[0].dims) > 2 and gemm.k == gemm.channels:  # of size 1
        positions = math.prod(batch if d < 0 else d for d in layer.inputs[0].dims) // gemm.channels
        sizes[0] = sizes[0] * min(gemm.m, positions) // positions
    moved = 0
    if layer.converts or layer.kind in _MOVES:
        moved = sum(converted([batch if d < 0 else d for d in t.dims]) for t in layer.outputs)
    return Load(precision, () if gemm is None else (gemm,), tuple(sizes), moved)


def listed_bytes(tensor: CompiledTensor, batch: int = 1) -> int:
    """Bytes of a tensor as it lies in memory: formats that pack channels pad them to whole packs."""
    dims = [batch if d < 0 else d for d in tensor.dims]
    if len(dims) > 2 and (found := _WIDE.search(tensor.format)):
        width = int(found[2]) if found[2] else _WIDTHS[found[1].lower()]
        dims[1] = math.ceil(dims[1] / width) * width
    return tensor.bytes_of(math.prod(dims))


def _weights(layer: CompiledLayer) -> CompiledTensor | None:
    """The constant that a product multiplies by; TensorRT for RTX has names of its own for it."""
    if named := [constant for constant in layer.constants if constant.name in _WEIGHTS]:
        return named[0]
    factors = [c for c in layer.constants if len([size for size in c.dims if size != 1]) > 1]
    return max(factors, key=lambda c: math.prod(c.dims)) if factors and layer.computes else None


def _gemm(layer: CompiledLayer, batch: int) -> Gemm | None:
    """The product of a layer, or None where its shapes do not tell."""
    if not layer.inputs or not layer.outputs:
        return None
    first, out = ([batch if d < 0 else d for d in t.dims] for t in (layer.inputs[0], layer.outputs[0]))
    constant = _weights(layer)
    weights = math.prod(constant.dims) if constant else 0
    if weights and len(out) > 2:  # a convolution, (batch, channels, ...)
        positions, k = math.prod(out) // out[1], weights // out[1]
        if k < first[1]:  # fewer weights than channels: grouped; taken for depthwise
            return Gemm(positions, 1, k, out[1], 1)
        return Gemm(positions, out[1], k, 1, first[1])
    if weights:
        return Gemm(math.prod(out[:-1]), out[-1], weights // out[-1], 1, weights // out[-1])
    return Gemm(math.prod(out[:-1]), out[-1], first[-1], 1, first[-1]) if len(out) > 1 else None
