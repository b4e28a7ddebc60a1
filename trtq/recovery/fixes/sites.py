"""Places where affine quantization can be had from an engine that has scales only, and what is put there.

The paper's affine quantization (Wu et al. 2020, section 3.1.1) has a zero-point; TensorRT's has none, and one
scale for all channels of an activation. Both are had by operators in front of the quantizer, undone by the
constants behind it, with a factor f and a middle m for each channel:

    y = SiLU(x)                  y = SiLU(x) ── y' = y / f - m / f ── Q/DQ ── W' = W * f
    z = W·y + b                                                               z  = W'·y' + (b + W·m)

A convolution that adds zeros around its input would add m there. They are added in front of all this, by a
Pad, and the convolution adds none.

All readers of a tensor that run in INT8 and multiply it by weights of their own read one such tensor; all
others, those in floating point among them, read what they read before.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.graph.names import Names
from trtq.graph.place import carried_over
from trtq.graph.plan import INSERTED, Plan
from trtq.recovery.fixes.channels import (
    Vector,
    along,
    behind,
    bias_of,
    channel_axis,
    is_linear,
    padding,
    weight_matrix,
)
from trtq.recovery.fixes.smooth import scale_linear

POINTWISE_OPS = frozenset(
    "Add Div Elu Erf Gelu HardSigmoid HardSwish LayerNormalization Mish Mul PRelu Selu Sigmoid Softplus"
    " Softsign Sub Swish Tanh".split()
)
"""Operators that run in a kernel of their own kind, which takes a Mul and a Sub for nothing: behind these
alone are they inserted where no builder can be asked. TensorRT for RTX 1.7.1 takes a Mul for nothing behind
nearly all others, too; not behind a Concat of pooled tensors, nor behind the Reshape of a fused attention's
result, where it takes 3 kernels more."""

PADDED_OPS = POINTWISE_OPS | {"Clip", "LeakyRelu", "Relu"}
"""Operators behind which a Pad is expected to add no kernel: TensorRT for RTX 1.7.1 was seen to add none
behind Add, Clip, Mul and Relu, and mostly one behind a Conv or a Concat. What is not listed is the last to be
built on trial."""


@dataclass(frozen=True)
class Site:
    """A place for operators in front of a quantizer.

    Attributes:
        tensor: what is changed, before its readers.
        axis: where it has its channels.
        channels: how many.
        readers: names of the INT8 nodes that will read the changed tensor as their first input.
        pads: zeros that all of them add around it, as ONNX's `pads`; none: ().
        takes_middle: whether the readers can make up for a middle: each has a bias, and all add as many
            zeros.
    """

    tensor: str
    axis: int
    channels: int
    readers: tuple[str, ...]
    pads: tuple[int, ...] = ()
    takes_middle: bool = False

    @property
    def name(self) -> str:
        """Of the tensor that is added."""
        return f"{self.tensor}{INSERTED}"

    def broadcast(self, vector: Vector, rank: int) -> NDArray[np.float32]:
        """A vector over the channels as it broadcasts against a tensor that a node with weights of this rank
        reads."""
        return along(vector, self.axis, rank if self.axis == 1 else 1).astype(np.float32)


@dataclass(frozen=True)
class Affine:
    """What becomes of a tensor: (x - middle) / factors.

    Attributes:
        factors: > 0, (channels,); None: no Mul.
        middle: (channels,); None: neither Sub nor Pad.
    """

    factors: Vector | None = None
    middle: Vector | None = None

    def of(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """What becomes of values (positions, channels)."""
        if self.middle is not None:
            values = np.subtract(values, self.middle, dtype=np.float32)
        if self.factors is not None:
            values = np.divide(values, self.factors, dtype=np.float32)
        return values


def find_sites(graph: gs.Graph, plan: Plan) -> list[Site]:
    """Every such place, in the order of the plan's tensors.

    Left alone are tensors that share their range with one that only holds moved values of them: TensorRT then
    moves integers, and would move floats.
    """
    nodes, int8 = {node.name: node for node in graph.nodes}, set(plan.int8_nodes)
    tensors = graph.tensors()
    moved = {name for edge in plan.edges if edge.range != edge.tensor for name in (edge.range, edge.tensor)}
    found: dict[tuple[str, int, int], list[gs.Node]] = {}
    for edge in plan.edges:
        node = nodes[edge.node]
        if edge.index or edge.node not in int8 or edge.tensor in moved or not is_linear(node):
            continue
        if tensors[edge.tensor].dtype == np.float32:
            groups, _, inputs, _ = weight_matrix(node).shape
            found.setdefault((edge.tensor, channel_axis(node), groups * inputs), []).append(node)
    taken: dict[str, Site] = {}
    for (tensor, axis, channels), readers in found.items():
        if channels == 1:
            continue
        pads = {padding(node) for node in readers}
        shared = pads.pop() if len(pads) == 1 else None
        takes_middle = shared is not None and all(bias_of(graph, node) is not None for node in readers)
        names = tuple(node.name for node in readers)
        taken.setdefault(tensor, Site(tensor, axis, channels, names, shared or (), takes_middle))
    return list(taken.values())


def is_made_by(tensor: gs.Tensor, ops: Set[str]) -> bool:
    """Whether one of some operators makes a tensor."""
    return bool(tensor.inputs) and tensor.inputs[0].op in ops


def inserted(graph: gs.Graph, plan: Plan, affines: Mapping[Site, Affine]) -> tuple[gs.Graph, Plan]:
    """A copy of a graph with operators at some sites, and the plan for it; both compute the same function."""
    made, names = graph.copy(), Names(graph)
    nodes, tensors = {node.name: node for node in made.nodes}, made.tensors()
    renamed: dict[tuple[str, int], str] = {}
    for site, affine in affines.items():
        changed = _changed(made, names, site, affine, tensors[site.tensor], nodes[site.readers[0]])
        for reader in site.readers:
            _make_up(made, names, nodes[reader], affine)
            nodes[reader].inputs[0] = changed
            renamed[reader, 0] = changed.name
    edges = [
        replace(edge, tensor=name, range=name) if (name := renamed.get((edge.node, edge.index))) else edge
        for edge in plan.edges
    ]
    return made.toposort(), carried_over(replace(plan, edges=edges), graph, made)


def _changed(
    graph: gs.Graph, names: Names, site: Site, affine: Affine, tensor: gs.Variable, reader: gs.Node
) -> gs.Variable:
    """The tensor behind the operators, which are new in the graph."""
    rank, shape = len(reader.inputs[1].shape), tensor.shape
    factors = np.ones(site.channels) if affine.factors is None else affine.factors
    steps: list[tuple[str, NDArray]] = []
    if affine.middle is not None and site.pads:
        half, none = len(site.pads) // 2, (0, 0)
        pads = np.array([*none, *site.pads[:half], *none, *site.pads[half:]], np.int64)
        steps.append(("Pad", pads))
        more = pads.reshape(2, -1).sum(axis=0).tolist()
        shape = shape and [_longer(size, by) for size, by in zip(shape, more, strict=True)]
    if affine.factors is not None:
        steps.append(("Mul", site.broadcast(1 / factors, rank)))
    if affine.middle is not None:
        steps.append(("Sub", site.broadcast(affine.middle / factors, rank)))
    for number, (op, values) in enumerate(steps, 1):
        name = f"{site.name}/{op}"
        constant = gs.Constant(names.tensor(f"{name}/constant"), values)
        wish = site.name if number == len(steps) else f"{name}/output"
        output = gs.Variable(names.tensor(wish), tensor.dtype, shape)
        graph.nodes.append(gs.Node(op, names.node(name), {}, [tensor, constant], [output]))
        tensor = output
    return tensor


def _longer(size: int | str | None, by: int) -> int | str | None:
    """A dimension with so many zeros more; unknown if it has a name."""
    if isinstance(size, int):
        return size + by
    return None if by else size


def _make_up(graph: gs.Graph, names: Names, node: gs.Node, affine: Affine) -> None:
    """Undo an affine change in the constants of a reader, which gets a bias if it can have one."""
    if (bias := bias_of(graph, node)) is not None:
        bias.add(np.zeros(bias.size) if affine.middle is None else behind(node, affine.middle), names)
    if affine.middle is not None and "pads" in node.attrs:
        node.attrs["pads"] = [0] * len(node.attrs["pads"])
    if affine.factors is not None:
        scale_linear(node, affine.factors, names, output=False)
