"""Reading and writing ONNX models: everything that can be wrong with a model file is found here."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.version_converter
import onnx_graphsurgeon as gs
from onnx import AttributeProto
from onnx.helper import get_attribute_value
from onnx_graphsurgeon.logger.logger import G_LOGGER

from trtq.errors import InputError
from trtq.files import PathLike, atomic_path, sha256_bytes, sha256_file
from trtq.graph.door import read_model
from trtq.graph.foreign import (
    CONTRIB_DOMAIN,
    CONTRIB_OPSET,
    EARLY,
    all_nodes,
    bodies,
    import_domains,
    is_foreign,
    needs_reference,
)
from trtq.graph.inputs import InputSpec, guess_batch_axes
from trtq.graph.local import inline_functions
from trtq.graph.names import Names
from trtq.graph.products import is_quantizer, quantizers
from trtq.graph.references import named
from trtq.graph.weights import (
    Light,
    export_light,
    files_of,
    inline,
    leave_in_files,
    load_small,
    write_weights,
    write_whole,
)
from trtq.scratch import scratch_folder

if TYPE_CHECKING:
    from onnx import ModelProto

G_LOGGER.severity = G_LOGGER.CRITICAL + 1  # its messages are not for users; what is fatal is raised, too

LOWEST_OPSET = 13
"""Per-channel DequantizeLinear starts here."""

LOOKED_AT = 1024
"""Elements of the largest weight that ONNX's version converter is given the values of."""

FP16_SCALE_OPSET = 19
"""QuantizeLinear and DequantizeLinear take float16 scales from here on."""

PROTOBUF_LIMIT = 2**31 - 2**20
"""Models above this many bytes need their weights in a file of their own."""

_ASIDE = {"": "trtq.aside", "ai.onnx": "trtq.aside.ai.onnx"}
"""ONNX's domain, by both of its names -> that of operators which ONNX's version converter must not see."""

_LISTS = (AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS)

QDQ_OPS = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass
class Model:
    """An ONNX model as a GraphSurgeon graph.

    Attributes:
        path: the file it was read from.
        graph: every node has a unique name.
        sha256: hash of the file and of its external data.
        quantizers: the operators by which the model as read is quantized, also those in subgraphs.
        mended: the file holds what TensorRT's parser refuses, and the graph does not.
        fixed: inputs of the file that are constants in the graph (see `trtq.graph.fixed`).
    """

    path: Path
    graph: gs.Graph
    sha256: str
    quantizers: tuple[str, ...] = ()
    mended: bool = False
    fixed: tuple[InputSpec, ...] = ()

    @property
    def inputs(self) -> list[InputSpec]:
        """Each input of the file, with the batch axis that the model's shapes suggest."""
        specs = [InputSpec(t.name, np.dtype(t.dtype), tuple(t.shape)) for t in self.graph.inputs]
        return guess_batch_axes([*specs, *self.fixed], (tensor.shape for tensor in self.graph.outputs))

    @property
    def is_quantized(self) -> bool:
        """Whether another tool, or trtq, has quantized the model, in any of ONNX's ways."""
        return bool(self.quantizers)


def load_model(path: PathLike, *, opset: int = LOWEST_OPSET) -> Model:
    """Read an ONNX model, upgrade its opset where Q/DQ needs it, and give every node a unique name.

    Local functions are inlined, and inputs that are left out at a node's end are dropped; opsets below
    `opset` are converted to it, to `FP16_SCALE_OPSET` where the model computes in float16, and to what ONNX
    Runtime's fused operators become where it holds some. Large weights stay in their files (see
    `trtq.graph.weights`).

    Raises:
        InputError: the file is missing, or not what it claims (see `trtq.graph.door`); an operator is
            unknown; the opset cannot be upgraded; the model has no inputs or outputs.
    """
    path = Path(path)
    proto, data_files = _read(path)
    _read_external_data(proto, path)
    proto = inline_functions(proto, path)
    import_domains(proto)
    _drop_empty_attributes(proto)
    _check_operators(proto, path)
    _check_ends(proto.graph, path)
    opset = max(opset, FP16_SCALE_OPSET) if _holds_half(proto) else opset
    if any(node.domain == CONTRIB_DOMAIN or node.op_type in EARLY for node in all_nodes(proto.graph)):
        opset = max(opset, CONTRIB_OPSET)
    proto = upgrade_opset(proto, opset, path)
    try:
        graph = gs.import_onnx(_inferred(proto))
        leave_in_files(graph, path.parent)
    except Exception as error:
        raise InputError("the ONNX graph cannot be read", file=path, cause=error) from error
    if not graph.inputs or not graph.outputs:
        raise InputError("the model has no inputs or no outputs", file=path)
    for tensor in graph.inputs:
        if tensor.shape is None or tensor.dtype is None or isinstance(tensor.dtype, int):  # int: bfloat16
            raise InputError(
                f"model input '{tensor.name}' has no shape, or a dtype that NumPy lacks",
                file=path,
                remedy="export the model with its shape; float32 inputs with a Cast behind them",
            )
    name_nodes(graph)
    mended = drop_empty_ends(graph)
    return Model(path, graph, _sha256([path, *data_files]), quantizers(graph), mended)


def model_files(path: PathLike) -> list[Path]:
    """An ONNX file and the files of its external data.

    Raises:
        InputError: the file is missing or not ONNX, or its external data is missing.
    """
    _, data_files = _read(Path(path))
    return [Path(path), *data_files]


def model_sha256(path: PathLike) -> str:
    """Hash of an ONNX file and of its external data.

    Raises:
        InputError: the file is missing or not ONNX, or its external data is missing.
    """
    return _sha256(model_files(path))


def upgrade_opset(proto: ModelProto, opset: int, path: PathLike) -> ModelProto:
    """`proto` at `opset` or above, through ONNX's version converter.

    Raises:
        InputError: the converter has no adapter for one of the model's operators.
    """
    if _opset(proto) >= opset:
        return proto
    apart = _set_apart(proto.graph, Path(path).parent)
    try:
        converted = _converted(proto, opset)
    except Exception as error:
        raise InputError(
            f"the model's opset {_opset(proto)} cannot be upgraded to {opset}, which Q/DQ needs",
            file=path,
            cause=error,
            remedy=f"export the model again at opset {opset} or above",
        ) from error
    finally:
        _put_back(proto.graph, apart)
    _put_back(converted.graph, apart)
    converted.ir_version = max(converted.ir_version, 8)
    return converted


def _set_apart(graph: onnx.GraphProto, folder: Path) -> dict[str, onnx.TensorProto]:
    """Make inputs of the large external weights, which the version converter would need whole, and read the
    small ones, which may be axes or shapes that it looks at."""
    external = [t for t in graph.initializer if onnx.external_data_helper.uses_external_data(t)]
    known = {value.name for value in graph.input}
    apart = {}
    for tensor in external:
        if math.prod(tensor.dims) <= LOOKED_AT or tensor.name in known:
            inline(tensor, folder)
        else:
            apart[tensor.name] = tensor
    for name, tensor in apart.items():
        graph.initializer.remove(tensor)
        graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    return apart


def _put_back(graph: onnx.GraphProto, apart: Mapping[str, onnx.TensorProto]) -> None:
    """The inverse of `_set_apart`, but for what was read."""
    for value in [value for value in graph.input if value.name in apart]:
        graph.input.remove(value)
    graph.initializer.extend(apart.values())


def _converted(proto: ModelProto, opset: int) -> ModelProto:
    """`proto`, which is changed, at another opset.

    ONNX's converter leaves operators of other domains alone, and fails on those in its own that the old opset
    does not have: they have another domain meanwhile.
    """
    for node in all_nodes(proto.graph):
        unknown = is_foreign(node.op_type, node.domain) or node.op_type in EARLY
        if node.domain in _ASIDE and unknown:
            node.domain = _ASIDE[node.domain]
    import_domains(proto)
    converted = onnx.version_converter.convert_version(proto, opset)
    back = {aside: domain for domain, aside in _ASIDE.items()}
    for node in all_nodes(converted.graph):
        node.domain = back.get(node.domain, node.domain)
    imports = {o.domain: o.version for o in converted.opset_import if o.domain not in back}
    imports |= {domain: opset for domain in _ASIDE if domain in imports}
    del converted.opset_import[:]
    converted.opset_import.extend(onnx.helper.make_opsetid(*item) for item in imports.items())
    return converted


def name_nodes(graph: gs.Graph) -> None:
    """Name unnamed nodes, also those in subgraphs, by operator and position; make every name unique."""
    names, seen = Names(graph), {""}
    bodies = graph.subgraphs(recursive=True)
    for index, node in enumerate(node for body in (graph, *bodies) for node in body.nodes):
        if node.name in seen:
            node.name = names.node(node.name or f"{node.op}_{index}")
        seen.add(node.name)


def drop_empty_ends(graph: gs.Graph) -> bool:
    """Take away the inputs that are left out at a node's end, also in bodies; whether there were any.

    `Conv(x, w, "")` means `Conv(x, w)`, but TensorRT's parser refuses it.
    """
    found = False
    for node in [node for body in (graph, *graph.subgraphs(recursive=True)) for node in body.nodes]:
        while node.inputs and not node.inputs[-1].name:
            del node.inputs[-1]
            found = True
    return found


def export(graph: gs.Graph) -> ModelProto:
    """The ONNX model of a graph, complete, without GraphSurgeon's type check (models in the making lack
    types)."""
    proto = gs.export_onnx(graph, do_type_check=False)
    in_files = files_of(graph)
    for tensor in proto.graph.initializer:
        if tensor.name in in_files:
            inline(tensor, in_files[tensor.name].folder)
    return proto


def save_model(graph: gs.Graph, path: PathLike) -> None:
    """Write a graph to `path` in one move; weights go to `<path>.data` beside it above 2 GB.

    The weights are written one by one, so this needs the memory of one.

    Raises:
        InputError: the path cannot be written to.
    """
    path = Path(path)
    proto, constants = export_light(graph)
    if weight_bytes(graph) < PROTOBUF_LIMIT:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            write_whole(proto, constants, file)
        return
    location = f"{path.name}.data"
    with atomic_path(path.with_name(location)) as data, atomic_path(path) as temporary:
        with data.open("wb") as file:
            write_weights(proto, constants, file, location)
        temporary.write_bytes(proto.SerializeToString(deterministic=True))


@contextlib.contextmanager
def serialized(
    graph: gs.Graph, edit: Callable[[onnx.GraphProto], None] | None = None
) -> Iterator[bytes | Light | Path]:
    """The graph as `simulation_session` loads it; large weights that are in files stay there.

    What is too large for one message goes to a temporary file.

    Args:
        edit: changes, in place, what was made of the graph.
    """
    in_files = files_of(graph)
    folders = {values.folder for values in in_files.values()}
    in_memory = weight_bytes(graph) - sum(values.nbytes for values in in_files.values())
    if in_memory < PROTOBUF_LIMIT and len(folders) <= 1:
        proto = gs.export_onnx(graph, do_type_check=False)
        if edit is not None:
            edit(proto.graph)
        content = proto.SerializeToString(deterministic=True)
        yield Light(content, *folders) if folders else content
        return
    with scratch_folder() as folder:
        save_model(graph, path := folder / "model.onnx")
        if edit is not None:
            proto = onnx.load(path, load_external_data=False)
            edit(proto.graph)
            path.write_bytes(proto.SerializeToString(deterministic=True))
        yield path


def weight_bytes(graph: gs.Graph) -> int:
    """Bytes of all constants of the graph, without reading those that are still on disk."""
    return sum(t._values.nbytes for t in graph.tensors().values() if isinstance(t, gs.Constant))


def _read(path: Path) -> tuple[ModelProto, list[Path]]:
    """The model without the weights in its external data, and the files that hold those."""
    proto = read_model(path)
    data_files = [path.parent / name for name in sorted(_external_files(proto) - {path.name})]
    return proto, data_files


def _read_external_data(proto: ModelProto, path: Path) -> None:
    try:
        load_small(proto, path.parent)
    except Exception as error:
        raise InputError(
            "the model's external data cannot be read",
            file=path,
            cause=error,
            remedy="copy the model and its data again, both from one export",
        ) from error


def _sha256(files: list[Path]) -> str:
    digests = [sha256_file(file) for file in files]
    return digests[0] if len(digests) == 1 else sha256_bytes("".join(digests).encode())


def _inferred(proto: ModelProto) -> ModelProto:
    """The model with the types that its inputs, weights and operators imply.

    What a file says of tensors inside it may be stale, such as a batch of 1 where the input was made dynamic
    later, and folding would take it for true. It is kept of what operators of other domains make.
    """
    _forget_types(proto.graph)
    for value in (*proto.graph.input, *proto.graph.output):
        _free_axes(value)
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def _forget_types(graph: onnx.GraphProto) -> None:
    made = {name for node in graph.node if node.domain in ("", "ai.onnx") for name in node.output}
    told = [value for value in graph.value_info if value.name not in made]
    del graph.value_info[:]
    graph.value_info.extend(told)
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                _forget_types(body)


def _free_axes(value: onnx.ValueInfoProto) -> None:
    """Leave sizes open that a file writes as -1 or as a name without letters."""
    for dim in value.type.tensor_type.shape.dim:
        if dim.dim_value < 0 or (dim.HasField("dim_param") and not dim.dim_param.strip()):
            dim.Clear()


def _holds_half(proto: ModelProto) -> bool:
    types = {tensor.data_type for tensor in proto.graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in proto.graph.input}
    return onnx.TensorProto.FLOAT16 in types


def _external_files(proto: ModelProto) -> set[str]:
    return {
        entry.value
        for tensor in onnx.external_data_helper._get_all_tensors(proto)
        if onnx.external_data_helper.uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _opset(proto: ModelProto) -> int:
    return max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=1)


def _drop_empty_attributes(proto: ModelProto) -> None:
    """Leave out empty lists of operators that ONNX does not define: GraphSurgeon would lose their types."""
    for node in all_nodes(proto.graph):
        if is_foreign(node.op_type, node.domain):
            empty = [a for a in node.attribute if a.type in _LISTS and not get_attribute_value(a)]
            for attribute in empty:
                node.attribute.remove(attribute)


def _check_operators(proto: ModelProto, path: Path) -> None:
    """Refuse operators that another tool quantized by, those that ONNX has in other versions only, and in
    bodies of control flow those that only TensorRT can compute."""
    versions = {o.domain: o.version for o in proto.opset_import}
    for node in all_nodes(proto.graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        foreign = is_foreign(node.op_type, domain)
        if (foreign and not is_quantizer(node.op_type)) or node.op_type in EARLY:
            continue
        if foreign or not onnx.defs.has(node.op_type, versions.get(domain, _opset(proto)), domain):
            kind = f"operator '{node.op_type}' of domain '{domain or 'ai.onnx'}'"
            already = "; the model is quantized already" if foreign else ""
            raise InputError(
                f"unknown {kind}",
                file=path,
                cause=f"{named(node)} uses it, and ONNX does not define it{already}"
                if foreign
                else f"{named(node)} uses it, and the model's opset, {_opset(proto)}, does not have it",
                remedy="export the model with standard ONNX operators",
            )
    for node in (inner for outer in proto.graph.node for inner in all_nodes(*bodies(outer))):
        if needs_reference(node):
            raise InputError(
                f"operator '{node.op_type}' is in the body of an If, Loop or Scan",
                file=path,
                cause=f"{named(node)} can be computed by TensorRT only, so the body cannot be run here",
                remedy="export the model without that control flow, or with the node outside of it",
            )


def _check_ends(graph: onnx.GraphProto, path: Path) -> None:
    """What goes into the model and comes out of it are tensors, and nothing in it is optional."""
    inner = [
        ("the output of a body", value)
        for node in all_nodes(graph)
        for body in bodies(node)
        for value in body.output
        if _kind(value) == "optional"
    ]
    for end, value in (*_ends(graph), *inner):
        if (kind := _kind(value)) != "tensor":
            raise InputError(
                f"{end} '{value.name}' is of {kind} type, which TensorRT lacks",
                file=path,
                remedy="export the model with tensors in its place",
            )


def _ends(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.ValueInfoProto]]:
    yield from (("model input", value) for value in graph.input)
    yield from (("model output", value) for value in graph.output)


def _kind(value: onnx.ValueInfoProto) -> str:
    """`tensor`, `sequence`, `optional`, ...; what has no type is taken for a tensor."""
    return (value.type.WhichOneof("value") or "tensor_type").removesuffix("_type")
