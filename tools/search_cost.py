"""What the measured choice of methods and ranges (`--method auto`) costs, and what it gains.

For each model of the zoo, on its calibration data, with an empty cache and in a process of its own:

    runs, passes     feeds run through sessions in all (statistics and the choice of the method included), and
                     their rows in passes over the calibration data
    CPU, / plain     CPU seconds in all, and by those of a plain fp32 pass over the calibration data (ONNX
                     Runtime's default session, the batch size that is fastest here)
    dB               SQNR of the outputs on evaluation rows, which the search never sees: with the best method
                     for all tensors, and with the ranges found
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
from compare_peers import CASES, zoo_parser
from sensitivity_cost import BATCH_SIZES, fastest, plain_passes, timed

from trtq.calibration.calibrate import FloatGraph, calibrate, statistics_of
from trtq.calibration.methods import parse_method, scales_from
from trtq.calibration.search import Rows
from trtq.console import SILENT
from trtq.data.batches import Arrays
from trtq.data.load import load_samples
from trtq.job import Job
from trtq.recipe import Recipe
from trtq.simulation.rows import Runner

STORED = {"ppocrv4_recognizer": "ppocr_rec", "ppocrv4_detector": "ppocr_det"}
"""Models whose data lie in the zoo as `trtq` reads them -> their folder."""

NAMES = (*CASES, *STORED)
EVALUATED = 200
"""Evaluation rows at most."""

HEADER = ["model", "rows", "tensors", "own", "runs", "passes", "CPU s", "/ plain", "dB before", "dB"]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The runs of all sessions meanwhile, and their rows."""
    counts, lock, run = Counter[str](), threading.Lock(), Runner.run

    def counting(self: Runner, feed: Arrays) -> Arrays:
        with lock:
            counts["runs"] += 1
            counts["rows"] += next(len(array) for array in feed.values() if array.ndim)
        return run(self, feed)

    Runner.run = counting  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        Runner.run = run  # type: ignore[method-assign]


def data_of(name: str, zoo: Path, part: str, folder: Path) -> str:
    """A file of a model's rows."""
    if name in STORED:
        return str(zoo / STORED[name] / f"{part}.npz")
    path = folder / f"{part}.npz"
    np.savez(path, **CASES[name].load(zoo, part))
    return str(path)


def measure(name: str, zoo: Path) -> list[str]:
    """The cells of a model."""
    with TemporaryDirectory(prefix="trtq-bench-") as temporary:
        folder = Path(temporary)
        calib = data_of(name, zoo, "calib", folder)
        recipe = Recipe(model=str(zoo / "models" / f"{name}.onnx"), data=calib, cache=str(folder / "cache"))
        job = Job.open(recipe, SILENT)
        plan = job.place()
        with counted() as counts:
            made, cost = timed(lambda: calibrate(job, plan))
        held_out = load_samples(data_of(name, zoo, "eval", folder), job.model.inputs, recipe.preprocess)
        rows = Rows(job.model.path, held_out.spread(EVALUATED))
        whole = statistics_of(job, plan.tensors, job.data, FloatGraph.of(job.model))
        same = replace(made, scales=scales_from(whole, parse_method(made.notes["method"])))
        decibels = [rows.sqnr_db(quantization, SILENT, "") for quantization in (same, made)]
        session = onnxruntime.InferenceSession(recipe.model, providers=["CPUExecutionProvider"])
        plain = fastest(plain_passes(session, job.data, list(BATCH_SIZES)))
    return [
        name,
        str(len(job.data)),
        str(len(plan.tensors)),
        str(len(made.notes["exceptions"])),
        str(counts["runs"]),
        f"{counts['rows'] / len(job.data):.1f}",
        f"{cost.cpu:.1f}",
        f"{cost.cpu / plain.cpu:.1f}",
        *(f"{value:.2f}" for value in decibels),
    ]


def main() -> None:
    """Measure the models that were asked for."""
    parser = zoo_parser(__doc__)
    parser.add_argument("models", nargs="*", default=list(NAMES), help=", ".join(NAMES))
    arguments = parser.parse_args()
    print(" | ".join(HEADER))
    for name in arguments.models:
        print(" | ".join(measure(name, arguments.zoo)), flush=True)


if __name__ == "__main__":
    main()
