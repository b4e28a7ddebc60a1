"""What a compiled engine really runs: from the builder's log without a GPU, or from the engine inspector.

With `ProfilingVerbosity.DETAILED` and a VERBOSE logger, TensorRT for RTX logs one message that begins
with ``Layers:`` and has one line per step of the compiled graph::

    Name: /conv1/Conv_myl0_2, LayerType: correlation, Inputs: [ { Name: x, Dimensions: [-1,4,32,32],
    Strides: [...], StrideOrder: [...], Datatype: Int8, Format: (NHWC) Channel major format }],
    Constants: [ ... ], Outputs: [ ... ], TacticName: ..., StreamId: 0,
    Metadata: [ONNX Layer: /conv1/Conv]<0x1F>[ONNX Layer: input_DQ]

`LayerType` is `correlation` (convolution), `gemm`, `deconv`, `runtime_fusion` (a floating-point
convolution or matmul with its neighbours), `kgen` (a generated kernel: pointwise, softmax, or fused
attention when its name begins with `_gemm`), `avgpool`, `maxpool`, ..., and for what is not a kernel
`shape_call`, `signal`, `wait`.

TensorRT proper logs no such message; its engine inspector gives JSON, which needs the engine on a GPU
(`parse_inspection`). Beside the kinds above, for what it compiles as one region, it has kinds of its own:
`CaskConvolution`, `CaskGemmConvolution`, `CudaDepthwiseConvolution`, `CaskDeconvolutionV2`,
`PointWiseV2`, `Reformat`, `NoOp`, ...
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from trtq.files import decode

HEADER = "Layers:\n"
"""How the builder's message begins."""

_BITS = {
    "Int64": 64,
    "Float": 32,
    "Int32": 32,
    "Half": 16,
    "BFloat16": 16,
    "Int8": 8,
    "UInt8": 8,
    "Bool": 8,
    "FP8": 8,
    "Int4": 4,
    "FP4": 4,
}

UNKNOWN = "Unknown"
"""The datatype that the engine inspector does not tell: of tensors with dynamic shapes, and some formats."""

_INSPECTED = {
    **{name.lower(): name for name in _BITS},
    **{"fp32": "Float", "fp16": "Half", "bf16": "BFloat16"},
}
"""Datatypes in the engine inspector's words, of all versions and in lower case -> ours."""

_UNTOLD = ("N/A", "Unknown")
"""How the phrases begin that stand where the engine inspector tells neither format nor datatype."""

_REGION_KINDS = ("correlation", "gemm", "deconv", "runtime_fusion")
_CONVERSION = re.compile("(MulMinMaxRounCast|CastMul|Cast|Move|Resh|Tran|Repl|Conc)+")
"""Names of generated kernels are their steps: here quantize, dequantize, and moving data."""

_LAYER_KINDS = re.compile(r"conv|gemm|matrixmultiply", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class CompiledTensor:
    """A tensor that a kernel reads or writes.

    Attributes:
        name: TensorRT's name for it; network inputs and outputs keep their ONNX names.
        dims: its dimensions, -1 where dynamic. An axis that TensorRT made by merging the dynamic one
            with others (batch x heads) shows as -1 too.
        datatype: TensorRT's word: Float, Half, BFloat16, Int8, Int32, Int64, Bool, ...; or `UNKNOWN`.
        format: memory layout in TensorRT's words, such as "(NHWC) Channel major format".
    """

    name: str
    dims: tuple[int, ...]
    datatype: str
    format: str

    def size(self, dynamic: int) -> int:
        """Size in bytes with every dynamic dimension set to `dynamic`."""
        return self.bytes_of(self.elements(dynamic))

    def elements(self, dynamic: int) -> int:
        """Number of elements with every dynamic dimension set to `dynamic`."""
        return math.prod(dynamic if d < 0 else d for d in self.dims)

    def bytes_of(self, elements: int) -> int:
        """Size in bytes of some of its elements; of an unknown datatype at most, as if of 32 bits."""
        return math.ceil(elements * _BITS.get(self.datatype, 32) / 8)


@dataclasses.dataclass(frozen=True)
class CompiledLayer:
    """One step of the compiled graph; `onnx_nodes` are the ONNX nodes it came from (TensorRT's metadata).

    A node without a name in the ONNX file appears as `node_of_<its first output>`.
    """

    name: str
    kind: str
    inputs: tuple[CompiledTensor, ...]
    constants: tuple[CompiledTensor, ...]
    outputs: tuple[CompiledTensor, ...]
    onnx_nodes: tuple[str, ...]

    @property
    def launches(self) -> bool:
        """Whether it is a kernel on the GPU.

        A kernel writes something. Steps without an output are host-side bookkeeping: `shape_call`
        computes dynamic shapes, `signal` and `wait` order the streams. `NoOp` and `Constant` are layers
        of the network that TensorRT needs no kernel for.
        """
        return bool(self.outputs) and self.kind not in ("NoOp", "Constant")

    def bytes_moved(self, dynamic: int) -> int:
        """Bytes of its inputs, constants and outputs with every dynamic dimension set to `dynamic`.

        What gathers rows of a table (an embedding) reads no more elements of it than it writes altogether.
        """
        moved = sum(tensor.size(dynamic) for tensor in self.inputs + self.outputs)
        most = max((tensor.elements(dynamic) for tensor in self.outputs), default=0)
        for constant in self.constants:
            read = constant.elements(dynamic)
            moved += constant.bytes_of(min(read, most) if self._gathers else read)
        return moved

    @property
    def _gathers(self) -> bool:
        return "Gath" in self.name if self.kind == "kgen" else self.kind == "Gather"

    @property
    def computes(self) -> bool:
        """Whether it does the multiply-accumulates of the convolutions or matmuls among its nodes.

        Pointwise kernels name those nodes too (for a bias, an activation, a padding), but do not.
        """
        fused = self.kind == "kgen" and self.name.startswith("_gemm")
        fused |= self.kind == "fusion" and "Fc" in self.name
        return fused or self.kind in _REGION_KINDS or _LAYER_KINDS.search(self.kind) is not None

    @property
    def int8(self) -> bool:
        """Whether it multiplies INT8 by INT8.

        - `correlation`, `gemm`: both operands are Int8, be they inputs or constants (the scales are
          Float constants).
        - fused attention (`_gemm...`): query, key and value are all three Int8. TensorRT fuses INT8
          attention only when the softmax is quantized as well, so this stands for both matmuls.
        - `deconv`, `runtime_fusion`: never. A fusion may read Int8 on both sides, but it casts to
          floating point before it multiplies (`CastMulFc`).
        - layers of TensorRT proper: both operands are Int8, as above. Where the types of the inputs are
          not told, Int8 weights say so: weights of a floating-point kernel are dequantized when it is built.
        """
        operands = [tensor.datatype for tensor in self.inputs + self.constants]
        if not self.computes or self.kind in ("deconv", "runtime_fusion"):
            return False
        if UNKNOWN in operands:
            return any(constant.datatype == "Int8" for constant in self.constants)
        return operands.count("Int8") >= (3 if self.kind == "kgen" else 2)

    @property
    def converts(self) -> bool:
        """Whether it does nothing but change datatype or layout: Q/DQ and reformats that fused with nothing.

        `Reformat` layers of TensorRT proper, and generated kernels of RTX whose name lists only the
        steps of a (de)quantization and of moving data. Fused Q/DQ are not listed: they cost nothing.
        """
        if self.kind == "Reformat":
            return True
        steps = self.name.removeprefix("__myl_").partition("_myl")[0]
        return self.kind == "kgen" and _CONVERSION.fullmatch(steps) is not None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiled graph of an engine.

    Attributes:
        layers: its steps, in the order they are issued.
        batch: the batch size of the optimization profile's optimum, 1 for a static model.
        unread: lines of the message that could not be read; not counted anywhere. Not empty: what is said
            here about the engine is incomplete.
    """

    layers: tuple[CompiledLayer, ...]
    batch: int = 1
    unread: tuple[str, ...] = ()

    @property
    def kernels(self) -> int:
        """How many kernels one inference launches (see `CompiledLayer.launches`)."""
        return sum(layer.launches for layer in self.layers)

    def bytes_moved(self, batch: int | None = None) -> int:
        """Estimated bytes that one inference reads and writes: each kernel's inputs, constants and outputs.

        Every dynamic dimension counts as `batch` (default: the optimum of the profile), so the figure is
        exact for tensors whose only dynamic axis is the batch, and low where the batch was merged with
        other axes (attention heads) or where another axis is dynamic as well. An engine built with
        min = opt = max has no dynamic dimension and nothing to estimate. Caches are not modelled.
        """
        dynamic = self.batch if batch is None else batch
        return sum(layer.bytes_moved(dynamic) for layer in self.layers if layer.launches)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `from_json` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Compiled:
        """The inverse of `to_json`.

        Raises:
            ValueError: it is not what `to_json` made.
        """
        return decode(value, cls)


def int8_nodes(layers: Iterable[CompiledLayer], nodes: Iterable[str]) -> frozenset[str]:
    """Which of `nodes` (names of Conv, ConvTranspose, Gemm and MatMul nodes) execute in INT8.

    A node is INT8 when some kernel computes it and every kernel that does multiplies INT8 by INT8.
    A node that no kernel names (folded away, or renamed because its name was empty) is not. Names must be
    unique in the model: TensorRT reports two nodes of one name under that name.
    """
    computing: dict[str, bool] = {}
    for layer in layers:
        if layer.computes:
            for node in layer.onnx_nodes:
                computing[node] = computing.get(node, True) and layer.int8
    return frozenset(node for node in nodes if computing.get(node, False))


def parse_layers(message: str, batch: int = 1) -> Compiled:
    """Read the builder's ``Layers:`` message.

    Names may hold almost anything (commas, colons, brackets, newlines), so brackets are not trusted:
    the fields come in a fixed order and each is read up to the marker that must follow it.

    Args:
        message: the whole message, beginning with `HEADER`; any other text counts as unread.
        batch: recorded in the result.
    """
    if not message.startswith(HEADER):
        return Compiled((), batch, (message,))
    body, _, _ = message.removeprefix(HEADER).partition("\n\nI/O Tensors:")
    layers, unread = [], []
    for line in re.split(r"^(?=Name: )", body, flags=re.MULTILINE):
        if not line.strip():
            continue
        try:
            layers.append(_read_layer(_Reader(line.removesuffix("\n"))))
        except ValueError:
            unread.append(line)
    return Compiled(tuple(layers), batch, tuple(unread))


def parse_inspection(text: str, batch: int = 1) -> Compiled:
    """Read the engine inspector's JSON (`LayerInformationFormat.JSON`) of an engine built DETAILED.

    Up to TensorRT 10 a tensor has `Format/Datatype`, a phrase that names both ("Row major linear FP32"), or
    says that they depend on the shapes ("N/A due to dynamic shapes"); from 11 on it has `Datatype` and
    `Format`. Weights and biases become the layer's constants, with their count as dimensions.

    Args:
        batch: recorded in the result.

    Raises:
        ValueError: it is not JSON with a list of layers.
    """
    value = json.loads(text)
    if not isinstance(value, dict) or not isinstance(value.get("Layers"), list):
        raise ValueError("the engine inspector's output has no list 'Layers'")
    read = [(layer, _inspected_layer(layer)) for layer in value["Layers"]]
    return Compiled(
        layers=tuple(layer for _, layer in read if layer is not None),
        batch=batch,
        unread=tuple(json.dumps(raw) for raw, layer in read if layer is None),
    )


def onnx_layers(metadata: str) -> tuple[str, ...]:
    """ONNX node names in a layer's metadata: `[ONNX Layer: a]<0x1F>[ONNX Layer: b]`, other separators too."""
    return tuple(re.findall(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\s]*(?:\[ONNX Layer: |$))", metadata))


def named_nodes(name: str) -> tuple[str, ...]:
    """The ONNX nodes that a layer's name lists: TensorRT before 8.6 has no metadata.

    What is fused is joined by `+`, what runs side by side by `||`, and pointwise nodes stand in PWN(...), one
    within the other: `PWN(PWN(sigmoid), mul)`.
    """
    parts = (part.strip() for part in re.split(r" \+ | \|\| |, ", name.replace("PWN(", "")))
    return tuple(part.rstrip(")") if part.count(")") > part.count("(") else part for part in parts)


def _inspected_layer(layer: Any) -> CompiledLayer | None:
    """A layer of the engine inspector, or None if it is not as expected."""
    try:
        constants = [
            CompiledTensor(key.lower(), (int(layer[key]["Count"]),), _datatype(layer[key]["Type"]), "")
            for key in ("Weights", "Bias", "ConvWeights", "ConvBias")
            if layer.get(key, {}).get("Count")
        ]
        return CompiledLayer(
            name=layer["Name"],
            kind=layer["LayerType"],
            inputs=tuple(_inspected_tensor(t) for t in layer["Inputs"]),
            constants=(*constants, *(_inspected_tensor(t) for t in layer.get("Constants", ()))),
            outputs=tuple(_inspected_tensor(t) for t in layer["Outputs"]),
            onnx_nodes=onnx_layers(layer["Metadata"]) if "Metadata" in layer else named_nodes(layer["Name"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _inspected_tensor(tensor: dict[str, Any]) -> CompiledTensor:
    phrase = tensor.get("Format/Datatype") or tensor.get("Datatype") or tensor["DataType"]
    dims = tuple(int(d) for d in tensor["Dimensions"])
    return CompiledTensor(tensor["Name"], dims, _datatype(phrase), tensor.get("Format", phrase))


def _datatype(phrase: str) -> str:
    """The datatype that a phrase of the engine inspector names, or `UNKNOWN` where it says that it cannot.

    Raises:
        ValueError: it names none.
    """
    if phrase.startswith(_UNTOLD):
        return UNKNOWN
    known = [_INSPECTED[word] for word in re.findall(r"\w+", phrase.lower()) if word in _INSPECTED]
    if not known:
        raise ValueError(f"no datatype in {phrase!r}")
    return known[0]


class _Reader:
    """A cursor over one line."""

    def __init__(self, text: str) -> None:
        self.rest = text

    def skip(self, marker: str) -> bool:
        """Step over `marker` if it is next."""
        found = self.rest.startswith(marker)
        self.rest = self.rest.removeprefix(marker)
        return found

    def until(self, marker: str) -> str:
        """The text up to `marker`, which is stepped over."""
        text, found, self.rest = self.rest.partition(marker)
        if not found:
            raise ValueError(f"{marker!r} expected")
        return text


def _read_layer(reader: _Reader) -> CompiledLayer:
    reader.skip("Name: ")
    name = reader.until(", LayerType: ")
    kind = reader.until(", Inputs: [")
    inputs = _read_tensors(reader, "], Constants: [")
    constants = _read_tensors(reader, "], Outputs: [")
    outputs = _read_tensors(reader, "], TacticName: ")
    reader.until(", Metadata: ")
    nodes = reader.rest.split("\x1f") if reader.rest else []
    onnx_nodes = tuple(node[len("[ONNX Layer: ") : -1] for node in nodes if node.startswith("[ONNX Layer: "))
    return CompiledLayer(name, kind, inputs, constants, outputs, onnx_nodes)


def _read_tensors(reader: _Reader, end: str) -> tuple[CompiledTensor, ...]:
    """The tensors of a list ` { Name: ..., ... }, { ... }`, up to and over `end`."""
    tensors: list[CompiledTensor] = []
    while not reader.skip(end):
        reader.until("{ Name: ")
        name = reader.until(", Dimensions: [")
        dims = reader.until("], ")
        reader.until("Datatype: ")
        datatype = reader.until(", Format: ")
        tensor = CompiledTensor(
            name, tuple(int(d) for d in dims.split(",") if d), datatype, reader.until(" }")
        )
        if datatype not in _BITS:
            raise ValueError(f"datatype {datatype!r} is unknown")
        tensors.append(tensor)
    return tuple(tensors)
