"""The door: every model that a user gives is read here, and refused here where it is not what it claims.

What comes through is a graph in single assignment whose tensors are all made by something, whose operators
have the inputs and attributes that ONNX defines, and whose weights are as long as their dims, in the model's
own folder. Nodes may be in any order, and operators may be ones that ONNX does not know.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx.inliner
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, defs
from onnx.external_data_helper import uses_external_data

from trtq.errors import InputError
from trtq.files import PathLike, check_name
from trtq.graph.foreign import bodies
from trtq.graph.references import named
from trtq.graph.weights import BITS, nbytes, read_light

LONGEST_NAME = 4095
"""Bytes of a name that TensorRT takes."""

LARGEST_SIZE = 2**31 - 1
"""Of one axis of an input."""

MOST_NODES = 10**7
"""Of a model whose functions are written out."""

_HIGHEST_VERSION = 2**31 - 1

_TEXTS = ("doc_string", "value")
"""Fields of text of any length; `value` is that of metadata and of external data."""

_TWO_NUMBERS = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)

_WHOLE_NUMBERS = (TensorProto.BOOL, TensorProto.INT32, TensorProto.INT64)

_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")

_SINGLE = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.STRING: "s",
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
}

_WEIGHT_AT = {"Conv": 1, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1, "DequantizeLinear": 0}
"""Operator -> the input that an empty weight cannot be."""

_WINDOWED = frozenset({"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"})

_WINDOW = {"kernel_shape": 1, "strides": 1, "dilations": 1, "pads": 2}
"""Attributes of a window -> how many numbers each has for an axis."""

_NO_INPUT = (TensorProto.STRING, TensorProto.COMPLEX64, TensorProto.COMPLEX128)
"""Types that TensorRT lacks, so that no input can be of them."""

Graph = GraphProto | FunctionProto


def read_model(path: PathLike) -> ModelProto:
    """The model in an ONNX file, without its external data, which is checked but not read.

    Raises:
        InputError: the file is missing, not ONNX or truncated, its path is not UTF-8, or the model is not
            what it claims.
    """
    path = Path(path)
    if not path.is_file():
        problem = "the model is a folder, not a file" if path.is_dir() else "the model does not exist"
        raise InputError(problem, file=path, remedy="check the path")
    check_name(path)
    try:
        proto = read_light(path)
    except Exception as error:  # protobuf's DecodeError, or an OSError
        raise InputError(
            "not an ONNX model, or a truncated one",
            file=path,
            cause=error,
            remedy="export the model again, or copy the file again",
        ) from error
    if not proto.graph.node:
        raise InputError("not an ONNX model: the file holds no graph", file=path)
    _Check(proto, path).all()
    return proto


class _Check:
    """The checks of one model; each raises the InputError of the first thing that is wrong."""

    def __init__(self, proto: ModelProto, path: Path) -> None:
        self.proto = proto
        self.path = path
        self.functions = {(f.domain, f.name): f for f in proto.functions}

    def all(self) -> None:
        """Texts come first: what follows names them in its messages."""
        for field, text in _texts(self.proto):
            self._text(field, text)
        self._versions()
        for value in self.proto.graph.input:
            self._input(value)
        for kind, ends in (("input", self.proto.graph.input), ("output", self.proto.graph.output)):
            self._once(f"model {kind}", (value.name for value in ends))
        self._once("function", (f"{f.domain}::{f.name}" for f in self.proto.functions))
        self._graph(self.proto.graph, (), _versions_of(self.proto))
        for function in self.proto.functions:
            self._once(f"in function '{function.name}', input", function.input)
            self._graph(function, (), _versions_of(function) or _versions_of(self.proto))
        self._calls()
        self._written_out()

    def refuse(self, problem: str, cause: object, remedy: str = "export the model again") -> InputError:
        """The error; every message of the door has the same form."""
        return InputError(problem, file=self.path, cause=cause, remedy=remedy)

    def _text(self, field: str, text: str | bytes) -> None:
        shown = f"{text[:40]!r}{'…' if len(text) > 40 else ''}"
        if isinstance(text, bytes):  # protobuf's answer to what it cannot decode
            raise self.refuse("the model holds text that is not UTF-8", f"the {field} {shown}")
        if field in _TEXTS:
            return
        if "\0" in text:
            raise self.refuse("a name in the model holds NUL", f"the {field} {shown}")
        if len(text) > LONGEST_NAME // 4 and len(text.encode()) > LONGEST_NAME:
            size = len(text.encode())
            cause = f"the {field} {shown} has {size} bytes, and TensorRT takes {LONGEST_NAME}"
            raise self.refuse("a name in the model is too long", cause)

    def _versions(self) -> None:
        """Of the IR, and of the operators."""
        if not 0 <= self.proto.ir_version <= onnx.IR_VERSION:
            raise self.refuse(
                f"the model's IR version is {self.proto.ir_version}",
                f"onnx {onnx.__version__} knows those up to {onnx.IR_VERSION}",
            )
        found: dict[str, int] = {}
        for message in (self.proto, *self.proto.functions):
            for opset in message.opset_import:
                domain = _domain(opset.domain)
                highest = _HIGHEST_VERSION if domain else defs.onnx_opset_version()
                if not 1 <= opset.version <= highest:
                    raise self.refuse(
                        f"the model's opset {opset.version} of domain '{domain or 'ai.onnx'}' is unknown",
                        f"onnx {onnx.__version__} knows those from 1 to {highest}",
                        f"export the model at opset {min(highest, 17)}",
                    )
        for opset in self.proto.opset_import:
            if found.setdefault(_domain(opset.domain), opset.version) != opset.version:
                raise self.refuse(
                    "the model has two opsets",
                    f"versions {found[_domain(opset.domain)]} and {opset.version} of domain '{opset.domain}'",
                )

    def _input(self, value: onnx.ValueInfoProto) -> None:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value > LARGEST_SIZE:
                raise self.refuse(
                    f"model input '{value.name}' is too large",
                    f"an axis of {dim.dim_value}; TensorRT's end at {LARGEST_SIZE}",
                )
        kind = value.type.tensor_type.elem_type
        if value.type.HasField("tensor_type") and kind not in TensorProto.DataType.values():
            raise self.refuse(f"model input '{value.name}' is of an unknown dtype", f"its number is {kind}")
        if kind in _NO_INPUT:
            name = TensorProto.DataType.Name(kind).lower()
            raise self.refuse(f"model input '{value.name}' is of type {name}", "TensorRT has no such tensors")

    def _once(self, kind: str, names: Iterable[str]) -> None:
        name, count = next(iter(Counter(filter(None, names)).most_common(1)), ("", 0))
        if count > 1:
            raise self.refuse(f"{kind} '{name}' is there {count} times", "each may be there once")

    # --- graphs -------------------------------------------------------------------------------------------

    def _graph(self, graph: Graph, around: tuple[frozenset[str], ...], versions: Mapping[str, int]) -> None:
        """A graph, a body or a function; `around` are the names that a body may read from outside."""
        weights = [] if isinstance(graph, FunctionProto) else _weights(graph)
        self._once("weight", (tensor.name for tensor in weights))
        inputs = graph.input if isinstance(graph, FunctionProto) else [value.name for value in graph.input]
        outputs = graph.output if isinstance(graph, FunctionProto) else [value.name for value in graph.output]
        given = {*inputs, *(tensor.name for tensor in weights)}
        made = [name for node in graph.node for name in node.output if name]
        self._once("the maker of tensor", made)
        if both := sorted(given.intersection(made)):
            raise self.refuse(
                f"tensor '{both[0]}' is made twice", "a node makes it, and it is an input or a weight"
            )
        scopes = (*around, frozenset(given.union(made)))
        for name in outputs:
            if name and not any(name in scope for scope in scopes):
                raise self.refuse(
                    f"nothing makes the output '{name}'", "no node, weight or input has its name"
                )
        if not isinstance(graph, FunctionProto):
            for tensor in graph.initializer:
                self._tensor(tensor)
            for sparse in graph.sparse_initializer:
                self._sparse(sparse)
        empty = {
            tensor.name for tensor in weights if not isinstance(graph, FunctionProto) and 0 in tensor.dims
        }
        values = _scalars(graph)
        for node in graph.node:
            self._node(node, scopes, versions, empty)
            if node.op_type == "Loop":
                self._loop(node, values)
        self._no_cycle(graph)

    def _node(
        self,
        node: NodeProto,
        scopes: tuple[frozenset[str], ...],
        versions: Mapping[str, int],
        empty: set[str],
    ) -> None:
        if not node.op_type:
            raise self.refuse("a node has no operator", named(node))
        for name in node.input:
            if name and not any(name in scope for scope in scopes):
                raise self.refuse(
                    f"nothing makes tensor '{name}'", f"{named(node)} ({node.op_type}) reads it"
                )
        place = _WEIGHT_AT.get(node.op_type)
        if place is not None and len(node.input) > place and node.input[place] in empty:
            raise self.refuse(
                f"weight '{node.input[place]}' is empty", f"{named(node)} ({node.op_type}) reads it"
            )
        self._once(f"in {named(node)}, attribute", (attribute.name for attribute in node.attribute))
        for attribute in node.attribute:
            self._attribute(node, attribute)
        self._signature(node, versions)
        if node.op_type in _WINDOWED:
            self._window(node)
        if node.domain in ("", "ai.onnx") and node.op_type in self._own_checks:
            self._own_checks[node.op_type](self, node)
        for body in bodies(node):
            self._graph(body, scopes, versions)

    def _attribute(self, node: NodeProto, attribute: AttributeProto) -> None:
        """A value of the kind that it names; tensors among the values are checked as weights are."""
        if attribute.type in (AttributeProto.TYPE_PROTO, AttributeProto.TYPE_PROTOS):
            raise self.refuse(
                f"{named(node)} ({node.op_type}) makes what is no tensor", "TensorRT has tensors only"
            )
        single = _SINGLE.get(attribute.type)
        missing = single is not None and not attribute.HasField(single) and not attribute.ref_attr_name
        if attribute.type == AttributeProto.UNDEFINED or missing:
            raise self.refuse(
                f"attribute '{attribute.name}' of {named(node)} has no value of a kind that ONNX knows",
                f"operator {node.op_type}",
            )
        if attribute.HasField("t"):
            self._tensor(attribute.t, f"the value of {named(node)}")
        for tensor in attribute.tensors:
            self._tensor(tensor, f"a value of {named(node)}")
        if attribute.HasField("sparse_tensor"):
            self._sparse(attribute.sparse_tensor)
        for sparse in attribute.sparse_tensors:
            self._sparse(sparse)

    def _signature(self, node: NodeProto, versions: Mapping[str, int]) -> None:
        """Inputs, outputs and attributes are those of ONNX's definition, where there is one."""
        domain = _domain(node.domain)
        if (node.domain, node.op_type) in self.functions or not versions.get(domain):
            return
        schema = _schema(node.op_type, versions[domain], domain)
        if schema is None:
            return
        for kind, names, least, most in (
            ("inputs", node.input, schema.min_input, schema.max_input),
            ("outputs", node.output, schema.min_output, schema.max_output),
        ):
            count = max((place for place, name in enumerate(names, start=1) if name), default=0)
            if not least <= count <= most:
                expected = f"{least}" if least == most else f"{least} to {most}"
                raise self.refuse(
                    f"{named(node)} ({node.op_type}) has {count} {kind}", f"ONNX defines it with {expected}"
                )
        for name, formal in zip(node.input, schema.inputs, strict=False):
            if not name and formal.option == defs.OpSchema.FormalParameterOption.Single:
                raise self.refuse(
                    f"{named(node)} ({node.op_type}) lacks its input {formal.name}", "it is left out"
                )
        given = {attribute.name: attribute for attribute in node.attribute}
        for name, defined in schema.attributes.items():
            if name not in given:
                if defined.required:
                    raise self.refuse(
                        f"{named(node)} ({node.op_type}) lacks its attribute '{name}'", "ONNX asks for it"
                    )
            elif not given[name].ref_attr_name and given[name].type != defined.type.value:
                raise self.refuse(
                    f"attribute '{name}' of {named(node)} ({node.op_type}) is of another kind",
                    f"ONNX defines it as {defined.type.name}",
                )

    def _window(self, node: NodeProto) -> None:
        """The sizes of a window are numbers that there are, for the same axes."""
        found = {attribute.name: [*attribute.ints] for attribute in node.attribute if attribute.ints}
        sizes = {name: numbers for name, numbers in found.items() if name in _WINDOW}
        if len({len(numbers) / _WINDOW[name] for name, numbers in sizes.items()}) > 1:
            raise self.refuse(
                f"{named(node)} ({node.op_type}) has a window of different numbers of axes", sizes
            )
        for name, numbers in sizes.items():
            lowest = -LARGEST_SIZE if name == "pads" else 1
            if any(not lowest <= number <= LARGEST_SIZE for number in numbers):
                raise self.refuse(f"'{name}' of {named(node)} ({node.op_type}) is out of bounds", numbers)

    def _loop(self, node: NodeProto, values: Mapping[str, float]) -> None:
        """Something may end it: a number of turns, or a condition that is not always true."""
        turns, begins = (values.get(name, None) if name else math.inf for name in node.input[:2])
        if turns is None or turns <= LARGEST_SIZE or not begins:
            return
        for body in bodies(node):
            if len(body.input) < 2 or not body.output:
                continue
            inner = {**values, **_scalars(body), body.input[1].name: 1.0}
            if inner.get(body.output[0].name):
                raise self.refuse(f"{named(node)} (Loop) never ends", "its condition is always true")

    def _gather_nd(self, node: NodeProto) -> None:
        """Batch dimensions below 0 make ONNX Runtime read what is not the tensor's."""
        for attribute in node.attribute:
            if attribute.name == "batch_dims" and attribute.i < 0:
                raise self.refuse(f"'batch_dims' of {named(node)} (GatherND) is below 0", attribute.i)

    def _constant(self, node: NodeProto) -> None:
        if len(node.attribute) != 1:
            values = ", ".join(attribute.name for attribute in node.attribute) or "none"
            raise self.refuse(f"{named(node)} (Constant) does not have one value", f"it has {values}")

    def _if(self, node: NodeProto) -> None:
        """Its branches take nothing, and give what it gives."""
        for body in bodies(node):
            if body.input or len(body.output) != len(node.output):
                raise self.refuse(
                    f"a branch of {named(node)} (If) does not suit it",
                    f"{len(body.input)} inputs and {len(body.output)} outputs, for the {len(node.output)}"
                    " outputs of the node",
                )

    _own_checks: ClassVar[dict[str, Callable[[_Check, NodeProto], None]]] = {
        "GatherND": _gather_nd,
        "Constant": _constant,
        "If": _if,
    }
    """Operator -> what has to hold beside ONNX's definition."""

    def _no_cycle(self, graph: Graph) -> None:
        """Every node can run once what it reads is there; names from outside the graph are there."""
        maker = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
        waiting = [{maker[name] for name in _free_names(node) if name in maker} for node in graph.node]
        readers: list[list[int]] = [[] for _ in graph.node]
        for index, makers in enumerate(waiting):
            for other in makers:
                readers[other].append(index)
        ready = [index for index, makers in enumerate(waiting) if not makers]
        done = 0
        while ready:
            done += 1
            for index in readers[last := ready.pop()]:
                waiting[index].discard(last)
                if not waiting[index]:
                    ready.append(index)
        if done < len(graph.node):
            node = next(node for node, makers in zip(graph.node, waiting, strict=True) if makers)
            raise self.refuse(
                "the model's graph has a cycle", f"{named(node)} waits for what follows from it"
            )

    def _calls(self) -> None:
        """No function calls itself, and written out they are not too many nodes."""
        counts: dict[tuple[str, str], int] = {}
        pending: set[tuple[str, str]] = set()

        def size(nodes: Iterable[NodeProto]) -> int:
            return sum(
                size_of(key) if (key := (node.domain, node.op_type)) in self.functions else 1
                for node in _every(nodes)
            )

        def size_of(key: tuple[str, str]) -> int:
            if key in pending:
                raise self.refuse(f"function '{key[1]}' of domain '{key[0]}' calls itself", "it never ends")
            if key not in counts:
                pending.add(key)
                counts[key] = size(self.functions[key].node)
                pending.remove(key)
            return counts[key]

        largest = max([size(self.proto.graph.node), *map(size_of, self.functions)])
        if largest > MOST_NODES:
            raise self.refuse(
                "the model's functions are too many nodes", f"{largest:,} when they are written out"
            )

    def _written_out(self) -> None:
        """Calls give functions what the nodes in them need."""
        if not self.proto.functions:
            return
        try:
            inlined = onnx.inliner.inline_local_functions(self.proto)
        except Exception:  # `trtq.graph.local` says why
            return
        for node in _every(inlined.graph.node):
            self._signature(node, _versions_of(inlined))

    # --- weights ------------------------------------------------------------------------------------------

    def _tensor(self, tensor: TensorProto, name: str | None = None) -> None:
        """A dtype and dims that there are, and just as many values."""
        name = name or f"weight '{tensor.name}'"
        if tensor.data_type not in TensorProto.DataType.values() or not tensor.data_type:
            raise self.refuse(f"{name} is of an unknown dtype", f"its number is {tensor.data_type}")
        if any(size < 0 for size in tensor.dims):
            raise self.refuse(f"{name} has a negative size", f"its dims are {[*tensor.dims]}")
        count, stored = math.prod(tensor.dims), [field for field in _FIELDS if len(getattr(tensor, field))]
        if uses_external_data(tensor):
            if stored or tensor.raw_data:
                raise self.refuse(f"{name} has its values twice", "in the model, and in its external data")
            self._external(tensor, name)
            return
        if tensor.HasField("raw_data") and (not stored or tensor.raw_data):
            found, expected, unit = len(tensor.raw_data), {nbytes(tensor)}, "bytes"
            if tensor.data_type == TensorProto.STRING:
                raise self.refuse(f"{name} is text without values", "its bytes cannot be text")
        else:
            unit = onnx.helper.tensor_dtype_to_field(tensor.data_type)
            found = len(getattr(tensor, unit))
            expected = {count * (2 if tensor.data_type in _TWO_NUMBERS else 1)}
            if bits := BITS.get(tensor.data_type):
                expected.add(-(-count * bits // 8))
            stored = [field for field in stored if field != unit]
        if found not in expected or stored:
            more = f", and values of another kind in {stored[0]}" if stored else ""
            raise self.refuse(
                f"{name} does not have the values that its dims say",
                f"{[*tensor.dims]} need {min(expected)} {unit}, and it has {found}{more}",
                "copy the file again, or export the model again",
            )

    def _external(self, tensor: TensorProto, name: str) -> None:
        """Values in another file are inside it, and the file is inside the model's folder."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if not location or "\0" in location:
            raise self.refuse(f"{name} does not say in which file its values are", f"location {location!r}")
        file = self.path.parent / location
        try:
            homes = (self.path.parent.resolve(), self.path.resolve().parent)
            inside = any(file.resolve().is_relative_to(home) for home in homes)
            is_file = file.is_file()
        except OSError as error:
            raise self.refuse("the model's external data cannot be read", error) from error
        if Path(location).is_absolute() or ".." in Path(location).parts or not inside:
            remedy = "put the file itself into the model's folder"
            raise self.refuse(
                f"the values of {name} are outside the model's folder", f"they are in {location}", remedy
            )
        if not is_file:
            raise InputError(
                "the model's external data is missing",
                file=self.path,
                cause=f"it keeps weights in {location}",
                remedy=f"put the file into {self.path.parent}",
            )
        needed, size = nbytes(tensor), file.stat().st_size
        offset, length = (self._number(name, key, entries.get(key) or "0") for key in ("offset", "length"))
        if offset + needed > size or length not in (0, needed):
            told = f", and it claims {length}" if length else ""
            raise self.refuse(
                "the model's external data cannot be read",
                f"the {needed} bytes of {name} start at byte {offset} of {location}, which has {size}{told}",
                "copy the model and its data again, both from one export",
            )

    def _number(self, name: str, key: str, text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise self.refuse(f"the {key} of {name} is not a number of bytes", f"it is {text[:40]!r}")
        return int(text)

    def _sparse(self, sparse: onnx.SparseTensorProto) -> None:
        """Every index is inside the dims, and has its value."""
        name = f"sparse weight '{sparse.values.name}'"
        for tensor in (sparse.values, sparse.indices):
            self._tensor(tensor, name)
        dims, count = [*sparse.dims], math.prod(sparse.values.dims)
        if any(size < 0 for size in dims) or math.prod(dims) > LARGEST_SIZE:
            raise self.refuse(f"{name} is too large", f"its dims are {dims}")
        shape = [*sparse.indices.dims]
        if sparse.indices.data_type != TensorProto.INT64 or shape not in ([count], [count, len(dims)]):
            raise self.refuse(f"{name} has indices that do not suit", f"{shape} of them for {count} values")
        if uses_external_data(sparse.indices) or not count:
            return
        indices = onnx.numpy_helper.to_array(sparse.indices)
        limits = np.array(dims if indices.ndim == 2 else math.prod(dims))
        if (indices < 0).any() or (indices >= limits).any():
            raise self.refuse(f"{name} has an index outside of its dims", f"its dims are {dims}")


def _texts(message: Any) -> Iterator[tuple[str, str | bytes]]:
    """Every text in a message, with its field; of tensors only what is not values."""
    if isinstance(message, TensorProto):
        yield from (("name of a weight", message.name), ("doc_string", message.doc_string))
        for entry in message.external_data:
            yield from _texts(entry)
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            yield from ((field.name, text) for text in ([value] if isinstance(value, str | bytes) else value))
        elif field.type == field.TYPE_MESSAGE:
            for item in [value] if hasattr(value, "ListFields") else value:
                yield from _texts(item)


def _scalars(graph: Graph) -> dict[str, float]:
    """Tensor -> value, of the weights and Constants that are one number, and of what is the same as one."""
    found = {} if isinstance(graph, FunctionProto) else {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.output and node.attribute and node.attribute[0].HasField("t"):
            found[node.output[0]] = node.attribute[0].t
    values = {
        name: float(onnx.numpy_helper.to_array(tensor).item())
        for name, tensor in found.items()
        if tensor.data_type in _WHOLE_NUMBERS
        and math.prod(tensor.dims) == 1
        and not uses_external_data(tensor)
    }
    for node in graph.node:
        if node.op_type == "Identity" and node.input and node.output and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]
    return values


def _every(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Nodes, and those in their bodies."""
    for node in nodes:
        yield node
        for body in bodies(node):
            yield from _every(body.node)


def _weights(graph: GraphProto) -> list[TensorProto]:
    return [*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)]


def _free_names(node: NodeProto) -> set[str]:
    """What a node reads of the graph that it is in, also through its bodies."""
    free = {name for name in node.input if name}
    for body in bodies(node):
        own = {value.name for value in body.input} | {tensor.name for tensor in _weights(body)}
        own.update(name for inner in body.node for name in inner.output)
        read = {value.name for value in body.output}.union(*map(_free_names, body.node))
        free |= read - own
    return free


def _versions_of(message: ModelProto | FunctionProto) -> dict[str, int]:
    return {_domain(opset.domain): opset.version for opset in message.opset_import}


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


@functools.cache
def _schema(operator: str, version: int, domain: str) -> Any:
    """ONNX's definition of an operator; None where that version has none."""
    return defs.get_schema(operator, version, domain) if defs.has(operator, version, domain) else None
