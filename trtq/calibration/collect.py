"""Collecting statistics: one streaming pass of the fp32 model over the data with ONNX Runtime.

Rows are run one at a time (or in the model's fixed batch size), each on one thread, several at once: a
batch of one keeps the activations in cache, costs no more than larger ones, and makes every result
independent of the batch size, the order of the rows and the number of workers. Only the tensors that need
a range are fetched, into memory that is used again for the next row, and nothing of a row is kept but its
counts, so memory does not grow with the data.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from trtq.calibration.statistics import NonFiniteError, Statistics
from trtq.data.batches import Arrays, Batch
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.graph.model import serialized
from trtq.simulation.session import simulation_session

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
        self._fetched = [name for name in tensors if name not in inputs]
        self._session = _session(graph, self._fetched) if self._fetched else None

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
        feeds = samples.batches()
        lock = threading.Lock()
        stop = threading.Event()

        def work() -> Statistics:
            statistics = Statistics.empty(self._tensors)
            fetched = None if self._session is None else _Fetched(self._session, self._fetched)
            try:
                while not stop.is_set() and (batch := _next(feeds, lock)) is not None:
                    values = batch.feed | (_values(fetched, batch, samples) if fetched else {})
                    for name in self._tensors:
                        _add(statistics, name, values[name], batch, samples)
                    statistics.rows += batch.rows
                    if progress:
                        with lock:
                            progress(batch.rows)
            except BaseException:
                stop.set()
                raise
            return statistics

        workers = min(workers or os.cpu_count() or 1, max(len(samples), 1))
        total = Statistics.empty(self._tensors)
        with ThreadPoolExecutor(workers) as pool:
            try:
                for shard in pool.map(lambda _: work(), range(workers)):
                    total.merge(shard)
            finally:  # Ctrl-C reaches only this thread
                stop.set()
        return total


class _Fetched:
    """The tensors that a session computes, in buffers that rows of one shape share.

    Fresh arrays for every row would be copied to, and touch new memory each time.
    """

    def __init__(self, session: Any, names: Sequence[str]) -> None:
        self._session, self._names = session, names
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._values: Arrays = {}
        self._binding: Any = None

    def __call__(self, feed: Arrays) -> Arrays:
        """The tensors' values for a feed; valid until the next call."""
        shapes = {name: array.shape for name, array in feed.items()}
        if self._binding is None or shapes != self._shapes:
            self._values, self._shapes = self._fresh(feed), shapes
            self._binding = self._bound()
            return self._values
        for name, array in feed.items():
            self._binding.bind_cpu_input(name, array)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception:  # a shape that depends on the values, or what says so without buffers, too
            self._binding = None
            return self._fresh(feed)
        return self._values

    def _fresh(self, feed: Arrays) -> Arrays:
        return dict(zip(self._names, self._session.run(self._names, feed), strict=True))

    def _bound(self) -> Any:
        """A binding of the outputs to the values' memory; None where they are not all plain arrays."""
        if any(not array.flags.c_contiguous or array.size == 0 for array in self._values.values()):
            return None
        binding = self._session.io_binding()
        for name, array in self._values.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding


def _values(fetched: _Fetched, batch: Batch, samples: Samples) -> Arrays:
    try:
        return fetched(batch.feed)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        where = _rows(batch, samples)
        raise InputError(f"the model does not run on {where} of the data", cause=error) from error


def _session(graph: gs.Graph, tensors: Sequence[str]) -> Any:
    """A session that computes just the named tensors; the serialized model is gone when it returns."""
    with serialized(_only(graph, tensors)) as source:
        session = simulation_session(source, threads=1)
    _trim()
    return session


def _trim() -> None:
    """Give freed memory back to the system, where the C library can.

    What loading, folding and serializing a model leave behind is too scattered for the activations, which
    would come on top of it.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _next(feeds: Iterator[Batch], lock: threading.Lock) -> Batch | None:
    with lock:
        return next(feeds, None)


def _add(statistics: Statistics, name: str, values: np.ndarray, batch: Batch, samples: Samples) -> None:
    """Count a tensor's values, without those of the rows that only fill up a fixed batch."""
    if batch.padding and values.ndim and values.shape[0] % (batch.rows + batch.padding) == 0:
        values = values[: values.shape[0] * batch.rows // (batch.rows + batch.padding)]
    try:
        statistics.histograms[name].add(values)
    except NonFiniteError as error:
        raise InputError(
            f"tensor '{name}' is not finite for {_rows(batch, samples)} of the data",
            cause=f"{error} are NaN or infinite",
            remedy="look at that sample, or at the model: an fp32 model must be finite on its own data",
        ) from error


def _rows(batch: Batch, samples: Samples) -> str:
    """The batch's rows, as the source numbers them, for a message."""
    first, last = (samples.row_number(i) for i in (batch.start, batch.start + batch.rows - 1))
    return f"row {last}" if batch.rows == 1 else f"rows {first} to {last}"


def _only(graph: gs.Graph, tensors: Sequence[str]) -> gs.Graph:
    """A copy of the graph that computes just the named tensors."""
    part = graph.copy()
    named = part.tensors()
    part.outputs = [named[name] for name in tensors]
    return part.cleanup(remove_unused_graph_inputs=False)
