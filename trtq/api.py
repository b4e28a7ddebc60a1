"""The steps of trtq for Python programs and notebooks.

`trtq.deploy` is the whole workflow; `calibrate`, `quantize`, `sensitivity`, `build`, `gate`, `study`,
`compare` and `bench` are its parts. All take the options of `trtq.Recipe` as keyword arguments, as Python has
them: paths as text or `pathlib.Path`, numbers as numbers, lists as lists; a model also as an
`onnx.ModelProto`, data also as arrays, generators, PyTorch's `DataLoader` or `Dataset`
(`trtq.Data`), a metric also as a function. Options that a step has no use for do not matter to it, so that
one dict of options may serve several steps:

    >>> import numpy as np, trtq
    >>> common = {"model": model, "data": {"x": images}, "method": "entropy"}
    >>> table = trtq.calibrate(**common)
    >>> table
    <Table: 6 tensors, method entropy>
    >>> result = trtq.deploy(**common, eval=(images, labels), metric="top1", max_drop=0.01, output=folder)
    >>> result.verdict.passed
    True

Every step returns an object that shows itself in a line, and as a table in a notebook. Progress and
warnings are printed on a terminal and in a notebook; elsewhere warnings are Python's (`trtq.TrtqWarning`).
What goes wrong is a `trtq.TrtqError`: its text names the problem, the file, the cause and a remedy.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtq.backends.interface import Build
from trtq.console import Console, in_notebook
from trtq.data.memory import Data
from trtq.errors import InputError, TrtqError, TrtqWarning, shown
from trtq.escapes import html_table
from trtq.graph.memory import ModelInMemory, model_in_memory
from trtq.options import Options
from trtq.paths import Output, check_recipe
from trtq.recipe import KINDS, Recipe, flag
from trtq.scratch import scratch_folder

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs
    from typing_extensions import Unpack

    from trtq.backends.bench import Result
    from trtq.build import Built
    from trtq.calibration.table import Table
    from trtq.gate.tensors import ThreeWay
    from trtq.gate.verdict import Verdict
    from trtq.graph.plan import Plan
    from trtq.graph.quantization import Quantization
    from trtq.options import ModelLike
    from trtq.pipeline import Deployment
    from trtq.recovery.sensitivity import Sensitivity
    from trtq.study import Study

_OWN = ("recipe", "verbose", "console")
"""Keyword arguments of every step that are no options of recipes."""

_PACKAGE = os.path.join(os.path.dirname(__file__), "")


def deploy(
    model: Recipe | ModelLike | None = None,
    /,
    *,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    save_data: bool = False,
    verbose: bool | None = None,
    console: Console | None = None,
    **options: Unpack[Options],
) -> Deployment:
    """Calibrate, quantize, build and gate a model; recover accuracy until the gate passes.

    Needs `model`, `data`, `eval`, `metric` and `output`. The folder `output` holds the results of
    `trtq deploy`; they appear together at the end.

        result = trtq.deploy(
            "model.onnx", data=train_loader, eval=test_loader, metric="top1", max_drop=0.01, output="out"
        )
        if not result.verdict.passed:
            print(result.verdict.text())

    Data, model and metric in memory are hashed by what they hold: a second run of the same job takes all
    but the engine from the cache and runs no inference. A function whose result may depend on what cannot be
    hashed is called again.

    Args:
        model: an ONNX file, an `onnx.ModelProto`, or what `torch.onnx.export` returns; or a `Recipe` with all
            options.
        recipe: options to start from, a `Recipe` or a TOML file; keyword arguments win.
        save_data: write a model and data that are in memory beside the results, as `given.model.onnx`,
            `given.data.npz` and `given.eval.npz`, so that `recipe.toml` can be run again. Without it, a
            recipe that is run again has to be given them anew.
        verbose: print steps and progress; None: on a terminal and in a notebook.
        console: what prints them, in place of `verbose`.
        options: see `trtq.Recipe`.

    Raises:
        TypeError: an unknown keyword argument.
        trtq.InputError: an option, the model, the data or the metric cannot be used.
        trtq.MissingBackendError: the builder is not installed.
    """
    with _step("deploy", model, recipe, options, verbose, console, own=("save_data",)) as step:
        from trtq import pipeline

        step.needs("model", "data", "eval", "metric", "output")
        return pipeline.deploy(step.recipe, step.command, step.console, save_data=save_data)


def calibrate(
    model: Recipe | ModelLike | None = None,
    /,
    *,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    verbose: bool | None = None,
    console: Console | None = None,
    **options: Unpack[Options],
) -> Table:
    """Measure the ranges of a model's activations and choose their scales.

    Needs `model` and `data`. The table is also written where `output` says, in TensorRT's format.

    Args:
        model, recipe, verbose, console, options: as for `deploy`.

    Raises:
        TypeError, trtq.InputError: as for `deploy`.
    """
    with _step("calibrate", model, recipe, options, verbose, console) as step:
        from trtq.calibration.calibrate import calibrate as calibrated
        from trtq.calibration.calibrate import complete_table
        from trtq.job import Job

        step.needs("model", "data")
        check_recipe(step.recipe, Output.FILE, (".json",))
        job = Job.open(step.recipe, step.console)
        table = complete_table(job, calibrated(job, job.place()))
        if step.recipe.output is not None:
            table.save(step.recipe.output)
        return table


@dataclass(frozen=True, repr=False)
class Quantized:
    """A model with Q/DQ.

    Attributes:
        quantization: what it was made of: the float graph, the plan and the scales.
        graph: of the model with Q/DQ, GraphSurgeon's.
        file: where it was written; None: nowhere.
    """

    quantization: Quantization
    graph: gs.Graph
    file: Path | None = None

    @property
    def plan(self) -> Plan:
        """Which nodes are INT8, and why the others are not."""
        return self.quantization.plan

    @property
    def table(self) -> Table:
        """The scales of the activations."""
        from trtq.calibration.table import Table

        return Table.of(self.quantization)

    @property
    def model(self) -> onnx.ModelProto:
        """The model, of less than 2 GB."""
        from trtq.graph.model import export

        return export(self.graph)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model; of 2 GB and more, its weights go to `<path>.data`."""
        from trtq.graph.model import save_model

        save_model(self.graph, path)

    def __repr__(self) -> str:
        return f"<Quantized: {_first_line(self.plan.text())}>"

    def _repr_html_(self) -> str:
        rows = [(node.name, node.op, "INT8" if node.int8 else node.reason) for node in self.plan.nodes]
        return html_table(_first_line(self.plan.text()), rows, ("node", "operator", "precision"))


def quantize(
    model: Recipe | ModelLike | None = None,
    /,
    *,
    table: Table | str | os.PathLike[str] | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    verbose: bool | None = None,
    console: Console | None = None,
    **options: Unpack[Options],
) -> Quantized:
    """Insert Q/DQ into a model: an explicit INT8 model.

    Needs `model`, and `data` or `table`. The model is also written where `output` says.

    Args:
        table: gives the scales: a `Table`, or a calibration table's file. Data then tell only what float16
            can hold.
        model, recipe, verbose, console, options: as for `deploy`.

    Raises:
        TypeError, trtq.InputError: as for `deploy`; also, the table lacks a scale.
    """
    with _step("quantize", model, recipe, options, verbose, console, own=("table",)) as step:
        from trtq import pipeline

        step.needs("model")
        scales = step.file_of(table)
        check_recipe(step.recipe, Output.FILE, (".data",), table=scales)
        quantization, graph = pipeline.quantize(step.recipe, scales, step.console)
        output = step.recipe.output
        made = Quantized(quantization, graph, None if output is None else Path(output))
        if output is not None:
            made.save(output)
        return made


def sensitivity(
    model: Recipe | ModelLike | None = None,
    /,
    *,
    all_but_one: bool = False,
    fast: bool = False,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    verbose: bool | None = None,
    console: Console | None = None,
    **options: Unpack[Options],
) -> Sensitivity:
    """Rank a model's layers by what INT8 in each of them does to its outputs.

    Needs `model` and `data`; with `eval` and `metric` the metric is measured, too. It is also written
    where `output` says, as JSON.

    Args:
        all_but_one: one layer at a time in floating point with all others in INT8, not the other way round.
        fast: rank on a few rows, at the cost of a few passes.
        model, recipe, verbose, console, options: as for `deploy`.

    Raises:
        TypeError, trtq.InputError: as for `deploy`.
    """
    with _step("sensitivity", model, recipe, options, verbose, console, own=("all_but_one", "fast")) as step:
        from trtq import pipeline

        step.needs("model", "data")
        check_recipe(step.recipe, Output.FILE, ())
        found = pipeline.sensitivity(step.recipe, step.console, all_but_one=all_but_one, fast=fast)
        if step.recipe.output is not None:
            found.save(step.recipe.output)
        return found


def build(
    model: Recipe | Quantized | ModelLike | None = None,
    /,
    *,
    table: Table | str | os.PathLike[str] | None = None,
    calibrator: str | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    verbose: bool | None = None,
    console: Console | None = None,
    **options: Unpack[Options],
) -> Built:
    """Build an engine from a model and say what it runs in INT8.

    Needs `model` and `output`, the engine's file.

    Args:
        model: as for `deploy`; also what `quantize` returned.
        table: implicit INT8 with this table (TensorRT up to 10.16).
        calibrator: implicit INT8, measured by this calibrator of TensorRT's on `data`.
        recipe, verbose, console, options: as for `deploy`.

    Raises:
        TypeError, trtq.InputError, trtq.MissingBackendError: as for `deploy`.
    """
    model = model.model if isinstance(model, Quantized) else model
    with _step("build", model, recipe, options, verbose, console, own=("table", "calibrator")) as step:
        from trtq.build import build as built

        step.needs("model", "output")
        return built(step.recipe, step.file_of(table), calibrator, step.console)


def gate(
    reference: ModelLike,
    candidate: Quantized | Built | ModelLike,
    /,
    *,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    verbose: bool | None = None,
    console: Console | None = None,
    **options: Unpack[Options],
) -> Verdict:
    """Compare a candidate's accuracy with a reference's and decide.

    Needs `eval` and `metric`.

    Args:
        reference: the fp32 model, or an engine's file.
        candidate: the quantized model, an engine's file, or what `quantize` or `build` returned.
        recipe, verbose, console, options: as for `deploy`.

    Raises:
        TypeError, trtq.InputError: as for `deploy`.
        trtq.MissingBackendError: an engine cannot run here.
    """
    with _step("gate", None, recipe, options, verbose, console) as step:
        from trtq import pipeline

        step.needs("eval", "metric")
        verdict, _ = pipeline.gate(step.recipe, step.model(reference), step.model(candidate), step.console)
        return verdict


def study(
    model: Recipe | ModelLike | None = None,
    /,
    *,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    verbose: bool | None = None,
    console: Console | None = None,
    **options: Unpack[Options],
) -> Study:
    """Measure the paper's tables for a model: calibration methods, weights, partial quantization, learning.

    Needs `model`, `data`, `eval` and `metric`. The tables are also written into the folder `output`.

    Args:
        model, recipe, verbose, console, options: as for `deploy`.

    Raises:
        TypeError, trtq.InputError: as for `deploy`.
    """
    with _step("study", model, recipe, options, verbose, console) as step:
        from trtq.study import study as studied
        from trtq.study import write_study

        step.needs("model", "data", "eval", "metric")
        check_recipe(step.recipe, Output.FOLDER, ("study.json", "study.txt", "study.svg"))
        found = studied(step.recipe, step.console)
        if step.recipe.output is not None:
            write_study(found, step.recipe.output, step.console)
        return found


def compare(
    reference: ModelLike,
    candidate: Quantized | ModelLike,
    /,
    *,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    verbose: bool | None = None,
    console: Console | None = None,
    **options: Unpack[Options],
) -> ThreeWay:
    """Compare a model with its Q/DQ model tensor by tensor: fp32, the simulation, and on a GPU the engine.

    Needs `data`, of which the first 16 samples are run. Engines show no tensors: compare their outputs with
    `gate`, and their kernels and times with `bench`.

    Args:
        reference: the fp32 model.
        candidate: the model with Q/DQ, or what `quantize` returned.
        recipe, verbose, console, options: as for `deploy`.

    Raises:
        TypeError, trtq.InputError: as for `deploy`; also, a model is an engine.
    """
    with _step("compare", None, recipe, options, verbose, console) as step:
        from trtq.data.load import load_samples
        from trtq.gate.tensors import compare_three, refuse_engines, some_rows
        from trtq.graph import references
        from trtq.graph.model import load_model

        step.needs("data")
        models = step.model(reference), step.model(candidate)
        refuse_engines(models)
        recipe = step.recipe
        references.use(recipe.op_reference)
        samples = load_samples(
            recipe.require("data").data, load_model(models[0]).inputs, recipe.preprocess, recipe.feeding
        )
        return compare_three(
            *models,
            some_rows(samples),
            backend=recipe.backend,
            threads=recipe.threads,
            plugins=recipe.plugin_lib,
        )


@dataclass(frozen=True, repr=False)
class Bench:
    """Engines side by side."""

    results: Sequence[Result]

    def text(self) -> str:
        """A few lines for each engine, and how it was measured."""
        from trtq.backends.bench import text_of

        return text_of(self.results)

    def __repr__(self) -> str:
        timed = sum(result.timing is not None for result in self.results)
        return f"<Bench: {len(self.results)} engines, {timed} of them timed>"

    def _repr_html_(self) -> str:
        head = ("engine", "precision", "kernels", "MB moved", "kernels in INT8", "p50 ms")
        rows = []
        for result in self.results:
            static, timing = result.static, result.timing
            known = (
                ("", "", "", "")
                if static is None
                else (
                    static.precision,
                    static.kernels,
                    f"{static.bytes_moved / 1e6:.2f}",
                    f"{static.int8} of {static.compute}",
                )
            )
            rows.append((result.engine, *known, "" if timing is None else f"{timing.p50_ms:.3f}"))
        return html_table(repr(self)[1:-1], rows, head)


def bench(*engines: Built | str | os.PathLike[str], plugins: Sequence[str | os.PathLike[str]] = ()) -> Bench:
    """Time engines on the GPU; without one, compare what was compiled.

    A plan file is code and runs here: give only engines that you built or whose origin you trust.

    Args:
        engines: files, or what `build` returned.
        plugins: libraries of TensorRT plugins.

    Raises:
        trtq.InputError: not an engine, or one of which nothing is known.
        trtq.MissingBackendError: the runtime is not installed.
    """
    with _step("bench", None, None, {}, False, None) as step:
        from trtq.backends.bench import benchmark
        from trtq.backends.interface import find_gpu

        paths = [step.model(engine) for engine in engines]
        on_gpu = find_gpu() is not None
        return Bench(benchmark(paths, on_gpu=on_gpu, plugins=[os.fspath(plugin) for plugin in plugins]))


# --- what the steps share -----------------------------------------------------------------------------


class Quiet(Console):
    """Prints nothing; warnings are Python's."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            warnings.warn(text, TrtqWarning, stacklevel=_frames_inside())
        super().warn(text)


def _frames_inside() -> int:
    """How many frames up the program that called trtq is, seen from the caller of this."""
    frame, count = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, count = frame.f_back, count + 1
    return count


@contextlib.contextmanager
def _step(
    name: str,
    model: Any,
    recipe: Recipe | str | os.PathLike[str] | None,
    options: Any,
    verbose: bool | None,
    console: Console | None,
    own: Sequence[str] = (),
) -> Iterator[_Step]:
    """What a call of a step was given; every problem inside that the user can act on is a TrtqError that
    speaks Python.

    Args:
        own: the step's own keyword arguments.
    """
    if console is None:
        seen = sys.stderr is not None and (sys.stderr.isatty() or in_notebook())
        console = Console() if (seen if verbose is None else verbose) else Quiet()
    with contextlib.ExitStack() as scratch:
        step = _Step(name, console, scratch)
        try:
            step.open(model, recipe, dict(options), own)
            yield step
        except TrtqError as error:
            error.retell(step.in_python)
            raise
        except OSError as error:
            cause = error.strerror or error
            raise InputError("cannot read or write", file=error.filename, cause=cause) from error


class _Step:
    """One call: its recipe, its console, and the files of what it was given in memory."""

    def __init__(self, name: str, console: Console, scratch: contextlib.ExitStack) -> None:
        self.name, self.console, self._scratch = name, console, scratch
        self.recipe = Recipe()
        self._held: list[ModelInMemory] = []
        self._renamed: dict[str, str] = {}

    def open(
        self,
        model: Any,
        recipe: Recipe | str | os.PathLike[str] | None,
        options: dict[str, Any],
        own: Sequence[str],
    ) -> None:
        """Make the recipe of what the call was given.

        Raises:
            TypeError: an unknown keyword argument, or two models or recipes.
            InputError: an option's value, or the recipe's file.
        """
        _check_names(self.name, options, own)
        if isinstance(model, Recipe):
            if recipe is not None:
                raise TypeError(f"{self.name}() got two recipes")
            model, recipe = None, model
        if model is not None:
            if options.get("model") is not None:
                raise TypeError(f"{self.name}() got two models")
            options["model"] = model
        if recipe is not None and not isinstance(recipe, Recipe | str | os.PathLike):
            raise InputError(f"recipe is {shown(recipe)}", remedy="give a trtq.Recipe, or a recipe's file")
        if recipe is None or not isinstance(recipe, Recipe):
            recipe = Recipe() if recipe is None else Recipe.load(recipe)
        self.recipe = recipe.changed(options)
        if isinstance(self.recipe.model, ModelInMemory):
            self._hold(self.recipe.model)
        for data in (self.recipe.data, self.recipe.eval):
            if isinstance(data, Data):
                data.console = self.console

    @property
    def command(self) -> str:
        """What the manifest has as the command."""
        return f"trtq.{self.name}(...) in Python"

    def needs(self, *names: str) -> None:
        """Refuse a call that lacks options.

        Raises:
            InputError: the message names all of them.
        """
        missing = [name for name in names if getattr(self.recipe, name) is None]
        if missing:
            raise InputError(
                f"{self.name}() lacks {', '.join(missing)}",
                remedy=f"give {'it' if len(missing) == 1 else 'them'} as keyword arguments, or in a recipe",
            )

    def model(self, given: Any) -> Path:
        """The file of a model or an engine."""
        if given is None:
            raise InputError(f"{self.name}() lacks a model", remedy="give the reference and the candidate")
        if isinstance(getattr(given, "build", None), Build):
            return given.build.engine
        if isinstance(given, Quantized):
            path = self._folder() / "quantized.onnx"
            given.save(path)
            self._renamed[str(path)] = repr(given)
            return path
        held = model_in_memory(given)
        if held is None and not isinstance(given, str | os.PathLike):
            raise InputError(
                f"{self.name}() got a {type(given).__name__} for a model",
                remedy="give a file, an onnx.ModelProto, or what quantize() or build() returned",
            )
        return Path(given) if held is None else self._hold(held)

    def file_of(self, table: Any) -> str | None:
        """The file of a table."""
        if table is None or isinstance(table, str | os.PathLike):
            return None if table is None else os.fspath(table)
        path = self._folder() / "table.cache"
        table.save(path)
        self._renamed[str(path)] = repr(table)
        return str(path)

    def in_python(self, text: str) -> str:
        """A message with keyword arguments for the command line's options, and with the names of what is in
        memory for its files."""
        for file, name in self._renamed.items():
            text = text.replace(file, name)
        return _FLAG.sub(lambda match: _FLAGS.get(match[0], match[0]), text)

    def _folder(self) -> Path:
        return self._scratch.enter_context(scratch_folder())

    def _hold(self, model: ModelInMemory) -> Path:
        """The copy of a model in memory, which stays as long as the step; messages do not name it."""
        self._held.append(model)
        self._renamed[str(model.file)] = str(model)
        return model.file


def _check_names(step: str, options: Iterable[str], own: Sequence[str]) -> None:
    known = [*KINDS, *_OWN, *own]
    for name in options:
        if name not in KINDS:
            close = difflib.get_close_matches(name, known, 1)
            remedy = f"did you mean '{close[0]}'?" if close else f"it takes {', '.join(sorted(known))}"
            raise TypeError(f"{step}() got an unexpected keyword argument '{name}': {remedy}")


_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_FLAGS = {flag(name): f"{name}=" for name in KINDS}


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


__all__ = [
    *("Bench", "Data", "Quantized", "bench", "build", "calibrate", "compare", "deploy"),
    *("gate", "quantize", "sensitivity", "study"),
]
