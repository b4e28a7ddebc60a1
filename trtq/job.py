"""A job: what a recipe names, opened: the model, the calibration data, the cache and the console."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from trtq.backends.builders import NO_ENGINE, builder, chosen
from trtq.backends.interface import (
    OPT_BATCH,
    Profile,
    Range,
    Shape,
    ValuedProfile,
    check_profile,
    find_gpu,
    profiles_from,
    value_range,
)
from trtq.budget import NO_BUDGET, Budget
from trtq.cache import Cache, Key
from trtq.console import Console
from trtq.data.feeding import InputOptions
from trtq.data.load import load_samples
from trtq.data.memory import Data, save_npz
from trtq.data.overlap import distinct_rows, shared_rows
from trtq.data.samples import Samples
from trtq.errors import InputError, about
from trtq.files import sha256_json
from trtq.graph import references
from trtq.graph.fit import check_fits, of_model
from trtq.graph.fixed import deciding_inputs, with_fixed
from trtq.graph.fold import fold
from trtq.graph.foreign import View
from trtq.graph.half import check_dtypes
from trtq.graph.inputs import InputSpec
from trtq.graph.memory import ModelInMemory
from trtq.graph.model import FP16_SCALE_OPSET, LOWEST_OPSET, Model, load_model, model_files
from trtq.graph.place import leave_out, place
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.recipe import Recipe
from trtq.simulation.rows import runs_on_several
from trtq.simulation.session import simulation_fingerprint
from trtq.simulation.states import with_states

FEWEST_TO_SPLIT = 16
"""With fewer samples, what is fitted on the data is measured on the same rows."""


@dataclass(frozen=True)
class Job:
    """One model and its calibration data.

    Attributes:
        model: folded, not quantized.
        data: the calibration rows.
        budget: the time that is left for what the job may do without.
        evaluation: rows that the engine must take as well; nothing is fitted on them.
    """

    recipe: Recipe
    model: Model
    data: Samples
    cache: Cache
    console: Console
    budget: Budget = NO_BUDGET
    evaluation: Samples | None = None

    @classmethod
    def open(cls, recipe: Recipe, console: Console) -> Job:
        """Load the recipe's model and calibration data; its budget begins to run.

        Raises:
            InputError: one is missing or cannot be used, or the data have no such labels.
        """
        given, budget = recipe.require("model", "data"), Budget.of(recipe.budget)
        recipe, model = settled(recipe, console)
        cache = open_cache(recipe, console)
        data = samples_of(recipe, given.data, model, cache, console)
        if recipe.labels is not None:
            data.class_numbers(recipe.labels)
        job = cls(recipe, model, data, cache, console, budget)
        if values := job._decided():
            return cls.open(replace(recipe, inputs={**recipe.inputs, **values}), console)
        job._warn_of_few()
        job._warn_of_walls()
        return job

    def warn_of_shared(self, evaluation: Samples) -> None:
        """Warn of calibration rows among those of the evaluation."""
        if (shared := shared_rows(self.data, evaluation)) is not None:
            theirs, mine = shared.first
            what = "rows" if shared.size == 1 else f"samples of {shared.size} rows"
            self.console.warn(
                f"{shared.found} of {shared.total} evaluation {what} are also calibration {what} (first: row"
                f" {theirs} = calibration row {mine}): what was fitted on a row looks better on it than on"
                " others; evaluate on different rows"
            )

    def warn_of_profiles(self) -> None:
        """Warn of evaluation rows that no optimization profile of the recipe takes."""
        profiles = self.recipe.profiles
        if not profiles or self.evaluation is None:
            return
        specs, shapes = self.evaluation.specs, self.evaluation.row_shapes()
        rows = [dict(zip(shapes, row, strict=True)) for row in zip(*shapes.values(), strict=True)]
        outside = [row for row in rows if not any(_takes_row(profile, specs, row) for profile in profiles)]
        if outside:
            first = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in outside[0].items())
            self.console.warn(
                f"no --profile takes {len(outside)} of {len(rows)} evaluation rows (the first: {first}): the"
                " engine cannot run them"
            )

    def _decided(self) -> dict[str, InputOptions]:
        """Inputs of a fixed shape that decide an If or sizes and are the same in all data, as options that
        make them constants; with a warning."""
        fixed = {spec.name for spec in self.model.inputs if all(isinstance(d, int) for d in spec.shape)}
        names = deciding_inputs(self.model.graph) & fixed - self.recipe.state.keys()
        found, sets = {}, [self.data]
        if names and self.recipe.eval is not None:
            sets.append(samples_of(self.recipe, self.recipe.eval, self.model, self.cache, self.console))
        for name in sorted(names):
            values = [value for samples in sets for value in samples.values_of(name, most=2)]
            if all(np.array_equal(value, values[0]) for value in values):
                found[name] = InputOptions(name, {"value": values[0].tolist()})
                self.console.warn(
                    f"input '{name}' is {values[0].tolist()} in all data and decides an If or sizes: what is"
                    f" made here is for this value alone and does not take the input ([inputs.{name}] value)"
                )
        return found

    def _warn_of_few(self) -> None:
        """Warn of calibration data that are too few to hold some back, or few because they repeat."""
        samples = len(self.data) // self.data.group
        if not self.enough:
            few = "sample is" if samples == 1 else "samples are"
            self.console.warn(
                f"{samples} calibration {few} too few to hold some back ({FEWEST_TO_SPLIT} are enough):"
                " what is fitted on the data is measured on the same data; a few hundred would be better"
            )
        distinct = distinct_rows(self.data, FEWEST_TO_SPLIT)
        if distinct < min(len(self.data), FEWEST_TO_SPLIT):
            are = "is" if distinct == 1 else "are"
            self.console.warn(
                f"only {distinct} of the {len(self.data)} calibration rows {are} distinct, the others are"
                " copies: ranges and choices rest on these alone; check how the data were made"
            )

    def _warn_of_walls(self) -> None:
        """Warn of operators that cannot be computed here."""
        if remark := View.of(self.model.graph).remark():
            self.console.warn(remark)

    @cached_property
    def profile(self) -> Profile:
        """The optimization profile of the engine: for the shapes of the calibration and evaluation data."""
        return profile_for(self.model, self.recipe, self.data, self.evaluation)

    def place(self) -> Plan:
        """The plan that the recipe names, or what the placement rules say (see `planned`)."""
        return planned(self.recipe, self.model, self.profile)

    @property
    def enough(self) -> bool:
        """Whether there are enough rows to hold some back."""
        return len(self.data) // self.data.group >= FEWEST_TO_SPLIT

    @cached_property
    def parts(self) -> tuple[Samples, Samples]:
        """Rows to fit on, and every fourth sample, held back to measure on; all for both if there are few."""
        return self.data.split() if self.enough else (self.data, self.data)

    def key(self, kind: str, start: Quantization, **entries: Any) -> Key:
        """The cache key of what is made from a quantization on this job's data.

        Args:
            entries: what else it depends on.
        """
        if self.recipe.ignore_nonfinite:  # without it, such outputs are refused
            entries["ignore_nonfinite"] = True
        return Key.of(
            kind,
            model=self.model.sha256,
            data=self.data.hash,
            start=start.sha256,
            executor=simulation_fingerprint(),
            **entries,
        )


def planned(recipe: Recipe, model: Model, profile: Profile | None = None) -> Plan:
    """The plan that the recipe names, or what the placement rules say.

    A node that was set to floating point by hand, or that the plan does not name, loses its quantizers.

    Args:
        profile: multiply-accumulates are counted for its opt shapes; None: they are not.

    Raises:
        InputError: the plan cannot be read or does not fit the model; or as `graph.place.place`.
    """
    if recipe.plan is None:
        shapes = None if profile is None else opt_shapes(model, profile)
        return place(model, include=recipe.include, exclude=recipe.exclude, input_shapes=shapes)
    if recipe.include or recipe.exclude:
        raise InputError(
            "--include and --exclude do not go with --plan", remedy="the plan says which nodes are INT8"
        )
    plan = Plan.load(recipe.plan)
    if plan.model != model.sha256:
        raise InputError(
            "the plan belongs to another model",
            file=recipe.plan,
            cause=f"it was made for {plan.model[:16]}…, {model.path.name} is {model.sha256[:16]}…",
            remedy="give the model it was made for, or leave --plan out",
        )
    plan = of_model(plan, model.graph)
    with about(recipe.plan):
        check_fits(plan, model.graph)
        if not plan.int8_nodes:
            raise InputError("the plan has no node in INT8", remedy="set 'int8' to true where it was")
    plan = _completed(plan, model, profile)
    edited = {
        node.name: "the given plan has it in floating point"
        for node in plan.nodes
        if node.rule == "weighted" and not node.int8
    }
    whole = [replace(node, int8=True) if node.name in edited else node for node in plan.nodes]
    return leave_out(model.graph, replace(plan, nodes=whole), edited, rule="edited")


def _completed(plan: Plan, model: Model, profile: Profile | None) -> Plan:
    """The given plan, with the weighted nodes that it does not list added in floating point.

    Multiply-accumulates are the model's own where there is a profile to count them for.
    """
    counted = place(model, input_shapes=None if profile is None else opt_shapes(model, profile))
    listed = {node.name for node in plan.nodes}
    reason = "the given plan does not list it"
    nodes = [
        *plan.nodes,
        *(
            replace(node, int8=False, rule="unlisted", reason=reason) if node.int8 else node
            for node in counted.nodes
            if node.name not in listed
        ),
    ]
    if profile is None:
        return replace(plan, nodes=nodes)
    macs = {node.name: node.macs for node in counted.nodes}
    return replace(plan, nodes=[replace(n, macs=macs.get(n.name)) for n in nodes], batch=counted.batch)


def settled(recipe: Recipe, console: Console) -> tuple[Recipe, Model]:
    """The recipe's model, loaded and folded; and the recipe, with the rest in fp32 where it is free to choose
    and the model cannot be converted.

    Raises:
        InputError: as `prepare`; or the model cannot be converted and fp16 is asked for.
    """
    say_without_data(recipe, console)
    try:
        model = prepare(recipe)
        if recipe.precision == "fp16":
            check_dtypes(model.graph)
        return recipe, model
    except InputError as error:
        if recipe.rest != "auto" or recipe.precision == "fp32":
            raise
        recipe = replace(recipe, rest="fp32")
        model = prepare(recipe)
        console.say("rest", f"what is not quantized stays float32: {error.problem}")
        return recipe, model


def say_without_data(recipe: Recipe, console: Console) -> None:
    """Say that the rest stays in fp32 where it is free to choose and there are no data to choose by."""
    if recipe.rest == "auto" and recipe.data is None:
        console.say("rest", "stays float32: without --data nothing tells what float16 can hold")


def prepare(recipe: Recipe) -> Model:
    """The recipe's model, loaded and folded."""
    model = unfolded(recipe)
    fold(model.graph)
    return model


def unfolded(recipe: Recipe) -> Model:
    """The recipe's model as it is, but for inputs that the recipe gives a value.

    The recipe's references of operators are in use from then on.
    """
    references.use(recipe.op_reference)
    opset = FP16_SCALE_OPSET if recipe.precision == "fp16" else LOWEST_OPSET
    model = load_model(recipe.require("model").model, opset=opset)
    return with_fixed(model, recipe.feeding.constants(model.inputs))


def for_builder(recipe: Recipe, *, implicit: bool = False) -> Recipe:
    """The recipe with half and weights said as its builder takes them.

    With strong typing the engine has the model's types. TensorRT 8.6 has none: its parser reads the scales
    of Q/DQ as float32 and is settled only on weights with Q/DQ, and half comes of a flag, as it does for
    implicit quantization; so the model, and with it the simulation, stays in float32.

    Args:
        implicit: TensorRT quantizes the model by itself.

    Raises:
        MissingBackendError: the builder is not installed.
    """
    if recipe.backend == NO_ENGINE and not implicit:
        return recipe
    typed = not implicit and builder(recipe.backend).typed_by_model()
    if typed and recipe.lower_precision is None:
        return recipe
    return replace(
        recipe,
        rest="fp32",
        lower_precision=recipe.lower_precision or ("fp16" if recipe.precision == "fp16" else None),
        weights=recipe.weights or (None if typed or implicit else "qdq"),
    )


def with_timing_cache(recipe: Recipe) -> Recipe:
    """The recipe with a timing cache of this GPU, driver and TensorRT in trtq's cache, if it names none.

    TensorRT times the same kernels in every build of a job again; TensorRT for RTX times none.

    Raises:
        MissingBackendError: the builder is not installed.
    """
    gpu = None if recipe.backend == NO_ENGINE else find_gpu()
    if recipe.timing_cache is not None or gpu is None or chosen(recipe.backend) != "tensorrt":
        return recipe
    name = sha256_json([dataclasses.astuple(gpu), builder(recipe.backend).version()])[:16]
    return replace(recipe, timing_cache=str(Cache.at(recipe.cache).timing / f"{name}.timing"))


def with_files(recipe: Recipe, inputs: Sequence[InputSpec], folder: Path) -> Recipe:
    """The recipe with files in place of the model and the data in memory, which are written into a folder:
    `given.model.onnx`, `given.data.npz` and `given.eval.npz`.

    Raises:
        InputError: they cannot be written so.
    """
    files: dict[str, Any] = {}
    if isinstance(recipe.model, ModelInMemory):
        for path in model_files(recipe.model):
            shutil.copyfile(path, folder / path.name.replace("model.onnx", "given.model.onnx"))
        files["model"] = "given.model.onnx"
    for name in ("data", "eval"):
        if isinstance(source := getattr(recipe, name), Data):
            files[name] = f"given.{name}.npz"
            save_npz(load_samples(source, inputs, recipe.preprocess, recipe.feeding), folder / files[name])
    return replace(recipe, **files)


def open_cache(recipe: Recipe, console: Console) -> Cache:
    """The recipe's cache, or the user's."""
    return Cache.at(recipe.cache, console.warn, Path(str(recipe.model or "")).name)


def samples_of(recipe: Recipe, source: str | Data, model: Model, cache: Cache, console: Console) -> Samples:
    """The samples of a source for a recipe's model, with the states that occur where it has some.

    Raises:
        InputError, MissingBackendError: as `load_samples` and `with_states`.
    """
    samples = load_samples(source, model.inputs, recipe.preprocess, recipe.feeding)
    return with_states(model.path, samples, cache, console, sha256=model.sha256, workers=recipe.threads)


def profile_for(model: Model, recipe: Recipe, *data: Samples | None) -> Profile:
    """The recipe's first optimization profile, or one from the model's dynamic axes and the data's shapes.

    Args:
        data: the engine takes the shapes of all, and is tuned for those of the first.

    Raises:
        InputError: a profile of the recipe does not fit the model, or nothing tells an axis's size.
    """
    known = [samples for samples in data if samples is not None]
    if recipe.profiles:
        dimensions = {spec.name: spec.shape for spec in model.inputs}
        for profile in recipe.profiles:
            check_profile(profile, dimensions, model.path)
        return ValuedProfile(recipe.profiles[0], _held(known))
    only_one = recipe.batch is None and not all(runs_on_several(model.graph, samples) for samples in known)
    return profile_from_samples(model.inputs, known, recipe.batch or OPT_BATCH, only_one=only_one)


def profile_from_samples(
    inputs: Sequence[InputSpec], data: Sequence[Samples], batch: int, *, only_one: bool
) -> Profile:
    """The optimization profile for the shapes of some samples, with the batch where each input has it.

    Args:
        inputs: of the model, for where there are no samples.
        data: the profile takes the shapes of all, and its optimum is the first's.
        only_one: as for `profiles_from`.
    """
    specs = {spec.name: spec for spec in inputs}
    for spec in (spec for samples in data for spec in samples.specs):
        if spec.batch_axis is None or specs[spec.name] in inputs:
            specs[spec.name] = spec
    dimensions = {name: (spec.batch_dim, *spec.row_dims) for name, spec in specs.items()}

    def row_shapes(some: Sequence[Samples]) -> dict[str, list[Shape]]:
        of = {name: cache(spec.row_shape) for name, spec in specs.items()}  # one tuple for rows of a shape
        return {
            name: [row_shape(shape) for samples in some for shape in samples.fed_shapes(name)]
            for name, row_shape in of.items()
        }

    ranges = profiles_from(
        dimensions, row_shapes(data[:1]), batch, also=row_shapes(data[1:]), only_one=only_one
    )
    shapes = {
        name: Range(*(specs[name].fed_shape(row, size) for size, *row in sizes))
        for name, sizes in ranges.items()
    }
    return ValuedProfile(shapes, _held(data))


def _held(data: Sequence[Samples]) -> Profile:
    """What inputs of a fixed shape hold that are integers along one axis at most, as sizes are.

    Args:
        data: all of it counts; what is most frequent is so in the first.
    """
    found = {}
    for spec in data[0].specs if data else ():
        sizes = [dim for dim in spec.shape if isinstance(dim, int)]
        if spec.dtype.kind != "i" or len(spec.shape) > 1 or len(sizes) < len(spec.shape):
            continue
        first, *others = ([_numbers(samples, spec, i) for i in range(len(samples))] for samples in data)
        if all(len(numbers) == math.prod(sizes) for numbers in first):
            found[spec.name] = value_range(first, chain.from_iterable(others))
    return found


def _numbers(samples: Samples, spec: InputSpec, row: int) -> tuple[int, ...]:
    """What an input is fed in a row."""
    return tuple(samples.row(row, [spec.name])[spec.name].reshape(-1).tolist())


def _takes_row(profile: Profile, specs: Sequence[InputSpec], row: Mapping[str, Shape]) -> bool:
    """Whether a row of these shapes, without the batch axis, lies inside a profile."""
    return all(
        Range(*map(spec.row_shape, profile[spec.name])).holds(row[spec.name])
        for spec in specs
        if spec.name in profile
    )


def opt_shapes(model: Model, profile: Profile) -> Mapping[str, tuple[int, ...]]:
    """Input shapes for which multiply-accumulates are counted: the profile's opt, or the static ones."""
    static = {s.name: tuple(d for d in s.shape if isinstance(d, int)) for s in model.inputs}
    return {name: profile[name].opt if name in profile else shape for name, shape in static.items()}
