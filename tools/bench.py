"""What calibration, thresholds, sensitivity and big models cost, measured in one run.

    TRTQ_ZOO=<models and data> python tools/bench.py --markdown bench.md      for RESULTS.md, its first part
    python tools/bench.py --sections speed thresholds        a part of it

speed        Statistics for all methods against the plain pass: ONNX Runtime's default session on all cores,
             at the batch size that is fastest here, over the same rows in memory. Both are timed in turns,
             and the least of each counts; CPU seconds are in parentheses. The second figure is the command
             `trtq calibrate`, from its start to the table, data read and hashed, by the same plain pass.
memory       Peak resident memory of that command, as the operating system gives it, for growing data.
sharding     That command in one process, in two (loky), and on a local Dask cluster of two workers: seconds,
             and whether the calibration table is the same to the byte.
thresholds   Every method for 500 tensors, from statistics of real models.
search       See search_cost.py.
sensitivity  See sensitivity_cost.py.
big          See big_model.py.

Each measurement has a process of its own. The zoo is described in compare_peers.py.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

import big_model
import distributed
import numpy as np
import onnxruntime
import search_cost
import sensitivity_cost
from compare_peers import CASES, zoo_parser
from sensitivity_cost import BATCH_SIZES, fastest, plain_passes, timed

from trtq.calibration.collect import collect
from trtq.calibration.methods import parse_method
from trtq.calibration.statistics import Histogram
from trtq.data.samples import Samples
from trtq.files import write_text
from trtq.graph.fold import fold
from trtq.graph.model import Model, load_model
from trtq.graph.place import place

TURNS = 3
METHODS = ("max", "percentile:99.9", "percentile:99.99", "percentile:99.999", "entropy", "mse")
TENSORS = 500
EFFICIENTNET, MINILM = "efficientnet_lite0", "minilm_l6"
PACKAGES = ("trtq", "numpy", "numba", "onnxruntime")
RECIPE = '[preprocess.input]\nscale = "1/255"\nmean = [0.498]\nstd = [0.502]\nlayout = "NCHW"\n'

P = ParamSpec("P")
T = TypeVar("T")


def alone(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """A function's result, from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def opened(name: str, zoo: Path, rows: int) -> tuple[Model, Samples]:
    """A folded model, and its calibration rows in memory, repeated to the number of rows."""
    model = load_model(zoo / "models" / f"{name}.onnx")
    fold(model.graph)
    arrays = CASES[name].load(zoo, "calib")
    columns = {
        spec.name: np.resize(arrays[spec.name], (rows, *arrays[spec.name].shape[1:])) for spec in model.inputs
    }
    return model, Samples(name, tuple(model.inputs), columns, {}, name)


def calibrate(name: str, zoo: Path, rows: int, *more: str) -> tuple[big_model.Cost, bytes]:
    """What `trtq calibrate` takes, and the table that it writes; images are decoded as they are read."""
    with tempfile.TemporaryDirectory(prefix="trtq-bench-") as temporary:
        folder = Path(temporary)
        recipe, data = folder / "recipe.toml", folder / "calib.npz"
        if name == EFFICIENTNET:
            recipe.write_text(RECIPE)
            data = folder / "calib.csv"
            (folder / "calib").symlink_to((zoo / "imagenet_sample" / "calib").resolve())
            with (zoo / "imagenet_sample" / "calib.csv").open(newline="") as file:
                files = [row["file"] for row in csv.DictReader(file)]
            data.write_text("\n".join(["file", *itertools.islice(itertools.cycle(files), rows), ""]))
        else:
            recipe.touch()
            _, samples = opened(name, zoo, rows)
            np.savez(data, **samples.columns)
        options = ("--recipe", recipe, "--method", "mse", "--cache", folder / "cache", "--quiet")
        command = (sys.executable, "-m", "trtq", "calibrate", zoo / "models" / f"{name}.onnx", "--data", data)
        cost = big_model.measure(*command, *options, *more, "-o", folder / "table.cache")
        return cost, (folder / "table.cache").read_bytes()


def speed_row(name: str, zoo: Path, rows: int) -> tuple[list[str], float]:
    """The cells of a collection against its plain pass, and the seconds of the latter."""
    model, samples = opened(name, zoo, rows)
    tensors = place(model).tensors
    session = onnxruntime.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    by_size = plain_passes(session, samples, list(BATCH_SIZES))
    best = BATCH_SIZES[min(range(len(by_size)), key=lambda i: by_size[i].wall)]
    collect(model.graph, tensors, samples.subset(range(4)))  # numba reads its cache
    plain, collected = list(by_size), []
    for _ in range(TURNS):
        plain += plain_passes(session, samples, [best])
        collected.append(timed(lambda: collect(model.graph, tensors, samples))[1])
    one, all_methods = fastest(plain), fastest(collected)
    cells = [
        name,
        str(rows),
        f"{one.wall:.2f} ({one.cpu:.2f})",
        f"{all_methods.wall:.2f} ({all_methods.cpu:.2f})",
    ]
    return [*cells, f"**{all_methods.wall / one.wall:.2f}** ({all_methods.cpu / one.cpu:.2f})"], one.wall


def speed(arguments: argparse.Namespace) -> str:
    """Collecting, and the whole command, in plain passes."""
    lines = []
    for name, rows in ((EFFICIENTNET, 100), (EFFICIENTNET, 200), (MINILM, 128)):
        cells, plain = alone(speed_row, name, arguments.zoo, rows)
        seconds = min(calibrate(name, arguments.zoo, rows)[0].seconds for _ in range(2))
        lines.append([*cells, f"{seconds:.2f}", f"{seconds / plain:.1f}"])
    header = ["model", "rows", "plain pass s (CPU)", "collect s (CPU)", "collect / plain (CPU)"]
    return table([*header, "`trtq calibrate` s", "/ plain"], lines)


def memory(arguments: argparse.Namespace) -> str:
    """Peak memory of the whole command for growing data."""
    model = arguments.zoo / "models" / f"{EFFICIENTNET}.onnx"
    lines = []
    for rows in arguments.rows:
        cost, _ = calibrate(EFFICIENTNET, arguments.zoo, rows)
        above = cost.peak - model.stat().st_size
        lines.append(
            [EFFICIENTNET, str(rows), f"{cost.peak / 1e6:.0f}", f"{above / 1e6:.0f}", f"{cost.seconds:.0f}"]
        )
    return table(["model", "rows", "peak MB", "without the model's file", "s"], lines)


def sharding(arguments: argparse.Namespace) -> str:
    """The whole command in shards, by where they run."""
    lines, rows = [], arguments.rows[min(1, len(arguments.rows) - 1)]
    single, table_of_one = calibrate(EFFICIENTNET, arguments.zoo, rows)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        address = cluster.scheduler_address.removeprefix("tcp://")
        for where in ("loky:2", f"dask://{address}"):
            cost, written = calibrate(EFFICIENTNET, arguments.zoo, rows, "--parallel", where)
            same = "the same" if written == table_of_one else "**another**"
            name = where.partition(":")[0]
            lines.append([name, f"{cost.seconds:.1f}", f"{cost.seconds / single.seconds:.2f}", same])
    header = [f"{EFFICIENTNET}, {rows} rows", "s", "/ one process", "table"]
    return table(header, [["one process", f"{single.seconds:.1f}", "1.00", ""], *lines])


def threshold_seconds(zoo: Path) -> dict[str, float]:
    """Method -> CPU seconds for `TENSORS` histograms."""
    histograms: list[Histogram] = []
    for name in (EFFICIENTNET, MINILM):
        model, samples = opened(name, zoo, 16)
        histograms += collect(model.graph, place(model).tensors, samples).histograms.values()
    tensors = list(itertools.islice(itertools.cycle(histograms), TENSORS))
    amax = {method: parse_method(method).amax for method in METHODS}
    return {method: timed(lambda f=f: [f(tensor) for tensor in tensors])[1].cpu for method, f in amax.items()}


def thresholds(arguments: argparse.Namespace) -> str:
    """Every method on many tensors."""
    seconds = alone(threshold_seconds, arguments.zoo)
    lines = [[method, f"{value:.2f}"] for method, value in seconds.items()]
    return table([f"{TENSORS} tensors", "CPU s"], [*lines, ["all", f"**{sum(seconds.values()):.2f}**"]])


def search(arguments: argparse.Namespace) -> str:
    """The lines of search_cost.py."""
    lines = [alone(search_cost.measure, name, arguments.zoo) for name in search_cost.NAMES]
    return table(search_cost.HEADER, lines)


def sensitivity(arguments: argparse.Namespace) -> str:
    """The lines of sensitivity_cost.py."""
    lines = [alone(sensitivity_cost.measure, name, arguments.zoo, None) for name in CASES]
    return "\n".join(["```", sensitivity_cost.COLUMNS, *lines, "```"])


def big(_: argparse.Namespace) -> str:
    """The output of big_model.py."""
    command = [sys.executable, big_model.__file__]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


SECTIONS: dict[str, tuple[str, Callable[[argparse.Namespace], str]]] = {
    "speed": ("Calibration against the plain fp32 pass", speed),
    "memory": ("Memory of calibration", memory),
    "sharding": ("Two worker processes", sharding),
    "thresholds": ("Choosing thresholds", thresholds),
    "search": ("The measured choice of methods and ranges", search),
    "sensitivity": ("Sensitivity in plain passes", sensitivity),
    "big": ("Big models", big),
}
"""Name -> title, and the function that measures it and gives its text in Markdown."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: text first, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [header, rule, *rows]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def machine() -> str:
    """Processor, memory, load and versions, in a line each."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(
        (line.partition(": ")[2] for line in info if line.startswith("model name")), platform.machine()
    )
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return (
        f"{processor}, {os.cpu_count()} cores, {size:.0f} GB; load {os.getloadavg()[0]:.1f} at the start.\n"
        f"Python {platform.python_version()}, {versions}."
    )


def main() -> None:
    parser = zoo_parser(__doc__)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 1000, 10000], help="for `memory`")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report there, too")
    arguments = parser.parse_args()
    report = [f"# Measured by `tools/bench.py`, {time.strftime('%Y-%m-%d')}", machine()]
    print(*report, sep="\n\n", flush=True)
    for name in arguments.sections:
        title, measure = SECTIONS[name]
        report.append(f"## {title}\n\n{measure(arguments)}")
        print(f"\n{report[-1]}", flush=True)
    if arguments.markdown:
        write_text(arguments.markdown, "\n\n".join(report) + "\n")


if __name__ == "__main__":
    main()
