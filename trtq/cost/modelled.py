"""Costs by a roofline: what engines of a graph take on a GPU of which only the data sheet is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_graphsurgeon as gs

from trtq.cost.fused import fuse
from trtq.cost.gpus import Gpu
from trtq.cost.interface import Builder, Kind, Latency, Part, Rest
from trtq.cost.placed import placed
from trtq.cost.roofline import FITTED, Constants, Load, Time, kernel_time
from trtq.graph.plan import Plan


class Modelled:
    """A `CostSource` by the roofline of a GPU.

    Args:
        graph: folded, not yet quantized.
        shapes: of its tensors (see `graph.shapes.concrete_shapes`).
        builder: whose engines.
        constants: what no data sheet says.
    """

    kind: Kind = "modelled"

    def __init__(
        self,
        graph: gs.Graph,
        shapes: Mapping[str, Sequence[int]],
        gpu: Gpu,
        builder: Builder = "tensorrt",
        constants: Constants = FITTED,
    ) -> None:
        self.fused = fuse(graph, shapes)
        self.gpu = gpu
        self._builder: Builder = builder
        self._constants = constants
        self._times: dict[Load, Time] = {}

    @property
    def name(self) -> str:
        builder = "TensorRT for RTX" if self._builder == "tensorrt-rtx" else "TensorRT"
        return f"roofline of NVIDIA {self.gpu.name}, {builder}"

    def latency(self, plan: Plan, rest: Rest) -> Latency:
        """See `CostSource`."""
        parts, moved = [], 0
        for each in placed(self.fused, plan, rest, self._builder):
            reformats = sum(self.time(load).microseconds for load in each.before)
            time = self.time(each.load)
            own = time.microseconds + sum(self.time(load).microseconds for load in each.after)
            moved += sum(load.bytes for load in (each.load, *each.before, *each.after))
            parts.append(
                Part(
                    nodes=tuple(each.kernel.nodes),
                    precision=each.load.precision,
                    microseconds=own + reformats,
                    reformats_us=reformats,
                    why=time.why,
                    kernels=1 + len(each.before) + len(each.after),
                )
            )
        return Latency(sum(part.microseconds for part in parts), tuple(parts), self.kind, self.name, moved)

    def time(self, load: Load) -> Time:
        """What a kernel takes."""
        if load not in self._times:
            self._times[load] = kernel_time(self.gpu, load, self._constants)
        return self._times[load]
