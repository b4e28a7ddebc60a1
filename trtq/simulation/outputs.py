"""A model's outputs on every row of the samples, of an ONNX model as simulated on the CPU.

Rows run batch by batch, so that memory holds one batch and the outputs.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtq.console import Advance
from trtq.data.batches import Arrays, Batch, batches
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.simulation.rows import Runner
from trtq.simulation.states import following, step_by_step
from trtq.simulation.workers import KEPT_BYTES, Shipped, Work, cut

Executor = Literal["engine", "simulation"]
"""What computed outputs: an engine on the GPU, or ONNX Runtime."""

DEFAULT_BATCH_SIZE = 16


@dataclass(frozen=True)
class Outputs:
    """A model's outputs, rows in the samples' order, and what computed them."""

    arrays: Arrays
    executor: Executor

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @classmethod
    def concatenated(cls, parts: Sequence[Outputs], model: str | Path) -> Outputs:
        """The outputs of consecutive parts of the samples as those of all of them.

        Raises:
            InputError: an output's shape changes from part to part.
        """
        names = list(parts[0].arrays)
        for name, part in itertools.product(names, parts):
            _check_shape(name, part.arrays[name], parts[0].arrays[name], model)
        arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in names}
        return cls(arrays, parts[0].executor)

    def to_bytes(self) -> bytes:
        """An `.npz`; equal outputs give equal bytes."""
        buffer = io.BytesIO()
        stored: dict[str, Any] = {"names": np.array(list(self.arrays)), "executor": np.array(self.executor)}
        stored |= {f"output.{name}": array for name, array in self.arrays.items()}
        np.savez(buffer, **stored)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Outputs:
        """The inverse of `to_bytes`."""
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = {name: stored[f"output.{name}"] for name in stored["names"].tolist()}
            return cls(arrays, "engine" if str(stored["executor"]) == "engine" else "simulation")


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
) -> Outputs:
    """The outputs of an ONNX model on every row of `samples`, simulated on the CPU.

    Consecutive rows of equal shapes run as one batch. A batch smaller than the model takes is filled up by
    repeating its last row; those outputs are dropped. The rows of a sequence run one after the other, each
    with the states that the model left at the one before.

    Args:
        batch_size: rows at once; None: the model's fixed batch, else `DEFAULT_BATCH_SIZE`, or 1 where the
            model does not run on more.
        threads: CPU threads; None: all processors.
        progress: called with the number of rows just done, such as a progress bar's `update`.
        runner: of the model; None: one for this call.

    Raises:
        InputError: the model does not load, does not take these inputs or this batch size, or has
            outputs that cannot be put together row by row.
    """
    if len(samples) == 0:
        raise InputError("the data has no rows")
    runner = runner or Runner(model, threads=threads)
    limits = _limits(runner.inputs, samples)
    parts = batches_for(list(runner.inputs), samples, limits, batch_size, model)
    if batch_size is None:
        parts = runner.taken(parts)
    run = following(functools.partial(runner.on, samples=samples), samples)
    return Outputs(gathered(run, parts, len(samples), model, progress), "simulation")


def run_sharded(
    model: Path, samples: Samples, work: Work, *, batch_size: int | None = None, threads: int | None = None
) -> Outputs:
    """`run_model` in shards; the result is stored in the cache under the work's key.

    Args:
        batch_size, threads: as for `run_model`, for each worker.

    Raises:
        InputError: as `run_model`, with the shard's rows and source where a worker failed; workers die.
        MissingBackendError: the backend's package is not installed.
    """
    shards, pool = cut(samples, work.key, batch_size or DEFAULT_BATCH_SIZE), work.pool
    if pool is None:
        task = functools.partial(_outputs, model, Runner(model, threads=threads), batch_size)
    else:
        shipped = Shipped.of(model, pool)
        task = functools.partial(_outputs_of_shipped, shipped, pool.threads(threads), batch_size)
    parts = {index: Outputs.from_bytes(content) for index, content in work.results(task, shards)}
    outputs = Outputs.concatenated([parts[index] for index in range(len(shards))], model)
    work.store(outputs.to_bytes() if outputs.nbytes <= KEPT_BYTES else None, shards)
    return outputs


def gathered(
    run: Callable[[Batch], Arrays],
    parts: Iterable[Batch],
    total: int,
    model: str | Path,
    progress: Callable[[int], object] | None = None,
) -> Arrays:
    """What a model makes of all batches, one after the other: output name -> array, rows first.

    Args:
        total: rows in all.
        model: its file, for messages.

    Raises:
        InputError: there are not as many rows, or an output cannot be put together row by row.
    """
    arrays: Arrays = {}
    done = 0
    for batch in parts:
        done += batch.rows
        if done > total:
            break
        for name, output in run(batch).items():
            if batch.rows + batch.padding == 1 and output.shape[:1] != (1,):
                output = np.asarray(output)[None]  # the row's value as it stands
            _check_output(name, output, batch.rows + batch.padding, arrays.get(name), model)
            if name not in arrays:
                arrays[name] = np.empty((total, *output.shape[1:]), output.dtype)
            arrays[name][batch.start : batch.start + batch.rows] = output[: batch.rows]
        if progress is not None:
            progress(batch.rows)
    if done != total:
        raise InputError(f"the data did not give the {total} rows that it says it has")
    return arrays


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


def _check_output(
    name: str, output: NDArray, batch: int, collected: NDArray | None, model: str | Path
) -> None:
    """Refuse an output that does not have a row per row of the batch, of the shape seen before."""
    if output.ndim == 0 or len(output) != batch:
        raise InputError(
            f"output {name!r} does not have one row per sample",
            file=model,
            cause=f"its shape is {output.shape} for a batch of {batch}",
            remedy="give every output of the model a leading batch axis",
        )
    if collected is not None:
        _check_shape(name, output, collected, model)


def _check_shape(name: str, output: NDArray, collected: NDArray, model: str | Path) -> None:
    if output.shape[1:] != collected.shape[1:]:
        raise InputError(
            f"output {name!r} changes its shape from sample to sample",
            file=model,
            cause=f"{collected.shape[1:]} and then {output.shape[1:]}",
            remedy="pad the samples to one shape",
        )


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
    model: Path, runner: Runner, batch_size: int | None, samples: Samples, advance: Advance | None
) -> bytes:
    return run_model(model, samples, batch_size=batch_size, progress=advance, runner=runner).to_bytes()


def _outputs_of_shipped(
    model: Shipped, threads: int, batch_size: int | None, samples: Samples, advance: Advance | None
) -> bytes:
    return _outputs(model.path, _runner(model, threads), batch_size, samples, advance)


@functools.lru_cache(maxsize=1)
def _runner(model: Shipped, threads: int) -> Runner:
    """The runner of this worker, which serves all of its shards."""
    with model.open() as path:
        return Runner(path, threads=threads)
