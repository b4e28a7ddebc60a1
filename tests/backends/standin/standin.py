"""A TensorRT that runs plans without a GPU: the runtime part of its API, on the stand-in driver.

A plan of it is a header, what the plan says of itself, and an ONNX model, which ONNX Runtime computes when
the stream gets there. It does what TensorRT does in the order in which it does it: it logs and answers None
or False where TensorRT does, and raises where that raises. Imported as `tensorrt` or `tensorrt_rtx`.

Keys of what a plan says of itself, all optional:
    profiles: list of input name -> [min, opt, max] shapes.
    values: list of host input name -> [min, opt, max] values.
    host: names of inputs that are read on the CPU.
    kinds: tensor name -> TensorRT's datatype, where it is not the model's.
    fails: where it fails: "deserialize", "context", "execute" or "stream" (when the stream gets there).
    needs: what must have been done before: "host code", "plugins".
    stripped: the plan has no weights: refit first.
    takes_ms: how long a run takes, at least.
    invalid: bits of EngineInvalidityDiagnostics (RTX).
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import struct
import time
import weakref
from typing import Any

import numpy as np
import onnx
import onnxruntime

HEADER_BYTES = 64
_SEPARATOR = b"\n\0"

DRIVER = ctypes.CDLL("libcuda.so.1")
DRIVER.standin_live.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
DRIVER.cuStreamSynchronize.argtypes = [ctypes.c_void_p]
_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
DRIVER.cuLaunchHostFunc.argtypes = [ctypes.c_void_p, _HOST_FUNCTION, ctypes.c_void_p]

plugins_ready = False

DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT8 INT32 INT64 BOOL UINT8")
TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
TensorLocation = enum.Enum("TensorLocation", "DEVICE HOST")
TensorFormat = enum.Enum("TensorFormat", "LINEAR CHW32")
EngineValidity = enum.Enum("EngineValidity", "VALID SUBOPTIMAL INVALID")
EngineStat = enum.Enum("EngineStat", "TOTAL_WEIGHTS_SIZE STRIPPED_WEIGHTS_SIZE")
DynamicShapesKernelSpecializationStrategy = enum.Enum(
    "DynamicShapesKernelSpecializationStrategy", "LAZY EAGER NONE"
)
EngineInvalidityDiagnostics = enum.Enum(
    "EngineInvalidityDiagnostics",
    {
        "VERSION_MISMATCH": 1,
        "UNSUPPORTED_CC": 2,
        "OLD_CUDA_DRIVER": 4,
        "OLD_CUDA_RUNTIME": 8,
        "INSUFFICIENT_GPU_MEMORY": 16,
        "MALFORMED_ENGINE": 32,
        "CUDA_ERROR": 64,
    },
)

_OF_MODEL = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.INT8: "INT8",
    onnx.TensorProto.UINT8: "UINT8",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.BOOL: "BOOL",
}
_STORED = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}


def make_plan(model: onnx.ModelProto, *, rtx: bool = False, **says: Any) -> bytes:
    """A plan of the stand-in."""
    body = json.dumps(says).encode() + _SEPARATOR + model.SerializeToString()
    if not rtx:
        return b"ftrt".ljust(HEADER_BYTES, b"\0") + body
    size = HEADER_BYTES + len(body)
    return struct.pack("<4s4xQQ4B4xL28x", b"vtrt", 2, size, 1, 7, 1, 116, 4) + body


class ILogger:
    Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")


class IOutputAllocator:
    pass


class IProfiler:
    pass


def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> bool:
    global plugins_ready
    plugins_ready = True
    return True


class Runtime:
    engine: type[ICudaEngine]
    alive: weakref.WeakSet[Runtime]

    def __init__(self, logger: Any) -> None:
        """The logger is ignored as long as anything lives that was made with another one."""
        self.logger = next((runtime.logger for runtime in self.alive), logger)
        self.alive.add(self)
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        if self.refuses(serialized_engine):
            return self._refuse("Error Code 6: API Usage Error (the engine cannot run on this GPU)")
        told, _, model = serialized_engine[HEADER_BYTES:].partition(_SEPARATOR)
        try:
            says = json.loads(told)
        except ValueError:
            return self._refuse("Error Code 1: Serialization (magic tag does not match)")
        if says.get("fails") == "deserialize":
            return self._refuse("Error Code 6: API Usage Error (the engine was built by version 9.9.9)")
        needs = says.get("needs", ())
        if "host code" in needs and not self.engine_host_code_allowed:
            return self._refuse("engine_host_code_allowed is false and the engine has a lean runtime")
        if "plugins" in needs and not plugins_ready:
            return self._refuse("could not find plugin MyPlugin version 1")
        return self.engine(self, says, model)

    def refuses(self, plan: bytes) -> bool:
        return False

    def _refuse(self, message: str) -> None:
        self.logger.log(ILogger.Severity.ERROR, message)


class RtxRuntime(Runtime):
    """Of TensorRT for RTX, which has the engine's header looked at first."""

    engine_header_size = HEADER_BYTES

    def refuses(self, plan: bytes) -> bool:
        return self.get_engine_validity(plan)[1] != 0

    def get_engine_validity(self, buffer: bytes) -> tuple[Any, int]:
        (bits,) = struct.unpack_from("<L", buffer, 40)
        return (EngineValidity.INVALID if bits else EngineValidity.VALID), bits


class ICudaEngine:
    def __init__(self, runtime: Runtime, says: dict[str, Any], model: bytes) -> None:
        self.runtime, self.logger, self.says = runtime, runtime.logger, says
        self.model = onnx.load_from_string(model)
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        inputs, outputs = self.model.graph.input, self.model.graph.output
        self.tensors = {value.name: value for value in (*inputs, *outputs)}
        self.inputs = [value.name for value in inputs]
        self.outputs = [value.name for value in outputs]
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = max(1, len(says.get("profiles", ())))
        self.weights = not says.get("stripped", False)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        kind = self.says.get("kinds", {}).get(name)
        return DataType[kind or _OF_MODEL[self.tensors[name].type.tensor_type.elem_type]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        dims = self.tensors[name].type.tensor_type.shape.dim
        return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation.HOST if name in self.says.get("host", ()) else TensorLocation.DEVICE

    def get_tensor_format(self, name: str) -> Any:
        return TensorFormat[self.says.get("formats", {}).get(name, "LINEAR")]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        profiles = self.says.get("profiles", [{}])
        shape = self.get_tensor_shape(name)
        return [tuple(each) for each in profiles[profile_index].get(name, [shape] * 3)]

    def get_tensor_profile_values(self, name: int, profile_index: str) -> list[list[int]]:
        """The bindings have the names of the arguments the wrong way round."""
        if not isinstance(name, int) or not isinstance(profile_index, str):
            raise TypeError("get_tensor_profile_values(): incompatible function arguments")
        found: list[list[int]] = self.says.get("values", [{}])[name].get(profile_index, [])
        return found

    def get_engine_stat(self, stat: Any) -> int:
        return -1 if self.weights or stat != EngineStat.STRIPPED_WEIGHTS_SIZE else 1000

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: Any = None) -> IExecutionContext | None:
        if not self.weights or self.says.get("fails") == "context":
            what = "the engine needs its weights" if not self.weights else "out of memory"
            self.logger.log(ILogger.Severity.ERROR, f"createExecutionContext: {what}")
            return None
        if runtime_config is not None:
            runtime_config.use(self.model)
        return IExecutionContext(self)


class IRuntimeCache:
    def __init__(self) -> None:
        self.kernels: list[str] = []

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"standin "):
            return False
        self.kernels = blob.decode().split()[1:]
        return True

    def serialize(self) -> bytes:
        return " ".join(["standin", *self.kernels]).encode()


class IRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy: Any = None
    cache: IRuntimeCache | None = None

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True

    def use(self, model: onnx.ModelProto) -> None:
        """Compile what is not in the cache."""
        if self.cache is not None:
            kernels = [node.op_type for node in model.graph.node]
            self.cache.kernels += [kernel for kernel in kernels if kernel not in self.cache.kernels]


class Refitter:
    def __init__(self, network: ICudaEngine, logger: Any) -> None:
        self.engine, self.loaded = network, False

    def refit_cuda_engine(self) -> bool:
        self.engine.weights = self.loaded
        return self.loaded


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self.refitter, self.num_errors = refitter, 0

    def refit_from_file(self, model: str) -> bool:
        weights = {w.name for w in onnx.load(model).graph.initializer}
        self.refitter.loaded = weights == {w.name for w in self.refitter.engine.model.graph.initializer}
        return self.refitter.loaded

    def get_error(self, index: int) -> Any:
        raise IndexError(index)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self.engine = engine
        self.active_optimization_profile = 0
        self.profiler: Any = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        self._issued: list[Any] = []  # callbacks must live until the stream is through, and in a graph longer

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.active_optimization_profile = profile_index
        self._shapes.clear()
        return profile_index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
        if len(shape) != len(low) or not all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
            return self._refuse(f"setInputShape: {tuple(shape)} of {name} is not in the profile")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if not memory:
            return self._refuse(f"setTensorAddress: {name} is given nullptr")
        self._addresses[name] = memory
        return True

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        self._allocators[name] = output_allocator
        return True

    def infer_shapes(self) -> list[str]:
        hosts = [name for name in self.engine.says.get("host", ()) if name not in self._addresses]
        return [name for name in self.engine.inputs if name not in self._shapes] + hosts

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes or name in self.engine.inputs:
            return self._shapes.get(name, self.engine.get_tensor_shape(name))
        if name in self.engine.says.get("data_dependent", ()):
            return tuple(-1 if d < 0 else d for d in self.engine.get_tensor_shape(name))
        known = {n: self._host_value(n) for n in self.engine.says.get("host", ())}
        feed = {n: known.get(n, self._array(n, zeros=True)) for n in self.engine.inputs}
        return tuple(self._compute(feed)[name].shape)

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self.engine
        for name in engine.tensors:
            if name not in self._addresses and name not in self._allocators:
                return self._refuse(f"enqueueV3: the address of {name} is not set")
        if engine.says.get("fails") == "execute":
            return self._refuse("enqueueV3: Error Code 1: Myelin (no kernel)")
        for name in engine.tensors:
            on_device = name in self._addresses and name not in engine.says.get("host", ())
            size = 0 if name in self._allocators else self._array(name, zeros=True).nbytes
            if on_device and not DRIVER.standin_live(self._addresses[name], size):
                return self._refuse(f"enqueueV3: {name} points to no device memory of {size} bytes")
        if self.profiler is not None:
            self.profiler.report_layer_time("layer", 0.5)
        if self._allocators:
            if DRIVER.cuStreamSynchronize(stream_handle):
                return self._refuse("enqueueV3: a data-dependent shape cannot be captured")
            self._run()
            return True
        callback = _HOST_FUNCTION(lambda _: self._run())
        self._issued.append(callback)
        return int(DRIVER.cuLaunchHostFunc(stream_handle, callback, None)) == 0

    def _run(self) -> None:
        if self.engine.says.get("fails") == "stream":
            DRIVER.standin_fail(700)
            return
        time.sleep(self.engine.says.get("takes_ms", 0) / 1e3)
        results = self._compute({name: self._array(name) for name in self.engine.inputs})
        for name, result in results.items():
            stored = _stored(result, self.engine.get_tensor_dtype(name).name)
            if (allocator := self._allocators.get(name)) is not None:
                address = allocator.reallocate_output_async(name, 0, max(stored.nbytes, 1), 256, 0)
                allocator.notify_shape(name, stored.shape)
                if not address:
                    continue
                self._addresses[name] = address
            ctypes.memmove(self._addresses[name], stored.ctypes.data, stored.nbytes)

    def _compute(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        kinds = {value.name: value.type.tensor_type.elem_type for value in self.engine.model.graph.input}
        typed = {n: a.astype(onnx.helper.tensor_dtype_to_np_dtype(kinds[n])) for n, a in feed.items()}
        return dict(
            zip(self.engine.outputs, self.engine.session.run(self.engine.outputs, typed), strict=True)
        )

    def _array(self, name: str, *, zeros: bool = False) -> np.ndarray:
        """What an address points to; or zeros of that shape and type."""
        kind = self.engine.get_tensor_dtype(name).name
        array = np.zeros(self.get_tensor_shape(name), _STORED[kind])
        if not zeros:
            ctypes.memmove(array.ctypes.data, self._addresses[name], array.nbytes)
        if kind == "BF16" and not zeros:
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array

    def _host_value(self, name: str) -> np.ndarray:
        return self._array(name, zeros=name not in self._addresses)

    def _refuse(self, message: str) -> bool:
        self.engine.logger.log(ILogger.Severity.ERROR, message)
        return False


def _stored(array: np.ndarray, kind: str) -> np.ndarray:
    if kind == "BF16":
        return np.ascontiguousarray((array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
    return np.ascontiguousarray(array.astype(_STORED[kind]))


class EngineOf86(ICudaEngine):
    @property
    def get_tensor_profile_values(self) -> Any:
        raise AttributeError("get_tensor_profile_values")


def become(module: dict[str, Any], rtx: bool) -> None:
    """Fill the namespace of a module `tensorrt` or `tensorrt_rtx`, the former as in the version asked for."""
    version = "1.7.1.116" if rtx else os.environ.get("TRTQ_STANDIN_VERSION", "10.16.1.11")
    old = version.startswith("8.")
    module.update({name: value for name, value in globals().items() if not name.startswith("_")})
    base = RtxRuntime if rtx else Runtime
    of_module = {"engine": EngineOf86 if old else ICudaEngine, "alive": weakref.WeakSet()}
    module["Runtime"] = type("Runtime", (base,), of_module)
    module["__version__"] = version
    if old:
        del module["OnnxParserRefitter"], module["EngineStat"]
