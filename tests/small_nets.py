"""Small ONNX graphs with and without Q/DQ."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs


class Net:
    """A graph in the making; every method returns the tensor it made."""

    def __init__(self, opset: int = 17, dtype: type = np.float32) -> None:
        self.graph = gs.Graph(opset=opset, name="net")
        self.dtype = dtype
        self.random = np.random.default_rng(0)

    def input(self, *shape: int | str, name: str = "x") -> gs.Variable:
        self.graph.inputs.append(gs.Variable(name, self.dtype, list(shape)))
        return self.graph.inputs[-1]

    def const(self, values: Any) -> gs.Constant:
        return gs.Constant(f"c{len(self.graph.nodes)}_{self.random.integers(1 << 40)}", np.asarray(values))

    def op(
        self, op: str, *inputs: Any, name: str | None = None, dtype: Any = None, **attrs: Any
    ) -> gs.Variable:
        count = len(self.graph.nodes)
        output = gs.Variable(f"t{count}", dtype or self.dtype)
        tensors = [i if isinstance(i, gs.Tensor) else self.const(i) for i in inputs]
        name = f"{op}_{count}" if name is None else name
        self.graph.nodes.append(gs.Node(op, name, attrs, tensors, [output]))
        return output

    def qdq(self, tensor: gs.Tensor, scale: float = 0.05) -> gs.Variable:
        """Q/DQ with one scale."""
        scale_and_zero = (np.array(scale, self.dtype), np.array(0, np.int8))
        codes = self.op("QuantizeLinear", tensor, *scale_and_zero, dtype=np.int8)
        return self.op("DequantizeLinear", codes, *scale_and_zero)

    def weight(self, *shape: int, axis: int | None = None) -> gs.Tensor:
        """A weight: floating point, or INT8 codes and a DQ with one scale per channel along `axis`."""
        if axis is None:
            return self.const(self.random.normal(size=shape).astype(self.dtype))
        codes = self.random.integers(-127, 128, size=shape).astype(np.int8)
        scale = self.random.uniform(0.01, 0.02, shape[axis]).astype(self.dtype)
        return self.op("DequantizeLinear", codes, scale, np.zeros(shape[axis], np.int8), axis=axis)

    def model(self, *outputs: gs.Variable) -> onnx.ModelProto:
        self.graph.outputs = list(outputs)
        model = gs.export_onnx(self.graph.cleanup().toposort(), do_type_check=False)
        model.ir_version = 10
        return model
