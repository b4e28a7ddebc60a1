"""Whole engines by the roofline: what must hold whatever the model, the GPU and the placement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cost.blocks import plan_of, residual_block, shapes_of, without
from hypothesis import given, settings
from hypothesis import strategies as st

from trtq.cost.gpus import GPUS, gpu_named
from trtq.cost.interface import Builder, CostSource
from trtq.cost.modelled import Modelled
from trtq.graph.fold import fold
from trtq.graph.model import load_model
from trtq.graph.place import leave_out, place
from trtq.graph.shapes import concrete_shapes

FAMILIES = Path(__file__).parents[1] / "families"
GRAPH = residual_block()
SHAPES = shapes_of(GRAPH)
PLAN = plan_of(GRAPH)


def test_it_is_a_source() -> None:
    source: CostSource = Modelled(GRAPH, SHAPES, gpu_named("T4"))
    latency = source.latency(PLAN, "fp16")
    assert (latency.kind, latency.source) == ("modelled", "roofline of NVIDIA T4, TensorRT")
    assert latency.microseconds == pytest.approx(sum(part.microseconds for part in latency.parts))
    assert latency.parts[0].nodes == ("conv1", "relu1")
    assert [part.kernels for part in latency.parts] == [2, 1, 1, 1, 1]  # the input is quantized
    assert latency.parts[0].reformats_us > 0


def test_bytes_by_hand() -> None:
    """conv1 to conv3 in float16: input converted, two reads and writes each, and the residual input."""
    elements, weights = 8 * 64 * 56 * 56, 64 * 64 * 9
    tail = 2 * (elements + 8 * 64) + 2 * (8 * 64 + 640 + 80)
    latency = Modelled(GRAPH, SHAPES, gpu_named("T4")).latency(without(PLAN), "fp16")
    assert latency.bytes == (4 + 2) * elements + 2 * (7 * elements + 3 * weights) + tail


@settings(deadline=None)
@given(st.sampled_from(GPUS), st.sampled_from(["bandwidth", "fp32", "tf32", "fp16", "int8"]))
def test_a_better_gpu_is_never_slower(gpu: object, what: str) -> None:
    better = replace(gpu, **{what: 2 * getattr(gpu, what)})  # type: ignore[type-var]
    for plan in (PLAN, without(PLAN)):
        us = [Modelled(GRAPH, SHAPES, each).latency(plan, "fp16").microseconds for each in (gpu, better)]  # type: ignore[arg-type]
        assert us[1] <= us[0] + 1e-9


def test_int8_pays_with_tensor_cores_and_not_without() -> None:
    """Of compute-bound convolutions a V100 has no faster ones than float16's (no INT8 tensor cores)."""
    for name, pays in (("T4", True), ("A10", True), ("V100", False)):
        source = Modelled(GRAPH, SHAPES, gpu_named(name))
        int8, half = (source.latency(plan, "fp16").microseconds for plan in (PLAN, without(PLAN)))
        assert (int8 < half) == pays, name


def test_one_layer_left_out_costs_two_reformats() -> None:
    source = Modelled(GRAPH, SHAPES, gpu_named("A10"))
    whole = source.latency(PLAN, "fp16")
    mixed = source.latency(leave_out(GRAPH, PLAN, {"conv2": "to try"}), "fp16")
    assert sum(part.kernels for part in mixed.parts) == sum(part.kernels for part in whole.parts) + 2
    assert mixed.microseconds > whole.microseconds


ALL = sorted(path.stem for path in FAMILIES.glob("*.onnx"))
FEW = ("bert", "yolo")


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
def test_model_families(name: str) -> None:
    """Every product of the plan is in one kernel, and no multiply-accumulate is lost or counted twice."""
    model = load_model(FAMILIES / f"{name}.onnx")
    fold(model.graph)
    shapes = {
        spec.name: tuple(
            2 if axis == spec.batch_axis else size if isinstance(size, int) else 32
            for axis, size in enumerate(spec.shape)
        )
        for spec in model.inputs
    }
    plan = place(model, input_shapes=shapes)
    builders: tuple[Builder, ...] = ("tensorrt", "tensorrt-rtx")
    for builder in builders:
        source = Modelled(model.graph, concrete_shapes(model.graph, shapes), gpu_named("L4"), builder)
        kernels = source.fused.kernels
        nodes = [node for kernel in kernels for node in kernel.nodes]
        assert len(nodes) == len(set(nodes))
        macs = sum(gemm.macs for kernel in kernels for gemm in kernel.gemms)
        assert macs == sum(node.macs or 0 for node in plan.nodes)
        int8, half = source.latency(plan, "fp16"), source.latency(without(plan), "fp16")
        assert 0 < half.microseconds < source.latency(without(plan), "fp32").microseconds * 1.2
        assert {part.precision for part in half.parts} <= {"fp16"}
        assert "int8" in {part.precision for part in int8.parts}
