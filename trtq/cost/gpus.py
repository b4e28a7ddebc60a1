"""What NVIDIA's data sheets say of GPUs, by name.

The figures were written down from memory of the documents that are named, and each row is tested to agree
with itself; none was compared with the document again. A profile of engines on the GPU goes before them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trtq.errors import InputError, shown


@dataclass(frozen=True)
class Gpu:
    """What decides how fast a GPU runs kernels; rates are dense, of the boost clock.

    Attributes:
        name: NVIDIA's, without "NVIDIA" and "GeForce".
        capability: compute capability, times ten.
        sms: streaming multiprocessors.
        bandwidth: of its memory, in GB/s.
        l2: size of its L2 cache in MB.
        fp32: of the CUDA cores, in TFLOP/s.
        tf32, fp16, int8: of the tensor cores, in TFLOP/s (a multiply-accumulate is two); fp16 accumulates in
            float16, as TensorRT's kernels do; 0: there are none of that type.
        source: the document that says so.
    """

    name: str
    capability: int
    sms: int
    bandwidth: float
    l2: float
    fp32: float
    tf32: float
    fp16: float
    int8: float
    source: str

    @property
    def clock(self) -> float:
        """Boost clock in GHz, by which the data sheet's rates are computed."""
        return self.fp32 * 1e3 / (2 * self.sms * (64 if self.capability in (70, 75, 80) else 128))


_VOLTA = "NVIDIA V100 Tensor Core GPU data sheet (2020), INT8 from its dp4a instruction"
_TURING = "NVIDIA Turing GPU Architecture whitepaper, WP-09183-001"
_GA100 = "NVIDIA A100 Tensor Core GPU data sheet and architecture whitepaper V1.0"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper V2.1"
_ADA = "NVIDIA Ada GPU Architecture whitepaper V2.1"
_HOPPER = "NVIDIA H100 Tensor Core GPU data sheet and architecture whitepaper"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper V1.1"
_ORIN = "NVIDIA Jetson AGX Orin Series technical brief V1.2, and Jetson Orin data sheets"

GPUS: tuple[Gpu, ...] = (
    # name, capability, SMs, GB/s, L2 MB, fp32, tf32, fp16, int8
    Gpu("V100", 70, 80, 900, 6, 15.7, 0, 125, 0, _VOLTA),
    Gpu("T4", 75, 40, 320, 4, 8.1, 0, 65, 130, "NVIDIA T4 data sheet (2019); " + _TURING),
    Gpu("RTX 2080", 75, 46, 448, 4, 10.1, 0, 80.5, 161.1, _TURING),
    Gpu("RTX 2080 Ti", 75, 68, 616, 5.5, 13.4, 0, 107.6, 215.2, _TURING),
    Gpu("A100 80GB", 80, 108, 1935, 40, 19.5, 156, 312, 624, _GA100),
    Gpu("A100 40GB", 80, 108, 1555, 40, 19.5, 156, 312, 624, _GA100),
    Gpu("A30", 80, 56, 933, 24, 10.3, 82, 165, 330, "NVIDIA A30 data sheet"),
    Gpu("A10", 86, 72, 600, 6, 31.2, 62.5, 125, 250, "NVIDIA A10 data sheet"),
    Gpu("A2", 86, 10, 200, 2, 4.5, 9, 18, 36, "NVIDIA A2 data sheet"),
    Gpu("A40", 86, 84, 696, 6, 37.4, 74.8, 149.7, 299.3, "NVIDIA A40 data sheet"),
    Gpu("RTX A6000", 86, 84, 768, 6, 38.7, 77.4, 154.8, 309.7, _GA102),
    Gpu("RTX 3070", 86, 46, 448, 4, 20.3, 20.3, 81.3, 162.6, _GA102),
    Gpu("RTX 3080", 86, 68, 760, 5, 29.8, 29.8, 119, 238, _GA102),
    Gpu("RTX 3090", 86, 82, 936, 6, 35.6, 35.6, 142, 284, _GA102),
    Gpu("AGX Orin", 87, 16, 204.8, 4, 5.3, 21.2, 42.5, 85, _ORIN),
    Gpu("Orin NX", 87, 8, 102.4, 2, 1.88, 7.5, 15, 30, _ORIN),
    Gpu("Orin Nano", 87, 8, 68, 2, 1.28, 5, 10, 20, _ORIN),
    Gpu("L4", 89, 58, 300, 48, 30.3, 60, 121, 242, "NVIDIA L4 data sheet (its figures with sparsity halved)"),
    Gpu("RTX 6000 Ada", 89, 142, 960, 96, 91.1, 182.1, 364.2, 728.5, "NVIDIA RTX 6000 Ada data sheet"),
    Gpu("L40S", 89, 142, 864, 96, 91.6, 183, 362, 733, "NVIDIA L40S data sheet"),
    Gpu("RTX 4080", 89, 76, 716.8, 64, 48.7, 48.7, 194.9, 389.9, _ADA),
    Gpu("RTX 4090", 89, 128, 1008, 72, 82.6, 82.6, 330.3, 660.6, _ADA),
    Gpu("H100 PCIe", 90, 114, 2000, 50, 51, 378, 756, 1513, _HOPPER),
    Gpu("H100", 90, 132, 3350, 50, 67, 494, 989, 1979, _HOPPER),
    Gpu("H200", 90, 132, 4800, 50, 67, 494, 989, 1979, "NVIDIA H200 data sheet"),
    Gpu("B200", 100, 148, 8000, 126, 75, 1125, 2250, 4500, "NVIDIA HGX B200 data sheet, by eight"),
    Gpu("RTX 5080", 120, 84, 960, 64, 56.3, 56.3, 225.1, 450.2, _BLACKWELL),
    Gpu("RTX 5090", 120, 170, 1792, 96, 104.8, 104.8, 419, 838, _BLACKWELL),
)


def gpu_named(name: str) -> Gpu:
    """The GPU of a name as the driver or a person writes it: "NVIDIA A100-SXM4-40GB", "rtx4090", "L4".

    Of several that it could be, it is the one of which the name says most, or else the first of the table.

    Raises:
        InputError: none has that name.
    """
    said = _words(name)
    whole = [gpu for gpu in GPUS if _words(gpu.name) <= said and not (said - _words(gpu.name)) & _OTHERS]
    part = [gpu for gpu in GPUS if said and said <= _words(gpu.name)]
    if not whole + part:
        raise InputError(
            f"no data sheet of a GPU named {shown(name)}",
            remedy=f"one of {', '.join(gpu.name for gpu in GPUS)}; or a profile of engines on your GPU",
        )
    return max(whole, key=lambda gpu: len(_words(gpu.name))) if whole else part[0]


_NOISE = frozenset({"nvidia", "geforce", "tesla", "jetson", "rtx", "gpu", "nvgpu"})
_OTHERS = frozenset({"ti", "super", "laptop", "mobile", "max"})
"""What makes another GPU of a name."""


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", re.sub("rtx", " ", name.lower()))) - _NOISE
