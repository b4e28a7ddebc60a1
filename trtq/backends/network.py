"""From an ONNX file to a plan through TensorRT's Python API, the same for every version.

TensorRT's own API is used and not Polygraphy's loaders: those pick the flavour of TensorRT once per process
and log through a logger of their own, while what an engine of TensorRT for RTX really runs can only be
read from a VERBOSE log (see `trtq.backends.compiled`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trtq.backends.compiled import HEADER
from trtq.backends.dialect import Dialect
from trtq.backends.interface import BuildOptions, Profile, check_profile
from trtq.errors import InputError
from trtq.files import write_bytes

_NO_DRIVER = "cudaError 35"  # logged on machines without a GPU, whatever else went wrong

_UNSUPPORTED = "TensorRT has no such operator: replace it in the model, or keep it out of the engine"
_REMEDIES = (
    ("Non-zero zero point", "quantize symmetrically (zero-point 0), as `trtq quantize` does"),
    (
        "must have type FP8, FP4, Int4, Int8",
        "leave biases in floating point: only 8- and 4-bit types dequantize",
    ),
    ("Plugin not found", _UNSUPPORTED),
    ("plugin creator", _UNSUPPORTED),
    ("no runners that implement it", _UNSUPPORTED),
    ("Turing (SM75)", "leave 7.5 out of the targets, or convert the layers that are not quantized to fp16"),
    (
        "Attention operation was not supported by a dedicated kernel",
        "convert it to half (--rest fp16), which its kernels compute in; or export it as MatMul and Softmax",
    ),
    (
        "dtype == myelinTypeFloat",
        "versions before 1.7 have no INT8 convolution: pip install 'tensorrt-rtx>=1.7'",
    ),
)

Prepare = Callable[[Any, Any, Any], None]
"""Called with builder, network and config when the network is parsed and the options are set."""


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A plan in memory.

    Attributes:
        plan: TensorRT's buffer.
        layers: the message that lists the compiled layers; empty where the builder logs none.
        warnings: the builder's, each once.
    """

    plan: Any
    layers: str
    warnings: tuple[str, ...]


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    """No garbage collection meanwhile.

    TensorRT logs through Python while it holds a lock of its own. A collection that starts in there may find
    a builder of an earlier, failed call, whose destruction waits for the same lock, forever.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collection_paused()
def compile_plan(
    trt: Any,
    dialect: Dialect,
    model: Path,
    profile: Profile,
    options: BuildOptions,
    *,
    strongly_typed: bool,
    prepare: Prepare,
) -> Compilation:
    """Parse and build.

    Args:
        strongly_typed: the ONNX model's types are the engine's.

    Raises:
        InputError: no such file; a file that is not ONNX; a model that TensorRT cannot parse or build; a
            profile that does not fit; options that this version does not have.
    """
    dialect.check(options)
    if not model.is_file():
        raise InputError("the model does not exist", file=model, remedy="check the path")
    log = logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt, dialect, strongly_typed))
    _parse(trt, dialect, network, log, model)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    ranges = _optimization_profile(builder, network, profile, model)
    if profile:
        config.add_optimization_profile(ranges)
    _apply(trt, builder, config, options)
    prepare(builder, network, config)
    with _interrupt_afterwards():
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        cause = "\n".join(log.errors) or "the builder gives no reason"
        raise InputError(
            f"{dialect.name} cannot build an engine from the model",
            file=model,
            cause=cause,
            remedy=_no_nms(trt, network, cause)
            or _remedy(cause, "see the builder's message; `trtq doctor` shows the versions in use"),
        )
    if options.timing_cache is not None:
        write_bytes(options.timing_cache, bytes(memoryview(config.get_timing_cache().serialize())))
    return Compilation(plan, log.layers, tuple(dict.fromkeys(log.warnings)))


def _no_nms(trt: Any, network: Any, cause: str) -> str | None:
    """The remedy where nothing runs a NonMaxSuppression, as in TensorRT for RTX, whose parser takes it; the
    message has only the layer's name."""
    layers = (network.get_layer(i) for i in range(network.num_layers))
    if "no runners that implement it" in cause and any(layer.type == trt.LayerType.NMS for layer in layers):
        return (
            "it has no NonMaxSuppression: end the model in front of it, with its boxes and scores as outputs,"
            " and select behind the engine"
        )
    return None


def logger(trt: Any) -> Any:
    """A TensorRT logger that prints nothing and keeps `errors`, `warnings` and `layers`."""
    severity = trt.ILogger.Severity
    base: Any = trt.ILogger

    class Log(base):
        """Keeps errors, warnings and the message that lists the compiled layers."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.layers = ""

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                self.errors += [] if _NO_DRIVER in message else [message]
            elif level == severity.WARNING:
                self.warnings.append(message.strip())
            elif message.startswith(HEADER):
                self.layers = message

    return Log()


def opt_batch(profile: Profile) -> int:
    """The batch size that the engine is tuned for; 1 for a static model."""
    return next((shapes.opt[0] for shapes in profile.values() if shapes.opt), 1)


@contextlib.contextmanager
def _interrupt_afterwards() -> Iterator[None]:
    """Ctrl-C takes effect when the builder returns: inside its log callback it would be swallowed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pressed:
        raise KeyboardInterrupt


def _network_flags(trt: Any, dialect: Dialect, strongly_typed: bool) -> int:
    flags = 0
    if dialect.explicit_batch:
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    if strongly_typed:
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return flags


def _parse(trt: Any, dialect: Dialect, network: Any, log: Any, model: Path) -> None:
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse_from_file(str(model))
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if parsed and not errors and not network.num_outputs:  # what the parser makes of a file of another kind
        raise InputError("not an ONNX model", file=model, remedy="export the model again")
    if not parsed:
        cause = "\n".join(_describe(dialect, error) for error in errors) or "\n".join(log.errors)
        raise InputError(
            f"{dialect.name} cannot parse the model",
            file=model,
            cause=cause,
            remedy=_remedy(cause, "change the node so that TensorRT's ONNX parser accepts it"),
        )


def _describe(dialect: Dialect, error: Any) -> str:
    """One parser error: `node (operator): what TensorRT says`."""
    text = " ".join(line for line in error.desc().splitlines() if _NO_DRIVER not in line)
    if error.node() < 0:
        return text
    if not dialect.named_parser_errors:
        return f"node {error.node()}: {text}"
    return f"node '{error.node_name()}' ({error.node_operator()}): {text}"


def _apply(trt: Any, builder: Any, config: Any, options: BuildOptions) -> None:
    """Set the options on the builder's configuration; `Dialect.check` has made sure that they exist."""
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if options.timing_cache is not None:
        _use_timing_cache(config, options.timing_cache)
    if options.dla_core is not None:
        _use_dla(trt, builder, config, options.dla_core)


def _use_timing_cache(config: Any, path: Path) -> None:
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise InputError("cannot read the timing cache", file=path, cause=error.strerror) from error
    if not config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False):
        raise InputError(
            "TensorRT refuses the timing cache",
            file=path,
            cause="it was made by another version or on another GPU, or is damaged",
            remedy="delete it, or name another file: a new one is made",
        )


def _use_dla(trt: Any, builder: Any, config: Any, core: int) -> None:
    if core not in range(builder.num_DLA_cores):
        raise InputError(
            f"there is no DLA core {core} here",
            cause=f"TensorRT finds {builder.num_DLA_cores}",
            remedy="leave the option out to run on the GPU",
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def _optimization_profile(builder: Any, network: Any, profile: Profile, model: Path) -> Any:
    inputs = (network.get_input(i) for i in range(network.num_inputs))
    check_profile(profile, {tensor.name: tuple(tensor.shape) for tensor in inputs}, model)
    result = builder.create_optimization_profile()
    for name, shapes in profile.items():
        result.set_shape(name, *shapes)
    return result


def _remedy(message: str, otherwise: str) -> str:
    return next((remedy for text, remedy in _REMEDIES if text in message), otherwise)
