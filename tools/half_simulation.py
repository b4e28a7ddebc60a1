"""The float16 simulation: what it costs, and how far it is from ONNX's reference implementation.

For each model of a zoo, in one run on one thread: the CPU time of a plain float32 pass and of the same model
in float16 (by the range rules), simulated; and for the first rows the distance of that simulation, and of
ONNX Runtime's own float16 session, from `onnx.reference`, which rounds every float16 tensor. The distance of
float16 from float32 stands beside it: what is to be seen.

    TRTQ_ZOO=<models and data> python tools/half_simulation.py [MODEL...] [--rows N] [--reference-rows N]
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import onnx.reference
import onnx.reference.op_run
import onnxruntime
from compare_peers import CASES, zoo_parser
from numpy.typing import NDArray

from trtq.calibration.extents import measure_extents
from trtq.data.batches import Arrays
from trtq.data.samples import Samples
from trtq.graph.fold import fold
from trtq.graph.half_rules import float32_nodes, half_by_rules
from trtq.graph.model import FP16_SCALE_OPSET, export, load_model
from trtq.graph.plan import Plan
from trtq.simulation.session import simulation_session


class GatherElements(onnx.reference.op_run.OpRun):
    """onnx.reference's own stops at 64 elements."""

    op_domain = ""

    def _run(self, data: NDArray, indices: NDArray, axis: int = 0) -> tuple[NDArray]:
        return (np.take_along_axis(data, indices, axis),)


Run = Callable[[Arrays], list[NDArray]]


def first_rows(name: str, zoo: Path, count: int) -> Samples:
    """Calibration rows of a model of the zoo."""
    case = CASES[name]
    inputs = load_model(zoo / "models" / f"{name}.onnx").inputs
    arrays = {key: array[:count] for key, array in case.load(zoo, "calib").items() if key != case.target}
    return Samples("zoo", tuple(inputs), arrays, {}, name)


def seconds_per_row(run: Run, feeds: list[Arrays]) -> float:
    """Least CPU time of three passes over the feeds, divided by their number; other jobs do not add to it."""
    run(feeds[0])
    times = []
    for _ in range(3):
        started = time.process_time()
        for feed in feeds:
            run(feed)
        times.append(time.process_time() - started)
    return min(times) / len(feeds)


def distance_db(reference: list[list[NDArray]], candidate: list[list[NDArray]]) -> str:
    """SQNR of all rows and outputs together; says so where one side is finite and the other is not."""
    signal = noise = 0.0
    for expected, found in zip(chain(*reference), chain(*candidate), strict=True):
        if not np.array_equal(np.isfinite(expected), np.isfinite(found)):
            return "not finite"
        finite = np.isfinite(expected)
        e, f = expected[finite].astype(np.float64), found[finite].astype(np.float64)
        signal, noise = signal + (e**2).sum(), noise + ((e - f) ** 2).sum()
    return f"{10 * np.log10(signal / noise):.1f}" if noise else "equal"


def compare(name: str, zoo: Path, rows: int, reference_rows: int) -> None:
    """Print one model's line."""
    model = load_model(zoo / "models" / f"{name}.onnx", opset=FP16_SCALE_OPSET)
    fold(model.graph)
    samples = first_rows(name, zoo, rows)
    feeds = [batch.feed for batch in samples.batches()]
    extents = measure_extents(model.graph, samples)
    kept = float32_nodes(model.graph, Plan("", [], [], []), {}, extents)
    single, half = export(model.graph), export(half_by_rules(model.graph, extents))
    plain, simulated = (simulation_session(m.SerializeToString(), threads=1) for m in (single, half))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    naive = onnxruntime.InferenceSession(
        half.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    few = feeds[:reference_rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = onnx.reference.ReferenceEvaluator(half, new_ops=[GatherElements])
        truth = [reference.run(None, feed) for feed in few]
    before, after = (
        seconds_per_row(lambda feed, s=session: s.run(None, feed), feeds) for session in (plain, simulated)
    )
    distances = [
        distance_db(truth, [session.run(None, feed) for feed in few]) for session in (simulated, naive, plain)
    ]
    print(
        f"{name:<20} {1e3 * before:9.1f} {1e3 * after:9.1f} {after / before:6.2f} {len(kept):8}"
        f" {distances[0]:>10} {distances[1]:>12} {distances[2]:>8}"
    )


def main() -> None:
    parser = zoo_parser(__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(CASES))
    parser.add_argument("--rows", type=int, default=16, help="rows that are timed (16)")
    parser.add_argument("--reference-rows", type=int, default=1, help="rows for onnx.reference (1)")
    given = parser.parse_args()
    print(
        f"{'model':<20} {'fp32 ms':>9} {'half ms':>9} {'ratio':>6} {'float32':>8}"
        f" {'simulated':>10} {'ONNX Runtime':>12} {'fp32':>8}"
    )
    for name in given.models or CASES:
        compare(name, given.zoo, given.rows, given.reference_rows)


if __name__ == "__main__":
    main()
