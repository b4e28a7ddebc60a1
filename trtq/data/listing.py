"""Which images there are, and their labels: a folder, a folder for each class, or a CSV that lists them."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtq.errors import InputError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})

LABEL = "label"
"""The target that folders by class, and a CSV without a header, have."""

FILE_COLUMNS = (
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "path",
    "image",
    "image_path",
    "img",
)
"""Headers of the column of a CSV that names the images, the first that is there; or else it is the first
column that holds names of images."""

CLASS_COLUMNS = ("label", "class", "target", "category")
"""What headers of labels begin with: text in such a column is names of classes."""

_LONGEST_PATH = 4096
_MOST_SHOWN = 5


class Listing(NamedTuple):
    """Paths of images, in order, and one target for each by name."""

    images: Sequence[str]
    targets: Mapping[str, NDArray]


def listed(path: Path, classes: Mapping[str, int]) -> Listing:
    """The images of a folder or CSV.

    - Of a folder with `<folder>.csv` beside it or one `.csv` in it, and of a CSV itself, those that it lists:
      with a header or without, columns in any order, separated by commas, semicolons or tabs. Its numeric
      columns are targets. Text in a column whose header begins as `CLASS_COLUMNS` do, or in the only other
      column, is names of classes.
    - Of a folder that holds images, those, without targets.
    - Of a folder of folders, those at any depth in each; the folder is the class, in a target `LABEL`.

    Args:
        classes: class name -> number; empty: names are numbered in the order of the alphabet, as
            torchvision's `ImageFolder` numbers folders.

    Raises:
        InputError: there are no images, some are missing, the CSV is none, or a class is not in `classes`.
    """
    folder, table = _folder_and_table(path)
    if table is not None:
        return _of_table(table, folder, classes)
    names = sorted(p.name for p in folder.iterdir() if _is_image(p.name))
    if names:
        return Listing([os.path.join(folder, name) for name in names], {})
    return _by_class(folder, classes)


def _folder_and_table(path: Path) -> tuple[Path, Path | None]:
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


def _by_class(folder: Path, classes: Mapping[str, int]) -> Listing:
    images, labels = [], []
    inner = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    numbers = _numbers(inner, classes, folder) if inner else {}
    for name in inner:
        found = [
            os.path.join(where, file)
            for where, _, files in sorted(os.walk(folder / name, followlinks=True))
            for file in sorted(files)
            if _is_image(file)
        ]
        images += found
        labels += [numbers[name]] * len(found)
    if not images:
        raise InputError(
            "the folder holds no .npz, no .npy and no images",
            file=folder,
            remedy=f"images are {', '.join(sorted(IMAGE_SUFFIXES))}, in the folder or in one for each class",
        )
    return Listing(images, {LABEL: np.array(labels, np.int64)})


def _of_table(table: Path, folder: Path, classes: Mapping[str, int]) -> Listing:
    columns, name_of_files = _read_table(table)
    names = columns.pop(name_of_files)
    for index, name in enumerate(names):
        if not name or len(name) > _LONGEST_PATH or "\0" in name:
            raise InputError(f"row {index} of the CSV names no file", file=table)
    if not (folder / names[0]).is_file() and (table.parent / names[0]).is_file():
        folder = table.parent
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(
            f"{len(missing)} images that the CSV lists are missing, the first is {missing[0]}",
            file=table,
            cause=f"looked for in {folder}",
        )
    targets: dict[str, NDArray] = {}
    for name, values in columns.items():
        numbers = _as_numbers(values)
        if numbers is None and (name.lower().startswith(CLASS_COLUMNS) or len(columns) == 1):
            numbers = _class_numbers(name, values, classes, table)
        if numbers is not None:
            targets[name] = numbers
    return Listing([os.path.join(folder, name) for name in names], targets)


def _read_table(path: Path) -> tuple[dict[str, list[str]], str]:
    """The columns of a CSV by their headers, and the header of the one that names the images."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=first.count)
            rows = [row for row in csv.reader(file, delimiter=delimiter) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError("cannot read the CSV", file=path, cause=error) from error
    header: list[str] = []
    if rows and not any(_is_image(cell) for cell in rows[0]):
        header = [cell.strip() for cell in rows.pop(0)]
    if not rows:
        raise _lists_none(path)
    for index, row in enumerate(rows):
        if len(row) > max(len(header), len(rows[0])):
            raise InputError(f"row {index} of the CSV has {len(row)} cells", file=path)
    images = [place for place, cell in enumerate(rows[0]) if _is_image(cell)]
    if not header:
        others = [LABEL, *(f"column{place}" for place in range(2, len(rows[0])))]
        header = ["file" if place == images[0] else others.pop(0) for place in range(len(rows[0]))]
    known = {cell.lower(): cell for cell in reversed(header)}
    named = next((known[name] for name in FILE_COLUMNS if name in known), None)
    if named is None and images:
        named = header[images[0]]
    if named is None:
        raise _lists_none(path)
    cells = ([row[place].strip() if place < len(row) else "" for row in rows] for place in range(len(header)))
    return dict(zip(header, cells, strict=True)), named


def _lists_none(path: Path) -> InputError:
    return InputError(
        "the CSV lists no images",
        file=path,
        remedy="it needs a row for each image, and a header with a column `file`, or names that end as images"
        " do",
    )


def _as_numbers(values: Sequence[str]) -> NDArray | None:
    """A column of numbers, integers where all are; None where one is no number."""
    try:
        return np.array([int(value) for value in values], np.int64)
    except (ValueError, OverflowError):
        pass
    try:
        return np.array([float(value) for value in values], np.float64)
    except ValueError:
        return None


def _class_numbers(
    name: str, values: Sequence[str], classes: Mapping[str, int], table: Path
) -> NDArray[np.int64]:
    if "" in values:
        raise InputError(f"row {values.index('')} of the CSV has nothing in column '{name}'", file=table)
    numbers = _numbers(sorted(set(values)), classes, table)
    return np.array([numbers[value] for value in values], np.int64)


def _numbers(names: Sequence[str], classes: Mapping[str, int], file: Path) -> Mapping[str, int]:
    """Class name -> number, by `classes`, or else by the place among `names`."""
    if not classes:
        return {name: number for number, name in enumerate(names)}
    if unknown := [name for name in names if name not in classes]:
        raise InputError(
            f"'{unknown[0]}' is none of the recipe's `classes`",
            file=file,
            cause=f"they are {', '.join(list(classes)[:_MOST_SHOWN])}{', …' * (len(classes) > _MOST_SHOWN)}",
            remedy="add it there with its number",
        )
    return classes


def _is_image(name: str) -> bool:
    return os.path.splitext(name.strip())[1].lower() in IMAGE_SUFFIXES
