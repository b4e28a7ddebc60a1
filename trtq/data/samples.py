"""Samples: the rows a model is run on, and the targets its outputs are scored against."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trtq.data.batches import Arrays, Axes, Batch, batches
from trtq.data.feeding import Feeding
from trtq.data.preprocess import Preprocess
from trtq.data.sequences import Sequences, number_of
from trtq.data.stored import StoredRows
from trtq.errors import InputError, about
from trtq.files import sha256_bytes, sha256_json
from trtq.graph.inputs import InputSpec, fits, fixed_batch


class Column(Protocol):
    """Rows of one input, each without the batch axis: an array, a list, or something read row by row."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def rows_of(column: Column) -> list[Any]:
    """All rows of a column, read."""
    return [column[index] for index in range(len(column))]


BLOCK_BYTES = 1 << 16
"""Of the rows of an input that are looked at together."""


def at_once(column: Column) -> int:
    """How many rows of a column are looked at together; 1 where they are not stored as one array."""
    while isinstance(column, Picked):
        column = column.rows
    if not isinstance(column, np.ndarray | StoredRows):
        return 1
    return max(BLOCK_BYTES // max(prod(column.shape[1:]) * column.dtype.itemsize, 1), 1)


def block_of(column: Column, first: int, end: int) -> NDArray | None:
    """Rows from `first` to before `end` as one array; None where they are not stored as one."""
    if isinstance(column, Picked):
        start, places = int(column.indices[first]), column.indices[first:end]
        if np.array_equal(places, np.arange(start, start + end - first)):
            return block_of(column.rows, start, start + end - first)
        return None
    if isinstance(column, StoredRows):
        return column.block(first, end)
    return column[first:end] if isinstance(column, np.ndarray) else None


class Mapped:
    """A column whose rows are computed from those of another one when they are read."""

    def __init__(self, rows: Column, function: Callable[[Any], NDArray]) -> None:
        self.rows, self.function = rows, function

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> NDArray:
        return self.function(self.rows[index])


class Picked:
    """Some rows of a column, in the given order."""

    def __init__(self, rows: Column, indices: NDArray[np.int64]) -> None:
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.rows[int(self.indices[index])]


@dataclass(frozen=True)
class Origin:
    """How samples were loaded, for loading them again elsewhere (`trtq.data.load.reload`).

    Attributes:
        source: what the user named; `copy`: the same on this machine, where that is a URL.
        specs: the model's inputs.
        preprocess: input name -> how its rows are made; the hash stands for it, too.
        feeding: what else the recipe says of the inputs; the hash stands for it, too.
        hash: SHA-256 of all samples of the source.
    """

    source: str
    copy: str
    specs: tuple[InputSpec, ...]
    preprocess: Mapping[str, Preprocess] = field(compare=False)
    feeding: Feeding = field(compare=False)
    hash: str


@dataclass(frozen=True)
class Samples:
    """Rows for a model, and targets. `len` is the number of rows.

    Attributes:
        source: where they come from, as the user wrote it.
        specs: the model's inputs.
        columns: input name -> rows (see `Column`), all of one length.
        targets: target name -> array; its first axis is the rows, or every group of k consecutive rows.
        hash: SHA-256 of rows, targets and preprocessing, whatever the files are called.
        origin: how they were loaded; None where they were made in memory.
        positions: positions of the samples in the source, int64; None: all of them.
        sequences: which rows follow each other, each with the state that the one before it leaves; None: all
            rows stand for themselves, and what they hold of a state is given.
        files: (first row, file) of each file that rows come from, where there are several, for messages.
        owner: what the files that rows are read from last as long as, where they are scratch.
    """

    source: str
    specs: tuple[InputSpec, ...]
    columns: Mapping[str, Column]
    targets: Mapping[str, NDArray]
    hash: str
    origin: Origin | None = None
    positions: NDArray[np.int64] | None = None
    sequences: Sequences | None = None
    files: Sequence[tuple[int, str]] = field(default=(), compare=False, repr=False)
    owner: object = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def group(self) -> int:
        """How many consecutive rows make one sample: 1 unless there are fewer targets than rows."""
        return len(self) // len(next(iter(self.targets.values()))) if self.targets else 1

    def rows(self) -> Iterator[Arrays]:
        """One feed per row: input name -> array of the model's dtype and rank, of 1 along its batch axis.

        Raises:
            InputError: a row's shape or dtype is not what the model takes, or it is not finite.
        """
        size = min(at_once(self.columns[spec.name]) for spec in self.specs)
        for first in range(0, len(self), size):
            end = min(first + size, len(self))
            blocks = {spec.name: self._block(spec, first, end) for spec in self.specs} if size > 1 else {}
            known = {name: block for name, block in blocks.items() if block is not None}
            others = [spec for spec in self.specs if spec.name not in known]
            for index in range(first, end):
                fed = {name: block[index - first, ...] for name, block in known.items()}
                yield fed | {spec.name: self._fed(spec, index) for spec in others} if others else fed

    def row(self, index: int, names: Collection[str] | None = None) -> Arrays:
        """One feed; of the named inputs only, where some are named.

        Raises:
            InputError: as `rows`.
        """
        return {
            spec.name: self._fed(spec, index) for spec in self.specs if names is None or spec.name in names
        }

    def values_of(self, name: str, most: int) -> list[NDArray]:
        """The different values of an input, as it is fed a row; up to `most` of them."""
        found: list[NDArray] = []
        for index in range(len(self)):
            value = self.row(index, [name])[name]
            if not any(np.array_equal(value, other) for other in found):
                found.append(value)
                if len(found) == most:
                    break
        return found

    @property
    def axes(self) -> Axes:
        """The inputs' batch axes."""
        return {spec.name: spec.batch_axis for spec in self.specs}

    @property
    def alone(self) -> bool:
        """Whether each row runs alone: where no input has a batch axis, and where one has it elsewhere than
        first, as outputs are told apart by their first axis."""
        axes = set(self.axes.values())
        return fixed_batch(self.specs) is None and (axes == {None} or not axes <= {None, 0})

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the inputs leave no choice of; None where any will do."""
        return 1 if self.alone else fixed_batch(self.specs)

    def batches(self, highest: int = 1) -> Iterator[Batch]:
        """The rows in batches of the size that the model fixes, else of up to `highest`.

        Raises:
            InputError: as `rows`.
        """
        fixed = self.fixed_batch
        return batches(self.rows(), fixed or highest, fixed or 1, self.axes)

    def row_shapes(self) -> dict[str, list[tuple[int, ...]]]:
        """Input name -> the shape of each of its rows, without the batch axis."""
        return {spec.name: self._shapes(spec) for spec in self.specs}

    def fed_shapes(self, name: str) -> list[tuple[int, ...]]:
        """The shape in which an input is fed each row."""
        (spec,) = (spec for spec in self.specs if spec.name == name)
        fed = functools.cache(spec.fed_shape)  # one tuple for all rows of a shape
        return [fed(row) for row in self._shapes(spec)]

    def subset(self, groups: Sequence[int] | NDArray[np.int64]) -> Samples:
        """The samples at positions `groups`, each with its k rows, and their targets.

        They are sequences where they are whole ones; else their rows stand for themselves. The rows are not
        copied, and what is kept of each is a few bytes.
        """
        groups = np.asarray(groups, np.int64)
        rows = (self.group * groups[:, None] + np.arange(self.group)).reshape(-1)
        return replace(
            self,
            columns={name: Picked(column, rows) for name, column in self.columns.items()},
            targets={name: array[groups] for name, array in self.targets.items()},
            hash=sha256_json([self.hash, sha256_bytes(groups.tobytes())]),
            positions=groups if self.positions is None else self.positions[groups],
            sequences=self.sequences and self.sequences.of(rows.tolist(), len(self)),
        )

    def apart(self) -> Samples:
        """The rows, each for itself with the state that it holds; the samples themselves where they are no
        sequences."""
        if self.sequences is None:
            return self
        return replace(self, sequences=None, hash=sha256_json([self.hash, "apart"]))

    def class_numbers(self, name: str) -> NDArray[np.int64]:
        """The target that holds a class number for each row, int64 (rows,).

        Raises:
            InputError: no target has this name, or it holds something else.
        """
        values = self.targets.get(name)
        cause = f"targets: {', '.join(self.targets) or 'none'}"
        if values is not None:
            cause = f"it is {values.dtype} of shape {values.shape}"
            if values.dtype.kind in "iu" and values.shape == (len(self),):
                if values.min() >= 0:
                    return values.astype(np.int64)
                cause = f"row {self.row_number(int(values.argmin()))} has {values.min()}"
        raise InputError(
            f"the calibration data have no class number for each row under '{name}'",
            file=self.source,
            cause=cause,
            remedy="give integers from 0, one for each row, or leave --labels out",
        )

    def row_number(self, index: int) -> int:
        """The position of row `index` in the source, from 0, for messages."""
        if self.positions is None:
            return index
        return self.group * int(self.positions[index // self.group]) + index % self.group

    def where(self, batch: Batch) -> str:
        """A batch's rows as the source numbers them: what a message calls them."""
        first, last = (self.row_number(i) for i in (batch.start, batch.start + batch.rows - 1))
        return f"row {last}" if batch.rows == 1 else f"rows {first} to {last}"

    def spread(self, rows: int) -> Samples:
        """About `rows` of the rows, as whole samples evenly spread over the data; all if there are fewer."""
        groups = len(self) // self.group
        wanted = min(max(rows // self.group, 1), groups)
        return self.subset(np.arange(wanted) * groups // wanted)

    def split(self, every: int = 4) -> tuple[Samples, Samples]:
        """The samples without every `every`-th one, and those; nothing is random.

        Where there are enough sequences, every `every`-th sequence, as their rows are much alike.
        """
        kind = self._sequence_of_groups(every)
        number = np.arange(len(self) // self.group) if kind is None else np.asarray(kind)
        held_back = number % every == every - 1
        return self.subset(np.flatnonzero(~held_back)), self.subset(np.flatnonzero(held_back))

    def _sequence_of_groups(self, least: int) -> list[int] | None:
        """The number of each sample's sequence; None where there are fewer than `least`, or a sample lies in
        several."""
        if self.sequences is None or len(self.sequences.starts) < least:
            return None
        if any(start % self.group for start in self.sequences.starts):
            return None
        return [number_of(row, self.sequences.starts) for row in range(0, len(self), self.group)]

    def _shapes(self, spec: InputSpec) -> list[tuple[int, ...]]:
        static = tuple(d for d in spec.row_dims if isinstance(d, int))
        if len(static) == len(spec.row_dims):
            return [static] * len(self)
        column = self.columns[spec.name]
        if shape := getattr(column, "shape", None):
            return [shape[1:]] * len(self)
        return [np.shape(column[index]) for index in range(len(column))]

    def _fed(self, spec: InputSpec, index: int) -> NDArray:
        row = self._row(spec, index)
        return row if spec.batch_axis is None else row[(slice(None),) * spec.batch_axis + (None,)]

    def _block(self, spec: InputSpec, first: int, end: int) -> NDArray | None:
        """Rows as they are fed, one after another; None where one may have to be converted, or refused."""
        block = block_of(self.columns[spec.name], first, end)
        if (
            block is None
            or block.dtype != spec.dtype
            or not block.flags.c_contiguous
            or not fits(spec.row_dims, block.shape[1:])
            or (block.dtype.kind == "f" and not np.isfinite(block).all())
        ):
            return None
        return block.reshape(len(block), *spec.fed_shape(block.shape[1:]))

    def file_of(self, index: int) -> str:
        """The file that row `index` comes from, or the source where it is one."""
        place = bisect_right(self.files, self.row_number(index), key=lambda entry: entry[0])
        return self.files[place - 1][1] if place else self.source

    def _row(self, spec: InputSpec, index: int) -> NDArray:
        with about(self.file_of(index)):
            return self._checked_row(spec, index)

    def _checked_row(self, spec: InputSpec, index: int) -> NDArray:
        row = np.asarray(self.columns[spec.name][index])
        where = f"row {self.row_number(index)} of input '{spec.name}'"
        if not fits(spec.row_dims, row.shape):
            raise InputError(
                f"{where} has shape {row.shape}; the model takes {spec}",
                remedy="the first axis of the data is the rows; images may need `layout`, `resize` or `crop`"
                f" in the recipe's [preprocess.{spec.name}]; an input whose batch is not its first axis needs"
                f' [inputs.{spec.name}] batch_axis = 1 there, one that has no batch batch_axis = "none"',
            )
        if not _castable(row.dtype, spec.dtype):
            raise InputError(
                f"{where} is {row.dtype}; the model takes {spec}",
                remedy=f"convert it, or say how in the recipe's [preprocess.{spec.name}] (scale, mean, std)",
            )
        if row.dtype.kind == "f" and not np.isfinite(row).all():
            raise InputError(
                f"{where} holds NaN or infinite values",
                remedy="repair that row, or leave it out",
            )
        if row.dtype == spec.dtype:
            return np.asarray(row, order="C")
        with np.errstate(over="ignore"):
            cast = np.asarray(row, dtype=spec.dtype, order="C")
        kept = np.isfinite(cast).all() if spec.dtype.kind == "f" else np.array_equal(cast, row)
        if not kept:
            raise InputError(f"{where} holds {row.dtype} values beyond the model's {spec.dtype}")
        return cast


def _castable(source: np.dtype, target: np.dtype) -> bool:
    """Between floats, between integers, and from bool to integers; never from integers to floats."""
    if target.kind == "f":
        return source.kind == "f"
    return source.kind == target.kind or (target.kind in "iu" and source.kind in "biu")
