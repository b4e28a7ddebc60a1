"""Rounding weights with an eye on what they multiply (GPTQ, Frantar et al. 2022).

The nearest code is best for a weight alone, not for the outputs: a layer's inputs are correlated,
and an error in one weight can be made up for by the others of its channel. The weights of a channel are
rounded one after the other, those with the strongest inputs first; the error of each is spread over those
still to come so that the layer's output changes least:

    H = E[x xT]        e = (w_j - q_j) / U_jj        w_k -= e U_jk for k > j        UT U = inverse of H

with x the layer's quantized inputs. Scales stay as they are, so this costs nothing at run time. What of the
error is constant over rows belongs to the bias (see `bias`), so that H is about the mean where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.data.batches import Arrays, Batch
from trtq.data.samples import Samples
from trtq.graph.quantization import Quantization
from trtq.graph.rewrite import weight_scale
from trtq.numerics import quantize
from trtq.recovery.fixes.channels import bias_of, is_linear, weight_matrix
from trtq.recovery.fixes.windows import windows
from trtq.simulation.rows import Runner, Workers

MOST_ROWS, POSITIONS, POSITIONS_PER_INPUT = 256, (1024, 4096), 16
"""Rows, evenly spread, that inputs are looked at on, about how many positions of them (pixels, tokens) at
least and at most, and between these how many for each weight of an output."""

MOST_INPUTS = 4096
"""Layers with more weights for each output are rounded to the nearest."""

MOST_BYTES = 1 << 28
"""Memory for the inputs of the layers that one pass over the rows looks at."""

DAMPING = 0.01
"""Part of the mean second moment that is added to all, as few positions leave some directions without any."""

BLOCK = 64
"""Weights whose errors are passed on to all later ones at once."""

EXACT = 1024
"""Products of two codes whose sum float32 holds exactly."""

Codes = NDArray[np.int8]
"""(groups, positions, inputs): what a layer multiplies at some positions, in steps of its scale."""


@dataclass(frozen=True)
class _Layer:
    """A linear node whose input and weights are INT8; `scale` is its input's, `axis` that of the weights'."""

    node: gs.Node
    scale: np.float32
    axis: int
    biased: bool

    @property
    def inputs(self) -> int:
        """Weights for each output."""
        _, _, inputs, kernel = weight_matrix(self.node).shape
        return int(inputs * kernel)

    @property
    def positions(self) -> int:
        """How many positions are looked at."""
        fewest, most = POSITIONS
        return min(max(POSITIONS_PER_INPUT * self.inputs, fewest), most)

    @property
    def bytes(self) -> int:
        return len(weight_matrix(self.node)) * self.inputs * self.positions


def round_weights(
    quantization: Quantization, samples: Samples, *, workers: int | None = None
) -> Quantization:
    """The quantization with the weights of its layers rounded as is best for their outputs.

    Plan, ranges and the float graph are as before; codes that it has are replaced. Returns `quantization`
    itself where there is no such layer. A layer is rounded to the nearest if its inputs are not finite, or
    hardly differ from position to position.

    Args:
        samples: the layers' inputs are looked at on an evenly spread part of them.
        workers: rows run at once; default: one for each processor.
    """
    layers = _layers(quantization)
    codes = {}
    for part in _parts(layers):
        inputs = _inputs(quantization.graph, part, samples.spread(MOST_ROWS), workers)
        pairs = [(layer, seen) for layer, seen in zip(part, inputs, strict=True) if seen is not None]
        rounded = Workers(workers).map(lambda pair: _rounded(*pair), pairs)
        for (layer, _), found in zip(pairs, rounded, strict=True):
            if found is not None:
                codes[layer.node.inputs[1].name, layer.axis] = found
    return replace(quantization, codes=codes) if codes else quantization


def _layers(quantization: Quantization) -> list[_Layer]:
    plan, graph = quantization.plan, quantization.graph
    ranges = {(edge.node, edge.index): edge.range for edge in plan.edges}
    axes = {weight.node: weight.axis for weight in plan.weights if weight.index == 1}
    found = []
    for node in graph.nodes:
        known = node.name in axes and (node.name, 0) in ranges and is_linear(node)
        if not known or (node.op == "Conv" and len(node.inputs[1].shape) != 4):
            continue
        key = (node.inputs[1].name, axes[node.name])
        layer = _Layer(
            node,
            np.float32(quantization.scales[ranges[node.name, 0]]),
            axes[node.name],
            bias_of(graph, node) is not None,
        )
        if layer.inputs <= MOST_INPUTS and key not in quantization.weight_scales:
            found.append(layer)
    return found


def _parts(layers: Sequence[_Layer]) -> Iterator[list[_Layer]]:
    """The layers in parts whose inputs fit into memory."""
    part: list[_Layer] = []
    for layer in layers:
        if part and sum(each.bytes for each in [*part, layer]) > MOST_BYTES:
            yield part
            part = []
        part.append(layer)
    if part:
        yield part


def _inputs(
    graph: gs.Graph, layers: Sequence[_Layer], samples: Samples, workers: int | None
) -> list[Codes | None]:
    """The inputs of each layer at evenly spread positions of some rows; None where some are not finite."""
    batches = list(samples.batches())
    given = {tensor.name for tensor in graph.inputs}
    names = dict.fromkeys(layer.node.inputs[0].name for layer in layers)

    def look(batch: Batch, found: Arrays) -> list[Codes | None]:
        values = batch.feed | found
        return [
            _seen(layer, values[layer.node.inputs[0].name], max(layer.positions // len(batches), 1))
            for layer in layers
        ]

    runner = Runner(graph, [name for name in names if name not in given] or None)
    parts = list(runner.over(samples, batches, look, workers=workers))
    columns = zip(*parts, strict=True)
    return [None if any(part is None for part in of) else np.concatenate(of, axis=1) for of in columns]


def _seen(layer: _Layer, values: NDArray, each: int) -> Codes | None:
    """A layer's inputs at up to `each` positions of one batch."""
    columns = np.ascontiguousarray(_columns(layer.node, values, each), np.float32)
    return quantize(columns, layer.scale) if np.isfinite(columns).all() else None


def _columns(node: gs.Node, values: NDArray, each: int) -> NDArray:
    """What each output position multiplies: (groups, positions, inputs / groups * kernel)."""
    if node.op != "Conv":
        matrix = values.reshape(-1, values.shape[-1])
        return matrix[_spread(len(matrix), each)][None]
    groups = node.attrs.get("group", 1)
    rows, channels, *sizes = values.shape
    reads = windows(node, sizes)
    height, width = (len(read) for read in reads)
    kept = _spread(height * width, max(each // rows, 1))
    down, across = reads[0][kept // width][:, :, None], reads[1][kept % width][:, None, :]
    inside = (down >= 0) & (across >= 0)
    taken = np.where(inside, values[:, :, down, across], np.zeros((), values.dtype))
    taken = taken.reshape(rows, groups, channels // groups, len(kept), -1)
    return taken.transpose(1, 0, 3, 2, 4).reshape(groups, rows * len(kept), -1)


def _spread(count: int, most: int) -> NDArray[np.int64]:
    """Up to `most` of `count` positions; by the golden ratio, so that no row or column is preferred."""
    if count <= most:
        return np.arange(count)
    return np.unique((np.arange(most) * 0.6180339887498949 % 1 * count).astype(np.int64))


def _rounded(layer: _Layer, inputs: Codes) -> NDArray[np.int8] | None:
    """The codes of a layer's weights, of their shape; None where its inputs vary less than moments tell."""
    node = layer.node
    matrix = weight_matrix(node)
    weights = matrix.reshape(*matrix.shape[:2], -1)
    second = _second_moments(inputs, central=layer.biased)
    scales = weight_scale(node.inputs[1].values, layer.axis).astype(np.float64).reshape(weights.shape[:2])
    scales = np.maximum(scales, np.finfo(np.float32).tiny)  # of a channel of zeros
    try:
        codes = rounded_codes(weights, second, scales)
    except np.linalg.LinAlgError:
        return None
    shape = node.inputs[1].shape
    if node.op == "Conv":
        return codes.reshape(shape)
    return codes[0] if node.attrs.get("transB", 0) else np.ascontiguousarray(codes[0].T)


def _second_moments(inputs: Codes, *, central: bool) -> NDArray[np.float64]:
    """(groups, inputs, inputs); about the mean, or about 0."""
    groups, count, size = inputs.shape
    moments, sums = np.zeros((groups, size, size)), np.zeros((groups, size))
    for first in range(0, count, EXACT):
        part = inputs[:, first : first + EXACT].astype(np.float32)
        moments += part.transpose(0, 2, 1) @ part
        sums += part.sum(axis=1)
    moments /= count
    return moments - sums[:, :, None] * sums[:, None, :] / count**2 if central else moments


def rounded_codes(
    weights: NDArray[np.float64], moments: NDArray[np.float64], scales: NDArray[np.float64]
) -> NDArray[np.int8]:
    """INT8 codes, -127 to 127, of weights whose rounding errors make up for each other.

    Args:
        weights: (groups, outputs, inputs).
        moments: (groups, inputs, inputs); second moments of the inputs.
        scales: (groups, outputs), > 0.
    """
    diagonal, inputs = np.diagonal(moments, axis1=1, axis2=2), weights.shape[2]
    order = np.argsort(-diagonal, axis=1, kind="stable")
    damped = np.take_along_axis(np.take_along_axis(moments, order[:, :, None], 1), order[:, None], 2)
    damping = DAMPING * diagonal.mean(axis=1) + np.finfo(np.float32).tiny
    damped[:, range(inputs), range(inputs)] += damping[:, None]
    upper = _root_of_inverse(damped).astype(np.float32)
    steps = np.take_along_axis((weights / scales[:, :, None]).transpose(0, 2, 1), order[:, :, None], 1)
    left = np.ascontiguousarray(steps, np.float32)  # (groups, inputs, outputs)
    codes = np.zeros(left.shape, np.int8)
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        errors = np.zeros((len(left), end - start, left.shape[2]), np.float32)
        for j in range(start, end):
            code = np.clip(np.rint(left[:, j]), -127, 127)
            codes[:, j] = code
            errors[:, j - start] = error = (left[:, j] - code) / upper[:, j, j, None]
            left[:, j + 1 : end] -= upper[:, j, j + 1 : end, None] * error[:, None]
        left[:, end:] -= upper[:, start:end, end:].transpose(0, 2, 1) @ errors
    back = np.argsort(order, axis=1)
    return np.ascontiguousarray(np.take_along_axis(codes, back[:, :, None], 1).transpose(0, 2, 1))


def _root_of_inverse(matrices: NDArray[np.float64]) -> NDArray[np.floating]:
    """Upper triangular U with UT U = the inverse of each matrix, (groups, n, n), symmetric and positive.

    With the order of rows and columns turned round, Cholesky's factor is R with R RT = the matrix, R upper
    triangular: its inverse is U.
    """
    return _inverse(np.linalg.cholesky(matrices[:, ::-1, ::-1])[:, ::-1, ::-1])


def _inverse(upper: NDArray[np.floating]) -> NDArray[np.floating]:
    """The inverse of each upper triangular matrix, (groups, n, n), by halves."""
    half = upper.shape[1] // 2
    if half < BLOCK:
        return np.linalg.inv(upper)
    first, last = _inverse(upper[:, :half, :half]), _inverse(upper[:, half:, half:])
    found = np.zeros_like(upper)
    found[:, :half, :half], found[:, half:, half:] = first, last
    found[:, :half, half:] = -first @ (upper[:, :half, half:] @ last)
    return found
