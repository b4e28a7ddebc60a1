"""Data as users have it: `.npz` and `.npy`, folders of them, images with labels, or a Python function."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtq.arrays import MOST_WHOLE
from trtq.data import memory
from trtq.data.axes import (
    Array,
    as_one_sample,
    first_state,
    is_one_sample,
    part_rows,
    rows_first,
    settled,
    unclear_axis,
)
from trtq.data.feeding import NO_FEEDING, Feeding
from trtq.data.listing import listed
from trtq.data.memory import Data
from trtq.data.preprocess import VERSION, Preprocess, decode_image
from trtq.data.remote import download, is_url
from trtq.data.samples import Column, Mapped, Origin, Samples, rows_of
from trtq.data.sequences import ARRAY, Sequences, Starts, starts_of
from trtq.data.stored import IN_MEMORY, Chained, Repeated, StoredRows, read_npy, read_npz
from trtq.errors import InputError
from trtq.files import sha256_file
from trtq.graph.inputs import InputSpec
from trtq.memory import refuse_memory
from trtq.scripts import contained, load_function

EXAMPLE = '[preprocess.{name}] with scale = "1/255", mean = [...], std = [...], layout = "NCHW"'


def load_samples(
    spec: str | Data,
    inputs: Sequence[InputSpec],
    preprocess: Mapping[str, Preprocess] | None = None,
    feeding: Feeding = NO_FEEDING,
) -> Samples:
    """The samples that `spec` names, for a model with the given inputs.

    Args:
        spec: one of
            - `FILE.npz`: arrays named like model inputs are inputs, the first axis is the rows, of an array
              with one axis more than the input as they stand (see `axes.rows_first`); every other array is
              a target; large arrays that are not compressed are read row by row;
            - a folder of `.npz`, in the order of their names; shapes may differ from file to file;
            - `FILE.npy`: the rows of the only input;
            - a folder of `.npy`: named like the arrays of an `.npz`, of which each holds all rows, or in the
              order of their names samples or batches of the only input;
            - a folder of images, with `<folder>.csv` beside it or one `.csv` in it, or that CSV itself (see
              `trtq.data.listing`); without a CSV, of images in subfolders the subfolder is the class, as in
              torchvision's `ImageFolder`, and others have no targets;
            - `SCRIPT.py:FUNCTION`: returns an iterable of dicts, feeds of the model as they stand
              (Polygraphy's data-loader convention); entries that are not model inputs are targets, with one
              entry for each row of a feed's batch. Or it returns what `trtq.Data` takes: a `DataLoader`, a
              `Dataset` of PyTorch, samples as tuples, arrays. It is read whole;
            - a URL of one of the first three (see `trtq.data.remote`);
            - data in a Python program's memory.
        preprocess: input name -> how its rows are made.
        feeding: what else the recipe says of the inputs. With a state, rows are sequences: those that the
            array `sequence` of the data names, or else one for each `.npz`.

    Raises:
        InputError: nothing is there, it cannot be read, or it does not fit the model.
        MissingBackendError: a URL, and a package that its protocol needs is not installed.
    """
    source, copy = str(spec), str(_copy_of(spec))
    try:
        samples = _load(copy, feeding.specs(inputs), preprocess or {}, feeding)
    except InputError as error:
        if source == copy:
            raise
        file = error.file
        if isinstance(spec, Data):
            file = source
        elif file is not None:
            file = file.replace(os.path.dirname(copy), os.path.dirname(source), 1)
        raise InputError(error.problem, file=file, cause=error.cause, remedy=error.remedy) from error
    origin = Origin(source, copy, tuple(inputs), dict(preprocess or {}), feeding, samples.hash)
    return replace(samples, source=source, origin=origin, owner=spec)


def _copy_of(spec: str | Data) -> str | Path:
    """Where a source is on this machine."""
    if isinstance(spec, Data):
        return spec.kept()
    refuse_memory(
        spec, "the data were", "give a file, or make the recipe with save_data=True, which keeps them"
    )
    return download(spec) if is_url(spec) else spec


@functools.lru_cache(maxsize=1)
def reload(origin: Origin) -> Samples:
    """The samples of a source again, in the process that needs them; the last source stays loaded.

    It is read whole once, to make sure that it holds the same data here.

    Raises:
        InputError: the source cannot be read here, or holds other data.
        MissingBackendError: as `load_samples`.
    """
    spec = origin.copy if os.path.exists(origin.copy) else origin.source
    samples = load_samples(spec, origin.specs, origin.preprocess, origin.feeding)
    if samples.hash != origin.hash:
        raise InputError(
            "a worker reads other data than the process that started the work",
            file=origin.source,
            remedy="give all machines the same files; a data script must give the same rows every time",
        )
    return replace(samples, source=origin.source)


def _load(
    spec: str, specs: tuple[InputSpec, ...], recipes: Mapping[str, Preprocess], feeding: Feeding
) -> Samples:
    known = [i.name for i in specs]
    if unknown := [name for name in recipes if name not in known]:
        raise InputError(
            f"[preprocess.{unknown[0]}] names no input of the model",
            remedy=f"the inputs are {', '.join(known)}",
        )
    path = Path(spec)
    own = [i for i in specs if i.name not in recipes]
    computed = [recipe.source for recipe in recipes.values()]
    starts: tuple[int, ...] | None = (0,)
    files: Sequence[tuple[int, str]] = ()
    if path.suffix == memory.SUFFIX:
        parts, items = memory.parts_of(path, specs, recipes, feeding)
        if items:
            arrays, _ = _put_together(parts, own, computed, feeding, path)
            starts = None
        else:
            arrays = dict(rows_first(parts[0], own, feeding, spec))
    elif ".py:" in spec:
        parts, items = _from_script(spec, specs, recipes, feeding)
        if items:
            arrays, _ = _put_together(parts, own, computed, feeding, path)
            starts = None
        else:
            arrays = dict(rows_first(parts[0], own, feeding, spec))
    elif path.suffix == ".npz":
        arrays = dict(rows_first(_from_npz(path), own, feeding, spec))
    elif path.suffix == ".npy":
        arrays = dict(
            rows_first({_only_array(path, specs, recipes, feeding): _npy(path)}, own, feeding, spec)
        )
    elif path.is_dir() and (found := sorted(path.glob("*.npz"))):
        read = [_from_npz(file, IN_MEMORY // len(found)) for file in found]
        arrays, starts = _put_together(read, own, computed, feeding, path, found)
        files = list(zip(starts, map(str, found), strict=True))
    elif path.is_dir() and (found := sorted(path.glob("*.npy"))):
        named = {file.stem: file for file in found}
        if {recipes[s.name].source if s.name in recipes else s.name for s in specs} & named.keys():
            whole = {name: _npy(file) for name, file in named.items()}
            arrays = dict(rows_first(whole, own, feeding, spec))
        else:
            only = _only_array(path, specs, recipes, feeding)
            read = memory.named_parts([{only: _npy(f)} for f in found], specs, recipes, feeding, items=True)
            arrays, starts = _put_together(read, own, computed, feeding, path, found)
            files = list(zip(starts, map(str, found), strict=True))
    elif path.suffix == ".csv" or path.is_dir():
        constants = feeding.constants(specs)
        inputs = [spec for spec in specs if spec.name not in constants]
        images, arrays = _from_images(path, inputs, recipes, feeding.classes)
        files = list(enumerate(images.paths))
    else:
        raise InputError(
            "the data does not exist" if not path.exists() else "this kind of data is not supported",
            file=spec,
            remedy="give a .npz, a .npy, a folder of them, a folder of images (with a CSV, or by class), or"
            " script.py:function",
        )
    if scalars := [
        name for name, array in arrays.items() if isinstance(array, np.ndarray) and not array.shape
    ]:
        raise InputError(f"array '{scalars[0]}' has no rows: it is a single value", file=path)
    return _assemble(spec, specs, recipes, feeding, arrays, starts, files)


def _assemble(
    source: str,
    specs: tuple[InputSpec, ...],
    recipes: Mapping[str, Preprocess],
    feeding: Feeding,
    arrays: dict[str, Column],
    starts: tuple[int, ...] | None,
    files: Sequence[tuple[int, str]],
) -> Samples:
    numbers = arrays.pop(ARRAY, None) if feeding.state else None
    constants = feeding.constants(specs)
    sources = {s.name: recipes[s.name].source if s.name in recipes else s.name for s in specs}
    made = {name for name in (*constants, *feeding.state) if sources[name] not in arrays}
    sources = {name: array for name, array in sources.items() if name not in made}
    if missing := [name for name, array in sources.items() if array not in arrays]:
        raise InputError(
            f"the data has no array '{sources[missing[0]]}'",
            file=source,
            cause=f"the model takes {', '.join(map(str, specs))}; the data has {', '.join(arrays) or 'none'}",
            remedy=f"rename the array, or write into the recipe where it comes from:"
            f' [preprocess.{missing[0]}] from = "ARRAY"; [inputs.{missing[0]}] value = ... if it never'
            f' changes; [state] {missing[0]} = "OUTPUT" if it is an output of the row before',
        )
    raw = {name: arrays[key] for name, key in sources.items()}
    targets = {name: _target(column) for name, column in arrays.items() if name not in sources.values()}
    rows = _row_count(raw, specs, source)
    for name, target in targets.items():
        if target.ndim == 0 or len(target) == 0 or rows % len(target):
            raise InputError(
                f"target '{name}' has shape {target.shape} for {rows} rows",
                file=source,
                remedy="give one target for every row, or for every k consecutive rows",
            )
    if len({len(t) for t in targets.values()}) > 1:
        lengths = {name: len(t) for name, t in targets.items()}
        raise InputError(f"targets have different lengths: {lengths}", file=source)
    columns: dict[str, Column] = {n: Mapped(raw[n], recipes[n]) if n in recipes else raw[n] for n in raw}
    columns |= {name: Repeated(value, rows) for name, value in constants.items() if name in made}
    _check_constants(columns, constants, source)
    columns |= {s.name: Repeated(first_state(s), rows) for s in specs if s.name in made - constants.keys()}
    fed = [settled(spec, columns[spec.name], feeding) for spec in specs]
    specs, columns = tuple(spec for spec, _ in fed), {spec.name: column for spec, column in fed}
    sequences = None
    if feeding.state:
        sequences = Sequences(feeding.state, _starts(numbers, starts, rows, source))
        columns |= {name: Starts(columns[name], sequences.starts, name) for name in feeding.state}
    digest = _hash(raw, targets, recipes, specs, feeding, sequences)
    samples = Samples(source, specs, columns, targets, digest, sequences=sequences, files=files)
    next(samples.rows())  # what is wrong with every row is best said before anything runs
    return samples


def _check_constants(columns: Mapping[str, Column], constants: Mapping[str, NDArray], source: str) -> None:
    """Refuse data that have another value for an input than the recipe."""
    for name, value in constants.items():
        for index in range(len(columns[name])):
            row = np.asarray(columns[name][index])
            if row.size != value.size or not np.array_equal(row.reshape(value.shape), value):
                raise InputError(
                    f"row {index} of input '{name}' is not the value of the recipe's [inputs.{name}]",
                    file=source,
                    remedy="leave out the rows with other values, or the option",
                )


def _starts(
    numbers: Column | None, starts: tuple[int, ...] | None, rows: int, source: str
) -> tuple[int, ...]:
    """Where sequences start: as the data say it, or else at the given rows."""
    if numbers is not None:
        return starts_of(np.asarray(rows_of(numbers)), rows, source)
    if starts is None:
        raise InputError(
            "it cannot be told where the sequences start",
            file=source,
            remedy=f"give every item an entry '{ARRAY}': the number of its sequence",
        )
    return starts


def _row_count(raw: Mapping[str, Column], specs: Sequence[InputSpec], source: str) -> int:
    """How many rows the inputs have, all of them as many."""
    lengths = {name: len(column) for name, column in raw.items()}
    rows = max(lengths.values(), default=0)
    if rows == 0:
        raise InputError("the data has no rows", file=source)
    if len(set(lengths.values())) == 1:
        return rows
    problem = f"inputs have different numbers of rows: {lengths}"
    for spec in specs:
        shape = getattr(raw.get(spec.name), "shape", None)
        if shape and shape[0] != rows:
            raise unclear_axis(spec, shape, rows, source, problem)
    raise InputError(problem, file=source)


def _target(column: Column) -> NDArray:
    """A target as an array; of arrays, as an array of objects, where their shapes differ."""
    if isinstance(column, np.ndarray):
        return column
    rows = rows_of(column)
    if len({np.shape(row) for row in rows}) == 1:
        return np.asarray(rows)
    ragged = np.empty(len(rows), object)
    ragged[:] = rows
    return ragged


def _hash(
    raw: Mapping[str, Column],
    targets: Mapping[str, NDArray],
    recipes: Mapping[str, Preprocess],
    specs: Sequence[InputSpec],
    feeding: Feeding,
    sequences: Sequences | None,
) -> str:
    digest = hashlib.sha256()
    for kind, named in (("input", raw), ("target", targets)):
        for name, column in sorted(named.items()):
            digest.update(f"{kind} {name} {len(column)}\n".encode())
            if isinstance(column, _Images):
                for path in column.paths:
                    digest.update(sha256_file(path).encode())
            elif (
                isinstance(column, StoredRows | Chained | Repeated) and column.dtype and column.shape
            ):  # as an array of the same values
                digest.update(f"{column.dtype.str}{column.shape}\n".encode())
                blocks = getattr(column, "blocks", None)
                for part in blocks() if blocks else (column[index] for index in range(len(column))):
                    digest.update(part.tobytes())
            else:
                whole = isinstance(column, np.ndarray) and column.dtype != object
                rows = (column[index] for index in range(len(column)))
                for array in [column] if whole else rows:
                    array = np.ascontiguousarray(array)
                    digest.update(f"{array.dtype.str}{array.shape}\n".encode())
                    digest.update(array.tobytes() if array.dtype.kind in "UMm" else array.data)
    for name, recipe in sorted(recipes.items()):
        digest.update(f"preprocess {VERSION} {name} {json.dumps(recipe.options, sort_keys=True)}\n".encode())
    for spec in specs:
        if spec.batch_axis != 0:
            digest.update(f"batch axis {spec.name} {spec.batch_axis}\n".encode())
    for name, options in sorted(feeding.inputs.items()):
        digest.update(f"input {name} {json.dumps(options.options, sort_keys=True)}\n".encode())
    if sequences is not None:
        digest.update(f"sequences {json.dumps(sequences.to_json(), sort_keys=True)}\n".encode())
    return digest.hexdigest()


# --- sources ------------------------------------------------------------------------------------------


def _from_npz(path: Path, in_memory: int | None = None) -> dict[str, NDArray | StoredRows]:
    if not path.is_file():
        raise InputError("the data does not exist", file=path, remedy="check the path")
    try:
        arrays = read_npz(path, in_memory)
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        raise InputError(
            "not an .npz of plain arrays, or a damaged one",
            file=path,
            cause=error,
            remedy="write it with numpy.savez; arrays of Python objects are not read",
        ) from error
    return arrays


def _npy(path: Path) -> NDArray | StoredRows:
    """The array of an `.npy`; a large one stays in its file."""
    if not path.is_file():
        raise InputError("the data does not exist", file=path, remedy="check the path")
    try:
        return read_npy(path)
    except Exception as error:
        raise InputError(
            "not an .npy of numbers, or a damaged one",
            file=path,
            cause=error,
            remedy="write it with numpy.save; arrays of Python objects are not read",
        ) from error


def _only_array(
    path: Path, specs: Sequence[InputSpec], recipes: Mapping[str, Preprocess], feeding: Feeding
) -> str:
    """The array that the only input is read from, where the data do not name it."""
    without = feeding.constants(specs).keys() | feeding.state.keys()
    sources = [
        recipes[s.name].source if s.name in recipes else s.name for s in specs if s.name not in without
    ]
    if len(sources) != 1:
        raise InputError(
            "an .npy has one array, and it does not say of which input",
            file=path,
            cause=f"the model takes {', '.join(map(str, specs))}",
            remedy="give an .npz, or a folder of .npy that are named like the inputs",
        )
    return sources[0]


def _from_images(
    path: Path, inputs: Sequence[InputSpec], recipes: Mapping[str, Preprocess], classes: Mapping[str, int]
) -> tuple[_Images, dict[str, Column]]:
    """The images, and all arrays by name, the images' own and the targets."""
    listing = listed(path, classes)
    candidates = [s for s in inputs if s.name in recipes] or list(inputs)
    if len(inputs) != 1 or not recipes:
        name = candidates[0].name
        raise InputError(
            "the recipe does not say how images become the model's input",
            file=path,
            cause=f"the model takes {', '.join(map(str, inputs))}",
            remedy=f"put a preprocessing spec into the recipe, such as {EXAMPLE.format(name=name)}"
            if len(inputs) == 1
            else "a model of several inputs takes .npz files or script.py:function",
        )
    images = _Images(listing.images)
    return images, {recipes[inputs[0].name].source: images, **listing.targets}


class _Images:
    """Images decoded when they are read: uint8 arrays (height, width, 3), RGB."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        return decode_image(self.paths[index])

    def digest(self, index: int) -> bytes:
        """A hash of the file's bytes."""
        return sha256_file(self.paths[index]).encode()


def _from_script(
    spec: str, specs: Sequence[InputSpec], recipes: Mapping[str, Preprocess], feeding: Feeding
) -> tuple[list[dict[str, Array]], bool]:
    """What a script's function gives as parts, and whether they are items; else there is one, all rows."""
    path, name, function = load_function(spec, "data")
    try:
        with contained():
            given = function()
            columns = memory.columns_of(given, spec)
            if columns is None:
                items = _items(given, spec, path)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(
            f"the data script's '{name}' failed", file=path, cause=f"{type(error).__name__}: {error}"
        ) from error
    if columns is not None:
        return memory.named_parts([columns], specs, recipes, feeding, items=False), False
    if not items:
        raise InputError(f"the data script's '{name}' gave no data", file=path)
    for index, item in enumerate(items):
        if objects := [key for key, array in item.items() if array.dtype == object]:
            raise InputError(f"item {index} has '{objects[0]}', which is not an array of numbers", file=path)
    if not recipes and all(isinstance(key, str) for item in items for key in item):
        return [{str(key): array for key, array in item.items()} for item in items], True  # as they stand
    return memory.named_parts(items, specs, recipes, feeding, items=True), True


def _items(given: Any, spec: str, path: Path) -> list[dict[memory.Name, NDArray]]:
    """All items that a script gives, which may have no end.

    Raises:
        InputError: they are too many, or too large.
    """
    items, size = [], 0
    for index, item in enumerate(memory.iterated(given)):
        memory.check_count(given, index, str(path))
        items.append(_item(item, spec, index))
        size += sum(array.nbytes for array in items[-1].values())
        if size > MOST_WHOLE:
            raise InputError(
                f"the first {len(items):,} items have {size / 1e9:.1f} GB, and may have no end",
                file=path,
                remedy="let the function give fewer; or write them with numpy.savez, and they are read row by"
                " row",
            )
    return items


def _item(item: Any, spec: str, index: int) -> dict[memory.Name, NDArray]:
    """An item of a script's data, copied: loaders may fill one buffer again and again."""
    if isinstance(item, Mapping):
        return {key: np.array(memory.converted(value)) for key, value in item.items()}
    return {key: np.array(array) for key, array in memory.values_of(item, spec, f"item {index}").items()}


def _put_together(
    parts: Sequence[Mapping[str, Array]],
    specs: Sequence[InputSpec],
    computed: Sequence[str],
    feeding: Feeding,
    source: Path,
    files: Sequence[Path] = (),
) -> tuple[dict[str, Column], tuple[int, ...]]:
    """The rows of several parts, one after another, and the first row of each part.

    Where a part's inputs have batches of different sizes, every part is one sample as it stands.

    Args:
        specs: of the inputs that are fed as the data have them.
        computed: the arrays that the other inputs are computed from, row by row.
        files: the file of each part, for messages.
    """
    one_sample = any(is_one_sample(part, specs, feeding) for part in parts)
    parts = [as_one_sample(part, specs) if one_sample else part for part in parts]
    counts = [_count(part, specs, feeding, computed) for part in parts]
    laid_out = [
        rows_first(part, specs, feeding, str(files[index] if files else source))
        for index, part in enumerate(parts)
    ]
    alone = {  # arrays that hold the one value of a row in some part
        name
        for part, rows in zip(laid_out, counts, strict=True)
        for name, array in part.items()
        if rows == 1 and array.shape[:1] != (1,)
    }
    rows_of_parts = [
        {name: _of_rows(array, rows, name in alone) for name, array in part.items()}
        for part, rows in zip(laid_out, counts, strict=True)
    ]
    return _concatenate(rows_of_parts, source, files), tuple(accumulate([0, *counts[:-1]]))


def _count(
    part: Mapping[str, Array], specs: Sequence[InputSpec], feeding: Feeding, computed: Sequence[str]
) -> int:
    """How many rows a part has."""
    lengths = [len(part[name]) for name in computed if name in part and part[name].shape]
    return lengths[0] if lengths else part_rows(part, specs, feeding)


def _of_rows(array: Array | Repeated, rows: int, alone: bool) -> Array | Repeated:
    """A part's array with its rows first.

    Args:
        alone: in a part of one row, the array is that row's value.
    """
    if rows == 1 and alone:
        return np.asarray(array)[None]
    return array if array.shape else np.full(rows, array)


def _concatenate(
    parts: Sequence[Mapping[str, Array | Repeated]], source: Path, files: Sequence[Path] = ()
) -> dict[str, Column]:
    """The rows of several sets of arrays, one set after another; as one array where all shapes agree."""
    columns: dict[str, Column] = {}
    anchor = next(iter(parts[0]), "")
    for name in dict.fromkeys(name for part in parts for name in part):
        if lacking := [index for index, part in enumerate(parts) if name not in part]:
            where = files[lacking[0]] if files else source
            raise InputError(f"not every part of the data has an array '{name}'", file=where)
        arrays = [part[name] for part in parts]
        if any(len(p[name]) * len(parts[0][anchor]) != len(arrays[0]) * len(p[anchor]) for p in parts):
            raise InputError(
                f"the rows of array '{name}' do not match those of '{anchor}' from part to part",
                file=source,
                remedy="give every part one target for every row, or for every k consecutive rows",
            )
        if any(isinstance(array, StoredRows) for array in arrays):
            columns[name] = Chained(arrays)
        elif len({(a.shape[1:], a.dtype) for a in arrays}) == 1:
            columns[name] = np.concatenate([np.asarray(a) for a in arrays])
        else:
            columns[name] = [array[index] for array in arrays for index in range(len(array))]
    return columns
