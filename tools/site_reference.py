"""The reference pages of the documentation, made of the code: the command line, recipes, files."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import trtq.cli.main
from trtq.backends import bench, compiled
from trtq.backends.timing import Timing
from trtq.cost.gpus import GPUS
from trtq.data import feeding, preprocess
from trtq.errors import ExitCode
from trtq.gate import in_the_way, tensors, verdict
from trtq.graph import plan
from trtq.migration.fit import Fit
from trtq.migration.implied import Implied
from trtq.recipe import Recipe, flag, options
from trtq.recovery import attempt, sensitivity, speed
from trtq.report import record
from trtq.simulation import similarity
from trtq.simulation.simulator import Effect, Score
from trtq.study import Row, Study

ROOT = Path(__file__).parents[1]


# --- the command line ---------------------------------------------------------------------------------


def cli_page() -> str:
    """Every command with its options."""
    lines = ["# Command line", "", "Made of the code of `trtq --help`.", ""]
    lines += ["| exit code | |", "|-|-|", *(f"| {code.value} | {_words(code.name)} |" for code in ExitCode)]
    lines += ["| 128 + n | ended by signal n: 130 Ctrl-C, 143 SIGTERM |", ""]
    for name, parser in commands().items():
        usage = (parser.usage or "").replace("%%", "%").replace("%(prog)s", parser.prog)
        lines += [f"## `trtq {name}`", "", _sentence(parser.description or ""), ""]
        lines += ["```text", usage, "", (parser.epilog or "").replace("%%", "%"), "```", ""]
        for group in parser._action_groups:
            if group._group_actions:
                lines += [f"**{group.title}**", "", "| | |", "|-|-|"]
                lines += [*map(_argument_row, group._group_actions), ""]
    return "\n".join(lines)


def commands() -> dict[str, argparse.ArgumentParser]:
    """Name -> parser of every command."""
    (found,) = (a for a in trtq.cli.main.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


def _argument_row(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else _value_name(action)
    if action.option_strings:
        spelled = ", ".join(f"`{name}{' ' + value if value else ''}`" for name in action.option_strings)
    else:
        spelled = f"`{value}`"
    return f"| {spelled.replace('|', chr(92) + '|')} | {_cell((action.help or '').replace('%%', '%'))} |"


def _value_name(action: argparse.Action) -> str:
    if action.choices is not None and action.metavar is None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    name = action.metavar or action.dest.upper()
    return name if isinstance(name, str) else " ".join(name)


# --- recipes ------------------------------------------------------------------------------------------


def recipe_page() -> str:
    """Every option of a recipe, with the commands that take it."""
    taken = {name: set(trtq.cli.main.command(name).options) for name in trtq.cli.main.COMMANDS}
    lines = [
        "# Recipe",
        "",
        "A recipe is a TOML file with the options of a job: `trtq deploy --recipe recipe.toml`. What the"
        " command line gives wins. In Python each is a keyword argument of the same name. Relative paths are"
        " relative to the recipe's folder. A recipe can name code that is run: read one before you use it"
        " ([what runs code](security.md)).",
        "",
        "| option | meaning | values | commands |",
        "|-|-|-|-|",
    ]
    for field in options():
        users = [name for name, names in taken.items() if field.name in names]
        everywhere = f"{len(users)} commands" if len(users) > 5 else ", ".join(users)
        spelled = "MODEL" if field.name == "model" else flag(field.name)
        cells = map(_cell, (field.metadata["help"], _values(field), everywhere))
        lines.append(f"| `{field.name}`<br>`{spelled}` | " + " | ".join(cells) + " |")
    lines += ["", "## `[preprocess.<input>]`", "", _prose(preprocess.Preprocess)]
    lines += ["", "## `[inputs.<input>]`", "", _prose(feeding.InputOptions)]
    lines += ["", "## `[state]`", "", _option("state").metadata["help"], ""]
    lines += ["## GPUs", "", "What `--gpu` knows, by their data sheets.", ""]
    lines += ["| name | compute capability | multiprocessors | GB/s | INT8, TOPS |", "|-|-|-|-|-|"]
    for gpu in GPUS:
        cells = (gpu.name, gpu.capability / 10, gpu.sms, gpu.bandwidth, gpu.int8)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, ""])


def _option(name: str) -> dataclasses.Field[Any]:
    return next(field for field in options() if field.name == name)


def _values(field: dataclasses.Field[Any]) -> str:
    kind = field.metadata["kind"]
    value = getattr(Recipe(), field.name)
    default = "" if value is None or value in ((), {}) else f"; default {kind.write_all(value)}"
    return kind.allowed + default


# --- files --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Described:
    """A file of trtq's, and what its keys mean.

    Attributes:
        classes: their attributes, as their docstrings explain them, are keys.
        keys: what the classes do not have.
        free: keys of objects whose own keys are names, of tensors say.
    """

    what: str
    classes: tuple[type, ...] = ()
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    free: frozenset[str] = frozenset()

    def meanings(self) -> dict[str, str]:
        """Key -> what it means."""
        found: dict[str, str] = {}
        for kind in self.classes:
            found = {**attributes_of(kind), **found}
        return {**found, **self.keys}


_HASHES = {
    "sha256": "hash of the file; of data, of their content",
    "bytes": "size of the file",
    "file": "path as it was given",
    "source": "path as it was given",
    "rows": "how many there are",
}

_PLAIN = {
    "command": "that made the folder",
    "versions": "of everything the results depend on",
    "inputs": "what went in",
    "outputs": "what came out",
    "model": "the fp32 model",
    "data": "calibration data",
    "eval": "evaluation data",
    **_HASHES,
}

_PAIRS = ("migrated to fp32", "migrated to table", "table to fp32")

FILES: Mapping[str, Described] = {
    "verdict.json": Described(
        "The one outcome of the gate and of all checks; also `trtq gate --json`.",
        (verdict.Verdict, in_the_way.InTheWay, in_the_way.Obstacle, similarity.Similarity, similarity.Part),
        {
            "outcome": "pass, fail or inconclusive: of the gate and all checks, or of this check",
            "ok": "whether the check passed",
            "name": "of the check",
            "message": "what the check found, a sentence",
            "rank": "of the obstacle, from 1",
        },
        free=frozenset({"outputs"}),
    ),
    "workflow.json": Described(
        "Every step that was tried, also those that gave nothing, in order.",
        (attempt.Fruitless, speed.Point, in_the_way.InTheWay, in_the_way.Obstacle, verdict.Check),
        {
            "step": "calibrate, fix, partial, learn, or rest",
            "outcome": "of the gate and all checks",
            "gate": "of the gate alone",
            "metric": "of the INT8 model",
            "relative_drop": "of the metric, to fp32",
            "sqnr_db": "signal-to-quantization-noise ratio of each output",
            "int8_nodes": "how many weighted nodes are planned for INT8",
            "int8_share": "share of the multiply-accumulates in INT8",
            "given_away": "share that 'partial' leaves in floating point",
            "checks": "as in `verdict.json`",
            "note": "a sentence",
            "latency": "what the engine is expected to take, where something says what layers cost",
            "in_the_way": "as in `verdict.json`",
            "kept": "whether its files are those in the folder",
            "rank": "of the obstacle, from 1",
            "message": "what the check found, a sentence",
            "ok": "whether the check passed",
            "name": "of the check, or of a plan on the front",
        },
        free=frozenset({"sqnr_db"}),
    ),
    "plan.json": Described(
        "Which nodes are INT8, and why the others are not. `--plan` quantizes by it.",
        (plan.Plan, plan.NodePlan, plan.Edge, plan.Weight, plan.Float32Node),
        {
            "format": "version of the format",
            "name": "of the node",
            "op": "operator",
            "int8": "whether it is quantized",
            "rule": "why, in a word",
            "reason": "why, in words",
            "macs": "multiply-accumulates; null: not known",
            "tensor": "that is quantized",
            "node": "in front of which",
            "index": "of that node's input",
            "axis": "of the weight's channels",
        },
    ),
    "calibration.cache.json": Described(
        "Where the scales of a calibration table come from.",
        (),
        {
            "sha256": "hash of the table that this belongs to",
            "model": "hash of the model",
            "data": "hash of the calibration data",
            "rows": "rows that the ranges come from",
            "trtq": "version",
            "requested": "method that was asked for",
            "method": "method that was chosen",
            "sqnr_db": "of every method that was tried, on rows held back",
            "confirmed": "the choice of single ranges on other rows: how many, before and after",
            "before_db": "SQNR before",
            "after_db": "SQNR after",
            "held_back": "calibration rows that only choices were measured on",
            "exceptions": "tensor: its own method, where it differs",
            "runs": "runs of the search",
            "passes": "what they cost, in passes over the calibration data",
        },
    ),
    "model.plan.json": Described(
        "What made an engine and what it runs, so that nobody has to deserialize a plan.",
        (compiled.Compiled, compiled.CompiledLayer, compiled.CompiledTensor),
        {
            "engine_sha256": "hash of the plan file",
            "builder": "tensorrt-rtx or tensorrt",
            "version": "of the builder",
            "model": "ONNX file that it was built from",
            "model_sha256": "hash of that file",
            "targets": "compute capabilities; empty: the builder's own",
            "profile": "input: smallest, tuned and largest shape",
            "further_profiles": "the engine's other optimization profiles",
            "profile_values": "the same of inputs whose values decide sizes",
            "options": "of the builder, where they differ from its defaults",
            "warnings": "of the builder",
            "codes": "8-bit inputs and outputs, and what they stand for",
            "compiled": "the kernels, in the order they are issued",
            "name": "TensorRT's",
            "kind": "TensorRT's word for what the kernel does",
            "inputs": "tensors that it reads",
            "constants": "weights that it reads",
            "outputs": "tensors that it writes",
            "onnx_nodes": "what it computes of the model",
        },
        free=frozenset({"profile", "profile_values", "codes", "options"}),
    ),
    "manifest.json": Described(
        "What went into a job and what came out.",
        (),
        {
            "command": "that made the folder",
            "versions": "of everything the results depend on",
            "inputs": "model, data and metric",
            "outputs": "files of the folder",
            "io": "8-bit inputs and outputs of the engine: what they stand for and what the host does",
            "model": "the fp32 model",
            "data": "calibration data",
            "eval": "evaluation data",
            "metric": "of the gate",
            "name": "of the metric",
            "fingerprint": "equal for metrics that compute the same",
            **_HASHES,
        },
        free=frozenset({"versions", "outputs", "io"}),
    ),
    "migration.json": Described(
        "`trtq migrate`: how a table fits its model, and how close the explicit model is.",
        (Fit, Implied, similarity.Similarity, verdict.Verdict, verdict.Check),
        {
            **_PLAIN,
            "name": "of the check",
            "message": "what the check found, a sentence",
            "outcome": "of the verdict, or of a check",
            "ok": "whether the check passed",
            "table": "the calibration table",
            "header": "of the table",
            "implied": "what the table lets TensorRT run in INT8",
            "fit": "how the table fits the model",
            "complete": "whether every tensor has its scale",
            "int8": "how many layers may run in INT8",
            "int8_share": "share of the multiply-accumulates in INT8",
            "agreement": "outputs of the explicit model, of what the table implies, and of fp32, in pairs",
            **dict.fromkeys(_PAIRS, "how alike the outputs are, by their names"),
            "against_table": "verdict against what the table implies",
        },
        free=frozenset({"versions", "outputs", "rows", "missing", *_PAIRS}),
    ),
    "report.json": Described(
        "What the report shows that no other file of the results holds, of bounded size.",
        (
            *(record.Record, record.Noise, record.LayerNoise, record.TensorValues, record.Threshold),
            *(record.Sample, record.Thumbnail, record.Cost, record.GraphNode),
        ),
        {
            **_PLAIN,
            "format": "version of the format",
            "tensor": "its name",
            "input": "the model's input that is an image",
            "png": "the image, base64",
            "number": "of the sample",
            "images": "of the sample",
            "answers": "of fp32 and of INT8",
            "name": "of the node",
            "op": "its operator",
            "costs": "kernels and bytes of engines",
            "batch": "rows of one inference",
            "nodes": "of the graph, or of a layer",
            "inputs": "positions of the nodes that it reads from",
            "node_count": "how many nodes the graph has",
            "sqnr_db": "signal-to-quantization-noise ratio",
        },
        free=frozenset({"versions"}),
    ),
    "sensitivity.json": Described(
        "`trtq sensitivity -o`: what INT8 in each layer does.",
        (sensitivity.Sensitivity, Effect, Score),
        {
            "format": "version of the format",
            "nodes": "their names",
            "name": "of the group",
            "op": "their operators",
            "macs": "multiply-accumulates; null: not known",
            "mode": "only: one group in INT8 at a time; all-but: one in fp32 at a time",
            "group": "nodes that go into INT8 together",
            "sqnr_db": "lowest signal-to-quantization-noise ratio of the outputs",
            "noise": "power of the error relative to the output's",
        },
    ),
    "study.json": Described(
        "`trtq study`: the paper's tables.",
        (Study, Row),
        {
            "format": "version of the format",
            "name": "of the row: a method, or a number of layers",
            "model": "its file's name",
            "metric": "the metric's name; in a row its value",
            "fp32": "the metric's value in fp32",
            "samples": "how many were evaluated",
        },
        free=frozenset({"tables"}),
    ),
    "bench.json": Described(
        "`trtq bench --json`: engines side by side.",
        (bench.Result, bench.Static, Timing),
        {
            "gpu": "that measured; null without one",
            "engines": "each of them",
            "engine": "its file",
            "static": "what it runs, from its record",
            "timing": "what a GPU measured; null without one",
            "batch": "rows of one inference",
            "note": "what makes the timing doubtful",
        },
    ),
    "tensors.json": Described(
        "`trtq gate --tensors`: tensor by tensor.",
        (tensors.ThreeWay, tensors.Compared),
        {
            "tensors": "in topological order",
            "tensor": "its name",
            "node": "that makes it",
            "op": "that node's operator",
            "simulation_db": "SQNR of the simulation, against fp32",
            "changed": "a fix changed what it holds, which was taken off for `simulation_db`",
            "engine_db": "SQNR of the engine, against the simulation; null without one",
            "parts_at": "the first tensor where simulation and engine part",
        },
    ),
}
"""Every JSON file that trtq writes -> what it holds."""


def files_page() -> str:
    """Every file with its keys."""
    lines = [
        "# Files",
        "",
        "JSON is UTF-8, every number in it is finite, and files appear in one move. Shapes are lists of"
        " integers. The keys below are made of the code; a test compares them with the files of real jobs.",
        "",
    ]
    for name, described in FILES.items():
        lines += [f"## `{name}`", "", described.what, "", "| key | meaning |", "|-|-|"]
        lines += [f"| `{key}` | {_cell(text)} |" for key, text in described.meanings().items()]
        lines.append("")
    lines += [(ROOT / "tools" / "site_other_files.md").read_text()]
    return "\n".join(lines)


def attributes_of(kind: type) -> dict[str, str]:
    """Attribute -> what the class's docstring says of it, or nothing."""
    found = {field.name: "" for field in dataclasses.fields(kind)}
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    for match in re.finditer(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", section, re.M):
        for name in match[1].split(", "):
            if name in found:
                found[name] = " ".join(match[2].split())
    return found


# --- text ---------------------------------------------------------------------------------------------


def _prose(kind: type) -> str:
    return inspect.cleandoc(kind.__doc__ or "").replace("`[", "`[").partition("Attributes:")[0]


def _words(name: str) -> str:
    return name.lower().replace("_", " ")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def plugins_page() -> str:
    """`plugins/README.md`: references of operators, Polygraphy."""
    text = (ROOT / "plugins/README.md").read_text()
    return text.replace("](trtq_references)", "](python.md)")


PAGES: Mapping[str, Callable[[], str]] = {
    "cli": cli_page,
    "recipe": recipe_page,
    "files": files_page,
    "plugins": plugins_page,
}
"""Name of a page -> what makes it."""
