"""What a kernel takes on a GPU by its data sheet, and an engine by the kernels of its placement.

A kernel takes a launch, and the longer of computing and moving its bytes. The few constants that no data
sheet has were fitted to two GPUs' profiles; `tools/cost_check.py` fits to one and checks on the other. This
is a model: it ranks placements, and is no measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_graphsurgeon as gs

from trtq.cost.fused import MOVES_INT8, Fused, Gemm, Kernel, fuse
from trtq.cost.gpus import Gpu
from trtq.cost.interface import Kind, Latency, Part, Precision, Rest
from trtq.graph.plan import Plan

BYTES: Mapping[Precision, int] = {"int8": 1, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Constants:
    """What no data sheet says.

    Attributes:
        launch_us: of a kernel that does nothing, as TensorRT's profiler sees it.
        memory: share of the bandwidth that kernels reach.
        convert: the same of kernels that only change datatype or layout.
        tensor: share of the tensor cores' rate that the inner loop of a large tile reaches.
        cuda: the same of the CUDA cores.
        narrow: tiles are slower where they are narrow: by width / (width + narrow).
        cached: how many times faster than memory the L2 cache is.
    """

    launch_us: float = 5.0
    memory: float = 0.8
    convert: float = 0.5
    tensor: float = 0.8
    cuda: float = 0.65
    narrow: float = 32.0
    cached: float = 3.0


@dataclass(frozen=True)
class Load:
    """What a kernel has to do.

    Attributes:
        precision: what it multiplies in.
        gemms: its products.
        sizes: bytes of each tensor that it reads or writes; weights are one.
        converts: whether it only changes datatype or layout.
    """

    precision: Precision
    gemms: tuple[Gemm, ...]
    sizes: tuple[int, ...]
    converts: bool = False

    @property
    def bytes(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class Time:
    """What a kernel takes, and what bounds it."""

    microseconds: float
    why: str


def kernel_time(gpu: Gpu, load: Load, constants: Constants = Constants()) -> Time:
    """A launch, and the longer of computing and of moving bytes."""
    share = constants.convert if load.converts else constants.memory
    moving = sum(
        size / (gpu.bandwidth * 1e3 * share * (constants.cached if size < gpu.l2 * 5e5 else 1))
        for size in load.sizes
    )
    computing = sum(_gemm_us(gpu, gemm, load.precision, constants) for gemm in load.gemms)
    longest = max(moving, computing)
    if longest < constants.launch_us:
        why = "launch"
    elif moving > computing:
        why = f"memory: {load.bytes / 1e6:.3g} MB"
    else:
        why = f"compute: {sum(gemm.macs for gemm in load.gemms) / 1e6:.4g} M multiply-accumulates"
    return Time(constants.launch_us + longest, why)


_TILES = ((128, 256), (256, 128), (128, 128), (128, 64), (256, 64), (64, 64), (128, 32), (64, 32))
_SPLITS = (1, 2, 4, 8)
_PADDING: Mapping[Precision, int] = {"int8": 32, "fp16": 8, "fp32": 4}
"""Channels are padded to multiples of this for the tensor cores' layouts."""

_Cores = Literal["tensor", "cuda"]


def _gemm_us(gpu: Gpu, gemm: Gemm, precision: Precision, constants: Constants) -> float:
    """The fastest of the kernels that there are: tensor cores with padded channels, or CUDA cores."""
    tensor, cuda = {
        "int8": (gpu.int8, gpu.dp4a),
        "fp16": (gpu.fp16, gpu.fp32 * (2 if gpu.capability >= 70 else 1)),
        "fp32": (gpu.tf32, gpu.fp32),
    }[precision]
    ways = [(cuda, constants.cuda, 4 if precision == "int8" else 1)]
    if tensor and not (precision == "fp32" and gemm.channels < _PADDING["fp32"]) and gemm.n > 1:
        ways.append((tensor, constants.tensor, _PADDING[precision]))
    return min(_tiled_us(gpu, gemm, rate * share, pad, constants) for rate, share, pad in ways)


def _tiled_us(gpu: Gpu, gemm: Gemm, rate: float, pad: int, constants: Constants) -> float:
    """By whole waves of tiles over the multiprocessors, each TFLOP/s `rate` / SMs fast."""
    channels = gemm.channels or gemm.k
    k = gemm.k * math.ceil(channels / pad) * pad / channels
    best = math.inf
    for rows, columns in _TILES if gemm.n > 1 else ((128, 1),):
        tiles = math.ceil(gemm.m / rows) * math.ceil(gemm.n / columns) * gemm.count
        width = min(rows, columns)
        slow = (width + constants.narrow) / width if gemm.n > 1 else 1.0
        for split in _SPLITS:
            waves = math.ceil(tiles * split / gpu.sms)
            flops = 2.0 * rows * columns * k / split
            best = min(best, waves * flops * slow * gpu.sms / (rate * 1e6))
    return best


class Roofline:
    """What engines of one graph cost on a GPU by its data sheet; a `CostSource`.

    Args:
        graph: folded, not yet quantized.
        shapes: of its tensors.
    """

    kind: Kind = "modelled"

    def __init__(
        self,
        graph: gs.Graph,
        shapes: Mapping[str, Sequence[int]],
        gpu: Gpu,
        constants: Constants = Constants(),
    ) -> None:
        self.fused = fuse(graph, shapes)
        self.gpu = gpu
        self._constants = constants
        self._times: dict[Load, Time] = {}

    @property
    def name(self) -> str:
        return f"roofline of NVIDIA {self.gpu.name}"

    def latency(self, plan: Plan, rest: Rest) -> Latency:
        parts, moved = [], 0
        for kernel, load, conversions in loads(self.fused, plan, rest):
            reformats = sum(self._time(each).microseconds for each in conversions)
            time = self._time(load)
            moved += load.bytes + sum(each.bytes for each in conversions)
            parts.append(
                Part(tuple(kernel.nodes), load.precision, time.microseconds + reformats, reformats, time.why)
            )
        return Latency(sum(part.microseconds for part in parts), tuple(parts), self.kind, self.name, moved)

    def _time(self, load: Load) -> Time:
        if load not in self._times:
            self._times[load] = kernel_time(self.gpu, load, self._constants)
        return self._times[load]


# --- which datatypes a placement makes kernels read and write -------------------------------------------


@dataclass
class _Use:
    """How a tensor is read: in floating point, and by which ranges in INT8."""

    floats: bool = False
    ranges: tuple[str, ...] = ()
    by: int | None = None

    @property
    def int8_only(self) -> bool:
        return bool(self.ranges) and not self.floats


def loads(fused: Fused, plan: Plan, rest: Rest) -> list[tuple[Kernel, Load, list[Load]]]:
    """What each kernel of an engine with a placement has to do, and the conversions in front of it.

    A tensor is written in INT8 where all who read it want so and what writes it can quantize: INT8 products,
    generated kernels, and what only moves values that it reads in INT8. Else it is written in floating
    point, and a kernel of its own quantizes it once for each range.
    """
    edges = {(edge.node, edge.index): edge.range for edge in plan.edges}
    int8 = set(plan.int8_nodes)
    uses: dict[str, _Use] = {}
    for name in fused.outputs:
        uses.setdefault(name, _Use()).floats = True
    types: dict[tuple[int, str], bool] = {}
    for position in range(len(fused.kernels) - 1, -1, -1):
        kernel = fused.kernels[position]
        carried = _carried(kernel, uses)
        for read in kernel.reads:
            ranges = {edges.get(end, carried) for end in read.ends}
            types[position, read.tensor] = None not in ranges
            use = uses.setdefault(read.tensor, _Use())
            use.floats |= None in ranges
            use.ranges = tuple(dict.fromkeys((*use.ranges, *(r for r in ranges if r is not None))))
            if ranges != {None}:
                use.by = position  # the first of the readers in INT8, as this goes backwards
    found: list[tuple[Kernel, Load, list[Load]]] = []
    waiting: dict[int, list[Load]] = {}
    for name in fused.inputs:
        _convert_input(fused, name, uses.get(name), rest, waiting)
    for position, kernel in enumerate(fused.kernels):
        is_int8 = bool(kernel.weighted) and all(name in int8 for name in kernel.weighted)
        can = _can_quantize(kernel, is_int8, types, position)
        sizes = [kernel.weights * (1 if is_int8 else BYTES[rest])]
        sizes += [
            read.elements * (1 if types[position, read.tensor] else BYTES[rest]) for read in kernel.reads
        ]
        for name in kernel.writes:
            use, count = uses.get(name, _Use(floats=True)), fused.elements[name]
            written: Precision = "int8" if use.int8_only and can else rest
            sizes.append(count * BYTES[written])
            more = use.ranges[written == "int8" :]
            if more and use.by is not None:
                conversion = Load(rest, (), (count * BYTES[written], count), converts=True)
                waiting.setdefault(use.by, []).extend([conversion] * len(more))
        if kernel.work == "view":
            continue
        precision: Precision = "int8" if is_int8 else rest
        if not kernel.weighted and kernel.reads and all(types[position, r.tensor] for r in kernel.reads):
            precision = "int8"
        load = Load(precision, tuple(kernel.gemms), tuple(sizes), converts=kernel.work == "move")
        found.append((kernel, load, waiting.get(position, [])))
    return found


def _carried(kernel: Kernel, uses: Mapping[str, _Use]) -> str | None:
    """The range that what follows a kernel wants and that its inputs can have as well."""
    if not (kernel.work in MOVES_INT8 or kernel.is_max_pool):
        return None
    wanted = [uses[name] for name in kernel.writes if name in uses]
    ranges = {use.ranges for use in wanted if use.int8_only and len(use.ranges) == 1}
    if not wanted or not all(use.int8_only for use in wanted) or len(ranges) != 1:
        return None
    return ranges.pop()[0]


def _can_quantize(
    kernel: Kernel, is_int8: bool, types: Mapping[tuple[int, str], bool], position: int
) -> bool:
    if kernel.weighted:
        return is_int8
    if kernel.work == "pointwise":
        return True
    return bool(kernel.reads) and all(types[position, read.tensor] for read in kernel.reads)


def _convert_input(
    fused: Fused, name: str, use: _Use | None, rest: Rest, waiting: dict[int, list[Load]]
) -> None:
    """Model inputs are float32 in rows: they are quantized, or rearranged in float16 for a convolution."""
    if use is None or name not in fused.elements:
        return
    count = fused.elements[name]
    if use.by is not None:
        load = Load(rest, (), (4 * count, count), converts=True)
        waiting.setdefault(use.by, []).extend([load] * len(use.ranges))
    if use.floats and rest == "fp16":
        first = next((i for i, k in enumerate(fused.kernels) if any(r.tensor == name for r in k.reads)), None)
        if first is not None and fused.kernels[first].weighted:
            waiting.setdefault(first, []).append(Load(rest, (), (4 * count, 2 * count), converts=True))
