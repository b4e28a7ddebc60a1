"""From TensorRT 10 with a calibration table to an explicit model and engine, checked against both.

Implicit quantization says nothing of where it quantizes: TensorRT up to 10 "uses INT8 opportunistically", and
a layer may run in INT8 if it "has assigned quantization scales on its data inputs and outputs" (Developer
Guide, "Explicit vs. implicit quantization"). What a table *implies* is here the model in which every layer
that may run in INT8 does so:

- layers are those after TensorRT's fusions: batch normalization folded, pointwise operators (an activation,
  a residual addition) behind the convolution or matrix product that alone feeds them; tensors inside such a
  layer are not quantized;
- a layer may run in INT8 if its first operator is one of `INT8_OPS` and the table has a scale for each of its
  floating-point inputs and for its output;
- the inputs of those layers are quantized with the table's scales, and the weights of Conv, Gemm and MatMul
  per output channel.

That is an upper bound: for speed TensorRT may leave any of these layers in floating point.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from trtq import pipeline
from trtq.backends.builders import builder
from trtq.backends.coverage import Coverage, coverage
from trtq.backends.interface import Build
from trtq.cache import Cache
from trtq.calibration.extents import measure_extents
from trtq.calibration.foreign import read_table
from trtq.calibration.table import Table
from trtq.console import SILENT, Console
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.errors import ExitCode, InputError
from trtq.files import PathLike, sha256_file, staged_folder, write_json
from trtq.gate.evaluation import Evaluation, outputs_of
from trtq.gate.verdict import Check, Outcome, Verdict, overall
from trtq.graph.model import save_model
from trtq.graph.place import FLOATS, place
from trtq.graph.plan import Edge, Plan
from trtq.graph.rewrite import rewrite
from trtq.job import open_cache, opt_shapes, profile_for
from trtq.migration.convert import (
    Explicit,
    Source,
    load_source,
    observe,
    quantize_with_table,
    require_complete,
)
from trtq.recipe import Recipe
from trtq.recovery.attempt import engine_runs_here, share_check, write_verdict
from trtq.report.html import write_report
from trtq.simulation.finite import first_not_finite
from trtq.simulation.outputs import Outputs
from trtq.simulation.similarity import Similarity, compare

MATRIX_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

POINTWISE_OPS = frozenset(
    {
        "Add",
        "Clip",
        "Div",
        "Elu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Mul",
        "PRelu",
        "Relu",
        "Sigmoid",
        "Sub",
        "Tanh",
    }
)
"""Operators that TensorRT fuses with each other and behind a convolution or matrix product."""

INT8_OPS = MATRIX_OPS | POINTWISE_OPS | {"AveragePool", "Concat", "GlobalAveragePool", "Resize"}
"""First operators of layers that implicit quantization may run in INT8. Operators that only move values
(MaxPool, Reshape, Transpose, ...) take what their neighbours have."""


@dataclass(frozen=True)
class Migration:
    """What `migrate` leaves behind; `exit_code` is what the command returns.

    Attributes:
        explicit: the Q/DQ model with its plan, the scales it uses, and how the table fits.
        checks: what else was asked for; those that there is a verdict for are its checks, too.
        agreement: "migrated to fp32", "migrated to table" and "table to fp32" -> output -> similarity; the
            pairs that were measured.
        verdict: the gate against fp32, with all checks; None without evaluation data.
        against_table: the gate against what the table implies; None, too, where that scores nothing.
    """

    folder: Path
    explicit: Explicit
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
        """The outcome in one line."""
        if self.verdict is not None:
            return self.verdict.headline()
        found = [check.message for check in self.checks if check.outcome is self.outcome]
        return "  ".join([self.outcome.value.upper(), "; ".join([*found, "not gated"])])

    def text(self) -> str:
        """What came of it, for a person."""
        lines = [f"engine: {self.coverage.text()}"]
        for pair, outputs in self.agreement.items():
            lines += [
                f"{pair}: {name} {s.sqnr_db:.1f} dB, cosine {s.cosine:.6f}" for name, s in outputs.items()
            ]
        for reference, verdict in (("the table", self.against_table), ("fp32", self.verdict)):
            lines += [f"against {reference}: {verdict.text()}"] if verdict is not None else []
        if self.verdict is None:
            lines.append("not gated: give --eval and --metric for a verdict")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """How the table fits and what was measured, as JSON values; `verdict.json` has the main verdict."""
        return {
            "fit": self.explicit.fit.to_json(),
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
        InputError: an option, the model, the table or the data cannot be used.
        MissingBackendError: the builder is not installed.
    """
    required = recipe.require("model", "output")
    output = Path(required.output)
    if (recipe.eval is None) != (recipe.metric is None):
        raise InputError("a gate needs both --eval and --metric", remedy="give both, or none")
    console = console.fresh()
    backend = builder(recipe.backend)
    backend.check_targets(recipe.target)
    least = recipe.min_int8
    source, given = load_source(required.model, rest=recipe.rest), read_table(table, encoding)
    model = source.model
    if "caution" in given.metadata:
        console.warn(given.metadata["caution"])
    data = load_samples(recipe.data, model.inputs, recipe.preprocess) if recipe.data else None
    cache = open_cache(recipe, console)
    evaluation = (
        Evaluation.open(recipe, model.path, model.inputs, cache, console) if recipe.eval is not None else None
    )
    samples = evaluation.samples if evaluation else data
    profile = profile_for(model, recipe, samples)
    explicit = quantize_with_table(
        source,
        given,
        include=recipe.include,
        exclude=recipe.exclude,
        input_shapes=opt_shapes(model, profile),
        weights=recipe.weights,
        rest=recipe.rest,
        observed=observe(source, given, samples) if samples else None,
        extents=measure_extents(model.graph, samples) if samples and recipe.rest == "fp16" else None,
    )
    console.say("table", explicit.fit.text())
    if strict:
        require_complete(explicit.fit, table)
    console.say("plan", pipeline.plan_text(explicit.plan))
    with staged_folder(output) as folder:
        int8 = folder / "model.int8.onnx"
        save_model(explicit.graph, int8)
        explicit.plan.save(folder / "plan.json")
        explicit.table.save(folder / "calibration.cache")
        build = backend.build(
            int8,
            folder / "model.plan",
            profile=profile,
            targets=recipe.target,
            options=recipe.build_options(),
        )
        covered = coverage(explicit.plan, build.compiled)
        migration = Migration(
            folder=output,
            explicit=explicit,
            build=replace(build, engine=output / "model.plan"),
            coverage=covered,
            checks=() if least is None else (share_check(covered, least),),
        )
        candidate = build.engine if engine_runs_here(recipe, console) else int8
        if samples is not None:
            outputs = _outputs_of_all(source, given, candidate, samples, recipe, cache, console)
            migration = replace(migration, agreement=_agreement(outputs))
            if evaluation is not None:
                verdict = evaluation.published(evaluation.verdict(candidate))
                try:
                    against_table = evaluation.verdict(candidate, against=outputs["table"])
                    against_table = evaluation.published(against_table)
                except InputError as error:  # it scores nothing, or is not finite
                    console.warn(f"no gate against what the table implies: {error.problem}")
                    against_table = None
                if against_table is not None:
                    check = Check(
                        "against the table",
                        against_table.outcome,
                        f"against the table: {against_table.gate_line()}",
                    )
                    migration = replace(migration, checks=(*migration.checks, check))
                verdict = verdict.with_checks(*migration.checks)
                migration = replace(migration, verdict=verdict, against_table=against_table)
                write_verdict(folder, verdict)
                write_report(folder)
        inputs: dict[str, Any] = {
            "model": {"file": str(model.path), "sha256": model.sha256},
            "table": {"file": str(table), "sha256": sha256_file(table), "header": given.header},
        }
        for name, used in (("data", data), ("eval", evaluation.samples if evaluation else None)):
            if used is not None:
                inputs[name] = {"source": used.source, "rows": len(used), "sha256": used.hash}
        record = {
            "command": command,
            "versions": pipeline.versions(recipe),
            "inputs": inputs,
            **migration.to_json(),
            "outputs": pipeline.hashes_of(folder),
        }
        write_json(folder / "migration.json", record)
    return migration


def implied_model(source: Source, table: Table) -> gs.Graph:
    """The model that a table implies (see the module), as a Q/DQ graph: for simulation only.

    Raises:
        InputError: as `place`.
    """
    graph = source.model.graph
    rows: dict[str, str] = {}

    def has_scale(tensor: gs.Tensor) -> bool:
        if row := source.row(tensor.name, table):
            rows[tensor.name] = row
        return row is not None

    edges, int8 = [], set()
    for layer in _layers(graph):
        inputs = [*_layer_inputs(layer)]
        tensors = [node.inputs[index] for node, index in inputs]
        if inputs and all(map(has_scale, [*tensors, layer[-1].outputs[0]])):
            int8.add(layer[0].name)
            edges += [
                Edge(tensor.name, node.name, index, "implied", tensor.name)
                for tensor, (node, index) in zip(tensors, inputs, strict=True)
            ]
    weights = [weight for weight in place(source.model).weights if weight.node in int8]
    plan = Plan(source.model.sha256, [], edges, weights)
    return rewrite(graph, plan, {tensor: table.scales[row] for tensor, row in rows.items()})


def _agreement(outputs: Mapping[str, Outputs]) -> dict[str, dict[str, Similarity]]:
    """How alike the outputs are, pair by pair; without those that are not finite."""
    finite = {name: o.arrays for name, o in outputs.items() if first_not_finite(o.arrays) is None}
    pairs = (("migrated", "fp32"), ("migrated", "table"), ("table", "fp32"))
    return {
        f"{name} to {reference}": compare(finite[reference], finite[name])
        for name, reference in pairs
        if name in finite and reference in finite
    }


def _layers(graph: gs.Graph) -> Iterator[list[gs.Node]]:
    """The layers that may run in INT8: an operator and the pointwise ones that fuse behind it.

    A pointwise operator fuses with the one of its inputs that is computed last, if nothing else reads it.
    """
    order = {id(node): index for index, node in enumerate(graph.nodes)}
    behind: dict[int, gs.Node] = {}
    fused: set[int] = set()
    for node in graph.nodes:
        if node.op not in POINTWISE_OPS:
            continue
        producers = [
            t.inputs[0]
            for t in node.inputs
            if len(t.inputs) == len(t.outputs) == 1
            and t.inputs[0].op in MATRIX_OPS | POINTWISE_OPS
            and not any(t is output for output in graph.outputs)
        ]
        if producers:
            behind[id(max(producers, key=lambda producer: order[id(producer)]))] = node
            fused.add(id(node))
    for node in graph.nodes:
        if node.op not in INT8_OPS or id(node) in fused:
            continue
        layer = [node]
        while id(layer[-1]) in behind:
            layer.append(behind[id(layer[-1])])
        yield layer


def _layer_inputs(layer: list[gs.Node]) -> Iterator[tuple[gs.Node, int]]:
    """Where floating-point activations enter a layer: node, position of the input."""
    for position, node in enumerate(layer):
        count = 2 if node.op in MATRIX_OPS else 1 if node.op == "Resize" else len(node.inputs)
        for index, tensor in enumerate(node.inputs[:count]):
            inside = position > 0 and tensor is layer[position - 1].outputs[0]
            if isinstance(tensor, gs.Variable) and tensor.name and tensor.dtype in FLOATS and not inside:
                yield node, index


def _outputs_of_all(
    source: Source,
    table: Table,
    candidate: Path,
    samples: Samples,
    recipe: Recipe,
    cache: Cache,
    console: Console,
) -> dict[str, Outputs]:
    """Outputs of the fp32 model, of what the table implies (simulated), and of the migrated model."""

    def run(model: Path, label: str, sha256: str | None = None) -> Outputs:
        return outputs_of(
            model,
            samples,
            cache,
            console,
            label=label,
            sha256=sha256,
            batch_size=recipe.batch,
            threads=recipe.threads,
            afresh=recipe.require_engine,
        )[0]

    with tempfile.TemporaryDirectory(prefix="trtq-") as scratch:
        implied = Path(scratch) / "implied.onnx"
        save_model(implied_model(source, table), implied)
        return {
            "fp32": run(source.model.path, "fp32", source.model.sha256),
            "table": run(implied, "table"),
            "migrated": run(candidate, "migrated"),
        }
