"""Sequences: each row runs with the states that the row before it left."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtq.arrays import read_arrays
from trtq.cache import Cache, Key
from trtq.console import Console
from trtq.data.batches import Arrays, Batch, repeated
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.files import sha256_json
from trtq.graph.inputs import InputSpec, dims_text, fits
from trtq.graph.model import model_sha256
from trtq.simulation.rows import Runner, Workers
from trtq.simulation.session import simulation_fingerprint

MOST_BYTES = 1 << 28
"""States above this size are not cached."""


def step_by_step(
    samples: Samples, inputs: Sequence[str], lowest: int = 1, rows: Iterable[int] | None = None
) -> Iterator[Batch]:
    """The rows of sequences, each as a batch of its own; of a state only what sequences start from.

    Args:
        inputs: names of what is fed.
        lowest: fewest rows that the model takes; a row is repeated to make as many.
        rows: indices; default: all.
    """
    assert samples.sequences is not None
    starts, state = frozenset(samples.sequences.starts), samples.sequences.state
    for index in range(len(samples)) if rows is None else rows:
        names = [name for name in inputs if index in starts or name not in state]
        batch = repeated(samples.row(index, names), lowest, samples.axes)
        yield replace(batch, start=index, rows=1, padding=lowest - 1)


def following(run: Callable[[Batch], Arrays], samples: Samples) -> Callable[[Batch], Arrays]:
    """`run` for the batches of `step_by_step` in their order: it adds the states that the row before left.

    Where there are no sequences it is `run` itself.

    Raises:
        InputError: the model has no such output, or what it gives does not suit the input.
    """
    if samples.sequences is None:
        return run
    starts, state = frozenset(samples.sequences.starts), samples.sequences.state
    specs = {spec.name: spec for spec in samples.specs}
    left: Arrays = {}

    def run_next(batch: Batch) -> Arrays:
        if batch.start not in starts:
            batch = replace(batch, feed=batch.feed | left)
        outputs = run(batch)
        left.update({name: _as_input(specs[name], output, outputs) for name, output in state.items()})
        return outputs

    return run_next


def with_states(
    model: Path,
    samples: Samples,
    cache: Cache,
    console: Console,
    *,
    sha256: str | None = None,
    workers: int | None = None,
) -> Samples:
    """The samples with the states that occur where the model runs through their sequences; the samples
    themselves where there are none.

    What needs a row by itself, such as calibration, then has it: the states are the float model's own.

    Args:
        model: the float model.
        sha256: its hash; default: found here.
        workers: sequences run at once; default: one for each processor.

    Raises:
        InputError: as `following`, or the model does not run on the rows.
    """
    if samples.sequences is None:
        return samples
    sha256 = sha256 or model_sha256(model)
    key = Key.of("states", model=sha256, data=samples.hash, executor=simulation_fingerprint())
    content = cache.fetch(key)
    states = _from_bytes(content) if content is not None else _run(model, samples, console, workers)
    if content is None and (made := _to_bytes(states)) is not None:
        cache.store(key, made)
    digest = sha256_json([samples.hash, sha256])
    return replace(samples, columns={**samples.columns, **states}, hash=digest)


def _run(model: Path, samples: Samples, console: Console, workers: int | None) -> dict[str, list[NDArray]]:
    """Input -> the state that each row is fed, without its batch axis."""
    assert samples.sequences is not None
    runner, state = Runner(model, threads=1), samples.sequences.state
    specs = [spec for spec in samples.specs if spec.name in state]

    def walk(bounds: tuple[int, int]) -> list[Arrays]:
        fed = []

        def run(batch: Batch) -> Arrays:
            fed.append({spec.name: _row(spec, batch.feed[spec.name]) for spec in specs})
            return runner.on(batch, samples)

        run_next = following(run, samples)
        for batch in step_by_step(samples, list(runner.inputs), samples.fixed_batch or 1, range(*bounds)):
            run_next(batch)
        return fed

    rows: list[Arrays] = []
    with console.progress("states", len(samples)) as advance:
        for found in Workers(workers).map(walk, samples.sequences.bounds(len(samples))):
            rows += found
            advance(len(found))
    return {spec.name: [row[spec.name] for row in rows] for spec in specs}


def _as_input(spec: InputSpec, output: str, outputs: Arrays) -> NDArray:
    """A copy of a state that the model left, as its input takes it."""
    if output not in outputs:
        raise InputError(
            f"the model has no output '{output}' to be the state '{spec.name}'",
            cause=f"its outputs are {', '.join(outputs)}",
            remedy=f"name the output in the recipe: [state] {spec.name} = ...",
        )
    left = np.asarray(outputs[output])
    if left.dtype.kind != spec.dtype.kind or not fits(spec.shape, left.shape):
        raise InputError(
            f"output '{output}' does not suit the input '{spec.name}'",
            cause=f"it is {left.dtype} {dims_text(left.shape)}; the model takes {spec}",
        )
    return np.array(left, spec.dtype)


def _row(spec: InputSpec, fed: NDArray) -> NDArray:
    return fed if spec.batch_axis is None else fed.take(0, spec.batch_axis)


def _to_bytes(states: dict[str, list[NDArray]]) -> bytes | None:
    """An `.npz`; None where a state changes its shape, or it is too much to keep."""
    alike = all(len({array.shape for array in rows}) == 1 for rows in states.values())
    if not alike or sum(array.nbytes for rows in states.values() for array in rows) > MOST_BYTES:
        return None
    buffer = io.BytesIO()
    stored: dict[str, Any] = {"names": np.array(list(states))}
    stored |= {str(index): np.stack(rows) for index, rows in enumerate(states.values())}
    np.savez(buffer, **stored)
    return buffer.getvalue()


def _from_bytes(content: bytes) -> dict[str, list[NDArray]]:
    stored = read_arrays(content)
    return {name: list(stored[str(index)]) for index, name in enumerate(stored["names"].tolist())}
