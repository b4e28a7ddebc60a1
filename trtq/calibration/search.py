"""`--method auto`: which method suits the model; `refine` says which tensors do better with another.

No calibration method wins everywhere (paper table 5), so all are tried and measured by the
signal-to-quantization-noise ratio of the model's outputs. It tells methods apart on a few dozen rows, where a
task metric cannot, and needs no labels. Ranges are fitted on one part of the calibration data and methods
compared on the part held back; the evaluation data are never looked at.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from trtq.budget import NO_BUDGET, Budget
from trtq.calibration.methods import Method, parse_method, scales_from
from trtq.calibration.statistics import Statistics
from trtq.console import Advance, Console
from trtq.data.batches import Arrays, Batch
from trtq.data.samples import Samples
from trtq.graph.quantization import Quantization
from trtq.graph.rewrite import scales_as_inputs
from trtq.simulation.finite import check_reference
from trtq.simulation.kept import Kept
from trtq.simulation.rows import Runner, rows_at_once
from trtq.simulation.similarity import Reference, noise_db

KEPT_BYTES = 1 << 28
"""Rows above this size are read again for every run."""

TOGETHER_BYTES = 1 << 26
"""Outputs of all rows above this size are scored batch by batch, and the float model's lie in a file."""

CANDIDATES = ("max", "entropy", "mse", "percentile:99.9", "percentile:99.99", "percentile:99.999")
"""The paper's candidates (section 6) and the least mean squared error."""

BATCH = 16
"""Rows that run at once where the model leaves the choice."""

BATCH_BYTES = 1 << 25
"""Most bytes of the rows that run at once, if they are several; a run takes many times as much memory."""

Scales = Mapping[str, np.float32]
"""Tensor -> scale, of all tensors of a plan."""


class Rows:
    """Rows to score quantizations on: by their outputs, against those of the float model.

    Attributes:
        tensors: names of the tensors that are scored; None: the model's outputs.
        seconds: that the float model took for a row.

    Args:
        model: the float model, a file or a graph. It runs once; its session, with all the weights, is closed
            before another one opens.
        samples: the rows.
        batch: rows to run at once where the model leaves the choice, up to `BATCH_BYTES`.
        threads: threads within an operator; None: all cores.
        kept: whether batches stay in memory, up to `KEPT_BYTES`, and are scored as they come, for many runs
            on few rows. Otherwise every run reads them again and scores the outputs of all rows together, up
            to `TOGETHER_BYTES` of them.
        ignore_nonfinite: measure only where the float model's outputs are finite.
        advance: called with the number of rows that the float model just ran.
        tensors: of both models, to score instead of the outputs (`selecting.instead_of_outputs`), as far as
            they are finite.

    Raises:
        InputError: the model does not run on the rows, or its outputs are not finite.
    """

    def __init__(
        self,
        model: Path | gs.Graph,
        samples: Samples,
        *,
        batch: int = BATCH,
        threads: int | None = None,
        kept: bool = False,
        ignore_nonfinite: bool = False,
        advance: Advance | None = None,
        tensors: Sequence[str] | None = None,
    ) -> None:
        self.samples, self.threads, self.tensors = samples, threads, tensors
        runner, left = Runner(model, tensors, threads=threads), KEPT_BYTES if kept else -1
        self._kept: list[Batch] | None = []
        origins: list[Batch | None] = []
        row = sum(array.nbytes for array in samples.row(0).values())
        batch = max(min(batch, BATCH_BYTES // max(row, 1)), 1)
        batch = batch if kept else rows_at_once(samples, batch)

        def run() -> Iterator[Arrays]:
            nonlocal left
            for part in runner.batches(samples, batch):
                left -= sum(array.nbytes for array in part.feed.values())
                if left < 0:
                    self._kept = None
                elif self._kept is not None:
                    self._kept.append(part)
                origins.append(replace(part, feed={}, padding=0))
                yield _own_rows(part, runner.on(part, samples))
                if advance is not None:
                    advance(part.rows)

        started = time.perf_counter()
        found = Kept(run(), KEPT_BYTES if kept else TOGETHER_BYTES)
        self.seconds = (time.perf_counter() - started) / len(samples)
        self._batch = batch if any(part is not None and part.rows > 1 for part in origins) else 1
        self._by_batch = kept or found.nbytes > TOGETHER_BYTES
        outputs = self._parts(found)
        if len(outputs) < len(origins):
            origins = [None]
        for origin, arrays in zip(origins, outputs, strict=True):
            ignored = ignore_nonfinite or tensors is not None
            check_reference(arrays, ignore_nonfinite=ignored, samples=samples, batch=origin)
        self._reference = Reference(outputs)

    def sqnr_db(self, quantization: Quantization, console: Console, label: str) -> float:
        """SQNR of a quantization's outputs together (see `similarity.Reference`).

        Args:
            label: what the progress is called.
        """
        with console.progress(label, len(self.samples)) as advance:
            return Trials(self, quantization).sqnr_db(quantization.scales, advance=advance)

    def batches(self) -> Iterable[Batch]:
        """The rows, put together for a run."""
        return self.samples.batches(self._batch) if self._kept is None else self._kept

    def run(
        self, runner: Runner, given: Arrays, first: int | None = None, advance: Advance | None = None
    ) -> Iterator[Arrays]:
        """A model's outputs on the rows, batch by batch.

        Args:
            given: what the model takes beside the rows.
            first: how many batches are run; None: all.
            advance: called with the number of rows just done.
        """
        for batch in islice(self.batches(), first):
            yield _own_rows(batch, runner.on(replace(batch, feed=batch.feed | given), self.samples))
            if advance is not None:
                advance(batch.rows)

    def noise(self, outputs: Iterable[Arrays]) -> float:
        """Noise of a run's outputs, which may end early."""
        return self._reference.noise(outputs if self._by_batch else self._parts(list(outputs)))

    def _parts(self, found: Sequence[Arrays]) -> Sequence[Arrays]:
        """Outputs as they are compared: batch by batch, or all rows together if their shapes allow it."""
        if self._by_batch:
            return found
        shapes = {tuple((name, a.shape[1:]) for name, a in batch.items() if a.ndim) for batch in found}
        if len(shapes) > 1 or len(next(iter(shapes))) < len(found[0]):
            return found
        return [{name: np.concatenate([batch[name] for batch in found]) for name in found[0]}]


class Trials:
    """A quantization with any scales, on rows: one session runs them all, as scales are its inputs.

    Args:
        quantization: its scales are not looked at.
    """

    def __init__(self, rows: Rows, quantization: Quantization) -> None:
        self._rows = rows
        plan = quantization.plan
        graph = replace(quantization, scales=dict.fromkeys(plan.tensors, np.float32(1))).rewritten()
        self._inputs = scales_as_inputs(graph, plan)
        self._dtypes = {tensor.name: tensor.dtype for tensor in graph.inputs}
        self._runner = Runner(graph, rows.tensors, threads=rows.threads)

    def sqnr_db(self, scales: Scales, advance: Advance | None = None) -> float:
        """`noise` in dB."""
        return noise_db(self.noise(scales, advance=advance))

    def noise(self, scales: Scales, first: int | None = None, advance: Advance | None = None) -> float:
        """Noise of the outputs together (see `similarity.Reference`).

        Args:
            first: how many batches are run; None: all.
            advance: called with the number of rows just done.
        """
        given = {name: np.array(scales[t], self._dtypes[name]) for name, t in self._inputs.items()}
        return self._rows.noise(self._rows.run(self._runner, given, first, advance))


def _own_rows(batch: Batch, outputs: Arrays) -> Arrays:
    """A batch's outputs without those of rows that only fill it up."""
    return {name: batch.own(array) for name, array in outputs.items()}


@dataclass(frozen=True)
class Choice:
    """What was tried.

    Attributes:
        method: the best one.
        sqnr_db: candidate that was tried -> SQNR of the outputs together on the rows held back.
        rows: how many rows were held back.
    """

    method: Method
    sqnr_db: Mapping[str, float]
    rows: int


def choose_method(
    rows: Rows,
    quantization: Quantization,
    statistics: Statistics,
    console: Console,
    budget: Budget = NO_BUDGET,
) -> Choice:
    """The candidate with the best outputs on rows held back; the earlier one if two are equal.

    Args:
        quantization: its scales are not looked at.
        statistics: of rows that are not among those held back.
        budget: once it is spent, the candidates that are left are not tried.
    """
    trials = Trials(rows, quantization)
    scores: dict[str, float] = {}
    for name in CANDIDATES:
        if scores and budget.over:
            break
        with console.progress(name, len(rows.samples)) as advance:
            scores[name] = trials.sqnr_db(scales_from(statistics, parse_method(name)), advance=advance)
    best = max(scores, key=scores.__getitem__)
    return Choice(parse_method(best), scores, len(rows.samples))
