"""An engine on the GPU, fed with arrays and asked for its outputs: what gates, times and compares it.

One path for TensorRT 8.5 to 11 and TensorRT for RTX.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from trtq.backends.builders import package_of
from trtq.backends.cuda import Cuda, CudaError, Graph, open_cuda
from trtq.backends.interface import Gpu, Range, find_gpu
from trtq.backends.loading import KernelCache, load
from trtq.backends.network import ALSO_INPUT, logger
from trtq.backends.record import codes_in, read_record
from trtq.backends.tensors import DTYPES, Tensor
from trtq.data.batches import Arrays
from trtq.errors import InputError, MissingBackendError
from trtq.graph.inputs import InputSpec


class Profile(NamedTuple):
    """An optimization profile: the ranges of all inputs' shapes, and of the values that shapes depend on."""

    shapes: Mapping[str, Range]
    values: Mapping[str, Range]

    def misfit(self, arrays: Mapping[str, NDArray]) -> str | None:
        """What it does not take of these inputs; None: it takes them all."""
        for name, sizes in self.shapes.items():
            if not sizes.holds(shape := arrays[name].shape):
                return f"{name}: {_text(shape)} is not within {_text(sizes.min)} to {_text(sizes.max)}"
        for name, bounds in self.values.items():
            if not bounds.holds(values := tuple(arrays[name].reshape(-1).tolist())):
                return f"{name}: the values {values} are not within {bounds.min} to {bounds.max}"
        return None


class Engine:
    """A loaded engine; made by `open_engine`.

    Attributes:
        inputs, outputs: its tensors by name.
        profiles: what it takes.
    """

    def __init__(self, cuda: Cuda, trt: Any, path: Path, plugins: Sequence[str] = ()) -> None:
        self.path = path
        self._cuda, self._trt = cuda, trt
        self._log = logger(trt, ignore=None)
        self._stream = cuda.new_stream()
        with self._saying("the engine does not load on this machine"):
            self._runtime, self._engine = load(trt, self._log, path, plugins)
        self._codes = codes_in(read_record(path))
        tensors = [self._tensor(i) for i in range(self._engine.num_io_tensors)]
        self.inputs = {tensor.name: tensor for tensor in tensors if tensor.is_input}
        self.outputs = {tensor.name: tensor for tensor in tensors if not tensor.is_input}
        self.profiles = [self._profile(i) for i in range(self._engine.num_optimization_profiles)]
        self._kernels = KernelCache(path)
        self._buffers: dict[str, tuple[int, int]] = {}
        self._host: Arrays = {}
        self._allocators: dict[str, Any] = {}
        self._by_value: set[str] = set()
        self._graphs: list[Graph] = []
        with self._saying("the engine cannot be made ready to run"):
            self._context = self._kernels.context(trt, self._engine)
            if self._context is None:
                raise CudaError("create_execution_context failed")

    @property
    def specs(self) -> list[InputSpec]:
        """The inputs, as of an ONNX model."""
        return [
            InputSpec(name, tensor.dtype, tuple(None if d < 0 else d for d in tensor.shape))
            for name, tensor in self.inputs.items()
        ]

    @property
    def by_value(self) -> set[str]:
        """The outputs whose first axis has a size that depends on the data, as far as inputs were bound."""
        return {self._model_name(name) for name in self._by_value}

    def infer(self, feed: Mapping[str, NDArray]) -> Arrays:
        """The outputs for a feed, which may hold more than the engine takes.

        Raises:
            InputError: the engine does not take these shapes or values, or fails.
        """
        self.bind(feed)
        self.enqueue()
        return self.fetch()

    def bind(self, feed: Mapping[str, NDArray]) -> None:
        """Choose a profile, set the shapes, and put the inputs where the engine reads them.

        Raises:
            InputError: as `infer`.
        """
        profile = self._profile_for(feed)
        self._host = {name: tensor.stored(feed[name]) for name, tensor in self.inputs.items()}
        with self._saying("the engine does not take these inputs"):
            if self._context.active_optimization_profile != profile:
                self._succeed("set_optimization_profile_async", profile, self._cuda.handle(self._stream))
            for tensor in self.inputs.values():
                self._bind_input(tensor)
            if missing := self._context.infer_shapes():
                raise CudaError(f"infer_shapes lacks {', '.join(missing)}")
            for tensor in self.outputs.values():
                self._bind_output(tensor)

    def enqueue(self) -> None:
        """Issue one inference on the stream; inputs must be bound.

        Raises:
            InputError: TensorRT refuses.
        """
        with self._saying("the engine fails"):
            self._succeed("execute_async_v3", self._cuda.handle(self._stream))

    def fetch(self) -> Arrays:
        """The outputs of what was issued last.

        Raises:
            InputError: it failed.
        """
        with self._saying("the engine fails"):
            self._cuda.synchronize(self._stream)  # only then are shapes known that depend on the data
            stored = {tensor.name: self._read(tensor) for tensor in self.outputs.values()}
            self._cuda.synchronize(self._stream)
        return {self._model_name(n): self.outputs[n].values(array) for n, array in stored.items()}

    def synchronize(self) -> None:
        """Wait until everything issued is done.

        Raises:
            InputError: it failed.
        """
        with self._saying("the engine fails"):
            self._cuda.synchronize(self._stream)

    def graph(self) -> Graph:
        """One inference as a CUDA graph, which ends with the engine. `enqueue` must have run before.

        Raises:
            CudaError, InputError: it cannot be captured.
        """
        if self._allocators:
            raise CudaError("the shape of an output depends on the data")
        graph = Graph(self._cuda.handle(self._stream), self.enqueue)
        self._graphs.append(graph)
        return graph

    def new_event(self) -> Any:
        """A CUDA event, for `record`."""
        return self._cuda.new_event()

    def record(self, event: Any) -> None:
        """Let an event happen when all that was issued so far is done."""
        self._cuda.record(event, self._stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that have happened."""
        return self._cuda.elapsed_ms(start, end)

    def layer_times(self, runs: int) -> dict[str, float]:
        """Average milliseconds per layer, by TensorRT's profiler, which slows the engine down."""
        totals: dict[str, float] = {}
        base: Any = self._trt.IProfiler

        class Profiler(base):
            def __init__(self) -> None:
                base.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                totals[layer_name] = totals.get(layer_name, 0.0) + ms

        self._profiler = self._context.profiler = Profiler()  # the context may not keep it alive
        for _ in range(runs):
            self.enqueue()
            self.synchronize()
        return {name: total / runs for name, total in totals.items()}

    def close(self) -> None:
        """Free everything on the device, and keep what RTX compiled."""
        with contextlib.suppress(CudaError):  # what failed has been reported
            self._cuda.synchronize(self._stream)
        self._kernels.save()
        frees: list[Callable[[], object]] = [graph.close for graph in self._graphs]
        frees += [functools.partial(self._cuda.free, address) for address, _ in self._buffers.values()]
        for free in frees:
            with contextlib.suppress(CudaError):
                free()
        del self._context, self._engine, self._runtime

    def _tensor(self, index: int) -> Tensor:
        """What the engine says of a tensor.

        Raises:
            InputError: arrays cannot hold its datatype or layout.
        """
        trt, engine = self._trt, self._engine
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name).name
        layout = engine.get_tensor_format(name)
        if kind not in DTYPES or layout != trt.TensorFormat.LINEAR:
            raise InputError(
                f"tensor '{name}' of the engine is {kind} in the layout {layout.name}",
                file=self.path,
                cause="arrays hold numbers of 8 bits and more, one after the other (LINEAR)",
                remedy="build the engine with other types and formats of its inputs and outputs",
            )
        return Tensor(
            name,
            kind,
            tuple(engine.get_tensor_shape(name)),
            engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            engine.get_tensor_location(name) == trt.TensorLocation.HOST,
            self._codes.get(name),
        )

    def _model_name(self, output: str) -> str:
        """What the ONNX model calls an output: the network has another name for one that is an input, too."""
        name = output.removesuffix(ALSO_INPUT)
        return name if name in self.inputs else output

    def _profile(self, index: int) -> Profile:
        engine = self._engine
        shapes = {name: engine.get_tensor_profile_shape(name, index) for name in self.inputs}
        values = {}
        if hasattr(engine, "get_tensor_profile_values"):  # 8.6 cannot say
            hosts = [name for name, tensor in self.inputs.items() if tensor.on_host]
            values = {name: engine.get_tensor_profile_values(index, name) for name in hosts}
        return Profile(_ranges(shapes), _ranges(values))

    def _profile_for(self, feed: Mapping[str, NDArray]) -> int:
        """The first profile that takes a feed.

        Raises:
            InputError: none does.
        """
        misfits = [profile.misfit(feed) for profile in self.profiles]
        if None in misfits:
            return misfits.index(None)
        raise InputError(
            "no optimization profile of the engine takes the data's shapes",
            file=self.path,
            cause="\n".join(f"profile {i}: {misfit}" for i, misfit in enumerate(misfits)),
            remedy="choose another batch size (--batch), or build with a --profile that takes them",
        )

    def _bind_input(self, tensor: Tensor) -> None:
        array = self._host[tensor.name]
        self._succeed("set_input_shape", tensor.name, array.shape)
        address = array.ctypes.data
        if not tensor.on_host:
            address = self._buffer(tensor.name, array.nbytes)
            self._cuda.to_device(address, array, self._stream)
        self._succeed("set_tensor_address", tensor.name, address)

    def _bind_output(self, tensor: Tensor) -> None:
        shape = tuple(self._context.get_tensor_shape(tensor.name))
        if min(shape, default=0) < 0:
            if shape[0] < 0:
                self._by_value.add(tensor.name)
            if tensor.name not in self._allocators:
                self._allocators[tensor.name] = output_allocator(self._trt, self._buffer)
            self._succeed("set_output_allocator", tensor.name, self._allocators[tensor.name])
            return
        array = self._host[tensor.name] = tensor.empty(shape)
        address = array.ctypes.data if tensor.on_host else self._buffer(tensor.name, array.nbytes)
        self._succeed("set_tensor_address", tensor.name, address)

    def _read(self, tensor: Tensor) -> NDArray:
        """The stored values of an output; on their way from the device until the stream is through."""
        if (allocator := self._allocators.get(tensor.name)) is not None:
            if allocator.error is not None:
                raise allocator.error
            self._host[tensor.name] = tensor.empty(allocator.shape)
        array = self._host[tensor.name]
        if not tensor.on_host:
            self._cuda.to_host(array, self._buffers[tensor.name][0], self._stream)
        return array

    def _buffer(self, name: str, size: int) -> int:
        """The address of a tensor's device memory, at least `size` bytes."""
        address, room = self._buffers.get(name, (0, -1))
        if room < size:
            if address:
                del self._buffers[name]
                self._cuda.free(address)
            self._buffers[name] = self._cuda.allocate(size), size
        return self._buffers[name][0]

    def _succeed(self, method: str, *arguments: Any) -> None:
        """Call a method of the context that answers False where it fails."""
        if getattr(self._context, method)(*arguments) is False:
            raise CudaError(f"{method} failed")

    @contextlib.contextmanager
    def _saying(self, problem: str) -> Iterator[None]:
        """What TensorRT or CUDA objects to, as one readable error that quotes TensorRT's log."""
        self._log.errors.clear()
        try:
            yield
        except (RuntimeError, TypeError, ValueError) as error:  # CudaError is a RuntimeError
            said = list(dict.fromkeys(self._log.errors))
            raise InputError(problem, file=self.path, cause="\n".join([*said, str(error)])) from error


@contextlib.contextmanager
def open_engine(path: Path, plugins: Sequence[str] = ()) -> Iterator[Engine]:
    """Load an engine on the first GPU, with the TensorRT that its plan is for.

    Args:
        plugins: libraries of TensorRT plugins.

    Raises:
        MissingBackendError: no GPU, driver, CUDA package or TensorRT; or RTX does not run on this GPU.
        InputError: the file cannot be read or the engine does not load.
    """
    package = package_of(path)
    required_gpu(path)
    trt = tensorrt_module(package)
    with contextlib.closing(Engine(open_cuda(), trt, path, plugins)) as engine:
        yield engine


def required_gpu(engine: Path) -> Gpu:
    """The GPU that an engine runs on. Looked for first: TensorRT answers a missing one and a bad plan alike.

    Raises:
        MissingBackendError: there is none.
    """
    gpu = find_gpu()
    if gpu is None:
        raise MissingBackendError(
            "an engine runs only on an NVIDIA GPU",
            file=engine,
            cause="there is no GPU or no NVIDIA driver here",
            remedy="gate the engine on a machine with the GPU, or gate the quantized ONNX model here,"
            " which is simulated on the CPU",
        )
    return gpu


def tensorrt_module(package: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`.

    Raises:
        MissingBackendError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        remedy = f"pip install {package.replace('_', '-')}"
        raise MissingBackendError(f"{package} is not installed", cause=error, remedy=remedy) from error


def output_allocator(trt: Any, buffer: Any) -> Any:
    """An output allocator: memory for an output whose size TensorRT learns while it runs.

    It has `shape` after the run, and `error` where there was no memory: none may get into C++.
    """
    base: Any = trt.IOutputAllocator

    class Allocator(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.shape: tuple[int, ...] = ()
            self.error: Exception | None = None

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            try:
                return int(buffer(tensor_name, size))
            except Exception as error:
                self.error = error
                return 0

        def reallocate_output_async(
            self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(shape)

    return Allocator()


def _ranges(found: Mapping[str, Any]) -> dict[str, Range]:
    """Smallest, optimal and largest of each name, of those that TensorRT says anything of."""
    return {name: Range(*(tuple(each) for each in three)) for name, three in found.items() if three}


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
