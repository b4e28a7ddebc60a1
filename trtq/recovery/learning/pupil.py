"""The quantized model as a differentiable module: fake quantization with learned ranges and weights.

To the bit what ONNX Runtime makes of the QuantizeLinear and DequantizeLinear that `graph.rewrite` writes:
divide, round half to even, saturate, multiply. Gradients pass the rounding unchanged and stop where a value
saturates (straight-through estimator, paper section 5.2); scales get theirs by the same rule through the
division and the multiplication (learned step size, Esser et al. 2020; paper section 5.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from trtq.graph.quantization import Quantization
from trtq.graph.rewrite import weight_scale
from trtq.graph.weights import values_of
from trtq.recovery.learning.torch_graph import TorchGraph

WeightKey = tuple[str, int]
"""A constant and the axis that it is quantized along."""


class Pupil(TorchGraph):
    """A quantization as a module.

    Attributes:
        log_scales: activation tensor of the plan -> parameter, the logarithm of its scale.
        codes: weight -> parameter, its values in units of its scale.
        weight_scales: weight -> its scales, shaped to broadcast along the axis.

    Raises:
        InputError: as `TorchGraph`.
    """

    def __init__(self, quantization: Quantization, device: torch.device) -> None:
        super().__init__(quantization.graph)
        self.to(device)
        plan, tensors = quantization.plan, quantization.graph.tensors()
        self.log_scales = {
            name: torch.nn.Parameter(torch.tensor(np.log(quantization.scales[name]), device=device))
            for name in plan.tensors
        }
        self.codes: dict[WeightKey, torch.nn.Parameter] = {}
        self.weight_scales: dict[WeightKey, Tensor] = {}
        for weight in plan.weights:
            key, values = (weight.tensor, weight.axis), values_of(tensors[weight.tensor])
            scale = quantization.weight_scales.get(key)
            scale = weight_scale(values, weight.axis) if scale is None else scale
            shape = [1] * values.ndim
            shape[weight.axis] = -1
            self.weight_scales[key] = torch.from_numpy(np.array(scale)).reshape(shape).to(device)
            self.codes[key] = torch.nn.Parameter(
                torch.from_numpy(np.array(values)).to(device) / self.weight_scales[key]
            )
        self._ranges = {(edge.node, edge.index): edge.range for edge in plan.edges}
        self._weights = {(w.node, w.index): (w.tensor, w.axis) for w in plan.weights}
        self._twins: dict[str, Tensor] = {}

    def scale(self, tensor: str) -> Tensor:
        """The scale of an activation."""
        return torch.exp(self.log_scales[tensor])

    def weight(self, key: WeightKey) -> Tensor:
        """A weight as its INT8 codes represent it."""
        scale = self.weight_scales[key]
        return fake_quantize(self.codes[key], torch.ones_like(scale), low=-127) * scale

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `TorchGraph.forward`, with the plan's quantizers."""
        try:
            return super().forward(feeds)
        finally:
            self._twins = {}

    def operand(self, node: gs.Node, index: int, value: Tensor) -> Tensor:
        """What a node reads: quantized where the plan says so; a tensor with several readers is once."""
        if key := self._weights.get((node.name, index)):
            return self.weight(key)
        if tensor := self._ranges.get((node.name, index)):
            name = node.inputs[index].name
            if name not in self._twins:
                self._twins[name] = fake_quantize(value, self.scale(tensor))
            return self._twins[name]
        return value


def fake_quantize(values: Tensor, scale: Tensor, *, low: int = -128, high: int = 127) -> Tensor:
    """`values` on the grid of `scale`, saturated at the codes `low` and `high`; differentiable in both.

    Args:
        scale: > 0; broadcasts over `values`.
    """
    result: Tensor = _FakeQuantize.apply(values, scale, low, high)
    return result


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        ratio = values / scale
        ctx.save_for_backward(ratio, scale)
        ctx.range = low, high
        return ratio.round().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        ratio, scale = ctx.saved_tensors
        codes = ratio.round()
        saturated = codes.clamp(*ctx.range)
        outside = saturated != codes
        by_scale = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(outside, saturated, codes.sub_(ratio))
            by_scale = slope.mul_(gradient).sum_to_size(scale.shape)
        return gradient.masked_fill(outside, 0), by_scale, None, None
