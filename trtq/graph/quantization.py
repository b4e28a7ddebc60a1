"""A quantization: all that a Q/DQ model is made of, and what every step of the workflow takes and returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.graph.half import convert_to_half
from trtq.graph.plan import Plan
from trtq.graph.rewrite import rewrite

WeightScales = Mapping[tuple[str, int], NDArray[np.float32]]
"""(constant, axis) -> float32 scales (channels,) along that axis."""


@dataclass(frozen=True)
class Quantization:
    """A float graph, where its quantizers stand, and the ranges they have.

    Attributes:
        graph: folded, float32. Whoever holds a Quantization does not change its graph in place.
        plan: the placement.
        scales: activation tensor -> float32 scale (amax / 127), > 0.
        weight_scales: the scales of weights that were learned; all others are amax / 127 per channel.
    """

    graph: gs.Graph
    plan: Plan
    scales: Mapping[str, np.float32]
    weight_scales: WeightScales = field(default_factory=dict)

    def rewritten(self, *, weights: str = "int8", rest: str = "fp32") -> gs.Graph:
        """The Q/DQ graph.

        Args:
            weights: one of `rewrite.WEIGHT_FORMS`.
            rest: precision of what is not quantized, fp32 or fp16.

        Raises:
            InputError: a tensor of the plan has no scale, or the graph cannot be converted to half.
        """
        graph = convert_to_half(self.graph) if rest == "fp16" else self.graph
        return rewrite(graph, self.plan, self.scales, weights=weights, weight_scales=self.weight_scales)
