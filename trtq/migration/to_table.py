"""The calibration table of a Q/DQ model of any origin; its float32 scales keep their bits."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

import trtq
from trtq.calibration.table import Table
from trtq.errors import InputError
from trtq.graph.evaluate import fold_constants
from trtq.graph.model import QDQ_OPS, Model
from trtq.graph.place import FLOATS
from trtq.graph.surgery import copied, in_order


def table_of(model: Model) -> Table:
    """The table of a Q/DQ model of any origin: one row for each activation that is quantized.

    A row is named like the fp32 model's tensor: the one in front of QuantizeLinear and of a cast, as trtq
    puts it into models in half, or the model output behind Q/DQ. Scales keep their bits; float16 is widened.
    uint8 with zero-point 128 is int8 with zero-point 0; uint8 with zero-point 0 reaches up to 255 x scale,
    which the row covers with a scale of 255 / 127 of it.

    Args:
        model: as loaded; not changed.

    Raises:
        InputError: the model has no quantized activation, or one with a per-channel scale, another
            zero-point, another type than 8-bit integers, a scale that is not a positive finite constant, or
            two scales.
    """
    graph = copied(model.graph)
    fold_constants(graph)
    activations = _activations(graph)
    scales: dict[str, np.float32] = {}
    for node in graph.nodes:
        if node.op != "QuantizeLinear" or node.inputs[0].name not in activations:
            continue
        name, scale = _original_name(node, graph), _scale_of(node, model)
        if scales.setdefault(name, scale) != scale:
            raise _refused(model, name, f"it is quantized with two scales, {scales[name]} and {scale}")
    if not scales:
        raise InputError(
            "the model has no quantized activations",
            file=model.path,
            cause="no QuantizeLinear reads a tensor that depends on the model's inputs",
            remedy="give a Q/DQ model",
        )
    source = {"method": "from Q/DQ", "source": model.path.name, "source_sha256": model.sha256}
    return Table(scales, metadata={**source, "trtq": trtq.__version__})


def _original_name(quantizer: gs.Node, graph: gs.Graph) -> str:
    """The name that the quantized tensor has in the fp32 model."""
    outputs = {tensor.name for tensor in graph.outputs}
    for consumer in quantizer.outputs[0].outputs:
        if consumer.op == "DequantizeLinear" and consumer.outputs[0].name in outputs:
            return consumer.outputs[0].name  # the tensor in front of an output's Q/DQ is renamed
    tensor = quantizer.inputs[0]
    while tensor.inputs:
        node = tensor.inputs[0]
        cast = node.op == "Cast" and node.inputs[0].dtype in FLOATS
        if not cast and node.op not in QDQ_OPS:
            break
        tensor = node.inputs[0]
    return tensor.name


def _activations(graph: gs.Graph) -> set[str]:
    """Names of the tensors that depend on a model input; the others are weights, perhaps behind operators."""
    names = {tensor.name for tensor in graph.inputs}
    for node in in_order(graph).nodes:
        if any(tensor.name in names for tensor in node.inputs):
            names.update(tensor.name for tensor in node.outputs)
    return names


def _scale_of(node: gs.Node, model: Model) -> np.float32:
    """The symmetric int8 scale of a QuantizeLinear."""
    name = node.inputs[0].name
    scale, *zero_points = node.inputs[1:]
    zero_point = next((t for t in zero_points if t.name), None)
    if not all(isinstance(t, gs.Constant) for t in (scale, zero_point) if t is not None):
        raise _refused(model, name, "its scale or zero-point is computed, not a constant")
    if scale.values.size != 1:
        cause = f"it has {scale.values.size} scales; TensorRT quantizes activations per tensor"
        raise _refused(model, name, cause)
    zeros = np.zeros((), np.uint8) if zero_point is None else zero_point.values
    value, zero = scale.values.astype(np.float32).reshape(()), zeros.reshape(-1)[0]
    if zeros.dtype not in (np.int8, np.uint8):
        raise _refused(model, name, f"it is quantized to {zeros.dtype}, not to 8-bit integers")
    if not (np.isfinite(value) and value > 0):
        raise _refused(model, name, f"its scale is {value}, not a positive finite number")
    if zero not in ((0,) if zeros.dtype == np.int8 else (0, 128)):
        raise _refused(model, name, f"its zero-point is {zero}; TensorRT quantizes symmetrically")
    if zeros.dtype == np.uint8 and zero == 0:
        return np.float32(np.float64(value) * 255 / 127)
    return np.float32(value)


def _refused(model: Model, tensor: str, cause: str) -> InputError:
    return InputError(
        f"the quantizer of '{tensor}' cannot be a row of a calibration table",
        file=model.path,
        cause=cause,
        remedy="quantize activations symmetrically, per tensor, to int8",
    )
