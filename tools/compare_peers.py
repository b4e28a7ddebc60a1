"""Compare trtq with ModelOpt, ONNX Runtime's quantizer, NNCF, AIMET-ONNX and AMD Quark on real models.

Every tool quantizes each model with the same calibration rows in a process of its own, which is
timed and whose peak memory is taken. Each is asked for what TensorRT runs: symmetric INT8, one scale for a
tensor of activations and one for each channel of weights, biases in float (tools/peer_worker.py says by which
options). All resulting int8 models are then measured by the same code:

    metric, drop, SQNR    ONNX Runtime on the CPU without its optimizations, so that Q/DQ are executed as
                          written, against the fp32 model; of an output that mixes scales, as boxes beside
                          scores, the SQNR of its worst part
    INT8 nodes            Conv, ConvTranspose, Gemm and MatMul nodes all of whose factors are dequantized in
                          the file
    kernels, MB moved,    the engine that TensorRT-RTX builds from it without a GPU: kernels, megabytes
    int8 MACs             they read and write for 8 rows, int8 share of the multiply-accumulates
    fp16 ...              metric and SQNR of the same with `--rest fp16`, simulated as float16, and how many
                          nodes stay float32; of the fp32 model, its conversion by the range rules

One table per model goes to stdout, everything to WORK/comparison.json. Results are kept in WORK: a
rerun only does what is missing or whose model, data or tool has changed; failures are tried again.

`trtq deploy` does more than the others in its time: choice of the method, search of the ranges, engine and
gate are included. It starts with an empty cache. `trtq modelopts-layers` is `trtq mse` without the layers
that ModelOpt leaves in floating point, so that both engines have one INT8 share; `qdq everywhere` has a
quantizer in front of every operator (tools/qdq_everywhere.py). `trtq fastest` is `trtq deploy --gpu`: the
fastest plan for TensorRT for RTX beside float16, which may have no INT8 at all.

The zoo holds `models/*.onnx` with `cifar10/`, `imagenet_sample/` and `stsb/` (calibration and
evaluation data); `yolox` is the detector of tests/families/detector. NNCF, AIMET and Quark get a virtual
environment each, ModelOpt and ONNX Runtime one together, about 1 GB each with PyTorch's CPU build: point pip
at an index that serves it, otherwise CUDA libraries come along. What cannot be installed is left out, and
its rows say why.
"""

from __future__ import annotations

import argparse
import collections
import csv
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from peer_worker import LAYERS, MOVERS

from trtq import files
from trtq.errors import InputError, TrtqError

ROOT = Path(__file__).resolve().parents[1]
CPU_BATCH = 16
ENGINE_BATCH = 8
TARGET = "8.6"
"""Compute capability of the engines; set, so that every machine compares the same ones."""

GPU = "L4"
"""Whose data sheet says what layers cost."""

DETECTOR = ROOT / "tests" / "families" / "detector"

Arrays = dict[str, np.ndarray]

RUNS = (
    "modelopt max",
    "modelopt entropy",
    "ort minmax",
    "ort minmax-float-bias",
    "ort percentile-99.99",
    "nncf fast-bias",
    "nncf accurate-bias",
    "nncf unsigned",
    "aimet max",
    "aimet sqnr",
    "quark max",
    "quark percentile",
    "quark cle",
    "trtq max",
    "trtq mse",
    "trtq modelopts-layers",
    "trtq deploy",
    "trtq fastest",
    "qdq everywhere",
)
HALF = ("trtq max", "trtq mse", "trtq deploy")
"""Runs that are repeated, untimed, with what is not quantized in float16."""

HEAVY = ("ort percentile-99.99",)
"""Tools and methods that only run on request: this one keeps every activation of every sample in memory."""

TORCH = ["torch==2.13.0", "torchvision==0.28.0"]

PEER_PACKAGES = {
    # ModelOpt's onnx extra insists on onnxruntime-gpu and CuPy; these are the packages it uses on a CPU.
    "modelopt": [
        TORCH[:1],
        ["--no-deps", "nvidia-modelopt==0.47.*"],
        [
            *(
                "onnxruntime==1.31.*",
                "onnx==1.21.*",
                "onnx-graphsurgeon>=0.6.1",
                "onnxconverter-common==1.16.*",
            ),
            *("onnxscript", "onnxslim", "polygraphy>=0.53.4", "lief", "ml_dtypes", "ninja", "numpy"),
            *("omegaconf", "nvidia-ml-py>=12", "packaging", "pulp<4", "pydantic", "PyYAML", "regex", "rich"),
            *("safetensors", "scipy", "setuptools", "tqdm"),
        ],
    ],
    "nncf": [[*TORCH[:1], "nncf==3.4.*", "onnx==1.23.*", "onnxruntime==1.32.*"]],
    "aimet": [[*TORCH, "aimet-onnx==2.42.*", "onnx==1.21.*", "onnxruntime==1.31.*"]],
    "quark": [[*TORCH, "amd-quark==0.13", "onnxruntime==1.28.*"]],
}
"""Environment -> what pip installs there, call by call."""

ENVIRONMENTS = {"ort": "modelopt", **{name: name for name in PEER_PACKAGES}}
"""Peer tool -> its environment."""


def load_cifar10(zoo: Path, part: str) -> Arrays:
    with np.load(zoo / "cifar10" / f"{part}.npz") as archive:
        images, labels = archive["images"], archive["labels"]
    mean, deviation = (np.array(v, np.float32) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixels = (images / np.float32(255) - mean) / deviation
    return {"input": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), "label": labels}


def load_imagenet_sample(zoo: Path, part: str) -> Arrays:
    from PIL import Image

    folder = zoo / "imagenet_sample"
    with open(folder / f"{part}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    images = np.stack([np.asarray(Image.open(folder / part / row["file"]).convert("RGB")) for row in rows])
    pixels = (images / np.float32(255) - np.float32(0.498)) / np.float32(0.502)
    return {
        "input": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)),
        "label": np.array([int(row["label"]) for row in rows]),
    }


def load_stsb(zoo: Path, part: str) -> Arrays:
    with np.load(zoo / "stsb" / f"{part}.npz") as archive:
        return dict(archive)


def load_detector(_: Path, part: str) -> Arrays:
    """The images of tools/make_detector.py, which the tests bring with them."""
    with np.load(DETECTOR / f"{part}.npz") as archive:
        arrays = dict(archive)
    pixels = arrays.pop("pixels") / np.float32(255)
    return {"images": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), **arrays}


@dataclass(frozen=True)
class Case:
    """A model with its data.

    Attributes:
        name: of the model's file, without `.onnx`.
        load: (zoo, "calib" or "eval") -> the model's inputs and, under `target`, the answers.
        target: what `load` calls the answers.
        metric: in trtq's syntax; a file is relative to the zoo.
        folder: of the model, where that is not the zoo's `models`.
    """

    name: str
    load: Callable[[Path, str], Arrays]
    target: str
    metric: str
    folder: Path | None = None


CASES = {
    case.name: case
    for case in (
        Case("resnet20_cifar10", load_cifar10, "label", "top1"),
        Case("efficientnet_lite0", load_imagenet_sample, "label", "top1"),
        Case("minilm_l6", load_stsb, "score", "stsb/metric.py:spearman"),
    )
}


YOLOX = Case("yolox", load_detector, "objects", "detections@yolox=detections", DETECTOR)
"""SiLU, depthwise convolutions and a joined output; fp32's own detections are what is to be found."""

MODELS = {**CASES, YOLOX.name: YOLOX}


@dataclass(frozen=True)
class Workplace:
    """One case on this machine: `folder` holds its data, the quantized models, logs and kept results."""

    case: Case
    zoo: Path
    folder: Path

    @property
    def fp32(self) -> Path:
        return (self.case.folder or self.zoo / "models") / f"{self.case.name}.onnx"

    @property
    def calib(self) -> Path:
        return self.folder / "calib.npz"

    @property
    def eval(self) -> Path:
        return self.folder / "eval.npz"

    @property
    def metric(self) -> str:
        return str(self.zoo / self.case.metric) if ".py:" in self.case.metric else self.case.metric

    def file(self, run: str, suffix: str) -> Path:
        return self.folder / f"{run.replace(' ', '-')}{suffix}"


def install_peer(tool: str, folder: Path) -> Path:
    """The Python of a peer's virtual environment below `folder`, made or completed where needed.

    Raises:
        InputError: its packages cannot be installed here.
    """
    packages = PEER_PACKAGES[ENVIRONMENTS[tool]]
    environment = folder / ENVIRONMENTS[tool]
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    installed, wanted = environment / "installed.json", json.dumps(packages)
    if installed.exists() and installed.read_text() == wanted:
        return python
    say(f"installing {tool} into {environment}")
    venv.create(environment, with_pip=True)
    files.write_text(folder / ".gitignore", "*\n")
    for group in packages:
        pip = [python, "-m", "pip", "install", "--quiet", *group]
        done = subprocess.run(pip, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            cause = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "")
            raise InputError(f"pip cannot install {' '.join(group)}", cause=cause)
    files.write_text(installed, wanted)
    return python


def prepare_data(place: Workplace, rows: int | None) -> None:
    """Write `calib.npz` (at most `rows` rows, inputs only) and `eval.npz` (inputs and target)."""
    save_npz(place.eval, place.case.load(place.zoo, "eval"))
    calib = place.case.load(place.zoo, "calib")
    calib.pop(place.case.target, None)
    save_npz(place.calib, {name: array[:rows] for name, array in calib.items()})


def save_npz(path: Path, arrays: Arrays) -> None:
    with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def quantize(run: str, place: Workplace, environments: Path) -> dict[str, Any]:
    """Let one tool quantize one model: time, memory, exit code, and `model` or `error`.

    Args:
        environments: folder of the peers' virtual environments.
    """
    try:
        output, command = quantize_command(run, place, environments)
    except InputError as error:
        return {"error": f"{error.problem}: {error.cause}"}
    arguments = [str(word) for word in command]
    inputs = [files.sha256_file(path) for path in (place.fp32, place.calib, place.eval)]
    key = files.sha256_json([arguments, *inputs, tool_identity(run)])
    record = place.file(run, ".quantized.json")
    if (kept := read_record(record, key)) and output.exists():
        return kept
    say(f"{place.case.name}: {run}")
    output.unlink(missing_ok=True)
    log = place.file(run, ".log")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        usage = pool.submit(run_measured, arguments, log).result()
    if not output.exists():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return {**usage, "error": lines[-1] if lines else "no output"}
    return write_record(record, key, {**usage, "model": str(output)})


def quantize_command(run: str, place: Workplace, environments: Path) -> tuple[Path, list[object]]:
    """The model that a run writes, and its command line; a third word of the run is what `--rest` says."""
    tool, method, *rest = run.split()
    precision = ["--rest", *(rest or ["fp16" if method == "fastest" else "fp32"])]
    output = place.file(run, ".onnx")
    if tool == "trtq" and method in ("deploy", "fastest"):
        folder = place.file(run, "")
        evaluation = ["--eval", place.eval, "--metric", place.metric]
        deploy = ["trtq", "deploy", place.fp32, "--data", place.calib, *evaluation, *precision, "-o", folder]
        deploy += ["--gpu", GPU] if method == "fastest" else []
        return folder / "model.int8.onnx", deploy
    if tool == "qdq":
        script = ROOT / "tools" / "qdq_everywhere.py"
        return output, [sys.executable, script, place.fp32, place.calib, output]
    if tool == "trtq":
        left = (
            layers_left_float(place.file("modelopt max", ".onnx")) if run == "trtq modelopts-layers" else []
        )
        method = "mse" if run == "trtq modelopts-layers" else method
        options = ["--data", place.calib, "--method", method, *(f"--exclude={name}" for name in left)]
        return output, ["trtq", "quantize", place.fp32, *options, *precision, "-o", output]
    worker = [install_peer(tool, environments), ROOT / "tools" / "peer_worker.py"]
    return output, [*worker, place.fp32, place.calib, tool, method, output, "--batch", CPU_BATCH]


def layers_left_float(model: Path) -> list[str]:
    """Names of the weighted nodes of a Q/DQ model that do not run in INT8."""
    from trtq.graph.model import load_model
    from trtq.graph.place import placed

    return [node.name for node in placed(load_model(model), None).nodes if not node.int8]


def run_measured(command: list[str], log: Path) -> dict[str, Any]:
    """Wall time, CPU time and peak resident memory of `command`, whose output goes to `log`.

    Meant for a fresh small process: a child starts with its parent's peak memory as its own.
    """
    import resource

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as empty_cache, open(log, "w") as file:
        environment = {**os.environ, "PATH": path, "TRTQ_CACHE": empty_cache}
        start = time.perf_counter()
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
        seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,  # Linux counts in KiB
        "exit_code": done.returncode,
    }


def tool_identity(run: str) -> object:
    """What must be the same for a kept result of `run` to hold."""
    if run.startswith(("trtq", "qdq")):
        sources = [*sorted((ROOT / "trtq").rglob("*.py")), ROOT / "tools" / "qdq_everywhere.py"]
        return [importlib.metadata.version("tensorrt_rtx"), *map(files.sha256_file, sources)]
    packages = PEER_PACKAGES[ENVIRONMENTS[run.split()[0]]]
    return [packages, files.sha256_file(ROOT / "tools" / "peer_worker.py")]


def read_record(path: Path, key: str) -> dict[str, Any] | None:
    """The value kept in `path` if it was written under `key`."""
    record = files.read_json(path, "kept result") if path.exists() else {}
    return record.get("value") if record.get("key") == key else None


def write_record(path: Path, key: str, value: dict[str, Any]) -> dict[str, Any]:
    files.write_json(path, {"key": key, "value": value})
    return value


def measure(run: str, model: Path, place: Workplace) -> dict[str, Any]:
    """Metric and SQNR of an ONNX model on the evaluation data, and what TensorRT-RTX makes of it."""
    from trtq.backends.engine import fingerprint
    from trtq.code_hash import code_sha256
    from trtq.data.load import load_samples
    from trtq.gate.metrics import load_metric
    from trtq.graph.model import load_model
    from trtq.simulation import similarity

    metric = load_metric(place.metric)
    identity = [files.sha256_file(path) for path in (place.fp32, model, place.eval)]
    builder = [importlib.metadata.version("tensorrt_rtx"), TARGET, ENGINE_BATCH]
    code = code_sha256("trtq.simulation.similarity", "trtq.gate.metrics", "trtq.backends.compiled")
    key = files.sha256_json([*identity, metric.fingerprint, fingerprint(model), *builder, code])
    record = place.file(run, ".measured.json")
    if kept := read_record(record, key):
        return kept
    say(f"{place.case.name}: measuring {run}")
    samples = load_samples(str(place.eval), load_model(place.fp32).inputs)
    reference, outputs = simulate(place.fp32, place.eval), simulate(model, place.eval)
    compared = similarity.compare(reference, outputs)
    value = {
        "metric": metric.value(outputs, dict(samples.targets), reference),
        "sqnr_db": min(similar.sqnr_db for similar in compared.values()),
        **describe_file(model),
        "engine": describe_engine(model, samples.row_shapes(), place.file(run, ".plan")),
    }
    return write_record(record, key, value)


def measure_half(run: str, place: Workplace, environments: Path) -> dict[str, Any]:
    """`measure` of a run with its floating-point part in float16, and `float32_nodes`; or the `error`."""
    from trtq.build import in_precision
    from trtq.data.load import load_samples
    from trtq.graph.model import load_model

    half = f"{run} fp16"
    if run == "fp32":
        fp32 = load_model(place.fp32)
        with in_precision(fp32, "fp16", load_samples(str(place.calib), fp32.inputs)) as model:
            return {**measure(half, model, place), "float32_nodes": count_float32(model)}
    row = quantize(half, place, environments)
    if "error" in row:
        return row
    model = Path(row["model"])
    return {**measure(half, model, place), "float32_nodes": count_float32(model)}


def count_float32(model: Path) -> int:
    """How many nodes of a float16 model write a float32 tensor: casts and Q/DQ around them do not count."""
    from trtq.graph.fold import fold
    from trtq.graph.model import load_model

    graph = load_model(model).graph
    fold(graph)
    around = ("Cast", "QuantizeLinear", "DequantizeLinear")
    return sum(
        any(tensor.dtype == np.float32 for tensor in node.outputs)
        for node in graph.nodes
        if node.op not in around
    )


@functools.lru_cache(maxsize=2)  # the fp32 model and the one compared with it
def simulate(model: Path, data: Path) -> Arrays:
    """The model's outputs on all rows of `data`, by ONNX Runtime with Q/DQ as written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    with np.load(data) as archive:
        inputs = {node.name: archive[node.name] for node in session.get_inputs()}
    rows = len(next(iter(inputs.values())))
    parts = [
        session.run(None, {name: array[start : start + CPU_BATCH] for name, array in inputs.items()})
        for start in range(0, rows, CPU_BATCH)
    ]
    names = [node.name for node in session.get_outputs()]
    return {name: np.concatenate(part) for name, part in zip(names, zip(*parts, strict=True), strict=True)}


def describe_file(model: Path) -> dict[str, Any]:
    """What a Q/DQ file holds: `layers`, how many of them are `int8`, and what is `unlike` TensorRT's INT8.

    A layer is a Conv, ConvTranspose, Gemm or MatMul; it is INT8 where both its factors are dequantized, maybe
    before an operator that only moves values.
    """
    import onnx

    graph = onnx.load(model).graph
    makers = {name: node for node in graph.node for name in node.output}
    values = {tensor.name: tensor for tensor in graph.initializer}
    values |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}

    def dequantized(name: str) -> bool:
        node = makers.get(name)
        while node is not None and node.op_type in MOVERS:
            node = makers.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    layers = [node for node in graph.node if node.op_type in LAYERS]
    unlike = collections.Counter[str]()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            # Without a zero point, QuantizeLinear writes uint8 and DequantizeLinear takes what it gets.
            zero = values.get(node.input[2]) if len(node.input) > 2 else None
            if zero is None:
                unlike["uint8"] += node.op_type == "QuantizeLinear"
                continue
            array = onnx.numpy_helper.to_array(zero)
            unlike[array.dtype.name] += array.dtype != np.int8
            unlike["zero points other than 0"] += bool(array.any())
    return {
        "layers": len(layers),
        "int8": sum(all(map(dequantized, node.input[:2])) for node in layers),
        "unlike": {what: count for what, count in unlike.items() if count},
    }


def describe_engine(model: Path, rows: Mapping[str, Sequence[tuple[int, ...]]], plan: Path) -> dict[str, Any]:
    """The engine TensorRT-RTX builds at a fixed batch: kernels, bytes, int8 MACs; or the `error`.

    Args:
        rows: input name -> the shape of each of its rows, all equal.
    """
    from trtq.backends import tensorrt_rtx
    from trtq.backends.compiled import int8_nodes
    from trtq.backends.interface import Range
    from trtq.graph.model import load_model, save_model
    from trtq.graph.products import macs
    from trtq.graph.shapes import concrete_shapes

    shapes = {name: (ENGINE_BATCH, *of_rows[0]) for name, of_rows in rows.items()}
    named = plan.with_suffix(".named.onnx")  # the engine's kernels are matched to nodes by name
    profile = {name: Range(shape, shape, shape) for name, shape in shapes.items()}
    try:
        graph = load_model(model).graph
        save_model(graph, named)
        compiled = tensorrt_rtx.build(named, plan, profile=profile, targets=[TARGET]).compiled
    except InputError as error:
        return {"error": f"{error.problem}: {error.cause}"}
    tensors = concrete_shapes(graph, shapes)
    work = {node.name: macs(node, tensors) or 0 for node in graph.nodes}
    int8 = sum(work[name] for name in int8_nodes(compiled.layers, work))
    return {
        "kernels": compiled.kernels,
        "bytes_moved": compiled.bytes_moved(),
        "int8_macs": int8 / sum(work.values()),
    }


def table(case: Case, rows: list[dict[str, Any]]) -> str:
    """The results of one model, aligned; `rows` begin with fp32, and errors follow below."""
    metric = case.metric.rpartition(":")[2]
    header = ["", metric, "drop", "SQNR dB", "s", "CPU s", "GB", "INT8 nodes", "kernels", "MB", "int8 MACs"]
    header += [f"fp16 {metric}", "fp16 SQNR dB", "float32 nodes"]
    lines = [header, *(table_row(row, rows[0]["metric"]) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [case.name]
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        text.append("  ".join(cells).rstrip())
    for row in rows:
        half = row.get("half", {})
        if unlike := row.get("unlike"):
            held = ", ".join(f"{count} of {what}" for what, count in unlike.items())
            text.append(f"{row['run']}: Q/DQ that TensorRT does not run as simulated: {held}")
        errors = {row["run"]: row.get("error") or row.get("engine", {}).get("error")}
        errors |= {f"{row['run']} fp16": half.get("error") or half.get("engine", {}).get("error")}
        text += [f"{run}: {' '.join(error.split())[:200]}" for run, error in errors.items() if error]
    return "\n".join(text)


def table_row(row: dict[str, Any], fp32: float) -> list[str]:
    quality = cost = engine = half = ["-", "-", "-"]
    covered = "-"
    if "metric" in row:
        drop = (fp32 - row["metric"]) / abs(fp32)
        quality = [f"{row['metric']:.4f}", f"{drop:.2%}", f"{row['sqnr_db']:.1f}"]
        covered = f"{row['int8']} of {row['layers']}"
    if "seconds" in row:
        cost = [f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}"]
    if "kernels" in row.get("engine", {}):
        built = row["engine"]
        engine = [str(built["kernels"]), f"{built['bytes_moved'] / 1e6:.1f}", f"{built['int8_macs']:.1%}"]
    if "metric" in (found := row.get("half", {})):
        half = [f"{found['metric']:.4f}", f"{found['sqnr_db']:.1f}", str(found["float32_nodes"])]
    return [row["run"], *quality, *cost, covered, *engine, *half]


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def compare(arguments: argparse.Namespace) -> None:
    """Run what is missing, print the tables and write `comparison.json`."""
    runs = arguments.runs or [run for run in RUNS if arguments.heavy or run not in HEAVY]
    environments = arguments.peers_env.absolute()
    results = {}
    for name in arguments.models:
        place = Workplace(MODELS[name], arguments.zoo.absolute(), arguments.work.absolute() / name)
        prepare_data(place, arguments.samples)
        rows = [{"run": "fp32", **measure("fp32", place.fp32, place)}]
        for run in runs:
            row = {"run": run, **quantize(run, place, environments)}
            rows.append(row if "error" in row else {**row, **measure(run, Path(row["model"]), place)})
        for row in rows:
            if row["run"] in ("fp32", *HALF):
                row["half"] = measure_half(row["run"], place, environments)
        results[name] = rows
        print(table(MODELS[name], rows), end="\n\n", flush=True)
    files.write_json(arguments.work / "comparison.json", results)


def zoo_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of a tool's options, the zoo among them."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    zoo = os.environ.get("TRTQ_ZOO")
    parser.add_argument("--zoo", type=Path, default=zoo, required=zoo is None, help="default: $TRTQ_ZOO")
    return parser


def main() -> None:
    parser = zoo_parser(__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="default: build/peers")
    parser.add_argument(
        "--peers-env",
        type=Path,
        default=ROOT / ".peers",
        help="their environments; default: .peers",
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runs", nargs="+", choices=RUNS, help="default: all, heavy ones only with --heavy")
    parser.add_argument(
        "--heavy", action="store_true", help=f"also {', '.join(HEAVY)}: 17 GB on EfficientNet"
    )
    parser.add_argument("--samples", type=int, help="rows of calibration data (default: all there are)")
    arguments = parser.parse_args()
    try:
        compare(arguments)
    except TrtqError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
