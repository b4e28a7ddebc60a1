"""What layers of real engines have to do, and the roofline of it against what they took on the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from trtq.backends.compiled import Compiled, CompiledLayer, CompiledTensor, parse_inspection
from trtq.cost.fused import Gemm
from trtq.cost.gpus import gpu_named
from trtq.cost.layers import layer_load, listed_bytes
from trtq.cost.roofline import FITTED, Load, kernel_time

REAL = Path(__file__).parents[1] / "backends" / "data" / "engine_explorer"

MEASURED_MS = {"fp16": 1.017, "qat": 1.096, "qat-residual-qgap": 0.673}
"""The sum over the layers by TensorRT's profiler on an A100, from the profiles beside those engines in
NVIDIA's TensorRT Engine Explorer."""


def engine(name: str) -> Compiled:
    return parse_inspection((REAL / f"resnet-a100-{name}.json").read_text(), batch=32)


@pytest.mark.parametrize("name", ["fp16", "qat"])
def test_products_of_a_real_engine(name: str) -> None:
    """ResNet-18 has 1.814 G multiply-accumulates at 224 x 224 (He et al. 2015, table 1: 1.8 G)."""
    gemms = [gemm for layer in engine(name).layers for gemm in layer_load(layer).gemms]
    assert len(gemms) == 21
    assert sum(gemm.macs for gemm in gemms) == pytest.approx(32 * 1.814e9, rel=1e-3)
    assert Gemm(32 * 56 * 56, 64, 64 * 9, 1, 64) in gemms


def test_engines_by_the_roofline_are_in_the_right_order_and_within_a_third() -> None:
    a100 = gpu_named("A100 80GB")
    predicted = {
        name: sum(
            kernel_time(a100, layer_load(layer)).microseconds + FITTED.profiler_us
            for layer in engine(name).layers
            if layer.launches
        )
        / 1e3
        for name in MEASURED_MS
    }
    assert sorted(predicted, key=lambda n: predicted[n]) == sorted(MEASURED_MS, key=lambda n: MEASURED_MS[n])
    assert predicted == pytest.approx(MEASURED_MS, rel=0.3)


@pytest.mark.parametrize(
    ("phrase", "datatype", "channels"),
    [
        ("Row major linear FP32", "Float", 3),
        ("Row major Int8 format", "Int8", 3),
        ("Four wide channel vectorized row major Int8 format", "Int8", 4),
        ("Thirty-two wide channel vectorized row major Int8 format", "Int8", 32),
        ("Channel major FP16 format where channel % 8 == 0", "Half", 8),
    ],
)
def test_packed_channels_are_padded(phrase: str, datatype: str, channels: int) -> None:
    tensor = CompiledTensor("x", (-1, 3, 5, 7), datatype, phrase)
    assert listed_bytes(tensor, 2) == 2 * channels * 35 * {"Float": 4, "Half": 2, "Int8": 1}[datatype]


def layer(kind: str, weights: int, dims: tuple[int, ...], out: tuple[int, ...]) -> Load:
    constants = (CompiledTensor("weights", (weights,), "Half", ""),) if weights else ()
    x, y = (CompiledTensor(name, d, "Half", "") for name, d in (("x", dims), ("y", out)))
    return layer_load(CompiledLayer("layer", kind, (x,), constants, (y,), ()))


def test_depthwise_convolutions_are_told_by_their_weights() -> None:
    load = layer("CudaDepthwiseConvolution", 32 * 9, (2, 32, 8, 8), (2, 32, 8, 8))
    assert load.gemms == (Gemm(128, 1, 9, 32, 1),)


def test_strided_convolutions_of_size_one_read_a_quarter() -> None:
    load = layer("CaskConvolution", 32 * 64, (2, 32, 8, 8), (2, 64, 4, 4))
    assert load.gemms == (Gemm(32, 64, 32, 1, 32),)
    assert load.sizes == (2 * 2 * 32 * 64 // 4, 2 * 2 * 64 * 16, 2 * 32 * 64)


def test_only_conversions_convert() -> None:
    assert layer("Reformat", 0, (2, 3, 8, 8), (2, 3, 8, 8)).converted == 2 * 8 * 64
    assert layer("CaskPooling", 0, (2, 3, 8, 8), (2, 3, 4, 4)).converted == 0
