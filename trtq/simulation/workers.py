"""Work over samples in shards: in this process, in several, or on the machines of a cluster.

A shard is a fixed number of rows, whatever the number of workers, and shards add up exactly, so the result
is the same to the byte wherever they run (floating point itself may differ between kinds of processors).
What was computed of a shard is kept in the cache until the whole is: a job that was interrupted goes on
where it stopped.

Workers are joblib's: its own processes (loky), or a Dask cluster. What travels to them is where the data are,
never the rows. The model travels as a path to processes on this machine, and as bytes to a
cluster (Dask: once per worker), whose machines need not share a disk with this one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

import trtq
from trtq.cache import Cache, Key, remove
from trtq.code_hash import code_sha256
from trtq.console import Advance, Console
from trtq.data.load import reload
from trtq.data.samples import Origin, Samples, rows_of
from trtq.errors import InputError, MissingBackendError, TrtqError
from trtq.files import sha256_json, write_bytes
from trtq.graph import references
from trtq.graph.model import model_files, model_sha256, save_model
from trtq.scratch import scratch_folder
from trtq.simulation.pool import Pool
from trtq.simulation.processors import processors
from trtq.simulation.session import simulation_fingerprint
from trtq.stops import end_with

SHARD_ROWS = 128
"""Rows of a shard; more where that is needed for whole samples and whole batches."""

MOST_SHARDS = 256
"""Above that many, shards get larger: each has a file of its own."""

KEPT_BYTES = 1 << 28
"""Results above this size are not cached."""

ATTEMPTS = 3
"""How often workers may die in a row without finishing a shard."""

_SECONDS_TO_CONNECT = 10

Task = functools.partial[bytes]
"""What is done with a shard: a module's function with its first arguments, so that it can be sent. It takes
the shard's samples, an `Advance` or None, and the shard's arguments."""


@dataclass(frozen=True)
class Shipped:
    """An ONNX model as workers get it; equal where the content is.

    Attributes:
        path: where the file is on this machine.
        contents: file -> bytes of the model and its external data; empty: workers read `path`.
    """

    sha256: str
    path: Path = field(compare=False)
    contents: Mapping[str, bytes] = field(compare=False)

    @classmethod
    def of(cls, path: Path, pool: Pool) -> Shipped:
        """A model's files, for the workers of a pool."""
        path = path.absolute()
        files = [] if pool.on_this_machine else model_files(path)
        contents = {str(file.relative_to(path.parent)): file.read_bytes() for file in files}
        return cls(model_sha256(path), path, contents)

    @contextlib.contextmanager
    def open(self) -> Iterator[Path]:
        """The model's file in the worker, while the context lasts."""
        if not self.contents:
            yield self.path
            return
        with scratch_folder() as folder:
            for name, content in self.contents.items():
                write_bytes(folder / name, content)
            yield folder / self.path.name


@contextlib.contextmanager
def shipped_graph(graph: gs.Graph, pool: Pool) -> Iterator[Shipped]:
    """A graph as a file for the workers, while the context lasts."""
    with scratch_folder() as folder:
        save_model(graph, path := folder / "model.onnx")
        yield Shipped.of(path, pool)


@dataclass(frozen=True)
class Shard:
    """A part of the work.

    Attributes:
        samples: what it is done with.
        key: where its result is kept; None: nowhere.
        size: how much of the work it is, in the progress bar's unit.
        arguments: what else the task is given.
    """

    samples: Samples
    key: Key | None
    size: int
    arguments: tuple[Any, ...] = ()

    @property
    def rows(self) -> str:
        """Its first and last row and their source, for a message."""
        first, last = (self.samples.row_number(i) for i in (0, len(self.samples) - 1))
        return f"rows {first} to {last} of {self.samples.source}"

    def sent(self) -> tuple[Origin, NDArray[np.int64], Mapping[str, list[NDArray]], str, tuple[Any, ...]]:
        """What a worker needs to read the samples itself, with the states that no file has, and the
        arguments."""
        if self.samples.origin is None or self.samples.positions is None:
            raise InputError(
                "workers cannot read samples that were made in memory",
                remedy="load them from a file, a folder or a URL, or leave --parallel out",
            )
        states = {name: rows_of(self.samples.columns[name]) for name in self.samples.origin.feeding.state}
        return self.samples.origin, self.samples.positions, states, self.rows, self.arguments


def cut(samples: Samples, key: Key, batch: int) -> list[Shard]:
    """The shards: whole samples, whole sequences, and whole batches but for the last."""
    step = math.lcm(samples.group, batch, samples.fixed_batch or 1)
    rows = math.ceil(max(SHARD_ROWS, len(samples) / MOST_SHARDS) / step) * step
    of, shards = sha256_json(key.to_json()), []
    for first, end in itertools.pairwise([*_cuts(samples, rows), len(samples)]):
        part = samples.subset(range(first // samples.group, end // samples.group))
        shard = Key.of("shard", model=key.model, data=key.data, of=of, first=first, rows=len(part))
        shards.append(Shard(part, shard, len(part)))
    return shards


def _cuts(samples: Samples, rows: int) -> Iterator[int]:
    """The first row of each shard: every `rows` rows, or at the first sequence that starts behind those."""
    if samples.sequences is None:
        yield from range(0, len(samples), rows)
        return
    last = -rows
    for start in samples.sequences.starts:
        if start - last >= rows and start % samples.group == 0:
            yield start
            last = start


def results(
    task: Task,
    shards: Sequence[Shard],
    pool: Pool | None,
    cache: Cache,
    console: Console,
    label: str,
    unit: str = "row",
) -> Iterator[tuple[int, bytes]]:
    """Number and result of every shard, as they finish; those of an interrupted job come first."""
    missing = []
    with console.progress(label, sum(shard.size for shard in shards), unit) as advance:
        for index, shard in enumerate(shards):
            if shard.key is None or (content := cache.fetch(shard.key)) is None:
                missing.append(index)
            else:
                advance(shard.size)
                yield index, content
        if missing and len(missing) < len(shards):
            console.say(label, f"{len(shards) - len(missing)} of {len(shards)} shards were done before")
        run = _run_here(task, shards, missing, advance)
        if pool is not None:
            run = _run_in(pool, task, shards, missing, advance)
        for index, content in run:
            key = shards[index].key
            if key is not None and len(shards) > 1 and len(content) <= KEPT_BYTES:
                cache.store(key, content)
            yield index, content


@dataclass(frozen=True)
class Work:
    """How shards are worked on, and where the result goes: to the cache under `key`, and until it is complete
    the results of the shards.

    Attributes:
        label: what the progress is called.
        pool: the workers; None: this process.
    """

    key: Key
    cache: Cache
    console: Console
    label: str
    pool: Pool | None = None

    def results(self, task: Task, shards: Sequence[Shard]) -> Iterator[tuple[int, bytes]]:
        """As `results`."""
        return results(task, shards, self.pool, self.cache, self.console, self.label)

    def store(self, content: bytes | None, shards: Sequence[Shard]) -> None:
        """Keep the whole, unless it is too large (None), and nothing of its shards."""
        if content is not None:
            self.cache.store(self.key, content)
        for shard in shards:
            if shard.key is not None:
                remove(self.cache.path(shard.key))


def _run_here(
    task: Task, shards: Sequence[Shard], wanted: Sequence[int], advance: Advance
) -> Iterator[tuple[int, bytes]]:
    for index in wanted:
        yield index, task(shards[index].samples, advance, *shards[index].arguments)


def _run_in(
    pool: Pool, task: Task, shards: Sequence[Shard], wanted: Sequence[int], advance: Advance
) -> Iterator[tuple[int, bytes]]:
    """Run shards in a pool; those that were lost with a worker are run again."""
    joblib = _required("joblib", "pip install 'trtq[parallel]'")
    work = joblib.delayed(_work)
    waiting = {index: (references.files(), index, *shards[index].sent()) for index in wanted}
    left = ATTEMPTS
    while waiting:
        calls = [work(task, _versions(task), *arguments) for arguments in waiting.values()]
        try:
            with _backend(pool, joblib, task) as options, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "[0-9]+ tasks", UserWarning)  # Ctrl-C cancels them
                parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, **options)
                for index, content in parallel(calls):
                    del waiting[index]
                    left = ATTEMPTS
                    advance(shards[index].size)
                    yield index, content
        except TrtqError:
            raise
        except _deaths() as error:
            left -= 1
            if not left:
                raise InputError(
                    f"workers died {ATTEMPTS} times; the first shard without a result is"
                    f" {shards[next(iter(waiting))].rows}",
                    cause=error,
                    remedy="they may lack memory: use fewer processes, or look at those samples",
                ) from error
        except Exception as error:
            raise InputError(
                f"the workers ({pool.backend}) cannot do the work",
                cause=f"{type(error).__name__}: {error}",
                remedy="every machine needs the same trtq; look at the workers' logs",
            ) from error


@contextlib.contextmanager
def _backend(pool: Pool, joblib: Any, task: Task) -> Iterator[dict[str, Any]]:
    """Make the pool joblib's backend; gives what is to be said to it besides. Processes of loky end with this
    one: left alone, they would wait for work for minutes."""
    if pool.backend == "loky":
        with joblib.parallel_config("loky", n_jobs=pool.processes or processors()):
            yield {"initializer": end_with, "initargs": (os.getpid(),)}
    else:
        distributed = _required("distributed", "pip install 'trtq[dask]'")
        try:
            client = distributed.Client(pool.address, timeout=_SECONDS_TO_CONNECT, set_as_default=False)
        except (OSError, ValueError) as error:
            raise InputError(f"no Dask scheduler answers at {pool.address}", cause=error) from error
        with client, joblib.parallel_config("dask", client=client, scatter=[task]):
            yield {}


def _required(module: str, remedy: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingBackendError(
            f"--parallel needs {package}, which is not installed", cause=error, remedy=remedy
        ) from error


def _deaths() -> tuple[type[BaseException], ...]:
    """What joblib raises when a worker died: loky's error, and Dask's where that is in use."""
    distributed = sys.modules.get("distributed")
    killed = () if distributed is None else (distributed.KilledWorker, concurrent.futures.CancelledError)
    return (concurrent.futures.BrokenExecutor, *killed)


# --- in the worker ------------------------------------------------------------------------------------


def _work(
    task: Task,
    versions: str,
    files: Sequence[str],
    index: int,
    origin: Origin,
    positions: NDArray[np.int64],
    states: Mapping[str, list[NDArray]],
    rows: str,
    arguments: tuple[Any, ...],
) -> tuple[int, bytes]:
    """Do a task for the samples at some positions of a source.

    Args:
        files: with references of operators.

    Raises:
        InputError: it failed; the problem names the rows.
    """
    try:
        references.use(files)
        if versions != _versions(task):
            raise InputError(
                "a worker runs different software from the process that started the work",
                cause=f"{versions}; the worker: {_versions(task)}",
                remedy="install the same versions on all machines",
            )
        samples = reload(origin).subset(positions)
        samples = replace(samples, columns=dict(samples.columns) | dict(states))
        return index, task(samples, None, *arguments)
    except MissingBackendError:
        raise
    except Exception as error:
        known = error if isinstance(error, InputError) else InputError(f"{type(error).__name__}: {error}")
        raise InputError(
            f"{rows} failed: {known.problem}", file=known.file, cause=known.cause, remedy=known.remedy
        ) from error


def _versions(task: Task) -> str:
    """The software that a task's result depends on."""
    code = code_sha256(__name__, task.func.__module__)
    return f"trtq {trtq.__version__} ({code[:12]}), {simulation_fingerprint()}"
