"""How the arrays of the data become an input's rows: its batch axis, values given once, states.

A *part* of the data is an `.npz`, or an item of a loader: arrays by name. `rows_first` brings the inputs of a
part into one form, rows first. The rank of a row then tells how it is fed (`settled`): one axis less than the
input has, and the batch is put in; the input's own rank, and it is a sample as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from trtq.data.feeding import NO_AXIS, Feeding
from trtq.data.samples import Column, Mapped, rows_of
from trtq.data.sequences import ARRAY, number_of
from trtq.data.stored import Repeated, StoredRows
from trtq.errors import InputError
from trtq.graph.inputs import InputSpec, dims_text, fits

Array = NDArray | StoredRows


def rows_first(
    part: Mapping[str, Array], specs: Sequence[InputSpec], feeding: Feeding, source: str
) -> dict[str, Array | Repeated]:
    """The inputs that a part has, each with its rows first; its other arrays as they are.

    What an input of rank R may be given as:

    - an array of rank R + 1 holds samples along its first axis, each as it stands;
    - one of rank R holds rows along the batch axis, or, where it has the input's own shape and that is no
      batch of as many rows as the part has, the one value of all rows;
    - a state may also have one entry for each sequence.

    Args:
        specs: of the inputs that are fed as the data have them; other arrays are left alone.

    Raises:
        InputError: it cannot be told which axis holds the samples.
    """
    given = [spec for spec in specs if spec.name in part]
    rows = part_rows(part, given, feeding)
    found: dict[str, Array | Repeated] = dict(part)
    for spec in given:
        array = part[spec.name]
        if spec.name in feeding.state:
            array = _for_each_row(spec, array, rows, part)
        decided = feeding.decides(spec.name)
        found[spec.name] = _rows(spec, array, rows, source, decided=decided)
    return found


def as_one_sample(part: Mapping[str, Array], specs: Sequence[InputSpec]) -> dict[str, Array]:
    """A part whose inputs are one sample as they stand, with an axis of 1 in front of each."""
    ranks = {spec.name: len(spec.shape) for spec in specs}
    return {
        name: _read(array)[None] if ranks.get(name) == len(array.shape) else array
        for name, array in part.items()
    }


def part_rows(part: Mapping[str, Array], specs: Sequence[InputSpec], feeding: Feeding) -> int:
    """How many rows a part has; 1 where all of its inputs are values as they stand."""
    return next((length for length in _lengths(part, specs, feeding) if length != 1), 1)


def is_one_sample(part: Mapping[str, Array], specs: Sequence[InputSpec], feeding: Feeding) -> bool:
    """Whether a part can only be one sample as it stands: its inputs' batch axes are of different sizes."""
    return len(set(_lengths(part, specs, feeding))) > 1


def _lengths(part: Mapping[str, Array], specs: Sequence[InputSpec], feeding: Feeding) -> list[int]:
    """The numbers of rows that the inputs of a part suggest; those that are certain come first."""
    certain, likely = [], []
    for spec in specs:
        if spec.name not in part or spec.name in feeding.state:
            continue
        shape, axis, rank = part[spec.name].shape, spec.batch_axis, len(spec.shape)
        if len(shape) == rank + 1:
            certain.append(shape[0])
        elif shape and len(shape) == rank and not (axis is None and fits(spec.shape, shape)):
            likely.append(shape[axis or 0])
    return [*certain, *likely]


def _rows(spec: InputSpec, array: Array, rows: int, source: str, *, decided: bool) -> Array | Repeated:
    """An input's rows; the array itself where it has them first, or does not suit the input."""
    shape, axis = array.shape, spec.batch_axis
    if len(shape) != len(spec.shape):
        return array
    fitting = fits(spec.shape, shape)
    whole = axis is None and (decided or fitting)
    if not whole and shape[axis or 0] == rows:
        return np.moveaxis(_read(array), axis, 0) if axis else array
    if axis is not None and shape[axis] == 1:
        return Repeated(_read(array).take(0, axis), rows)
    if not whole and not (fitting and isinstance(spec.shape[axis or 0], int)):
        return array
    if not decided and rows > 1 and rows in _dynamic_sizes(spec, shape):
        raise unclear_axis(spec, shape, rows, source)
    return Repeated(_read(array), rows)


def unclear_axis(
    spec: InputSpec, shape: Sequence[int], rows: int, source: str, problem: str | None = None
) -> InputError:
    """What to say where it cannot be told how an array holds an input's samples."""
    return InputError(
        problem or f"it cannot be told which axis of '{spec.name}' holds the samples",
        file=source,
        cause=f"the model takes {spec}; the data have {dims_text(shape)} for {rows} rows",
        remedy=f"write [inputs.{spec.name}] batch_axis = 0, 1, ... into the recipe, or"
        f' batch_axis = "{NO_AXIS}" where it is one value for all samples',
    )


def settled(spec: InputSpec, column: Column, feeding: Feeding) -> tuple[InputSpec, Column]:
    """An input with the batch axis that its rows show, and the rows without that axis.

    A row of the input's own rank is a sample as it stands: its batch axis, if it has one, is of size 1.
    """
    rank, decided = len(spec.shape), feeding.decides(spec.name)
    row_rank = np.ndim(column[0])
    if row_rank == rank - 1 and spec.batch_axis is None and not decided:
        return spec._replace(batch_axis=0), column
    if row_rank != rank:
        return spec, column
    axis = spec.batch_axis
    if axis is None or any(shape[axis] != 1 for shape in _row_shapes(column)):
        return spec._replace(batch_axis=None), column
    return spec._replace(batch_axis=axis), Mapped(column, partial(np.squeeze, axis=axis))


def first_state(spec: InputSpec) -> NDArray:
    """The state of zeros that a sequence starts from, as a row.

    Of dynamic axes the batch, or the first of an input without one, is of size 1; others start empty.
    """
    dims = list(spec.row_dims)
    if spec.batch_axis is None and (dynamic := [i for i, d in enumerate(dims) if not isinstance(d, int)]):
        dims[dynamic[0]] = 1
    return np.zeros([d if isinstance(d, int) else 0 for d in dims], spec.dtype)


def _for_each_row(spec: InputSpec, array: Array, rows: int, part: Mapping[str, Array]) -> Array:
    """A state's array with one entry for each row where it has one for each sequence of the part."""
    shape, rank = array.shape, len(spec.shape)
    if len(shape) != rank + 1 and not (len(shape) == rank and spec.batch_axis == 0):
        return array
    numbers = _read(part[ARRAY]) if ARRAY in part else np.zeros(rows)
    starts = sorted(np.unique(numbers, return_index=True)[1].tolist())
    if shape[0] == rows or shape[0] != len(starts) or numbers.shape != (rows,):
        return array
    return _read(array)[[number_of(row, starts) for row in range(rows)]]


def _row_shapes(column: Column) -> set[tuple[int, ...]]:
    """The shapes of a column's rows; of one that computes them that of the first."""
    if shape := getattr(column, "shape", None):
        return {tuple(shape[1:])}
    if isinstance(column, Mapped):
        return {np.shape(column[0])}
    return {np.shape(row) for row in rows_of(column)}


def _dynamic_sizes(spec: InputSpec, shape: Sequence[int]) -> list[int]:
    return [got for want, got in zip(spec.shape, shape, strict=True) if not isinstance(want, int)]


def _read(array: Array) -> NDArray:
    return array if isinstance(array, np.ndarray) else np.stack(rows_of(array))
