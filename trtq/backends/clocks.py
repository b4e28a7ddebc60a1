"""Clocks, temperature and power of the first GPU, sampled in a thread while something else runs (NVML)."""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
from collections.abc import Callable
from types import TracebackType

INTERVAL_S = 0.05

_GRAPHICS, _MEMORY = 1, 2  # nvmlClockType_t: NVML_CLOCK_SM, NVML_CLOCK_MEM
_ON_DIE = 0  # nvmlTemperatureSensors_t


class Clocks:
    """Samples from entering to leaving the context.

    Where NVML or the GPU does not answer there are no samples: a measurement does not fail for want of them.
    """

    def __init__(self) -> None:
        self._samples: list[dict[str, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Clocks:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def ranges(self) -> dict[str, tuple[float, float, float]] | None:
        """What -> smallest, median and largest value seen; None where there are no samples."""
        if not self._samples:
            return None
        columns = {name: [s[name] for s in self._samples if name in s] for name in self._samples[0]}
        return {name: (min(v), statistics.median(v), max(v)) for name, v in columns.items()}

    def _sample(self) -> None:
        read = reader()
        while read is not None:
            if sample := read():
                self._samples.append(sample)
            if self._done.wait(INTERVAL_S):
                return


def reader() -> Callable[[], dict[str, float]] | None:
    """A function that reads the first GPU's state (MHz, °C, W), as far as NVML tells; None without NVML."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
        device = ctypes.c_void_p()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByPciBusId_v2(_bus(), ctypes.byref(device)):
            return None
    except (OSError, AttributeError):
        return None
    calls = {
        "SM MHz": (nvml.nvmlDeviceGetClockInfo, _GRAPHICS, 1),
        "largest SM MHz": (nvml.nvmlDeviceGetMaxClockInfo, _GRAPHICS, 1),
        "memory MHz": (nvml.nvmlDeviceGetClockInfo, _MEMORY, 1),
        "°C": (nvml.nvmlDeviceGetTemperature, _ON_DIE, 1),
        "W": (nvml.nvmlDeviceGetPowerUsage, None, 1000),
    }

    def read() -> dict[str, float]:
        found: dict[str, float] = {}
        for name, (call, what, divisor) in calls.items():
            value = ctypes.c_uint()
            arguments = (device, ctypes.byref(value)) if what is None else (device, what, ctypes.byref(value))
            if call(*arguments) == 0:
                found[name] = value.value / divisor
        return found

    return read


def _bus() -> bytes:
    """Where CUDA's first GPU sits: NVML counts all GPUs, CUDA only those that it may see."""
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    text, device = ctypes.create_string_buffer(32), ctypes.c_int()
    driver.cuInit(0)
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetPCIBusId(text, len(text), device)
    return text.value
