"""Rewriting: a folded fp32 graph, a plan and scales become an explicit Q/DQ graph.

What TensorRT asks for: zero-point 0, every scale positive, activations per tensor, weights per output
channel, biases in floating point. Tensors that several nodes read get one Q/DQ pair.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.errors import InputError
from trtq.graph.names import Names
from trtq.graph.plan import Plan
from trtq.graph.surgery import cleaned, copied, in_order
from trtq.graph.weights import values_of
from trtq.numerics import INT8_MAX, amax_per_channel, dequantize, quantize, scale_from_amax

WEIGHT_FORMS = ("int8", "qdq")
"""`int8`: int8 initializers + DequantizeLinear, but float ones + a Q/DQ pair where a product is cut into
parts (see `_is_cut`); `qdq`: float initializers + a Q/DQ pair everywhere."""


def rewrite(
    graph: gs.Graph,
    plan: Plan,
    scales: Mapping[str, np.float32],
    *,
    weights: str = "int8",
    weight_scales: Mapping[tuple[str, int], NDArray[np.float32]] | None = None,
    codes: Mapping[tuple[str, int], NDArray[np.int8]] | None = None,
    biases: Mapping[tuple[str, int], NDArray[np.float32]] | None = None,
) -> gs.Graph:
    """A copy of `graph` with Q/DQ where `plan` says.

    Args:
        graph: folded, or that graph in half (`convert_to_half`); is not changed.
        scales: activation tensor -> float32 scale (amax / 127), > 0.
        weights: one of `WEIGHT_FORMS`.
        weight_scales: (constant, axis) -> scales (channels,) of weights that do not take `weight_scale`'s.
        codes: (constant, axis) -> int8 codes of weights that are not rounded to the nearest.
        biases: (node, index of input) -> what the constant there becomes.

    Raises:
        InputError: a tensor of the plan has no scale, or the plan does not fit the graph.
    """
    require_scales(plan, scales)
    graph, names = copied(graph), Names(graph)
    nodes = {node.name: node for node in graph.nodes}
    if unknown := ({e.node for e in plan.edges} | {w.node for w in plan.weights}) - nodes.keys():
        raise InputError(
            "the plan belongs to another model", cause=f"the model has no node '{sorted(unknown)[0]}'"
        )
    ranges: dict[tuple[str, np.dtype], list[gs.Constant]] = {}
    pairs: dict[tuple[str, int | None], gs.Variable] = {}  # by the names of `graph`: one for each dtype
    for edge in plan.edges:
        inputs = nodes[edge.node].inputs
        tensor = inputs[edge.index]
        span = (edge.range, np.dtype(tensor.dtype))
        if span not in ranges:
            ranges[span] = _range(names, edge.range, scales[edge.range], tensor.dtype)
        if (tensor.name, None) not in pairs:
            quantized = _quantize_node(graph, names, tensor, ranges[span], tensor.name)
            pairs[tensor.name, None] = _dequantize(
                graph, names, quantized, ranges[span], tensor.name, tensor.dtype
            )
        inputs[edge.index] = pairs[tensor.name, None]
    for weight in plan.weights:
        inputs = nodes[weight.node].inputs
        constant, key = inputs[weight.index], (inputs[weight.index].name, weight.axis)
        if key not in pairs:
            scale = (weight_scales or {}).get((weight.tensor, weight.axis))
            given = (codes or {}).get((weight.tensor, weight.axis))
            form = "qdq" if _is_cut(nodes[weight.node]) else weights
            pairs[key] = _quantize_weight(graph, names, constant, weight.axis, scale, given, form)
        inputs[weight.index] = pairs[key]
    for (node, index), values in (biases or {}).items():
        old = nodes[node].inputs[index]
        name = names.tensor(f"{old.name}/{node}/corrected")
        nodes[node].inputs[index] = gs.Constant(name, values.astype(old.dtype))
    return in_order(cleaned(graph))


def require_scales(plan: Plan, scales: Mapping[str, np.float32]) -> None:
    """Refuse scales that lack a tensor of the plan.

    Raises:
        InputError: as said.
    """
    if missing := [t for t in plan.tensors if t not in scales]:
        raise InputError(
            f"{len(missing)} tensors of the plan have no scale in the table",
            cause=f"missing: {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}",
            remedy="calibrate this model again; a table belongs to one model",
        )


def scales_as_inputs(graph: gs.Graph, plan: Plan) -> dict[str, str]:
    """Turn the scales of a rewritten graph's activations into model inputs, in place.

    One session then serves any ranges.

    Args:
        plan: that the graph was rewritten by.

    Returns:
        name of the input, a scalar of the tensor's dtype -> tensor whose scale it holds. A range that tensors
        of two dtypes share has two inputs.
    """
    names: dict[str, str] = {}
    nodes = {node.name: node for node in graph.nodes}
    for edge in plan.edges:
        dequantizer = nodes[edge.node].inputs[edge.index].inputs[0]
        constant = dequantizer.inputs[1]
        if isinstance(constant, gs.Variable):
            continue
        variable = gs.Variable(constant.name, constant.dtype, [])
        for node in list(constant.outputs):
            node.inputs = [variable if t is constant else t for t in node.inputs]
        graph.inputs.append(variable)
        names[variable.name] = edge.range
    return names


def switches_as_inputs(graph: gs.Graph, plan: Plan) -> dict[str, str]:
    """Let model inputs decide which activations of a rewritten graph are quantized, in place.

    Args:
        plan: that the graph was rewritten by.

    Returns:
        name of the input, a scalar bool -> tensor with whose range its Q/DQ pairs are used where it is true.
    """
    names, nodes = Names(graph), {node.name: node for node in graph.nodes}
    switches: dict[str, gs.Variable] = {}
    switched: dict[str, gs.Variable] = {}
    for edge in plan.edges:
        inputs = nodes[edge.node].inputs
        dequantized = inputs[edge.index]
        if edge.range not in switches:
            switches[edge.range] = gs.Variable(names.tensor(f"{edge.range}/switch"), np.bool_, [])
        if dequantized.name not in switched:
            plain = dequantized.inputs[0].inputs[0].inputs[0].inputs[0]
            output = gs.Variable(names.tensor(f"{dequantized.name}/switched"), dequantized.dtype)
            node = names.node(f"{dequantized.name}/Where")
            operands = [switches[edge.range], dequantized, plain]
            graph.nodes.append(gs.Node("Where", node, {}, operands, [output]))
            switched[dequantized.name] = output
        inputs[edge.index] = switched[dequantized.name]
    graph.inputs += switches.values()
    in_order(graph)
    return {variable.name: tensor for tensor, variable in switches.items()}


def weight_scale(weight: NDArray, axis: int) -> NDArray[np.float32]:
    """Per-channel max scales of a weight, shape (channels,) along `axis` (paper 4.1)."""
    return scale_from_amax(amax_per_channel(weight, axis))


def rounded_weight(
    values: NDArray,
    axis: int,
    scale: NDArray[np.float32] | None = None,
    codes: NDArray[np.int8] | None = None,
) -> NDArray[np.floating]:
    """A weight as a Q/DQ graph has it, dequantized; `scale` and `codes` as those given to `rewrite`."""
    scale, codes = _scale_and_codes(values, axis, scale, codes)
    return dequantize(codes, scale, axis=axis)


def _scale_and_codes(
    values: NDArray, axis: int, scale: NDArray[np.float32] | None, codes: NDArray[np.int8] | None
) -> tuple[NDArray[np.floating], NDArray[np.int8]]:
    """The scales of a weight in its dtype, its own unless some are given, and its codes: the nearest to it,
    or to what those that are given stand for with the scales as they were."""
    wanted = weight_scale(values, axis) if scale is None else scale
    scale = _fitting(wanted, values.dtype)
    if codes is None or not np.array_equal(scale, wanted):
        values = values if codes is None else dequantize(codes, wanted, axis=axis)
        codes = quantize(values.astype(np.float32), scale.astype(np.float32), axis=axis, narrow=True)
    return scale, codes


_BEFORE_CUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")
_CUTS = ("Gather", "Slice", "Split")


def _is_cut(node: gs.Node) -> bool:
    """Whether a product is cut into parts, as that of a packed query, key and value projection is.

    TensorRT then cuts the weights instead. It can cut floats in front of Q/DQ, but not int8 initializers,
    with which it runs the product in floating point (seen with TensorRT for RTX 1.7.1 on Swin's attention).
    """
    waiting = [node] if node.op in ("MatMul", "Gemm") else []
    while waiting:
        for reader in [reader for tensor in waiting.pop().outputs for reader in tensor.outputs]:
            if reader.op in _CUTS:
                return True
            biased = reader.op == "Add" and any(isinstance(t, gs.Constant) for t in reader.inputs)
            if biased or reader.op in _BEFORE_CUT:
                waiting.append(reader)
    return False


def _range(names: Names, name: str, scale: np.float32, dtype: np.dtype) -> list[gs.Constant]:
    """Scale and zero-point of an activation, in the dtype of the tensors that have this range."""
    value = np.array(scale, dtype)
    if not (np.isfinite(value) and value > 0):
        raise InputError(f"the scale {scale} of '{name}' is not a positive finite {np.dtype(dtype)}")
    return [
        gs.Constant(names.tensor(f"{name}/scale"), value),
        gs.Constant(names.tensor(f"{name}/zero_point"), np.zeros((), np.int8)),
    ]


def _quantize_weight(
    graph: gs.Graph,
    names: Names,
    tensor: gs.Constant,
    axis: int,
    scale: NDArray[np.float32] | None,
    codes: NDArray[np.int8] | None,
    form: str,
) -> gs.Variable:
    values = values_of(tensor)
    dtype = values.dtype
    if not np.isfinite(values).all():
        raise InputError(f"the weight '{tensor.name}' holds NaN or infinite values")
    given, (scale, codes) = codes is not None, _scale_and_codes(values, axis, scale, codes)
    name = f"{tensor.name}/{axis}"
    constants = [
        gs.Constant(names.tensor(f"{name}/scale"), scale),
        gs.Constant(names.tensor(f"{name}/zero_point"), np.zeros(scale.shape, np.int8)),
    ]
    if form == "int8":
        quantized: gs.Tensor = gs.Constant(names.tensor(f"{name}/int8"), codes)
    else:
        if given:
            rounded = dequantize(codes, scale.astype(np.float32), axis=axis).astype(dtype)
            tensor = gs.Constant(names.tensor(f"{name}/rounded"), rounded)
        quantized = _quantize_node(graph, names, tensor, constants, name, axis)
    return _dequantize(graph, names, quantized, constants, name, dtype, axis)


def _fitting(wanted: NDArray[np.float32], dtype: np.dtype) -> NDArray:
    """A weight's scales in its dtype, > 0: the nearest, or the next above where that would cut off the
    largest weights. Below 6e-5 float16 has few bits."""
    scale = wanted.astype(dtype)
    cuts = scale.astype(np.float32) * (INT8_MAX + 0.5) < wanted * INT8_MAX
    return np.where(cuts, np.nextafter(scale, np.array(np.inf, dtype)), scale)


def _quantize_node(
    graph: gs.Graph,
    names: Names,
    tensor: gs.Tensor,
    constants: list[gs.Constant],
    name: str,
    axis: int | None = None,
) -> gs.Variable:
    output = gs.Variable(names.tensor(f"{name}/quantized"), dtype=np.int8, shape=tensor.shape)
    attrs = {} if axis is None else {"axis": axis}
    node = names.node(f"{name}/QuantizeLinear")
    graph.nodes.append(gs.Node("QuantizeLinear", node, attrs, [tensor, *constants], [output]))
    return output


def _dequantize(
    graph: gs.Graph,
    names: Names,
    quantized: gs.Tensor,
    constants: list[gs.Constant],
    name: str,
    dtype: np.dtype,
    axis: int | None = None,
) -> gs.Variable:
    output = gs.Variable(names.tensor(f"{name}/dequantized"), dtype=dtype, shape=quantized.shape)
    attrs = {} if axis is None else {"axis": axis}
    node = names.node(f"{name}/DequantizeLinear")
    graph.nodes.append(gs.Node("DequantizeLinear", node, attrs, [quantized, *constants], [output]))
    return output
