"""Ends in integers: model inputs and outputs that are 8-bit codes, and how the host makes and reads them.

A quantized input usually begins with a QuantizeLinear, a kernel that reads four bytes for every one that
the engine goes on with. Where the model's input is the codes themselves, that kernel and the bytes are gone,
and the host computes `clip(rint(x / scale), -128, 127)`. An image may be the input as it is: the engine
scales and normalizes its pixels in the kernel that quantizes them.

What codes stand for can be read from a model (`codes_of`): from the constants of the DequantizeLinear or the
normalization behind an input, and of the QuantizeLinear in front of an output. So whoever runs such a model
may feed it floats and gets floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.graph.codes import Code, Image
from trtq.graph.names import Names
from trtq.graph.place import only_moved, readers
from trtq.graph.surgery import cleaned, in_order


@dataclass(frozen=True)
class Ends:
    """What a delivered model's inputs and outputs are, beside those that stay as the model has them.

    Attributes:
        int8: the float inputs that are quantized first of all become int8.
        images: input -> how it is made of pixels; it becomes uint8.
        outputs: output -> scale; it becomes int8.
    """

    int8: bool = False
    images: Mapping[str, Image] = field(default_factory=dict)
    outputs: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.int8 or bool(self.images) or bool(self.outputs)

    def given_to(self, graph: gs.Graph) -> gs.Graph:
        """A Q/DQ graph, which is changed, with these ends."""
        names = Names(graph)
        for tensor in list(graph.inputs):
            if tensor.name in self.images:
                _take_pixels(graph, names, tensor, self.images[tensor.name])
            elif self.int8 and why_float(graph, tensor) is None:
                _take_codes(graph, names, tensor)
        for tensor in list(graph.outputs):
            if tensor.name in self.outputs and tensor.dtype == np.float32:
                _give_codes(graph, names, tensor, self.outputs[tensor.name])
        return in_order(cleaned(graph))


def why_float(graph: gs.Graph, tensor: gs.Tensor) -> str | None:
    """Why an input of a Q/DQ graph does not become int8; None where it does: all that reads it quantizes it
    first, moved or not, by one scale."""
    if tensor.dtype not in (np.dtype(np.float32), np.dtype(np.float16)):
        return f"it is {np.dtype(tensor.dtype)}"
    quantizers: list[gs.Node] = []
    for reader in _first_to_compute(tensor):
        if reader.op != "QuantizeLinear":
            return f"{reader.name} ({reader.op}) reads it in floating point"
        quantizers.append(reader)
    if any(each in graph.outputs for each in _moved(tensor)):
        return "it is an output, too"
    scales = {_scalar(node) for node in quantizers}
    if not quantizers or None in scales:
        return "nothing quantizes it"
    return None if len(scales) == 1 else "it is quantized by different scales"


def codes_of(graph: onnx.GraphProto) -> dict[str, Code]:
    """Input or output of a model -> what its 8-bit numbers stand for, as far as the constants beside it say.

    Inputs: int8 that only DequantizeLinear of one scale read, and uint8 that are cast and normalized.
    Outputs: int8 that a QuantizeLinear makes. Zero-points other than 0 are not looked at.
    """
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    int8 = {name for name, kind in kinds.items() if kind == onnx.TensorProto.INT8}
    uint8 = {v.name for v in graph.input if kinds[v.name] == onnx.TensorProto.UINT8}
    if not int8 | uint8:
        return {}
    values = _Constants(graph)
    found: dict[str, Code] = {}
    inputs = {v.name for v in graph.input}
    for name in int8 & inputs:
        nodes = [node for node in graph.node if name in node.input]
        scales = {values.quantizer(node) if node.op_type == "DequantizeLinear" else None for node in nodes}
        if len(scales) == 1 and None not in scales:
            found[name] = _int8(scales.pop())
    for node in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        if node.output[0] in int8 - inputs and (scale := values.quantizer(node)) is not None:
            found[node.output[0]] = _int8(scale)
    for name in uint8:
        if (code := _pixels_of(graph, values, name)) is not None:
            found[name] = code
    return found


def _int8(scale: float | None) -> Code:
    assert scale is not None
    return Code("int8", np.array(scale, np.float32), np.zeros((), np.float32))


class _Constants:
    """The values of a graph's constants, by name."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self._tensors[node.output[0]] = node.attribute[0].t

    def of(self, name: str) -> NDArray | None:
        tensor = self._tensors.get(name)
        if tensor is None or onnx.external_data_helper.uses_external_data(tensor):
            return None
        return onnx.numpy_helper.to_array(tensor)

    def quantizer(self, node: onnx.NodeProto) -> float | None:
        """The one scale of a (de)quantizer with zero-point 0 of int8."""
        scale = self.of(node.input[1])
        point = self.of(node.input[2]) if len(node.input) > 2 else None
        if scale is None or scale.size != 1 or (point is not None and point.any()):
            return None
        return float(scale.reshape(-1)[0])


def _pixels_of(graph: onnx.GraphProto, values: _Constants, name: str) -> Code | None:
    """What the pixels of a uint8 input stand for: behind its Cast come Mul, Sub and Div by constants."""
    scale, offset = np.ones((), np.float64), np.zeros((), np.float64)
    nodes = [node for node in graph.node if name in node.input]
    if len(nodes) != 1 or nodes[0].op_type != "Cast":
        return None
    while True:
        nodes = [node for node in graph.node if nodes[0].output[0] in node.input]
        steps = ("Mul", "Sub", "Div")
        constant = values.of(nodes[0].input[1]) if len(nodes) == 1 and nodes[0].op_type in steps else None
        if constant is None:
            return Code("uint8", scale.astype(np.float32), offset.astype(np.float32))
        number = constant.astype(np.float64)
        match nodes[0].op_type:
            case "Mul":
                scale, offset = scale * number, offset * number
            case "Sub":
                offset = offset - number
            case _:
                scale, offset = scale / number, offset / number


def _moved(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
    """A tensor, and those that only hold its values, moved or in another floating-point type."""
    yield tensor
    for node in readers(tensor):
        if node.inputs[0] is tensor and (node.op == "Cast" or only_moved(node.outputs[0])):
            yield from _moved(node.outputs[0])


def _first_to_compute(tensor: gs.Tensor) -> Iterator[gs.Node]:
    """The nodes that do something to a tensor's values but move or cast them."""
    moved = list(_moved(tensor))
    for each in moved:
        for node in readers(each):
            if not any(output is other for output in node.outputs for other in moved):
                yield node


def _scalar(quantizer: gs.Node) -> float | None:
    """The one scale of a quantizer to int8 with zero-point 0."""
    scale, *point = quantizer.inputs[1:3]
    if not isinstance(scale, gs.Constant) or scale.values.size != 1:
        return None
    if not point or not isinstance(point[0], gs.Constant) or point[0].values.dtype != np.int8:
        return None
    return None if point[0].values.any() else float(scale.values.reshape(-1)[0])


def _take_codes(graph: gs.Graph, names: Names, tensor: gs.Tensor) -> None:
    """Let an input be int8: what quantized it reads it as it is, and what moves it gets it dequantized, in
    the type of the scale, whatever the types between were."""
    moved, quantizers = list(_moved(tensor)), list(_first_to_compute(tensor))
    scale, point = quantizers[0].inputs[1:3]
    for value in moved[1:]:
        if value.inputs[0].op == "Cast":
            _replace(value, value.inputs[0].inputs[0])
        value.dtype = scale.values.dtype
    tensor.dtype = np.dtype(np.int8)
    plain = gs.Variable(names.tensor(f"{tensor.name}/dequantized"), scale.values.dtype, tensor.shape)
    for node in readers(tensor):
        if node.op == "QuantizeLinear":
            _replace(node.outputs[0], tensor)
        else:
            node.inputs[0] = plain
    for node in quantizers:
        node.inputs = [node.inputs[0], scale, point]
    name = names.node(f"{tensor.name}/DequantizeLinear")
    graph.nodes.append(gs.Node("DequantizeLinear", name, {}, [tensor, scale, point], [plain]))


def _take_pixels(graph: gs.Graph, names: Names, tensor: gs.Tensor, image: Image) -> None:
    """Let an input be uint8: it is cast, scaled and normalized, in the order in which preprocessing does."""
    floats = np.dtype(np.float32)
    value = gs.Variable(names.tensor(f"{tensor.name}/pixels"), floats, tensor.shape)
    _replace(tensor, value)
    attributes = {"to": onnx.TensorProto.FLOAT}
    graph.nodes.append(gs.Node("Cast", names.node(f"{value.name}/Cast"), attributes, [tensor], [value]))
    tensor.dtype = np.dtype(np.uint8)
    for op, number in (("Mul", image.factor), ("Sub", image.mean), ("Div", image.std)):
        constant = gs.Constant(names.tensor(f"{tensor.name}/{op}"), np.array(number, np.float32))
        after = gs.Variable(names.tensor(f"{tensor.name}/{op}/out"), floats, tensor.shape)
        _replace(value, after)
        graph.nodes.append(gs.Node(op, names.node(after.name), {}, [value, constant], [after]))
        value = after


def _give_codes(graph: gs.Graph, names: Names, tensor: gs.Tensor, scale: float) -> None:
    """Let an output be int8: a QuantizeLinear makes it, in the type in which it is computed."""
    source = tensor
    made = tensor.inputs[0] if tensor.inputs else None
    if made is not None and made.op == "Cast" and not tensor.outputs and made.inputs[0].dtype == np.float16:
        source = made.inputs[0]
    held = np.array(scale, source.dtype)
    if not held > 0:
        return
    constants = [
        gs.Constant(names.tensor(f"{tensor.name}/scale"), held),
        gs.Constant(names.tensor(f"{tensor.name}/zero_point"), np.zeros((), np.int8)),
    ]
    codes = gs.Variable(tensor.name, np.dtype(np.int8), tensor.shape)
    if source is tensor:
        tensor.name = names.tensor(f"{tensor.name}/plain")
    graph.outputs[graph.outputs.index(tensor)] = codes
    node = names.node(f"{codes.name}/QuantizeLinear")
    graph.nodes.append(gs.Node("QuantizeLinear", node, {}, [source, *constants], [codes]))


def _replace(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let all that reads a tensor read another one."""
    for reader in list(old.outputs):
        reader.inputs = [new if tensor is old else tensor for tensor in reader.inputs]
