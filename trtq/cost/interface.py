"""What an engine costs, whoever says it: the interface that placement and search ask.

Three kinds of sources answer, in this order of trust: *measured* (engines timed layer by layer on the GPU
here), *imported* (what trtexec wrote elsewhere) and *modelled* (a roofline of the GPU's data sheet).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from trtq.graph.plan import Plan

Kind = Literal["measured", "imported", "modelled"]
"""Where a figure comes from."""

Precision = Literal["int8", "fp16", "fp32"]

Rest = Literal["fp16", "fp32"]
"""What is not INT8."""

Builder = Literal["tensorrt", "tensorrt-rtx"]
"""Whose kernels: TensorRT fuses INT8 convolutions with what follows, TensorRT for RTX does not."""


@dataclass(frozen=True)
class Part:
    """What TensorRT runs as one kernel, with the reformats in front of it.

    Attributes:
        nodes: names of its ONNX nodes, in the order of the graph.
        precision: of its product, or of what it reads and writes where it has none.
        microseconds: of the kernel and its reformats.
        reformats_us: the part of `microseconds` that goes to quantizing its inputs.
        why: what bounds it, in a few words: "memory: 12.8 MB", "launch".
        kernels: how many it launches.
    """

    nodes: tuple[str, ...]
    precision: Precision
    microseconds: float
    reformats_us: float
    why: str
    kernels: int = 1


@dataclass(frozen=True)
class Latency:
    """What one inference of an engine costs.

    Attributes:
        microseconds: the sum over the parts: what the GPU takes where the engine runs as a CUDA graph. The
            sum of the layers that TensorRT's profiler shows is larger: it adds some to each kernel.
        parts: in the order in which they run.
        kind: where the figures come from.
        source: the same in words: "roofline of NVIDIA L4", names of files.
        bytes: that all parts read and write, weights included; caches are not taken into account.
    """

    microseconds: float
    parts: tuple[Part, ...]
    kind: Kind
    source: str
    bytes: int


class CostSource(Protocol):
    """Something that knows what engines of one model cost.

    Attributes:
        kind: see `Latency`.
        name: see `Latency.source`.
    """

    @property
    def kind(self) -> Kind: ...

    @property
    def name(self) -> str: ...

    def latency(self, plan: Plan, rest: Rest) -> Latency:
        """What the engine costs that has the plan's nodes in INT8 and Q/DQ on the plan's edges.

        A plan without INT8 nodes and edges is the engine of the model as it is, in `rest`. Takes about a
        millisecond for a few hundred nodes: what does not depend on the plan is computed once, before.
        """
        ...
