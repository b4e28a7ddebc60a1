"""From an ONNX file to a plan through TensorRT's Python API, the same for every version.

TensorRT's own API is used and not Polygraphy's loaders: those pick the flavour of TensorRT once per process
and log through a logger of their own, while what an engine of TensorRT for RTX really runs can only be
read from a VERBOSE log (see `trtq.backends.compiled`).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trtq import stops
from trtq.backends.compiled import HEADER
from trtq.backends.dialect import Dialect
from trtq.backends.interface import BuildOptions, Profile, check_profile, held_values
from trtq.errors import BuildError, InputError, MissingBackendError
from trtq.files import write_bytes

_NO_DRIVER = "cudaError 35"  # logged on machines without a GPU, whatever else went wrong

_UNSUPPORTED = (
    "TensorRT has no such operator: load the library that has its plugin (--plugin-lib LIB.so), or replace it"
    " in the model; NVIDIA's own plugins come with TensorRT (--backend tensorrt), few with TensorRT for RTX"
)
_REMEDIES = (
    ("Non-zero zero point", "quantize symmetrically (zero-point 0), as `trtq quantize` does"),
    (
        "must have type FP8, FP4, Int4, Int8",
        "leave biases in floating point: only 8- and 4-bit types dequantize",
    ),
    (
        "Scale coefficients must all be positive",
        "TensorRT 8 reads scales as float32: quantize with --rest fp32, and build with"
        " --lower-precision fp16",
    ),
    ("Plugin not found", _UNSUPPORTED),
    ("plugin creator", _UNSUPPORTED),
    ("no runners that implement it", _UNSUPPORTED),
    ("): false", _UNSUPPORTED),  # all that the parser says of an operator that it does not know
    (
        "Could not create the plugin",
        "check the node's attributes and inputs by the plugin's documentation; some plugins need a GPU even"
        " to be parsed",
    ),
    (
        "Unable to load library: libcu",
        "TensorRT 8 loads cuBLAS 11 and cuDNN 8 when it builds: install them (on x86 also pip install"
        " nvidia-cublas-cu11 nvidia-cudnn-cu11) and put their folders into LD_LIBRARY_PATH",
    ),
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

ALSO_INPUT = "_input_as_output"
"""Behind the name of an engine's output that is an input, too; in a network the two have to differ.

No model has such a name of its own, so that `trtq.backends.runner` can tell what the output is called.
"""

Prepare = Callable[[Any, Any, Any], None]
"""Called with builder, network and config when the network is parsed and the options are set."""


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A plan in memory.

    Attributes:
        plan: TensorRT's buffer.
        layers: the message that lists the compiled layers; empty where the builder logs none.
        warnings: the builder's, each once.
        notes: what was done otherwise than asked.
        held: the inputs whose values decide shapes -> the range that it takes.
    """

    plan: Any
    layers: str
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    held: Profile


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
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


@collection_paused()
def compile_plan(
    trt: Any,
    dialect: Dialect,
    model: Path,
    profiles: Sequence[Profile],
    options: BuildOptions,
    *,
    strongly_typed: bool,
    prepare: Prepare,
) -> Compilation:
    """Parse and build.

    Args:
        profiles: the engine's optimization profiles; none, or empty ones, for a model without dynamic axes.
        strongly_typed: the ONNX model's types are the engine's.

    Raises:
        MissingBackendError: TensorRT does not start here.
        BuildError: a model that TensorRT cannot parse or build.
        InputError: no such file; a file that is not ONNX; a profile that does not fit; options that this
            version does not have.
    """
    dialect.check(options)
    if not model.is_file():
        raise InputError("the model does not exist", file=model, remedy="check the path")
    log = logger(trt)
    load_plugins(trt, log, options.plugin_lib)
    builder = started(trt.Builder, log)
    network = builder.create_network(_network_flags(trt, dialect, strongly_typed))
    _parse(trt, dialect, network, log, model)
    _keep_input_names(network)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    known = held_values(profiles[0]) if profiles else {}
    held = that_decide_shapes(network, known, model)
    for profile in profiles or [{}]:  # the check is for what lacks one, too
        ranges = optimization_profile(builder, network, profile, held, model)
        if profile or held:
            config.add_optimization_profile(ranges)
    _name_axes_apart(network, profiles)
    notes = _apply(trt, builder, config, options)
    prepare(builder, network, config)
    with stops.deferred():  # inside the builder's log callback, an exception would be swallowed
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        cause = "\n".join(log.errors) or "the builder gives no reason"
        raise BuildError(
            f"{dialect.name} cannot build an engine from the model",
            file=model,
            cause=cause,
            remedy=_no_nms(trt, network, cause)
            or _remedy(cause, "see the builder's message; `trtq doctor` shows the versions in use"),
        )
    if options.timing_cache is not None:
        write_bytes(options.timing_cache, bytes(memoryview(config.get_timing_cache().serialize())))
    return Compilation(plan, log.layers, tuple(dict.fromkeys(log.warnings)), notes, held)


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


def load_plugins(trt: Any, log: Any, libraries: Sequence[str]) -> None:
    """Make TensorRT's own plugins and those of some libraries known to it.

    A library registers its plugins when it is loaded (REGISTER_TENSORRT_PLUGIN), or TensorRT's registry asks
    it for them (`getCreators`, `getPluginCreators`).

    Raises:
        InputError: a library is missing or cannot be loaded.
    """
    trt.init_libnvinfer_plugins(log, "")
    for library in libraries:
        try:
            loaded = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise InputError("the plugin library cannot be loaded", file=library, cause=error) from error
        asked = hasattr(loaded, "getCreators") or hasattr(loaded, "getPluginCreators")
        if asked and trt.get_plugin_registry().load_library(library) is None:
            cause = "\n".join(log.errors)
            raise InputError("TensorRT refuses the plugin library", file=library, cause=cause)


def logger(trt: Any, *, ignore: str | None = _NO_DRIVER) -> Any:
    """The process's one TensorRT logger, emptied. It prints nothing and keeps `errors`, `warnings`, `layers`.

    There is one because TensorRT ignores a second one as long as anything lives that was made with the first:
    what it said of a second engine would be lost.

    Args:
        ignore: errors with this in them are dropped; without a driver a builder logs one whatever it does.
    """
    log = _logger(trt)
    log.empty(ignore)
    return log


@functools.cache
def _logger(trt: Any) -> Any:
    severity = trt.ILogger.Severity
    base: Any = trt.ILogger

    class Log(base):
        """Keeps errors, warnings and the message that lists the compiled layers."""

        def __init__(self) -> None:
            super().__init__()
            self.empty(None)

        def empty(self, ignore: str | None) -> None:
            """Forget everything."""
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.layers = ""
            self._ignore = ignore

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                dropped = self._ignore is not None and self._ignore in message
                self.errors += [] if dropped else [message]
            elif level == severity.WARNING:
                self.warnings.append(message.strip())
            elif message.startswith(HEADER):
                self.layers = message

    return Log()


def started(kind: Any, log: Any) -> Any:
    """A builder or a runtime.

    Raises:
        MissingBackendError: TensorRT does not start: its libraries or CUDA do not work.
    """
    try:
        return kind(log)
    except (RuntimeError, TypeError) as error:  # "factory function returned nullptr"
        raise MissingBackendError(
            "TensorRT does not start on this machine",
            cause="\n".join(dict.fromkeys([*log.errors, *log.warnings])) or error,  # 8 warns only
            remedy="see its message; `trtq doctor` shows the versions, the GPU and the driver",
        ) from error


def opt_batch(profile: Profile) -> int:
    """The batch size that the engine is tuned for; 1 for a static model."""
    return next((shapes.opt[0] for shapes in profile.values() if shapes.opt), 1)


def optimization_profile(builder: Any, network: Any, profile: Profile, held: Profile, model: Path) -> Any:
    """A profile as TensorRT's object.

    Args:
        held: the ranges of the inputs whose values decide shapes.

    Raises:
        InputError: it does not fit the network's inputs.
    """
    inputs = (network.get_input(i) for i in range(network.num_inputs))
    check_profile(profile, {tensor.name: tuple(tensor.shape) for tensor in inputs}, model)
    result = builder.create_optimization_profile()
    for name, shapes in profile.items():
        result.set_shape(name, *shapes)
    for name, values in held.items():
        result.set_shape_input(name, *values)
    return result


def that_decide_shapes(network: Any, known: Profile, model: Path) -> Profile:
    """The ranges of those inputs whose values decide shapes, among what is known of inputs (`held_values`).

    Raises:
        BuildError: nothing is known of one.
    """
    inputs = map(network.get_input, range(network.num_inputs))
    names = [tensor.name for tensor in inputs if tensor.is_shape_tensor]
    if missing := [name for name in names if name not in known]:
        raise BuildError(
            f"the values of input '{missing[0]}' decide shapes, and nothing tells their range",
            file=model,
            remedy="give --data, which shows what it holds; or the one value that it always has:"
            f" [inputs.{missing[0]}] value in a recipe",
        )
    return {name: known[name] for name in names}


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
        remedy = _remedy(cause, "change the node so that TensorRT's ONNX parser accepts it")
        if remedy == _UNSUPPORTED and dialect.named_parser_errors:
            remedy = _other_version(trt, [error.node_operator() for error in errors]) or remedy
        raise BuildError(f"{dialect.name} cannot parse the model", file=model, cause=cause, remedy=remedy)


def _other_version(trt: Any, operators: Sequence[str]) -> str | None:
    """What to do where TensorRT has a plugin of that name, in another version than the node asks for."""
    for creator in trt.get_plugin_registry().all_creators:
        if creator.name in operators:
            return (
                f"TensorRT has {creator.name} in version {creator.plugin_version}: set the node's attribute"
                f' plugin_version to "{creator.plugin_version}", if its attributes are those of that version'
            )
    return None


def _keep_input_names(network: Any) -> None:
    """Give an input that is also an output its own name back; the output is called `<name>`
    with `ALSO_INPUT` behind it.

    TensorRT's parser calls such an input `__<name>`: inputs and outputs of a network differ in name.
    """
    outputs = {tensor.name: tensor for tensor in map(network.get_output, range(network.num_outputs))}
    for tensor in map(network.get_input, range(network.num_inputs)):
        name = tensor.name.removeprefix("__")
        if name != tensor.name and name in outputs:
            outputs[name].name = f"{name}{ALSO_INPUT}"
            tensor.name = name


def _describe(dialect: Dialect, error: Any) -> str:
    """One parser error: `node (operator): what TensorRT says`."""
    text = " ".join(line for line in error.desc().splitlines() if _NO_DRIVER not in line)
    if error.node() < 0:
        return text
    if not dialect.named_parser_errors:
        return f"node {error.node()}: {text}"
    return f"node '{error.node_name()}' ({error.node_operator()}): {text}"


def _apply(trt: Any, builder: Any, config: Any, options: BuildOptions) -> tuple[str, ...]:
    """Set the options on the builder's configuration; `Dialect.check` has made sure that they exist.

    Returns:
        What was done otherwise than asked.
    """
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
    if options.dla_core is not None:
        _use_dla(trt, builder, config, options.dla_core)
    if options.timing_cache is None:
        return ()
    return use_timing_cache(config, options.timing_cache, own=options.own_timing_cache)


def use_timing_cache(config: Any, path: Path, *, own: bool) -> tuple[str, ...]:
    """Give the builder's configuration the kernel timings in a file, or none where it is not there.

    Args:
        own: the file is trtq's, and is begun anew where TensorRT refuses it.

    Returns:
        That this is so.

    Raises:
        InputError: it cannot be read, or TensorRT refuses a file of the user's.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise InputError("cannot read the timing cache", file=path, cause=error.strerror) from error
    timings = config.create_timing_cache(content)  # perhaps None for what it cannot read
    if timings is not None and config.set_timing_cache(timings, ignore_mismatch=False):
        return ()
    problem = "TensorRT refuses the timing cache"
    cause = "it was made by another version or on another GPU, or is damaged"
    if not own:
        remedy = "delete it, or name another file: a new one is made"
        raise InputError(problem, file=path, cause=cause, remedy=remedy)
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return (f"{problem} {path} ({cause}): kernels are timed again, and it is replaced",)


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


def _name_axes_apart(network: Any, profiles: Sequence[Profile]) -> None:
    """Give axes that share a name names of their own where they may differ in size.

    TensorRT takes axes of one name to be equal, and refuses a profile that says otherwise; some exporters
    call every open axis "?". Two axes of one input that vary over the same range may still differ.
    """
    spans: dict[str, list[int]] = {}  # of the axes that keep a name
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        shapes = [shape for profile in profiles for shape in profile.get(tensor.name, ())]
        own: set[str] = set()
        for axis in (axis for axis, size in enumerate(tensor.shape) if size < 0):
            name, sizes = tensor.get_dimension_name(axis), [shape[axis] for shape in shapes]
            twice = name in own and len(set(sizes)) > 1
            if name and (twice or spans.setdefault(name, sizes) != sizes):
                tensor.set_dimension_name(axis, f"{tensor.name}:{axis}")
            own.add(name)


def _remedy(message: str, otherwise: str) -> str:
    return next((remedy for text, remedy in _REMEDIES if text in message), otherwise)
