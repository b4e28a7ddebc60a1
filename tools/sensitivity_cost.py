"""What the sensitivity analysis costs in plain fp32 passes, and how well the fast ranking agrees with it.

For each model of the zoo, on its calibration data and in one run:

    plain pass       seconds that ONNX Runtime needs for all rows of the fp32 model as a user runs it: its
                     default session on all cores, at the batch size that is fastest here
    passes / group   seconds of the whole analysis (model building and scoring included) / number of groups /
                     seconds of a plain pass
    fast             the same measurement on few rows: plain passes that it costs in all, Spearman's rank
                     correlation of its noise with the exact one's, and how many of the exact one's first
                     5 and 10 groups are among its own

Plain passes are timed before, between and after the analyses, and the fastest counts, so that what else the
machine does weighs against the analyses and not for them. CPU seconds are given beside wall-clock seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnxruntime
from compare_peers import CASES, zoo_parser

from trtq.calibration.collect import collect
from trtq.calibration.methods import parse_method, scales_from
from trtq.data.batches import batches
from trtq.data.samples import Samples
from trtq.graph.fold import fold
from trtq.graph.groups import groups
from trtq.graph.model import load_model
from trtq.graph.place import place
from trtq.graph.quantization import Quantization
from trtq.recovery.sensitivity import fast_rows
from trtq.simulation.simulator import Effect, Mode, Simulator

BATCH_SIZES = (1, 4, 16, 64)
COLUMNS = (
    "model             groups rows  plain pass s (CPU)  only: passes / group (CPU)"
    "  all but one (CPU)  fast: rows passes (CPU)  Spearman  top 5  top 10"
)

T = TypeVar("T")


@dataclass(frozen=True)
class Seconds:
    """Wall-clock and CPU time of something."""

    wall: float
    cpu: float

    def per(self, other: Seconds, count: int = 1) -> str:
        """This as a multiple of `count` times another."""
        return f"{self.wall / other.wall / count:.2f} ({self.cpu / other.cpu / count:.2f})"


def timed(function: Callable[[], T]) -> tuple[T, Seconds]:
    """What a function returns, and its time."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def fastest(times: list[Seconds]) -> Seconds:
    """The least wall-clock and the least CPU time."""
    return Seconds(min(t.wall for t in times), min(t.cpu for t in times))


def plain_passes(session: onnxruntime.InferenceSession, samples: Samples, sizes: list[int]) -> list[Seconds]:
    """A pass over all rows in each of several batch sizes."""
    times = []
    for size in sizes:
        feeds = [batch.feed for batch in batches(samples.rows(), size)]
        times.append(timed(lambda feeds=feeds: [session.run(None, feed) for feed in feeds])[1])
    return times


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation of two lists without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def recall(exact: list[float], fast: list[float], count: int) -> float:
    """Share of the `count` highest of `exact` that are among the highest of `fast`."""
    first = [set(np.argsort(values)[::-1][:count].tolist()) for values in (exact, fast)]
    return len(first[0] & first[1]) / count


def measure(name: str, zoo: Path, rows: int | None) -> str:
    """A line of the table."""
    model = load_model(zoo / "models" / f"{name}.onnx")
    fold(model.graph)
    arrays = CASES[name].load(zoo, "calib")
    columns = {spec.name: arrays[spec.name] for spec in model.inputs}
    samples = Samples(name, tuple(model.inputs), columns, {}, name)
    samples = samples.spread(rows or len(samples))
    plan = place(model)
    statistics = collect(model.graph, plan.tensors, samples)
    quantization = Quantization(model.graph, plan, scales_from(statistics, parse_method("mse")))
    count = len(groups(model.graph, plan))
    few = samples.spread(fast_rows(len(samples), count))
    session = onnxruntime.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    by_size = plain_passes(session, samples, list(BATCH_SIZES))
    best = BATCH_SIZES[min(range(len(by_size)), key=lambda i: by_size[i].wall)]
    plain = list(by_size)

    def analysis(rows: Samples, mode: Mode) -> tuple[list[Effect], Seconds]:
        result = timed(lambda: list(Simulator(quantization, rows).effects(mode)))
        plain.extend(plain_passes(session, samples, [best]))
        return result

    exact, only = analysis(samples, "only")
    _, all_but = analysis(samples, "all-but")
    ranking, fast = analysis(few, "only")
    one = fastest(plain)
    noises = [[effect.noise for effect in effects] for effects in (exact, ranking)]
    return (
        f"{name:<18}{count:>6}{len(samples):>5}  {one.wall:>10.2f} ({one.cpu:.2f})"
        f"  {only.per(one, count):>26}  {all_but.per(one, count):>17}"
        f"  {len(few):>10} {fast.per(one):>12}  {spearman(*noises):>8.3f}"
        f"  {recall(*noises, 5):>5.1f}  {recall(*noises, 10):>6.1f}"
    )


def main() -> None:
    """Measure the models that were asked for."""
    parser = zoo_parser(__doc__)
    parser.add_argument("--rows", type=int, help="rows to measure on; default: all calibration rows")
    parser.add_argument("models", nargs="*", default=list(CASES), help=", ".join(CASES))
    arguments = parser.parse_args()
    print(COLUMNS)
    for name in arguments.models:
        print(measure(name, arguments.zoo, arguments.rows), flush=True)


if __name__ == "__main__":
    main()
