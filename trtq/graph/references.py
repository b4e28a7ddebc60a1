"""References: NumPy functions that compute operators which only TensorRT has, its plugins and users' own.

A reference takes the node's inputs as arrays (None for one that is left out) and its attributes as keywords,
and returns an array, or a tuple of as many as the node has outputs::

    def MyScale(x, *, factor=1.0):
        return (x * factor).astype(x.dtype)

Those of the plugins that people use come with trtq (`plugins/trtq_references`); a user's file adds others or
replaces them. Like ONNX Runtime's and TensorRT's own registries, this one belongs to the process.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtq.code_hash import script_sha256
from trtq.errors import InputError
from trtq.files import sha256_file, sha256_json
from trtq.scripts import contained, load_module

Function = Callable[..., Any]

_FOR_THE_REGISTRY = frozenset({"plugin_version", "plugin_namespace"})
"""Attributes by which TensorRT finds a plugin; they are none of the operator's own."""


@dataclass(frozen=True)
class Reference:
    """What computes an operator, and the file that it comes from."""

    function: Function
    file: str


_given: dict[str, Reference] = {}
_files: tuple[str, ...] = ()


def use(files: Sequence[str]) -> None:
    """Let the references of these files count, and those of no other file that was given before.

    A file has a dictionary `REFERENCES` of functions by operator (`Op`, or `domain::Op` for that domain
    alone), or functions that are named like their operators. Of two for one operator the later counts.

    Raises:
        InputError: a file is missing, does not import, or has no reference.
    """
    global _files
    found: dict[str, Reference] = {}
    for file in files:
        found |= {name: Reference(function, file) for name, function in _functions(Path(file)).items()}
    _given.clear()
    _given.update(found)
    _files = tuple(files)


def files() -> tuple[str, ...]:
    """The files that are in use."""
    return _files


def find(operator: str, domain: str | None = None) -> Reference | None:
    """The reference of an operator; None where there is none."""
    given = _given.get(f"{domain}::{operator}") or _given.get(operator)
    return given or _packaged(operator)


def fingerprint() -> str:
    """Changes when what references compute may."""
    return sha256_json([*map(script_sha256, map(Path, _files)), _packaged_sha256()])[:12]


def compute(
    node: onnx.NodeProto, inputs: Sequence[NDArray | None], types: Mapping[str, onnx.TypeProto]
) -> dict[str, NDArray]:
    """A node's outputs by its operator's reference: name -> array.

    Args:
        types: tensor -> what the model says of it, as far as it does.

    Raises:
        InputError: there is no reference, it fails, or its results are not what the node's outputs are.
    """
    reference = find(node.op_type, node.domain)
    if reference is None:
        raise missing(node)
    try:
        with contained():
            results = reference.function(*map(_read_only, inputs), **_attributes(node))
    except (Exception, SystemExit) as error:
        shapes = ", ".join("none" if a is None else f"{a.dtype}{list(a.shape)}" for a in inputs)
        raise InputError(
            f"the reference of operator '{node.op_type}' fails on {named(node)}",
            file=reference.file,
            cause=f"{type(error).__name__}: {error}; its inputs are {shapes}",
            remedy="mend it: it takes the node's inputs as arrays and its attributes as keywords",
        ) from error
    found = results if isinstance(results, tuple | list) else (results,)
    if len(found) != len(node.output):
        problem = f"gives {len(found)} outputs, the node has {len(node.output)}"
        raise _unfit(node, reference, problem, "return a tuple with one array for each output")
    outputs = {name: value for name, value in zip(node.output, found, strict=True) if name}
    for name, value in outputs.items():
        if wrong := _problem(value, types.get(name)):
            problem = f"gives {wrong} as output '{name}'"
            raise _unfit(node, reference, problem, "return what the plugin does")
    return {name: np.asarray(value, order="C") for name, value in outputs.items()}


def missing(node: onnx.NodeProto) -> InputError:
    """The error of a node that has to be computed and has no reference."""
    return InputError(
        f"operator '{node.op_type}' ({named(node)}) can be computed by TensorRT only",
        cause="neither ONNX nor ONNX Runtime defines it, and it has no reference",
        remedy="give it a NumPy reference: --op-reference file.py",
    )


def named(node: onnx.NodeProto) -> str:
    """A node for a message; one without a name by what it makes."""
    return f"node '{node.name}'" if node.name else f"the node that makes '{node.output[0]}'"


def _functions(path: Path) -> dict[str, Function]:
    module = load_module(path, "operator reference")
    given = getattr(module, "REFERENCES", None)
    if given is None:
        given = {
            name: value
            for name, value in vars(module).items()
            if callable(value)
            and not isinstance(value, type)
            and not name.startswith("_")
            and getattr(value, "__module__", None) == module.__name__
        }
    if not isinstance(given, Mapping) or not given or not all(map(callable, given.values())):
        raise InputError(
            "the file has no operator reference",
            file=path,
            remedy="name a function like its operator, or write REFERENCES = {'Operator': function}",
        )
    return {str(name): function for name, function in given.items()}


def _packaged(operator: str) -> Reference | None:
    import trtq_references

    name = trtq_references.MODULES.get(operator)
    if name is None:
        return None
    module = importlib.import_module(f"trtq_references.{name}")
    return Reference(getattr(module, operator), str(module.__file__))


@functools.cache
def _packaged_sha256() -> str:
    import trtq_references

    assert trtq_references.__file__ is not None
    folder = Path(trtq_references.__file__).parent
    return sha256_json([sha256_file(file) for file in sorted(folder.glob("*.py"))])


def _read_only(array: NDArray | None) -> NDArray | None:
    """An input as a reference gets it: others read the same memory."""
    if array is None:
        return None
    view = array.view()
    view.flags.writeable = False
    return view


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: _value(a) for a in node.attribute if a.name not in _FOR_THE_REGISTRY}


def _value(attribute: onnx.AttributeProto) -> Any:
    """An attribute as a Python value: text for bytes, an array for a tensor."""
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    if attribute.type == onnx.AttributeProto.STRINGS:
        return [text.decode() for text in value]
    return value


def _problem(value: Any, declared: onnx.TypeProto | None) -> str | None:
    """What is wrong with a result; None where it is what the model says, as far as it says something."""
    if not isinstance(value, np.ndarray | np.generic):
        return f"{type(value).__name__}, not an array,"
    shape, kind = np.shape(value), declared.tensor_type if declared is not None else None
    if kind is not None and kind.elem_type:
        wanted = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        if wanted == np.float16:  # which is simulated as float32
            wanted = np.dtype(np.float32)
        if value.dtype != wanted:
            return f"{value.dtype}, where the model says {wanted},"
    elif value.dtype == np.float64:
        return "float64, which TensorRT's plugins do not have,"
    if kind is not None and kind.HasField("shape"):
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        if len(sizes) != len(shape) or any(
            size not in (None, found) for size, found in zip(sizes[1:], shape[1:], strict=True)
        ):
            told = ", ".join("?" if size is None else str(size) for size in sizes)
            return f"the shape {list(shape)}, where the model says [{told}],"
    return None


def _unfit(node: onnx.NodeProto, reference: Reference, problem: str, remedy: str) -> InputError:
    return InputError(
        f"the reference of operator '{node.op_type}' {problem}",
        file=reference.file,
        cause=f"{named(node)} uses it",
        remedy=remedy,
    )
