"""The operators that multiply and accumulate, and those that say that a model is quantized already.

The share of a model that runs in INT8 is a share of the products listed here, so what is missing here is
missing in the sum. `product` finds a node's entry; `quantizers` finds what another tool has put in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import onnx_graphsurgeon as gs

from trtq.graph.foreign import is_foreign_node

Shapes = Mapping[str, Sequence[int]]
"""Tensor -> its shape, as far as it is known."""

Count = Callable[[gs.Node, Shapes], int | None]


@dataclass(frozen=True)
class Product:
    """What is known of an operator that multiplies and accumulates.

    Attributes:
        macs: multiply-accumulates of a node for given shapes; None where they are not known.
        operands: how many of the first inputs are multiplied, None for all; 0 where a factor arises inside
            the operator (a state, a softmax), which no quantizer can reach.
        float_reason: why TensorRT runs it in floating point whatever its inputs; empty where it need not.
        integer: whether it multiplies integers by itself, without Q/DQ around it.
    """

    macs: Count
    operands: int | None = 2
    float_reason: str = ""
    integer: bool = False


def product(node: gs.Node) -> Product | None:
    """The entry of a node's operator; None if it does not multiply and accumulate.

    Operators of domains that ONNX does not define go by their name; their multiply-accumulates are not known.
    """
    if not is_foreign_node(node):
        return PRODUCTS.get(node.op)
    return _FOREIGN if _FOREIGN_PRODUCT.search(node.op) else None


def macs(node: gs.Node, shapes: Shapes) -> int | None:
    """Multiply-accumulates of a node; None if the shapes are not known, or the node is not a product."""
    found = product(node)
    return found.macs(node, shapes) if found else None


def quantizers(graph: gs.Graph) -> tuple[str, ...]:
    """The operators, in the graph and in all bodies, by which a model is quantized already, sorted."""
    bodies = (graph, *graph.subgraphs(recursive=True))
    return tuple(sorted({node.op for body in bodies for node in body.nodes if is_quantizer(node.op)}))


def is_quantizer(op: str) -> bool:
    """Whether an operator of this name, in ONNX's or another domain, occurs only in quantized models."""
    return _QUANTIZER.search(op) is not None


# --- multiply-accumulates -------------------------------------------------------------------------------


def _known(tensors: Sequence[gs.Tensor], shapes: Shapes) -> list[Sequence[int]] | None:
    """The shapes of all of some tensors."""
    found = [shapes.get(tensor.name) for tensor in tensors]
    return None if any(shape is None for shape in found) else [shape for shape in found if shape is not None]


def _unknown(node: gs.Node, shapes: Shapes) -> None:
    return None


def _convolution(weight: int) -> Count:
    """Every output value is a sum over one filter, which is input `weight`: (channels out, ...)."""

    def count(node: gs.Node, shapes: Shapes) -> int | None:
        known = _known([node.outputs[0], node.inputs[weight]], shapes)
        return None if known is None else prod(known[0]) * prod(known[1][1:])

    return count


def _transposed_convolution(node: gs.Node, shapes: Shapes) -> int | None:
    """Every input value meets every weight of its channel."""
    known = _known(node.inputs[:2], shapes)
    return None if known is None else prod(known[0]) * prod(known[1][1:])


def _matrix_product(node: gs.Node, shapes: Shapes) -> int | None:
    """Every output value is a sum over the inner axis, which is one of the first operand."""
    known = _known([node.outputs[0], node.inputs[0]], shapes)
    return None if known is None else prod(known[0]) * known[1][-2 if node.attrs.get("transA", 0) else -1]


def _einsum(node: gs.Node, shapes: Shapes) -> int | None:
    known = _known([node.outputs[0], *node.inputs], shapes)
    return None if known is None else prod(known[0]) * _contracted(node.attrs["equation"], known[1:])


def _contracted(equation: str, shapes: Sequence[Sequence[int]]) -> int:
    """How many products are summed up for each value that an Einsum gives."""
    terms, _, result = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms.split(","), shapes, strict=True):
        before, dots, after = term.partition("...")
        sizes |= dict(zip(before, shape, strict=not dots))
        sizes |= dict(zip(after, shape[len(shape) - len(after) :], strict=True))
    kept = result if "->" in equation else {letter for letter in terms if terms.count(letter) == 1}
    return prod(size for letter, size in sizes.items() if letter not in kept)


def _recurrent(node: gs.Node, shapes: Shapes) -> int | None:
    """At every step each gate meets the input and the state: x (steps, rows, ...), W and R of all gates."""
    known = _known(node.inputs[:3], shapes)
    return None if known is None else prod(known[0][:2]) * (prod(known[1]) + prod(known[2]))


def _attention(node: gs.Node, shapes: Shapes) -> int | None:
    """Queries by keys, then probabilities by values: each query and each result meets all keys.

    Heads stand in an axis of their own (batch, heads, length, size) or in the last (batch, length, heads *
    size); past keys lengthen the keys. Masked products count.
    """
    past = node.inputs[4:5] if len(node.inputs) > 4 and node.inputs[4].name else []
    known = _known([node.inputs[0], node.outputs[0], node.inputs[1], *past], shapes)
    if known is None:
        return None
    query, result, *keys = known
    return (prod(query) + prod(result)) * sum(shape[-2] for shape in keys)


def _linear_attention(node: gs.Node, shapes: Shapes) -> int | None:
    """At every step a state (keys' size, values' size) per head takes key x value and is read by a query; the
    delta rules read it by the key, too. Inputs are (batch, steps, heads * size)."""
    known = _known(node.inputs[:3], shapes)
    if known is None:
        return None
    query, key, value = known
    passes = 2 if "delta" in node.attrs.get("update_rule", "gated_delta") else 1
    return (prod(query) + passes * prod(key)) * (value[2] // node.attrs["kv_num_heads"])


def _affine_grid(node: gs.Node, shapes: Shapes) -> int | None:
    """Every coordinate is a row of theta (batch, axes, axes + 1) by a position."""
    known = _known([node.outputs[0], node.inputs[0]], shapes)
    return None if known is None else prod(known[0]) * known[1][-1]


def _linear_model(node: gs.Node, shapes: Shapes) -> int | None:
    """Every row (..., features) meets all coefficients."""
    known = _known(node.inputs[:1], shapes)
    return None if known is None else prod(known[0][:-1]) * len(node.attrs["coefficients"])


# --- the table ------------------------------------------------------------------------------------------

_RECURRENT = Product(_recurrent, 0, "TensorRT runs recurrent layers in floating point")
_ATTENTION = Product(
    _attention,
    0,
    "its two products run in floating point: TensorRT has no INT8 attention as one operator, and the softmax "
    "between them cannot be quantized; export it as MatMul, Softmax and MatMul",
)
_NO_KERNEL = "TensorRT has no INT8 kernel for it"

PRODUCTS: Mapping[str, Product] = {
    "Conv": Product(_convolution(1)),
    "Gemm": Product(_matrix_product),
    "MatMul": Product(_matrix_product),
    "ConvTranspose": Product(
        _transposed_convolution,
        float_reason="TensorRT runs it in floating point even between Q/DQ, which would only cost",
    ),
    "Einsum": Product(_einsum, None, "it is not one matrix product; export it as MatMul to quantize it"),
    "DeformConv": Product(_convolution(1), float_reason=_NO_KERNEL),
    "CausalConvWithState": Product(_convolution(1), float_reason=_NO_KERNEL),
    "LSTM": _RECURRENT,
    "GRU": _RECURRENT,
    "RNN": _RECURRENT,
    "Attention": _ATTENTION,
    "FlexAttention": _ATTENTION,
    "LinearAttention": Product(_linear_attention, 0, _NO_KERNEL),
    "AffineGrid": Product(_affine_grid, 0, _NO_KERNEL),
    "DFT": Product(_unknown, 0, _NO_KERNEL),  # how many depends on how it is factored
    "STFT": Product(_unknown, 0, _NO_KERNEL),
    "ConvInteger": Product(_convolution(1), integer=True),
    "MatMulInteger": Product(_matrix_product, integer=True),
    "QLinearConv": Product(_convolution(3), integer=True),
    "QLinearMatMul": Product(_matrix_product, integer=True),
    "LinearClassifier": Product(_linear_model, 0, _NO_KERNEL),
    "LinearRegressor": Product(_linear_model, 0, _NO_KERNEL),
    "SVMClassifier": Product(_unknown, 0, _NO_KERNEL),
    "SVMRegressor": Product(_unknown, 0, _NO_KERNEL),
}
"""ONNX's operators that multiply two tensors, or a tensor and weights, and sum the products up.

Not among them: element-wise operators, reductions (sums of squares too), normalization, pooling, and
interpolation (Resize, GridSample, RoiAlign).
"""

_FOREIGN = Product(_unknown, 0, "it is not an ONNX operator: what it multiplies is not known")
_FOREIGN_PRODUCT = re.compile(
    r"Conv(?!ert)|Gemm|GEMM|Mat[Mm]ul|Att(ention|n)|LSTM|GRU|RNN|MoE|Einsum|R?FFT|fft|DeltaNet|QKV|FC|DCN"
    r"|CDist|GateUpProj|Mamba|LowRankMix"
)

_QUANTIZER = re.compile(
    r"^Q(Linear|Ordered|Attention|Gemm|MoE|EmbedLayer)|Quant(?!ile)|quantize|QDQ|Integer|NBits|Bnb4|FpQ4|Float8|BFP"
)
