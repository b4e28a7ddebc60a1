"""The float twin of a Q/DQ model: the same constants, and activations that are not quantized."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from trtq.graph.surgery import copied


def float_twin(graph: gs.Graph) -> gs.Graph:
    """A copy of a graph with Q/DQ in which the quantizers of activations pass on what they read.

    Every tensor keeps its name. Constants stay what they were rounded to, as do activations whose integers
    another operator than DequantizeLinear reads. Float types are those of the graph.
    """
    twin = copied(graph)
    for node in twin.nodes:
        makers = node.inputs[0].inputs if node.op == "DequantizeLinear" else []
        if not makers or makers[0].op != "QuantizeLinear" or isinstance(makers[0].inputs[0], gs.Constant):
            continue
        wanted = node.inputs[1].dtype  # DequantizeLinear gives the type of its scale
        kind = wanted if isinstance(wanted, int) else onnx.helper.np_dtype_to_tensor_dtype(wanted)
        node.op, node.attrs, node.inputs = "Cast", {"to": kind}, [makers[0].inputs[0]]
    return twin
