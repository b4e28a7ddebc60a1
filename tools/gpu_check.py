"""Everything that only a GPU can show, for a machine that is had for minutes: prepared here, run there.

    python tools/gpu_check.py --prepare DIR [--recipe FILE.toml]...     DIR and DIR.tar.xz; needs no GPU
    python tools/gpu_check.py --run DIR.tar.xz -o OUT [--only WORD]...  there: writes OUT/gpu_check.json

Prepared are the demo and the model of each recipe (`model`, `data`, `eval`, `metric`, ...): in FP32, FP16,
INT8, and INT8 with the rest in FP16, as ONNX models and as plans of TensorRT for RTX; rows to evaluate with
what the simulation makes of them here; and operands of integer products. Of a model above `LARGEST` bytes
only the products are kept.

Each step runs in a process of its own under a time limit, the most valuable ones first. The report is written
anew after every step. What is not installed there is skipped, and the report says so. `trtq` need not be
installed: PYTHONPATH is enough.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import gpu_steps
import numpy as np
from integer_products import integer_products

from trtq.backends import tensorrt_rtx
from trtq.calibration.calibrate import calibrate
from trtq.calibration.table import Table
from trtq.console import SILENT
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.errors import TrtqError
from trtq.files import write_json
from trtq.graph.fold import fold
from trtq.graph.half_rules import half_by_rules
from trtq.graph.model import FP16_SCALE_OPSET, load_model, save_model
from trtq.graph.quantization import Quantization
from trtq.job import Job
from trtq.recipe import Recipe
from trtq.simulation.outputs import run_model

DEMO = Path(__file__).resolve().parents[1] / "trtq" / "demo"
EVALUATED, CALIBRATED = 128, 32
"""Rows that are taken along."""

LARGEST = 4_000_000
LIMIT_S = 45


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prepare", type=Path, metavar="DIR")
    what.add_argument("--run", type=Path, metavar="ARCHIVE", help="or the folder that it was made of")
    what.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, metavar="OUT")
    parser.add_argument("--recipe", type=Path, action="append", default=[], metavar="FILE.toml")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="steps with it in the name"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="S", help=f"for each step ({LIMIT_S})"
    )
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.prepare:
        prepare(given.prepare, given.recipe)
    elif given.run:
        output = given.output or Path("gpu_check")
        run(unpacked(given.run.resolve(), output), output, given.only, given.limit)
    else:
        write_json(given.output, outcome(given.step, given.folder))


# --- there ------------------------------------------------------------------------------------------------


def unpacked(prepared: Path, output: Path) -> Path:
    """The folder of what was prepared; an archive is unpacked beside the output."""
    if prepared.is_dir():
        return prepared
    folder = output.resolve().with_name(f"{output.name}.prepared")
    with tarfile.open(prepared) as file:
        file.extractall(folder)
    return folder


def run(folder: Path, output: Path, only: list[str], limit: float) -> None:
    """All steps, one after the other; the report is whole after each."""
    output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    for name in gpu_steps.steps(folder):
        if only and not any(word in name for word in only):
            continue
        report[name] = in_process(name, folder, limit)
        write_json(output / "gpu_check.json", report)
        print(f"{name}: {summary(report[name])}", flush=True)


def in_process(name: str, folder: Path, limit: float) -> dict[str, Any]:
    """A step in a process of its own: a crash or a hang is recorded, not suffered."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="trtq-") as temporary:
        result, log = Path(temporary) / "result.json", Path(temporary) / "log"
        command = [sys.executable, __file__, "--step", name, "--folder", str(folder), "-o", str(result)]
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
            try:
                code: int | str = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = f"stopped after {limit:g} s"
        found = json.loads(result.read_text()) if result.exists() else {"ok": False}
        said = log.read_text(errors="replace").strip()
    found |= {"seconds": round(time.perf_counter() - started, 1)}
    return found | ({"exit": code} if code else {}) | ({"log": said[-4000:]} if said else {})


def outcome(name: str, folder: Path) -> dict[str, Any]:
    """What a step gives, why it was skipped, or its exact error."""
    try:
        return {"ok": True, "result": gpu_steps.steps(folder)[name]()}
    except gpu_steps.Skipped as reason:
        return {"ok": None, "skipped": str(reason)}
    except TrtqError as error:
        return {"ok": False, "error": str(error), "exit_code": int(error.exit_code)}
    except Exception:  # what a GPU machine throws is what this script is for
        return {"ok": False, "error": traceback.format_exc()}


def summary(found: dict[str, Any]) -> str:
    """A step in a line."""
    if found["ok"] is None:
        text = f"skipped, {found['skipped']}"
    elif found["ok"]:
        text = json.dumps(found["result"])
    else:
        text = f"FAILED {found.get('exit', '')} {found.get('error', '')[-300:]} {found.get('log', '')[-300:]}"
    return f"{text[:900]}  [{found['seconds']} s]"


# --- here -------------------------------------------------------------------------------------------------


def prepare(folder: Path, recipes: list[Path]) -> None:
    """Everything that `run` needs, of the demo and of each recipe's model."""
    demo = {"model": str(DEMO / "digits.onnx"), "data": str(DEMO / "calib.npz"), "method": "max"}
    jobs = {"demo": Recipe().merged({**demo, "eval": str(DEMO / "eval.npz"), "metric": "top1"})}
    jobs |= {path.stem: Recipe.load(path) for path in recipes}
    for name, recipe in jobs.items():
        print(name, flush=True)
        prepare_model(recipe, folder / name)
    build_plans_for_each_gpu(folder / "demo")
    archive = folder.with_name(f"{folder.name}.tar.xz")
    with tarfile.open(archive, "w:xz", preset=9) as file:
        file.add(folder, ".")
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB")


def prepare_model(recipe: Recipe, folder: Path) -> None:
    """The files of one model."""
    folder.mkdir(parents=True, exist_ok=True)
    job = Job.open(recipe, SILENT)
    quantization = calibrate(job, job.place())
    rows = load_samples(recipe.require("eval", "metric").eval, job.model.inputs, recipe.preprocess)
    rows = rows.subset(range(min(EVALUATED, len(rows)) // rows.group))
    int8 = folder / "int8.onnx"
    save_model(quantization.rewritten(), int8)
    np.savez_compressed(folder / "products.npz", **integer_products(int8, rows))
    if int8.stat().st_size > LARGEST:
        int8.unlink()
        return
    save_models(job, quantization, folder)
    for name, samples, count in (("eval", rows, EVALUATED), ("calib", job.data, CALIBRATED)):
        save_rows(samples.subset(range(min(count, len(samples)) // samples.group)), folder / f"{name}.npz")
    for name in ("fp32", "int8"):
        np.savez_compressed(folder / f"{name}.outputs.npz", **run_model(folder / f"{name}.onnx", rows).arrays)
    Table.of(quantization).save(folder / "table.cache")
    (folder / "quantization.npz").write_bytes(quantization.to_bytes())
    excluded = [node.name for node in quantization.plan.nodes if not node.int8]
    write_json(
        folder / "about.json",
        {
            "metric": recipe.metric,
            "profile": {name: [list(shape) for shape in shapes] for name, shapes in job.profile.items()},
            "floating_point": excluded,
        },
    )
    for precision in gpu_steps.PRECISIONS:
        build_plan(folder, precision)


def save_models(job: Job, quantization: Quantization, folder: Path) -> None:
    """The model in each of `gpu_steps.PRECISIONS`."""
    save_model(quantization.rewritten(rest="fp16"), folder / "int8-fp16.onnx")
    graph = load_model(job.model.path, opset=FP16_SCALE_OPSET).graph
    fold(graph)
    save_model(graph, folder / "fp32.onnx")
    save_model(half_by_rules(graph, {}), folder / "fp16.onnx")


def build_plans_for_each_gpu(folder: Path) -> None:
    """The INT8 model for each GPU that TensorRT for RTX knows, to see which of them load."""
    for target in tensorrt_rtx.supported_targets():
        build_plan(folder, "int8", target)


def build_plan(folder: Path, precision: str, target: str | None = None) -> None:
    """A plan of TensorRT for RTX, for one GPU or for the builder's default ones."""
    plan = folder / f"{precision}.{target or 'default'}.plan"
    targets = () if target is None else (target,)
    model, profile = folder / f"{precision}.onnx", gpu_steps.profile_of(folder)
    try:
        tensorrt_rtx.build(model, plan, profile=profile, targets=targets)
    except TrtqError as error:
        print(f"  no {plan.name}: {error.cause}")


def save_rows(samples: Samples, path: Path) -> None:
    """Rows as the model takes them, and targets, as a `.npz` for `trtq`."""
    inputs = {spec.name: np.concatenate([row[spec.name] for row in samples.rows()]) for spec in samples.specs}
    np.savez_compressed(path, **inputs, **dict(samples.targets))


if __name__ == "__main__":
    main()
