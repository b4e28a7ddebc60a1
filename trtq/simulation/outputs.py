"""A model's outputs on every row of the samples, of an ONNX model as simulated on the CPU.

Rows run batch by batch, so that memory holds one batch and the outputs. A model whose outputs do not have a
row for each row of the batch (boxes behind a NonMaxSuppression, sequences first, a scalar) runs on one row at
a time.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtq.arrays import read_arrays
from trtq.console import Advance
from trtq.data.batches import Arrays, Batch, batches, single_rows
from trtq.data.samples import Samples
from trtq.errors import InputError, TrtqError
from trtq.graph.door import read_model
from trtq.graph.selecting import sized_by_values
from trtq.simulation.rows import Runner, rows_at_once
from trtq.simulation.states import following, step_by_step
from trtq.simulation.values import Values, joined, nbytes, packed, unpacked
from trtq.simulation.workers import KEPT_BYTES, Shipped, Work, cut

Executor = Literal["engine", "simulation"]
"""What computed outputs: an engine on the GPU, or ONNX Runtime."""

DEFAULT_BATCH_SIZE = 16


@dataclass(frozen=True)
class Outputs:
    """A model's outputs, rows in the samples' order, and what computed them.

    Attributes:
        mixed: names of those that are others for a row where other rows share its batch, as far as the first
            batch of several rows tells.
    """

    arrays: dict[str, Values]
    executor: Executor
    mixed: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(map(nbytes, self.arrays.values()))

    @classmethod
    def concatenated(cls, parts: Sequence[Outputs]) -> Outputs:
        """The outputs of consecutive parts of the samples as those of all of them."""
        arrays = {name: joined([part.arrays[name] for part in parts]) for name in parts[0].arrays}
        mixed = dict.fromkeys(name for part in parts for name in part.mixed)
        return cls(arrays, parts[0].executor, tuple(mixed))

    def to_bytes(self) -> bytes:
        """An `.npz`; equal outputs give equal bytes."""
        buffer = io.BytesIO()
        stored: dict[str, Any] = {
            "names": np.array(list(self.arrays)),
            "executor": np.array(self.executor),
            "mixed": np.array(self.mixed, np.str_),
        }
        for name, values in self.arrays.items():
            if isinstance(values, np.ndarray):
                stored[f"output.{name}"] = values
            else:
                stored |= {f"{part}.{name}": array for part, array in packed(values).items()}
        np.savez(buffer, **stored)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Outputs:
        """The inverse of `to_bytes`."""
        stored = read_arrays(content)
        arrays: dict[str, Values] = {
            name: stored[f"output.{name}"]
            if f"output.{name}" in stored
            else unpacked({part: stored[f"{part}.{name}"] for part in ("values", "ranks", "sizes")})
            for name in stored["names"].tolist()
        }
        executor: Executor = "engine" if str(stored["executor"]) == "engine" else "simulation"
        return cls(arrays, executor, tuple(stored["mixed"].tolist()))


class BatchLimits(NamedTuple):
    """Fewest and most rows that a model takes at once; `highest` None: any number."""

    lowest: int
    highest: int | None

    def size(self, wanted: int | None, model: str | Path) -> int:
        """Rows of a batch: as wanted, or what the model takes.

        Raises:
            InputError: the model does not take as many.
        """
        if wanted is not None and wanted < 1:
            raise InputError(f"the batch size must be at least 1, not {wanted}")
        if self.highest is None:
            return wanted or DEFAULT_BATCH_SIZE
        if wanted is not None and wanted > self.highest:
            raise InputError(f"the model takes at most {self.highest} rows, not {wanted}", file=model)
        return wanted or self.highest


def run_model(
    model: str | Path,
    samples: Samples,
    *,
    batch_size: int | None = None,
    threads: int | None = None,
    progress: Callable[[int], object] | None = None,
    runner: Runner | None = None,
    sized: Collection[str] | None = None,
) -> Outputs:
    """The outputs of an ONNX model on every row of `samples`, simulated on the CPU.

    Consecutive rows of equal shapes run as one batch. A batch smaller than the model takes is filled up by
    repeating its last row; those outputs are dropped. The rows of a sequence run one after the other, each
    with the states that the model left at the one before.

    Args:
        batch_size: rows at once; None: the model's fixed batch, else up to `DEFAULT_BATCH_SIZE` (see
            `rows_at_once`), or 1 where the model does not run on more.
        threads: CPU threads; None: all processors.
        progress: called with the number of rows just done, such as a progress bar's `update`.
        runner: of the model; None: one for this call.
        sized: what `sized_by_values` says of the model; None: it is asked, if need be.

    Raises:
        InputError: the model does not load, does not take these inputs or this batch size, or fixes a batch
            of several rows and has outputs that cannot be told apart row by row.
    """
    if len(samples) == 0:
        raise InputError("the data has no rows")
    runner = runner or Runner(model, threads=threads)
    limits = _limits(runner.inputs, samples)
    free = batch_size is None and limits.highest is None
    wanted = rows_at_once(samples, DEFAULT_BATCH_SIZE) if free else batch_size
    parts = batches_for(list(runner.inputs), samples, limits, wanted, model)
    if batch_size is None:
        parts = runner.taken(parts)
    run = following(functools.partial(runner.on, samples=samples), samples)

    def by_value() -> Collection[str]:
        return sized_by_values(read_model(model), samples.axes) if sized is None else sized

    found, mixed = gathered(run, parts, len(samples), model, progress, apart=runner.apart, by_value=by_value)
    return Outputs(found, "simulation", mixed)


def run_sharded(
    model: Path,
    samples: Samples,
    work: Work,
    *,
    batch_size: int | None = None,
    threads: int | None = None,
    fused: bool = False,
) -> Outputs:
    """`run_model` in shards; the result is stored in the cache under the work's key.

    Args:
        batch_size, threads: as for `run_model`, for each worker.
        fused: see `simulation_session`.

    Raises:
        InputError: as `run_model`, with the shard's rows and source where a worker failed; workers die.
        MissingBackendError: the backend's package is not installed.
    """
    shards, pool = cut(samples, work.key, batch_size or DEFAULT_BATCH_SIZE), work.pool
    sized = sized_by_values(read_model(model), samples.axes)
    if pool is None:
        runner = Runner(model, threads=threads, fused=fused)
        task = functools.partial(_outputs, model, runner, sized, batch_size)
    else:
        shipped = Shipped.of(model, pool)
        task = functools.partial(
            _outputs_of_shipped, shipped, pool.threads(threads), fused, sized, batch_size
        )
    parts = {index: Outputs.from_bytes(content) for index, content in work.results(task, shards)}
    outputs = Outputs.concatenated([parts[index] for index in range(len(shards))])
    work.store(outputs.to_bytes() if outputs.nbytes <= KEPT_BYTES else None, shards)
    return outputs


def gathered(
    run: Callable[[Batch], Arrays],
    parts: Iterable[Batch],
    total: int,
    model: str | Path,
    progress: Callable[[int], object] | None = None,
    *,
    apart: Collection[str] = (),
    by_value: Callable[[], Collection[str]],
) -> tuple[dict[str, Values], tuple[str, ...]]:
    """What a model makes of all batches, one after the other: output name -> values, rows first; and the
    outputs that are `Outputs.mixed`.

    Where an output does not have a row for each row of the first batch, the rows run one by one, and what the
    model then gives is the row's value as it stands.

    Args:
        total: rows in all.
        model: its file, for messages.
        apart: outputs whose first axis is not the rows, whatever their size.
        by_value: names those that may have as many entries as there are rows by chance (`sized_by_values`);
            called after a batch has run, if at all.

    Raises:
        InputError: there are not as many rows, or an output cannot be told apart row by row.
    """
    columns, first, done = Columns(total, model, apart), _First(run, apart, by_value), 0
    for batch, outputs in _told_apart(run, parts, first):
        done += batch.rows
        if done > total:
            break
        columns.add(batch, outputs)
        if progress is not None:
            progress(batch.rows)
    if done != total:
        raise InputError(f"the data did not give the {total} rows that it says it has")
    return columns.values, first.mixed


def _told_apart(
    run: Callable[[Batch], Arrays], parts: Iterable[Batch], first: _First
) -> Iterator[tuple[Batch, Arrays]]:
    """The batches with their outputs, or the rows with theirs where the first batch of several needs that."""
    seen, rows_of = False, None
    for batch in parts:
        outputs = None
        if batch.rows > 1 and not seen:
            seen, outputs = True, run(batch)
            rows_of = first.one_by_one(batch, outputs)
        if rows_of is not None:
            yield from ((row, run(row)) for row in rows_of(batch))
        else:
            yield batch, run(batch) if outputs is None else outputs


class _First:
    """What the first batch of several rows tells of a model; see `gathered` for the arguments.

    Attributes:
        mixed: outputs that are others for a row where other rows share its batch.
    """

    def __init__(
        self, run: Callable[[Batch], Arrays], apart: Collection[str], by_value: Callable[[], Collection[str]]
    ) -> None:
        self._run, self._apart, self._by_value = run, apart, by_value
        self.mixed: tuple[str, ...] = ()

    def one_by_one(self, batch: Batch, outputs: Arrays) -> Callable[[Batch], Iterable[Batch]] | None:
        """How the rows of batches run one by one, or None where they need not: every output of this batch has
        a row for each of its rows, and one of that shape for a row alone (as many time steps may be there by
        chance), and none has as many boxes by chance. A model that does not run on one row gets copies of it.
        """
        size, middle = batch.rows + batch.padding, batch.rows // 2
        by_row = all(o.ndim and len(o) == size and name not in self._apart for name, o in outputs.items())
        by_row = by_row and not self._by_value()
        try:
            alone = self._run(list(single_rows(batch))[middle])
        except TrtqError:
            if not by_row:
                return functools.partial(single_rows, filled=True)
            alone = None
        if alone and any(alone[name].shape != (1, *o.shape[1:]) for name, o in outputs.items()):
            by_row = False
        if not by_row:
            return single_rows
        if alone is None or any(_differ(alone[name][0], o[middle]) for name, o in outputs.items()):
            own = {name: o[middle] for name, o in outputs.items()}
            same = self._run(list(single_rows(batch, filled=True))[middle])  # in the company of its copies
            self.mixed = tuple(name for name, row in own.items() if _differ(same[name][middle], row))
        return None


_ROUNDING = 1e-4
"""Of the largest value of an output: what is computed in another order differs by less."""


def _differ(one: NDArray, other: NDArray) -> bool:
    """Whether two values of an output are others but for rounding."""
    if one.dtype.kind not in "fc":
        return not np.array_equal(one, other)
    largest = np.abs(one[np.isfinite(one)]).max(initial=0)
    return not np.allclose(one, other, rtol=0, atol=_ROUNDING * largest, equal_nan=True)


class NotByRowError(InputError):
    """An output that does not have a row for each row of a batch."""

    def __init__(self, name: str, output: NDArray, size: int, model: str | Path) -> None:
        super().__init__(
            f"output {name!r} does not have one row per sample",
            file=model,
            cause=f"its shape is {output.shape} for a batch of {size}",
            remedy="export the model with a batch of 1 or a dynamic batch",
        )


class Columns:
    """The values of all outputs as they come, batch by batch.

    Args:
        total: rows in all.
        model: its file, for messages.
        apart: outputs whose first axis is not the rows, whatever their size.
    """

    def __init__(self, total: int, model: str | Path, apart: Collection[str] = ()) -> None:
        self._total, self._model, self._apart = total, model, apart
        self._columns: dict[str, _Column] = {}

    def add(self, batch: Batch, outputs: Arrays) -> None:
        """Keep what a batch gave.

        Raises:
            NotByRowError: an output neither has a row for each row of the batch, nor is always the same.
            InputError: an output holds text.
        """
        for name, output in outputs.items():
            if output.dtype.hasobject:
                raise InputError(
                    f"output {name!r} holds text, and only numbers can be compared",
                    file=self._model,
                    remedy="export the model without the lookup of names, or without that output",
                )
            column = self._columns.setdefault(name, _Column(self._total))
            size = batch.rows + batch.padding
            if output.ndim and len(output) == size and name not in self._apart:
                column.add(batch, output[: batch.rows])
            elif size > 1 and not column.is_always(output):
                raise NotByRowError(name, output, size, self._model)
            else:
                column.add(batch, batch.rows * [np.array(output)])

    @property
    def values(self) -> dict[str, Values]:
        """Output name -> the values of all rows."""
        return {name: column.values for name, column in self._columns.items()}


class _Column:
    """The values of one output: in one array of `total` rows as long as they have one shape."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._whole: NDArray | None = None
        self._parts: list[Values] = []

    def add(self, batch: Batch, part: Values) -> None:
        if self._whole is None and not self._parts and isinstance(part, np.ndarray):
            self._whole = np.empty((self._total, *part.shape[1:]), part.dtype)
        if self._whole is not None:
            if isinstance(part, np.ndarray) and part.shape[1:] == self._whole.shape[1:]:
                self._whole[batch.start : batch.start + batch.rows] = part
                return
            self._parts, self._whole = [self._whole[: batch.start]] if batch.start else [], None
        self._parts.append(np.array(part) if isinstance(part, np.ndarray) else part)

    def is_always(self, output: NDArray) -> bool:
        """Whether every row so far gave this."""
        return self._whole is None and all(np.array_equal(part[0], output) for part in self._parts[:1])

    @property
    def values(self) -> Values:
        return joined(self._parts) if self._whole is None else self._whole


def batches_for(
    inputs: Sequence[str], samples: Samples, limits: BatchLimits, batch_size: int | None, model: str | Path
) -> Iterable[Batch]:
    """The batches that a model with these inputs runs on; the rows of sequences one by one.

    Args:
        limits: on the rows of a batch; `batch_size` as for `run_model`.
        model: its file, for messages.
    """
    size = limits.size(batch_size, model)
    if missing := [name for name in inputs if name not in samples.axes]:
        raise InputError(
            f"the data has no array for input {missing[0]!r}",
            file=model,
            cause=f"the model's inputs are {', '.join(inputs)}; the data has {', '.join(samples.axes)}",
        )
    if samples.sequences is not None:
        return step_by_step(samples, inputs, limits.lowest)
    rows = ({name: row[name] for name in inputs} for row in samples.rows())
    return batches(rows, 1 if samples.alone else size, limits.lowest, samples.axes)


def _limits(inputs: dict[str, tuple[int | str | None, ...]], samples: Samples) -> BatchLimits:
    """Batch limits from input shapes: a static batch dimension N is a batch of exactly N."""
    axes = samples.axes
    sizes = [
        shape[axis]
        for name, shape in inputs.items()
        if (axis := axes.get(name, 0)) is not None and axis < len(shape)
    ]
    static = [size for size in sizes if isinstance(size, int) and size > 0]
    return BatchLimits(max(static), min(static)) if static else BatchLimits(1, None)


# --- in the worker ------------------------------------------------------------------------------------


def _outputs(
    model: Path,
    runner: Runner,
    sized: Collection[str],
    batch_size: int | None,
    samples: Samples,
    advance: Advance | None,
) -> bytes:
    found = run_model(model, samples, batch_size=batch_size, progress=advance, runner=runner, sized=sized)
    return found.to_bytes()


def _outputs_of_shipped(
    model: Shipped,
    threads: int,
    fused: bool,
    sized: Collection[str],
    batch_size: int | None,
    samples: Samples,
    advance: Advance | None,
) -> bytes:
    return _outputs(model.path, _runner(model, threads, fused), sized, batch_size, samples, advance)


@functools.lru_cache(maxsize=1)
def _runner(model: Shipped, threads: int, fused: bool) -> Runner:
    """The runner of this worker, which serves all of its shards."""
    with model.open() as path:
        return Runner(path, threads=threads, fused=fused)
