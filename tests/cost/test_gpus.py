"""The table of GPUs: figures of one data sheet must agree with each other."""

from __future__ import annotations

import math

import pytest

from trtq.cost.gpus import GPUS, Gpu, gpu_named
from trtq.errors import InputError

BY_NAME = {gpu.name: gpu for gpu in GPUS}


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_rates_of_a_data_sheet_agree(gpu: Gpu) -> None:
    """Multiprocessors do a power of two of multiply-accumulates per clock, so a rate that was mistyped shows.

    Some data sheets give tensor cores' and CUDA cores' rates at different clocks, so up to 10 % is let pass.
    """
    assert 0.6 < gpu.clock < 2.7  # GHz
    for rate in (gpu.tf32, gpu.fp16, gpu.int8):
        if rate:
            per_clock = rate * 1e3 / (2 * gpu.sms * gpu.clock)
            assert math.log2(per_clock) == pytest.approx(round(math.log2(per_clock)), abs=0.14)
    if gpu.int8:
        assert gpu.int8 == pytest.approx(2 * gpu.fp16, rel=0.02)
    assert gpu.source
    assert gpu.l2 < gpu.bandwidth


@pytest.mark.parametrize(
    ("gpu", "clock"),
    [("A100 80GB", 1.41), ("RTX 3090", 1.695), ("T4", 1.59), ("L4", 2.04), ("AGX Orin", 1.3), ("V100", 1.53)],
)
def test_clocks_are_those_of_the_cards(gpu: str, clock: float) -> None:
    """As the driver says them."""
    assert BY_NAME[gpu].clock == pytest.approx(clock, rel=0.01)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("A100", "A100 80GB"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 2080 Ti", "RTX 2080 Ti"),
        ("RTX 2080", "RTX 2080"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA L40S", "L40S"),
        ("L4", "L4"),
        ("Orin (nvgpu)", "AGX Orin"),
        ("NVIDIA Jetson AGX Orin", "AGX Orin"),
        ("Jetson Orin Nano", "Orin Nano"),
    ],
)
def test_names(said: str, name: str) -> None:
    assert gpu_named(said).name == name


@pytest.mark.parametrize("said", ["", "GTX 1080", "RTX", "L40", "A1000", "RTX 4090 Laptop GPU", "?"])
def test_other_names_are_refused(said: str) -> None:
    with pytest.raises(InputError, match="no data sheet of a GPU named"):
        gpu_named(said)
