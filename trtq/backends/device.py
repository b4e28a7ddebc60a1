"""An engine on the GPU: its buffers, launches, CUDA graph and timings. PyCUDA holds memory and events.

Plan files are code: `Engine` runs whatever the plan holds. Give it only plans you built or trust.
Written on machines without a GPU: nothing of `Engine` has been run yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trtq.backends.builders import package_of
from trtq.backends.interface import find_gpu
from trtq.backends.network import logger
from trtq.errors import InputError, MissingBackendError

_CAPTURE_MODE_RELAXED = 2  # CUstreamCaptureMode
_CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "temperature.gpu", "power.draw")


class Engine:
    """A loaded engine with buffers for the optimum shapes of its first profile; made by `open_engine`.

    Attributes:
        batch: first dimension of the first input.
        bytes: device memory that loading it took, in bytes.
    """

    def __init__(self, cuda: Any, trt: Any, path: Path) -> None:
        free_before, _ = cuda.mem_get_info()
        self._cuda, self._trt = cuda, trt
        self._stream = cuda.Stream()
        log = logger(trt)
        self._runtime = trt.Runtime(log)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise InputError(
                "the engine does not load on this machine",
                file=path,
                cause="\n".join(log.errors) or f"{trt.__name__} {trt.__version__} gives no reason",
                remedy=f"build it here, with {trt.__name__} {trt.__version__} and for this GPU",
            )
        self._context = self._new_context()
        self._buffers = self._allocate(path)
        free_after, _ = cuda.mem_get_info()
        self.bytes = int(free_before - free_after)

    def enqueue(self) -> None:
        """Issue one inference on the stream."""
        if not self._context.execute_async_v3(self._stream.handle):
            raise InputError("TensorRT refuses to run the engine", cause="execute_async_v3 failed")

    def synchronize(self) -> None:
        """Wait until everything issued is done."""
        self._stream.synchronize()

    def captured(self) -> Callable[[], None]:
        """One inference as a CUDA graph: a function that launches it. `enqueue` must have run before.

        Raises:
            RuntimeError: the driver cannot capture this engine.
        """
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        stream = ctypes.c_void_p(self._stream.handle)
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()

        def check(result: int, call: str) -> None:
            if result:
                raise RuntimeError(f"{call} failed with CUDA error {result}")

        check(driver.cuStreamBeginCapture_v2(stream, _CAPTURE_MODE_RELAXED), "cuStreamBeginCapture")
        self._context.execute_async_v3(self._stream.handle)
        check(driver.cuStreamEndCapture(stream, ctypes.byref(graph)), "cuStreamEndCapture")
        instantiate = driver.cuGraphInstantiateWithFlags
        check(instantiate(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)), "cuGraphInstantiate")
        return lambda: check(driver.cuGraphLaunch(executable, stream), "cuGraphLaunch")

    def latencies(self, launch: Callable[[], None], runs: int) -> list[float]:
        """Milliseconds on the GPU of each of `runs` launches, by CUDA events around each."""
        events = [(self._cuda.Event(), self._cuda.Event()) for _ in range(runs)]
        for start, end in events:
            start.record(self._stream)
            launch()
            end.record(self._stream)
        self.synchronize()
        return [float(start.time_till(end)) for start, end in events]

    def back_to_back(self, launch: Callable[[], None], runs: int) -> float:
        """Milliseconds for `runs` launches without events in between."""
        start, end = self._cuda.Event(), self._cuda.Event()
        start.record(self._stream)
        for _ in range(runs):
            launch()
        end.record(self._stream)
        self.synchronize()
        return float(start.time_till(end))

    def kernel_times(self, runs: int) -> dict[str, float]:
        """Average milliseconds per layer, by TensorRT's profiler; slows the engine down."""
        totals: dict[str, float] = {}
        base: Any = self._trt.IProfiler

        class Profiler(base):
            def report_layer_time(self, layer_name: str, ms: float) -> None:
                totals[layer_name] = totals.get(layer_name, 0.0) + ms

        self._context.profiler = Profiler()
        for _ in range(runs):
            self.enqueue()
            self.synchronize()
        return {name: total / runs for name, total in totals.items()}

    def close(self) -> None:
        """Free everything on the device, while its context is current."""
        self.synchronize()
        del self._context, self._engine, self._runtime
        for buffer in self._buffers:
            buffer.free()

    def _new_context(self) -> Any:
        """A context; RTX compiles the kernels for its shapes at once, not while they are being timed."""
        trt = self._trt
        if trt.__name__ != "tensorrt_rtx":
            return self._engine.create_execution_context()
        runtime_config = self._engine.create_runtime_config()
        strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        runtime_config.dynamic_shapes_kernel_specialization_strategy = strategy
        return self._engine.create_execution_context(runtime_config)

    def _allocate(self, path: Path) -> list[Any]:
        """Device buffers of all inputs and outputs; floats hold noise, integers zeros."""
        engine, context, trt = self._engine, self._context, self._trt
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        for name in inputs:
            context.set_input_shape(name, engine.get_tensor_profile_shape(name, 0)[1])
        self.batch = int(context.get_tensor_shape(inputs[0])[0])
        random, buffers = np.random.default_rng(0), []
        for name in names:
            shape = tuple(context.get_tensor_shape(name))
            if any(d < 0 for d in shape):
                raise InputError(f"the shape of '{name}' depends on the data", file=path)
            host = np.zeros(shape, trt.nptype(engine.get_tensor_dtype(name)))
            if name in inputs and host.dtype.kind == "f":
                host[...] = random.standard_normal(shape)
            buffer = self._cuda.mem_alloc(max(host.nbytes, 1))
            self._cuda.memcpy_htod(buffer, host)
            context.set_tensor_address(name, int(buffer))
            buffers.append(buffer)
        return buffers


@contextlib.contextmanager
def open_engine(path: Path) -> Iterator[Engine]:
    """Load an engine on the first GPU.

    Raises:
        MissingBackendError: no GPU, no PyCUDA, or not the TensorRT that the plan is for.
        InputError: the file cannot be read or the engine does not load.
    """
    if find_gpu() is None:
        raise MissingBackendError(
            "an engine runs only on an NVIDIA GPU", file=path, remedy="run this on the machine with the GPU"
        )
    package = package_of(path)
    cuda = _module("pycuda.driver", "pip install 'trtq[cuda]'")
    trt = _module(package, f"pip install {package.replace('_', '-')}")
    cuda.init()
    primary = cuda.Device(0).retain_primary_context()  # the one that TensorRT uses
    primary.push()
    try:
        with contextlib.closing(Engine(cuda, trt, path)) as engine:
            yield engine
    finally:
        primary.pop()


def clocks() -> dict[str, str] | None:
    """What nvidia-smi says about the first GPU's clocks (MHz), temperature (°C) and power (W)."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(_CLOCKS, (value.strip() for value in line.strip().split(",")), strict=False))


def _module(name: str, remedy: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingBackendError(f"{name} is not installed", cause=error, remedy=remedy) from error
