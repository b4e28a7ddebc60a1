"""Kernels by hand, and what must hold of any roofline."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtq.cost.fused import Gemm
from trtq.cost.gpus import GPUS, gpu_named
from trtq.cost.roofline import FITTED, Constants, Load, converted, kernel_time, stored_bytes

A100 = gpu_named("A100 80GB")
PERFECT = Constants(launch_us=1, ramp_us=0, memory=1, cached=1, convert=1, tensor=1, cuda=1, narrow=0)
"""A GPU that does what its data sheet says."""


def test_memory_by_hand() -> None:
    """193.5 MB at 1935 GB/s are 100 microseconds."""
    time = kernel_time(A100, Load("fp16", (), (100_000_000, 93_500_000)), PERFECT)
    assert time.microseconds == pytest.approx(1 + 100)
    assert time.why == "memory: 194 MB"


def test_what_fits_into_the_cache_is_read_from_there() -> None:
    twice = replace(PERFECT, cached=2)
    assert kernel_time(A100, Load("fp16", (), (19_350_000,)), twice).microseconds == pytest.approx(1 + 5)
    assert kernel_time(A100, Load("fp16", (), (38_700_000,)), twice).microseconds == pytest.approx(1 + 20)


def test_compute_by_hand() -> None:
    """108 tiles of 128 x 256, one for each multiprocessor."""
    gemm = Gemm(108 * 128, 256, 4096)
    operations = 2 * 108 * 128 * 256 * 4096
    for precision, rate in (("int8", 624e12), ("fp16", 312e12), ("fp32", 156e12)):
        time = kernel_time(A100, Load(precision, (gemm,), ()), PERFECT)  # type: ignore[arg-type]
        assert time.microseconds == pytest.approx(1 + 1e6 * operations / rate)
    assert time.why == "compute: 1.45e+04 M multiply-accumulates"


def test_few_tiles_do_not_fill_the_gpu() -> None:
    """One tile of 64 x 32 whose inner axis is split eightfold runs on 8 of 108 multiprocessors."""
    time = kernel_time(A100, Load("fp16", (Gemm(64, 32, 4096),), ()), PERFECT)
    assert time.microseconds == pytest.approx(1 + (2 * 64 * 32 * 4096 / 8) / (312e6 / 108))


def test_the_smallest_kernels_take_a_launch() -> None:
    time = kernel_time(A100, Load("int8", (Gemm(32, 10, 64),), (2048, 640, 320)))
    assert time.why == "launch"
    assert time.microseconds == pytest.approx(FITTED.launch_us + FITTED.ramp_us, abs=0.5)


def test_channels_are_padded() -> None:
    """33 channels cost as much as 64 in INT8, and as 40 in float16."""

    def us(precision: str, channels: int) -> float:
        gemm = Gemm(108 * 1024, 256, 9 * channels, 1, channels)
        return kernel_time(A100, Load(precision, (gemm,), ()), PERFECT).microseconds  # type: ignore[arg-type]

    assert us("int8", 33) == us("int8", 64)
    assert us("fp16", 33) == us("fp16", 40)
    assert us("int8", 64) < us("int8", 65)


def test_without_tensor_cores_int8_has_four_products_at_once() -> None:
    """A V100 has 15.7 TFLOP/s of float32, and no INT8 tensor cores."""
    v100 = gpu_named("V100")
    load = Load("int8", (Gemm(80 * 128 * 8, 256, 4096),), ())
    operations = 2 * 80 * 128 * 8 * 256 * 4096
    assert kernel_time(v100, load, PERFECT).microseconds == pytest.approx(1 + operations / (4 * 15.7e6))
    half = kernel_time(v100, replace(load, precision="fp16"), PERFECT).microseconds
    assert half == pytest.approx(1 + operations / 125e6)  # so float16 is faster there


def test_depthwise_convolutions_have_no_tensor_cores() -> None:
    load = Load("fp32", (Gemm(100_000, 1, 9, 960, 1),), ())
    assert kernel_time(A100, load, PERFECT).microseconds == pytest.approx(1 + 2 * 9 * 960 * 1e5 / 19.5e6)
    int8, half = (kernel_time(A100, replace(load, precision=p), PERFECT) for p in ("int8", "fp16"))
    assert int8.microseconds > half.microseconds


def test_conversions_by_hand() -> None:
    """At one element per clock, 108 multiprocessors at 1.41 GHz convert 152.3 G elements a second."""
    time = kernel_time(A100, Load("fp16", (), (1,), converted=15_234_375), PERFECT)
    assert time.microseconds == pytest.approx(1 + 100, rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "int8", "fp16", "fp32"),
    [
        ((2, 3, 8, 8), 2 * 4 * 64, 2 * 4 * 64 * 2, 2 * 3 * 64 * 4),
        ((2, 5, 8, 8), 2 * 16 * 64, 2 * 8 * 64 * 2, 2 * 5 * 64 * 4),
        ((2, 64, 8, 8), 2 * 64 * 64, 2 * 64 * 64 * 2, 2 * 64 * 64 * 4),
        ((2, 5), 10, 20, 40),
        ((0,), 0, 0, 0),
    ],
)
def test_bytes_of_tensors(shape: tuple[int, ...], int8: int, fp16: int, fp32: int) -> None:
    assert [stored_bytes(shape, p) for p in ("int8", "fp16", "fp32")] == [int8, fp16, fp32]  # type: ignore[arg-type]


def test_elements_of_conversions() -> None:
    assert converted((2, 3, 8, 8)) == 2 * 8 * 64
    assert converted((2, 9, 8, 8)) == 2 * 16 * 64
    assert converted((2, 9)) == 18


loads = st.builds(
    Load,
    precision=st.sampled_from(["int8", "fp16", "fp32"]),
    gemms=st.lists(
        st.builds(
            Gemm,
            m=st.integers(1, 100_000),
            n=st.integers(1, 4096),
            k=st.integers(1, 8192),
            count=st.integers(1, 16),
        ),
        max_size=2,
    ).map(tuple),
    sizes=st.lists(st.integers(0, 1 << 30), max_size=4).map(tuple),
    converted=st.integers(0, 1 << 26),
)


@settings(deadline=None)
@given(loads, st.sampled_from(GPUS), st.sampled_from(["bandwidth", "fp32", "tf32", "fp16", "int8", "l2"]))
def test_more_of_anything_is_never_slower(load: Load, gpu: object, what: str) -> None:
    faster = replace(gpu, **{what: 2 * getattr(gpu, what)})  # type: ignore[type-var]
    assert kernel_time(faster, load).microseconds <= kernel_time(gpu, load).microseconds + 1e-9  # type: ignore[arg-type]


@settings(deadline=None)
@given(loads, st.integers(0, 1 << 20))
def test_more_work_is_never_faster(load: Load, more: int) -> None:
    before = kernel_time(A100, load).microseconds
    assert before >= FITTED.launch_us
    assert kernel_time(A100, replace(load, sizes=(*load.sizes, more))).microseconds >= before
    assert kernel_time(A100, replace(load, converted=load.converted + more)).microseconds >= before
    larger = tuple(replace(gemm, m=gemm.m + more, k=gemm.k, n=gemm.n) for gemm in load.gemms)
    assert kernel_time(A100, replace(load, gemms=larger)).microseconds >= before - 1e-9
