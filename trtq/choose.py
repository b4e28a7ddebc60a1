"""`--method auto`: no calibration method wins everywhere (paper table 5), so try them and measure.

The ranges come from one part of the calibration data, the measurement from the part held back: the
signal-to-quantization-noise ratio of the model's outputs, which tells methods apart on a few dozen samples
where a task metric cannot, and needs no labels. The evaluation data are never looked at.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from trtq.cache import Cache
from trtq.calibration.methods import Method, parse_method
from trtq.calibration.statistics import Statistics
from trtq.console import Console
from trtq.data.samples import Samples
from trtq.evaluation import outputs_of
from trtq.gate.similarity import sqnr_db
from trtq.graph.model import Model, save_model
from trtq.graph.plan import Plan
from trtq.graph.rewrite import rewrite
from trtq.numerics import scale_from_amax

CANDIDATES = ("max", "entropy", "mse", "percentile:99.9", "percentile:99.99", "percentile:99.999")
"""The paper's candidates (section 6) and the least mean squared error."""


@dataclass(frozen=True)
class Choice:
    """What was tried.

    Attributes:
        method: the best one.
        sqnr_db: candidate -> SQNR of the outputs on the rows held back, averaged over outputs.
        rows: how many rows were held back.
        cached: whether nothing had to be run.
    """

    method: Method
    sqnr_db: Mapping[str, float]
    rows: int
    cached: bool


def scales_from(statistics: Statistics, method: Method) -> dict[str, np.float32]:
    """Tensor -> float32 scale (amax / 127) by one method."""
    return {
        name: np.float32(scale_from_amax(method.amax(histogram)))
        for name, histogram in statistics.histograms.items()
    }


def choose_method(
    model: Model,
    graph: gs.Graph,
    plan: Plan,
    statistics: Statistics,
    held_back: Samples,
    cache: Cache,
    console: Console,
    *,
    weights: str = "int8",
    threads: int | None = None,
) -> Choice:
    """The candidate with the best outputs on `held_back`; the earlier one if two are equal.

    Args:
        model: the fp32 model; its outputs are the reference.
        graph: the folded graph that `plan` is for, which may be in half.
        statistics: of rows that are not among `held_back`.
    """
    reference, cached = outputs_of(
        model.path, held_back, cache, console, label="fp32", sha256=model.sha256, threads=threads
    )
    scores: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="trtq-") as folder:
        for name in CANDIDATES:
            candidate = Path(folder) / "candidate.onnx"
            scales = scales_from(statistics, parse_method(name))
            save_model(rewrite(graph, plan, scales, weights=weights), candidate)
            outputs, known = outputs_of(candidate, held_back, cache, console, label=name, threads=threads)
            cached = cached and known
            scores[name] = float(
                np.mean([sqnr_db(r, outputs.arrays[n])[0] for n, r in reference.arrays.items()])
            )
    best = max(scores, key=scores.__getitem__)
    return Choice(parse_method(best), scores, len(held_back), cached)
