"""Costs by a roofline: what engines of a graph take on a GPU of which only the data sheet is at hand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import onnx_graphsurgeon as gs

from trtq.cost.fused import fuse
from trtq.cost.gpus import Gpu
from trtq.cost.interface import Builder, Kind, Latency, Part, Rest
from trtq.cost.placed import Conversion, Placed, placed
from trtq.cost.roofline import FITTED, Constants, Load, Time, kernel_time
from trtq.graph.plan import Plan


class Modelled:
    """A `CostSource` by the roofline of a GPU.

    Args:
        graph: folded, not yet quantized.
        shapes: of its tensors (see `graph.shapes.concrete_shapes`).
        builder: whose engines.
        constants: what no data sheet says.
        int8_inputs: model inputs that the engine takes in INT8.
    """

    kind: Kind = "modelled"

    def __init__(
        self,
        graph: gs.Graph,
        shapes: Mapping[str, Sequence[int]],
        gpu: Gpu,
        builder: Builder = "tensorrt",
        constants: Constants = FITTED,
        int8_inputs: Collection[str] = (),
    ) -> None:
        self.fused = fuse(graph, shapes)
        self.gpu = gpu
        self.builder: Builder = builder
        self._constants = constants
        self._int8_inputs = frozenset(int8_inputs)
        self._times: dict[Load, Time] = {}

    @property
    def name(self) -> str:
        builder = "TensorRT for RTX" if self.builder == "tensorrt-rtx" else "TensorRT"
        return f"roofline of NVIDIA {self.gpu.name}, {builder}"

    def latency(self, plan: Plan, rest: Rest) -> Latency:
        """See `CostSource`."""
        return priced(
            self.placed(plan, rest),
            kernel=self.kernel,
            why=lambda each: self.time(each.load).why,
            conversion=lambda each: self.time(each.load).microseconds,
            kind=self.kind,
            source=self.name,
        )

    def placed(self, plan: Plan, rest: Rest) -> list[Placed]:
        """The kernels of the engine with a placement."""
        return placed(self.fused, plan, rest, self.builder, self._int8_inputs)

    def kernel(self, each: Placed) -> float:
        """Microseconds of a kernel and of what does for it what the builder does not fuse."""
        return sum(self.time(load).microseconds for load in (each.load, *each.after))

    def time(self, load: Load) -> Time:
        """What a kernel takes."""
        if load not in self._times:
            self._times[load] = kernel_time(self.gpu, load, self._constants)
        return self._times[load]


def priced(
    kernels: Sequence[Placed],
    *,
    kernel: Callable[[Placed], float],
    conversion: Callable[[Conversion], float],
    why: Callable[[Placed], str],
    kind: Kind,
    source: str,
) -> Latency:
    """What an engine costs whose kernels and conversions take what two functions say, in microseconds."""
    parts, moved = [], 0
    for each in kernels:
        reformats = sum(conversion(before) for before in each.before)
        loads = (each.load, *each.after, *(before.load for before in each.before))
        moved += sum(load.bytes for load in loads)
        parts.append(
            Part(
                nodes=tuple(each.kernel.nodes),
                precision=each.load.precision,
                microseconds=kernel(each) + reformats,
                reformats_us=reformats,
                why=why(each),
                kernels=len(loads),
            )
        )
    return Latency(sum(part.microseconds for part in parts), tuple(parts), kind, source, moved)
