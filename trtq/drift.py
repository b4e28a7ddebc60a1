"""Whether the calibration data look like the evaluation's: if so, a quantization does as well on both.

It is run on the calibration rows held back, by whatever the gate ran it with, and the SQNR of its outputs
compared with the verdict's. Ranges fit the data they were made from: where the evaluation's inputs are scaled
otherwise, or show something else, the figures part by tens of decibels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trtq.data.batches import Arrays
from trtq.data.samples import Samples
from trtq.evaluation import Evaluation, outputs_of
from trtq.gate.finite import all_compared, check_reference
from trtq.gate.similarity import Similarity, compare, overall_sqnr_db, scored
from trtq.gate.verdict import Verdict

LEAST_GAP_DB = 6.0
"""Figures closer than this are alike: what two parts of one data set differ by stays below it."""

MOST_ROWS = 64
"""Rows held back whose own figures are looked at, evenly spread over them."""

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
    evaluation: Evaluation, model: Path, held_back: Samples, verdict: Verdict, candidate: Path
) -> str | None:
    """What to warn of where a candidate does otherwise on the evaluation data than on rows held back.

    The figures part if they are `LEAST_GAP_DB` apart and the evaluation's lies beyond that of every row held
    back: an unlucky draw of rows from the same data is among them.

    Args:
        model: the fp32 model.
        held_back: calibration rows.
        verdict: the gate's on the candidate.
        candidate: the file that the gate ran.

    Returns:
        None where they do not part, or the candidate's outputs are not finite.
    """
    if not verdict.outputs:
        return None
    recipe = evaluation.recipe
    reference, found = (
        outputs_of(
            file,
            held_back,
            evaluation.cache,
            evaluation.console,
            label="held back",
            batch_size=recipe.batch,
            threads=recipe.threads,
        )[0].arrays
        for file in (model, candidate)
    )
    check_reference(reference, ignore_nonfinite=recipe.ignore_nonfinite, samples=held_back)
    names = scored(reference)
    there = _overall(verdict.outputs, names)
    here = _overall(compare(*all_compared(reference, found)), names)
    count = min(len(held_back), MOST_ROWS)
    rows = [_row_sqnr_db(reference, found, i * len(held_back) // count) for i in range(count)]
    if abs(here - there) < LEAST_GAP_DB or min(rows) <= there <= max(rows):
        return None
    return "\n".join(
        [
            f"the outputs have {here:.1f} dB on {len(held_back)} calibration rows"
            f" ({min(rows):.1f} to {max(rows):.1f} dB each), but {there:.1f} dB on the evaluation data: the"
            " calibration data do not look like them",
            *inputs_apart(held_back, evaluation.samples),
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


def _overall(outputs: Mapping[str, Similarity], names: list[str]) -> float:
    return overall_sqnr_db([outputs[name].sqnr_db for name in names])


def _row_sqnr_db(reference: Arrays, candidate: Arrays, row: int) -> float:
    one, other = (
        {name: array[row : row + 1] for name, array in side.items()} for side in (reference, candidate)
    )
    return _overall(compare(*all_compared(one, other)), scored(reference))
