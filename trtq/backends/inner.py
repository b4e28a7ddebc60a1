"""Scales for tensors that only TensorRT's network has: those inside of what is one operator in ONNX.

A Gemm is a product, two constants and an addition there. A table of ONNX's tensors lacks the inner ones, and
TensorRT then keeps the layers around them out of INT8 (seen with 8.5.3 on an H100).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trtq.numerics import scale_from_amax


def inner_scales(trt: Any, network: Any, known: Mapping[str, np.float32]) -> dict[str, np.float32]:
    """Scales for float tensors of a network that have none yet, as far as they follow from others.

    A constant's comes from its values, that of what is only moved from what it is made of, and that of a
    product in front of a bias from the sum.

    Args:
        known: tensor -> scale.
    """
    moves = {trt.LayerType.SHUFFLE, trt.LayerType.IDENTITY}
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    found: dict[str, np.float32] = {}

    def scale_of(tensor: Any) -> np.float32 | None:
        return None if tensor is None else known.get(tensor.name, found.get(tensor.name))

    def lacks(tensor: Any) -> bool:
        return tensor is not None and tensor.dtype == trt.float32 and scale_of(tensor) is None

    for layer in layers:
        made = layer.get_output(0)
        if lacks(made) and layer.type == trt.LayerType.CONSTANT:
            constant = layer
            constant.__class__ = trt.IConstantLayer  # as the bindings have it, to read the weights
            if weights := np.abs(constant.weights).max(initial=0):
                found[made.name] = np.float32(scale_from_amax(weights))
        elif lacks(made) and layer.type in moves and (source := scale_of(layer.get_input(0))) is not None:
            found[made.name] = source
    for layer in reversed(layers):
        if layer.type == trt.LayerType.ELEMENTWISE and (result := scale_of(layer.get_output(0))) is not None:
            inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
            found |= {tensor.name: result for tensor in inputs if lacks(tensor)}
    return found
