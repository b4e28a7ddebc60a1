"""Everything that only a GPU can show, measured with one command and written to one JSON file.

    python tools/gpu_check.py -o gpu_check.json
    python tools/gpu_check.py -o gpu_check.json --model M.onnx --data CALIB --eval EVAL --metric top1

For the demo model, and the model given, with every backend that is installed (each in a process of its own):
FP32, FP16 and INT8 engines; whether they load, for every target; latency; the engine's outputs against
the simulation's; the gate; the three-way report; on TensorRT up to 10 also implicit engines from a table
and from a calibrator. A step that fails records its exact message and the next one goes on. Without a GPU
the static part is filled in (engines, fp32 against simulation), and the file says that no engine was run.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trtq.backends import bench, tensorrt, tensorrt_rtx
from trtq.backends.builders import BUILDERS, builder
from trtq.backends.calibrators import data_calibrator, table_calibrator
from trtq.backends.device import clocks
from trtq.backends.dialect import dialect_of
from trtq.backends.engine import run_engine
from trtq.backends.interface import Build, Profile, find_gpu
from trtq.calibration.calibrate import calibrate
from trtq.calibration.table import Table
from trtq.console import SILENT
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.errors import TrtqError
from trtq.files import write_json
from trtq.gate.metrics import load_metric
from trtq.gate.tensors import compare_three
from trtq.gate.verdict import decide
from trtq.graph.model import Model, save_model
from trtq.graph.plan import Plan
from trtq.job import Job
from trtq.recipe import Recipe
from trtq.simulation.outputs import run_model
from trtq.simulation.similarity import compare

PACKAGES = ("trtq", "onnx", "onnxruntime", "polygraphy", "tensorrt", "tensorrt-rtx", "pycuda")
STATIC_TARGET = "8.6"
THREE_WAY_ROWS = 32
DEMO = Path(__file__).resolve().parents[1] / "trtq" / "demo"

Step = dict[str, Any]


def attempt(step: Callable[[], Any]) -> Step:
    """The step's result and how long it took, or its exact error."""
    started = time.perf_counter()
    try:
        outcome: Step = {"ok": True, "result": step()}
    except TrtqError as error:
        outcome = {"ok": False, "error": str(error)}
    except Exception as error:  # what a GPU machine throws is what this script is for
        outcome = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    return {**outcome, "seconds": round(time.perf_counter() - started, 2)}


class Check:
    """One model on one backend; `report` is written after every step, so that a crash loses one step."""

    def __init__(self, recipe: Recipe, backend: str, folder: Path, output: Path) -> None:
        self.recipe, self.backend, self.folder, self.output = recipe, backend, folder, output
        self.gpu = find_gpu()
        self.report: Step = {}

    def run(self) -> None:
        """All steps that are possible here."""
        self.step("quantize", self.quantize)
        if not self.report["quantize"]["ok"]:
            return
        self.step("static", self.static)
        self.step("three_way", self.three_way)
        if self.gpu is None:
            self.report["not_run"] = "there is no GPU here: no engine was run and nothing was timed"
            write_json(self.output, self.report)
            return
        if self.backend == tensorrt_rtx.NAME:
            targets = (*tensorrt_rtx.supported_targets(), tensorrt_rtx.CURRENT)
            for target in targets:
                self.step(f"target {target}", functools.partial(self.runs_for_target, target))
        self.step("latency", self.latency)
        self.step("engine_against_simulation", self.engine_against_simulation)
        self.step("gate", self.gate)
        if self.backend == tensorrt.NAME:
            self.step("implicit_from_table", self.implicit_from_table)
            self.step("implicit_from_calibrator", self.implicit_from_calibrator)

    def step(self, name: str, function: Callable[[], Any]) -> None:
        print(
            f"  {self.backend:<13}{Path(self.recipe.model or '').stem:<24}{name}", file=sys.stderr, flush=True
        )
        self.report[name] = attempt(function)
        write_json(self.output, self.report)

    def quantize(self) -> Step:
        """The INT8 model from the calibration data."""
        recipe = self.recipe
        assert recipe.eval is not None
        job = Job.open(recipe, SILENT)
        self.model: Model = job.model
        self.data: Samples = job.data
        self.samples: Samples = load_samples(recipe.eval, self.model.inputs, recipe.preprocess)
        self.profile: Profile = job.profile
        quantization = calibrate(job, job.place())
        self.plan: Plan = quantization.plan
        self.table: Table = Table.of(quantization)
        self.folded, self.int8 = self.folder / "model.folded.onnx", self.folder / "model.int8.onnx"
        save_model(self.model.graph, self.folded)
        save_model(quantization.rewritten(), self.int8)
        return {"method": self.table.metadata["method"], "int8_nodes": len(self.plan.int8_nodes)}

    def static(self) -> list[Step]:
        """The three engines, for this GPU or, without one, ahead of time."""
        targets = (STATIC_TARGET,) if self.gpu is None else ()
        builds = bench.build_three(
            self.model.path,
            self.int8,
            self.folder,
            backend=self.backend,
            profile=self.profile,
            targets=targets,
        )
        self.engines = [build.engine for build in builds.values()]
        return [r.to_json() for r in bench.benchmark(self.engines, on_gpu=False)]

    def build(self, target: str) -> Build:
        return builder(self.backend).build(
            self.int8, self.folder / "target.plan", profile=self.profile, targets=[target]
        )

    def runs_for_target(self, target: str) -> Step:
        """Whether an engine for this target loads and runs on this card."""
        engine = self.build(target).engine
        return {"p50_ms": bench.measure(engine, runs=50).p50_ms}

    def latency(self) -> Step:
        results = bench.benchmark(self.engines, on_gpu=True)
        return {"engines": [r.to_json() for r in results], "warning": bench.slower_than_float(results)}

    def engine_against_simulation(self) -> Step:
        """How far the INT8 engine's outputs are from the simulation's, per output."""
        engine = run_engine(self.engines[-1], self.samples).arrays
        simulation = run_model(self.int8, self.samples).arrays
        mismatch: Step = {}
        for name, similarity in compare(simulation, engine).items():
            classes = [arrays[name].argmax(axis=-1) for arrays in (simulation, engine)]
            mismatch[name] = {
                "sqnr_db": similarity.sqnr_db,
                "cosine": similarity.cosine,
                "max_abs_error": similarity.max_abs_error,
                "argmax_differs": float((classes[0] != classes[1]).mean()),
            }
        return mismatch

    def gate(self) -> Step:
        """The verdicts on fp32 against the engine and against the simulation."""
        assert self.recipe.metric is not None
        metric, verdicts = load_metric(self.recipe.metric), {}
        reference = run_model(self.folded, self.samples).arrays
        for outputs in (run_engine(self.engines[-1], self.samples), run_model(self.int8, self.samples)):
            verdict = decide(
                reference,
                outputs.arrays,
                dict(self.samples.targets),
                metric,
                max_drop=0.01,
                confidence=None,
                executor=outputs.executor,
            )
            verdicts[outputs.executor] = verdict.to_json()
        return verdicts

    def three_way(self) -> Step:
        rows = range(min(THREE_WAY_ROWS, len(self.samples)) // self.samples.group)
        return compare_three(
            self.folded, self.int8, self.samples.subset(list(rows)), backend=self.backend
        ).to_json()

    def implicit_from_table(self) -> Step:
        return self.implicit(functools.partial(table_calibrator, table=self.table))

    def implicit_from_calibrator(self) -> Step:
        calibrator = functools.partial(
            data_calibrator,
            algorithm="EntropyCalibration2",
            samples=self.data,
            model=self.model.sha256,
            batch_size=next((shapes.opt[0] for shapes in self.profile.values()), 1),
            cache=self.folder / "calibration.cache",
        )
        return self.implicit(calibrator)

    def implicit(self, calibrator: Callable[[Any], Any]) -> Step:
        """An implicitly quantized engine (TensorRT 10 and before): what it runs, and how fast."""
        excluded = [node.name for node in self.plan.nodes if not node.int8]
        built = tensorrt.build(
            self.folded,
            self.folder / "implicit.plan",
            profile=self.profile,
            implicit=tensorrt.Implicit(calibrator, excluded),
        )
        (result,) = bench.benchmark([built.engine], on_gpu=True)
        return {**result.to_json(), "warnings": built.warnings}


def environment() -> Step:
    """Machine, card, driver and versions."""
    gpu = find_gpu()
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        card = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        card = None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "gpu": {"name": gpu.name, "compute_capability": gpu.compute_capability} if gpu else None,
        "nvidia_smi": card,
        "clocks": clocks(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def version(package: str) -> str | None:
    """The installed version of a package, None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def dialect_name(backend: str) -> str:
    """Which version's ways the backend follows here."""
    builder(backend).version()
    return dialect_of(__import__(BUILDERS[backend])).name


def check_in_process(recipe_file: Path, backend: str) -> Step:
    """One model on one backend in a process of its own: a crash is recorded, not suffered."""
    with tempfile.TemporaryDirectory(prefix="trtq-") as folder:
        output = Path(folder) / "report.json"
        command = [
            sys.executable,
            __file__,
            "--recipe",
            str(recipe_file),
            "--backend",
            backend,
            "-o",
            str(output),
        ]
        process = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        report: Step = json.loads(output.read_text()) if output.exists() else {}
        if process.returncode:
            report["process"] = {"exit_code": process.returncode, "stderr": process.stderr[-4000:]}
        return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--model", help="another fp32 ONNX model, beside the demo's")
    parser.add_argument("--data", help="its calibration data")
    parser.add_argument("--eval", help="its evaluation data")
    parser.add_argument("--metric", default="top1")
    parser.add_argument("--method", default="auto", help="calibration method (default: auto)")
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--backend", choices=tuple(BUILDERS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.recipe:  # the process of one model on one backend
        with tempfile.TemporaryDirectory(prefix="trtq-") as folder:
            Check(Recipe.load(given.recipe), given.backend, Path(folder), given.output).run()
        return
    files = {"data": str(DEMO / "calib.npz"), "eval": str(DEMO / "eval.npz"), "metric": "top1"}
    recipes = {"demo": Recipe().merged({"model": str(DEMO / "digits.onnx"), "method": given.method, **files})}
    if given.model:
        named = {name: getattr(given, name) for name in ("model", "data", "eval", "metric", "method")}
        recipes[Path(given.model).stem] = Recipe().merged(named)
        recipes[Path(given.model).stem].need("data", "eval")
    report: Step = {"environment": environment(), "backends": {}}
    with tempfile.TemporaryDirectory(prefix="trtq-") as folder:
        for backend in BUILDERS:
            here = report["backends"][backend] = {"installed": attempt(lambda b=backend: dialect_name(b))}
            if not here["installed"]["ok"]:
                continue
            for name, recipe in recipes.items():
                recipe_file = Path(folder) / "recipe.toml"
                recipe_file.write_text(recipe.dumps())
                here[name] = check_in_process(recipe_file, backend)
                write_json(given.output, report)
    write_json(given.output, report)
    print(f"written to {given.output}")


if __name__ == "__main__":
    main()
