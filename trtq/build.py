"""Engines of a recipe: of a Q/DQ or floating-point model, quantized by TensorRT itself, or all to compare."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trtq.backends import bench, calibrators, tensorrt
from trtq.backends.builders import builder, chosen
from trtq.backends.coverage import Coverage, coverage
from trtq.backends.interface import Build
from trtq.calibration.extents import measure_extents
from trtq.calibration.foreign import read_table
from trtq.console import Console
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.files import PathLike
from trtq.gate.verdict import Check
from trtq.graph import references
from trtq.graph.contrib import expand_contrib, holds_contrib
from trtq.graph.fold import fold
from trtq.graph.half_rules import half_by_rules
from trtq.graph.model import FP16_SCALE_OPSET, Model, load_model, save_model
from trtq.graph.place import place, placed
from trtq.graph.plan import Plan
from trtq.job import opt_shapes, prepare, profile_for
from trtq.pipeline import quantize
from trtq.recipe import Recipe
from trtq.recovery.attempt import share_check


@dataclass(frozen=True)
class Built:
    """An engine, what it runs in INT8, and whether that is the share the recipe asks for."""

    build: Build
    coverage: Coverage
    check: Check | None


def build(recipe: Recipe, table: PathLike | None = None, calibrator: str | None = None) -> Built:
    """Build the recipe's model: as it is, or quantized by TensorRT itself with a table or a calibrator.

    Args:
        table, calibrator: as for `build_implicit`.

    Raises:
        InputError: an option, the model or the data cannot be used.
        MissingBackendError: the builder is not installed.
    """
    recipe.require("model", "output")
    least = recipe.min_int8
    if table is not None or calibrator is not None:
        built, plan = build_implicit(recipe, table, calibrator)
    elif recipe.include or recipe.exclude:
        raise InputError(
            "--include and --exclude belong to implicit quantization here",
            remedy="an explicit model has its Q/DQ where 'trtq quantize --exclude' put it",
        )
    else:
        built, plan = build_explicit(recipe)
    covered = coverage(plan, built.compiled)
    return Built(built, covered, None if least is None else share_check(covered, least))


def build_explicit(recipe: Recipe) -> tuple[Build, Plan]:
    """An engine of a model with its own Q/DQ, or of one in floating point, and what is INT8 in that model.

    Raises:
        InputError, MissingBackendError: as the builder.
    """
    required = recipe.require("model", "output")
    references.use(recipe.op_reference)
    model = load_model(required.model)
    data = load_samples(recipe.data, model.inputs, recipe.preprocess) if recipe.data else None
    profile = profile_for(model, recipe, data)
    plan = placed(model, opt_shapes(model, profile))
    with in_precision(model, recipe.rest, data) as source:
        built = builder(recipe.backend).build(
            source,
            required.output,
            profile=profile,
            targets=recipe.target,
            options=recipe.build_options(),
        )
    return built, plan


def build_implicit(recipe: Recipe, table: PathLike | None, algorithm: str | None) -> tuple[Build, Plan]:
    """An engine that TensorRT 8.6 to 10.16 quantizes by itself, and the plan whose exclusions it obeys.

    Args:
        table: the scales; TensorRT measures nothing then.
        algorithm: the calibrator of TensorRT's that measures them on the recipe's data otherwise; the table
            it makes is kept beside the engine as `<engine>.cache`.

    Raises:
        InputError: another backend; both or neither of table and calibrator; or as the builder.
        MissingBackendError: TensorRT, PyCUDA or a GPU is missing.
    """
    output = recipe.require("model", "output").output
    if chosen(recipe.backend) != "tensorrt":
        raise InputError(
            f"{chosen(recipe.backend)} has no implicit quantization",
            remedy="use --backend tensorrt (8.6 to 10.16), or quantize explicitly: trtq quantize --table",
        )
    model = prepare(recipe)
    data = load_samples(recipe.data, model.inputs, recipe.preprocess) if recipe.data else None
    profile = profile_for(model, recipe, data)
    plan = place(
        model, include=recipe.include, exclude=recipe.exclude, input_shapes=opt_shapes(model, profile)
    )
    if table is not None and algorithm is None:
        given = read_table(table)
        given.check_made_for(model.sha256, model.path)
        make: Callable[[Any], Any] = partial(calibrators.table_calibrator, table=given)
    elif table is None and algorithm is not None and data is not None:
        make = partial(
            calibrators.data_calibrator,
            algorithm=algorithm,
            samples=data,
            model=model.sha256,
            batch_size=plan.batch,
            cache=Path(f"{output}.cache"),
        )
    else:
        raise InputError("give either --table, or --calibrator with --data")
    floating_point = [node.name for node in plan.nodes if not node.int8]
    with tempfile.TemporaryDirectory(prefix="trtq-") as folder:
        folded = Path(folder) / model.path.name
        save_model(model.graph, folded)
        build = tensorrt.build(
            folded,
            output,
            profile=profile,
            targets=recipe.target,
            options=recipe.build_options(),
            implicit=tensorrt.Implicit(make, floating_point),
        )
    return build, plan


@contextlib.contextmanager
def in_precision(model: Model, rest: str, samples: Samples | None = None) -> Iterator[Path]:
    """The file of a model in fp32, or of its conversion to fp16 while the context lasts.

    In fp32 the model is as it is, but for ONNX Runtime's fused operators.

    Args:
        samples: rows on which to measure what has to stay float32.

    Raises:
        InputError: fp16 is asked for and the model is quantized already, or cannot be converted.
    """
    if rest == "fp32":
        with _expanded(model) as path:
            yield path
        return
    if model.is_quantized:
        raise InputError(
            "the model is quantized already and stays in its precision",
            file=model.path,
            remedy="quantize the fp32 model with --rest fp16",
        )
    upgraded = load_model(model.path, opset=FP16_SCALE_OPSET)
    fold(upgraded.graph)
    with tempfile.TemporaryDirectory(prefix="trtq-") as folder:
        path = Path(folder) / model.path.name
        extents = measure_extents(upgraded.graph, samples) if samples else {}
        save_model(half_by_rules(upgraded.graph, extents), path)
        yield path


@contextlib.contextmanager
def _expanded(model: Model) -> Iterator[Path]:
    """The model's file, or one without ONNX Runtime's fused operators while the context lasts."""
    if not holds_contrib(model.graph):
        yield model.path
        return
    graph = model.graph.copy()
    expand_contrib(graph)
    with tempfile.TemporaryDirectory(prefix="trtq-") as folder:
        path = Path(folder) / model.path.name
        save_model(graph, path)
        yield path


def build_three(
    recipe: Recipe, int8: PathLike | None, table: PathLike | None, console: Console
) -> dict[str, Build]:
    """FP32, FP16 and INT8 engines of the recipe's model, in its output folder.

    Args:
        int8: the model with Q/DQ; without it one is made, as `quantize` does with `table`.

    Raises:
        InputError, MissingBackendError: as `quantize` and the builder.
    """
    folder = Path(recipe.require("model", "output").output)
    model = prepare(recipe)
    data = load_samples(recipe.data, model.inputs, recipe.preprocess) if recipe.data else None
    profile = profile_for(model, recipe, data)
    if int8 is None:
        int8 = folder / "model.int8.onnx"
        quantization = quantize(recipe, table, console)
        save_model(quantization.rewritten(weights=recipe.weights, rest=recipe.rest), int8)
    return bench.build_three(
        model.path,
        int8,
        folder,
        backend=recipe.backend,
        profile=profile,
        targets=recipe.target,
        options=recipe.build_options(),
        samples=data,
    )
