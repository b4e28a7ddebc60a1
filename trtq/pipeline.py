"""The paper's workflow, end to end: every command is one of these steps or all of them in a row."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

import trtq
from trtq.backends.builders import builder, chosen
from trtq.backends.interface import (
    OPT_BATCH,
    Build,
    Profile,
    check_profile,
    find_gpu,
    parse_profile,
    profiles_from,
)
from trtq.cache import Cache, Key, default_root
from trtq.calibration.collect import collect
from trtq.calibration.foreign import read_table
from trtq.calibration.methods import Method, parse_method
from trtq.calibration.statistics import Statistics
from trtq.calibration.table import Table
from trtq.choose import CANDIDATES, Choice, Measure, choose_method, scales_from
from trtq.console import SILENT, Console
from trtq.convert import load_source, quantize_with_table, require_complete
from trtq.coverage import Coverage, coverage
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.errors import ExitCode, InputError, about
from trtq.evaluation import outputs_of
from trtq.files import PathLike, sha256_file, staged_folder, write_json, write_text
from trtq.gate.execute import Outputs
from trtq.gate.metrics import Metric, load_metric
from trtq.gate.verdict import Verdict, decide, parse_fraction, parse_margin, score_reference
from trtq.graph.fold import fold
from trtq.graph.half import convert_to_half
from trtq.graph.model import FP16_SCALE_OPSET, LOWEST_OPSET, Model, load_model, save_model
from trtq.graph.place import place
from trtq.graph.plan import Plan
from trtq.graph.rewrite import rewrite
from trtq.recipe import Recipe
from trtq.refine import refine_ranges
from trtq.report.html import write_report
from trtq.report.junit import Check, junit_xml

FEWEST_TO_SPLIT = 16
"""With fewer samples `auto` measures on the rows it takes the ranges from."""


@dataclass(frozen=True)
class Deployment:
    """What `deploy` leaves behind; `exit_code` is what the command returns."""

    folder: Path
    plan: Plan
    table: Table
    build: Build
    coverage: Coverage
    verdict: Verdict
    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> ExitCode:
        """The verdict's, unless it passes and another check fails."""
        if self.verdict.exit_code is ExitCode.PASS and not all(check.ok for check in self.checks):
            return ExitCode.FAIL
        return self.verdict.exit_code


def deploy(recipe: Recipe, command: str = "", console: Console = SILENT) -> Deployment:
    """Calibrate, quantize, build and gate a model; leave everything in the recipe's output folder.

    Files: `model.int8.onnx`, `model.plan` (+ `.json`: what the engine runs), `calibration.cache` (+ `.json`:
    where the scales come from), `plan.json`, `verdict.json`, `junit.xml`, `report.html`, `recipe.toml`,
    `manifest.json`. They appear together at the end: a job that fails or is interrupted leaves none.

    Args:
        command: the command line, for the manifest.

    Raises:
        InputError: an option, the model or the data cannot be used.
        MissingBackendError: the builder is not installed.
    """
    recipe.need("model", "data", "eval", "metric", "output")
    assert recipe.data is not None
    assert recipe.eval is not None
    assert recipe.output is not None
    backend = builder(recipe.backend)
    backend.check_targets(recipe.target)
    max_drop, metric = parse_margin(recipe.max_drop), _metric(recipe)
    least = None if recipe.min_int8 is None else parse_share(recipe.min_int8)
    cache = open_cache(recipe, console)
    model = prepare(recipe)
    data = load_samples(recipe.data, model.inputs, recipe.preprocess)
    evaluation = load_samples(recipe.eval, model.inputs, recipe.preprocess)
    need_targets(metric, evaluation)
    console.say("data", f"{len(data)} rows to calibrate, {len(evaluation)} to evaluate")
    profile = profile_for(model, recipe, data)
    plan = place(
        model, include=recipe.include, exclude=recipe.exclude, input_shapes=opt_shapes(model, profile)
    )
    console.say("plan", plan_text(plan))
    reference = reference_outputs(model.path, evaluation, metric, cache, console, recipe)
    graph = convert_to_half(model.graph) if recipe.rest == "fp16" else model.graph
    with staged_folder(recipe.output) as folder:
        table = calibrate(model, graph, plan, data, recipe, cache, console)
        int8 = folder / "model.int8.onnx"
        save_model(rewrite(graph, plan, table.scales, weights=recipe.weights), int8)
        plan.save(folder / "plan.json")
        table.save(folder / "calibration.cache")
        write_text(folder / "recipe.toml", recipe.dumps())
        build = backend.build(
            int8,
            folder / "model.plan",
            profile=profile,
            targets=recipe.target,
            options=recipe.build_options(),
        )
        covered = coverage(plan, build.compiled)
        size = build.engine.stat().st_size / 1e6
        console.say("engine", f"{size:.1f} MB, {build.compiled.kernels} kernels\n{covered.text()}")
        checks = () if least is None else (share_check(covered, least),)
        candidate = build.engine if engine_runs_here(recipe, console) else int8
        verdict = gate(
            reference,
            candidate,
            evaluation,
            metric,
            cache,
            console,
            max_drop=max_drop,
            recipe=recipe,
        )
        write_json(folder / "verdict.json", verdict.to_json())
        write_text(folder / "junit.xml", junit_xml(verdict, checks))
        write_report(folder)
        write_json(folder / "manifest.json", manifest(recipe, command, model, data, evaluation, folder))
    console.say("verdict", "\n".join(line.strip() for line in verdict.text().splitlines()[1:]))
    output = Path(recipe.output)
    build = dataclasses.replace(build, engine=output / "model.plan")
    return Deployment(output, plan, table, build, covered, verdict, checks)


def prepare(recipe: Recipe) -> Model:
    """The recipe's model, loaded and folded."""
    recipe.need("model")
    assert recipe.model is not None
    model = load_model(recipe.model, opset=FP16_SCALE_OPSET if recipe.rest == "fp16" else LOWEST_OPSET)
    fold(model.graph)
    return model


@dataclass(frozen=True)
class Quantized:
    """A Q/DQ graph, where its Q/DQ stands, and the scales it has."""

    graph: gs.Graph
    plan: Plan
    table: Table


def quantize(recipe: Recipe, table: PathLike | None, console: Console) -> Quantized:
    """The recipe's model with Q/DQ: scales from a table, or calibrated on the recipe's data.

    Raises:
        InputError: neither data nor table; the model, data or table cannot be used; the table lacks a scale.
    """
    recipe.need("model")
    assert recipe.model is not None
    if table is not None:
        source = load_source(recipe.model, rest=recipe.rest)
        explicit = quantize_with_table(
            source,
            read_table(table),
            include=recipe.include,
            exclude=recipe.exclude,
            weights=recipe.weights,
            rest=recipe.rest,
        )
        require_complete(explicit.fit, table)
        return Quantized(explicit.graph, explicit.plan, explicit.table)
    if recipe.data is None:
        raise InputError("there is nothing to take the scales from", remedy="give --table or --data")
    model = prepare(recipe)
    data = load_samples(recipe.data, model.inputs, recipe.preprocess)
    plan = place(model, include=recipe.include, exclude=recipe.exclude)
    graph = convert_to_half(model.graph) if recipe.rest == "fp16" else model.graph
    made = calibrate(model, graph, plan, data, recipe, open_cache(recipe, console), console)
    return Quantized(rewrite(graph, plan, made.scales, weights=recipe.weights), plan, made)


def calibrate(
    model: Model,
    graph: gs.Graph,
    plan: Plan,
    data: Samples,
    recipe: Recipe,
    cache: Cache,
    console: Console,
) -> Table:
    """The table of the plan's tensors, by the recipe's method; from the cache where it is there.

    With `auto` every fourth sample is held back to measure on; the scales are then made from all samples,
    which costs no further pass: the statistics of both parts add up.

    Args:
        graph: `model`'s graph in the precision of the rest, for measuring the methods.
    """
    key = Key(
        "table",
        model.sha256,
        data.hash,
        {"requested": recipe.method, "tensors": plan.tensors, "weights": recipe.weights, "rest": recipe.rest},
    )
    if cache.fetch(key) is not None:
        table = Table.load(cache.path(key))
        console.say("calibration", f"{table.metadata['method']}, from the cache; nothing was run")
        return dataclasses.replace(table, metadata={n: table.metadata[n] for n in table.metadata["names"]})
    notes: dict[str, Any] = {"model": model.sha256, "data": data.hash, "rows": len(data)}
    notes |= {"trtq": trtq.__version__, "requested": recipe.method}
    if recipe.method == "auto":
        method, exceptions, statistics, measured = _search(model, graph, plan, data, recipe, cache, console)
        notes |= measured
    else:
        method, exceptions = parse_method(recipe.method), {}
        statistics = statistics_of(model, plan, data, recipe, cache, console)
    notes |= {"method": str(method)}
    scales = scales_from(statistics, method, exceptions)
    table = Table({name: scales[name] for name in plan.tensors}, metadata=notes)
    cache.store(key, table.to_bytes(), {**notes, "names": list(notes)})
    return table


def _search(
    model: Model,
    graph: gs.Graph,
    plan: Plan,
    data: Samples,
    recipe: Recipe,
    cache: Cache,
    console: Console,
) -> tuple[Method, Mapping[str, Method], Statistics, dict[str, Any]]:
    """`--method auto`: the best method, the tensors that do better with another, statistics, and notes.

    The ranges that the search changed are kept only if they do better on the rows held back, too.
    """
    enough = len(data) // data.group >= FEWEST_TO_SPLIT
    fitting, held_back = data.split() if enough else (data, data)
    statistics = statistics_of(model, plan, fitting, recipe, cache, console)
    measure = Measure(model, graph, plan, held_back, cache, console, recipe.weights, recipe.threads)
    choice = choose_method(measure, statistics)
    console.say("method", choice_text(choice))
    others = [parse_method(name) for name in CANDIDATES if name != str(choice.method)]
    refined = refine_ranges(
        graph,
        plan,
        statistics,
        choice.method,
        others,
        fitting,
        console,
        weights=recipe.weights,
        workers=recipe.threads,
    )
    before = choice.sqnr_db[str(choice.method)]
    after = measure.sqnr_db(scales_from(statistics, choice.method, refined.exceptions), "ranges")
    exceptions = refined.exceptions if after > before else {}
    console.say(
        "ranges",
        f"{len(exceptions)} of {len(plan.tensors)} tensors do better with their own: "
        f"{before:.1f} -> {max(before, after):.1f} dB on the rows held back",
    )
    if enough:
        statistics.merge(statistics_of(model, plan, held_back, recipe, cache, console))
    notes = {
        "sqnr_db": dict(choice.sqnr_db),
        "sqnr_db_with_exceptions": after,
        "held_back": len(held_back),
        "exceptions": {tensor: str(own) for tensor, own in exceptions.items()},
    }
    return choice.method, exceptions, statistics, notes


def statistics_of(
    model: Model, plan: Plan, data: Samples, recipe: Recipe, cache: Cache, console: Console
) -> Statistics:
    """Statistics of the plan's tensors over the data, from the cache where they are there."""
    key = Key("statistics", model.sha256, data.hash, {"tensors": sorted(plan.tensors)})
    if (content := cache.fetch(key)) is not None:
        console.say("statistics", f"{len(data)} rows from the cache, nothing was run")
        return Statistics.from_bytes(content)
    started = time.perf_counter()
    with console.progress("statistics", len(data)) as advance, about(data.source):
        statistics = collect(model.graph, plan.tensors, data, workers=recipe.threads, progress=advance)
    cache.store(key, statistics.to_bytes())
    seconds = time.perf_counter() - started
    console.say("statistics", f"{len(data)} rows, {len(plan.tensors)} tensors in {seconds:.1f} s")
    return statistics


def reference_outputs(
    model: Path, evaluation: Samples, metric: Metric, cache: Cache, console: Console, recipe: Recipe
) -> Outputs:
    """The fp32 model's outputs on the evaluation data, scored once: what is wrong with data, labels or
    metric is found before anything takes long.

    Raises:
        InputError: the model does not run on the data, or its outputs cannot be scored.
    """
    reference = _evaluate(model, "reference", evaluation, cache, console, recipe)
    with about(evaluation.source):
        score_reference(reference.arrays, dict(evaluation.targets), metric)
    return reference


def gate(
    reference: Outputs,
    candidate: Path,
    evaluation: Samples,
    metric: Metric,
    cache: Cache,
    console: Console,
    *,
    max_drop: float,
    recipe: Recipe,
) -> Verdict:
    """The verdict on a candidate (ONNX model or engine) by the recipe's options.

    Args:
        reference: see `reference_outputs`.
    """
    outputs = _evaluate(candidate, "candidate", evaluation, cache, console, recipe)
    with about(candidate):
        verdict = decide(
            reference.arrays,
            outputs.arrays,
            dict(evaluation.targets),
            metric,
            max_drop=max_drop,
            confidence=recipe.confidence,
            executor=outputs.executor,
        )
    return verdict.require_engine() if recipe.require_engine else verdict


def _evaluate(
    model: Path,
    label: str,
    evaluation: Samples,
    cache: Cache,
    console: Console,
    recipe: Recipe,
) -> Outputs:
    outputs, cached = outputs_of(
        model,
        evaluation,
        cache,
        console,
        label=label,
        batch_size=recipe.batch,
        threads=recipe.threads,
    )
    if cached:
        console.say("gate", f"outputs of the {label} from the cache, nothing was run")
    return outputs


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
    recipe.need("model", "output")
    assert recipe.output is not None
    if chosen(recipe.backend) != "tensorrt":
        raise InputError(
            f"{chosen(recipe.backend)} has no implicit quantization",
            remedy="use --backend tensorrt (8.6 to 10.16), or quantize explicitly: trtq quantize --table",
        )
    from trtq.backends import calibrators, tensorrt

    model = prepare(recipe)
    data = load_samples(recipe.data, model.inputs, recipe.preprocess) if recipe.data else None
    profile = profile_for(model, recipe, data)
    plan = place(
        model, include=recipe.include, exclude=recipe.exclude, input_shapes=opt_shapes(model, profile)
    )
    if table is not None and algorithm is None:
        make: Callable[[Any], Any] = partial(calibrators.table_calibrator, table=read_table(table))
    elif table is None and algorithm is not None and data is not None:
        make = partial(
            calibrators.data_calibrator,
            algorithm=algorithm,
            samples=data,
            model=model.sha256,
            batch_size=plan.batch,
            cache=Path(f"{recipe.output}.cache"),
        )
    else:
        raise InputError("give either --table, or --calibrator with --data")
    floating_point = [node.name for node in plan.nodes if not node.int8]
    with tempfile.TemporaryDirectory(prefix="trtq-") as folder:
        folded = Path(folder) / model.path.name
        save_model(model.graph, folded)
        build = tensorrt.build(
            folded,
            recipe.output,
            profile=profile,
            targets=recipe.target,
            options=recipe.build_options(),
            implicit=tensorrt.Implicit(make, floating_point),
        )
    return build, plan


@contextlib.contextmanager
def in_precision(model: Model, rest: str) -> Iterator[Path]:
    """The file of a model in fp32 as it is, or of its conversion to fp16 while the context lasts.

    Raises:
        InputError: fp16 is asked for and the model is quantized already, or cannot be converted.
    """
    if rest == "fp32":
        yield model.path
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
        save_model(convert_to_half(upgraded.graph), path)
        yield path


def need_targets(metric: Metric, samples: Samples) -> None:
    """Make sure that the samples have the targets that the metric needs.

    Raises:
        InputError: they have none.
    """
    if metric.needs_targets and not samples.targets:
        raise InputError(
            f"the metric '{metric.name}' needs targets, and the evaluation data has none",
            file=samples.source,
            remedy="add an array of labels, or use the metric 'cosine', which needs none",
        )


def open_cache(recipe: Recipe, console: Console) -> Cache:
    """The recipe's cache, or the user's."""
    return Cache(Path(recipe.cache) if recipe.cache else default_root(), console.warn)


def profile_for(model: Model, recipe: Recipe, data: Samples | None) -> Profile:
    """The recipe's optimization profile, or one from the model's dynamic axes and the data's shapes."""
    dimensions = {spec.name: spec.shape for spec in model.inputs}
    if recipe.profile:
        profile = parse_profile(recipe.profile)
        check_profile(profile, dimensions, model.path)
        return profile
    shapes = data.row_shapes() if data is not None else {}
    return profiles_from(dimensions, shapes, recipe.batch or OPT_BATCH)


def parse_share(text: str) -> float:
    """The fraction that "90%" or "0.9" means.

    Raises:
        InputError: not a number from 0 to 100 %.
    """
    share = parse_fraction(text)
    if not 0 <= share <= 1:
        raise InputError(f"{text!r} is no share", remedy="write it as 90% or 0.9")
    return share


def plan_text(plan: Plan) -> str:
    """What the plan does, in a few lines."""
    share = plan.mac_share()
    of_macs = "" if share is None else f", {share:.1%} of the multiply-accumulates"
    lines = [f"{len(plan.int8_nodes)} of {len(plan.nodes)} weighted nodes to INT8{of_macs}"]
    lines += [f"in floating point: {n.name} ({n.op}): {n.reason}" for n in plan.nodes if not n.int8]
    return "\n".join(lines)


def choice_text(choice: Choice) -> str:
    """The methods tried, best first."""
    ranked = sorted(choice.sqnr_db.items(), key=lambda item: -item[1])
    tried = ", ".join(f"{name} {value:.1f} dB" for name, value in ranked)
    return f"{choice.method}: best of {tried} on {choice.rows} rows held back"


def manifest(
    recipe: Recipe, command: str, model: Model, data: Samples, evaluation: Samples, folder: Path
) -> dict[str, Any]:
    """What went in and what came out: hashes, versions and the exact command."""
    assert recipe.metric is not None
    return {
        "command": command,
        "versions": versions(recipe),
        "inputs": {
            "model": {"file": str(model.path), "sha256": model.sha256},
            "data": {"source": data.source, "rows": len(data), "sha256": data.hash},
            "eval": {"source": evaluation.source, "rows": len(evaluation), "sha256": evaluation.hash},
            "metric": {"name": recipe.metric, "fingerprint": load_metric(recipe.metric).fingerprint},
        },
        "outputs": hashes_of(folder),
    }


def versions(recipe: Recipe) -> dict[str, str]:
    """Versions of everything that the results depend on."""
    packages = ("trtq", "numpy", "numba", "onnx", "onnx-graphsurgeon", "onnxruntime", "polygraphy", "pillow")
    backend = chosen(recipe.backend)
    return {name: version(name) for name in packages} | {backend: builder(backend).version()}


def hashes_of(folder: Path) -> dict[str, Any]:
    """File name -> SHA-256 and size of every file in a folder, for the manifest."""
    return {
        path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
    }


def _metric(recipe: Recipe) -> Metric:
    recipe.need("metric")
    assert recipe.metric is not None
    return load_metric(recipe.metric)


def opt_shapes(model: Model, profile: Profile) -> dict[str, tuple[int, ...]]:
    """Input shapes for which multiply-accumulates are counted: the profile's opt, or the static ones."""
    static = {s.name: tuple(d for d in s.shape if isinstance(d, int)) for s in model.inputs}
    return {name: profile[name].opt if name in profile else shape for name, shape in static.items()}


def share_check(covered: Coverage, least: float) -> Check:
    """Whether the engine runs at least the share `least` in INT8."""
    message = f"the engine runs {covered.share:.1%} in INT8, at least {least:.1%} were asked for"
    return Check(f"int8 share at least {least:.1%}", covered.share >= least, message)


def engine_runs_here(recipe: Recipe, console: Console) -> bool:
    """Whether the engine can be gated itself; otherwise its ONNX model is simulated, and says so."""
    gpu = find_gpu()
    if gpu is None:
        return False
    if gpu.compute_capability in builder(recipe.backend).check_targets(recipe.target):
        return True
    console.warn(f"{gpu.name} ({gpu.compute_capability}) is no target of the engine; the gate simulates it")
    return False
