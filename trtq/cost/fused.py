"""The graph as TensorRT runs it: which nodes become one kernel, and which need none.

TensorRT fuses a convolution or matrix product with its bias, the addition behind it and the activation; Q/DQ
with their neighbours; chains of pointwise operators, normalizations and softmax into generated kernels;
attention into one. Reshapes vanish. None of this depends on the placement, so it is computed once, and a
placement is costed kernel by kernel.

Sources: "Types of Fusions" and "Q/DQ Placement Recommendations" in NVIDIA's TensorRT developer guide; kernels
listed by the engine inspector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from trtq.graph.products import product

Work = Literal["product", "attention", "pointwise", "pool", "move", "view", "other"]
"""What a kernel does; a view needs none: what is concatenated is written where it belongs, if it can."""


@dataclass(frozen=True)
class Gemm:
    """A convolution or matrix product as `count` products of (m, k) by (k, n).

    Attributes:
        channels: how many of the k are channels of one position: what is padded is this.
    """

    m: int
    n: int
    k: int
    count: int = 1
    channels: int = 0

    @property
    def macs(self) -> int:
        return self.m * self.n * self.k * self.count


@dataclass(frozen=True)
class Read:
    """A tensor that a kernel reads.

    Attributes:
        tensor: where it is stored: what only reshapes is looked through.
        ends: the inputs by which the kernel's nodes take it: node, and index of the input.
        share: how much of it is read; of what a convolution of size 1 strides over, not all.
        copied: whether a view has to copy it: it stands where it is for others, too.
    """

    tensor: str
    ends: tuple[tuple[str, int], ...]
    share: float = 1.0
    copied: bool = False


@dataclass
class Kernel:
    """Nodes that run as one kernel.

    Attributes:
        work: what it does.
        nodes: their names, in the order of the graph.
        weighted: those of them that a plan can have in INT8.
        gemms: its products.
        weights: elements of its constants.
        reads: activations from outside.
        writes: tensors that others read, or that the model gives.
        operands: how many of the reads are factors of the products; the others come in behind them.
        is_conv: whether its products are convolutions.
        keeps_values: whether what it writes was in what it reads, so that quantizing behind it is the same
            as in front of it.
    """

    work: Work
    nodes: list[str] = field(default_factory=list)
    weighted: list[str] = field(default_factory=list)
    gemms: list[Gemm] = field(default_factory=list)
    weights: int = 0
    reads: list[Read] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    operands: int = 0
    is_conv: bool = False
    keeps_values: bool = False


@dataclass(frozen=True)
class Fused:
    """A graph's kernels, in an order in which they can run.

    Attributes:
        shapes: of the tensors that kernels read and write, as far as they are known.
        inputs, outputs: the model's.
    """

    kernels: tuple[Kernel, ...]
    shapes: Mapping[str, tuple[int, ...]]
    inputs: frozenset[str]
    outputs: frozenset[str]


_VANISHING = frozenset("Reshape Flatten Squeeze Unsqueeze Identity Dropout Cast CastLike".split())
_EPILOGUE = frozenset(
    "Relu LeakyRelu Clip Sigmoid Tanh Elu Selu Softplus HardSigmoid ThresholdedRelu".split()
)
"""Activations that a convolution's kernel applies."""

_POINTWISE = _EPILOGUE | frozenset(
    """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BatchNormalization BitShift Ceil Celu Cos Cosh Div Equal Erf
    Exp Floor Gelu Greater GreaterOrEqual HardSwish IsInf IsNaN Less LessOrEqual Log Max Mean Min Mish Mod Mul
    Neg Not Or Pow PRelu Reciprocal Round Shrink Sign Sin Sinh Softsign Sqrt Sub Sum Swish Tan Where Xor
    """.split()
)
_NORMALIZING = frozenset(
    """
    ArgMax ArgMin GroupNormalization InstanceNormalization LayerNormalization LogSoftmax LpNormalization
    MeanVarianceNormalization ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare RMSNormalization Softmax
    """.split()
)
_POOLS = frozenset("AveragePool GlobalAveragePool GlobalMaxPool LpPool MaxPool".split())
_MOVES = frozenset(
    """
    DepthToSpace Expand Gather GatherElements GatherND Pad Resize Slice SpaceToDepth Split Tile Transpose
    Upsample
    """.split()
)
_VIEWS = frozenset({"Concat"})
_HOST = frozenset({"Shape", "Size", "Constant", "ConstantOfShape", "Range", "NonZero"})

_KEEPING = (_MOVES | _VIEWS | {"MaxPool", "GlobalMaxPool"}) - {"Resize", "Upsample"}

_LARGEST_HEAD = 256
"""Up to this size of a head TensorRT fuses attention."""


def fuse(graph: gs.Graph, shapes: Mapping[str, Sequence[int]]) -> Fused:
    """The fused view of a folded graph.

    Args:
        shapes: of all tensors as far as they are known (see `graph.shapes.concrete_shapes`); what has none
            counts as empty, so it costs a launch.
    """
    return _Fusing(graph, shapes).fused()


class _Fusing:
    """The kernels of a graph in the making.

    A node joins the last of the kernels that make its inputs, or begins one. So a kernel reads only what
    kernels before it make, and their order is one in which they can run.
    """

    def __init__(self, graph: gs.Graph, shapes: Mapping[str, Sequence[int]]) -> None:
        self._graph = graph
        self._shapes = {name: tuple(int(d) for d in shape) for name, shape in shapes.items()}
        self._outputs = {tensor.name for tensor in graph.outputs}
        self._made: dict[str, int] = {}
        self._roots: dict[str, str] = {}
        self._members: list[list[gs.Node]] = []
        self._works: list[Work] = []
        self._shared: set[str] = set()

    def fused(self) -> Fused:
        for node in self._graph.nodes:
            self._take(node)
        self._shared = {self._root(name) for name, t in self._graph.tensors().items() if len(t.outputs) > 1}
        self._shared |= {tensor.name for tensor in self._graph.inputs}
        owner = {node.name: i for i, nodes in enumerate(self._members) for node in nodes}
        kernels = [self._kernel(i, owner) for i, nodes in enumerate(self._members) if nodes]
        used = {name for kernel in kernels for name in (*kernel.writes, *(r.tensor for r in kernel.reads))}
        return Fused(
            kernels=tuple(kernels),
            shapes={name: self._shapes[name] for name in used if name in self._shapes},
            inputs=frozenset(tensor.name for tensor in self._graph.inputs),
            outputs=frozenset(self._root(name) for name in self._outputs),
        )

    # --- which kernel a node joins ---

    def _take(self, node: gs.Node) -> None:
        if node.op in _HOST or not self._computes(node):
            return
        source = self._activations(node)[:1]
        if source and (node.op in _VANISHING or self._is_fused_transpose(node)):
            self._roots[node.outputs[0].name] = self._root(source[0].name)
            if (made := self._made.get(self._root(source[0].name))) is not None:
                self._members[made].append(node)
            return
        index = self._home(node)
        if index is None:
            index = len(self._members)
            self._members.append([])
            self._works.append(self._work(node))
        self._members[index].append(node)
        self._made |= {tensor.name: index for tensor in node.outputs}

    def _computes(self, node: gs.Node) -> bool:
        """Whether a node is work for the GPU: it has activations, and not only what sizes are computed of."""
        floats = (t.dtype is None or np.dtype(t.dtype).kind == "f" for t in (*node.outputs, *node.inputs))
        return bool(self._activations(node)) and any(floats)

    def _work(self, node: gs.Node) -> Work:
        if product(node):
            return "product"
        for work, ops in (("pool", _POOLS), ("move", _MOVES), ("view", _VIEWS)):
            if node.op in ops:
                return work  # type: ignore[return-value]
        return "pointwise" if node.op in _POINTWISE | _NORMALIZING else "other"

    def _home(self, node: gs.Node) -> int | None:
        """The kernel that a node joins."""
        made = {t.name: self._made.get(self._root(t.name)) for t in self._activations(node)}
        indices = [index for index in made.values() if index is not None]
        if not indices:
            return None
        last = max(indices)
        if node.op == "MatMul":
            return self._attention(node)
        if node.op in _MOVES:
            return last if self._is_chained(node, last) else None
        if node.op not in _POINTWISE | _NORMALIZING:
            return None
        if self._works[last] == "product":
            among = [t for t in self._activations(node) if made[t.name] == last]
            if _is_gate(node) or _is_gated(node):
                return last if self._may_activate(last) or _is_gated(node) else None
            return last if len(among) == 1 and self._is_epilogue(node, among[0], last) else None
        return last if self._works[last] == "pointwise" else None

    def _is_chained(self, node: gs.Node, index: int) -> bool:
        """Whether a node moves nothing but what another one has just moved for it."""
        source = node.inputs[0]
        alone = len(source.outputs) == 1 and source.name not in self._outputs
        return self._works[index] == "move" and alone and self._made.get(self._root(source.name)) == index

    def _may_activate(self, index: int) -> bool:
        return not any(node.op in _EPILOGUE for node in self._members[index])

    def _is_epilogue(self, node: gs.Node, tensor: gs.Tensor, index: int) -> bool:
        """Whether a product's kernel can do what follows it: nobody else may need what it made before."""
        if len(tensor.outputs) != 1 or tensor.name in self._outputs:
            return False
        alone = len(self._activations(node)) == 1
        if node.op == "Add" and not alone:
            other = next(t for t in self._activations(node) if t is not tensor)
            same = self._shapes.get(other.name) == self._shapes.get(tensor.name)
            return same and not any(
                each.op == "Add" and len(self._activations(each)) == 2 for each in self._members[index]
            )
        if node.op in ("Add", "Sub", "Mul", "Div", "Where"):  # a bias, a scale, a mask
            return alone and self._may_activate(index)
        return node.op in _EPILOGUE and self._may_activate(index)

    def _attention(self, node: gs.Node) -> int | None:
        """A kernel of a softmax, the product that it takes, and the product `node` of what it gives."""
        source = node.inputs[0]
        softmax = self._made.get(self._root(source.name))
        if softmax is None or self._works[softmax] != "pointwise" or len(source.outputs) != 1:
            return None
        members = self._members[softmax]
        made = {self._made.get(self._root(t.name)) for n in members for t in self._activations(n)}
        scores = [i for i in made if i is not None and i != softmax and self._is_scores(i)]
        head = self._shapes.get(node.outputs[0].name, (0,))[-1]
        if len(scores) != 1 or head > _LARGEST_HEAD or not any(n.op == "Softmax" for n in members):
            return None
        self._members.append([*self._members[scores[0]], *members])
        self._works.append("attention")
        fused = len(self._members) - 1
        for before in (scores[0], softmax):
            self._members[before] = []
            self._made |= {name: fused for name, i in self._made.items() if i == before}
        return fused

    def _is_scores(self, index: int) -> bool:
        return any(n.op == "MatMul" and len(self._activations(n)) == 2 for n in self._members[index])

    def _is_fused_transpose(self, node: gs.Node) -> bool:
        """Whether a transposition needs no kernel: matrix products and generated kernels read and write as
        they like, or nothing moves but axes of size 1."""
        if node.op != "Transpose":
            return False
        shape = self._shapes.get(node.inputs[0].name)
        if shape is not None and "perm" in node.attrs:
            moved = [axis for axis in node.attrs["perm"] if shape[axis] != 1]
            if moved == sorted(moved):
                return True
        around = [*_readers(node.outputs[0])]
        source = self._made.get(self._root(node.inputs[0].name))
        if source is not None:
            around += self._members[source][-1:]
        return any(n.op in ("MatMul", "Gemm", "Einsum") or n.op in _NORMALIZING for n in around)

    # --- what a kernel reads and writes ---

    def _kernel(self, index: int, owner: Mapping[str, int]) -> Kernel:
        nodes = self._members[index]
        kernel = Kernel(self._works[index], [node.name for node in nodes])
        kernel.keeps_values = all(node.op in _KEEPING for node in nodes if node.op not in _VANISHING)
        reads: dict[str, list[tuple[str, int]]] = {}
        shares: dict[str, float] = {}
        for node in nodes:
            if product(node):
                kernel.weighted.append(node.name)
                kernel.gemms += self._gemms(node)
            for i, tensor in enumerate(node.inputs):
                if isinstance(tensor, gs.Constant):
                    kernel.weights += self._constant(node, tensor)
                elif tensor.name and owner.get(_maker(tensor)) != index:
                    root = self._root(tensor.name)
                    if self._made.get(root) != index:
                        reads.setdefault(root, []).append((node.name, i))
                        shares[root] = max(shares.get(root, 0.0), self._share(node, tensor))
            for tensor in node.outputs:
                outside = any(owner.get(n.name) not in (index, None) for n in tensor.outputs)
                if tensor.name and (outside or tensor.name in self._outputs):
                    root = self._root(tensor.name)
                    if self._made.get(root) == index and root not in kernel.writes:
                        kernel.writes.append(root)
        kernel.reads = [
            Read(root, tuple(ends), shares[root], kernel.work == "view" and root in self._shared)
            for root, ends in reads.items()
        ]
        kernel.reads.sort(key=lambda read: not self._is_factor(read, kernel))  # stable: the rest as it stands
        kernel.operands = sum(self._is_factor(read, kernel) for read in kernel.reads)
        kernel.is_conv = any(node.op == "Conv" for node in nodes)
        return kernel

    @staticmethod
    def _is_factor(read: Read, kernel: Kernel) -> bool:
        return any(node in kernel.weighted for node, _ in read.ends)

    def _constant(self, node: gs.Node, tensor: gs.Constant) -> int:
        """Elements of a constant that a node reads; a table's rows count as read where they are gathered."""
        count = math.prod(tensor.shape)
        return min(count, self._elements(node.outputs[0].name)) if node.op == "Gather" else count

    def _share(self, node: gs.Node, tensor: gs.Tensor) -> float:
        """How much of a tensor a node reads."""
        if node.op == "Conv" and all(k == 1 for k in self._shapes.get(node.inputs[1].name, (0,))[2:]):
            return 1.0 / math.prod(node.attrs.get("strides", [1]))
        if node.op in ("Slice", "Gather", "Split"):
            given = sum(self._elements(t.name) for t in node.outputs)
            return min(1.0, given / max(self._elements(tensor.name), 1))
        return 1.0

    def _gemms(self, node: gs.Node) -> Iterator[Gemm]:
        shapes = [self._shapes.get(t.name) for t in (*node.inputs[:2], node.outputs[0])]
        known = [shape for shape in shapes if shape is not None]
        if len(known) < 3 or not all(known):
            return
        first, second, out = known
        if node.op == "Conv":
            groups, kernel = node.attrs.get("group", 1), math.prod(second[2:])
            positions = out[0] * math.prod(out[2:])
            yield Gemm(positions, out[1] // groups, second[1] * kernel, groups, second[1])
        elif node.op == "ConvTranspose":
            groups, kernel = node.attrs.get("group", 1), math.prod(second[2:])
            positions = first[0] * math.prod(first[2:])
            yield Gemm(positions, second[1] * kernel, second[0] // groups, groups, second[0] // groups)
        elif node.op in ("MatMul", "Gemm"):
            k = first[-2] if node.attrs.get("transA", 0) else first[-1]
            shared = isinstance(node.inputs[1], gs.Constant) and len(second) == 2
            m = math.prod(out[:-1]) if shared else (out[-2] if len(out) > 1 else 1)
            yield Gemm(m, out[-1], k, 1 if shared else math.prod(out[:-2]), k)
        else:
            found = product(node)
            macs = found.macs(node, self._shapes) if found else None
            if macs:
                yield Gemm(1, 1, macs, 1, macs)

    # --- tensors ---

    def _activations(self, node: gs.Node) -> list[gs.Tensor]:
        """The inputs that are computed on the GPU, each once."""
        found = {t.name: t for t in node.inputs if t.name and not isinstance(t, gs.Constant)}
        return [t for t in found.values() if not t.inputs or self._root(t.name) in self._made or self._fed(t)]

    def _fed(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is a model input that was only reshaped."""
        return self._root(tensor.name) in {t.name for t in self._graph.inputs}

    def _root(self, name: str) -> str:
        return self._roots.get(name, name)

    def _elements(self, name: str) -> int:
        return math.prod(self._shapes[name]) if name in self._shapes else 0


def _is_gate(node: gs.Node) -> bool:
    """Whether a node is the sigmoid of x * sigmoid(x), which TensorRT takes for one activation."""
    return node.op in ("Sigmoid", "HardSigmoid") and any(
        _is_gated(each) and node.outputs[0] in each.inputs for each in node.outputs[0].outputs
    )


def _is_gated(node: gs.Node) -> bool:
    """Whether a node is the product of x * sigmoid(x), of an x that nobody else reads."""
    if node.op != "Mul" or len(node.inputs) != 2:
        return False
    for x, gate in (node.inputs, node.inputs[::-1]):
        made = gate.inputs[0] if gate.inputs else None
        if made is not None and made.op in ("Sigmoid", "HardSigmoid") and made.inputs[0] is x:
            return len(gate.outputs) == 1 and len(x.outputs) == 2
    return False


def _maker(tensor: gs.Tensor) -> str:
    return tensor.inputs[0].name if tensor.inputs else ""


def _readers(tensor: gs.Tensor) -> Iterator[gs.Node]:
    """The nodes that read a tensor, reshaped or not."""
    for node in tensor.outputs:
        if node.op in _VANISHING:
            yield from _readers(node.outputs[0])
        else:
            yield node
