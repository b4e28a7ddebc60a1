"""Memory, streams, events and graphs of the first GPU: by PyCUDA, or by NVIDIA's `cuda-bindings`.

Both work in the GPU's primary context, which TensorRT and PyTorch use too. It is opened once and stays
current in the thread that opened it for the life of the process. PyCUDA knows no graphs, so these are the
driver's.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trtq.errors import MissingBackendError

_CAPTURE_MODE_RELAXED = 2  # CUstreamCaptureMode

Stream = Any
Event = Any


class CudaError(RuntimeError):
    """What the driver or PyCUDA said: `CUDA_ERROR_OUT_OF_MEMORY` and the like."""


class Cuda(Protocol):
    """What is asked of a GPU. Addresses are integers; every method raises CudaError where CUDA fails.

    Attributes:
        name: of the Python package at work.
    """

    name: str

    def free_memory(self) -> int:
        """Bytes of device memory that nobody has."""
        ...

    def allocate(self, size: int) -> int:
        """The address of new device memory of `size` bytes; at least one byte is had."""
        ...

    def free(self, address: int) -> None:
        """Give memory of `allocate` back."""
        ...

    def page_locked(self, size: int) -> NDArray[np.uint8]:
        """New host memory that copies on a stream need not wait for; it lives as long as the array."""
        ...

    def to_device(self, address: int, array: NDArray, stream: Stream) -> None:
        """Start copying a C-contiguous array, which must stay as it is until the stream is through."""
        ...

    def to_host(self, array: NDArray, address: int, stream: Stream) -> None:
        """Start filling a C-contiguous array."""
        ...

    def new_stream(self) -> Stream:
        """A stream."""
        ...

    def handle(self, stream: Stream) -> int:
        """The stream as the C API has it."""
        ...

    def synchronize(self, stream: Stream) -> None:
        """Wait until the stream is through."""
        ...

    def new_event(self) -> Event:
        """An event."""
        ...

    def record(self, event: Event, stream: Stream) -> None:
        """Let the event happen when all that is in the stream so far is done."""
        ...

    def elapsed_ms(self, start: Event, end: Event) -> float:
        """Milliseconds between two events that have happened."""
        ...


class PyCuda:
    """`Cuda` by PyCUDA."""

    name = "pycuda"

    def __init__(self) -> None:
        self._driver = importlib.import_module("pycuda.driver")
        self._memory: dict[int, Any] = {}
        with self._errors():
            self._driver.init()
            primary = self._driver.Device(0).retain_primary_context()
            primary.push()
        atexit.register(primary.pop)  # PyCUDA ends the process if a context is left

    def free_memory(self) -> int:
        with self._errors():
            return int(self._driver.mem_get_info()[0])

    def allocate(self, size: int) -> int:
        with self._errors():
            memory = self._driver.mem_alloc(max(size, 1))
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        with self._errors():
            self._memory.pop(address).free()

    def page_locked(self, size: int) -> NDArray[np.uint8]:
        with self._errors():
            array: NDArray[np.uint8] = self._driver.pagelocked_empty(size, np.uint8)
        return array

    def to_device(self, address: int, array: NDArray, stream: Stream) -> None:
        if array.nbytes:
            with self._errors():
                self._driver.memcpy_htod_async(address, array, stream)

    def to_host(self, array: NDArray, address: int, stream: Stream) -> None:
        if array.nbytes:
            with self._errors():
                self._driver.memcpy_dtoh_async(array, address, stream)

    def new_stream(self) -> Stream:
        with self._errors():
            return self._driver.Stream()

    def handle(self, stream: Stream) -> int:
        return int(stream.handle)

    def synchronize(self, stream: Stream) -> None:
        with self._errors():
            stream.synchronize()

    def new_event(self) -> Event:
        with self._errors():
            return self._driver.Event()

    def record(self, event: Event, stream: Stream) -> None:
        with self._errors():
            event.record(stream)

    def elapsed_ms(self, start: Event, end: Event) -> float:
        with self._errors():
            return float(start.time_till(end))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._driver.Error as error:
            raise CudaError(str(error)) from error


class CudaBindings:
    """`Cuda` by NVIDIA's cuda-bindings, which need no CUDA toolkit."""

    name = "cuda-bindings"

    def __init__(self) -> None:
        self._driver = importlib.import_module("cuda.bindings.driver")
        self._call("cuInit", 0)
        device = self._call("cuDeviceGet", 0)
        self._call("cuCtxSetCurrent", self._call("cuDevicePrimaryCtxRetain", device))

    def free_memory(self) -> int:
        return int(self._call("cuMemGetInfo")[0])

    def allocate(self, size: int) -> int:
        return int(self._call("cuMemAlloc", max(size, 1)))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def page_locked(self, size: int) -> NDArray[np.uint8]:
        address = int(self._call("cuMemHostAlloc", max(size, 1), 0))
        memory = (ctypes.c_uint8 * size).from_address(address)
        memory.owner = _Freed(functools.partial(self._driver.cuMemFreeHost, address))  # type: ignore[attr-defined]
        return np.ctypeslib.as_array(memory)

    def to_device(self, address: int, array: NDArray, stream: Stream) -> None:
        if array.nbytes:
            self._call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, stream)

    def to_host(self, array: NDArray, address: int, stream: Stream) -> None:
        if array.nbytes:
            self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, stream)

    def new_stream(self) -> Stream:
        return self._call("cuStreamCreate", 0)

    def handle(self, stream: Stream) -> int:
        return int(stream)

    def synchronize(self, stream: Stream) -> None:
        self._call("cuStreamSynchronize", stream)

    def new_event(self) -> Event:
        return self._call("cuEventCreate", 0)

    def record(self, event: Event, stream: Stream) -> None:
        self._call("cuEventRecord", event, stream)

    def elapsed_ms(self, start: Event, end: Event) -> float:
        return float(self._call("cuEventElapsedTime", start, end))

    def _call(self, function: str, *arguments: Any) -> Any:
        """What a function of the driver gives back beside its result code: nothing, a value, or a tuple."""
        code, *values = getattr(self._driver, function)(*arguments)
        if code != self._driver.CUresult.CUDA_SUCCESS:
            raise CudaError(f"{function} failed: {code.name}")
        return values[0] if len(values) == 1 else tuple(values)


class _Freed:
    """Calls a function when nobody needs it any more."""

    def __init__(self, free: Callable[[], object]) -> None:
        self._free = free

    def __del__(self) -> None:
        self._free()


IMPLEMENTATIONS: tuple[type[PyCuda] | type[CudaBindings], ...] = (PyCuda, CudaBindings)
"""In the order in which they are tried."""


@functools.cache
def open_cuda() -> Cuda:
    """The first GPU, by the first of `IMPLEMENTATIONS` that works here; the same one in every call.

    Raises:
        MissingBackendError: neither package is installed and finds a GPU.
    """
    problems = []
    for implementation in IMPLEMENTATIONS:
        try:
            return implementation()
        except Exception as error:  # noqa: PERF203 - a missing package, library, driver or GPU fails in many ways
            problems.append(f"{implementation.name}: {error or type(error).__name__}")
    raise MissingBackendError(
        "neither PyCUDA nor cuda-bindings works here",
        cause="; ".join(problems),
        remedy="pip install 'trtq[cuda]' on a machine with an NVIDIA GPU and its driver",
    )


class Graph:
    """What was issued to a stream, to be launched as one (a CUDA graph).

    Args:
        stream: its handle.
        issue: issues the work; it must have run before, so that nothing has to be set up.

    Raises:
        CudaError: the driver cannot capture it.
    """

    def __init__(self, stream: int, issue: Callable[[], object]) -> None:
        self._driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        self._stream = ctypes.c_void_p(stream)
        self._executable = ctypes.c_void_p()
        graph = ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, _CAPTURE_MODE_RELAXED)
        try:
            issue()
        finally:  # also after an error: the stream must not stay in capture
            ended = self._driver.cuStreamEndCapture(self._stream, ctypes.byref(graph))
        _check(ended, "cuStreamEndCapture")
        flags, executable = ctypes.c_ulonglong(0), ctypes.byref(self._executable)
        self._call("cuGraphInstantiateWithFlags", executable, graph, flags)
        self._call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Issue it once more."""
        self._call("cuGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        """Give it back."""
        self._call("cuGraphExecDestroy", self._executable)

    def _call(self, function: str, *arguments: Any) -> None:
        _check(getattr(self._driver, function)(*arguments), function)


def _check(result: int, function: str) -> None:
    if result:
        raise CudaError(f"{function} failed with CUDA error {result}")
