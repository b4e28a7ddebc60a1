"""Partial quantization against naive choices of layers, on the models of a zoo: what stays in floating point.

For each model the noise of the outputs has to fall by some decibels below that of plain calibration (all
layers INT8, `--method mse`, no fixes). Compared are trtq's search (`trtq.recovery.partial`); the first and
the last N layers; and a plain sensitivity ranking, the layers that make the most noise alone, N of them; each
with the smallest N that is enough. All choose on the same calibration rows; the SQNR in the last column is
measured on the evaluation rows.

    TRTQ_ZOO=<models and data> python tools/compare_partial.py [MODEL...] [--gain DB...]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from compare_peers import CASES, zoo_parser

from trtq import Recipe
from trtq.calibration.calibrate import calibrate
from trtq.console import SILENT
from trtq.gate.evaluation import Evaluation
from trtq.graph.groups import groups
from trtq.job import Job
from trtq.recovery.partial import Search


def compare(name: str, zoo: Path, gains: list[float]) -> None:
    """Print one model's table."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as scratch:
        for part in ("calib", "eval"):
            np.savez(Path(scratch) / f"{part}.npz", **case.load(zoo, part))
        recipe = Recipe(
            model=str(zoo / "models" / f"{name}.onnx"),
            data=f"{scratch}/calib.npz",
            eval=f"{scratch}/eval.npz",
            metric=str(zoo / case.metric) if ".py:" in case.metric else case.metric,
            method="mse",
            cache=f"{scratch}/cache",
        )
        job = Job.open(recipe, SILENT)
        evaluation = Evaluation.open(recipe, job.model.path, job.model.inputs, job.cache, SILENT)
        start = calibrate(job, job.place())
        search = Search(job, start, job.key("sensitivity", start))
        order = [group.name for group in groups(start.graph, start.plan)]
        ranking = sorted(order, key=lambda group: -search.alone[group])
        naive: dict[str, Callable[[int], frozenset[str]]] = {
            "first and last N": lambda n: frozenset([*order[: (n + 1) // 2], *order[len(order) - n // 2 :]]),
            "N most sensitive": lambda n: frozenset(ranking[:n]),
        }
        everything = search.noise(frozenset())
        print(f"\n{name}: {len(order)} groups of layers")
        print(f"{'gain':>6}  {'choice':<18} {'layers':>6} {'MACs in fp32':>13} {'eval SQNR dB':>13}")
        for gain in gains:
            ratio = 10 ** (-gain / 10)
            found = {"trtq": search.cheapest(ratio)}
            for label, choose in naive.items():
                enough = (n for n in range(len(order) + 1) if search.noise(choose(n)) <= ratio * everything)
                found[label] = search.leaving_out(choose(next(enough)))
            for label, quantization in found.items():
                plan = quantization.plan
                left = len(plan.nodes) - len(plan.int8_nodes)
                outputs = evaluation.simulated(quantization).outputs.values()
                quality = np.mean([output.sqnr_db for output in outputs])
                share = 1 - (plan.mac_share() or 0.0)
                print(f"{gain:>4.0f}dB  {label:<18} {left:>6} {share:>13.2%} {quality:>13.1f}", flush=True)


def main() -> None:
    parser = zoo_parser(__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--gain", type=float, nargs="+", default=[3.0, 6.0], metavar="DB")
    given = parser.parse_args()
    for name in given.models or CASES:
        compare(name, given.zoo, given.gain)


if __name__ == "__main__":
    main()
