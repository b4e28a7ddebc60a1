"""Operands and sums of a Q/DQ model's INT8 products, to hold a GPU's integer arithmetic against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from trtq.data.samples import Samples
from trtq.graph.model import load_model
from trtq.simulation.rows import Runner

MOST_PRODUCTS, MOST_ROWS = 6, 64


def integer_products(model: Path, rows: Samples) -> dict[str, np.ndarray]:
    """Operands and sums of INT8 products of a Q/DQ model, as the simulation has them on a batch of rows.

    For MatMul and Gemm, and for Conv as the product of patches and filters. The sums are exact; how far the
    simulation's floating-point results are from them is told.

    Returns:
        `a<i>` (rows, K) and `b<i>` (K, columns) int8, `c<i>` = a @ b int32, `off<i>`: the largest difference
        of the simulation's `y` from `c * scale of x * scale of w + bias`, in roundings of float32 (2^-24) of
        the largest such value.
    """
    graph = load_model(model).graph
    nodes = [node for node in graph.nodes if _int8_product(node)]
    wanted = [tensor for node in nodes for tensor in (*_codes(node), *_scales(node), node.outputs[0])]
    known = {t.name: t.values for t in wanted if isinstance(t, gs.Constant)}
    outputs = list(dict.fromkeys(t.name for t in wanted if t.name not in known))
    batch = next(iter(rows.batches(4)))
    values = {**known, **Runner(graph, outputs).run(batch.feed)}
    found: dict[str, np.ndarray] = {}
    shapes = set()
    for node in nodes:
        x, w, x_scale, w_scale, y = (values[t.name] for t in (*_codes(node), *_scales(node), node.outputs[0]))
        bias = node.inputs[2].values if len(node.inputs) > 2 and node.op in ("Conv", "Gemm") else 0
        a, b, y = _as_matrices(node, x, w, y)
        if (key := b.shape) in shapes or len(shapes) == MOST_PRODUCTS:
            continue
        shapes.add(key)
        index = len(shapes) - 1
        a, y = a[:MOST_ROWS], y[:MOST_ROWS]
        sums = a.astype(np.int64) @ b.astype(np.int64)
        exact = sums * (np.float64(x_scale) * np.float64(w_scale).reshape(-1)) + bias
        found |= {f"a{index}": a, f"b{index}": b, f"c{index}": sums.astype(np.int32)}
        found[f"off{index}"] = np.array(np.abs(y - exact).max() / np.abs(exact).max() * 2.0**24)
        found[f"name{index}"] = np.array(f"{node.op} {node.name}")
    return found


def _int8_product(node: gs.Node) -> bool:
    """Whether it is one of the products that `_as_matrices` knows, of dequantized values and weights."""
    operands = node.inputs[:2]
    if node.op not in ("Conv", "Gemm", "MatMul") or not all(t.inputs for t in operands):
        return False
    if not all(t.inputs[0].op == "DequantizeLinear" for t in operands):
        return False
    weight = _codes(node)[1]
    if not isinstance(weight, gs.Constant):
        return False
    return len(weight.shape) == 2 or (len(weight.shape) == 4 and node.attrs.get("group", 1) == 1)


def _codes(node: gs.Node) -> list[gs.Tensor]:
    return [tensor.inputs[0].inputs[0] for tensor in node.inputs[:2]]


def _scales(node: gs.Node) -> list[gs.Tensor]:
    return [tensor.inputs[0].inputs[1] for tensor in node.inputs[:2]]


def _as_matrices(
    node: gs.Node, x: np.ndarray, w: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A product as (rows, K), (K, columns) and its result (rows, columns)."""
    if node.op == "Conv":
        a, b = _patches(node, x, w), w.reshape(len(w), -1).T
        return a, b, y.transpose(0, *range(2, y.ndim), 1).reshape(len(a), -1)
    b = w.T if node.attrs.get("transB", 0) else w
    return x.reshape(-1, len(b)), b, y.reshape(-1, b.shape[-1])


def _patches(node: gs.Node, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What each output of a 2-D convolution multiplies with its filter: (outputs, channels x kernel)."""
    size = w.shape[2:]
    pads = node.attrs.get("pads", [0] * 4)
    strides = node.attrs.get("strides", [1, 1])
    padded = np.pad(x, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=(2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1]]
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, w[0].size)
