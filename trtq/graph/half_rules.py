"""What stays float32 where the rest of a model becomes float16, as small named rules over measured ranges.

float16 ends at 65504, holds 11 bits down to 6e-5 and nothing below 6e-8. A node stays float32 where what it
reads, writes or sums up leaves that range, or drowns at its lower end. The ranges are of a few rows, so every
rule leaves headroom for rows that were not seen. `RULES` are tried in order; the first that applies gives the
reason in the plan.

A mask is the one exception: -1e9 or -3.4e38, added in front of a softmax, means "not this one", and the most
negative float16 says the same. Such tensors become float16 and saturate (see `half.SATURATED`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.graph.foreign import View, is_foreign_node
from trtq.graph.half import convert_to_half, has_body, read_by_bodies, takes_half
from trtq.graph.plan import Float32Node, Plan
from trtq.graph.weights import values_of

LIMIT = float(np.finfo(np.float16).max)
"""Largest finite float16."""

SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)
"""Below this magnitude float16 has fewer than 11 bits."""

LAST_INTEGER = 2048
"""float16 holds every integer up to this one."""

HEADROOM = 2.0
"""Other rows may reach this many times as far as those that were measured."""

MOST_LOSS = 1e-4
"""Largest energy of what rounding to float16 takes from a tensor, relative to the tensor's: -40 dB. In its
normal range float16 loses 1e-7."""

_SUBNORMAL_NOISE = float(np.finfo(np.float16).smallest_subnormal) ** 2 / 12
"""Mean square of the error of rounding to multiples of the smallest float16."""

MOST_SUMMED = 2048
"""A float16 sum of this many equal values no longer grows."""


@dataclass(frozen=True)
class Extent:
    """How far the values of a tensor reach, over all rows that were run.

    Attributes:
        low, high: the smallest and largest value; +inf and -inf where the tensor was empty.
        smallest: the smallest magnitude that is not zero, where `reads_singular` is true of a reader.
        energy: sum of the squares of the values.
        count: how many values.
    """

    low: float
    high: float
    smallest: float
    energy: float
    count: float

    @property
    def amax(self) -> float:
        """Largest magnitude; 0.0 of an empty tensor."""
        return amax_of(self.low, self.high)

    @property
    def rms(self) -> float:
        """Root of the mean square; at least the mean magnitude."""
        return math.sqrt(self.energy / self.count) if self.count else 0.0

    @property
    def loss(self) -> float:
        """What rounding to multiples of the smallest float16 takes at most, relative to the energy."""
        return _loss(self.rms)


def amax_of(low: float, high: float) -> float:
    """The largest magnitude of values that lie between these; 0.0 of none, whose ends are +inf and -inf."""
    return max(-low, high, 0.0)


@dataclass(frozen=True)
class Scene:
    """What the rules look at.

    Attributes:
        graph: folded, float32.
        plan: the INT8 nodes among its nodes sum up in integers.
        scales: activation tensor -> scale of its quantizers.
        extents: float32 tensor -> its extent; empty where nothing was measured.
    """

    graph: gs.Graph
    plan: Plan
    scales: Mapping[str, np.float32]
    extents: Mapping[str, Extent]

    @cached_property
    def masks(self) -> frozenset[str]:
        """Tensors that reach nothing but softmaxes, through operators that keep a mask a mask."""
        outputs = {tensor.name for tensor in self.graph.outputs}
        found: set[str] = set()

        def add(tensor: gs.Tensor) -> None:
            if (
                tensor.outputs
                and tensor.name not in outputs
                and all(
                    node.op == "Softmax" or (node.op in _MASKING_OPS and node.outputs[0].name in found)
                    for node in tensor.outputs
                )
            ):
                found.add(tensor.name)

        for node in reversed(self.graph.nodes):  # what reads a tensor comes before it
            for tensor in (*node.outputs, *node.inputs):
                add(tensor)
        return frozenset(found)

    @cached_property
    def view(self) -> View:
        """What can be computed of the graph."""
        return View.of(self.graph)

    @cached_property
    def captured(self) -> frozenset[str]:
        """Tensors that bodies of control flow read."""
        return read_by_bodies(self.graph)

    @cached_property
    def int8(self) -> frozenset[str]:
        """Names of the INT8 nodes."""
        return frozenset(self.plan.int8_nodes)

    @cached_property
    def ranges(self) -> Mapping[str, list[str]]:
        """Node -> the tensors with a scale whose ranges its quantizers have."""
        found: dict[str, list[str]] = {}
        for edge in self.plan.edges:
            if edge.range in self.scales:
                found.setdefault(edge.node, []).append(edge.range)
        return found

    @cached_property
    def between_integers(self) -> frozenset[str]:
        """Names of nodes that compute an index or a shape in floating point: they lie between a Cast from
        integers and a Cast to integers, with nothing but `_INDEX_OPS` around."""
        nodes = self.graph.nodes
        made = _reached((n for n in nodes if _casts(n, "iu", "f")), lambda n: n.outputs, lambda t: t.outputs)
        used = _reached((n for n in nodes if _casts(n, "f", "iu")), lambda n: n.inputs, lambda t: t.inputs)
        return made & used

    def extent(self, tensor: gs.Tensor) -> Extent | None:
        """What was measured for a tensor."""
        return self.extents.get(tensor.name)

    def constant(self, tensor: gs.Constant) -> _Constant:
        """What the rules need to know of a constant, read once."""
        if tensor.name not in self._constants:
            self._constants[tensor.name] = _Constant.of(values_of(tensor))
        return self._constants[tensor.name]

    @cached_property
    def _constants(self) -> dict[str, _Constant]:
        return {}


@dataclass(frozen=True)
class Rule:
    """Why a node stays float32: `reason` returns the sentence, or None to let it become float16."""

    name: str
    reason: Callable[[gs.Node, Scene], str | None]


def float32_nodes(
    graph: gs.Graph, plan: Plan, scales: Mapping[str, np.float32], extents: Mapping[str, Extent]
) -> list[Float32Node]:
    """The nodes of a graph that stay float32 where all others become float16, with the reason, in order.

    Args:
        graph, plan, scales, extents: as of `Scene`. Without extents, operators whose results may leave the
            range whatever their inputs are stay float32.
    """
    scene = Scene(graph, plan, scales, extents)
    found = []
    for node in graph.nodes:
        if not any(_is_float(tensor) for tensor in (*node.inputs, *node.outputs)):
            continue
        for rule in RULES:
            if (reason := rule.reason(node, scene)) is not None:
                found.append(Float32Node(node.name, node.op, rule.name, reason))
                break
    return found


def half_by_rules(graph: gs.Graph, extents: Mapping[str, Extent]) -> gs.Graph:
    """A graph without Q/DQ in float16, but for the nodes that the rules keep in float32.

    Args:
        graph, extents: as for `float32_nodes`.

    Raises:
        InputError: as `convert_to_half`.
    """
    return convert_to_half(graph, unquantized_float32(graph, extents))


def unquantized_float32(graph: gs.Graph, extents: Mapping[str, Extent]) -> list[str]:
    """Names of the nodes of a graph without Q/DQ that the rules keep in float32; as `float32_nodes`."""
    return [node.name for node in float32_nodes(graph, Plan("", [], [], []), {}, extents)]


# --- rules ----------------------------------------------------------------------------------------------


def _has_body(node: gs.Node, scene: Scene) -> str | None:
    if has_body(node):
        return "its body is not converted"
    if not scene.captured.isdisjoint(tensor.name for tensor in node.outputs):
        return "the body of a control-flow node reads its output"
    return None


def _foreign(node: gs.Node, scene: Scene) -> str | None:
    if is_foreign_node(node):
        return "it is not an ONNX operator: it keeps its types"
    return scene.view.reason(node) if scene.view.hides(node) else None


def _index(node: gs.Node, scene: Scene) -> str | None:
    if node.name in scene.between_integers:
        return "it computes an index or a shape, between integers"
    return None


def _range(node: gs.Node, scene: Scene) -> str | None:
    for side, tensor in _half_candidates(node, scene.graph.opset):
        reason = _of_constant(tensor, scene) if isinstance(tensor, gs.Constant) else _of_values(tensor, scene)
        if reason is not None:
            return f"its {side} '{tensor.name}' {reason}"
    return None


def _of_constant(tensor: gs.Constant, scene: Scene) -> str | None:
    constant = scene.constant(tensor)
    if constant.amax > LIMIT and tensor.name not in scene.masks:
        return f"holds {constant.amax:.3g}, and float16 ends at {LIMIT:.0f}"
    if constant.loss > MOST_LOSS:
        return f"(up to {constant.amax:.3g}) lies where float16 has few bits or none"
    return None


def _of_values(tensor: gs.Tensor, scene: Scene) -> str | None:
    extent = scene.extent(tensor)
    if extent is None:
        return None
    if not extent.amax * HEADROOM <= LIMIT:
        masks = tensor.name in scene.masks and extent.high * HEADROOM <= LIMIT
        return None if masks else f"reaches {extent.amax:.3g}, and float16 ends at {LIMIT:.0f}"
    if extent.loss > MOST_LOSS:
        return f"(up to {extent.amax:.3g}) lies where float16 has few bits or none"
    maker = tensor.inputs[0] if tensor.inputs else None
    integers = maker is not None and (_casts(maker, "iu", "f") or maker.op in _MAKE_INTEGERS)
    if integers and extent.amax > LAST_INTEGER:
        return f"holds integers up to {extent.amax:.0f}; float16 holds all up to {LAST_INTEGER}"
    return None


def _scale(node: gs.Node, scene: Scene) -> str | None:
    for tensor in scene.ranges.get(node.name, ()):
        scale = float(scene.scales[tensor])
        with np.errstate(over="ignore"):
            half = float(np.float16(scale))
        if not abs(half / scale - 1) <= 2**-7:
            return f"the scale of its quantizer, {scale:.3g}, does not fit float16"
    return None


def _grows(node: gs.Node, scene: Scene) -> str | None:
    """Operators whose result grows faster than what they read: twice the input is more than twice that."""
    power = _power(node)
    if power is None:
        return None
    extent = scene.extent(node.outputs[0])
    if extent is None:
        return "its result may leave float16's range; calibrate with data to find out"
    if node.op == "Exp":
        limit, reached = math.sqrt(LIMIT), extent.high
    elif node.op == "ReduceL2":  # the square of the result is the sum of the squares
        limit, reached = LIMIT / HEADROOM**2, extent.amax**2
    else:
        limit, reached = LIMIT / HEADROOM**power, extent.amax
    if reached <= limit:
        return None
    return f"it reaches {reached:.3g}, and twice its input would be beyond float16's {LIMIT:.0f}"


def _power(node: gs.Node) -> float | None:
    """By which power a result grows with the input; 1 for `Exp`, which has a limit of its own."""
    if node.op in _SUMS_OF_SQUARES or (node.op == "Mul" and node.inputs[0] is node.inputs[1]):
        return 2.0
    if node.op == "Pow":
        exponent = node.inputs[1]
        return float(np.abs(exponent.values).max()) if isinstance(exponent, gs.Constant) else math.inf
    return 1.0 if node.op == "Exp" else None


def _inside(node: gs.Node, scene: Scene) -> str | None:
    """Operators that square their input, or take its exponential, inside; the result shows nothing of it."""
    if node.op not in _SQUARE_INSIDE | _EXPONENTIALS_INSIDE:
        return None
    if node.op == "MeanVarianceNormalization":
        return "it adds 1e-9 to a variance, which float16 cannot hold"
    extent = scene.extent(node.inputs[0])
    if extent is None:
        return "what it computes inside may leave float16's range; calibrate with data to find out"
    if node.op in _EXPONENTIALS_INSIDE:
        if HEADROOM * extent.high <= math.log(LIMIT):
            return None
        return f"inside it is exp({extent.high:.3g}), and twice that input is beyond float16's {LIMIT:.0f}"
    reach = max(extent.amax**2, _squares(node, scene) * extent.rms**2)
    if reach > LIMIT / HEADROOM**2:
        return f"its squares reach about {reach:.3g} inside, and float16 ends at {LIMIT:.0f}"
    if _loss(extent.rms**2) > MOST_LOSS:
        return f"its squares (about {extent.rms**2:.3g}) lie where float16 has few bits or none"
    return None


def _squares(node: gs.Node, scene: Scene) -> float:
    """How many squares are summed inside, where their sum counts and not their mean; else 0."""
    read, made = scene.extent(node.inputs[0]), scene.extent(node.outputs[0])
    if node.op == "LpPool":
        return float(np.prod(node.attrs["kernel_shape"]))
    if node.op == "GlobalLpPool":
        return read.count / made.count if read and made and made.count else math.inf
    if node.op == "LpNormalization":
        shape = node.inputs[0].shape
        size = shape[node.attrs.get("axis", -1)] if shape is not None else None
        return float(size) if isinstance(size, int) else math.inf
    return 0.0


def _singular(node: gs.Node, scene: Scene) -> str | None:
    """Operators that are infinite at 0, where small values that become 0 or lose bits matter most."""
    for tensor in node.inputs:
        extent = scene.extent(tensor)
        if extent and reads_singular(node, tensor) and extent.smallest < SMALLEST_NORMAL * HEADROOM:
            return f"its input '{tensor.name}' goes down to {extent.smallest:.3g}, where float16 has few bits"
    return None


def reads_singular(node: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether a node's result is infinite where this input is 0."""
    if node.op == "Pow":
        exponent = node.inputs[1]
        negative = isinstance(exponent, gs.Constant) and bool(np.min(exponent.values) < 0)
        return negative and node.inputs[0] is tensor
    index = _SINGULAR.get(node.op)
    return index is not None and node.inputs[index] is tensor


def _sums(node: gs.Node, scene: Scene) -> str | None:
    """Sums over many values, which a kernel may keep in float16."""
    if node.op in ("Mean", "Sum"):
        return _variadic_sum(node, scene)
    if node.op not in _SUMS:
        return None
    extent, made = scene.extent(node.inputs[0]), scene.extent(node.outputs[0])
    if extent is None or made is None:
        return "its sum may leave float16's range; calibrate with data to find out"
    terms = _terms(node, extent, made)
    if terms > MOST_SUMMED:
        return f"it sums {terms:.0f} values; a float16 sum stops growing at {MOST_SUMMED}"
    if terms * extent.rms * HEADROOM > LIMIT:
        return f"its sum reaches about {terms * extent.rms:.3g}, and float16 ends at {LIMIT:.0f}"
    return None


def _variadic_sum(node: gs.Node, scene: Scene) -> str | None:
    """Sums of tensors: the mean and the last partial sum may be small where the others are not."""
    found = [scene.constant(t) if isinstance(t, gs.Constant) else scene.extent(t) for t in node.inputs]
    reach = sum(each.amax for each in found if each)
    if reach * HEADROOM > LIMIT:
        return f"its sum reaches up to {reach:.3g} on the way, and float16 ends at {LIMIT:.0f}"
    return None


def _terms(node: gs.Node, read: Extent, made: Extent) -> float:
    """How many values are summed for each value of the result."""
    if node.op == "AveragePool":
        return float(np.prod(node.attrs["kernel_shape"]))
    if node.op == "CumSum":
        axis, shape = node.inputs[1], node.inputs[0].shape
        known = isinstance(axis, gs.Constant) and shape is not None
        size = shape[int(axis.values.reshape(()))] if known else None
        return float(size) if isinstance(size, int) else math.inf
    return read.count / made.count if made.count else 0.0


def _products(node: gs.Node, scene: Scene) -> str | None:
    """Products in floating point whose sums may leave the range on the way to a result that does not."""
    if node.op not in ("Conv", "Gemm", "MatMul") or node.name in scene.int8:
        return None
    extent, weight = scene.extent(node.inputs[0]), node.inputs[1]
    if extent is None or not isinstance(weight, gs.Constant) or len(weight.shape) < 2:
        return None
    axis = -2 if node.op == "MatMul" or (node.op == "Gemm" and not node.attrs.get("transB", 0)) else -1
    values = np.abs(values_of(weight), dtype=np.float64)
    values = values.reshape(len(values), -1) if node.op == "Conv" else values
    reach = extent.rms * float(values.sum(axis=axis).max(initial=0.0))
    if reach * HEADROOM > LIMIT:
        return f"its sums reach about {reach:.3g} on the way, and float16 ends at {LIMIT:.0f}"
    return None


RULES: tuple[Rule, ...] = (
    Rule("foreign", _foreign),
    Rule("control-flow", _has_body),
    Rule("index", _index),
    Rule("range", _range),
    Rule("scale", _scale),
    Rule("grows", _grows),
    Rule("inside", _inside),
    Rule("singular", _singular),
    Rule("sums", _sums),
    Rule("products", _products),
)

_MASKING_OPS = frozenset(
    "Add Cast Concat Div Expand Gather Identity Max Min Mul Reshape Slice Squeeze Tile Transpose Unsqueeze"
    " Where".split()
)
_INDEX_OPS = frozenset(
    "Abs Add Cast Ceil Clip Concat Div Expand Floor Gather Identity Max Min Mod Mul Neg Pow Range Reciprocal"
    " Reshape Round Slice Sqrt Squeeze Sub Tile Transpose Unsqueeze Where".split()
)
_SUMS = frozenset(
    "AveragePool CumSum GlobalAveragePool ReduceL1 ReduceLogSum ReduceLogSumExp ReduceMean ReduceSum".split()
)
_SUMS_OF_SQUARES = frozenset({"ReduceL2", "ReduceSumSquare"})
_SQUARE_INSIDE = frozenset(
    "GlobalLpPool GroupNormalization InstanceNormalization LRN LayerNormalization LpNormalization LpPool"
    " MeanVarianceNormalization RMSNormalization ReduceL2".split()
)
_EXPONENTIALS_INSIDE = frozenset({"Mish", "ReduceLogSumExp", "Softplus"})
_MAKE_INTEGERS = frozenset({"Ceil", "CumSum", "Floor", "Range", "Round"})
_SINGULAR = {"Div": 1, "Log": 0, "Reciprocal": 0}
"""Operators that are infinite where an input is 0 -> which input."""


# --- helpers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Constant:
    """Largest finite magnitude, and the loss by rounding to float16."""

    amax: float
    loss: float

    @classmethod
    def of(cls, values: NDArray) -> _Constant:
        flat = values.ravel()
        amax = float(max(-flat.min(initial=0.0), flat.max(initial=0.0)))
        if not math.isfinite(amax):
            flat = flat[np.isfinite(flat)]
            amax = float(np.abs(flat).max(initial=0.0))
        rms = amax * math.sqrt(float(np.square(flat / amax).mean())) if amax else 0.0
        return cls(amax, _loss(rms))


def _loss(rms: float) -> float:
    return _SUBNORMAL_NOISE / rms**2 if rms else 0.0


def _is_float(tensor: gs.Tensor) -> bool:
    return bool(tensor.name) and tensor.dtype == np.float32


def _half_candidates(node: gs.Node, opset: int) -> Iterator[tuple[str, gs.Tensor]]:
    """Tensors that would be float16 if the node were: "input" or "output", and the tensor."""
    for index, tensor in enumerate(node.inputs):
        if _is_float(tensor) and takes_half(node, index, opset):
            yield "input", tensor
    yield from (("output", tensor) for tensor in node.outputs if _is_float(tensor))


def _casts(node: gs.Node, source: str, target: str) -> bool:
    """Whether a node casts from dtypes of some kinds to dtypes of others (NumPy's letters)."""
    if node.op != "Cast" or not node.outputs:
        return False
    dtypes = (node.inputs[0].dtype, node.outputs[0].dtype)
    if any(dtype is None or isinstance(dtype, int) for dtype in dtypes):
        return False
    return np.dtype(dtypes[0]).kind in source and np.dtype(dtypes[1]).kind in target


def _reached(
    start: Iterator[gs.Node],
    tensors: Callable[[gs.Node], list[gs.Tensor]],
    neighbours: Callable[[gs.Tensor], list[gs.Node]],
) -> frozenset[str]:
    """Names of the nodes that lie behind (or before) some over `_INDEX_OPS`, those themselves too."""
    waiting = list(start)
    found = {node.name for node in waiting}
    while waiting:
        for tensor in tensors(waiting.pop()):
            for node in neighbours(tensor):
                if node.op in _INDEX_OPS and node.name not in found and _computes_float(node):
                    found.add(node.name)
                    waiting.append(node)
    return frozenset(found)


def _computes_float(node: gs.Node) -> bool:
    return any(_is_float(tensor) for tensor in (*node.inputs, *node.outputs))
