"""Data that a Python program gives: arrays by name, loaders, data sets, generators.

They are read once, before they are needed for the first time, and kept on disk: a generator gives its rows
only once, and a loader that shuffles or augments would give other rows at each pass. What is kept is read
back row by row, here and by worker processes, and hashed by content, as the same arrays in an `.npz` are.
"""

from __future__ import annotations

import errno
import inspect
import json
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import GeneratorType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trtq.console import SILENT, Console
from trtq.data.axes import Array
from trtq.data.feeding import Feeding
from trtq.data.preprocess import Preprocess
from trtq.data.samples import Column, Mapped, Picked, Samples
from trtq.data.sequences import ARRAY, number_of
from trtq.data.stored import IN_MEMORY, StoredRows
from trtq.errors import InputError, shown
from trtq.graph.inputs import InputSpec
from trtq.memory import InMemory, folder_of
from trtq.scripts import contained

SUFFIX = ".kept"
"""Of the folder that holds what was read."""

LABELS = "labels"
"""The name of what stands behind the inputs in a tuple."""

MOST_ARRAYS = 256
"""Of one item, each of which is kept in a file of its own."""

MOST_ITEMS = 1_000_000
"""Of an iterable that does not say how long it is: one without an end is given up there."""

LEAST_FREE = 1 << 30
"""Bytes that are left of the disk on which items are kept."""

_LOOKED_AFTER = 1 << 26
"""Bytes after which the disk is asked how much is left."""

Name = str | int
"""An array's name; of arrays without one the position in their tuple."""

_INDEX = "index.json"
_FORMS = (
    "give arrays by name, a tuple of arrays (inputs..., labels), or an iterable of such samples or batches"
)


class Data(InMemory):
    """Data in memory, read once and kept until this object goes: it may be given to several steps.

    Args:
        given: one of

            - arrays by name (a dict, an open `.npz`): as an `.npz` of these arrays;
            - a tuple of arrays, the inputs in the model's order and perhaps the labels behind them; or one
              array, the rows of the only input;
            - an iterable of samples or of batches: a list, a generator, a `DataLoader`, a `Dataset` of
              PyTorch or of Hugging Face, or anything else with `__iter__`, or with `__getitem__` and
              `__len__`. An item is a dict of arrays, a tuple (or list) of the inputs in order and perhaps the
              labels, a tuple of a dict and the labels, or an array. Its arrays have the inputs' ranks, and
              then are a batch, or one axis less, and then are one sample. What is no input is a target;
            - a function without arguments that returns one of these. It is called once.

            An iterable without a length may give up to `MOST_ITEMS` items, and the disk keeps `LEAST_FREE`.

            Arrays are NumPy's, PyTorch's tensors (on any device; bfloat16 becomes float32), images of Pillow
            (as RGB), numbers, lists, and what NumPy makes an array of.

    Raises:
        InputError: it is none of these.
    """

    def __init__(self, given: Any) -> None:
        super().__init__(getattr(given, "__name__", None) or type(given).__name__)
        if isinstance(given, str | bytes | int | float | complex) or given is None:
            raise InputError(f"data in memory are {shown(given)}", remedy=_FORMS)
        if not (_is_array(given) or _is_iterable(given) or callable(given)):
            raise InputError(f"data in memory are a {type(given).__name__}", remedy=_FORMS)
        self.console: Console = SILENT
        self._given = given
        self._kept: Path | None = None
        self._begun = False

    def kept(self) -> Path:
        """The folder of what was read; the first call reads.

        Raises:
            InputError: reading fails, gives nothing, or gives what is no array.
        """
        if self._begun and self._kept is None:
            raise InputError(
                "reading the data was broken off, and they may not be there a second time",
                file=str(self),
                remedy="give them again from their beginning",
            )
        if self._kept is None:
            self._begun = True
            folder = folder_of(self) / f"data{SUFFIX}"
            folder.mkdir()
            try:
                with contained():
                    _keep(self._given, folder, self)
            except (RuntimeError, ValueError) as error:  # of what is no `Exception`, or closes a stream
                raise InputError("the data cannot be read", file=str(self), cause=error) from error
            except OSError as error:
                raise InputError(
                    "what is in memory cannot be kept on disk",
                    file=folder.parent.parent,
                    cause=error.strerror or error,
                    remedy="make room, or set TMPDIR to a folder of a larger disk",
                ) from error
            self._kept, self._given = folder, None
        return self._kept


# --- reading what is given ----------------------------------------------------------------------------


def _keep(given: Any, folder: Path, data: Data) -> None:
    """Write all arrays of what is given into a folder."""
    if isinstance(given, GeneratorType) and inspect.getgeneratorstate(given) != inspect.GEN_CREATED:
        raise InputError(
            "the generator has given rows before, and gives them only once",
            file=str(data),
            remedy="give a function that makes it, or keep its rows: data = trtq.Data(generator)",
        )
    if not (_is_array(given) or _is_iterable(given)):
        with _blaming(data, "the function failed"):
            given = given()
    if isinstance(given, str | bytes) or not (_is_array(given) or _is_iterable(given)):
        raise InputError(f"the function returned a {type(given).__name__}", file=str(data), remedy=_FORMS)
    columns = columns_of(given, data)
    with _Writer(folder) as writer:
        if columns is not None and not any(isinstance(column, list) for column in columns.values()):
            writer.add(columns)
            writer.finish(items=False)
            return
        items, count = (given, _length(given)) if columns is None else _rows(columns, data)
        with data.console.progress("data", count, "item") as advance:
            for values in _each(items, data):
                writer.add(values)
                advance(1)
        if not writer.count:
            raise InputError(
                "there are no data",
                file=str(data),
                remedy="an iterator gives its rows once: give a function that makes it, or what it iterates",
            )
        writer.finish(items=True)


def columns_of(given: Any, data: Data | str) -> dict[Name, Any] | None:
    """What is given as whole arrays, by name or position; lists of arrays where rows differ in shape. None
    where it is an iterable of items."""
    if isinstance(given, Mapping):
        return {str(name): _column(value, data, f"'{name}'") for name, value in given.items()}
    numbers = isinstance(given, list) and given and isinstance(given[0], int | float)
    if numbers or _is_array(given):
        return {0: as_array(given, str(data), "it")}
    if isinstance(given, tuple) and given and all(_is_array(value) for value in given):
        return {place: as_array(value, str(data), f"array {place}") for place, value in enumerate(given)}
    return None


def _column(value: Any, data: Data | str, what: str) -> Any:
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float | str):
        rows = [as_array(row, str(data), f"row {index} of {what}") for index, row in enumerate(value)]
        return np.stack(rows) if len({row.shape for row in rows}) == 1 else rows
    return as_array(value, str(data), what)


def _rows(columns: Mapping[Name, Any], data: Data) -> tuple[Iterable[Any], int]:
    """The samples of columns of which some are lists, as their rows differ in shape."""
    lengths = {
        name: len(column) if isinstance(column, list) or column.ndim else 0
        for name, column in columns.items()
    }
    if len(set(lengths.values())) != 1:
        raise InputError(f"arrays have different numbers of rows: {lengths}", file=str(data))
    (count,) = set(lengths.values())
    return ({name: column[index] for name, column in columns.items()} for index in range(count)), count


def iterated(items: Any) -> Iterator[Any]:
    """What is given item by item, also of what has only `__getitem__` and `__len__`."""
    kind = type(items)
    if not hasattr(kind, "__iter__") and hasattr(kind, "__len__") and hasattr(kind, "__getitem__"):
        return map(items.__getitem__, range(len(items)))
    return iter(items)


def _each(items: Any, data: Data) -> Iterator[dict[Name, NDArray]]:
    """The arrays of every item."""
    with _blaming(data, "the data cannot be iterated"):
        iterator, index = iterated(items), 0
    while True:
        with _blaming(data, f"item {index} cannot be read"):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield values_of(item, str(data), f"item {index}")
        index += 1
        check_count(items, index, str(data))


def check_count(items: Any, count: int, source: str) -> None:
    """Refuse to read on where items may have no end.

    Raises:
        InputError: there are more than `MOST_ITEMS`, and no length was given.
    """
    if count > MOST_ITEMS and _length(items) is None:
        raise InputError(
            f"the data are more than {MOST_ITEMS:,} items, and may have no end",
            file=source,
            cause=f"a {type(items).__name__} does not say how many it gives",
            remedy="end it, as with itertools.islice(data, 1000); or give what has a length",
        )


def values_of(item: Any, source: str, where: str) -> dict[Name, NDArray]:
    """The arrays of an item: those of its dicts by name, others by their position."""
    found: dict[Name, NDArray] = {}
    places = 0

    def add(value: Any) -> None:
        nonlocal places
        if isinstance(value, Mapping):
            for name, inner in value.items():
                if str(name) in found:
                    raise InputError(f"{where} has '{name}' twice", file=source)
                found[str(name)] = as_array(inner, source, f"'{name}' of {where}")
        elif isinstance(value, tuple):
            for inner in value:
                add(inner)
        else:
            found[places] = as_array(value, source, where)
            places += 1

    several = isinstance(item, list) and not all(isinstance(value, int | float) for value in item)
    add(tuple(item) if several else item)
    if not found or len(found) > MOST_ARRAYS:
        raise InputError(f"{where} has {len(found)} arrays", file=source, remedy=_FORMS)
    return found


def as_array(value: Any, source: str, what: str) -> NDArray:
    """A value of a Python program as an array of numbers, of truth values or of text.

    PyTorch's tensors come from any device, detached, with bfloat16 and the float8 types as float32; Pillow's
    images become RGB.

    Args:
        source, what: for the message.

    Raises:
        InputError: it is no such array, or a list of arrays of different shapes.
    """
    try:
        array = converted(value)
    except Exception as error:  # every library raises its own
        raise InputError(
            f"{what} is a {type(value).__name__}, which is no array of one shape and type",
            file=source,
            cause=f"{type(error).__name__}: {error}",
            remedy="give arrays, tensors, numbers, or lists of numbers",
        ) from error
    if array.dtype.kind not in "biufcUSMm":
        raise InputError(
            f"{what} is {shown(value)}, not an array of numbers",
            file=source,
            remedy="leave it out, or give numbers",
        )
    return np.asarray(array, order="C")


def converted(value: Any) -> NDArray:
    """A value of a Python program as NumPy makes an array of it, whatever its type; see `as_array`."""
    if np.ma.is_masked(value):
        raise ValueError("some of its values are masked: fill them, or leave these rows out")
    torch = sys.modules.get("torch")  # who has a tensor has imported it
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach()
        if value.is_floating_point() and value.dtype not in (torch.float16, torch.float32, torch.float64):
            value = value.float()
        found: NDArray = value.numpy(force=True)
        return found
    if type(value).__module__.startswith("PIL."):
        return np.asarray(value.convert("RGB"))
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float | str | list):
        return np.stack([converted(row) for row in value])
    array = np.asarray(value)
    if array.dtype.kind == "V" and "float" in array.dtype.name:  # bfloat16 and float8 of ml_dtypes
        return array.astype(np.float32)
    return array


def _is_array(value: Any) -> bool:
    """Whether a value is one array: of NumPy, PyTorch, JAX, TensorFlow, CuPy, ..."""
    return isinstance(getattr(value, "shape", None), tuple) and hasattr(value, "__array__")


def _is_iterable(value: Any) -> bool:
    kind = type(value)
    return hasattr(kind, "__iter__") or (hasattr(kind, "__getitem__") and hasattr(kind, "__len__"))


def _length(given: Any) -> int | None:
    try:
        return len(given)
    except Exception:  # generators, and loaders of iterable data sets; others have their own errors
        return None


@contextmanager
def _blaming(data: Data, problem: str) -> Iterator[None]:
    """What the program's own code raises inside, as an input error."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {error}"
        raise InputError(problem, file=str(data), cause=cause) from error


# --- on disk ------------------------------------------------------------------------------------------


class _Writer:
    """Writes items into a folder: the arrays of one name into one file, one after another."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, ExitStack()
        self._arrays: dict[Name, tuple[BinaryIO, list[tuple[int, str, tuple[int, ...]]]]] = {}
        self._unlooked = 0  # bytes
        self.count = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def add(self, values: Mapping[Name, NDArray]) -> None:
        """One item more.

        Raises:
            OSError: the disk is full but for `LEAST_FREE`.
        """
        self._unlooked += sum(array.nbytes for array in values.values())
        if self._unlooked > _LOOKED_AFTER:
            if shutil.disk_usage(self._folder).free < LEAST_FREE + self._unlooked:
                raise OSError(errno.ENOSPC, f"the {self.count:,} items before have filled the disk")
            self._unlooked = 0
        for name, array in values.items():
            if name not in self._arrays:
                path = self._folder / f"{len(self._arrays)}.bin"
                self._arrays[name] = self._files.enter_context(path.open("wb")), []
            file, entries = self._arrays[name]
            file.write(array.tobytes())
            entries.append((self.count, array.dtype.str, array.shape))
        self.count += 1

    def finish(self, *, items: bool) -> None:
        """Write the index.

        Args:
            items: they are samples or batches, not the arrays of all rows.
        """
        self._files.close()
        arrays = [{"name": name, "entries": entries} for name, (_, entries) in self._arrays.items()]
        index = {"items": items, "count": self.count, "arrays": arrays}
        (self._folder / _INDEX).write_text(json.dumps(index))


@dataclass(frozen=True)
class Kept:
    """What was read, back from its folder.

    Attributes:
        items: whether the parts are samples or batches; else there is one part, the arrays of all rows.
        parts: name or position -> array.
    """

    items: bool
    parts: list[dict[Name, Array]]

    @classmethod
    def load(cls, folder: Path) -> Kept:
        """Arrays of a name that are small together are read, of others only where they are."""
        index = json.loads((folder / _INDEX).read_bytes())
        parts: list[dict[Name, Array]] = [{} for _ in range(index["count"])]
        for number, stored in enumerate(index["arrays"]):
            path, offset = folder / f"{number}.bin", 0
            content = path.read_bytes() if path.stat().st_size <= IN_MEMORY else None
            for item, dtype, shape in stored["entries"]:
                kind, values = np.dtype(dtype), prod(shape)
                if content is None:
                    parts[item][stored["name"]] = StoredRows(path, offset, kind, tuple(shape))
                else:
                    array = np.frombuffer(content, kind, values, offset)
                    parts[item][stored["name"]] = array.reshape(shape).copy()
                offset += values * kind.itemsize
        return cls(index["items"], parts)


# --- as parts of the data -----------------------------------------------------------------------------


def parts_of(
    folder: Path, specs: Sequence[InputSpec], recipes: Mapping[str, Preprocess], feeding: Feeding
) -> tuple[list[dict[str, Array]], bool]:
    """What was read as parts, arrays by name, and whether they are items; else there is one, all rows.

    Arrays without a name are the inputs in the model's order, of those for which the data have none by name
    and that have no value and no state in the recipe; one more is the labels. An item whose inputs all lack
    one axis is one sample.

    Args:
        specs: of the model's inputs; recipes: input -> how its rows are made of an array.

    Raises:
        InputError: an item has too many or too few arrays.
    """
    kept = Kept.load(folder)
    return named_parts(kept.parts, specs, recipes, feeding, items=kept.items), kept.items


def named_parts(
    found: Sequence[Mapping[Name, Array]],
    specs: Sequence[InputSpec],
    recipes: Mapping[str, Preprocess],
    feeding: Feeding,
    *,
    items: bool,
) -> list[dict[str, Array]]:
    """Parts of which arrays may have positions in place of names, with names; see `parts_of`."""
    sources = {recipes[s.name].source if s.name in recipes else s.name: s for s in specs}
    without = feeding.constants(specs).keys() | feeding.state.keys()
    needed = [array for array, spec in sources.items() if spec.name not in without]
    parts = []
    for index, part in enumerate(found):
        named = _named(part, needed, specs, f"item {index}" if items else "the tuple")
        parts.append(_as_batch(named, sources) if items else named)
    return parts


def _named(
    part: Mapping[Name, Array], needed: Sequence[str], specs: Sequence[InputSpec], where: str
) -> dict[str, Array]:
    named = {name: array for name, array in part.items() if isinstance(name, str)}
    places = [array for name, array in part.items() if not isinstance(name, str)]
    names = [name for name in needed if name not in named]
    if places and len(places) not in (len(names), len(names) + 1):
        raise InputError(
            f"{where} has {len(places)} arrays without a name, and {len(names)} inputs need one",
            cause=f"the model takes {', '.join(map(str, specs))}",
            remedy="give the inputs in this order, and perhaps the labels behind them; or dicts by name",
        )
    if len(places) > len(names):
        names = [*names, LABELS]
        if LABELS in named:
            raise InputError(f"{where} has '{LABELS}' by name and another array without one")
    return named | dict(zip(names, places, strict=False))


def _as_batch(part: Mapping[str, Array], sources: Mapping[str, InputSpec]) -> dict[str, Array]:
    """An item with an axis for its samples: put in where all its inputs lack one."""
    lacking = set()
    for name, spec in sources.items():
        if name in part:
            less = len(spec.shape) - len(part[name].shape)
            if less or spec.batch_axis is not None:
                lacking.add(less)
    if lacking != {1}:
        return dict(part)

    def expanded(name: str, array: Array) -> Array:
        spec = sources.get(name)
        if spec is not None and len(spec.shape) == len(array.shape):
            return array  # an input without a batch
        axis = spec.batch_axis if spec is not None else 0
        shape = [*array.shape]
        shape.insert(axis or 0, 1)
        return array.reshape(tuple(shape))

    return {name: expanded(name, array) for name, array in part.items()}


# --- saved for people ---------------------------------------------------------------------------------


def save_npz(samples: Samples, path: Path) -> None:
    """Write samples as a `.npz` from which they are loaded by the same recipe.

    Inputs are written as they are fed, one axis more than they have, or as the arrays that the recipe's
    preprocessing reads; rows are read one by one.

    Raises:
        InputError: rows differ in shape, or the targets are no plain arrays.
    """
    columns: dict[str, Column] = dict(samples.targets)
    sequences = samples.sequences
    for spec in samples.specs:
        name, column = spec.name, samples.columns[spec.name]
        source: Column = Fed(samples, name)
        while isinstance(column, Mapped):
            if isinstance(column.function, Preprocess):
                name, source = column.function.source, column.rows
            column = column.rows
        if sequences is not None and spec.name in sequences.state:  # which is known at their starts
            source = Picked(source, np.array(sequences.starts))
        columns[name] = source
    if sequences is not None:
        columns[ARRAY] = np.array([number_of(row, sequences.starts) for row in range(len(samples))])
    with zipfile.ZipFile(path, "w") as archive:
        for name, column in columns.items():
            first = np.asarray(column[0])
            shape = (len(column), *first.shape)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = {"descr": first.dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for index in range(len(column)):
                    row = np.asarray(column[index], order="C")
                    if (row.shape, row.dtype) != (first.shape, first.dtype) or row.dtype == object:
                        raise InputError(
                            f"the data cannot be saved: rows of '{name}' differ in shape or type",
                            file=samples.source,
                            remedy="leave save_data out",
                        )
                    file.write(row.tobytes())


class Fed:
    """The rows of an input as they are fed, of 1 along the batch axis."""

    def __init__(self, samples: Samples, name: str) -> None:
        self._samples, self._name = samples, name

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> NDArray:
        return self._samples.row(index, [self._name])[self._name]
