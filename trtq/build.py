"""Engines of a recipe: of a Q/DQ or floating-point model, quantized by TensorRT itself, or all to compare."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from trtq.backends import bench, calibrators, tensorrt
from trtq.backends.apart import build_apart
from trtq.backends.builders import chosen
from trtq.backends.coverage import Coverage, coverage
from trtq.backends.interface import Build
from trtq.calibration.extents import measure_extents
from trtq.calibration.foreign import read_table
from trtq.console import SILENT, Console
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.escapes import html_table
from trtq.files import PathLike
from trtq.gate.verdict import Check
from trtq.graph import references
from trtq.graph.contrib import expand_contrib, holds_contrib
from trtq.graph.fold import fold, fold_functions
from trtq.graph.functions import holds_functions
from trtq.graph.half_rules import half_by_rules, unquantized_float32
from trtq.graph.model import FP16_SCALE_OPSET, Model, load_model, save_model
from trtq.graph.place import place, placed
from trtq.graph.plan import Plan
from trtq.graph.surgery import copied
from trtq.job import for_builder, open_cache, opt_shapes, prepare, profile_for, samples_of, settled
from trtq.migration.implied import Implied, implied
from trtq.migration.source import load_source
from trtq.paths import BUILT, THREE, Output, check_recipe
from trtq.pipeline import quantize
from trtq.recipe import Recipe
from trtq.recovery.attempt import share_check
from trtq.scratch import scratch_folder


@dataclass(frozen=True)
class Built:
    """An engine, what it runs in INT8, and whether that is the share the recipe asks for.

    Attributes:
        notes: what else is to be said of it.
    """

    build: Build
    coverage: Coverage
    check: Check | None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        first = self.coverage.text().partition("\n")[0]
        return f"<Built: {self.build.engine.name}, {self.build.compiled.kernels} kernels, {first}>"

    def _repr_html_(self) -> str:
        lines = [*self.coverage.text().splitlines(), *self.notes, *self.build.warnings]
        if self.check is not None:
            lines.append(f"{self.check.outcome.value.upper()} {self.check.message}")
        rows = [(line,) for line in lines]
        return html_table(f"{self.build.engine}, {self.build.compiled.kernels} kernels", rows)


def build(
    recipe: Recipe,
    table: PathLike | None = None,
    calibrator: str | None = None,
    console: Console = SILENT,
) -> Built:
    """Build the recipe's model: as it is, or quantized by TensorRT itself with a table or a calibrator.

    Args:
        table, calibrator: as for `build_implicit`.

    Raises:
        InputError: an option, the model or the data cannot be used, or the engine would replace an input.
        MissingBackendError: the builder is not installed.
    """
    recipe.require("model", "output")
    check_recipe(recipe, Output.FILE, BUILT, table=table)
    least, notes = recipe.min_int8, tuple[str, ...]()
    if table is not None or calibrator is not None:
        built, plan, notes = build_implicit(recipe, table, calibrator)
    elif recipe.include or recipe.exclude:
        raise InputError(
            "--include and --exclude belong to implicit quantization here",
            remedy="an explicit model has its Q/DQ where 'trtq quantize --exclude' put it",
        )
    else:
        built, plan = build_explicit(recipe, console)
    covered = coverage(plan, built.compiled)
    return Built(built, covered, None if least is None else share_check(covered, least), notes)


def build_explicit(recipe: Recipe, console: Console) -> tuple[Build, Plan]:
    """An engine of a model with its own Q/DQ, or of one in floating point, and what is INT8 in that model.

    Raises:
        InputError, MissingBackendError: as the builder.
    """
    required = recipe.require("model", "output")
    references.use(recipe.op_reference)
    model = load_model(required.model)
    if not model.is_quantized:
        recipe, _ = settled(recipe, console)
    elif recipe.rest == "auto":
        recipe = replace(recipe, rest="fp32")  # it stays in its precision
    recipe = for_builder(recipe)
    data = _data(recipe, model)
    profile = profile_for(model, recipe, data)
    plan = placed(model, opt_shapes(model, profile))
    float32 = _float32(model, data) if recipe.lower_precision == "fp16" else []
    with in_precision(model, recipe.precision, data) as source:
        built = build_apart(
            recipe.backend,
            Path(source),
            Path(required.output),
            profile=profile,
            further=recipe.profiles[1:],
            targets=recipe.target,
            options=recipe.build_options(),
            float32=float32,
        )
    return built, plan


def build_implicit(
    recipe: Recipe, table: PathLike | None, algorithm: str | None
) -> tuple[Build, Plan, tuple[str, ...]]:
    """An engine that TensorRT 8.5 to 10.16 quantizes by itself, the plan whose exclusions it obeys, and what
    is to be said of a given table.

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
            remedy="use --backend tensorrt (8.5 to 10.16), or quantize explicitly: trtq quantize --table",
        )
    recipe = for_builder(recipe, implicit=True)
    source = load_source(recipe.require("model").model, feeding=recipe.feeding)
    model, notes = source.model, tuple[str, ...]()
    data = _data(recipe, model)
    profile = profile_for(model, recipe, data)
    plan = place(
        model, include=recipe.include, exclude=recipe.exclude, input_shapes=opt_shapes(model, profile)
    )
    if table is not None and algorithm is None:
        given = read_table(table)
        given.check_made_for(model.sha256, model.path)
        notes = table_notes(implied(source, given))
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
    with scratch_folder() as folder:
        folded = folder / model.path.name
        save_model(model.graph, folded)
        build = tensorrt.build(
            folded,
            output,
            profile=profile,
            further=recipe.profiles[1:],
            targets=recipe.target,
            options=recipe.build_options(),
            float32=_float32(model, data) if recipe.lower_precision == "fp16" else [],
            implicit=tensorrt.Implicit(make, floating_point),
        )
    return build, plan, notes


def table_notes(found: Implied) -> tuple[str, ...]:
    """What is to be said of a table for implicit quantization: nothing if it lacks no scale."""
    if not found.missing:
        return ()
    return (f"{found.text()}; trtq calibrate writes a scale for every tensor",)


def _float32(model: Model, samples: Samples | None) -> list[str]:
    """Nodes that float16 cannot hold, where TensorRT chooses by itself what runs in it.

    Args:
        samples: rows on which to measure ranges; without them it is what the constants say.
    """
    graph = copied(model.graph)
    fold(graph)
    return unquantized_float32(graph, measure_extents(graph, samples) if samples else {})


def _data(recipe: Recipe, model: Model) -> Samples | None:
    """The recipe's calibration data, if it names some."""
    if (source := recipe.data) is None:
        return None
    if model.is_quantized:  # what had a fixed value when it was made is no input of it
        taken = {spec.name for spec in model.inputs}
        recipe = replace(recipe, inputs={n: table for n, table in recipe.inputs.items() if n in taken})
    return samples_of(recipe, source, model, open_cache(recipe, SILENT), SILENT)


@contextlib.contextmanager
def in_precision(model: Model, rest: str, samples: Samples | None = None) -> Iterator[Path]:
    """The file of a model in fp32, or of its conversion to fp16 while the context lasts.

    In fp32 the model is as it is, but for what TensorRT only takes in another form.

    Args:
        samples: rows on which to measure what has to stay float32.

    Raises:
        InputError: fp16 is asked for and the model is quantized already, or cannot be converted.
    """
    if rest == "fp32":
        with _as_tensorrt_takes_it(model) as path:
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
    with scratch_folder() as folder:
        path = folder / model.path.name
        extents = measure_extents(upgraded.graph, samples) if samples else {}
        save_model(half_by_rules(upgraded.graph, extents), path)
        yield path


@contextlib.contextmanager
def _as_tensorrt_takes_it(model: Model) -> Iterator[Path]:
    """The model's file, or one without what TensorRT's parser refuses while the context lasts."""
    if not (model.mended or holds_functions(model.graph) or holds_contrib(model.graph)):
        yield model.path
        return
    graph = copied(model.graph)
    expand_contrib(graph)
    fold_functions(graph)
    with scratch_folder() as folder:
        path = folder / model.path.name
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
    makes = (*THREE, "model.int8.onnx") if int8 is None else THREE
    check_recipe(recipe, Output.FOLDER, makes, table=table, int8=int8)
    if len(recipe.profiles) > 1:
        raise InputError("engines are compared at one optimization profile", remedy="give one --profile each")
    recipe = for_builder(recipe)
    model = prepare(recipe)
    data = _data(recipe, model)
    profile = profile_for(model, recipe, data)
    if int8 is None:
        int8 = folder / "model.int8.onnx"
        save_model(quantize(recipe, table, console)[1], int8)
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
