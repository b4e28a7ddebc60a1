"""From TensorRT 10 with a calibration table to an explicit model and engine, checked against both."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from trtq.backends.builders import builder
from trtq.backends.coverage import Coverage, coverage
from trtq.backends.interface import Build, Profile
from trtq.cache import Cache
from trtq.calibration.foreign import read_table
from trtq.calibration.table import Table
from trtq.console import SILENT, Console
from trtq.data.samples import Samples
from trtq.errors import ExitCode, InputError
from trtq.files import PathLike, sha256_file, staged_folder, write_json
from trtq.gate.evaluation import Evaluation, outputs_of, warn_of_walls
from trtq.gate.verdict import Check, Outcome, Verdict, overall
from trtq.graph import references
from trtq.graph.model import save_model
from trtq.graph.quantization import Quantization
from trtq.job import for_builder, open_cache, opt_shapes, profile_for, samples_of
from trtq.migration.fit import Fit
from trtq.migration.implied import implied, implied_model
from trtq.migration.source import Source, load_source
from trtq.migration.to_qdq import converted
from trtq.paths import MIGRATED, Output, check_recipe
from trtq.recipe import Recipe
from trtq.recovery.attempt import build_in, engine_runs_here, share_check, write
from trtq.report.html import write_report
from trtq.report.junit import Said, model_name, write_verdict
from trtq.report.manifest import hashes_of, versions
from trtq.scratch import scratch_folder
from trtq.simulation.finite import first_not_finite
from trtq.simulation.outputs import Outputs
from trtq.simulation.similarity import Similarity, compare


@dataclass(frozen=True)
class Migration:
    """What `migrate` leaves behind; `exit_code` is what the command returns.

    Attributes:
        quantization: the plan and the scales of the Q/DQ model.
        fit: how the table fits the model.
        checks: what else is required; with a verdict, they are its checks, too.
        agreement: "migrated to fp32", "migrated to table" and "table to fp32" -> output -> similarity; the
            pairs that were measured.
        verdict: the gate against fp32, with all checks; None without evaluation data.
        against_table: the gate against what the table implies; None, too, where that scores nothing.
    """

    folder: Path
    quantization: Quantization
    fit: Fit
    build: Build
    coverage: Coverage
    checks: tuple[Check, ...] = ()
    agreement: Mapping[str, Mapping[str, Similarity]] = field(default_factory=dict)
    verdict: Verdict | None = None
    against_table: Verdict | None = None

    @property
    def exit_code(self) -> ExitCode:
        """The outcome's."""
        return self.outcome.exit_code

    @property
    def outcome(self) -> Outcome:
        """The verdict's, or without one that of the checks."""
        if self.verdict is not None:
            return self.verdict.outcome
        return overall(check.outcome for check in self.checks)

    def headline(self) -> str:
        """The outcome in one line; without a verdict nothing passes, whatever the checks say."""
        if self.verdict is not None:
            return self.verdict.headline()
        found = [check.message for check in self.checks if check.outcome is self.outcome]
        label = "NOT GATED" if self.outcome is Outcome.PASS else self.outcome.value.upper()
        return "  ".join([label, "; ".join([*found, "give --eval and --metric for a verdict"])])

    def text(self) -> str:
        """What came of it, for a person."""
        lines = [f"engine: {self.coverage.text()}"]
        for pair, outputs in self.agreement.items():
            lines += [
                f"{pair}: {name} {s.sqnr_db:.1f} dB, cosine {s.cosine:.6f}"
                + (f"; {s.not_compared} rows differ in shape and are left out" if s.not_compared else "")
                for name, s in outputs.items()
            ]
        for reference, verdict in (("the table", self.against_table), ("fp32", self.verdict)):
            lines += [f"against {reference}: {verdict.text()}"] if verdict is not None else []
        if self.verdict is None:
            lines.append("not gated: give --eval and --metric for a verdict")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """How the table fits and what was measured, as JSON values; `verdict.json` has the main verdict."""
        return {
            "fit": self.fit.to_json(),
            "int8_share": self.coverage.share,
            "agreement": {
                pair: {name: asdict(similarity) for name, similarity in outputs.items()}
                for pair, outputs in self.agreement.items()
            },
            "against_table": self.against_table and self.against_table.to_json(),
        }


def migrate(
    recipe: Recipe,
    table: PathLike,
    *,
    encoding: str = "scale",
    strict: bool = False,
    command: str = "",
    console: Console = SILENT,
) -> Migration:
    """Turn an fp32 model and its calibration table into an explicit model and an engine, and gate them.

    The recipe's output folder gets `model.int8.onnx`, `model.plan` (+ `.json`), `calibration.cache` (the
    scales that are used, + `.json`), `plan.json`, `migration.json` (how the table fits, hashes, agreement),
    and where there are `eval` and `metric` also `verdict.json`, `junit.xml` and `report.html`. They appear
    together at the end.

    Args:
        recipe: needs `model` and `output`; `data` or `eval` show whether the rows are scales, and how far the
            migrated model is from fp32 and from what the table implies.
        table: of TensorRT, ONNX Runtime or ModelOpt.
        encoding: what its rows hold (`trtq.calibration.table.ENCODINGS`).
        strict: an incomplete or doubtful table is an error.
        command: the command line, for `migration.json`.

    Raises:
        InputError: an option, the model, the table or the data cannot be used, or the results would replace
            an input.
        MissingBackendError: the builder is not installed.
    """
    check_recipe(recipe, Output.FOLDER, MIGRATED, table=table)
    with Said.in_folder(recipe.output, recipe.model).by_this_job():
        return _migrated(recipe, table, encoding, strict=strict, command=command, console=console)


def _migrated(
    recipe: Recipe, table: PathLike, encoding: str, *, strict: bool, command: str, console: Console
) -> Migration:
    began = time.perf_counter()
    output = recipe.require("model", "output").output
    if (recipe.eval is None) != (recipe.metric is None):
        raise InputError("a gate needs both --eval and --metric", remedy="give both, or none")
    console = console.fresh()
    builder(recipe.backend).check_targets(recipe.target)
    if recipe.rest == "auto":
        recipe = replace(recipe, rest="fp32")
    recipe = for_builder(recipe)
    given = _Given.open(recipe, table, encoding, console)
    quantization, fit = converted(
        given.source,
        given.table,
        recipe,
        given.samples,
        console,
        input_shapes=opt_shapes(given.source.model, given.profile),
        strict=table if strict else None,
    )
    console.say("plan", quantization.plan.text())
    may_run = implied(given.source, given.table)
    if may_run.int8:
        console.say("table", may_run.text())
    else:
        console.warn(may_run.text())
    with staged_folder(output, MIGRATED) as folder:
        migration = _built(given, quantization, fit, folder)
        here = engine_runs_here(folder / "model.plan", recipe.plugin_lib, console)
        migration = _compared(given, migration, folder / ("model.plan" if here else "model.int8.onnx"))
        if migration.verdict is not None:
            seconds = time.perf_counter() - began
            write_verdict(folder, migration.verdict, model_name(recipe.model), seconds)
            write_report(folder)
        record = {
            "command": command,
            "versions": versions(recipe),
            "inputs": given.to_json(),
            "implied": may_run.to_json(),
            **migration.to_json(),
            "outputs": hashes_of(folder),
        }
        write_json(folder / "migration.json", record)
    return migration


@dataclass(frozen=True)
class _Given:
    """What is migrated, and what it is compared on.

    Attributes:
        file: the table's.
    """

    recipe: Recipe
    file: PathLike
    source: Source
    table: Table
    data: Samples | None
    evaluation: Evaluation | None
    cache: Cache
    console: Console

    @classmethod
    def open(cls, recipe: Recipe, file: PathLike, encoding: str, console: Console) -> _Given:
        """Read the model, the table and the data, and score the reference where there is a metric."""
        references.use(recipe.op_reference)
        source = load_source(recipe.require("model").model, rest=recipe.precision, feeding=recipe.feeding)
        table = read_table(file, encoding)
        model = source.model
        if "caution" in table.metadata:
            console.warn(table.metadata["caution"])
        cache, data, evaluation = open_cache(recipe, console), None, None
        if recipe.data is not None:
            data = samples_of(recipe, recipe.data, model, cache, console)
        if recipe.eval is not None:
            evaluation = Evaluation.open(recipe, model.path, model.inputs, cache, console)
            warn_of_walls(model.path, console)
        return cls(recipe, file, source, table, data, evaluation, cache, console)

    @property
    def samples(self) -> Samples | None:
        """The rows to compare outputs on: the evaluation's, or else the calibration's."""
        return self.evaluation.samples if self.evaluation is not None else self.data

    @cached_property
    def profile(self) -> Profile:
        """The optimization profile of the engine."""
        evaluated = None if self.evaluation is None else self.evaluation.samples
        return profile_for(self.source.model, self.recipe, self.data or self.samples, evaluated)

    def to_json(self) -> dict[str, Any]:
        """Files and hashes of all of it, as JSON values."""
        model = self.source.model
        inputs: dict[str, Any] = {
            "model": {"file": str(model.path), "sha256": model.sha256},
            "table": {
                "file": str(self.file),
                "sha256": sha256_file(self.file),
                "header": self.table.header,
            },
        }
        evaluated = self.evaluation.samples if self.evaluation is not None else None
        for name, used in (("data", self.data), ("eval", evaluated)):
            if used is not None:
                inputs[name] = {"source": used.source, "rows": len(used), "sha256": used.hash}
        return inputs


def _built(given: _Given, quantization: Quantization, fit: Fit, folder: Path) -> Migration:
    """Write the model, its plan and table into a folder, and build the engine there."""
    recipe = given.recipe
    output = Path(recipe.require("output").output)
    table = replace(Table.of(quantization), version=given.table.version, algorithm=given.table.algorithm)
    write(quantization, table, recipe, folder)
    build = build_in(folder, recipe, given.profile, quantization.plan)
    covered = coverage(quantization.plan, build.compiled)
    least = recipe.min_int8
    return Migration(
        folder=output,
        quantization=quantization,
        fit=fit,
        build=replace(build, engine=output / "model.plan"),
        coverage=covered,
        checks=() if least is None else (share_check(covered, least),),
    )


def _compared(given: _Given, migration: Migration, candidate: Path) -> Migration:
    """The migration with how far its model is from fp32 and from the table, where there are data to tell."""
    if given.samples is None:
        return migration
    outputs = _outputs_of_all(given, candidate, given.samples)
    migration = replace(migration, agreement=_agreement(outputs))
    if (evaluation := given.evaluation) is None:
        return migration
    verdict = evaluation.published(evaluation.verdict(candidate))
    try:
        against_table = evaluation.published(evaluation.verdict(candidate, against=outputs["table"]))
    except InputError as error:  # it scores nothing, or is not finite
        given.console.warn(f"no gate against what the table implies: {error.problem}")
        against_table = None
    checks = migration.checks
    if against_table is not None:
        message = f"against the table: {against_table.gate_line()}"
        checks = (*checks, Check("against the table", against_table.outcome, message))
    return replace(
        migration, checks=checks, verdict=verdict.with_checks(*checks), against_table=against_table
    )


def _agreement(outputs: Mapping[str, Outputs]) -> dict[str, dict[str, Similarity]]:
    """How alike the outputs are, pair by pair; without those that are not finite."""
    finite = {name: o.arrays for name, o in outputs.items() if first_not_finite(o.arrays) is None}
    pairs = (("migrated", "fp32"), ("migrated", "table"), ("table", "fp32"))
    return {
        f"{name} to {reference}": compare(finite[reference], finite[name])
        for name, reference in pairs
        if name in finite and reference in finite
    }


def _outputs_of_all(given: _Given, candidate: Path, samples: Samples) -> dict[str, Outputs]:
    """Outputs of the fp32 model, of what the table implies (simulated), and of the migrated model."""
    recipe, model = given.recipe, given.source.model

    def run(model: Path, label: str, sha256: str | None = None) -> Outputs:
        return outputs_of(model, samples, recipe, given.cache, given.console, label=label, sha256=sha256)[0]

    with scratch_folder() as scratch:
        implied = scratch / "implied.onnx"
        save_model(implied_model(given.source, given.table), implied)
        return {
            "fp32": run(model.path, "fp32", model.sha256),
            "table": run(implied, "table"),
            "migrated": run(candidate, "migrated"),
        }
