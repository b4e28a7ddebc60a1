"""Constant folding: what does not depend on a graph's inputs is computed once and becomes a constant.

ONNX Runtime computes it with every optimization off, operator by operator as the model says; what it
lacks, by ONNX's reference implementation. Nothing is rewritten on the way. Of a tensor that is not known, the
dimensions that are known count as constants, too. An If with a known condition becomes the branch it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import ceil, prod
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_graphsurgeon as gs
import onnxruntime
from numpy.typing import NDArray

from trtq.graph.division import with_safe_division
from trtq.graph.model import QDQ_OPS, export
from trtq.graph.names import Names
from trtq.graph.surgery import in_order
from trtq.graph.weights import is_number, is_plain
from trtq.stops import run_options

GROWTH = 1 << 24
"""Bytes up to which a result is always folded. What is larger must be made of weights, not of a small
constant that is expanded."""

_FROM_WEIGHTS = 4
"""A larger result may have this many times the bytes of all constants that are read: int8 becomes float32."""

_RANDOM = frozenset(
    {
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)

_KEPT = _RANDOM | QDQ_OPS | {"DynamicQuantizeLinear"}
"""Operators that are never folded: quantizers say where INT8 is meant."""

_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")

_FATAL = 4
"""ONNX Runtime's log level: silent, since errors are raised."""

onnxruntime.set_default_logger_severity(_FATAL)  # it would print some into the terminal all the same


def fold_constants(graph: gs.Graph, size_threshold: int | None = None) -> None:
    """Evaluate, in place, everything that does not depend on the graph's inputs, known dimensions included.

    The bodies of If, Loop and Scan are folded, too. Random numbers, quantizers, operators that ONNX does not
    define, and types that NumPy lacks (bfloat16, float8, int4) are left alone. The graph is then in
    topological order.

    Args:
        size_threshold: leave tensors above this many bytes to run time; None: see `GROWTH`.
    """
    in_order(graph)
    _fold(graph, graph, size_threshold)


def _fold(body: gs.Graph, root: gs.Graph, size_threshold: int | None) -> None:
    """Fold the model's own graph, or a body within it, and then the bodies within that."""
    folder = _Folder(body, root, size_threshold)
    while folder.fold() or _inline_branches(body, root):
        pass
    for node in body.nodes:
        for inner in bodies(node):
            _fold(inner, root, size_threshold)


class _Folder:
    """One graph that is folded in steps until nothing changes.

    Args:
        body: the model's own graph `root`, or a body within it. A body's outputs stay computed.
    """

    def __init__(self, body: gs.Graph, root: gs.Graph, size_threshold: int | None) -> None:
        self._body, self._root, self._threshold = body, root, size_threshold
        self._left: dict[int, gs.Node] = {}  # nodes that cannot be folded
        self._gone: dict[int, gs.Node] = {}  # nodes that are to leave the graph

    def fold(self) -> bool:
        """One step; whether anything was folded."""
        count = len(self._body.nodes)
        for node in list(self._body.nodes):
            values = _constant(node) if node.op == "Constant" else _known_dimensions(node)
            if values is not None and not self._is_output(node):
                self._replace(node, [values])
        self._sweep()
        known = self._known()
        if wanted := self._wanted(known):
            results = _evaluate(known, wanted, self._root)
            if results is not None:
                self._keep(known, dict(zip((id(t) for t in wanted), results, strict=True)))
            else:
                self._fold_one_by_one(known)
        self._sweep()
        return len(self._body.nodes) < count

    def _known(self) -> list[gs.Node]:
        """Nodes that depend on constants alone and whose results are wanted."""
        known: dict[int, gs.Node] = {}
        made: set[int] = set()
        for node in self._body.nodes:
            if id(node) in self._left or not all(_is_known(t, made) for t in reads(node)):
                continue
            size = _expanded_bytes(node)
            if not _is_foldable(node) or self._is_output(node) or (size or 0) > self._limit(node.inputs):
                self._left[id(node)] = node
            elif size is not None or node.op not in _EXPANDING:  # else: once its operands are constants
                known[id(node)] = node
                made.update(id(tensor) for tensor in node.outputs)
        named = self._named_outputs()
        for node in reversed(list(known.values())):
            if not any(t.outputs or id(t) in named for t in node.outputs):
                self._remove(node)
                del known[id(node)]
        return list(known.values())

    def _wanted(self, known: Sequence[gs.Node]) -> list[gs.Tensor]:
        """What known nodes make and others read."""
        nodes, named = {id(node) for node in known}, self._named_outputs()
        return [
            tensor
            for node in known
            for tensor in node.outputs
            if tensor.name
            and (id(tensor) in named or any(id(reader) not in nodes for reader in tensor.outputs))
        ]

    def _keep(self, known: Sequence[gs.Node], results: dict[int, Any]) -> None:
        """Replace the nodes that make results by these, where they are arrays of a fitting size."""
        limit = self._limit([tensor for node in known for tensor in reads(node)])
        for node in known:
            values = [results.get(id(tensor)) for tensor in node.outputs]
            found = [value for value in values if value is not None]
            if not all(_is_array(value) and value.nbytes <= limit for value in found):
                self._left[id(node)] = node
            elif found:
                self._replace(node, values)

    def _fold_one_by_one(self, known: Sequence[gs.Node]) -> None:
        """Fold what can be folded of nodes that cannot be evaluated together."""
        for node in known:
            if any(isinstance(t, gs.Variable) and t.name for t in reads(node)):
                self._left[id(node)] = node
                continue
            results = _evaluate([node], [t for t in node.outputs if t.name], self._root, alone=True)
            if results is None:
                self._left[id(node)] = node
            else:
                named = (t for t in node.outputs if t.name)
                self._keep([node], dict(zip((id(t) for t in named), results, strict=True)))

    def _limit(self, tensors: Iterable[gs.Tensor]) -> int:
        if self._threshold is not None:
            return self._threshold
        read = {id(t): t for t in tensors if isinstance(t, gs.Constant)}
        return max(GROWTH, _FROM_WEIGHTS * sum(_nbytes(tensor) for tensor in read.values()))

    def _is_output(self, node: gs.Node) -> bool:
        """Whether a node makes an output of a body; those of the model may be constants."""
        outputs = [] if self._body is self._root else self._body.outputs
        return any(tensor is output for tensor in node.outputs for output in outputs)

    def _named_outputs(self) -> set[int]:
        """The outputs of the graph and of the bodies in it, which no node needs to read."""
        bodies = (self._body, *self._body.subgraphs(recursive=True))
        return {id(tensor) for body in bodies for tensor in body.outputs}

    def _replace(self, node: gs.Node, values: Sequence[NDArray | None]) -> None:
        """Put constants in the place of a node's outputs."""
        outputs = list(node.outputs)
        self._remove(node)
        for tensor, value in zip(outputs, values, strict=True):
            if value is not None:
                tensor.to_constant(value)

    def _remove(self, node: gs.Node) -> None:
        node.inputs.clear()
        node.outputs.clear()
        self._gone[id(node)] = node

    def _sweep(self) -> None:
        self._body.nodes[:] = [node for node in self._body.nodes if id(node) not in self._gone]
        self._gone.clear()


def _evaluate(
    nodes: Sequence[gs.Node], wanted: Sequence[gs.Tensor], root: gs.Graph, *, alone: bool = False
) -> list[Any] | None:
    """The outputs of nodes that read constants alone; None where they cannot be evaluated.

    Args:
        alone: ask the reference implementation, too.
    """
    part = gs.Graph(
        nodes,
        outputs=wanted,
        opset=root.opset,
        import_domains=root.import_domains,
        ir_version=root.ir_version,
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = 1
    try:
        model = export(part)
        del model.graph.value_info[:], model.graph.output[:]  # types follow from the constants
        model.graph.output.extend(onnx.ValueInfoProto(name=tensor.name) for tensor in wanted)
        content = with_safe_division(model).SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        results: list[Any] = session.run(None, {}, run_options())
        return results
    except Exception:  # of ONNX Runtime, or protobuf's where the constants are above 2 GB
        if not alone:
            return None
    try:
        return list(onnx.reference.ReferenceEvaluator(model).run(None, {}))
    except Exception:  # an operator that it lacks, or values that the operator does not take
        return None


def _constant(node: gs.Node) -> Any:
    """The value of a Constant, which stays in its file if it is in one; None if NumPy has no such dtype."""
    (name, value), *_ = node.attrs.items()
    if name == "value":
        return value._values if is_plain(value) else None
    dtype = {
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
    return np.array(value, dtype[name]) if name in dtype else None


def _known_dimensions(node: gs.Node) -> NDArray | None:
    """What a Shape or Size gives, or a Gather or Slice takes of a Shape, if those dimensions are known."""
    if node.op in ("Gather", "Slice") and node.inputs[0].inputs and node.inputs[0].inputs[0].op == "Shape":
        dimensions = _shape(node.inputs[0].inputs[0])
        taken = None if dimensions is None else _taken(node, dimensions)
    elif node.op in ("Shape", "Size"):
        taken = _shape(node)
    else:
        return None
    if taken is None or any(size is None for size in taken.reshape(-1)):
        return None
    return np.array(prod(taken) if node.op == "Size" else taken, np.int64)


def _shape(node: gs.Node) -> NDArray | None:
    """The result of a Shape (for a Size: the shape) as objects, with None for what is not known."""
    shape = node.inputs[0].shape
    if shape is None:
        return None
    sizes = [int(d) if isinstance(d, (int, np.integer)) and d >= 0 else None for d in shape]
    return np.array(sizes, object)[node.attrs.get("start", 0) : node.attrs.get("end", len(sizes))]


def _taken(node: gs.Node, dimensions: NDArray) -> NDArray | None:
    """The elements of a vector that a Gather or Slice with constant operands takes."""
    operands = [t for t in node.inputs[1:] if t.name]
    if not all(isinstance(t, gs.Constant) for t in operands) or node.attrs.get("axis", 0) not in (0, -1):
        return None
    if node.op == "Gather":
        indices = operands[0].values
        inside = np.all((indices >= -len(dimensions)) & (indices < len(dimensions)))
        return np.asarray(dimensions[indices], object) if inside else None
    axes, steps = (
        node.inputs[i].values.tolist() if i < len(node.inputs) and node.inputs[i].name else default
        for i, default in ((3, [0]), (4, [1]))
    )
    if axes not in ([0], [-1]) or steps == [0] or any(t.values.size != 1 for t in operands):
        return None
    return dimensions[operands[0].values.item() : operands[1].values.item() : steps[0]]


_EXPANDING = frozenset({"ConstantOfShape", "Expand", "Loop", "Range", "Tile"})
"""Operators whose outputs, or whose work, may be much larger than their inputs."""

MOST_TURNS = 1 << 16
"""Of a Loop that is folded."""


def _expanded_bytes(node: gs.Node) -> int | None:
    """Bytes of the output of such an operator, as far as its operands tell; None for others, and where an
    operand is no constant yet."""
    if node.op not in _EXPANDING or not all(isinstance(t, gs.Constant) for t in node.inputs):
        return None
    values = [tensor.values for tensor in node.inputs]
    try:
        if node.op == "ConstantOfShape":
            value = node.attrs.get("value")
            return prod(values[0].tolist()) * (4 if value is None else value.dtype.itemsize)
        if node.op == "Range":
            start, limit, delta = (value.item() for value in values)
            return max(ceil((limit - start) / delta), 0) * values[0].itemsize
        if node.op == "Loop":
            return 0 if values[0].item() <= MOST_TURNS else np.iinfo(np.int64).max
        if node.op == "Tile":
            return prod(values[0].shape) * prod(values[1].tolist()) * values[0].itemsize
        rank = max(values[0].ndim, len(values[1]))
        shapes = ([1] * (rank - len(s)) + list(s) for s in (values[0].shape, values[1].tolist()))
        return prod(b if a == 1 else a for a, b in zip(*shapes, strict=True)) * values[0].itemsize
    except (ArithmeticError, ValueError):  # what the operator does not take is left to run time
        return np.iinfo(np.int64).max


def _is_foldable(node: gs.Node) -> bool:
    """Whether a node, and all in its bodies, gives the same at any time, in dtypes that NumPy has."""
    if (
        (node.domain or "") not in _DOMAINS
        or node.op in _KEPT
        or (node.op == "Dropout" and len(node.inputs) > 2)
    ):
        return False
    attributes = node.attrs.values()
    if not all(is_plain(t) for t in (*node.inputs, *attributes) if isinstance(t, gs.Constant)):
        return False
    if not all(_is_numpy(node.attrs[name]) for name in ("to", "dtype") if name in node.attrs):
        return False
    return all(inner.op != "Loop" and _is_foldable(inner) for body in bodies(node) for inner in body.nodes)


def _is_numpy(kind: Any) -> bool:
    """Whether an ONNX data type, or what GraphSurgeon makes of it, is one of NumPy's own number types."""
    return is_number(onnx.helper.tensor_dtype_to_np_dtype(kind) if isinstance(kind, int) else np.dtype(kind))


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and is_number(value.dtype)


def _is_known(tensor: gs.Tensor, made: set[int]) -> bool:
    return isinstance(tensor, gs.Constant) or not tensor.name or id(tensor) in made


def _nbytes(constant: gs.Constant) -> int:
    return prod(constant.shape) * np.dtype(constant.dtype).itemsize if is_plain(constant) else 0


def bodies(node: gs.Node) -> Iterator[gs.Graph]:
    yield from (value for value in node.attrs.values() if isinstance(value, gs.Graph))


def reads(node: gs.Node) -> Iterator[gs.Tensor]:
    """What a node reads, and what its bodies take from outside."""
    yield from node.inputs
    for body in bodies(node):
        own = {id(t) for t in body.inputs} | {id(t) for inner in body.nodes for t in inner.outputs}
        read = [t for inner in body.nodes for t in reads(inner)]
        yield from (t for t in (*read, *body.outputs) if id(t) not in own)


# --- branches that are always taken -------------------------------------------------------------------------


def _inline_branches(graph: gs.Graph, root: gs.Graph) -> bool:
    """Replace each If whose condition is a constant by the nodes of the branch it takes, in place."""
    chosen = [n for n in graph.nodes if n.op == "If" and _is_one_value(n.inputs[0])]
    for node in chosen:
        condition = bool(node.inputs[0].values.item())
        branch = node.attrs["then_branch" if condition else "else_branch"]
        position = next(i for i, other in enumerate(graph.nodes) if other is node)
        outputs = list(node.outputs)
        node.inputs.clear()
        node.outputs.clear()
        del graph.nodes[position]
        _rename(branch, graph, Names(root))
        ends = [
            _end(graph, root, branch, output, result)
            for output, result in zip(outputs, branch.outputs, strict=True)
            if output.name
        ]
        graph.nodes[position:position] = [*branch.nodes, *filter(None, ends)]
    return bool(chosen)


def _is_one_value(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and prod(tensor.shape) == 1


def _rename(branch: gs.Graph, graph: gs.Graph, names: Names) -> None:
    """Give what a branch and its bodies make themselves names that are free in the graph it goes into."""
    around = graph.tensors()
    bodies = [branch, *branch.subgraphs(recursive=True)]
    made = [t for body in bodies for t in (*body.inputs, *(o for n in body.nodes for o in n.outputs))]
    read = [t for body in bodies for t in (*body.outputs, *(i for n in body.nodes for i in n.inputs))]
    for tensor in {id(t): t for t in made if t.name}.values():
        tensor.name = names.tensor(tensor.name)
    for constant in {id(t): t for t in read if isinstance(t, gs.Constant)}.values():
        outer = around.get(constant.name)
        if isinstance(outer, gs.Constant) and outer._values is constant._values:
            _substitute(constant, outer, bodies)
        else:
            constant.values = constant.values.copy()  # GraphSurgeon renames what it has not read for all
            constant.name = names.tensor(constant.name)
    for node in [node for body in bodies for node in body.nodes]:
        node.name = names.node(node.name)


def _end(
    graph: gs.Graph, root: gs.Graph, branch: gs.Graph, output: gs.Tensor, result: gs.Tensor
) -> gs.Node | None:
    """Make a branch's result what the If gave; the node that it takes where it has another name, too."""
    bodies = (root, *root.subgraphs(recursive=True), branch, *branch.subgraphs(recursive=True))
    own = any(result is tensor for node in branch.nodes for tensor in node.outputs)
    if not own or any(result is tensor for tensor in graph.outputs):
        return gs.Node(
            "Identity", Names(root, branch).node(f"{output.name}/Identity"), {}, [result], [output]
        )
    _substitute(result, output, bodies)
    for node in list(result.inputs):
        node.outputs[next(i for i, t in enumerate(node.outputs) if t is result)] = output
    return None


def _substitute(old: gs.Tensor, new: gs.Tensor, bodies: Iterable[gs.Graph]) -> None:
    """Redirect every reader of a tensor to another."""
    for node in {id(node): node for node in old.outputs}.values():
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new
    for body in bodies:
        body.outputs = [new if tensor is old else tensor for tensor in body.outputs]
