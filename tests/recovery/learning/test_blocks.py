"""Where a graph is cut, by hand, and what the blocks make one after the other, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from small_graphs import Case, outputs, small_case

from trtq.graph.quantization import Quantization

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra qat)")

from trtq.recovery.learning.blocks import Block, in_blocks  # noqa: E402 (needs torch)
from trtq.recovery.learning.pupil import Pupil  # noqa: E402
from trtq.recovery.learning.torch_graph import TorchGraph  # noqa: E402


def residual(case: Case) -> None:
    """A gate from the input alone, two residual blocks that read it, and two outputs behind a common layer.

    Each residual block is Gemm, Relu, Gemm, gate, Add; the gate is another path from the input.
    """
    x = case.input("x", 16)
    gate = case.node("Sigmoid", x)
    hidden = case.node("Gemm", x, case.weight(16, 16) / 4, case.weight(16))
    for _ in range(2):
        inner = case.node("Relu", case.node("Gemm", hidden, case.weight(16, 16) / 4, case.weight(16)))
        inner = case.node("Gemm", inner, case.weight(16, 16) / 4, case.weight(16))
        hidden = case.node("Add", case.node("Mul", inner, gate), hidden)
    last = case.node("Relu", case.node("Gemm", hidden, case.weight(16, 16) / 4, case.weight(16)))
    case.output(case.node("Gemm", last, case.weight(16, 4)), 4)
    case.output(case.node("Gemm", last, case.weight(16, 3)), 3)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return small_case(tmp_path, residual, np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32))


def cut(graph: TorchGraph, quantization: Quantization) -> list[Block]:
    plan = quantization.plan
    return in_blocks(graph, {node for node, _ in plan.inputs}, {weight.node for weight in plan.weights})


def test_residual_blocks_fall_out_and_a_path_in_fp32_does_not_hold_them_together(case: Case) -> None:
    blocks = cut(TorchGraph(case.graph), case.quantized())
    ops = [[node.op for node in block.nodes] for block in blocks]
    body = ["Sigmoid", "Gemm", "Relu", "Gemm", "Mul", "Add"]
    assert ops == [["Gemm"], body, body, ["Gemm", "Relu"], ["Gemm", "Gemm"]]
    assert [block.source for block in blocks] == [None, *(block.outputs[0] for block in blocks[:-1])]
    assert blocks[-1].outputs == tuple(tensor.name for tensor in case.graph.outputs)


def test_a_tensor_that_is_used_to_the_end_leaves_one_block(tmp_path: Path) -> None:
    """The first layer's output goes around all others: there is no cut but the one right behind it."""

    def build(case: Case) -> None:
        first = case.node("Gemm", case.input("x", 16), case.weight(16, 16), case.weight(16))
        hidden = first
        for _ in range(3):
            hidden = case.node("Relu", case.node("Gemm", hidden, case.weight(16, 16), case.weight(16)))
        case.output(case.node("Add", hidden, first), 16)

    case = small_case(tmp_path, build)
    blocks = cut(TorchGraph(case.graph), case.quantized())
    assert [[node.op for node in block.nodes] for block in blocks] == [
        ["Gemm"],
        ["Gemm", "Relu"] * 3 + ["Add"],
    ]


@pytest.mark.parametrize("is_quantized", [False, True])
def test_what_the_blocks_make_one_after_the_other_is_what_onnx_runtime_makes(
    case: Case, is_quantized: bool
) -> None:
    quantization = case.quantized()
    graph = Pupil(quantization, torch.device("cpu")) if is_quantized else TorchGraph(case.graph)
    onnx: gs.Graph = quantization.rewritten() if is_quantized else case.graph
    feed = {"x": torch.from_numpy(np.concatenate([row["x"] for row in case.samples.rows()]))}
    passed: dict[str, torch.Tensor] = {}
    for block in cut(graph, quantization):
        with torch.no_grad():
            passed = graph.run(block.nodes, feed | passed, block.outputs)
        expected = outputs(onnx, case.samples, block.outputs)
        for name, values in zip(block.outputs, expected, strict=True):
            np.testing.assert_allclose(passed[name].numpy(), values, rtol=1e-5, atol=1e-5, err_msg=name)
