"""Empirical bias correction (Nagel et al. 2019, section 4.2): the mean error of a layer goes into its bias.

Rounding weights and saturating activations shift the mean of what a layer makes, channel by channel, and such
errors add up over many inputs where random ones cancel. What each INT8 layer makes of the float model's own
activations, quantized minus float and averaged over calibration rows, is subtracted from its bias.

The mean of what a linear layer makes is what it makes of the mean of what it reads. Of a convolution's input
every weight of the kernel reads other positions, and misses others where it reads padding, so that there is a
mean for each::

    error = W'·E[x'] - W·E[x]        x', W' behind their quantizers

One pass over the float model gives the means of all layers, behind the quantizers of several quantizations if
need be; other weights need no further one. No layer makes up for an error that another one makes up for, too.
To measure instead, layer by layer, behind the quantized and already corrected layers costs a pass per layer,
and on networks with many of them the noise of few rows adds up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.console import Console
from trtq.data.batches import Arrays, Batch
from trtq.data.samples import Samples
from trtq.graph.names import Names
from trtq.graph.quantization import Correction, Quantization
from trtq.graph.rewrite import require_scales, rounded_weight
from trtq.recovery.fixes.channels import Bias, Vector, bias_of, is_linear, weight_matrix
from trtq.recovery.fixes.windows import reads
from trtq.simulation.rows import Runner

MOST_ROWS = 256
"""Rows that means are taken over, evenly spread over the samples."""

_Read = tuple[str, np.float32 | None]
"""Name of a linear node, and the scale behind whose quantizer it reads; None: it reads floats."""


def correct_biases(
    quantization: Quantization, samples: Samples, console: Console, *, workers: int | None = None
) -> Quantization:
    """`MeanInputs.corrected` with the means of some samples; see `mean_inputs` for the arguments."""
    return mean_inputs([quantization], samples, console, workers=workers).corrected(quantization)


@dataclass(frozen=True)
class MeanInputs:
    """What the linear layers of a float graph read, on average over rows and positions.

    Attributes:
        means: float64 (inputs of all groups, kernel), flat.
    """

    means: Mapping[_Read, Vector]

    def corrected(self, quantization: Quantization) -> Quantization:
        """The quantization with biases that make up for the mean error of each INT8 layer.

        Plan, scales and the function of the float graph are as before: a corrected bias stands in the Q/DQ
        model only, and only where its layer is INT8. A layer without a bias gets one if that is an input of
        its own (Conv, Gemm); a MatMul without an Add behind it stays as it is. Returns `quantization` itself
        where no layer has a bias.

        Args:
            quantization: one that the means were measured for, perhaps with other codes; corrections that it
                has are replaced.
        """
        if quantization.corrections:
            quantization = replace(quantization, corrections={})
        graph = quantization.graph.copy()
        biases = _biases(graph, quantization)
        if not biases:
            return quantization
        weights = _rounded_weights(quantization, {layer: node for layer, (node, _) in biases.items()})
        scales = _scales(quantization)
        errors = {
            layer: _product(
                node, weights.get(layer, node.inputs[1].values), self.means[layer, scales.get(layer)]
            )
            - _product(node, node.inputs[1].values, self.means[layer, None])
            for layer, (node, _) in biases.items()
        }
        if all(len(bias.node.inputs) > bias.index for _, bias in biases.values()):
            graph = quantization.graph  # all of them have a bias already
        names = Names(graph)
        for _, bias in biases.values():
            bias.make(names)
        corrections = {
            layer: Correction(bias.node.name, bias.index, (bias.values - errors[layer]).astype(np.float32))
            for layer, (_, bias) in biases.items()
        }
        return replace(quantization, graph=graph, corrections=corrections)


def mean_inputs(
    quantizations: Sequence[Quantization], samples: Samples, console: Console, *, workers: int | None = None
) -> MeanInputs:
    """What the INT8 layers of quantizations with one graph and plan read, on average.

    Args:
        quantizations: their graph computes the float model's function.
        samples: an evenly spread part of them is used.
        workers: rows run at once; default: one for each processor.

    Raises:
        InputError: a tensor of the plan has no scale, or the model does not run on the samples.
    """
    graph = quantizations[0].graph
    nodes = [node for node, _ in _biases(graph, quantizations[0]).values()]
    if not nodes:
        return MeanInputs({})
    for quantization in quantizations:
        require_scales(quantization.plan, quantization.scales)
    scales = [_scales(quantization) for quantization in quantizations]
    wanted = {n.name: list(dict.fromkeys(of[n.name] for of in scales if n.name in of)) for n in nodes}
    given = {tensor.name for tensor in graph.inputs}
    tensors = dict.fromkeys(node.inputs[0].name for node in nodes)
    runner = Runner(graph, [name for name in tensors if name not in given] or None, reuse=True)
    samples = samples.spread(MOST_ROWS)
    part = list(samples.batches())
    part = [batch for batch in part if not batch.padding] or part  # rows that only fill up would count
    rows = sum(batch.rows for batch in part)

    def share(batch: Batch, found: Arrays) -> tuple[int, list[NDArray[np.float64]]]:
        values = batch.feed | found
        own = [_mean_reads(node, values[node.inputs[0].name], wanted[node.name]) for node in nodes]
        return batch.rows, [mean * (batch.rows / rows) for mean in own]

    total: list[NDArray[np.float64]] = []
    with console.progress("bias", rows) as advance:
        for done, own in runner.over(samples, part, share, workers=workers):
            advance(done)
            total = [sums + mean for sums, mean in zip(total, own, strict=True)] if total else own
    means = zip(nodes, total, strict=True)
    return MeanInputs(
        {
            (node.name, scale): of_scale
            for node, found in means
            for scale, of_scale in zip([None, *wanted[node.name]], found, strict=True)
        }
    )


def _biases(graph: gs.Graph, quantization: Quantization) -> dict[str, tuple[gs.Node, Bias]]:
    """Name -> node and bias, of each INT8 layer of the graph that has a place for one."""
    int8 = set(quantization.plan.int8_nodes)
    return {
        node.name: (node, bias)
        for node in graph.nodes
        if node.name in int8 and is_linear(node) and (bias := bias_of(graph, node)) is not None
    }


def _scales(quantization: Quantization) -> dict[str, np.float32]:
    """Node -> the scale of its first input, where that is quantized."""
    edges = [edge for edge in quantization.plan.edges if edge.index == 0]
    return {edge.node: np.float32(quantization.scales[edge.range]) for edge in edges}


def _rounded_weights(quantization: Quantization, nodes: Mapping[str, gs.Node]) -> dict[str, NDArray]:
    """Node -> its weights as its codes give them, where they are quantized."""
    found = {}
    for weight in quantization.plan.weights:
        if weight.node in nodes and weight.index == 1:
            key, values = (weight.tensor, weight.axis), nodes[weight.node].inputs[1].values
            scales, codes = quantization.weight_scales.get(key), quantization.codes.get(key)
            found[weight.node] = rounded_weight(values, weight.axis, scales, codes)
    return found


def _product(node: gs.Node, weights: NDArray, means: Vector) -> Vector:
    """What a linear node makes of one position, without its bias."""
    matrix = weight_matrix(node, weights)
    return np.matmul(matrix.reshape(*matrix.shape[:2], -1), means.reshape(len(matrix), -1, 1)).reshape(-1)


def _mean_reads(node: gs.Node, values: NDArray, scales: Sequence[np.float32]) -> NDArray[np.float64]:
    """What a linear node reads of its input's values on average, as they are and behind quantizers of these
    scales: (1 + scales, inputs * kernel)."""
    if node.op == "Conv":
        along = reads(node, values.shape[2:])
        if len(along) == 1:
            values, along = values[:, :, None], [np.ones((1, 1)), *along]
        means: NDArray = _sums(values, along[-2], scales)
        for axis, read in enumerate(along, 3):
            if axis != means.ndim - 2:  # that of `_sums`
                means = np.moveaxis(np.tensordot(means, read, (axis, 0)), -1, axis)
        means = means.sum(axis=1) * (along[-2].max(initial=0.0) / len(values))
    else:
        rows = values.reshape(1, -1, values.shape[-1])
        means = _sums(rows, np.ones((rows.shape[1], 1)), scales) / np.float64(rows.shape[1])
    return means.reshape(len(means), -1) * np.array([1, *scales], np.float64)[:, None]


def _sums(values: NDArray, read: NDArray, scales: Sequence[np.float32]) -> NDArray[np.float32]:
    """What each weight along the last axis but one reads there in all, as values and as codes: (1 + scales,
    ..., kernel, columns).

    Args:
        read: as `windows.reads`.
    """
    from trtq.calibration import kernels

    *outer, rows, columns = values.shape
    planes = np.ascontiguousarray(values, np.float32).reshape(-1, rows * columns)
    sums = np.zeros((1 + len(scales), len(planes), read.shape[1], columns), np.float32)
    kernels.add_sums(planes, read > 0, np.array(scales, np.float32), sums)
    return sums.reshape(len(sums), *outer, -1, columns)
