"""Weights of large models stay in their file until they are asked for, one at a time.

Such a constant holds `FileValues`: a tensor of ONNX's external-data kind, in the model's external data
or in the `.onnx` file itself. ONNX Runtime maps the same file, so no copy of the weights is made on the way.

Protobuf has no lazy fields, hence the few functions here that walk its wire format. A model of 480 MB in one
file takes 67 MB of memory at most to read and 90 MB to read and write again. With `onnx.load` and `onnx.save`
it is 1.0 and 1.5 GB (1.0 GB with external data), with `onnx_ir` 1.0 and 2.0 GB (1.0 GB): both parse the whole
file first.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from trtq.graph.surgery import copied

IN_MEMORY = 1 << 28
"""Files up to this size are read whole."""

_ALIGNMENT = 64
"""Alignment of weights in a file of their own, in bytes."""

_SMALL = 1 << 16
"""Weights below this many bytes, shapes among them, are always read."""


BITS = {
    **dict.fromkeys((onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1), 4),
    **{kind: 2 for name, kind in onnx.TensorProto.DataType.items() if name in ("INT2", "UINT2")},
}
"""Types smaller than a byte; several values share one."""


class FileValues(LazyValues):
    """Values of a constant that are read from a file whenever they are asked for.

    Args:
        tensor: external; offsets and lengths are those in its file.
        folder: where that file is.
    """

    def __init__(self, tensor: onnx.TensorProto, folder: Path) -> None:
        super().__init__(tensor)
        self.folder = folder

    def load(self) -> NDArray:
        """The values, from the file."""
        info = ExternalDataInfo(self.tensor)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.tensor.data_type)
        shape = tuple(self.tensor.dims)
        return np.fromfile(self.folder / info.location, dtype, prod(shape), offset=info.offset or 0).reshape(
            shape
        )


@dataclass(frozen=True)
class Light:
    """A serialized model without its large weights, and the folder of the files that these are in."""

    model: bytes
    folder: Path


def values_of(constant: gs.Constant) -> NDArray:
    """A constant's values; unlike `constant.values` this does not keep what had to be read for it."""
    stored = constant._values
    return stored.load() if isinstance(stored, LazyValues) else stored


def files_of(graph: gs.Graph) -> dict[str, FileValues]:
    """The constants of a graph whose values are in files."""
    return {
        name: tensor._values
        for name, tensor in graph.tensors().items()
        if isinstance(tensor, gs.Constant) and isinstance(tensor._values, FileValues)
    }


def read_light(path: Path) -> onnx.ModelProto:
    """An ONNX file; where it is large, its large weights become external data in the file itself.

    Raises:
        ValueError, OSError, google.protobuf.message.DecodeError: not an ONNX file, or a truncated one.
    """
    if path.stat().st_size <= IN_MEMORY:
        return onnx.load(path, load_external_data=False)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        rest, graphs = _split(data, 0, len(data), onnx.ModelProto, "graph")
        model = onnx.ModelProto.FromString(rest)
        for start, end in graphs:
            rest, tensors = _split(data, start, end, onnx.GraphProto, "initializer")
            model.graph.MergeFromString(rest)
            for span in tensors:
                model.graph.initializer.append(_light_tensor(data, *span, path.name))
        return model


def nbytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's values as `raw_data` and external data hold them."""
    count = prod(tensor.dims)
    if bits := BITS.get(tensor.data_type):
        return -(-count * bits // 8)
    return count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def load_small(proto: onnx.ModelProto, folder: Path) -> None:
    """Read, in place, all external values except the large initializers of the model's main graph.

    Raises:
        OSError: a file cannot be read.
    """
    keep = not proto.functions and not any(
        a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
        for node in proto.graph.node
        for a in node.attribute
    )
    large = [
        tensor
        for tensor in proto.graph.initializer
        if keep and uses_external_data(tensor) and tensor.data_type not in BITS and nbytes(tensor) >= _SMALL
    ]
    kept = {id(tensor) for tensor in large}
    for tensor in onnx.external_data_helper._get_all_tensors(proto):
        if uses_external_data(tensor) and id(tensor) not in kept:
            inline(tensor, folder)


def inline(tensor: onnx.TensorProto, folder: Path) -> None:
    """Read an external tensor's values into it; the door has seen that they are there."""
    info = ExternalDataInfo(tensor)
    with (folder / info.location).open("rb") as file:
        file.seek(info.offset or 0)
        tensor.raw_data = file.read(nbytes(tensor))
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]


def leave_in_files(graph: gs.Graph, folder: Path) -> None:
    """Make the external constants of an imported graph `FileValues`."""
    for constant in [t for t in graph.tensors().values() if isinstance(t, gs.Constant)]:
        stored = constant._values
        if type(stored) is LazyValues and uses_external_data(stored.tensor):
            constant._values = FileValues(stored.tensor, folder)
            constant.data_location = None  # GraphSurgeon would write it beside other values


def export_light(graph: gs.Graph) -> tuple[onnx.ModelProto, dict[str, gs.Constant]]:
    """The ONNX model of a graph whose initializers have no values yet, and the constants that have them.

    Constants of types that NumPy lacks, and those that bodies of control flow read, are complete.
    """
    graph = copied(graph)
    within = {name for body in graph.subgraphs(recursive=True) for name in body.tensors()}
    constants = {}
    for name, tensor in graph.tensors().items():
        if isinstance(tensor, gs.Constant) and name not in within and is_plain(tensor):
            constants[name] = tensor.copy()
            kind = onnx.helper.np_dtype_to_tensor_dtype(_dtype(tensor))
            bare = onnx.TensorProto(name=name, data_type=kind, dims=tensor.shape)
            tensor._values = LazyValues(bare)
    return gs.export_onnx(graph, do_type_check=False), constants


def graph_sha256(graph: gs.Graph) -> str:
    """Hash of a graph and all its weights, which are read one by one."""
    proto, constants = export_light(graph)
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True))
    for name in sorted(constants):
        digest.update(np.ascontiguousarray(values_of(constants[name])).data)
    return digest.hexdigest()


def is_number(dtype: np.dtype) -> bool:
    """Whether a dtype is one of NumPy's own numbers, unlike bfloat16, float8 and int4."""
    return dtype.isbuiltin == 1 and dtype.kind in "biuf"


def is_plain(constant: gs.Constant) -> bool:
    """Whether a constant holds NumPy's own numbers, whose bytes are those that ONNX stores.

    The values of others must not be asked for: GraphSurgeon would write them in another dtype.
    """
    return (
        is_number(_dtype(constant))
        and constant.export_dtype in (None, constant.dtype)
        and not isinstance(constant._values, SparseValues)
    )


def _dtype(constant: gs.Constant) -> np.dtype:
    stored = constant._values
    if isinstance(stored, LazyValues) and not isinstance(stored, SparseValues):
        return onnx.helper.tensor_dtype_to_np_dtype(stored.tensor.data_type)
    return np.dtype(stored.dtype)


def write_weights(
    proto: onnx.ModelProto, constants: Mapping[str, gs.Constant], file: BinaryIO, location: str
) -> None:
    """Write the values of a light model's initializers to a file of external data called `location`."""
    for tensor in proto.graph.initializer:
        if tensor.name in constants:
            values = np.ascontiguousarray(values_of(constants[tensor.name]))
            file.write(bytes(-file.tell() % _ALIGNMENT))
            _refer(tensor, location, file.tell(), values.nbytes)
            file.write(values.data)


def write_whole(proto: onnx.ModelProto, constants: Mapping[str, gs.Constant], file: BinaryIO) -> None:
    """Write a light model and the values of its initializers as one ONNX file."""
    heads = [tensor.SerializeToString(deterministic=True) for tensor in proto.graph.initializer]
    raws = [nbytes(tensor) if tensor.name in constants else 0 for tensor in proto.graph.initializer]
    names = [tensor.name for tensor in proto.graph.initializer]
    raw_tags = [_tag(onnx.TensorProto, "raw_data", raw) if raw else b"" for raw in raws]
    lengths = [sum(map(len, parts)) + raw for *parts, raw in zip(heads, raw_tags, raws, strict=True)]
    tags = [_tag(onnx.GraphProto, "initializer", length) for length in lengths]
    del proto.graph.initializer[:]
    nodes = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    file.write(proto.SerializeToString(deterministic=True))
    file.write(_tag(onnx.ModelProto, "graph", len(nodes) + sum(map(len, tags)) + sum(lengths)) + nodes)
    for name, tag, head, raw_tag in zip(names, tags, heads, raw_tags, strict=True):
        file.write(tag + head + raw_tag)
        if raw_tag:
            file.write(np.ascontiguousarray(values_of(constants[name])).data)


def _refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Make a tensor external."""
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _tag(message: type, field: str, length: int) -> bytes:
    """The bytes in front of a length-delimited field of `length` bytes (protobuf's wire format)."""
    result = bytearray()
    for number in (message.DESCRIPTOR.fields_by_name[field].number << 3 | 2, length):  # type: ignore[attr-defined]
        while number > 127:
            result.append(number & 127 | 128)
            number >>= 7
        result.append(number)
    return bytes(result)


def _light_tensor(data: mmap.mmap, start: int, end: int, location: str) -> onnx.TensorProto:
    rest, raw = _split(data, start, end, onnx.TensorProto, "raw_data")
    if len(raw) != 1 or raw[0][1] - raw[0][0] < _SMALL:
        return onnx.TensorProto.FromString(data[start:end])
    tensor = onnx.TensorProto.FromString(rest)
    first, last = raw[0]
    _refer(tensor, location, first, last - first)
    return tensor


def _split(
    data: mmap.mmap, start: int, end: int, message: type, field: str
) -> tuple[bytes, list[tuple[int, int]]]:
    """A message's bytes without the values of a length-delimited field, and where those are."""
    wanted = message.DESCRIPTOR.fields_by_name[field].number  # type: ignore[attr-defined]
    rest, spans = bytearray(), []
    for number, first, value, last in _fields(data, start, end):
        if number == wanted:
            spans.append((value, last))
        else:
            rest += data[first:last]
    return bytes(rest), spans


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, start, start of the value and end of every field (protobuf's wire format)."""
    position = start
    while position < end:
        tag, value = _varint(data, position)
        kind, length = tag & 7, 0
        if tag >> 3 == 0:
            raise ValueError(f"no protobuf field at byte {position}")
        if kind == 0:
            _, last = _varint(data, value)
        elif kind == 2:
            length, value = _varint(data, value)
            last = value + length
        elif kind in (1, 5):
            last = value + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"protobuf wire type {kind} at byte {position}")
        if last > end:
            raise ValueError("the file ends too early")
        yield tag >> 3, position, value, last
        position = last


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """A variable-length integer and the position after it."""
    result = shift = 0
    while True:
        byte = data[position]
        result |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return result, position
