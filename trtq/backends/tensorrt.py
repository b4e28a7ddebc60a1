"""Engines built with TensorRT proper, 8.5 to 10.16 and 11: on the GPU that they will run on.

- Explicit quantization (a model with Q/DQ), every version: strongly typed where the version can, so that the
  ONNX model's types are the engine's, as with TensorRT for RTX. With `BuildOptions.lower_precision` (up to
  10), and always on 8, weakly typed: TensorRT may choose FP16 or BF16 for what is not INT8.
- Implicit quantization (an fp32 model and a calibrator), up to 10.16: `Implicit`.

Plan files are code: load only plans you built or whose origin you trust. The build itself loads the engine it
has just made, to ask the engine inspector what it runs.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from trtq.backends.calibrators import Calibrator, DataCalibrator, TableCalibrator, stop_on_error
from trtq.backends.compiled import Compiled, onnx_layers, parse_inspection
from trtq.backends.dialect import Dialect, dialect_of
from trtq.backends.interface import (
    DEFAULT_OPTIONS,
    Build,
    BuildOptions,
    Gpu,
    Profile,
    Range,
    find_gpu,
    held_values,
)
from trtq.backends.network import (
    compile_plan,
    logger,
    opt_batch,
    optimization_profile,
    started,
    that_decide_shapes,
)
from trtq.backends.record import write_record
from trtq.errors import InputError, MissingBackendError
from trtq.files import PathLike, write_bytes

NAME = "tensorrt"


@dataclasses.dataclass(frozen=True)
class Implicit:
    """Implicit quantization: TensorRT quantizes an fp32 model by itself, with a calibrator's scales.

    Attributes:
        calibrator: given the tensorrt module, makes the calibrator (`trtq.backends.calibrators`), such as
            `partial(table_calibrator, table=table)`. An error that it kept is raised after the build.
        floating_point: names of ONNX nodes that must not run in INT8: those that the plan excludes.
    """

    calibrator: Callable[[Any], Calibrator]
    floating_point: Collection[str] = ()


def build(
    model: PathLike,
    engine: PathLike,
    *,
    profile: Profile | None = None,
    further: Sequence[Profile] = (),
    targets: Sequence[str] = (),
    options: BuildOptions = DEFAULT_OPTIONS,
    float32: Collection[str] = (),
    implicit: Implicit | None = None,
) -> Build:
    """Compile an ONNX model into a plan file and record beside it what it runs.

    Args:
        model: ONNX file: with Q/DQ, or without for a floating-point engine or `implicit` quantization. For
            the latter it must be the folded model as `trtq` saves it: tensor and node names are looked up.
        engine: where to write the plan; written in one move.
        profile: ranges of the dynamic inputs.
        further: more optimization profiles.
        targets: empty, or this GPU's compute capability: TensorRT builds where the engine runs.
        float32: names of ONNX nodes that stay float32 where `options` let TensorRT choose a lower precision;
            one without a layer of its own is passed over.

    Raises:
        MissingBackendError: tensorrt is not installed, or there is no GPU.
        InputError: as `trtq.backends.network.compile_plan`; implicit quantization where there is none;
            a node of `Implicit.floating_point` that is not in the network; another target than this GPU.
    """
    trt = _tensorrt()
    dialect = dialect_of(trt)
    model, engine, profile = Path(model), Path(engine), {} if profile is None else profile
    targets, profiles = check_targets(targets), (profile, *further)
    if implicit is not None and not dialect.weak_typing:
        raise InputError(
            f"{dialect.name} has no implicit quantization: calibrators were removed in TensorRT 11",
            file=model,
            remedy="make an explicit model: trtq quantize MODEL --table TABLE -o model.int8.onnx",
        )
    weakly = implicit is not None or options.lower_precision is not None or not dialect.strong_typing
    calibrator = implicit.calibrator(trt) if implicit is not None else None

    def prepare(builder: Any, network: Any, config: Any) -> None:
        if implicit is None:
            refuse_dla(trt, network, options, model)
        if weakly:
            _allow_precisions(trt, network, config, options, implicit is not None)
        if options.lower_precision is not None:
            kept = layers_of(trt, network, float32, model, all_of_them=False)
            keep_floating_point(trt, config, kept, trt.float32)
        if implicit is not None and calibrator is not None:
            _use_calibrator(trt, builder, network, config, calibrator, profile, model)
            excluded = layers_of(trt, network, set(implicit.floating_point) - set(float32), model)
            keep_floating_point(trt, config, excluded, _floating_point_type(trt, options))

    try:
        made = compile_plan(
            trt, dialect, model, profiles, options, strongly_typed=not weakly, prepare=prepare
        )
    finally:
        if calibrator is not None and calibrator.error is not None:
            raise calibrator.error
    plan = bytes(memoryview(made.plan))
    compiled = inspect_plan(trt, dialect, plan, profile, options)
    write_bytes(engine, plan)
    built = Build(engine, targets, compiled, made.warnings, made.notes)
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
        MissingBackendError: tensorrt is not installed.
    """
    return str(_tensorrt().__version__)


def typed_by_model() -> bool:
    """Whether the installed version has strong typing: from 10 on.

    Raises:
        MissingBackendError: tensorrt is not installed.
    """
    return dialect_of(_tensorrt()).strong_typing


def check_targets(targets: Sequence[str]) -> tuple[str, ...]:
    """This GPU's compute capability, which is the only one that TensorRT builds for.

    Raises:
        MissingBackendError: there is no GPU.
        InputError: another one is asked for.
    """
    gpu = _require_gpu()
    if any(target != gpu.compute_capability for target in targets):
        raise InputError(
            f"TensorRT builds for the GPU it runs on, {gpu.name} ({gpu.compute_capability}),"
            f" not for {', '.join(targets)}",
            remedy="build on that GPU, or with --backend tensorrt-rtx",
        )
    return (gpu.compute_capability,)


def keep_floating_point(trt: Any, config: Any, layers: Sequence[Any], kind: Any) -> None:
    """Constrain layers, and what they write, to the datatype `kind`."""
    for layer in layers:
        layer.precision = kind
        for index, output in enumerate(layer.get_output(i) for i in range(layer.num_outputs)):
            if not output.is_network_output:  # whose datatype is the model's
                layer.set_output_type(index, kind)
    if layers:
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)


def layers_of(
    trt: Any, network: Any, nodes: Collection[str], model: Path, *, all_of_them: bool = True
) -> list[Any]:
    """The network's layers that were made from ONNX `nodes` and compute in float32; constants left out.

    Args:
        all_of_them: every node must have such a layer.

    Raises:
        InputError: a node that has no such layer in the network.
    """
    found: set[str] = set()
    layers = []
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        metadata = getattr(layer, "metadata", "")  # not before 8.6, whose layers have their nodes' names
        names = {layer.name, *onnx_layers(metadata)} & set(nodes)
        if names and layer.type != trt.LayerType.CONSTANT and layer.get_output(0).dtype == trt.float32:
            found |= names
            layers.append(layer)
    if all_of_them and (missing := sorted(set(nodes) - found)):
        raise InputError(
            f"the network has no layer of node '{missing[0]}', which must stay in floating point",
            file=model,
            remedy="build from the model that the plan was made for, folded as `trtq` saves it",
        )
    return layers


def calibration_profile(calibrator: Calibrator, profile: Profile) -> Profile:
    """The shapes at which TensorRT calibrates: those of the calibrator's batches, whose buffers it reads.

    A calibrator that only hands over a table reads none; any shapes will do, such as the profile's optimum.
    """
    if isinstance(calibrator, DataCalibrator):
        return {name: Range(shape, shape, shape) for name, shape in calibrator.shapes.items()}
    return {name: Range(shapes.opt, shapes.opt, shapes.opt) for name, shapes in profile.items()}


def refuse_dla(trt: Any, network: Any, options: BuildOptions, model: Path) -> None:
    """Refuse explicit quantization on DLA, which runs INT8 with a calibration table only.

    Raises:
        InputError: DLA is asked for and the network has Q/DQ.
    """
    if options.dla_core is not None and _has_qdq(trt, network):
        raise InputError(
            "DLA runs no explicit quantization: the model has Q/DQ",
            file=model,
            remedy="build the fp32 model with the table that trtq calibrate or deploy wrote:"
            f" trtq build MODEL --table calibration.cache --dla-core {options.dla_core} --backend {NAME}"
            " (TensorRT up to 10.7)",
        )


def inspect_plan(
    trt: Any, dialect: Dialect, plan: bytes, profile: Profile, options: BuildOptions
) -> Compiled:
    """What a plan runs, by the engine inspector. Loads the plan: only for one just built.

    Raises:
        InputError: the engine does not load.
    """
    log = logger(trt)
    runtime = started(trt.Runtime, log)
    if options.version_compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise InputError(f"{dialect.name} does not load the engine it built", cause="\n".join(log.errors))
    inspector = engine.create_engine_inspector()
    if profile and not options.strip_weights:  # an engine without weights cannot have a context
        context = engine.create_execution_context()
        for name, shapes in profile.items():
            context.set_input_shape(name, shapes.opt)
        inspector.execution_context = context
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return parse_inspection(text, opt_batch(profile))


def _use_calibrator(
    trt: Any, builder: Any, network: Any, config: Any, calibrator: Calibrator, profile: Profile, model: Path
) -> None:
    """Set a calibrator, the shapes that it is fed at, and that the build ends where it fails.

    Raises:
        InputError: its batches are of other shapes than the network takes.
    """
    if isinstance(calibrator, TableCalibrator):
        calibrator.complete(trt, network)
    config.int8_calibrator = calibrator
    if (monitor := stop_on_error(trt, calibrator)) is not None:
        config.progress_monitor = monitor
    shapes = calibration_profile(calibrator, profile)
    held = that_decide_shapes(network, held_values(profile), model)
    fed = optimization_profile(builder, network, shapes, held, model)
    if profile:
        config.set_calibration_profile(fed)


def _has_qdq(trt: Any, network: Any) -> bool:
    layers = (network.get_layer(i) for i in range(network.num_layers))
    return any(layer.type == trt.LayerType.DEQUANTIZE for layer in layers)


def _allow_precisions(trt: Any, network: Any, config: Any, options: BuildOptions, implicit: bool) -> None:
    """Set the flags of a weakly typed build. INT8 without Q/DQ or scales is an error of TensorRT's, and so is
    a model's own float16 without FP16 (seen with 8.5.3)."""
    if implicit or _has_qdq(trt, network):
        config.set_flag(trt.BuilderFlag.INT8)
    asked = {options.lower_precision} if options.lower_precision is not None else set()
    for kind in sorted(asked | half_types(trt, network)):
        config.set_flag(getattr(trt.BuilderFlag, kind.upper()))


def half_types(trt: Any, network: Any) -> set[str]:
    """The types of 16 bits that layers of a network write: "fp16", "bf16"."""
    names = {"float16": "fp16", "bfloat16": "bf16"}
    kinds = {getattr(trt, name): short for name, short in names.items() if hasattr(trt, name)}
    layers = (network.get_layer(i) for i in range(network.num_layers))
    written = {layer.get_output(i).dtype for layer in layers for i in range(layer.num_outputs)}
    return {kinds[kind] for kind in written if kind in kinds}


def _floating_point_type(trt: Any, options: BuildOptions) -> Any:
    names = {None: "float32", "fp16": "float16", "bf16": "bfloat16"}
    return getattr(trt, names[options.lower_precision])


def _require_gpu() -> Gpu:
    gpu = find_gpu()
    if gpu is None:
        raise MissingBackendError(
            "TensorRT builds engines on a GPU only",
            cause="there is no GPU or no NVIDIA driver here",
            remedy="build on the machine with the GPU, or here with --backend tensorrt-rtx",
        )
    return gpu


def _tensorrt() -> Any:
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise MissingBackendError(
            "TensorRT is not installed",
            cause=error,
            remedy="pip install 'trtq[tensorrt]' (or 'tensorrt>=10,<11' for calibrators)",
        ) from error
