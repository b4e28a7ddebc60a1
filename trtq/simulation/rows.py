"""A model over rows: the one place where a batch of rows meets ONNX Runtime.

A session runs each batch on one thread, and several batches run at once: a batch that stays in the
processor's cache costs no more than a large one, and results depend neither on the number of workers nor on
the order in which batches finish. What is run is a batch's feed, so rows of different shapes stay in batches
of their own, and other inputs beside the rows' own (scales, activations, states) go into the feed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime

from trtq.data.batches import Arrays, Batch, repeated, single_rows
from trtq.data.samples import Samples
from trtq.errors import InputError, TrtqError
from trtq.graph.codes import Code
from trtq.graph.door import read_model
from trtq.graph.ends import codes_of
from trtq.graph.model import export, serialized, weight_bytes
from trtq.graph.weights import IN_MEMORY, export_light, files_of, values_of
from trtq.simulation.processors import processors
from trtq.simulation.session import MANY_NODES, simulation_session
from trtq.stops import run_options

Item = TypeVar("Item")
Result = TypeVar("Result")

Run = Callable[[Arrays], Mapping[str, Any]]
"""A feed -> output name -> array."""


BRIEF = 2.5e-4
"""Seconds of work that are worth handing to a thread at once: that alone takes about 20 microseconds."""

CACHE_BYTES = 1 << 20
"""Rows of a batch take up to so many bytes: what a model makes of them then stays in the processor's cache.
EfficientNet-Lite0 with Q/DQ takes 61 ms for each of 16 rows at once, 45 for each of 4."""

MOST_TOGETHER = 64
"""Items that a thread is given at once."""

HERE = 1e-4
"""Seconds of a processor on an item below which threads mostly wait for each other's interpreter: such items
are worked on by the caller itself."""

_RECENT = 8
"""Groups whose quickest says how long an item takes: on a busy machine the others say how long it waits."""

_AGAIN = 256
"""Groups after which the caller tries once more whether items are such."""

_TRIED = 16
"""Items by which it is told whether they are."""


_SHARED = 1 << 14
"""Bytes of a weight that a session reads where it lies: half of the time that a session of EfficientNet-Lite0
took was for its weights to be written and parsed."""


class Workers:
    """Threads that work on several things at once.

    A function that is being mapped must not map over the same workers: it would wait for itself.

    Args:
        count: default: one for each processor that this process may use.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count or processors()
        self._pool = ThreadPoolExecutor(self.count)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The function's result for every item, in order.

        Items are taken as they are needed: at most two for each worker are in memory at a time, or two groups
        of as many as `BRIEF` is enough for; one item where each takes less than `HERE`. When the caller stops
        early, or something fails, nothing is left running.
        """
        waiting: deque[Future[tuple[list[Result], float]]] = deque()
        taking: deque[float] = deque(maxlen=_RECENT)  # seconds for each item of a group
        working: deque[float] = deque(maxlen=_RECENT)
        items, size, untried = iter(items), 1, 0
        try:
            while True:
                started = time.perf_counter()
                if not (group := list(itertools.islice(items, size))):
                    break
                taking.append((time.perf_counter() - started) / len(group))
                waiting.append(self._pool.submit(_all, function, group))
                if len(waiting) < 2 * self.count:
                    continue
                results, seconds = _first(waiting)
                yield from results
                working.append(seconds / len(results))
                each, untried = max(min(taking), min(working)), untried - 1
                size = _fitting(size, size * each)
                if each < BRIEF and untried < 0:
                    while waiting:
                        yield from _first(waiting)[0]
                    yield from _while_short(function, items)
                    untried = _AGAIN
            while waiting:
                yield from _first(waiting)[0]
        finally:
            wait([future for future in waiting if not future.cancel()])


def _first(waiting: deque[Future[Result]]) -> Result:
    """The first result, taken away when it is there: an exception leaves it among those still to wait for."""
    result = waiting[0].result()
    waiting.popleft()
    return result


def _while_short(function: Callable[[Item], Result], items: Iterator[Item]) -> Iterator[Result]:
    """The results of items, worked on right here, until they take longer than `HERE`; the first ones may."""
    slow = 0
    while slow < 2:
        used, count = 0.0, 0
        for item in itertools.islice(items, _TRIED):
            started = time.thread_time()
            result = function(item)
            used += time.thread_time() - started
            count += 1
            yield result
        if not count:
            return
        slow = slow + 1 if used > HERE * count else 0


def _all(function: Callable[[Item], Result], group: Sequence[Item]) -> tuple[list[Result], float]:
    """The results of a group, and the seconds that they took."""
    started = time.perf_counter()
    return [function(item) for item in group], time.perf_counter() - started


def _fitting(size: int, seconds: float) -> int:
    """The size of the next group after one that took so long."""
    if seconds < BRIEF / 2:
        return min(2 * size, MOST_TOGETHER)
    return max(size // 2, 1) if seconds > 2 * BRIEF else size


class Runner:
    """A model's session: it serves any number of threads.

    Attributes:
        inputs: name -> shape as the model says; dynamic dimensions are not integers.
        outputs: names of what is computed.
        apart: those whose first axis cannot be the rows: it is dynamic, and no input's is.

    Args:
        model: a graph, which is not changed; an ONNX file; or a serialized model.
        outputs: names of any tensors to compute; default: the model's outputs that are not its inputs.
        threads: within an operator; None: all processors. More than 1 only where one batch runs at a time.
        weights: see `simulation_session`.
        reuse: a thread's outputs lie in memory that its next run overwrites, which saves the time that the
            system takes to hand out new memory for every row.
        edit: of a graph: changes, in place, what ONNX Runtime gets of it.
        optimized, fused: see `simulation_session`.

    Raises:
        InputError: ONNX Runtime cannot load the model.
    """

    def __init__(
        self,
        model: gs.Graph | str | Path | bytes,
        outputs: Sequence[str] | None = None,
        *,
        threads: int | None = 1,
        weights: Mapping[str, onnxruntime.OrtValue] | None = None,
        reuse: bool = False,
        edit: Callable[[onnx.GraphProto], None] | None = None,
        optimized: bool = True,
        fused: bool = False,
    ) -> None:
        self._name = str(model) if isinstance(model, str | Path) else "the model"
        session = functools.partial(
            simulation_session, threads=threads, outputs=outputs, optimized=optimized, fused=fused
        )
        if isinstance(model, gs.Graph) and weights is None and _is_shared(model):
            content, self._weights = _without_weights(model, edit)
            self._session = session(content, weights=self._weights)
        elif isinstance(model, gs.Graph):
            with serialized(model, edit) as source:
                self._session = session(source, weights=weights)
            _trim()
        else:
            self._session = session(model, weights=weights)
        self.inputs = {item.name: tuple(item.shape) for item in self._session.get_inputs()}
        every = [item.name for item in self._session.get_outputs()]
        self.outputs = tuple(outputs or [name for name in every if name not in self.inputs] or every)
        fixed = all(isinstance(size, int) for shape in self.inputs.values() for size in shape)
        self.apart = frozenset(
            item.name
            for item in self._session.get_outputs()
            if fixed and item.shape and not isinstance(item.shape[0], int)
        )
        narrow = {"tensor(int8)", "tensor(uint8)"}
        ends = [*self._session.get_inputs(), *self._session.get_outputs()]
        self._codes = _codes_of(model) if any(item.type in narrow for item in ends) else {}
        self._buffers = threading.local() if reuse else None
        self._tried: tuple[Arrays, Arrays] | None = None

    def run(self, feed: Arrays) -> Arrays:
        """The outputs for a feed, which may hold more than the model takes.

        Where inputs and outputs are codes (`trtq.graph.ends`), floats are fed and come out all the same.

        Raises:
            KeyError: an input is missing.
            Exception: ONNX Runtime's, which have no common base class; `on` says more.
        """
        feed = {name: feed[name] for name in self.inputs}
        if self._codes:
            feed = {n: self._codes[n].encoded(a) if n in self._codes else a for n, a in feed.items()}
        if self._buffers is None:
            outputs = dict(
                zip(self.outputs, self._session.run(self.outputs, feed, run_options()), strict=True)
            )
            return {n: self._codes[n].decoded(a) if n in self._codes else a for n, a in outputs.items()}
        if not hasattr(self._buffers, "run"):
            self._buffers.run = _Buffered(self._session, self.outputs)
        found: Arrays = self._buffers.run(feed)
        return found

    def on(self, batch: Batch, samples: Samples) -> Arrays:
        """The outputs for a batch of the samples.

        Raises:
            InputError: the model does not run on it; the message names the row and the source.
        """
        tried, self._tried = self._tried, None
        if tried is not None and tried[0] is batch.feed:
            return tried[1]
        with naming_rows(self.run, batch, samples, self._name):
            return self.run(batch.feed)

    @overload
    def over(
        self, samples: Samples, batches: Iterable[Batch], *, workers: Workers | int | None = None
    ) -> Iterator[Arrays]: ...

    @overload
    def over(
        self,
        samples: Samples,
        batches: Iterable[Batch],
        function: Callable[[Batch, Arrays], Result],
        *,
        workers: Workers | int | None = None,
    ) -> Iterator[Result]: ...

    def over(
        self,
        samples: Samples,
        batches: Iterable[Batch],
        function: Callable[[Batch, Arrays], Any] = lambda batch, outputs: outputs,
        *,
        workers: Workers | int | None = None,
    ) -> Iterator[Any]:
        """What a function makes of every batch's outputs, in the order of the batches; several run at once.

        Args:
            batches: of the samples; their feeds may hold other arrays, too.
            function: runs in the workers; default: the outputs themselves.
            workers: or their number; default: one for each processor.

        Raises:
            InputError: as `on`.
        """
        threads = workers if isinstance(workers, Workers) else Workers(workers)
        return threads.map(lambda batch: function(batch, self.on(batch, samples)), batches)

    def batches(self, samples: Samples, highest: int) -> Iterator[Batch]:
        """The samples in batches of the size that the model takes: its fixed one, else up to `highest`, or 1
        where it does not run on more rows at once."""
        return self.taken(samples.batches(highest))

    def taken(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """`taken` by this model; what is computed to find out is not computed again."""

        def run(feed: Arrays) -> Arrays:
            found = self.run(feed)
            if self._buffers is None and self._tried is None:  # the batch comes first, and mostly stays
                self._tried = (feed, found)
            return found

        return taken(run, batches)


def rows_at_once(samples: Samples, highest: int) -> int:
    """Rows of a batch that is fast to run: `highest`, or fewer where they are large, but several."""
    row = sum(array.nbytes for array in next(samples.rows()).values())
    return min(highest, max(CACHE_BYTES // max(row, 1), 2))


def _codes_of(model: gs.Graph | str | Path | bytes) -> dict[str, Code]:
    """What the 8-bit inputs and outputs of a model stand for."""
    if isinstance(model, gs.Graph):
        return codes_of(export(model).graph)
    proto = onnx.load_from_string(model) if isinstance(model, bytes) else read_model(model)
    return codes_of(proto.graph)


def taken(run: Run, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, or their rows one by one where the model runs on those only.

    That is so where the first batch of several rows fails and its first row alone does not: a model that was
    exported with a batch of 1 may have that inside although its input's first axis is dynamic. It is so, too,
    where an output does not have one entry for each row.
    """
    several: bool | None = None
    for batch in batches:
        if several is None and batch.rows > 1:
            several = _takes(run, batch, by_row=True)
        if several is False:
            yield from single_rows(batch)
        else:
            yield batch


def check_runs(model: str | Path, samples: Samples) -> None:
    """Run all of a model once, on the first row.

    What computes some of its tensors, as calibration does, tells nothing of what lies behind those.

    Raises:
        InputError: it does not run.
    """
    runner = Runner(model, optimized=False)
    runner.on(next(runner.batches(samples, 1)), samples)


def runs_on_several(model: gs.Graph, samples: Samples) -> bool:
    """Whether a model whose first axis is dynamic runs on more than one row at once; see `taken`.

    Only one row of the samples is read. True for a model that does not run at all: the caller's own run
    reports the error.
    """
    if samples.fixed_batch is not None:
        return not samples.alone
    try:
        return _takes(Runner(model).run, repeated(next(samples.rows()), 2, samples.axes))
    except InputError:
        return True


def _takes(run: Run, batch: Batch, *, by_row: bool = False) -> bool:
    """Whether a model runs on a batch: what has one entry for a row alone has one for each of its rows.

    Args:
        by_row: every output has to have one, as many by chance not counted.
    """
    size = batch.rows + batch.padding
    try:
        together = run(batch.feed)
    except Exception:  # the size is not to blame if single rows fail, too: the run itself reports it
        together = None
    if together is not None and not by_row and all(_length(array) == size for array in together.values()):
        return True
    try:
        alone = run(next(single_rows(batch)).feed)
    except Exception:
        return True
    if together is None:
        return False
    if by_row:
        return all(
            together[name].shape == (size, *array.shape[1:]) and _length(array) == 1
            for name, array in alone.items()
        )
    return all(_length(array) != 1 or _length(together[name]) == size for name, array in alone.items())


def _length(array: Any) -> int | None:
    return len(array) if array.ndim else None


@contextlib.contextmanager
def naming_rows(run: Run, batch: Batch, samples: Samples, name: str = "the model") -> Iterator[None]:
    """Turns what fails within into an error that names the rows and their source.

    Args:
        run: runs the model; looks for the row that fails.

    Raises:
        InputError: something failed that was not this already.
    """
    try:
        yield
    except TrtqError:
        raise
    except Exception as error:
        culprit = _culprit(run, batch)
        remedy = None
        if culprit is batch and batch.rows > 1 and all(_runs(run, row) for row in single_rows(batch)):
            remedy = "the model runs on each of these rows alone: leave the batch size out, or use 1"
        raise InputError(
            f"{name} does not run on {samples.where(culprit)} of the data",
            file=samples.source,
            cause=error,
            remedy=remedy,
        ) from error


def _culprit(run: Run, batch: Batch) -> Batch:
    """The first row that fails in place of every row, if other rows do not; else the batch itself."""
    failing = [row for row in single_rows(batch, filled=True) if not _runs(run, row)]
    return failing[0] if 0 < len(failing) < batch.rows else batch


def _runs(run: Run, batch: Batch) -> bool:
    try:
        run(batch.feed)
    except Exception:
        return False
    return True


class _Buffered:
    """The tensors that a session computes, in buffers that feeds of the same shapes share."""

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
            self._session.run_with_iobinding(self._binding, run_options())
        except Exception:  # a shape that depends on the values; other errors come again without buffers
            self._binding = None
            return self._fresh(feed)
        return self._values

    def _fresh(self, feed: Arrays) -> Arrays:
        return dict(zip(self._names, self._session.run(self._names, feed, run_options()), strict=True))

    def _bound(self) -> Any:
        """A binding of the outputs to the values' memory; None where they are not all plain arrays, or the
        session is a chain."""
        if not hasattr(self._session, "io_binding") or any(
            not array.flags.c_contiguous or array.size == 0 for array in self._values.values()
        ):
            return None
        binding = self._session.io_binding()
        for name, array in self._values.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding


def _is_shared(graph: gs.Graph) -> bool:
    """Whether a session of a graph reads weights in memory; where they are large, in files or few beside the
    nodes, it parses all."""
    return weight_bytes(graph) <= IN_MEMORY and len(graph.nodes) <= MANY_NODES and not files_of(graph)


def _without_weights(
    graph: gs.Graph, edit: Callable[[onnx.GraphProto], None] | None
) -> tuple[bytes, dict[str, onnxruntime.OrtValue]]:
    """The serialized model of a graph, and its large weights, which are not copied."""
    proto, constants = export_light(graph)
    weights = {}
    for tensor in proto.graph.initializer:
        if tensor.name not in constants:
            continue
        values = values_of(constants[tensor.name])
        if values.nbytes < _SHARED:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        else:
            values = np.ascontiguousarray(values)
            weights[tensor.name] = onnxruntime.OrtValue.ortvalue_from_numpy(values)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="memory")
    if edit is not None:
        edit(proto.graph)
    return proto.SerializeToString(), weights


def _trim() -> None:
    """Give freed memory back to the system, where the C library can.

    What loading, folding and serializing a model leave behind is too scattered for the activations, which
    would come on top of it.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
