"""Engines built with TensorRT for RTX: ahead of time, on any machine, with or without a GPU.

TensorRT's own API is used and not Polygraphy's loaders: those pick the flavour of TensorRT once per
process, from an environment variable read at import, and log through a logger of their own, while what an
engine really runs can only be read from a VERBOSE log (see `trtq.backends.compiled`).

Plan files are code: a plan holds GPU (and may hold host) machine code that runs when it is
deserialized. Deserialize only plans you built or whose origin you trust; nothing in this module
deserializes one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtq.backends.compiled import HEADER, Compiled, parse_layers
from trtq.backends.interface import Build, Profile, find_gpu
from trtq.errors import InputError, MissingBackendError
from trtq.files import PathLike, atomic_path, read_json, sha256_file, write_json

_PLAN_HEADER = struct.Struct("<4s4xQQ4B4xL28x")  # what is read of the first 64 bytes; see describe_plan
_PLAN_MAGIC = b"vtrt"
_PLAN_FORMAT = 2
_PLAN_TARGETS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # bit 0, 1, ... of the header's targets

_NO_DRIVER = "cudaError 35"  # logged on machines without a GPU, whatever else went wrong

_UNSUPPORTED = "TensorRT for RTX has no such operator: replace it in the model, or keep it out of the engine"
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
        "dtype == myelinTypeFloat",
        "versions before 1.7 have no INT8 convolution: pip install 'tensorrt-rtx>=1.7'",
    ),
)


def build(
    model: PathLike,
    engine: PathLike,
    *,
    profile: Profile | None = None,
    targets: Sequence[str] = (),
) -> Build:
    """Compile an ONNX model into a plan file, strongly typed, and record what it runs.

    The model's types are the engine's: INT8 where Q/DQ asks for it, fp16 where the ONNX model is fp16.
    The model is parsed from its file, so external data (models above 2 GB) is found beside it.
    `<engine>.json` beside the plan holds versions, hashes, targets, profile and kernels, so that the
    engine can be inspected without a GPU (`describe_plan`).

    The builder compiles one graph, that of the lowest target; an engine for several targets runs that
    graph on all of them. Two builds of one model do not give the same bytes: TensorRT numbers its
    internal tensors anew each time. Compare engines by model hash and kernels, not by plan hash.

    Args:
        model: ONNX file.
        engine: where to write the plan; written in one move.
        profile: ranges of the dynamic inputs (`profiles_from`, `parse_profile`); None or empty for a
            model without dynamic axes. With min = opt = max the kernels' sizes are known exactly.
        targets: compute capabilities such as "8.6". Default: that of the GPU in this machine if
            TensorRT for RTX supports it, else the builder's own set (Ampere and newer).

    Raises:
        MissingBackendError: tensorrt_rtx is not installed.
        InputError: an unknown target; a file that is not ONNX; a model that TensorRT cannot parse or build;
            a profile that does not fit; an output path that cannot be written to.
    """
    trt = _tensorrt_rtx()
    targets = check_targets(targets)
    model, engine = Path(model), Path(engine)
    if not model.is_file():
        raise InputError("the model does not exist", file=model, remedy="check the path")
    plan, layers, warnings = _compile(trt, model, profile or {}, targets)
    compiled = parse_layers(layers, _opt_batch(profile or {}))
    with atomic_path(engine) as temporary:
        temporary.write_bytes(plan)
    write_json(
        sidecar(engine),
        {
            "engine_sha256": sha256_file(engine),
            "tensorrt_rtx": trt.__version__,
            "model": model.name,
            "model_sha256": sha256_file(model),
            "targets": list(targets),
            "profile": {name: [list(shape) for shape in shapes] for name, shapes in (profile or {}).items()},
            "warnings": list(warnings),
            "compiled": compiled.to_json(),
        },
    )
    return Build(engine, targets, compiled, warnings)


def supported_targets() -> tuple[str, ...]:
    """Compute capabilities that the installed builder accepts, such as "8.6", lowest first.

    Raises:
        MissingBackendError: tensorrt_rtx is not installed.
    """
    codes = (name[2:] for name in _tensorrt_rtx().ComputeCapability.__members__ if name.startswith("SM"))
    return tuple(f"{int(code) // 10}.{int(code) % 10}" for code in sorted(codes, key=int))


def sidecar(engine: PathLike) -> Path:
    """Where the record of an engine lies: `model.plan` -> `model.plan.json`."""
    return Path(f"{Path(engine)}.json")


def describe_plan(path: PathLike) -> dict[str, Any]:
    """What a TensorRT for RTX plan file is, without deserializing it.

    NVIDIA does not document the header. It is read as found in plans of tensorrt-rtx 1.4 to 1.7,
    little-endian: magic `vtrt` at byte 0, format (2) at 8, size of the file at 16, version (major, minor,
    patch, build) at 24, bit mask of the targets at 32.

    Returns:
        `file`, `bytes`, `sha256`, `version` ("1.7.1.116"), `targets` (those known by name), and `build`: the
        sidecar's content (see `build`) with `compiled` as a `Compiled`, or None when there is no
        sidecar or it belongs to another engine.

    Raises:
        InputError: missing, not a plan of TensorRT for RTX, truncated, or the sidecar is damaged.
    """
    path = Path(path)
    digest = sha256_file(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_PLAN_HEADER.size)
    if len(header) < _PLAN_HEADER.size or not header.startswith(_PLAN_MAGIC):
        raise InputError(
            "not an engine of TensorRT for RTX",
            file=path,
            cause=f"it does not begin with {_PLAN_MAGIC.decode()}",
            remedy="give a plan file made by `trtq build`",
        )
    _, plan_format, plan_size, *version, targets = _PLAN_HEADER.unpack(header)
    if plan_format != _PLAN_FORMAT:
        raise InputError(f"a plan file of format {plan_format}, which is not known", file=path)
    if plan_size != size:
        raise InputError(
            "the plan file is truncated or damaged",
            file=path,
            cause=f"it has {size} bytes and should have {plan_size}",
            remedy="copy or build it again",
        )
    return {
        "file": str(path),
        "bytes": size,
        "sha256": digest,
        "version": ".".join(map(str, version)),
        "targets": [name for bit, name in enumerate(_PLAN_TARGETS) if targets >> bit & 1],
        "build": _read_sidecar(path, digest),
    }


def _read_sidecar(engine: Path, digest: str) -> dict[str, Any] | None:
    path = sidecar(engine)
    if not path.exists():
        return None
    record = read_json(path, "record of the engine")
    try:
        if record["engine_sha256"] != digest:
            return None
        return {**record, "compiled": Compiled.from_json(record["compiled"])}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "the record of the engine is damaged",
            file=path,
            cause=repr(error),
            remedy="delete it, or build the engine again",
        ) from error


def _tensorrt_rtx() -> Any:
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise MissingBackendError(
            "TensorRT for RTX is not installed", cause=error, remedy="pip install 'trtq[rtx]'"
        ) from error
    return tensorrt_rtx


def _logger(trt: Any) -> Any:
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


def _compile(
    trt: Any, model: Path, profile: Profile, targets: tuple[str, ...]
) -> tuple[Any, str, tuple[str, ...]]:
    """The plan (a buffer), the message that lists its layers, and the builder's warnings."""
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, log, model)
    plan = builder.build_serialized_network(network, _config(trt, builder, network, profile, targets, model))
    if plan is None:
        cause = "\n".join(log.errors) or "the builder gives no reason"
        raise InputError(
            "TensorRT for RTX cannot build an engine from the model",
            file=model,
            cause=cause,
            remedy=_remedy(cause, "see the builder's message; `trtq doctor` shows the versions in use"),
        )
    return plan, log.layers, tuple(dict.fromkeys(log.warnings))


def check_targets(targets: Sequence[str]) -> tuple[str, ...]:
    """The targets to build for: those given, each once, or this machine's; empty for the builder's own set.

    Raises:
        MissingBackendError: tensorrt_rtx is not installed.
        InputError: the builder does not know a target.
    """
    supported = supported_targets()
    if not targets:
        gpu = find_gpu()
        return (gpu.compute_capability,) if gpu and gpu.compute_capability in supported else ()
    if unknown := [target for target in targets if target not in supported]:
        raise InputError(
            f"TensorRT for RTX does not build for compute capability {', '.join(unknown)}",
            remedy=f"choose among {', '.join(supported)}",
        )
    return tuple(dict.fromkeys(targets))


def _parse(trt: Any, network: Any, log: Any, model: Path) -> None:
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse_from_file(str(model))
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if parsed and not errors and not network.num_outputs:  # what the parser makes of a file of another kind
        raise InputError("not an ONNX model", file=model, remedy="export the model again")
    if not parsed:
        cause = "\n".join(_describe(error) for error in errors) or "\n".join(log.errors)
        raise InputError(
            "TensorRT for RTX cannot parse the model",
            file=model,
            cause=cause,
            remedy=_remedy(cause, "change the node so that TensorRT's ONNX parser accepts it"),
        )


def _describe(error: Any) -> str:
    """One parser error: `node (operator): what TensorRT says`."""
    lines = (line for line in error.desc().splitlines() if _NO_DRIVER not in line)
    where = f"node '{error.node_name()}' ({error.node_operator()}): " if error.node() >= 0 else ""
    return where + " ".join(lines)


def _config(
    trt: Any, builder: Any, network: Any, profile: Profile, targets: tuple[str, ...], model: Path
) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    codes = [getattr(trt.ComputeCapability, f"SM{target.replace('.', '')}") for target in targets]
    if codes:
        config.num_compute_capabilities = len(codes)
        for index, code in enumerate(codes):
            config.set_compute_capability(code, index)
    ranges = _optimization_profile(builder, network, profile, model)
    if profile:
        config.add_optimization_profile(ranges)
    return config


def _optimization_profile(builder: Any, network: Any, profile: Profile, model: Path) -> Any:
    dims = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    result = builder.create_optimization_profile()
    for name, shapes in profile.items():
        if name not in dims:
            raise InputError(
                f"the optimization profile names '{name}', which is no input of the model",
                file=model,
                remedy=f"the inputs are {', '.join(dims)}",
            )
        for shape in shapes:
            if len(shape) != len(dims[name]) or any(
                d not in (-1, s) for d, s in zip(dims[name], shape, strict=True)
            ):
                raise InputError(
                    f"the profile's shape {'x'.join(map(str, shape))} does not fit input '{name}'",
                    file=model,
                    remedy=f"its dimensions are {list(dims[name])}, where -1 is dynamic",
                )
        result.set_shape(name, *shapes)
    if missing := [name for name, d in dims.items() if -1 in d and name not in profile]:
        raise InputError(
            f"input '{missing[0]}' has dynamic axes and the optimization profile does not name it",
            file=model,
            remedy=f"its dimensions are {list(dims[missing[0]])}; give min, opt and max",
        )
    return result


def _opt_batch(profile: Profile) -> int:
    return next((shapes.opt[0] for shapes in profile.values() if shapes.opt), 1)


def _remedy(message: str, otherwise: str) -> str:
    return next((remedy for text, remedy in _REMEDIES if text in message), otherwise)
