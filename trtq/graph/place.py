"""Placement: which nodes run in INT8, and on which edges Q/DQ goes, as small named rules.

`SKIP_RULES` say, in order, why a weighted node stays in floating point; a node that none of them stops is
quantized. `EDGE_RULES` then say which tensors get a quantizer in front of which consumer. They follow the
paper's section 6 and TensorRT's "Q/DQ Layer-Placement Recommendations": quantize the inputs of weighted
operators and not their outputs, and the residual input of an addition where it makes the engine faster.
An average pooling between quantized layers runs in INT8, too. Everything else (softmax, LayerNorm, GELU,
other additions) stays floating point.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from trtq.errors import InputError
from trtq.graph.foreign import View, is_foreign_node
from trtq.graph.model import Model
from trtq.graph.plan import RESTORED, Edge, NodePlan, Plan, Weight
from trtq.graph.products import macs, product
from trtq.graph.shapes import concrete_shapes

MOVED = "moved-input"
"""The rule of edges behind an average pooling in front of what only moves its values."""

RESIDUAL, POOL = "residual-add", "average-pool"
"""The rules of edges that no INT8 node needs: they spare TensorRT memory traffic or a kernel."""

SPARING = {RESIDUAL: "residual input", POOL: "input"}
"""Those rules -> what their edges are of a node."""

_Shape = Sequence[int | str | None]

FLOATS = (np.dtype(np.float32), np.dtype(np.float16))


@dataclass(frozen=True)
class Placement:
    """What the rules look at: the folded graph, the user's patterns, and what is decided so far.

    Attributes:
        quantized: names of the INT8 nodes.
        spared: names of the additions and poolings whose inputs stay in floating point.
    """

    graph: gs.Graph
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    quantized: set[str] = field(default_factory=set)
    spared: Collection[str] = ()

    @cached_property
    def view(self) -> View:
        """What can be computed of the graph."""
        return View.of(self.graph)

    @cached_property
    def order(self) -> Mapping[str, int]:
        """Node -> its position in the graph."""
        return {node.name: position for position, node in enumerate(self.graph.nodes)}


@dataclass(frozen=True)
class SkipRule:
    """Why a weighted node stays in floating point: `reason` returns the sentence, or None to let it pass."""

    name: str
    reason: Callable[[gs.Node, Placement], str | None]


@dataclass(frozen=True)
class EdgeRule:
    """Where quantizers go: `edges` yields the edges and weights of one node."""

    name: str
    edges: Callable[[gs.Node, Placement], Iterator[Edge | Weight]]


def place(
    model: Model,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> Plan:
    """Apply every rule to a folded model.

    Args:
        model: folded, not yet quantized.
        include: if given, only nodes that match one of these patterns are quantized.
        exclude: nodes that match one of these patterns stay in floating point. A pattern is a node name
            with * and ?, or `op:Type`.
        input_shapes: model input name -> shape for which multiply-accumulates are counted.

    Raises:
        InputError: the model holds Q/DQ already, a pattern matches nothing, or no node can be quantized.
    """
    if model.is_quantized:
        raise InputError(
            f"the model is quantized already: it holds {', '.join(model.quantizers)} nodes",
            file=model.path,
            remedy="quantize the fp32 model, or take this one straight to 'trtq build' and 'trtq gate'",
        )
    for pattern in (*include, *exclude):
        if not any(matches(pattern, node) for node in model.graph.nodes):
            raise InputError(
                f"the pattern '{pattern}' matches no node",
                file=model.path,
                remedy="a pattern is a node name with * and ?, or op:Type (see 'trtq inspect MODEL')",
            )
    placement = Placement(model.graph, include, exclude)
    shapes = concrete_shapes(model.graph, input_shapes) if input_shapes else {}
    weighted = [node for node in model.graph.nodes if product(node)]
    nodes = [replace(_decide(node, placement), macs=macs(node, shapes)) for node in weighted]
    nodes += _in_subgraphs(model.graph)
    placement.quantized.update(n.name for n in nodes if n.int8)
    if not placement.quantized:
        raise InputError(
            "no node of the model can be quantized",
            file=model.path,
            cause="; ".join(f"{n.name} ({n.op}): {n.reason}" for n in nodes[:5])
            or "it has no Conv, Gemm or MatMul node",
        )
    found = [
        item for node in model.graph.nodes for rule in EDGE_RULES for item in rule.edges(node, placement)
    ]
    return Plan(
        model=model.sha256,
        nodes=nodes,
        edges=share_ranges(model.graph, [item for item in found if isinstance(item, Edge)]),
        weights=[item for item in found if isinstance(item, Weight)],
        batch=next((shape[0] for shape in (input_shapes or {}).values() if len(shape)), 1),
    )


def leave_out(graph: gs.Graph, plan: Plan, nodes: Mapping[str, str], *, rule: str = "sensitive") -> Plan:
    """`plan` with some of its INT8 nodes in floating point.

    The quantizers that only those needed go, too: their inputs', and the residual input of an Add that no
    longer fuses. No tensor gets a quantizer that had none, so the table still has every range; quantizers
    that the rules do not know of stay.

    Args:
        graph: the folded graph that `plan` is for.
        nodes: name -> why it stays in floating point; that of an Add stands for its residual input, that of
            an average pooling for its input.
        rule: what the plan calls the reason.
    """
    before, among = set(plan.int8_nodes), _quantizing(graph, plan)
    unneeded = _edges(Placement(graph, quantized=before), among)
    unneeded -= _edges(Placement(graph, quantized=before - nodes.keys(), spared=nodes.keys()), among)
    return replace(
        plan,
        nodes=[
            replace(node, int8=False, rule=rule, reason=nodes[node.name])
            if node.int8 and node.name in nodes
            else node
            for node in plan.nodes
        ],
        edges=[edge for edge in plan.edges if (edge.node, edge.index) not in unneeded],
        weights=[weight for weight in plan.weights if weight.node not in nodes],
    )


def carried_over(plan: Plan, before: gs.Graph, after: gs.Graph) -> Plan:
    """A plan of one graph for another that has its nodes and more.

    Without the quantizers that the rules put into the first alone: where an Add's input got a reader in
    floating point, INT8 in front of the Add spares nothing any more.
    """
    int8 = set(plan.int8_nodes)
    was, wanted = (
        _edges(Placement(graph, quantized=int8), _quantizing(graph, plan)) for graph in (before, after)
    )
    unneeded = was - wanted
    return replace(plan, edges=[edge for edge in plan.edges if (edge.node, edge.index) not in unneeded])


def without_ranges(graph: gs.Graph, plan: Plan, reasons: Mapping[str, str], *, rule: str) -> Plan:
    """`plan` without the quantizers of some ranges; the INT8 nodes that need one stay in floating point.

    Additions and average poolings that lose their quantizers only lose their fusion. The result needs no
    range that `plan` does not need.

    Args:
        graph: the folded graph that `plan` is for.
        reasons: tensor (the `range` of edges) -> why it has no range.
        rule: what the plan calls the reason.
    """
    int8, tensors = set(plan.int8_nodes), graph.tensors()
    nodes: dict[str, str] = {}
    for edge in plan.edges:
        if edge.range in reasons:
            pools = [n.name for n in tensors[edge.tensor].inputs if edge.rule == MOVED]
            for name in [edge.node] if edge.node in int8 or edge.rule in SPARING else pools:
                nodes.setdefault(name, reasons[edge.range])
    left = leave_out(graph, plan, nodes, rule=rule)
    return replace(left, edges=[edge for edge in left.edges if edge.range not in reasons])


def _edges(placement: Placement, nodes: Iterable[gs.Node]) -> set[tuple[str, int]]:
    """Node and index of every input that the rules quantize for the sake of some nodes."""
    return {
        (item.node, item.index)
        for node in nodes
        for rule in EDGE_RULES
        for item in rule.edges(node, placement)
    }


def _quantizing(graph: gs.Graph, plan: Plan) -> list[gs.Node]:
    """The nodes for whose sake a plan has quantizers: those behind them, and poolings in front."""
    named = {edge.node for edge in plan.edges} | {weight.node for weight in plan.weights}
    tensors = {edge.tensor for edge in plan.edges if edge.rule == MOVED}
    return [
        node
        for node in graph.nodes
        if node.name in named or any(tensor.name in tensors for tensor in node.outputs)
    ]


def placed(model: Model, input_shapes: Mapping[str, Sequence[int]] | None) -> Plan:
    """The placement that a model already has: which weighted nodes multiply 8-bit integers, and why.

    Those are integer operators, and products whose operands all come from the DequantizeLinear of 8-bit
    integers; what only moves or casts values may stand in between, as TensorRT looks through it, too.
    """
    shapes = concrete_shapes(model.graph, input_shapes) if input_shapes else {}

    def decide(node: gs.Node) -> NodePlan:
        int8, reason = _as_given(node)
        return NodePlan(node.name, node.op, int8, "as-given", reason, macs(node, shapes))

    weighted = [node for node in model.graph.nodes if product(node)]
    return Plan(model.sha256, [*map(decide, weighted), *_in_subgraphs(model.graph)], [], [])


def _as_given(node: gs.Node) -> tuple[bool, str]:
    """Whether a weighted node multiplies 8-bit integers by its place in the graph, and the reason."""
    found = product(node)
    assert found is not None
    if found.integer:
        return True, "it is an operator on integers"
    if found.operands == 0:
        return False, found.float_reason
    codes = [_codes(tensor) for tensor in node.inputs[: found.operands]]
    if None in codes:
        return False, "it is not between Q/DQ"
    if other := sorted({code for code in codes if code is not None} - {"int8", "uint8"}):
        return False, f"its operands are dequantized from {', '.join(other)}"
    return True, "both operands are dequantized"


def _codes(tensor: gs.Tensor) -> str | None:
    """The type of the numbers that a tensor's DequantizeLinear reads; None if it does not come from one."""
    while tensor.inputs and tensor.inputs[0].op != "DequantizeLinear":
        if not (only_moved(tensor) or _only_cast(tensor)):
            return None
        tensor = tensor.inputs[0].inputs[0]
    if not tensor.inputs:
        return None
    source = tensor.inputs[0]
    quantized = [source.inputs[0], *source.inputs[2:3]]  # numbers and zero-point are of one type
    if source.inputs[0].inputs:
        quantized += source.inputs[0].inputs[0].inputs[2:3]
    known = (t.dtype for t in quantized if t.name and t.dtype is not None)
    return _dtype_name(next(known, np.uint8))


def _dtype_name(dtype: Any) -> str:
    """A dtype as text; GraphSurgeon gives ONNX's number where NumPy has none of its own."""
    if isinstance(dtype, int):
        return str(onnx.TensorProto.DataType.Name(dtype)).lower()
    return str(np.dtype(dtype))


def _only_cast(tensor: gs.Tensor) -> bool:
    """Whether a tensor is another one in float16 or float32."""
    node = tensor.inputs[0]
    return node.op == "Cast" and node.attrs["to"] in (onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT)


def matches(pattern: str, node: gs.Node) -> bool:
    """Whether `pattern` names the node: `op:Type` by operator, else a name with * and ? wildcards; `\\*` and
    `\\?` are the characters themselves."""
    kind, _, operator = pattern.partition(":")
    if kind == "op" and operator:
        return bool(node.op == operator)
    wildcards = {"*": ".*", "?": ".", r"\*": r"\*", r"\?": r"\?"}
    tokens = re.findall(r"\\[*?]|.", pattern, re.DOTALL)
    regex = "".join(wildcards.get(token, re.escape(token)) for token in tokens)
    return re.fullmatch(regex, node.name) is not None


def pattern_of(name: str) -> str:
    """The pattern that `matches` the node of this name."""
    escaped = re.sub("[*?]", r"\\\g<0>", name)
    return f"?{escaped[1:]}" if name.startswith("op:") else escaped


def _decide(node: gs.Node, placement: Placement) -> NodePlan:
    for rule in SKIP_RULES:
        if reason := rule.reason(node, placement):
            return NodePlan(node.name, node.op, False, rule.name, reason)
    return NodePlan(node.name, node.op, True, "weighted", "its inputs are quantized")


def _in_subgraphs(graph: gs.Graph) -> list[NodePlan]:
    reason = "it is in the body of an If, Loop or Scan, which TensorRT does not fuse with quantizers"
    inner = (node for body in graph.subgraphs(recursive=True) for node in body.nodes)
    return [NodePlan(n.name, n.op, False, "subgraph", reason) for n in inner if product(n)]


# --- why a node stays in floating point -----------------------------------------------------------------


def _excluded(node: gs.Node, placement: Placement) -> str | None:
    for pattern in placement.exclude:
        if matches(pattern, node):
            return f"excluded by '{pattern}'"
    if placement.include and not any(matches(pattern, node) for pattern in placement.include):
        return "not among the included patterns"
    return None


def _never_seen(node: gs.Node, placement: Placement) -> str | None:
    if is_foreign_node(node) or not placement.view.hides(node):
        return None
    return placement.view.reason(node)


def _no_int8_kernel(node: gs.Node, placement: Placement) -> str | None:
    found = product(node)
    return found.float_reason if found else None


def _not_floating_point(node: gs.Node, placement: Placement) -> str | None:
    dtypes = {_dtype_name(t.dtype) for t in node.inputs[:2] if t.dtype is not None}
    if strange := sorted(dtypes - {str(dtype) for dtype in FLOATS}):
        return f"its inputs are {', '.join(strange)}, not float32 or float16"
    return None


def _vector_operand(node: gs.Node, placement: Placement) -> str | None:
    if node.op == "MatMul" and any(t.shape is not None and len(t.shape) < 2 for t in node.inputs[:2]):
        return "one operand is a vector: there is no matrix product to run in INT8"
    return None


def _coordinates(node: gs.Node, placement: Placement) -> str | None:
    if _is_grid(node.outputs[0]):
        return "it computes where GridSample reads, and 8 bits are too coarse for positions"
    return None


def _is_grid(tensor: gs.Tensor) -> bool:
    """Whether a tensor, moved or not, is nothing but the positions that GridSample reads at."""
    return bool(readers(tensor)) and all(
        reader.inputs[1] is tensor
        if reader.op == "GridSample"
        else reader.op in _KEEP_VALUES and reader.inputs[0] is tensor and _is_grid(reader.outputs[0])
        for reader in readers(tensor)
    )


SKIP_RULES: tuple[SkipRule, ...] = (
    SkipRule("excluded", _excluded),
    SkipRule("never-seen", _never_seen),
    SkipRule("no-int8-kernel", _no_int8_kernel),
    SkipRule("not-floating-point", _not_floating_point),
    SkipRule("vector-operand", _vector_operand),
    SkipRule("coordinates", _coordinates),
)


def unquantizable(node: gs.Node, graph: gs.Graph) -> str | None:
    """Why a weighted node of a graph can never be INT8, whatever the user includes; None where it can."""
    decided = _decide(node, Placement(graph))
    return None if decided.int8 else decided.reason


# --- where quantizers go --------------------------------------------------------------------------------


def _weighted_inputs(node: gs.Node, placement: Placement) -> Iterator[Edge | Weight]:
    """Both inputs of a quantized node: activations per tensor, constants per output channel (paper 3.4)."""
    if node.name not in placement.quantized:
        return
    for index, tensor in enumerate(node.inputs[:2]):
        if not isinstance(tensor, gs.Constant):
            yield Edge(tensor.name, node.name, index, "weighted-input", tensor.name)
        else:
            yield Weight(tensor.name, node.name, index, output_axis(node, index))


def output_axis(node: gs.Node, index: int) -> int:
    """The axis of a constant operand that becomes output channels: only its scales factor out."""
    rank = len(node.inputs[index].shape)
    if node.op == "Conv":
        return 0
    if node.op == "Gemm":
        transposed = node.attrs.get("transB" if index else "transA", 0)
        return (0 if transposed else 1) if index else (1 if transposed else 0)
    return rank - 1 if index else rank - 2


def _residual_add(node: gs.Node, placement: Placement) -> Iterator[Edge | Weight]:
    """The residual input of an Add, where INT8 spares TensorRT a floating-point tensor or a kernel.

    That is the other input of an Add that fuses with the quantized Conv in front of it, or else an input that
    all its other readers take in INT8 anyway: what writes it then writes no second copy in floating point.
    Where a fix scaled that input, the Mul in front of the Add that restores it reads INT8.
    """
    if node.name in placement.spared:
        return
    if node.name.endswith(RESTORED) and _read_in_int8(node.inputs[0], node, placement):
        yield Edge(node.inputs[0].name, node.name, 0, RESIDUAL, node.inputs[0].name)
    if node.op != "Add" or len(node.inputs) != 2:
        return
    fused = _fused_input(node, placement)
    for index, residual in enumerate(node.inputs):
        wanted = index != fused if fused is not None else _read_in_int8(residual, node, placement)
        variable = not isinstance(residual, gs.Constant) and residual.dtype in FLOATS
        variable = variable and residual.name not in placement.view.hidden
        if wanted and variable and _whole(residual.shape, node.inputs[1 - index].shape):
            yield Edge(residual.name, node.name, index, RESIDUAL, residual.name)


def _fused_input(add: gs.Node, placement: Placement) -> int | None:
    """Which input of an Add comes from a quantized Conv that it fuses with.

    Where both do, the addition fuses with the Conv that is computed last.
    """
    fusing = [
        (placement.order[t.inputs[0].name], index)
        for index, t in enumerate(add.inputs)
        if len(t.inputs) == 1
        and t.inputs[0].op == "Conv"
        and t.inputs[0].name in placement.quantized
        and len(t.outputs) == 1
        and t not in placement.graph.outputs
    ]
    return max(fusing)[1] if fusing else None


def _read_in_int8(tensor: gs.Tensor, add: gs.Node, placement: Placement) -> bool:
    """Whether all readers of a node's output but one addition are quantized, and there are some."""
    others = [node for node in readers(tensor) if node is not add]
    quantized = bool(others) and all(node.name in placement.quantized for node in others)
    return quantized and bool(tensor.inputs) and tensor not in placement.graph.outputs


def _average_pool(node: gs.Node, placement: Placement) -> Iterator[Edge | Weight]:
    """Both sides of an average pooling that is the only reader of its input and feeds only quantized nodes.

    TensorRT wants the quantizer that follows it in front of a Flatten (seen with TensorRT for RTX 1.7.1).
    """
    if node.op not in ("AveragePool", "GlobalAveragePool") or node.name in placement.spared:
        return
    source, pooled = node.inputs[0], node.outputs[0]
    if not source.inputs or len(readers(source)) != 1 or source.dtype not in FLOATS:
        return
    if _only_feeds_int8(pooled, placement):
        yield Edge(source.name, node.name, 0, POOL, source.name)
        for reader in readers(pooled):
            if reader.name not in placement.quantized:
                yield Edge(pooled.name, reader.name, 0, MOVED, pooled.name)


def _only_feeds_int8(tensor: gs.Tensor, placement: Placement) -> bool:
    """Whether only quantized nodes read a tensor, be it reshaped or moved before."""
    if tensor in placement.graph.outputs or not readers(tensor):
        return False
    return all(
        reader.name in placement.quantized
        or (
            reader.inputs[0] is tensor
            and only_moved(reader.outputs[0])
            and _only_feeds_int8(reader.outputs[0], placement)
        )
        for reader in readers(tensor)
    )


def readers(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that read a tensor's values (not only its shape), each once."""
    return [n for n in {id(n): n for n in tensor.outputs}.values() if n.op not in ("Shape", "Size")]


def _whole(shape: _Shape | None, other: _Shape | None) -> bool:
    """Whether neither tensor is broadcast against the other, as far as the other's dimensions are known."""
    if shape is None or other is None:
        return shape is not None
    return len(shape) == len(other) and all((m == 1) == (n == 1) for m, n in zip(shape, other, strict=True))


EDGE_RULES: tuple[EdgeRule, ...] = (
    EdgeRule("weighted-inputs", _weighted_inputs),
    EdgeRule(RESIDUAL, _residual_add),
    EdgeRule(POOL, _average_pool),
)


# --- one range for values that are only moved -------------------------------------------------------------

MOVING_OPS = frozenset(
    {
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Pad",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators that commute with quantization: what comes out was in their first input (or is a zero)."""

_KEEP_VALUES = MOVING_OPS | {"Cast", "CastLike"}


def share_ranges(graph: gs.Graph, edges: Sequence[Edge]) -> list[Edge]:
    """Edges where a tensor that only holds moved values of another quantized tensor takes its range.

    ::

        x ─┬─ Q/DQ ── Conv
           └─ MaxPool ── Q/DQ (x's range) ── Conv

    Quantizing then commutes with the moving operator, so TensorRT reads x once, in INT8.
    """
    tensors, ranges = graph.tensors(), {edge.tensor for edge in edges}
    shared = []
    for edge in edges:
        source, origin = tensors[edge.tensor], edge.tensor
        while only_moved(source):
            source = source.inputs[0].inputs[0]
            origin = source.name if source.name in ranges else origin
        shared.append(replace(edge, range=origin))
    return shared


def only_moved(tensor: gs.Tensor) -> bool:
    """Whether a tensor holds only values that its operator read from its first input, and zeros."""
    if len(tensor.inputs) != 1 or tensor.inputs[0].op not in MOVING_OPS:
        return False
    return tensor.inputs[0].op != "Pad" or _pads_with_zero(tensor.inputs[0])


def _pads_with_zero(pad: gs.Node) -> bool:
    value = pad.inputs[2] if len(pad.inputs) > 2 else None
    if pad.attrs.get("mode", "constant") != "constant":
        return False
    return (
        value is None
        or not value.name
        or (isinstance(value, gs.Constant) and bool(np.all(value.values == 0)))
    )
