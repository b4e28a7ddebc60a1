"""What a kernel takes on a GPU by its data sheet.

A kernel takes a launch, and the longer of computing and moving its bytes. The few constants that no data
sheet has were fitted to profiles of an A100 and an RTX 3090; `tools/cost_check.py` prints how well they fit,
and how well those fitted to one GPU fit the other. This is a model: it ranks placements, and is no
measurement.

Source of the idea: Williams et al. 2009, "Roofline: An Insightful Visual Performance Model".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trtq.cost.fused import Gemm
from trtq.cost.gpus import Gpu
from trtq.cost.interface import Precision

BYTES: Mapping[Precision, int] = {"int8": 1, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Constants:
    """What no data sheet says.

    Attributes:
        launch_us: from the end of a kernel to the end of the next one, if that does nothing, in a CUDA graph.
        ramp_us: that a product takes on top, to fill its pipeline and to write what is left in it.
        profiler_us: that TensorRT's profiler adds to each kernel; not part of what an engine takes.
        memory: share of the bandwidth that kernels reach.
        cached: how many times faster than memory the L2 cache is.
        convert: elements that a multiprocessor converts in a clock, where nothing else is done to them.
        tensor: share of the tensor cores' rate that the inner loop of a wide tile reaches.
        cuda: the same of the CUDA cores.
        narrow: tiles are slower where they are narrow: by width / (width + narrow).
    """

    launch_us: float = 3.0
    ramp_us: float = 2.5
    profiler_us: float = 4.5
    memory: float = 0.8
    cached: float = 2.0
    convert: float = 1.75
    tensor: float = 0.8
    cuda: float = 0.7
    narrow: float = 16.0


FITTED = Constants()


@dataclass(frozen=True)
class Load:
    """What a kernel has to do.

    Attributes:
        precision: what it multiplies in.
        gemms: its products.
        sizes: bytes of each tensor that it reads or writes; all weights are one.
        converted: elements, with padding, where it only changes their datatype or layout.
    """

    precision: Precision
    gemms: tuple[Gemm, ...]
    sizes: tuple[int, ...]
    converted: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class Time:
    """What a kernel takes, and what bounds it."""

    microseconds: float
    why: str


def kernel_time(gpu: Gpu, load: Load, constants: Constants = FITTED) -> Time:
    """A launch, and the longer of computing and of moving bytes.

    Tensors that fill less than half of the L2 cache are read and written there.
    """
    fast = gpu.bandwidth * 1e3 * constants.memory
    moving = sum(size / (fast * (constants.cached if 2 * size < gpu.l2 * 1e6 else 1)) for size in load.sizes)
    converting = load.converted / (gpu.sms * gpu.clock * 1e3 * constants.convert)
    computing = sum(_gemm_us(gpu, gemm, load.precision, constants) for gemm in load.gemms)
    fixed = constants.launch_us + (constants.ramp_us if load.gemms else 0)
    longest = max(moving, computing, converting)
    if longest < fixed:
        why = "launch"
    elif longest == computing:
        why = f"compute: {sum(gemm.macs for gemm in load.gemms) / 1e6:.4g} M multiply-accumulates"
    else:
        why = f"memory: {load.bytes / 1e6:.3g} MB"
    return Time(fixed + longest, why)


# --- products -------------------------------------------------------------------------------------------

_TILES = ((256, 128), (128, 256), (128, 128), (256, 64), (128, 64), (64, 64), (128, 32), (64, 32))
"""Rows and columns of the results that a block of threads computes at once."""

_SPLITS = (1, 2, 4, 8)
"""Into how many parts the inner axis may be split, where there are fewer tiles than multiprocessors."""

_PADDING: Mapping[Precision, int] = {"int8": 32, "fp16": 8, "fp32": 4}
"""Channels are padded to multiples of this for the tensor cores."""

THIN = 4
"""Up to so many channels INT8 convolutions are left to the CUDA cores' dp4a, which takes four at once."""


def _gemm_us(gpu: Gpu, gemm: Gemm, precision: Precision, constants: Constants) -> float:
    """The faster of tensor cores and CUDA cores."""
    if gemm.n == 1:  # depthwise, or by a vector: nothing is shared, and there is no dp4a across channels
        return _cuda_us(gpu.fp32 * (2 if precision == "fp16" else 1), gemm.macs, constants)
    on_cuda = {"int8": 4 * gpu.fp32, "fp16": 2 * gpu.fp32, "fp32": gpu.fp32}[precision]
    on_tensor = {"int8": gpu.int8, "fp16": gpu.fp16, "fp32": gpu.tf32}[precision]
    channels = gemm.channels or gemm.k
    padded = _up(channels, THIN) if precision == "int8" else channels
    ways = [_tiled_us(gpu, gemm, padded / channels, on_cuda * constants.cuda, constants)]
    if on_tensor and not (precision == "fp32" and channels < _PADDING["fp32"]):
        padded = _up(channels, _PADDING[precision])
        ways.append(_tiled_us(gpu, gemm, padded / channels, on_tensor * constants.tensor, constants))
    return min(ways)


def _cuda_us(rate: float, macs: int, constants: Constants) -> float:
    return 2 * macs / (rate * constants.cuda * 1e6)


def _tiled_us(gpu: Gpu, gemm: Gemm, padding: float, rate: float, constants: Constants) -> float:
    """By whole waves of tiles over the multiprocessors, which together do `rate` TFLOP/s."""
    best = math.inf
    for rows, columns in _TILES:
        tiles = math.ceil(gemm.m / rows) * math.ceil(gemm.n / columns) * gemm.count
        width = min(rows, columns)
        wave_us = 2 * rows * columns * gemm.k * padding * gpu.sms / (rate * 1e6)
        wave_us *= (width + constants.narrow) / width
        best = min(best, *(math.ceil(tiles * split / gpu.sms) * wave_us / split for split in _SPLITS))
    return best


# --- how tensors lie in memory --------------------------------------------------------------------------


def stored_bytes(shape: Sequence[int], precision: Precision) -> int:
    """Bytes of a tensor: those of an image (batch, channels, ...) have channels in packs in INT8 and float16.

    Packs are of 16 and 8, and of 4 for up to 4 channels.
    """
    elements = math.prod(shape)
    if len(shape) > 3 and precision != "fp32" and shape[1]:
        pack = THIN if shape[1] <= THIN else {"int8": 16, "fp16": 8}[precision]
        elements = elements // shape[1] * _up(shape[1], pack)
    return elements * BYTES[precision]


def converted(shape: Sequence[int]) -> int:
    """Elements that a kernel handles which changes datatype or layout: channels of images in packs of 8."""
    elements = math.prod(shape)
    return elements // shape[1] * _up(shape[1], 8) if len(shape) > 3 and shape[1] else elements


def _up(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple
