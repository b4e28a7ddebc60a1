"""Empirical bias correction (Nagel et al. 2019, section 4.2): the mean error of a layer goes into its bias.

Rounding weights and saturating activations shift the mean of what a layer makes, channel by channel, and such
errors add up over many inputs where random ones cancel. What each INT8 layer makes of the float model's own
activations, quantized minus float and averaged over calibration rows, is subtracted from its bias.

Every layer stands beside its quantized twin in one graph, and both read the float activations::

    x ─┬─ Conv ─ y ─ mean
       └─ Q/DQ ─ Conv (INT8 weights) ─ y' ─ mean

so all layers are corrected in one pass, and none makes up for an error that another one makes up for, too. To
measure instead, layer by layer, behind the quantized and already corrected layers costs a pass per layer, and
on networks with many of them the noise of few rows adds up. Where a layer treats every position alike, the
mean stands in front of the twin, which then costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.console import Console
from trtq.data.batches import Arrays, Batch
from trtq.data.samples import Samples
from trtq.graph.names import Names
from trtq.graph.quantization import Correction, Quantization
from trtq.recovery.fixes.channels import Bias, bias_of, is_linear
from trtq.simulation.rows import Runner

MOST_ROWS = 256
"""Rows that means are taken over, evenly spread over the samples."""


def correct_biases(
    quantization: Quantization, samples: Samples, console: Console, *, workers: int | None = None
) -> Quantization:
    """The quantization with biases that make up for the mean error of each INT8 layer.

    Plan, scales and the function of the float graph are as before: a corrected bias stands in the Q/DQ model
    only, and only where its layer is INT8. A layer without a bias gets one if that is an input of its own
    (Conv, Gemm); a MatMul without an Add behind it stays as it is. Returns `quantization` itself where no
    layer has a bias.

    Args:
        quantization: its graph computes the float model's function; corrections that it has are replaced.
        samples: an evenly spread part of them is used.
        workers: rows run at once; default: one for each processor.
    """
    if quantization.corrections:
        quantization = replace(quantization, corrections={})
    graph = quantization.graph.copy()
    int8 = set(quantization.plan.int8_nodes)
    biases = {
        node.name: bias
        for node in graph.nodes
        if node.name in int8
        and is_linear(node)
        and node.outputs[0].shape is not None
        and (bias := bias_of(graph, node)) is not None
    }
    if not biases:
        return quantization
    errors = _mean_errors(quantization, biases, samples, console, workers)
    if all(len(bias.node.inputs) > bias.index for bias in biases.values()):
        graph = quantization.graph  # all of them have a bias already
    names = Names(graph)
    for bias in biases.values():
        bias.make(names)
    corrections = {
        name: Correction(bias.node.name, bias.index, (bias.values - errors[name]).astype(np.float32))
        for name, bias in biases.items()
    }
    return replace(quantization, graph=graph, corrections=corrections)


def _mean_errors(
    quantization: Quantization,
    biases: Mapping[str, Bias],
    samples: Samples,
    console: Console,
    workers: int | None,
) -> dict[str, NDArray[np.float64]]:
    """Node -> mean over rows and positions of its twin's output minus its own, shape (channels,)."""
    graph = _with_twins(quantization, biases)
    runner = Runner(graph)
    samples = samples.spread(MOST_ROWS)
    part = list(samples.batches())
    part = [batch for batch in part if not batch.padding] or part  # rows that only fill up would count
    rows = sum(batch.rows for batch in part)

    def share(batch: Batch, means: Arrays) -> tuple[int, list[NDArray[np.float64]]]:
        own = [means[tensor.name].astype(np.float64) * (batch.rows / rows) for tensor in graph.outputs]
        return batch.rows, own

    shares = []
    with console.progress("bias", rows) as advance:
        for done, own in runner.over(samples, part, share, workers=workers):
            advance(done)
            shares.append(own)
    means = [np.sum(parts, axis=0) for parts in zip(*shares, strict=True)]
    return dict(zip(biases, means, strict=True))


def _with_twins(quantization: Quantization, biases: Mapping[str, Bias]) -> gs.Graph:
    """The float graph with a quantized twin of each node of `biases`; its outputs are their mean errors."""
    graph = quantization.rewritten()
    names = Names(quantization.graph, graph)
    nodes, tensors = {node.name: node for node in graph.nodes}, graph.tensors()
    quantized = quantization.plan.inputs
    graph.outputs = []
    for original in quantization.graph.nodes:
        node = nodes[original.name]
        if node.name in biases:
            axis, rank = biases[node.name].axis, len(node.outputs[0].shape)
            others = [i for i in range(rank) if i != axis % rank]
            inputs = list(node.inputs)
            if _is_pointwise(node):
                inputs[0] = _mean(graph, names, inputs[0], others, keepdims=1)
            twin = _added(graph, names, node.op, f"{node.name}/twin", inputs, dict(node.attrs))
            means = [_mean(graph, names, tensor, others) for tensor in (twin, node.outputs[0])]
            graph.outputs.append(_added(graph, names, "Sub", f"{node.name}/error", means, {}))
        for index, tensor in enumerate(original.inputs):
            if (node.name, index) in quantized:
                if tensor.name not in tensors:
                    tensors[tensor.name] = tensor.copy()
                node.inputs[index] = tensors[tensor.name]
    return graph.cleanup(remove_unused_graph_inputs=False).toposort()


def _is_pointwise(node: gs.Node) -> bool:
    """Whether a linear node's mean over positions is what it makes of its input's mean."""
    if node.op != "Conv":
        return True
    pads, strides = node.attrs.get("pads", []), node.attrs.get("strides", [])
    return set(node.inputs[1].shape[2:]) == {1} and not any(pads) and all(step == 1 for step in strides)


def _mean(
    graph: gs.Graph, names: Names, tensor: gs.Variable, axes: list[int], keepdims: int = 0
) -> gs.Variable:
    name, attrs = f"{tensor.name}/mean", {"keepdims": keepdims}
    if graph.opset < 18:
        return _added(graph, names, "ReduceMean", name, [tensor], {**attrs, "axes": axes})
    constant = gs.Constant(names.tensor(f"{name}/axes"), np.array(axes, np.int64))
    return _added(graph, names, "ReduceMean", name, [tensor, constant], attrs)


def _added(
    graph: gs.Graph, names: Names, op: str, name: str, inputs: list[gs.Tensor], attrs: dict[str, Any]
) -> gs.Variable:
    """The float32 output of a node that is new in the graph."""
    output = gs.Variable(names.tensor(name), np.float32)
    graph.nodes.append(gs.Node(op, names.node(name), attrs, inputs, [output]))
    return output
