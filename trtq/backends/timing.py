"""How fast engines are on the GPU, measured as NVIDIA's trtexec does.

After a warm-up, launches are timed by CUDA events on the GPU, so copies between host and device do not
count. The engines take turns, a fraction of a second each, so that a card that heats up or throttles does so
to all of them; its clocks are sampled meanwhile. Launches are queued ahead, as CUDA graphs where the engine
can be captured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtq.backends.builders import package_of
from trtq.backends.clocks import Clocks
from trtq.backends.cuda import CudaError, open_cuda
from trtq.backends.runner import Engine, open_engine, required_gpu, tensorrt_module
from trtq.errors import InputError, TrtqError

SLICE_MS = 100.0
"""Milliseconds of one engine's turn."""

PROFILED_RUNS = 20
MOST_QUEUED = 1000
"""Launches that are waiting at once; CUDA takes about as many before it blocks."""


@dataclasses.dataclass(frozen=True)
class Measuring:
    """How long to measure each engine: trtexec's defaults.

    Attributes:
        warm_up_ms: that it runs before anything counts.
        duration_s: that it is timed, at least.
        iterations: launches that are timed, at least.
    """

    warm_up_ms: float = 200.0
    duration_s: float = 3.0
    iterations: int = 10


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a GPU measured.

    Attributes:
        batch: first dimension of the first input, at its profile's optimum.
        runs: launches that were timed.
        p50_ms, p90_ms, p99_ms: percentiles of the time that the GPU takes for one inference.
        rows_per_second: throughput of launches queued back to back.
        cuda_graph: whether the inference was launched as a CUDA graph; if not, why is in `note`.
        device_bytes: device memory that the loaded engine takes with its buffers.
        load_ms: from the file to an engine that can be launched; the TensorRT library is loaded before.
        first_ms: of the first inference, with what TensorRT puts off until then.
        kernel_ms: TensorRT's profiler: layer -> average milliseconds; empty where it reports none.
        clocks: of the GPU during the timing: what -> smallest, median and largest value; None: unknown.
    """

    batch: int
    runs: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    rows_per_second: float
    cuda_graph: bool
    note: str
    device_bytes: int
    load_ms: float
    first_ms: float
    kernel_ms: Mapping[str, float]
    clocks: Mapping[str, tuple[float, float, float]] | None


def measure(
    engines: Sequence[Path], how: Measuring | None = None, plugins: Sequence[str] = ()
) -> list[Timing]:
    """Time engines on the first GPU, in turns. Loads the plans: only plans you built or trust.

    Args:
        plugins: libraries of TensorRT plugins.

    Raises:
        MissingBackendError: no GPU, CUDA package or TensorRT for them here.
        InputError: an engine does not load or run.
    """
    try:
        with contextlib.ExitStack() as stack:
            timed = [stack.enter_context(_timed(path, plugins)) for path in engines]
            return _measured(timed, how or Measuring())
    except CudaError as error:
        raise InputError("CUDA fails while engines are timed", cause=error) from error


def _measured(timed: Sequence[_Timed], how: Measuring) -> list[Timing]:
    for each in timed:
        each.warm_up(how.warm_up_ms)
    with Clocks() as clocks:
        while waiting := [each for each in timed if not each.is_enough(how)]:
            for each in waiting:
                each.take_turn()
    return [each.timing(clocks.ranges()) for each in timed]


class _Timed:
    """An engine that is being timed."""

    def __init__(self, engine: Engine, load_ms: float, free_before: int) -> None:
        feed = noise(engine)
        self._engine, self._load_ms = engine, load_ms
        self._batch = next((a.shape[0] for a in feed.values() if a.ndim), 1)
        self._events: list[Any] = []
        self._latencies: list[float] = []
        self._busy_ms = 0.0
        engine.bind(feed)
        started = time.perf_counter()
        engine.enqueue()
        engine.synchronize()
        self._first_ms = 1000 * (time.perf_counter() - started)
        self._queued = 1
        self._launch, self._note = self._launcher()
        self._bytes = free_before - open_cuda().free_memory()

    def warm_up(self, least_ms: float) -> None:
        """Run for a while, and find out how many launches make a turn."""
        until = time.perf_counter() + least_ms / 1000
        while not self._latencies or time.perf_counter() < until:
            self.take_turn()
        per_launch = max(self._busy_ms / len(self._latencies), SLICE_MS / MOST_QUEUED)
        self._queued = max(int(SLICE_MS / per_launch), 1)
        self._latencies, self._busy_ms = [], 0.0

    def is_enough(self, how: Measuring) -> bool:
        return self._busy_ms >= 1000 * how.duration_s and len(self._latencies) >= how.iterations

    def take_turn(self) -> None:
        """Queue launches with an event between one and the next, and wait for them."""
        engine = self._engine
        while len(self._events) <= self._queued:
            self._events.append(engine.new_event())
        events = self._events[: self._queued + 1]
        engine.record(events[0])
        for event in events[1:]:
            self._launch()
            engine.record(event)
        engine.synchronize()
        self._latencies += [engine.elapsed_ms(*pair) for pair in itertools.pairwise(events)]
        self._busy_ms += engine.elapsed_ms(events[0], events[-1])

    def timing(self, clocks: Mapping[str, tuple[float, float, float]] | None) -> Timing:
        p50, p90, p99 = (float(p) for p in np.percentile(self._latencies, (50, 90, 99)))
        layers: dict[str, float] = {}
        with contextlib.suppress(TrtqError):  # the timing stands without them
            layers = self._engine.layer_times(PROFILED_RUNS)
        return Timing(
            batch=self._batch,
            runs=len(self._latencies),
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            rows_per_second=1000 * len(self._latencies) * self._batch / self._busy_ms,
            cuda_graph=not self._note,
            note=self._note,
            device_bytes=self._bytes,
            load_ms=self._load_ms,
            first_ms=self._first_ms,
            kernel_ms=layers,
            clocks=clocks,
        )

    def _launcher(self) -> tuple[Callable[[], None], str]:
        """What launches an inference, and why it is no CUDA graph."""
        try:
            graph = self._engine.graph()
            graph.launch()
            self._engine.synchronize()
        except (CudaError, InputError) as error:
            return self._engine.enqueue, str(error).splitlines()[0]
        return graph.launch, ""


@contextlib.contextmanager
def _timed(path: Path, plugins: Sequence[str]) -> Iterator[_Timed]:
    """A loaded engine; CUDA and the TensorRT library are there before the clock starts."""
    required_gpu(path)
    tensorrt_module(package_of(path))
    free = open_cuda().free_memory()
    started = time.perf_counter()
    with open_engine(path, plugins) as engine:
        yield _Timed(engine, 1000 * (time.perf_counter() - started), free)


def noise(engine: Engine) -> dict[str, NDArray]:
    """Inputs at the first profile's optimum: noise for floats, else zeros, ones where they decide shapes."""
    random, feed = np.random.default_rng(0), {}
    profile = engine.profiles[0]
    for name, tensor in engine.inputs.items():
        shape = profile.shapes[name].opt if name in profile.shapes else tensor.shape
        if name in profile.values:
            feed[name] = np.array(profile.values[name].opt, tensor.dtype).reshape(shape)
        elif tensor.code is not None:
            codes = random.integers(0, 128, shape, np.int8)
            feed[name] = codes.astype(tensor.code.dtype)
        elif tensor.dtype.kind == "f":
            feed[name] = random.standard_normal(shape).astype(tensor.dtype)
        else:
            feed[name] = np.full(shape, int(tensor.on_host), tensor.dtype)
    return feed
