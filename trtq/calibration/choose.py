"""`--method auto`: no calibration method wins everywhere (paper table 5), so try them and measure.

The ranges come from one part of the calibration data, the measurement from the part held back: the
signal-to-quantization-noise ratio of the model's outputs, which tells methods apart on a few dozen samples
where a task metric cannot, and needs no labels. The evaluation data are never looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trtq.cache import Cache
from trtq.calibration.methods import Method, parse_method
from trtq.calibration.statistics import Histogram, Statistics
from trtq.console import Console
from trtq.data.batches import Arrays
from trtq.data.samples import Samples
from trtq.gate.evaluation import candidate_of, outputs_of
from trtq.graph.quantization import Quantization
from trtq.numerics import has_scale, scale_from_amax
from trtq.simulation.finite import check_reference
from trtq.simulation.similarity import Reference

CANDIDATES = ("max", "entropy", "mse", "percentile:99.9", "percentile:99.99", "percentile:99.999")
"""The paper's candidates (section 6) and the least mean squared error."""


@dataclass(frozen=True)
class Choice:
    """What was tried.

    Attributes:
        method: the best one.
        sqnr_db: candidate -> SQNR of the outputs together on the rows held back.
        rows: how many rows were held back.
    """

    method: Method
    sqnr_db: Mapping[str, float]
    rows: int


def scales_from(
    statistics: Statistics, method: Method, exceptions: Mapping[str, Method] | None = None
) -> dict[str, np.float32]:
    """Tensor -> float32 scale (amax / 127) by one method, or by the tensor's own among `exceptions`.

    Tensors that no method has a range for are left out (see `amax_of`).
    """
    exceptions = exceptions or {}
    found = {
        name: amax_of(exceptions.get(name, method), histogram)
        for name, histogram in statistics.histograms.items()
    }
    return {name: np.float32(scale_from_amax(amax)) for name, amax in found.items() if has_scale(amax)}


def amax_of(method: Method, histogram: Histogram) -> float:
    """A method's amax; the largest |x| where the method keeps nothing but zeros, as a percentile of a tensor
    that is nearly always zero does. Only a tensor that never was anything else has no range then."""
    amax = method.amax(histogram)
    return amax if has_scale(amax) else histogram.amax


@dataclass(frozen=True)
class Measure:
    """Scores quantizations by the model's outputs on rows that nothing was made from.

    Attributes:
        model: the file of the fp32 model, whose outputs are the reference; `sha256` is its hash.
        rows: the rows held back.
        ignore_nonfinite: measure only where the reference is finite.
    """

    model: Path
    sha256: str
    rows: Samples
    cache: Cache
    console: Console
    threads: int | None = None
    ignore_nonfinite: bool = False

    def sqnr_db(self, quantization: Quantization, label: str) -> float:
        """SQNR of the quantized model's outputs together (see `similarity.Reference`).

        Raises:
            InputError: the model does not run on the rows, or its outputs are not finite in fp32.
        """
        reference = self._outputs(self.model, "fp32", self.sha256)
        check_reference(reference, ignore_nonfinite=self.ignore_nonfinite, samples=self.rows)
        with candidate_of(quantization) as candidate:
            outputs = self._outputs(candidate, label)
        return Reference([reference]).sqnr_db([outputs])

    def _outputs(self, model: Path, label: str, sha256: str | None = None) -> Arrays:
        outputs, _ = outputs_of(
            model, self.rows, self.cache, self.console, label=label, sha256=sha256, threads=self.threads
        )
        return outputs.arrays


def choose_method(measure: Measure, quantization: Quantization, statistics: Statistics) -> Choice:
    """The candidate with the best outputs on the rows held back; the earlier one if two are equal.

    Args:
        quantization: its scales are not looked at.
        statistics: of rows that are not among those held back.
    """

    def score(name: str) -> float:
        scales = scales_from(statistics, parse_method(name))
        return measure.sqnr_db(dataclasses.replace(quantization, scales=scales), name)

    scores = {name: score(name) for name in CANDIDATES}
    best = max(scores, key=scores.__getitem__)
    return Choice(parse_method(best), scores, len(measure.rows))
