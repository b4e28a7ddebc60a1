"""ONNX Runtime's fused operators (domain `com.microsoft`) as ONNX's own, in place.

Its transformer and graph optimizers write them, TensorRT's parser does not know them, and their products can
be quantized only where they are visible. What an operator computes is defined by ONNX Runtime's documentation
(docs/ContribOperators.md) and its CPU kernels; forms that are not handled here stay as they are, in floating
point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from trtq.graph.foreign import CONTRIB_DOMAIN, all_nodes, bodies
from trtq.graph.model import export
from trtq.graph.names import Names
from trtq.graph.shapes import without_weights
from trtq.graph.surgery import cleaned, in_order

Types = Mapping[str, onnx.TypeProto]


def is_contrib(op: str, domain: str | None) -> bool:
    """Whether an operator is one that `expand_contrib` may replace."""
    return op in EXPANSIONS and (domain == CONTRIB_DOMAIN or op in _IN_ONNX_DOMAIN)


def holds_contrib(graph: gs.Graph) -> bool:
    """Whether the graph, or a body in it, holds such operators."""
    return any(is_contrib(node.op, node.domain) for body in _bodies(graph) for node in body.nodes)


def expand_contrib(graph: gs.Graph) -> None:
    """Replace each fused operator by ONNX's own, in place, where its form is one that is handled.

    What is known of a tensor's shape may depend on operators in front of it, so what is left is tried again.
    """
    if not holds_contrib(graph):
        return
    names = Names(graph)
    while _expand_once(graph, names):
        pass
    in_order(cleaned(graph))


def _expand_once(graph: gs.Graph, names: Names) -> bool:
    """Replace what can be; whether there was something, and something is left."""
    types, found = _types(graph), False
    for body in _bodies(graph):
        for node in [node for node in body.nodes if is_contrib(node.op, node.domain)]:
            found |= _expand(node, body, _Writer(names, node, types, graph.opset))
    return found and holds_contrib(graph)


def _bodies(graph: gs.Graph) -> list[gs.Graph]:
    return [graph, *graph.subgraphs(recursive=True)]


def _expand(node: gs.Node, body: gs.Graph, write: _Writer) -> bool:
    """Put what stands for a node in its place; whether its form is handled."""
    results = EXPANSIONS[node.op](node, write) if write.float in _LOWEST else None
    if results is None:
        write.discard()
        return False
    outputs = [tensor for tensor in node.outputs if tensor.name]
    node.outputs.clear()
    node.inputs.clear()
    for output, result in zip(outputs, results, strict=False):
        write.rename(result, output)
    position = next(i for i, other in enumerate(body.nodes) if other is node)
    body.nodes[position : position + 1] = write.nodes
    return True


class _Writer:
    """Writes the nodes that take the place of one."""

    def __init__(self, names: Names, node: gs.Node, types: Types, opset: int) -> None:
        self.nodes: list[gs.Node] = []
        self._opset = opset
        self._names, self._prefix, self._types = names, node.name, types
        kinds = (self._dtype(tensor) for tensor in node.inputs if tensor.name)
        self.float = next((k for k in kinds if k is not None and k.kind in "fV"), np.dtype(np.float32))

    def __call__(self, op: str, *inputs: gs.Tensor, outputs: int = 1, **attributes: Any) -> Any:
        """The output of a new node; a list where it has several."""
        name = self._names.node(f"{self._prefix}/{op}")
        made = [gs.Variable(self._names.tensor(f"{name}_output")) for _ in range(outputs)]
        self.nodes.append(gs.Node(op, name, attributes, list(inputs), made))
        return made[0] if outputs == 1 else made

    def mean(self, x: gs.Tensor) -> Any:
        """The mean over the last axis, which stays; opset 18 made the axes an input."""
        if self._opset < 18:
            return self("ReduceMean", x, axes=[-1], keepdims=1)
        return self("ReduceMean", x, self.integers(-1), keepdims=1)

    def size(self, x: gs.Tensor, axis: int) -> Any:
        """The size of a tensor's axis, a scalar."""
        return self("Gather", self("Shape", x), self.constant(axis, np.int64), axis=0)

    def range(self, start: gs.Tensor | int, end: gs.Tensor) -> Any:
        """Whole numbers from one to before another."""
        start = self.constant(start, np.int64) if isinstance(start, int) else start
        return self("Range", start, end, self.constant(1, np.int64))

    def cast(self, x: gs.Tensor) -> Any:
        """A tensor in the operator's floating-point type."""
        return self("Cast", x, to=onnx.helper.np_dtype_to_tensor_dtype(self.float))

    def constant(self, value: Any, dtype: Any = None) -> gs.Constant:
        """A new constant, of the operator's floating-point type unless another is given."""
        name = self._names.tensor(f"{self._prefix}/constant")
        return gs.Constant(name, np.asarray(value, dtype or self.float))

    def integers(self, *values: int) -> gs.Constant:
        """A new list of integers."""
        return self.constant(values, np.int64)

    def _dtype(self, tensor: gs.Tensor) -> np.dtype | None:
        """A tensor's dtype, of kind V where NumPy has none; None where it is not known."""
        kind = tensor.dtype
        if kind is None and tensor.name in self._types:
            kind = self._types[tensor.name].tensor_type.elem_type
        if isinstance(kind, int):  # ONNX's number
            return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)) if kind else None
        return None if kind is None else np.dtype(kind)

    def shape(self, tensor: gs.Tensor) -> list[int | None] | None:
        """A tensor's shape, None for sizes that are not known; None where nothing is."""
        if tensor.shape is not None:
            return [size if isinstance(size, int) else None for size in tensor.shape]
        kind = self._types[tensor.name].tensor_type if tensor.name in self._types else None
        if kind is None or not kind.HasField("shape"):
            return None
        return [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]

    def rank(self, tensor: gs.Tensor) -> int | None:
        """How many axes a tensor has; None where it is not known."""
        shape = self.shape(tensor)
        return None if shape is None else len(shape)

    def rename(self, made: gs.Tensor, output: gs.Tensor) -> None:
        """Make a tensor the node's output: one that was written here, or a copy of another."""
        if not any(made is tensor for node in self.nodes for tensor in node.outputs):
            name = self._names.node(f"{self._prefix}/Identity")
            self.nodes.append(gs.Node("Identity", name, {}, [made], [output]))
            return
        (maker,) = made.inputs
        for reader in list(made.outputs):
            reader.inputs = [output if tensor is made else tensor for tensor in reader.inputs]
        maker.outputs = [output if tensor is made else tensor for tensor in maker.outputs]

    def discard(self) -> None:
        """Take back all that was written."""
        for node in self.nodes:
            node.inputs.clear()
            node.outputs.clear()


Results = Sequence[gs.Tensor] | None
"""What takes the place of a node's outputs; None: the node stays."""


def _types(graph: gs.Graph) -> Types:
    """Types of tensors as ONNX infers them where each fused operator gives what its main input is."""
    model = export(without_weights(graph))
    for node in all_nodes(model.graph):
        if is_contrib(node.op_type, node.domain):
            main = _MAIN_INPUT.get(node.op_type, 0)
            node.op_type, node.domain, node.input[:] = "Identity", "", [node.input[main]]
            del node.attribute[:], node.output[1:]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    graphs = [inferred, *(body for node in all_nodes(inferred) for body in bodies(node))]
    return {v.name: v.type for g in graphs for v in (*g.value_info, *g.input, *g.output)}


def _given(node: gs.Node, index: int) -> gs.Tensor | None:
    """An optional input."""
    tensor = node.inputs[index] if index < len(node.inputs) else None
    return tensor if tensor is not None and tensor.name else None


def _wants(node: gs.Node, index: int) -> bool:
    """Whether an optional output is there."""
    return index < len(node.outputs) and bool(node.outputs[index].name)


# --- activations ----------------------------------------------------------------------------------------


def _gelu(node: gs.Node, write: _Writer) -> Results:
    """x / 2 * (1 + erf(x / sqrt(2))), of the sum with a bias where there is one."""
    x, bias = node.inputs[0], _given(node, 1)
    x = x if bias is None else write("Add", x, bias)
    erf = write("Erf", write("Div", x, write.constant(math.sqrt(2))))
    grown = write("Mul", x, write("Add", erf, write.constant(1)))
    return [write("Mul", grown, write.constant(0.5))]


def _fast_gelu(node: gs.Node, write: _Writer) -> Results:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), of the sum with a bias where there is one."""
    x, bias = node.inputs[0], _given(node, 1)
    x = x if bias is None else write("Add", x, bias)
    cube = write("Mul", write("Mul", x, x), x)
    inner = write("Add", x, write("Mul", cube, write.constant(0.044715)))
    tanh = write("Tanh", write("Mul", inner, write.constant(math.sqrt(2 / math.pi))))
    grown = write("Mul", x, write("Add", tanh, write.constant(1)))
    return [write("Mul", grown, write.constant(0.5))]


def _quick_gelu(node: gs.Node, write: _Writer) -> Results:
    """x * sigmoid(alpha x)."""
    x = node.inputs[0]
    scaled = write("Mul", x, write.constant(node.attrs.get("alpha", 1.702)))
    return [write("Mul", x, write("Sigmoid", scaled))]


def _activated(x: gs.Tensor, name: str, parameters: Sequence[float], write: _Writer) -> gs.Tensor | None:
    """An activation by its name; None for one that is not known."""
    if name in ("Relu", "Tanh", "Sigmoid"):
        return write(name, x)
    if name == "LeakyRelu":
        return write(name, x, alpha=float(parameters[0]) if parameters else 0.01)
    if name == "Clip" and len(parameters) == 2:
        return write(name, x, write.constant(parameters[0]), write.constant(parameters[1]))
    if name == "HardSigmoid" and len(parameters) == 2:
        return write(name, x, alpha=float(parameters[0]), beta=float(parameters[1]))
    return x if not name else None


# --- products -------------------------------------------------------------------------------------------


def _fused_conv(node: gs.Node, write: _Writer) -> Results:
    """A Conv, to which another tensor may be added, and an activation."""
    attributes = dict(node.attrs)
    name, parameters = attributes.pop("activation", ""), attributes.pop("activation_params", ())
    result = write("Conv", *[t for t in node.inputs[:3] if t.name], **attributes)
    if (added := _given(node, 3)) is not None:
        result = write("Add", result, added)
    activated = _activated(result, name, parameters, write)
    return None if activated is None else [activated]


def _fused_gemm(node: gs.Node, write: _Writer) -> Results:
    """A Gemm and an activation."""
    attributes = {name: value for name, value in node.attrs.items() if not name.startswith("activation")}
    parameters = [node.attrs[name] for name in ("activation_alpha", "activation_beta") if name in node.attrs]
    result = write("Gemm", *[t for t in node.inputs if t.name], **attributes)
    activated = _activated(result, node.attrs.get("activation", ""), parameters, write)
    return None if activated is None else [activated]


def _fused_matmul(node: gs.Node, write: _Writer) -> Results:
    """alpha * A' B', each transposed in its last two axes, or with its first axis moved behind the batch."""
    operands = []
    for tensor, side in zip(node.inputs, "AB", strict=True):
        swapped, moved = node.attrs.get(f"trans{side}", 0), node.attrs.get(f"transBatch{side}", 0)
        rank = write.rank(tensor)
        if moved or (swapped and (rank is None or rank < 2)):
            return None
        if swapped:
            order = [*range(rank - 2), rank - 1, rank - 2]  # type: ignore[operator]
            tensor = write("Transpose", tensor, perm=order)
        operands.append(tensor)
    result = write("MatMul", *operands)
    alpha = node.attrs.get("alpha", 1.0)
    return [result if alpha == 1 else write("Mul", result, write.constant(alpha))]


# --- normalizations -------------------------------------------------------------------------------------


def _skip_layer_norm(node: gs.Node, write: _Writer) -> Results:
    """LayerNormalization of the sum of two tensors, and a bias where there is one; the sum may be wanted."""
    x, skip, gamma = node.inputs[:3]
    beta, bias = _given(node, 3), _given(node, 4)
    return _normalized_sum(node, [x, skip, *([] if bias is None else [bias])], gamma, beta, write)


def _skip_simplified(node: gs.Node, write: _Writer) -> Results:
    """The same, normalized by the root of the mean square."""
    x, skip, gamma = node.inputs[:3]
    bias = _given(node, 3)
    if _wants(node, 1) or _wants(node, 2):
        return None
    total = _sum([x, skip, *([] if bias is None else [bias])], write)
    normalized = _root_mean_square(total, gamma, node.attrs.get("epsilon", 1e-5), write)
    return [normalized, *([total] if _wants(node, 3) else [])]


def _simplified(node: gs.Node, write: _Writer) -> Results:
    """x / sqrt(mean(x^2) + epsilon) * gamma over the last axis."""
    rank = write.rank(node.inputs[0])
    axis = node.attrs.get("axis", -1)
    if _wants(node, 1) or axis not in (-1, *([] if rank is None else [rank - 1])):
        return None
    x, gamma = node.inputs
    return [_root_mean_square(x, gamma, node.attrs.get("epsilon", 1e-5), write)]


def _normalized_sum(
    node: gs.Node, parts: list[gs.Tensor], gamma: gs.Tensor, beta: gs.Tensor | None, write: _Writer
) -> Results:
    if _wants(node, 1) or _wants(node, 2):  # mean and deviation, of which ONNX Runtime's kernel gives none
        return None
    total = _sum(parts, write)
    epsilon = node.attrs.get("epsilon", 1e-5)
    inputs = [total, gamma, *([] if beta is None else [beta])]
    normalized = write("LayerNormalization", *inputs, axis=-1, epsilon=epsilon)
    return [normalized, *([total] if _wants(node, 3) else [])]


def _sum(parts: Sequence[gs.Tensor], write: _Writer) -> gs.Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = write("Add", total, part)
    return total


def _root_mean_square(x: gs.Tensor, gamma: gs.Tensor, epsilon: float, write: _Writer) -> gs.Tensor:
    mean = write.mean(write("Mul", x, x))
    root = write("Sqrt", write("Add", mean, write.constant(epsilon)))
    return write("Mul", write("Div", x, root), gamma)


def _embed(node: gs.Node, write: _Writer) -> Results:
    """LayerNormalization of the sum of word, position and segment embeddings; how many of the mask are 1."""
    words, segments, word_table, position_table = node.inputs[:4]
    segment_table, (gamma, beta) = _given(node, 4), node.inputs[5:7]
    mask, positions = _given(node, 7), _given(node, 8)
    positions = write.range(0, write.size(words, 1)) if positions is None else positions
    parts = [write("Gather", word_table, words), write("Gather", position_table, positions)]
    if segment_table is not None and segments.name:
        parts.append(write("Gather", segment_table, segments))
    total = _sum(parts, write)
    epsilon = node.attrs.get("epsilon", 1e-12)
    results = [write("LayerNormalization", total, gamma, beta, axis=-1, epsilon=epsilon)]
    if _wants(node, 1) and mask is not None:
        results.append(write("ReduceSum", mask, write.integers(1), keepdims=0))
    elif _wants(node, 1):
        batch = write("Slice", write("Shape", words), write.integers(0), write.integers(1))
        zero = gs.Constant("zero", np.zeros(1, np.int32))
        results.append(write("ConstantOfShape", batch, value=zero))
    return [*results, *([total] if _wants(node, 2) else [])]


def _group_norm(node: gs.Node, write: _Writer) -> Results:
    """Groups of channels normalized together, channels last, and SiLU where it is asked for."""
    x, gamma, beta = node.inputs
    last = node.attrs.get("channels_last", 1)
    x = write("Transpose", x, perm=[0, 3, 1, 2]) if last else x
    groups = node.attrs["groups"]
    ones, zeros = write.constant(np.ones(groups)), write.constant(np.zeros(groups))
    grouped = write("Reshape", x, write.integers(0, groups, -1))
    epsilon = node.attrs.get("epsilon", 1e-5)
    grouped = write("InstanceNormalization", grouped, ones, zeros, epsilon=epsilon)
    normalized = write("Reshape", grouped, write("Shape", x))
    across = write.integers(1, -1, 1, 1)
    gain, shift = (write.cast(write("Reshape", t, across)) for t in (gamma, beta))
    result = write("Add", write("Mul", normalized, gain), shift)
    if node.attrs.get("activation", 0):
        result = write("Mul", result, write("Sigmoid", result))
    return [write("Transpose", result, perm=[0, 2, 3, 1]) if last else result]


# --- attention ------------------------------------------------------------------------------------------


def _attention(node: gs.Node, write: _Writer) -> Results:
    """Self-attention with the projection of queries, keys and values; a cache of keys and values may be
    prepended."""
    x, weights = node.inputs[:2]
    bias, mask, past, scores_bias = (_given(node, index) for index in (2, 3, 4, 5))
    heads, attrs = node.attrs["num_heads"], node.attrs
    shared = attrs.get("past_present_share_buffer", 0) or _given(node, 6) is not None
    if attrs.get("do_rotary", 0) or shared or weights.shape is None:
        return None
    sizes = attrs.get("qkv_hidden_sizes") or [weights.shape[1] // 3] * 3
    packed = write("MatMul", x, weights)
    packed = packed if bias is None else write("Add", packed, bias)
    query, key, value = write("Split", packed, write.integers(*sizes), outputs=3, axis=-1)
    query, key, value = (_heads(tensor, heads, write) for tensor in (query, key, value))
    if past is not None:
        old = write("Split", past, write.integers(1, 1), outputs=2, axis=0)
        before = [write("Squeeze", tensor, write.integers(0)) for tensor in old]
        key, value = (write("Concat", a, b, axis=2) for a, b in zip(before, (key, value), strict=True))
    masked = _mask(mask, key, node, write)
    if masked is _UNKNOWN:
        return None
    causal = _causal(query, key, query, node, write)
    merged = _attended(query, key, value, [masked, scores_bias, causal], sizes[0] // heads, node, write)
    results = [merged]
    if _wants(node, 1):
        both = [write("Unsqueeze", tensor, write.integers(0)) for tensor in (key, value)]
        results.append(write("Concat", *both, axis=0))
    return results


def _multi_head(node: gs.Node, write: _Writer) -> Results:
    """Attention of projected queries, keys and values (batch, length, hidden)."""
    inputs = [_given(node, index) for index in range(8)]
    query, key, value, bias, mask, scores_bias, past_key, past_value = inputs
    if query is None or key is None or value is None or len(node.inputs) > 8 or _wants(node, 3):
        return None  # packed forms, and caches of a fixed size
    ranks = [write.rank(tensor) for tensor in (query, key, value)]
    if ranks[0] != 3 or ranks[1] not in (3, 4) or ranks[1] != ranks[2]:
        return None
    hidden = (write.shape(bias) or [None])[0] if bias is not None else None
    heads, size = node.attrs["num_heads"], (write.shape(query) or [None])[-1]
    if size is None:
        return None
    parts: list[gs.Tensor] = [query, key, value]
    if bias is not None:
        if hidden is None or ranks[1] != 3:
            return None
        shares = write("Split", bias, write.integers(size, size, hidden - 2 * size), outputs=3, axis=0)
        parts = [write("Add", part, share) for part, share in zip(parts, shares, strict=True)]
    query = _heads(parts[0], heads, write)
    key, value = (_heads(t, heads, write) if ranks[1] == 3 else t for t in parts[1:])
    new_key = key
    if past_key is not None and past_value is not None:
        key, value = write("Concat", past_key, key, axis=2), write("Concat", past_value, value, axis=2)
    masked = _mask(mask, key, node, write)
    if masked is _UNKNOWN:
        return None
    causal = _causal(query, key, new_key, node, write)
    merged = _attended(query, key, value, [masked, scores_bias, causal], size // heads, node, write)
    results = [merged]
    if _wants(node, 1):
        results += [key, value]
    return results


def _heads(x: gs.Tensor, heads: int, write: _Writer) -> gs.Tensor:
    """(batch, length, hidden) -> (batch, heads, length, size)."""
    split = write("Reshape", x, write.integers(0, 0, heads, -1))
    return write("Transpose", split, perm=[0, 2, 1, 3])


def _attended(
    query: gs.Tensor,
    key: gs.Tensor,
    value: gs.Tensor,
    added: Sequence[gs.Tensor | None],
    size: int,
    node: gs.Node,
    write: _Writer,
) -> gs.Tensor:
    """Softmax of the scaled scores times the values, heads merged again.

    Args:
        added: to the scores.
        size: of a head.
    """
    scale = node.attrs.get("scale", 0.0) or 1 / math.sqrt(size)
    scores = write("MatMul", query, write("Transpose", key, perm=[0, 1, 3, 2]))
    scores = write("Mul", scores, write.constant(scale))
    for bias in added:
        scores = scores if bias is None else write("Add", scores, bias)
    context = write("MatMul", write("Softmax", scores, axis=-1), value)
    return write("Reshape", write("Transpose", context, perm=[0, 2, 1, 3]), write.integers(0, 0, -1))


_LOWEST = {np.dtype(np.float32): -1e30, np.dtype(np.float16): -65504.0}
"""Floating-point types that are handled -> what bars a key from a softmax."""

_UNKNOWN = gs.Variable("a mask of a form that is not handled")


def _causal(
    query: gs.Tensor, key: gs.Tensor, new_key: gs.Tensor, node: gs.Node, write: _Writer
) -> gs.Tensor | None:
    """0 for keys up to a query's position, the lowest number behind; None where queries see all keys.

    As in ONNX Runtime's CPU kernel, positions start behind the past, and the last query sees all keys.

    Args:
        new_key: the keys without those of the past.
    """
    if not node.attrs.get("unidirectional", 0):
        return None
    queries, keys, new = (write.size(tensor, 2) for tensor in (query, key, new_key))
    past, one = write("Sub", keys, new), write.constant(1, np.int64)
    last = write("Unsqueeze", write("Sub", keys, one), write.integers(0))
    others = write.range(past, write("Sub", write("Add", past, queries), one))
    positions = write("Unsqueeze", write("Concat", others, last, axis=0), write.integers(1))
    behind = write.cast(write("Greater", write.range(0, keys), positions))
    return write("Mul", behind, write.constant(_LOWEST[write.float]))


def _mask(mask: gs.Tensor | None, key: gs.Tensor, node: gs.Node, write: _Writer) -> gs.Tensor | None:
    """What a mask (1 where a key counts, 0 where not) adds to the scores; `_UNKNOWN` for rarer forms.

    Args:
        mask: (batch, keys), or (batch, queries, keys), or (batch,), the numbers of keys that count.
    """
    if mask is None:
        return None
    rank = write.rank(mask)
    if rank not in (1, 2, 3):
        return _UNKNOWN
    if rank == 1:
        return _UNKNOWN if not _is_batch_long(mask) else _of_lengths(mask, key, node, write)
    axes = write.integers(1, 2) if rank == 2 else write.integers(1)
    return _barred(write("Unsqueeze", write.cast(mask), axes), node, write)


def _is_batch_long(mask: gs.Tensor) -> bool:
    """Whether a mask of one axis holds the lengths alone: other forms are 2 or 3 times as long as a batch."""
    return mask.shape is None or not isinstance(mask.shape[0], int) or mask.shape[0] == 1


def _of_lengths(lengths: gs.Tensor, key: gs.Tensor, node: gs.Node, write: _Writer) -> gs.Tensor:
    numbers = write("Unsqueeze", write("Cast", lengths, to=onnx.TensorProto.INT64), write.integers(1, 2, 3))
    counted = write.cast(write("Less", write.range(0, write.size(key, 2)), numbers))
    return _barred(counted, node, write)


def _barred(counted: gs.Tensor, node: gs.Node, write: _Writer) -> gs.Tensor:
    """0 where a key counts, the filter's value where not."""
    value = max(float(node.attrs.get("mask_filter_value", -10000.0)), _LOWEST[write.float])
    barred = write("Sub", write.constant(1), counted)
    return write("Mul", barred, write.constant(value))


def _rotary(node: gs.Node, write: _Writer) -> Results:
    """Pairs of a head's components turned by angles that depend on the position."""
    x, positions, cosines, sines = node.inputs
    attrs, rank = node.attrs, write.rank(x)
    partly = attrs.get("rotary_embedding_dim", 0)
    if partly or attrs.get("is_packed_batching", 0) or attrs.get("scale", 1.0) != 1.0 or rank not in (3, 4):
        return None
    if write.rank(positions) != 2 or cosines.shape is None:  # one offset for all positions
        return None
    size = 2 * cosines.shape[1]
    if rank == 3:
        split = write("Reshape", x, write.integers(0, 0, -1, size))
        heads = write("Transpose", split, perm=[0, 2, 1, 3])
    else:
        heads = x
    cosine, sine = (
        write("Unsqueeze", write("Gather", table, positions, axis=0), write.integers(1))
        for table in (cosines, sines)
    )
    if attrs.get("interleaved", 0):
        pairs = write("Reshape", heads, write.integers(0, 0, 0, -1, 2))
        parts = write("Split", pairs, write.integers(1, 1), outputs=2, axis=-1)
        first, second = (write("Squeeze", part, write.integers(-1)) for part in parts)
    else:
        half = write.integers(size // 2, size // 2)
        first, second = write("Split", heads, half, outputs=2, axis=-1)
    turned = [
        write("Sub", write("Mul", first, cosine), write("Mul", second, sine)),
        write("Add", write("Mul", first, sine), write("Mul", second, cosine)),
    ]
    if attrs.get("interleaved", 0):
        turned = [write("Unsqueeze", part, write.integers(-1)) for part in turned]
        result = write("Reshape", write("Concat", *turned, axis=-1), write.integers(0, 0, 0, -1))
    else:
        result = write("Concat", *turned, axis=-1)
    if rank == 4:
        return [result]
    return [write("Reshape", write("Transpose", result, perm=[0, 2, 1, 3]), write.integers(0, 0, -1))]


EXPANSIONS: dict[str, Callable[[gs.Node, _Writer], Results]] = {
    "Attention": _attention,
    "BiasGelu": _gelu,
    "EmbedLayerNormalization": _embed,
    "FastGelu": _fast_gelu,
    "FusedConv": _fused_conv,
    "FusedGemm": _fused_gemm,
    "FusedMatMul": _fused_matmul,
    "Gelu": _gelu,
    "GroupNorm": _group_norm,
    "MultiHeadAttention": _multi_head,
    "QuickGelu": _quick_gelu,
    "RotaryEmbedding": _rotary,
    "SimplifiedLayerNormalization": _simplified,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_simplified,
    "TransposeMatMul": _fused_matmul,
}
"""Operator -> what writes it as ONNX's."""

_IN_ONNX_DOMAIN = frozenset({"SimplifiedLayerNormalization"})
"""Operators of ONNX Runtime's that it keeps in ONNX's own domain."""

_MAIN_INPUT = {"EmbedLayerNormalization": 2}
"""Input whose type the first output has, where that is not the first."""
