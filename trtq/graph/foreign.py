"""Operators that ONNX does not define: TensorRT's plugins, users' own, and those of runtimes.

Such a node stays in the model as it is. To run the model without TensorRT, its operator needs a reference
(`trtq.graph.references`), unless ONNX Runtime has a kernel. What stands behind an operator with neither
cannot be computed: then the model ends in front of it, with what goes into it among the outputs (`View`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def

from trtq.graph import references

_STANDARD = ("", "ai.onnx")

CONTRIB_DOMAIN = "com.microsoft"
"""Of ONNX Runtime's own operators, most of them fused (see `trtq.graph.contrib`)."""

CONTRIB_OPSET = 17
"""LayerNormalization, which some of them become, starts here."""

EARLY = frozenset({"LayerNormalization"})
"""ONNX's operators that ONNX Runtime writes into models of older opsets, which do not have them."""

_MOST_NAMED = 3

_FLOATS = frozenset(
    {TensorProto.UNDEFINED, TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
)


@dataclass(frozen=True)
class View:
    """What can be computed of a graph.

    Attributes:
        outputs: names of the outputs that can be computed, and of what goes into the part that cannot.
        walls: the nodes that cannot be computed although their inputs can.
        hidden: tensor -> the wall that it lies behind.
    """

    outputs: tuple[str, ...]
    walls: tuple[NodeProto, ...]
    hidden: Mapping[str, NodeProto]

    def hides(self, node: gs.Node) -> bool:
        """Whether what a node makes cannot be computed."""
        return any(tensor.name in self.hidden for tensor in node.outputs)

    def reason(self, node: gs.Node) -> str:
        """Why it cannot."""
        wall = next(self.hidden[tensor.name] for tensor in node.outputs if tensor.name in self.hidden)
        name, operator = wall.name, wall.op_type
        return f"it lies behind '{name}' ({operator}), which has no reference: its inputs are never seen"

    def remark(self) -> str | None:
        """What the user has to know of the walls; None where there are none."""
        if not self.walls:
            return None
        operators = dict.fromkeys(f"{wall.op_type} ({references.named(wall)})" for wall in self.walls)
        which = ", ".join([*operators][:_MOST_NAMED]) + (", …" if len(operators) > _MOST_NAMED else "")
        at = f"the model is compared at {', '.join(self.outputs)}" if self.outputs else "nothing can be run"
        return (
            f"{which} can be computed by TensorRT only: what lies behind stays in floating point, and {at};"
            " --op-reference file.py gives a reference"
        )

    @classmethod
    def of_model(cls, model: ModelProto) -> View:
        """The view of a model as it was read."""
        if any(map(needs_reference, model.graph.node)):  # or they call the model's own functions
            model = onnx.inliner.inline_local_functions(model)
            import_domains(model)
            model = onnx.shape_inference.infer_shapes(model)
        return cls.of(model.graph)

    @classmethod
    def of(cls, graph: gs.Graph | GraphProto, *, references_too: bool = True) -> View:
        """The view of a graph whose nodes are in an order that they can run in.

        Args:
            references_too: what references compute counts, not only ONNX's operators.
        """
        if isinstance(graph, gs.Graph):
            if not any(map(is_foreign_node, graph.nodes)):
                return cls(tuple(tensor.name for tensor in graph.outputs), (), {})
            graph = _skeleton(graph)
        hidden: dict[str, NodeProto] = {}
        walls = []
        for node in graph.node:
            wall = next((hidden[name] for name in reads(node) if name in hidden), None)
            if wall is None and not (is_computable(node) if references_too else _is_standard(node)):
                wall = node
                walls.append(node)
            if wall is not None:
                hidden.update((name, wall) for name in node.output if name)
        outputs = [value.name for value in graph.output if value.name not in hidden]
        return cls(tuple(dict.fromkeys([*outputs, *_in_front(graph, hidden)])), tuple(walls), hidden)


@functools.cache
def is_foreign(op: str, domain: str | None) -> bool:
    """Whether no version of ONNX defines an operator."""
    return not onnx.defs.has(op, "" if domain in _STANDARD else domain or "")


def is_foreign_node(node: gs.Node) -> bool:
    """`is_foreign` of a node's operator."""
    return is_foreign(node.op, node.domain)


def needs_reference(node: NodeProto) -> bool:
    """Whether neither ONNX nor ONNX Runtime can compute a node's operator."""
    domain = "" if node.domain in _STANDARD else node.domain
    return is_foreign(node.op_type, domain) and (domain, node.op_type) not in _kernels()


def is_computable(node: NodeProto) -> bool:
    """Whether a node can be computed without TensorRT."""
    return not needs_reference(node) or references.find(node.op_type, node.domain) is not None


def _is_standard(node: NodeProto) -> bool:
    return not is_foreign(node.op_type, node.domain)


def reads(node: NodeProto) -> Iterator[str]:
    """Names that a node reads, those that the bodies of an If, Loop or Scan take from outside among them."""
    yield from filter(None, node.input)
    for body in bodies(node):
        for inner in body.node:
            yield from reads(inner)
        yield from (output.name for output in body.output)


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The bodies of an If, Loop or Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def import_domains(model: ModelProto) -> None:
    """Import every domain that the model's nodes use, in place; many exporters leave out those of plugins.

    A model that does not import ONNX's own domain stays without it, which is an error.
    """
    versions = {opset.domain: opset.version for opset in model.opset_import}
    standard = max((versions[domain] for domain in _STANDARD if domain in versions), default=None)
    for domain in dict.fromkeys(node.domain for node in all_nodes(model.graph)):
        version = standard if domain in _STANDARD else 1
        if domain not in versions and version is not None:
            model.opset_import.append(onnx.helper.make_opsetid(domain, version))


def all_nodes(*graphs: GraphProto) -> Iterator[NodeProto]:
    """The nodes of graphs and of all bodies in them."""
    for graph in graphs:
        for node in graph.node:
            yield node
            yield from all_nodes(*bodies(node))


def _skeleton(graph: gs.Graph) -> GraphProto:
    """A graph's nodes and types without weights and attributes; what bodies read is among the inputs."""
    skeleton = GraphProto(
        input=[_typed(tensor) for tensor in graph.inputs],
        output=[_typed(tensor) for tensor in graph.outputs],
        value_info=[_typed(t) for t in graph.tensors().values() if isinstance(t, gs.Variable)],
    )
    for node in graph.nodes:
        inner = [body.tensors() for body in node.attrs.values() if isinstance(body, gs.Graph)]
        skeleton.node.add(
            op_type=node.op,
            domain=node.domain,
            name=node.name,
            input=[*(tensor.name for tensor in node.inputs), *(name for names in inner for name in names)],
            output=[tensor.name for tensor in node.outputs],
        )
    return skeleton


def _typed(tensor: gs.Tensor) -> onnx.ValueInfoProto:
    kind = tensor.dtype
    if kind is not None and not isinstance(kind, int):
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    elem = onnx.TypeProto.Tensor(elem_type=kind or TensorProto.UNDEFINED)
    return onnx.ValueInfoProto(name=tensor.name, type=onnx.TypeProto(tensor_type=elem))


def _in_front(graph: GraphProto, hidden: Mapping[str, NodeProto]) -> Iterator[str]:
    """The floating-point tensors that hidden nodes read and that follow from values of the model's inputs.

    Not those that follow from their shapes alone, such as anchors: a folded model has them as constants.
    """
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    varying = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    made: set[str] = set()
    for node in graph.node:
        if node.op_type not in ("Shape", "Size") and not varying.isdisjoint(reads(node)):
            made.update(node.output)
            varying.update(node.output)
    for node in graph.node:
        if not hidden.keys().isdisjoint(node.output):
            for name in reads(node):
                if name in made - hidden.keys() and kinds.get(name, TensorProto.UNDEFINED) in _FLOATS:
                    yield name


@functools.cache
def _kernels() -> frozenset[tuple[str, str]]:
    """Domain and operator of all kernels of ONNX Runtime's CPU provider."""
    kernels = get_all_opkernel_def()
    return frozenset((k.domain, k.op_name) for k in kernels if k.provider == "CPUExecutionProvider")
