"""`trtq inspect`: what a file is and what is in it, for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import onnx_graphsurgeon as gs

from trtq.backends.builders import describe_engine
from trtq.backends.engine import ENGINE_SUFFIXES
from trtq.calibration.statistics import Statistics
from trtq.calibration.table import Table, tensorrt_version
from trtq.data.stored import read_npz
from trtq.errors import InputError, about, shown
from trtq.files import PathLike, read_bytes, read_json
from trtq.gate.verdict import Verdict
from trtq.graph.fold import fold_functions
from trtq.graph.model import load_model
from trtq.graph.place import placed
from trtq.graph.plan import FORMAT as PLAN_FORMAT
from trtq.graph.plan import Plan, by_reason, percent
from trtq.graph.products import is_quantizer
from trtq.numerics import INT8_MAX
from trtq.paths import DEPLOYED, MIGRATED
from trtq.recipe import KINDS, Recipe, flag, options
from trtq.recovery.sensitivity import FORMAT as SENSITIVITY_FORMAT
from trtq.recovery.sensitivity import Sensitivity
from trtq.report.record import FORMAT as RECORD_FORMAT
from trtq.report.record import Record
from trtq.study import FORMAT as STUDY_FORMAT
from trtq.study import Study


@dataclass(frozen=True)
class Inspection:
    """A file: what kind it is, and its content as lines and as JSON values."""

    kind: str
    lines: list[str]
    values: dict[str, Any]

    def text(self) -> str:
        """The kind, and the content line by line."""
        return "\n".join([self.kind, *(f"  {line}" for line in self.lines)])

    def to_json(self) -> dict[str, Any]:
        """The kind and the content as JSON values."""
        return {"kind": self.kind, **self.values}


def inspect(path: PathLike) -> Inspection:
    """Describe a folder of results, or a file: an ONNX model, an engine, a table, statistics, or anything
    else that trtq writes.

    Engines are not deserialized: a plan file is code, and one from an untrusted source must not be loaded.

    Raises:
        InputError: missing, damaged, or none of these.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise InputError("the file does not exist", file=path, remedy="check the path")
    if path.suffix == ".onnx":
        return _model(path)
    if path.suffix in ENGINE_SUFFIXES:
        return _engine(path)
    if path.suffix in _BY_SUFFIX:
        return _BY_SUFFIX[path.suffix](path)
    return _table(path)


def _folder(path: Path) -> Inspection:
    """The results in a folder, a line each, with the first line of what is in them; the verdict is first."""
    lines, values = [], {}
    files = [file for file in path.iterdir() if file.is_file() and _may_be_ours(file)]
    for file in sorted(files, key=lambda file: (file.name != "verdict.json", file.name)):
        try:
            found = inspect(file)
        except InputError as error:
            if file.name in DEPLOYED or file.name in MIGRATED:
                lines.append(f"{file.name:<24} damaged: {error.problem}")
            continue
        values[file.name] = found.to_json()
        gist = [" ".join(line.split()) for line in found.lines if "sha256" not in line]
        lines.append(f"{file.name:<24} {': '.join([found.kind, *gist[:1]])}")
    if not values:
        raise InputError(
            "the folder holds no results",
            file=path,
            remedy="give the folder that was -o of deploy, or a file",
        )
    return Inspection("folder of results", lines, {"files": values})


def _may_be_ours(file: Path) -> bool:
    suffixes = (".onnx", ".cache", *ENGINE_SUFFIXES, *_BY_SUFFIX)
    return not file.name.startswith(".") and file.suffix in suffixes


def _model(path: Path) -> Inspection:
    model = load_model(path)
    ops, bodies = _operators(model.graph), dict(_bodies(model.graph))
    fold_functions(model.graph)  # patterns name the nodes that are placed
    plan = placed(model, None)
    state = "no"
    if model.is_quantized:
        on_integers = any(node.int8 and is_quantizer(node.op) for node in plan.nodes)
        where = "between Q/DQ or on integers" if on_integers else "between Q/DQ"
        state = f"{len(plan.int8_nodes)} of {len(plan.nodes)} weighted nodes {where}"
    lines = [
        f"sha256    {model.sha256}",
        f"opset     {model.graph.opset} (as loaded), IR {model.graph.ir_version}",
        *(f"input     {spec}" for spec in model.inputs),
        *(f"output    {t.name} {t.dtype} {t.shape}" for t in model.graph.outputs),
        f"quantized {state}",
        f"nodes     {_counted(ops)}",
        *(f"body      {name}: {_counted(inner)}" for name, inner in bodies.items()),
        *(f"weighted  {line}" for line in by_reason(plan.nodes, most=len(plan.nodes))),
    ]
    values = {
        "sha256": model.sha256,
        "opset": model.graph.opset,
        "inputs": [str(spec) for spec in model.inputs],
        "quantized": model.is_quantized,
        "operators": dict(ops),
        "bodies": {name: dict(inner) for name, inner in bodies.items()},
        "weighted": plan.to_json()["nodes"],
    }
    return Inspection("ONNX model", lines, values)


def _operators(graph: gs.Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


def _bodies(graph: gs.Graph) -> Iterator[tuple[str, Counter[str]]]:
    """The operators in each body of an If, Loop or Scan, also of those within."""
    for node in graph.nodes:
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                yield f"{name} of {node.name} ({node.op})", _operators(value)
                yield from _bodies(value)


def _counted(operators: Counter[str]) -> str:
    return ", ".join(f"{op} {count}" for op, count in operators.most_common()) or "no nodes"


def _engine(path: Path) -> Inspection:
    found = describe_engine(path)
    build = found["build"]
    lines = [f"{name:<9} {found[name]}" for name in ("sha256", "bytes", "version")]
    lines.append(f"targets   {', '.join(found['targets']) or 'not known'}")
    lines.append("caution   a plan file is code: load only plans you built or trust")
    if build is None:
        lines.append(f"kernels   not known: the record {path.name}.json is missing or of another engine")
        return Inspection(f"engine of {found['backend']} (plan file)", lines, found)
    compiled = build["compiled"]
    megabytes = compiled.bytes_moved() / 1e6
    datatypes = Counter(
        "/".join(sorted({t.datatype for t in layer.inputs})) for layer in compiled.layers if layer.computes
    )
    lines += [
        f"model     {build['model']} ({build['model_sha256'][:16]}…)",
        f"profile   {build['profile'] or 'static'}",
        *(f"values    {name}: {held}" for name, held in build.get("profile_values", {}).items()),
        f"kernels   {compiled.kernels}, about {megabytes:.1f} MB moved at batch {compiled.batch}",
        "compute   " + ", ".join(f"{count} kernels read {types}" for types, count in datatypes.most_common()),
    ]
    return Inspection(
        f"engine of {found['backend']} (plan file)",
        lines,
        {**found, "build": {**build, "compiled": compiled.to_json()}},
    )


def _record(record: Record) -> Inspection:
    measured = 0 if record.noise is None else record.noise.count
    lines = [
        f"made      {record.made}, model {record.model}",
        f"data      {record.data.rows} rows to calibrate, {record.eval.rows} to evaluate",
        f"pictures  noise of {measured} layers, values of {len(record.tensors)} of {record.tensor_count}"
        f" tensors, {len(record.samples)} samples, {record.node_count} nodes",
    ]
    return Inspection("record of the report", lines, record.to_json())


def _json(path: Path) -> Inspection:
    """A JSON file by the format that it names, or by what it has."""
    value = read_json(path, "JSON file")
    found = value.get("format") if isinstance(value, dict) else None
    if found == SENSITIVITY_FORMAT:
        analysis = Sensitivity.load(path)
        return Inspection("sensitivity analysis", analysis.text().splitlines(), value)
    if found == STUDY_FORMAT:
        return Inspection("study", Study.load(path).text().splitlines(), value)
    if found == PLAN_FORMAT:
        return _plan(path)
    if found == RECORD_FORMAT:
        return _record(Record.load(path))
    if isinstance(value, list) and value and all(isinstance(v, dict) and "step" in v for v in value):
        steps = [f"{step['step']}: {step.get('outcome') or step.get('note')}" for step in value]
        return Inspection("steps of the workflow", steps, {"steps": value})
    if isinstance(value, dict) and found is None:
        if value.keys() >= _VERDICT:
            with about(path):
                return Inspection("verdict", Verdict.from_json(value).text().splitlines(), value)
        for kind, keys in _BY_KEYS.items():
            if keys <= value.keys():
                return Inspection(kind, _flat(value), value)
    raise InputError(
        "not a file of trtq",
        file=path,
        cause=f"its format is {shown(found)}" if found else "it names no format",
    )


_VERDICT = {"outcome", "metric", "executor"}

_BY_KEYS = {
    "record of an engine": {"engine_sha256", "builder", "compiled"},
    "manifest": {"command", "versions", "inputs", "outputs"},
    "migration": {"fit", "agreement", "implied"},
    "record of a cache entry": {"sha256", "record_sha256", "key"},
    "record of a table": {"sha256", "method"},
    "times of engines": {"gpu", "engines"},
    "comparison tensor by tensor": {"parts_at", "engine"},
}
"""What the other JSON files of trtq are by the keys that they have."""

_LONGEST = 100


def _flat(value: Mapping[str, Any], around: str = "") -> list[str]:
    """A line for each text and number in a JSON object; of lists and of what is deeper, how much there is."""
    lines = []
    for name, item in value.items():
        if isinstance(item, Mapping) and not around:
            lines += _flat(item, f"{name}.")
        elif isinstance(item, Mapping | list):
            lines.append(f"{around}{name}: {len(item)} items" if item else f"{around}{name}: none")
        else:
            text = str(item)
            lines.append(f"{around}{name}: {text if len(text) <= _LONGEST else text[:_LONGEST] + '…'}")
    return lines


def _recipe(path: Path) -> Inspection:
    recipe = Recipe.load(path)
    default, given = Recipe(), [option.name for option in options()]
    set_ = {name: getattr(recipe, name) for name in given if getattr(recipe, name) != getattr(default, name)}
    lines = [f"{flag(name)[2:]:<18} {KINDS[name].write_all(value)}" for name, value in set_.items()]
    tables = [f"[{kind}.{name}]" for kind in ("preprocess", "inputs") for name in getattr(recipe, kind)]
    return Inspection("recipe", [*lines, *tables], {"options": [*set_], "tables": tables})


def _junit(path: Path) -> Inspection:
    try:
        suite = ElementTree.fromstring(read_bytes(path))
    except (OSError, ElementTree.ParseError) as error:
        raise InputError("cannot read the JUnit file", file=path, cause=error) from error
    if suite.tag != "testsuite" or suite.get("name") != "trtq":
        raise InputError("not a JUnit file of trtq", file=path)
    lines = [", ".join(f"{suite.get(name)} {name}" for name in ("tests", "failures", "errors", "skipped"))]
    for case in suite.iter("testcase"):
        outcome = next(
            (tag for tag in ("failure", "error", "skipped") if case.find(tag) is not None), "passed"
        )
        lines.append(f"{outcome:<9} {case.get('name')}")
    return Inspection("JUnit results", lines, {"cases": lines[1:], **suite.attrib})


def _page(path: Path) -> Inspection:
    content = read_bytes(path)
    if b"<html" not in content:
        raise InputError("not a page", file=path)
    return Inspection("page", [f"{len(content):,} bytes: open it in a browser"], {"bytes": len(content)})


def _arrays(path: Path) -> Inspection:
    """Statistics, or any other arrays: of data, or what is cached."""
    try:
        arrays = read_npz(path)
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        raise InputError("not an .npz of plain arrays, or a damaged one", file=path, cause=error) from error
    if "format" in arrays:
        return _statistics(path)
    described = {name: f"{array.dtype} {_by(array.shape)}" for name, array in arrays.items()}
    lines = [f"array     {name}: {text}" for name, text in described.items()]
    return Inspection("arrays", lines, {"arrays": described})


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _plan(path: Path) -> Inspection:
    plan = Plan.load(path)
    share, floats = plan.mac_share(), [node for node in plan.nodes if not node.int8]
    lines = [
        f"model     {plan.model}",
        f"int8      {len(plan.int8_nodes)} of {len(plan.nodes)} weighted nodes"
        + ("" if share is None else f", {percent(share)} of the multiply-accumulates"),
        f"ranges    {len(plan.tensors)} activations, {len(plan.weights)} weights",
        *(f"float     {line}" for line in by_reason(floats, most=len(floats))),
    ]
    return Inspection("plan", lines, plan.to_json())


def _statistics(path: Path) -> Inspection:
    statistics = Statistics.load(path)
    histograms = statistics.histograms.items()
    lines = [f"rows      {statistics.rows}"]
    lines += [f"tensor    {name}: {h.low:.5g} to {h.high:.5g}, {h.total} values" for name, h in histograms]
    values = {name: {"low": h.low, "high": h.high, "values": h.total} for name, h in histograms}
    return Inspection("statistics", lines, {"rows": statistics.rows, "tensors": values})


_BY_SUFFIX: Mapping[str, Callable[[Path], Inspection]] = {
    ".json": _json,
    ".npz": _arrays,
    ".toml": _recipe,
    ".xml": _junit,
    ".html": _page,
}


def _table(path: Path) -> Inspection:
    table = Table.load(path)
    lines = [
        f"header    {table.header} (TensorRT {tensorrt_version(table.version)})",
        *(f"{name:<9} {value}" for name, value in table.metadata.items() if isinstance(value, str | int)),
        *(
            f"tensor    {n}: scale {float(s):.6g}, amax {float(s) * INT8_MAX:.5g}"
            for n, s in table.scales.items()
        ),
    ]
    return Inspection("calibration table", lines, table.to_json())
