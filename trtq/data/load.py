"""Data as users have it: `.npz`, folders of `.npz`, images with a CSV, or a Python function."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtq.data.preprocess import VERSION, Preprocess, decode_image
from trtq.data.remote import download, is_url
from trtq.data.samples import Column, Mapped, Origin, Samples, rows_of
from trtq.data.stored import IN_MEMORY, Chained, StoredRows, read_npz
from trtq.errors import InputError
from trtq.files import sha256_file
from trtq.graph.inputs import InputSpec
from trtq.scripts import load_function

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})

EXAMPLE = '[preprocess.{name}] with scale = "1/255", mean = [...], std = [...], layout = "NCHW"'


def load_samples(
    spec: str, inputs: Sequence[InputSpec], preprocess: Mapping[str, Preprocess] | None = None
) -> Samples:
    """The samples that `spec` names, for a model with the given inputs.

    Args:
        spec: one of
            - `FILE.npz`: arrays named like model inputs are inputs, the first axis is the rows; every
              other array is a target; large arrays that are not compressed are read row by row;
            - a folder of `.npz`, in the order of their names; shapes may differ from file to file;
            - a folder of images, with `<folder>.csv` beside it or one `.csv` in it, or that CSV itself:
              a header, a column `file`, and numeric columns that are targets; without a CSV there are no
              targets;
            - `SCRIPT.py:FUNCTION`: returns an iterable of dicts with the batch axis first (Polygraphy's
              data-loader convention); entries that are not model inputs are targets. It is read whole;
            - a URL of one of the first three (see `trtq.data.remote`).
        preprocess: input name -> how its rows are made.

    Raises:
        InputError: nothing is there, it cannot be read, or it does not fit the model.
        MissingBackendError: a URL, and a package that its protocol needs is not installed.
    """
    copy = str(download(spec)) if is_url(spec) else spec
    try:
        samples = _load(copy, inputs, preprocess or {})
    except InputError as error:
        if spec == copy:
            raise
        file = error.file and error.file.replace(os.path.dirname(copy), os.path.dirname(spec), 1)
        raise InputError(error.problem, file=file, cause=error.cause, remedy=error.remedy) from error
    origin = Origin(spec, copy, tuple(inputs), dict(preprocess or {}), samples.hash)
    return replace(samples, source=spec, origin=origin)


@functools.lru_cache(maxsize=1)
def reload(origin: Origin) -> Samples:
    """The samples of a source again, in the process that needs them; the last source stays loaded.

    It is read whole once, to make sure that it holds the same data here.

    Raises:
        InputError: the source cannot be read here, or holds other data.
        MissingBackendError: as `load_samples`.
    """
    spec = origin.copy if os.path.exists(origin.copy) else origin.source
    samples = load_samples(spec, origin.specs, origin.preprocess)
    if samples.hash != origin.hash:
        raise InputError(
            "a worker reads other data than the process that started the work",
            file=origin.source,
            remedy="give all machines the same files; a data script must give the same rows every time",
        )
    return replace(samples, source=origin.source)


def _load(spec: str, inputs: Sequence[InputSpec], recipes: Mapping[str, Preprocess]) -> Samples:
    known = [i.name for i in inputs]
    if unknown := [name for name in recipes if name not in known]:
        raise InputError(
            f"[preprocess.{unknown[0]}] names no input of the model",
            remedy=f"the inputs are {', '.join(known)}",
        )
    path = Path(spec)
    if ".py:" in spec:
        arrays = _from_script(spec, known)
    elif path.suffix == ".npz":
        arrays = dict(_from_npz(path))
    elif path.suffix == ".csv" or path.is_dir():
        arrays = _from_folder(path, inputs, recipes)
    else:
        raise InputError(
            "the data does not exist" if not path.exists() else "this kind of data is not supported",
            file=spec,
            remedy="give a .npz, a folder of .npz, a folder of images with a CSV, or script.py:function",
        )
    return _assemble(spec, tuple(inputs), recipes, arrays)


def _assemble(
    source: str,
    specs: tuple[InputSpec, ...],
    recipes: Mapping[str, Preprocess],
    arrays: Mapping[str, Column],
) -> Samples:
    sources = {s.name: recipes[s.name].source if s.name in recipes else s.name for s in specs}
    if missing := [name for name, array in sources.items() if array not in arrays]:
        raise InputError(
            f"the data has no array '{sources[missing[0]]}'",
            file=source,
            cause=f"the model takes {', '.join(map(str, specs))}; the data has {', '.join(arrays) or 'none'}",
            remedy=f'rename the array, or name it in the recipe: [preprocess.{missing[0]}] from = "..."',
        )
    raw = {name: arrays[key] for name, key in sources.items()}
    targets = {
        name: _target(name, column, source) for name, column in arrays.items() if name not in sources.values()
    }
    lengths = {name: len(column) for name, column in raw.items()}
    rows = next(iter(lengths.values()))
    if rows == 0 or len(set(lengths.values())) != 1:
        problem = "the data has no rows" if rows == 0 else f"inputs have different numbers of rows: {lengths}"
        raise InputError(problem, file=source)
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
    columns = {n: Mapped(raw[n], recipes[n]) if n in recipes else raw[n] for n in sources}
    samples = Samples(source, specs, columns, targets, _hash(raw, targets, recipes))
    next(samples.rows())  # what is wrong with every row is best said before anything runs
    return samples


def _target(name: str, column: Column, source: str) -> NDArray:
    if isinstance(column, np.ndarray):
        return column
    rows = rows_of(column)
    if len({np.shape(row) for row in rows}) > 1:
        raise InputError(
            f"target '{name}' changes its shape from row to row", file=source, remedy="pad it to one shape"
        )
    return np.asarray(rows)


def _hash(
    raw: Mapping[str, Column], targets: Mapping[str, NDArray], recipes: Mapping[str, Preprocess]
) -> str:
    digest = hashlib.sha256()
    for kind, named in (("input", raw), ("target", targets)):
        for name, column in sorted(named.items()):
            digest.update(f"{kind} {name} {len(column)}\n".encode())
            if isinstance(column, _Images):
                for path in column.paths:
                    digest.update(sha256_file(path).encode())
            elif (
                isinstance(column, StoredRows | Chained) and column.dtype and column.shape
            ):  # as an array of the same values
                digest.update(f"{column.dtype.str}{column.shape}\n".encode())
                for index in range(len(column)):
                    digest.update(column[index].tobytes())
            else:
                rows = (column[index] for index in range(len(column)))
                for array in [column] if isinstance(column, np.ndarray) else rows:
                    array = np.ascontiguousarray(array)
                    digest.update(f"{array.dtype.str}{array.shape}\n".encode())
                    digest.update(array.tobytes() if array.dtype.kind in "UMm" else array.data)
    for name, recipe in sorted(recipes.items()):
        digest.update(f"preprocess {VERSION} {name} {json.dumps(recipe.options, sort_keys=True)}\n".encode())
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
    if scalars := [name for name, array in arrays.items() if not array.shape]:
        raise InputError(f"array '{scalars[0]}' has no rows: it is a single value", file=path)
    return arrays


def _from_folder(
    path: Path, inputs: Sequence[InputSpec], recipes: Mapping[str, Preprocess]
) -> dict[str, Column]:
    if path.is_dir() and (files := sorted(path.glob("*.npz"))):
        return _concatenate([_from_npz(file, IN_MEMORY // len(files)) for file in files], path)
    folder, table = _image_folder(path)
    target_columns: dict[str, Column] = {}
    if table is None:
        names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    else:
        names, target_columns = _read_csv(table)
        if not (folder / names[0]).is_file() and (table.parent / names[0]).is_file():
            folder = table.parent
    if not names:
        raise InputError("the folder holds no .npz and no images", file=folder)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(f"{len(missing)} images are missing, the first is {missing[0]}", file=folder)
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
    images = _Images([os.path.join(folder, name) for name in names])
    return {recipes[inputs[0].name].source: images, **target_columns}


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


def _image_folder(path: Path) -> tuple[Path, Path | None]:
    """The folder of the images and the CSV that lists them, if there is one."""
    if path.suffix == ".csv":
        if not path.is_file():
            raise InputError("the data does not exist", file=path, remedy="check the path")
        beside = path.with_suffix("")
        return (beside if beside.is_dir() else path.parent), path
    inside = sorted(path.glob("*.csv"))
    if len(inside) > 1:
        raise InputError("the folder holds several .csv files", file=path, remedy="give the right one itself")
    beside = path.parent / f"{path.name}.csv"
    return path, inside[0] if inside else beside if beside.is_file() else None


def _read_csv(path: Path) -> tuple[list[str], dict[str, Column]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            records = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError("cannot read the CSV", file=path, cause=error) from error
    if not records or not records[0].get("file"):
        raise InputError(
            "the CSV lists no images", file=path, remedy="it needs a header with a column `file`, and rows"
        )
    if empty := [index for index, record in enumerate(records) if not record["file"]]:
        raise InputError(f"row {empty[0]} of the CSV names no file", file=path)
    targets: dict[str, Column] = {}
    for name in records[0]:
        if name == "file" or name is None:
            continue
        values = [record[name] for record in records]
        try:
            targets[name] = np.array([int(value) for value in values], np.int64)
        except (TypeError, ValueError, OverflowError):
            try:
                targets[name] = np.array([float(value) for value in values], np.float64)
            except (TypeError, ValueError):
                if name.startswith("label"):
                    raise InputError(
                        f"column '{name}' holds something that is not a number", file=path
                    ) from None
    return [record["file"] for record in records], targets


def _from_script(spec: str, inputs: Sequence[str]) -> dict[str, Column]:
    path, name, function = load_function(spec, "data")
    try:
        # copied: loaders may fill one buffer again and again
        feeds = [{key: np.array(value) for key, value in feed.items()} for feed in function()]
    except (Exception, SystemExit) as error:
        raise InputError(
            f"the data script's '{name}' failed", file=path, cause=f"{type(error).__name__}: {error}"
        ) from error
    if not feeds:
        raise InputError(f"the data script's '{name}' gave no data", file=path)
    for index, feed in enumerate(feeds):
        if objects := [key for key, array in feed.items() if array.dtype == object]:
            raise InputError(f"item {index} has '{objects[0]}', which is not an array of numbers", file=path)
        if len({len(feed[i]) if feed[i].ndim else -1 for i in inputs if i in feed}) > 1:
            shapes = {i: feed[i].shape for i in inputs if i in feed}
            raise InputError(f"item {index} has inputs of different batch sizes: {shapes}", file=path)
    return _concatenate(feeds, path)


def _concatenate(parts: Iterable[Mapping[str, Any]], source: Path) -> dict[str, Column]:
    """The rows of several sets of arrays, one set after another; as one array where all shapes agree."""
    parts = [
        {
            name: array if isinstance(array, StoredRows) else np.atleast_1d(array)
            for name, array in part.items()
        }
        for part in parts
    ]
    columns: dict[str, Column] = {}
    anchor = next(iter(parts[0]), "")
    for name in dict.fromkeys(name for part in parts for name in part):
        if any(name not in part for part in parts):
            raise InputError(f"not every part of the data has an array '{name}'", file=source)
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
            columns[name] = np.concatenate(arrays)
        else:
            columns[name] = [row for array in arrays for row in array]
    return columns
