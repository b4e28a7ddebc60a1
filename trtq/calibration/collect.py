"""Collecting statistics: one streaming pass of the fp32 model over the data.

Rows are run one at a time (or in the model's fixed batch size), several at once, so every result is
independent of the order of the rows and of the number of workers (see `trtq.simulation.rows`). Only the
tensors that need a range are fetched, into memory that is used again for the next row, and nothing of a row
is kept but its counts, so memory does not grow with the data.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from trtq.calibration.statistics import NonFiniteError, Statistics
from trtq.console import Advance
from trtq.data.batches import Arrays, Batch
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.graph.model import load_model
from trtq.graph.surgery import cleaned, copied
from trtq.simulation.processors import processors
from trtq.simulation.rows import Runner, Workers
from trtq.simulation.workers import Shipped, Work, cut, shipped_graph

Progress = Callable[[int], object]


def collect(
    graph: gs.Graph,
    tensors: Sequence[str],
    samples: Samples,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of the named tensors over all rows of the samples; see `Collector`."""
    return Collector(graph, tensors).collect(samples, workers=workers, progress=progress)


class Collector:
    """One session that collects the statistics of any samples.

    Args:
        graph: the folded fp32 graph; is not changed.
        tensors: activations and model inputs of the graph.
    """

    def __init__(self, graph: gs.Graph, tensors: Sequence[str]) -> None:
        inputs = {tensor.name for tensor in graph.inputs}
        self._tensors = tensors
        fetched = [name for name in tensors if name not in inputs]
        self._runner = Runner(_only(graph, fetched), reuse=True) if fetched else None

    def collect(
        self, samples: Samples, *, workers: int | None = None, progress: Progress | None = None
    ) -> Statistics:
        """Statistics of the tensors over all rows of the samples.

        Args:
            workers: rows run at once; default: one for each processor.
            progress: called with the number of rows done since the last call.

        Raises:
            InputError: a tensor is NaN or infinite for some row, or the model does not run on the data.
        """
        own, shards = threading.local(), []

        def count(batch: Batch, found: Arrays) -> int:
            if not hasattr(own, "statistics"):
                own.statistics = Statistics.empty(self._tensors)
                shards.append(own.statistics)
            values = batch.feed | found
            for name in self._tensors:
                _add(own.statistics, name, values[name], batch, samples)
            own.statistics.rows += batch.rows
            return batch.rows

        threads = Workers(min(workers or processors(), max(len(samples), 1)))
        for rows in self._counted(samples, count, threads):
            if progress:
                progress(rows)
        total = Statistics.empty(self._tensors)
        while shards:
            total.merge(shards.pop())
        return total

    def _counted(
        self, samples: Samples, count: Callable[[Batch, Arrays], int], workers: Workers
    ) -> Iterator[int]:
        if self._runner is None:  # inputs alone need no run
            return workers.map(lambda batch: count(batch, {}), samples.batches())
        return self._runner.over(samples, samples.batches(), count, workers=workers)


def collect_sharded(
    graph: gs.Graph, tensors: Sequence[str], samples: Samples, work: Work, *, threads: int | None = None
) -> Statistics:
    """`collect` in shards; the result is stored in the cache under the work's key.

    Args:
        threads: rows that each worker runs at once; default: a fair share of the processors.

    Raises:
        InputError: as `collect`, with the shard's rows and source where a worker failed; workers die.
        MissingBackendError: the backend's package is not installed.
    """
    shards, pool = cut(samples, work.key, batch=1), work.pool
    total = Statistics.empty(tensors)
    with contextlib.ExitStack() as stack:
        collector: Collector | Shipped
        if pool is None:
            collector = Collector(graph, tensors)
        else:
            collector, threads = stack.enter_context(shipped_graph(graph, pool)), pool.threads(threads)
        task = functools.partial(_statistics, collector, tuple(tensors), threads)
        for _, content in work.results(task, shards):
            total.merge(Statistics.from_bytes(content))
    work.store(content if len(shards) == 1 else total.to_bytes(), shards)
    return total


def _statistics(
    collector: Collector | Shipped,
    tensors: Sequence[str],
    threads: int | None,
    samples: Samples,
    advance: Advance | None,
) -> bytes:
    if isinstance(collector, Shipped):
        collector = _collector(collector, tensors)
    return collector.collect(samples, workers=threads, progress=advance).to_bytes()


@functools.lru_cache(maxsize=1)
def _collector(model: Shipped, tensors: Sequence[str]) -> Collector:
    """The collector of this worker, whose session serves all of its shards."""
    with model.open() as path:
        return Collector(load_model(path).graph, tensors)


def _add(statistics: Statistics, name: str, values: np.ndarray, batch: Batch, samples: Samples) -> None:
    """Count a tensor's values, without those of the rows that only fill up a fixed batch."""
    try:
        statistics.histograms[name].add(batch.own(values))
    except NonFiniteError as error:
        raise InputError(
            f"tensor '{name}' is not finite for {samples.where(batch)} of the data",
            cause=f"{error} are NaN or infinite",
            remedy="look at that sample, or at the model: an fp32 model must be finite on its own data",
        ) from error


def _only(graph: gs.Graph, tensors: Sequence[str]) -> gs.Graph:
    """A copy of the graph that computes just the named tensors."""
    part = copied(graph)
    named = part.tensors()
    part.outputs = [named[name] for name in tensors]
    return cleaned(part)
