"""A model with operators that ONNX Runtime does not know, as sessions and references in turn.

The nodes in front of the first such operators are one ONNX Runtime session, those between the first and the
second another, and so on; between them the operators' references compute in NumPy (see
`trtq.graph.references`). The chain has of a session what trtq and Polygraphy use of one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto

from trtq.data.batches import Arrays
from trtq.graph import references
from trtq.graph.foreign import needs_reference, reads

Start = Callable[[ModelProto], onnxruntime.InferenceSession]
"""Makes a session of a model that ONNX Runtime knows all operators of."""


class Value(NamedTuple):
    """An input or output, as a session describes it."""

    name: str
    shape: list[int | str | None]
    type: str


@dataclass
class _Stage:
    """Nodes that one session runs, and behind them those that references compute."""

    nodes: list[NodeProto] = field(default_factory=list)
    foreign: list[NodeProto] = field(default_factory=list)
    session: onnxruntime.InferenceSession | None = None


class Chain:
    """Runs a model stage by stage.

    The session of a stage is made when it is first run: the types of what a reference makes are known then.

    Args:
        model: its nodes are in an order that they can run in.
        outputs: names of the tensors that it computes; every operator on the way has a reference.
        types: tensor -> what the model says of it; what references give is checked against that.
        start: makes the sessions.
        read: an initializer's values, wherever they are.
    """

    def __init__(
        self,
        model: ModelProto,
        outputs: Sequence[str],
        types: Mapping[str, TypeProto],
        start: Start,
        read: Callable[[TensorProto], NDArray],
    ) -> None:
        self._model, self._outputs, self._types = model, tuple(outputs), types
        self._start, self._read = start, read
        self._stages = _stages(model.graph, outputs)
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._constants: Arrays = {}
        self._last = _last_readers(self._stages, outputs)
        self._lock = threading.Lock()

    def get_inputs(self) -> list[Value]:
        """The model's inputs."""
        inputs = (v for v in self._model.graph.input if v.name not in self._initializers)
        return [_described(value.name, value.type) for value in inputs]

    def get_outputs(self) -> list[Value]:
        """What it computes, with as much of types and shapes as the model says."""
        return [_described(name, self._types.get(name, TypeProto())) for name in self._outputs]

    def run(self, names: Sequence[str] | None, feed: Arrays, options: Any = None) -> list[Any]:
        """The named outputs, or all; see `onnxruntime.InferenceSession.run`.

        Raises:
            InputError: a reference fails, or does not give what the node's outputs are.
            Exception: ONNX Runtime's, which have no common base class.
        """
        known = dict(feed)
        for position, stage in enumerate(self._stages):
            if stage.nodes:
                with self._naming_references(position):
                    session = stage.session or self._started(position, known)
                    read = {item.name: known[item.name] for item in session.get_inputs()}
                    made = [item.name for item in session.get_outputs()]
                    known |= zip(made, session.run(made, read, options), strict=True)
            for node in stage.foreign:
                inputs = [self._value(name, known) if name else None for name in node.input]
                known |= references.compute(node, inputs, self._types)
            for name in [name for name in known if self._last.get(name, -1) <= position]:
                del known[name]
        return [self._value(name, known) for name in names or self._outputs]

    @contextlib.contextmanager
    def _naming_references(self, position: int) -> Iterator[None]:
        """Adds to ONNX Runtime's errors in a stage whose results it reads."""
        try:
            yield
        except Exception as error:
            if not position:
                raise
            operators = dict.fromkeys(node.op_type for node in self._stages[position - 1].foreign)
            raise RuntimeError(
                f"behind the references of {', '.join(operators)}, whose results may be of a wrong shape or"
                f" type: {error}"
            ) from error

    def _value(self, name: str, known: Arrays) -> Any:
        """A tensor's value: computed, or an initializer's."""
        if name in known:
            return known[name]
        if name not in self._constants:
            self._constants[name] = self._read(self._initializers[name])
        return self._constants[name]

    def _started(self, position: int, known: Mapping[str, Any]) -> onnxruntime.InferenceSession:
        """The session of a stage, whose inputs have the types of the arrays that are known now."""
        stage = self._stages[position]
        with self._lock:
            if stage.session is None:
                stage.session = self._start(self._part(position, known))
            return stage.session

    def _part(self, position: int, known: Mapping[str, Any]) -> ModelProto:
        """The nodes of a stage as a model, which gives what references and later stages read."""
        stage = self._stages[position]
        read = {name for node in stage.nodes for name in reads(node)}
        given = {name for node in stage.foreign for name in reads(node)}
        made = [name for node in stage.nodes for name in node.output if name]
        wanted = [name for name in made if name in given or self._last.get(name, -1) > position]
        graph = onnx.helper.make_graph(
            stage.nodes,
            "stage",
            [_value_info(name, known[name]) for name in sorted(read & known.keys())],
            [onnx.ValueInfoProto(name=name) for name in wanted],
            [self._initializers[name] for name in sorted(read & self._initializers.keys())],
        )
        opsets, version = self._model.opset_import, self._model.ir_version
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=version)


def _stages(graph: GraphProto, outputs: Iterable[str]) -> list[_Stage]:
    """The nodes that outputs need, by the number of references in a row that come before them."""
    needed, nodes = set(outputs), []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            nodes.append(node)
            needed.update(reads(node))
    level: dict[str, int] = {}
    stages = [_Stage()]
    for node in reversed(nodes):
        own = max((level.get(name, 0) for name in reads(node)), default=0)
        while len(stages) <= own:
            stages.append(_Stage())
        foreign = needs_reference(node)
        (stages[own].foreign if foreign else stages[own].nodes).append(node)
        level.update(dict.fromkeys(node.output, own + foreign))
    return stages


def _last_readers(stages: Sequence[_Stage], outputs: Iterable[str]) -> dict[str, int]:
    """Tensor -> the last stage that reads it; behind all stages for the outputs."""
    last = {
        name: position
        for position, stage in enumerate(stages)
        for node in (*stage.nodes, *stage.foreign)
        for name in reads(node)
    }
    return last | dict.fromkeys(outputs, len(stages))


def _value_info(name: str, array: Any) -> onnx.ValueInfoProto:
    """The type of an array; its sizes may be others in the next run."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.asarray(array).dtype)
    return onnx.helper.make_tensor_value_info(name, kind, [None] * np.ndim(array))


def _described(name: str, type_: TypeProto) -> Value:
    """A tensor as ONNX Runtime describes it."""
    kind = type_.tensor_type
    shape: list[int | str | None] = [
        d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim
    ]
    names = {"FLOAT": "float", "DOUBLE": "double"}
    text = TensorProto.DataType.Name(kind.elem_type)
    return Value(name, shape, f"tensor({names.get(text, text.lower())})")
