"""Engines built with TensorRT for RTX: ahead of time, on any machine, with or without a GPU.

Plan files are code: a plan holds GPU (and may hold host) machine code that runs when it is
deserialized. Deserialize only plans you built or whose origin you trust; nothing in this module
deserializes one.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from trtq.backends.compiled import parse_layers
from trtq.backends.dialect import RTX
from trtq.backends.interface import DEFAULT_OPTIONS, Build, BuildOptions, Profile, find_gpu
from trtq.backends.network import compile_plan, opt_batch
from trtq.backends.record import read_record, write_record
from trtq.errors import InputError, MissingBackendError
from trtq.files import PathLike, atomic_path, first_bytes, sha256_file

NAME = "tensorrt-rtx"

CURRENT = "current"
"""The target that stands for the GPU in this machine, even one that the builder has no name for."""

_PLAN_HEADER = struct.Struct("<4s4xQQ4B4xL28x")  # what is read of the first 64 bytes; see describe_plan
_PLAN_MAGIC = b"vtrt"
_PLAN_FORMAT = 2
_FIRST_MAJOR_OF_TENSORRT = 8
_PLAN_TARGETS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # bit 0, 1, ... of the header's targets


def build(
    model: PathLike,
    engine: PathLike,
    *,
    profile: Profile | None = None,
    further: Sequence[Profile] = (),
    targets: Sequence[str] = (),
    options: BuildOptions = DEFAULT_OPTIONS,
    float32: Collection[str] = (),
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
        further: more optimization profiles.
        targets: compute capabilities such as "8.6". Default: that of the GPU in this machine if
            TensorRT for RTX supports it, else the builder's own set (Ampere and newer).
        options: workspace, refit and stripped weights; the last two need a GPU to build.
        float32: of no effect; the model says so itself.

    Raises:
        MissingBackendError: tensorrt_rtx is not installed, or an option or a target needs a GPU.
        InputError: an unknown target; an option that RTX does not have; a file that is not ONNX; a model
            that TensorRT cannot parse or build; a profile that does not fit; an output path that cannot
            be written to.
    """
    trt = _tensorrt_rtx()
    targets, profile = check_targets(targets), {} if profile is None else profile
    model, engine = Path(model), Path(engine)
    if (options.refit or options.strip_weights) and find_gpu() is None:
        raise MissingBackendError(
            "TensorRT for RTX builds refittable engines on a GPU only",
            file=model,
            cause="there is no GPU or no NVIDIA driver here",
            remedy="build without refit and stripped weights, or on a machine with a GPU",
        )

    if CURRENT in targets:
        _check_current(model)

    def choose_targets(builder: Any, network: Any, config: Any) -> None:
        codes = [getattr(trt.ComputeCapability, _code(target)) for target in targets]
        if codes:
            config.num_compute_capabilities = len(codes)
        for index, code in enumerate(codes):
            config.set_compute_capability(code, index)

    profiles = (profile, *further)
    made = compile_plan(trt, RTX, model, profiles, options, strongly_typed=True, prepare=choose_targets)
    with atomic_path(engine) as temporary:
        temporary.write_bytes(made.plan)
    built = Build(engine, targets, parse_layers(made.layers, opt_batch(profile)), made.warnings, made.notes)
    write_record(
        built,
        builder=NAME,
        version=trt.__version__,
        model=model,
        profiles=profiles,
        held=made.held,
        options=options,
    )
    return built


def version() -> str:
    """The installed version.

    Raises:
        MissingBackendError: tensorrt_rtx is not installed.
    """
    return str(_tensorrt_rtx().__version__)


def typed_by_model() -> bool:
    """Yes: strong typing is all there is."""
    return True


def runs_on(capability: str) -> bool:
    """Whether engines run on GPUs of a compute capability such as "8.6".

    Those are the builder's targets and all after the last of them: "Supported compute capabilities: 8.0 8.6
    8.9 12.0 12.1 >12.0", says 1.7.1 on an H200, which it refuses. The builder itself refuses no GPU that is
    `CURRENT`: it makes an engine that loads nowhere.

    Raises:
        MissingBackendError: tensorrt_rtx is not installed.
    """
    targets = supported_targets()
    return capability in targets or _number(capability) > max(map(_number, targets))


def supported_targets() -> tuple[str, ...]:
    """Compute capabilities that the installed builder accepts, such as "8.6", lowest first.

    Raises:
        MissingBackendError: tensorrt_rtx is not installed.
    """
    codes = (name[2:] for name in _tensorrt_rtx().ComputeCapability.__members__ if name.startswith("SM"))
    return tuple(f"{int(code) // 10}.{int(code) % 10}" for code in sorted(codes, key=int))


def is_plan(content: bytes) -> bool:
    """Whether the first bytes of a file (64 will do) are those of a plan of TensorRT for RTX.

    RTX's versions are 1.x. A plan of TensorRT that also began with `vtrt` would name version 8 or above.
    """
    if len(content) < _PLAN_HEADER.size or not content.startswith(_PLAN_MAGIC):
        return False
    major = _PLAN_HEADER.unpack_from(content)[3]
    return major < _FIRST_MAJOR_OF_TENSORRT


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
    header = first_bytes(path, _PLAN_HEADER.size)
    if not is_plan(header):
        raise InputError(
            "not an engine of TensorRT for RTX",
            file=path,
            cause=f"it does not begin with {_PLAN_MAGIC.decode()} and a version 1",
            remedy="give a plan file made by `trtq build`",
        )
    _, plan_format, plan_size, *version, targets = _PLAN_HEADER.unpack(header)
    if plan_format != _PLAN_FORMAT:
        raise InputError(f"a plan file of format {plan_format}, which is not known", file=path)
    if plan_size != (size := path.stat().st_size):
        raise InputError(
            "the plan file is truncated or damaged",
            file=path,
            cause=f"it has {size} bytes and should have {plan_size}",
            remedy="copy or build it again",
        )
    return {
        "file": str(path),
        "bytes": size,
        "sha256": sha256_file(path),
        "version": ".".join(map(str, version)),
        "targets": [name for bit, name in enumerate(_PLAN_TARGETS) if targets >> bit & 1],
        "build": read_record(path),
    }


def _tensorrt_rtx() -> Any:
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise MissingBackendError(
            "TensorRT for RTX is not installed", cause=error, remedy="pip install 'trtq[rtx]'"
        ) from error
    return tensorrt_rtx


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
    if unknown := [target for target in targets if target not in (*supported, CURRENT)]:
        raise InputError(
            f"TensorRT for RTX does not build for compute capability {', '.join(unknown)}",
            remedy=f"choose among {', '.join(supported)} (or {CURRENT}: whatever the GPU here is); TensorRT"
            " builds for other GPUs, each on a machine that has it: --backend tensorrt",
        )
    return tuple(dict.fromkeys(targets))


def _check_current(model: Path) -> None:
    """Raises MissingBackendError where there is no GPU here, or none that engines run on."""
    gpu = find_gpu()
    if gpu is not None and runs_on(gpu.compute_capability):
        return
    cause = "there is no GPU or no NVIDIA driver here"
    if gpu is not None:
        cause = f"TensorRT for RTX does not run on {gpu.name}, compute capability {gpu.compute_capability}"
    raise MissingBackendError(
        f"the target '{CURRENT}' is the GPU in this machine",
        file=model,
        cause=cause,
        remedy="name a compute capability, such as --target 8.6, or build on the machine with the GPU",
    )


def _number(capability: str) -> tuple[int, ...]:
    """A compute capability in the order of GPUs: "12.0" -> (12, 0)."""
    return tuple(map(int, capability.split(".")))


def _code(target: str) -> str:
    """A target as a member of `ComputeCapability`: "8.6" -> "SM86"."""
    return "CURRENT" if target == CURRENT else f"SM{target.replace('.', '')}"
