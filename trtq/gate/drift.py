"""Whether the calibration data look like the evaluation data: if so, a quantization does as well on both.

It is run on the calibration rows held back, by whatever the gate ran it with, and the SQNR of its outputs
compared with the verdict's. Ranges fit the data they were made from: where the evaluation's inputs are scaled
otherwise, or show something else, the figures differ by tens of decibels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtq.data.samples import Samples
from trtq.gate.evaluation import Evaluation, outputs_of
from trtq.gate.verdict import Verdict
from trtq.job import Job
from trtq.simulation.finite import all_compared, check_reference
from trtq.simulation.similarity import Similarity, compare, overall_sqnr_db, scored
from trtq.simulation.values import AllValues, Values, take_all

LEAST_GAP_DB = 6.0
"""Figures closer than this are alike: what two parts of one data set differ by mostly stays below it."""

LEAST_DEVIATIONS = 3.0
"""Figures of single rows are alike where their ranks are within this many standard deviations of chance."""

MOST_ROWS = 64
"""Rows of each data set whose own figures are looked at, evenly spread over them."""

MOST_INPUTS = 4
"""Inputs whose values are described."""


class Spread(NamedTuple):
    """The values of an input over all rows."""

    low: float
    high: float
    mean: float

    def __str__(self) -> str:
        return f"{self.low:.4g} to {self.high:.4g}, mean {self.mean:.4g}"


def gap(
    job: Job, evaluation: Evaluation, verdict: Verdict, candidate: Path, seen: float | None = None
) -> str | None:
    """What to warn of where a candidate does differently on the evaluation data than on calibration rows.

    There is a gap if the figures are `LEAST_GAP_DB` apart and those of single rows differ by their ranks,
    too: one strange row among many, or an unlucky draw, does not make two kinds of data. Rows of sequences
    are run apart, with the float model's states: what drifts is much alike in all rows of a sequence.

    Args:
        verdict: the gate's on the candidate.
        candidate: the file that the gate ran.
        seen: the SQNR in dB that calibration saw on the rows held back: if the verdict's is close, nothing is
            run.

    Returns:
        None where there is no gap, or the candidate's outputs are not finite.
    """
    if not verdict.outputs:
        return None
    names = scored(evaluation.reference.arrays)
    there = _overall(verdict.outputs, names)
    if seen is not None and evaluation.samples.sequences is None and abs(seen - there) < LEAST_GAP_DB:
        return None
    held_back = job.parts[1].apart()
    reference = _outputs(job, job.model.path, held_back)
    check_reference(reference, ignore_nonfinite=job.recipe.ignore_nonfinite, samples=held_back)
    found = _outputs(job, candidate, held_back)
    here = _overall(compare(*all_compared(reference, found)), names)
    if abs(here - there) < LEAST_GAP_DB:
        return None
    part = evaluation.samples.apart().spread(MOST_ROWS)
    references, others = _outputs(job, job.model.path, part), _outputs(job, candidate, part)
    if evaluation.samples.sequences is not None:
        there = _overall(compare(*all_compared(references, others)), names)
    rows_here, rows_there = _row_figures(reference, found), _row_figures(references, others)
    if abs(here - there) < LEAST_GAP_DB or not _part(rows_here, rows_there, here > there):
        return None
    return "\n".join(
        [
            f"the outputs have {here:.1f} dB on {len(held_back)} calibration rows, but {there:.1f} dB on the"
            f" evaluation data (the median row {np.median(rows_here):.1f} dB, but {np.median(rows_there):.1f}"
            " dB): the calibration data do not look like the evaluation data",
            *inputs_apart(job.data, evaluation.samples),
        ]
    )


def inputs_apart(calibration: Samples, evaluation: Samples) -> list[str]:
    """A line for each input, with its values in both; the first few, those that differ most first."""
    here, there = spreads(calibration), spreads(evaluation)
    order = sorted(here, key=lambda name: -_distance(here[name], there[name]))
    return [
        f"input '{name}': {here[name]} in calibration; {there[name]} in evaluation"
        for name in order[:MOST_INPUTS]
    ]


def spreads(samples: Samples) -> dict[str, Spread]:
    """The values of each input over all rows, read one row at a time."""
    names = [spec.name for spec in samples.specs]
    low, high = dict.fromkeys(names, np.inf), dict.fromkeys(names, -np.inf)
    total, count = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for row in samples.rows():
        for name, array in row.items():
            if array.size:
                low[name] = min(low[name], float(array.min()))
                high[name] = max(high[name], float(array.max()))
                total[name] += float(array.sum(dtype=np.float64))
                count[name] += array.size
    return {name: Spread(low[name], high[name], total[name] / max(count[name], 1)) for name in names}


def _distance(one: Spread, other: Spread) -> float:
    """How far apart two inputs' values are, in parts of the narrower range."""
    width = min(one.high - one.low, other.high - other.low)
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) / max(width, 1e-30)


def _outputs(job: Job, model: Path, samples: Samples) -> dict[str, Values]:
    outputs, _ = outputs_of(model, samples, job.recipe, job.cache, job.console, label="comparing")
    return outputs.arrays


def _overall(outputs: Mapping[str, Similarity], names: list[str]) -> float:
    return overall_sqnr_db([outputs[name].sqnr_db for name in names])


def _row_figures(reference: AllValues, candidate: AllValues) -> NDArray[np.float64]:
    """The SQNR in dB of up to `MOST_ROWS` rows, evenly spread, each by itself."""
    length = len(next(iter(reference.values())))
    count = min(length, MOST_ROWS)
    names = scored(reference)

    def figure(row: int) -> float:
        one, other = (take_all(side, [row]) for side in (reference, candidate))
        return _overall(compare(*all_compared(one, other)), names)

    return np.array([figure(i * length // count) for i in range(count)])


def _part(here: NDArray[np.float64], there: NDArray[np.float64], above: bool) -> bool:
    """Whether one set of figures lies above the other, by `LEAST_DEVIATIONS` of Mann and Whitney's test."""
    sign = float(np.sign(here[:, None] - there).mean()) * (1 if above else -1)
    deviation = math.sqrt((len(here) + len(there) + 1) / (3 * len(here) * len(there)))
    return sign >= LEAST_DEVIATIONS * deviation
