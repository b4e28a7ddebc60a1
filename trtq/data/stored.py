"""Rows that stay in their `.npz` until they are asked for, so that memory does not grow with the data."""

from __future__ import annotations

import struct
import zipfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trtq.arrays import Member, check_whole, members
from trtq.errors import InputError

IN_MEMORY = 1 << 24
"""Arrays up to this many bytes are read whole, and so are compressed ones."""

_BLOCK = 1 << 16
"""Bytes that are read at once; rows that are larger are read one by one."""

_LOCAL_HEADER = 30  # bytes before a member's name and extra field, whose lengths are its last four
_PIECE = 1 << 20


class StoredRows:
    """An array in an uncompressed `.npz`, read row by row.

    Args:
        path: the `.npz`.
        offset: of the array's first byte in it.
        dtype, shape: the array's; C order.
    """

    def __init__(self, path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape
        self._path, self._offset, self._state = path, offset, _state(path)
        self._rows_at_once = max(_BLOCK // max(prod(shape[1:]) * dtype.itemsize, 1), 1)
        self._last: tuple[int, NDArray] = -1, np.empty(0, dtype)  # number of a block, and its rows

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> NDArray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, place = divmod(index, self._rows_at_once)
        last, rows = self._last  # taken once: other threads may read other blocks meanwhile
        if last != number:
            start = number * self._rows_at_once
            rows = self.block(start, min(start + self._rows_at_once, len(self)))
            if self._rows_at_once > 1:
                self._last = number, rows
        return rows[place : place + 1].reshape(self.shape[1:])

    def blocks(self) -> Iterator[NDArray]:
        """All rows, some at a time."""
        for first in range(0, len(self), self._rows_at_once):
            yield self.block(first, min(first + self._rows_at_once, len(self)))

    def block(self, first: int, end: int) -> NDArray:
        """Rows from `first` to before `end`, read as one array.

        Raises:
            InputError: the file is another one by now.
        """
        if _state(self._path) != self._state:
            raise InputError("the data changed while they were read", file=self._path, remedy="run it again")
        rows, each = end - first, prod(self.shape[1:])
        offset = self._offset + first * each * self.dtype.itemsize
        values = np.fromfile(self._path, self.dtype, rows * each, offset=offset)
        return values.reshape(rows, *self.shape[1:])

    def reshape(self, shape: tuple[int, ...]) -> StoredRows:
        """The same values as rows of another shape."""
        return StoredRows(self._path, self._offset, self.dtype, shape)


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file is written again."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class Repeated:
    """One value as the rows of an array.

    Attributes:
        dtype, shape: those of all rows as one array.
    """

    def __init__(self, value: NDArray, rows: int) -> None:
        self.dtype, self.shape = value.dtype, (rows, *value.shape)
        self._value = value

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> NDArray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._value


class Chained:
    """Arrays or stored rows, one after another, as one column.

    Attributes:
        dtype, shape: those of all of them as one array; None where there is none.
    """

    def __init__(self, parts: Sequence[NDArray | StoredRows | Repeated]) -> None:
        self._parts, self._ends = parts, list(accumulate(map(len, parts)))
        alike = len({(part.shape[1:], part.dtype) for part in parts}) == 1
        self.dtype = parts[0].dtype if alike else None
        self.shape = (len(self), *parts[0].shape[1:]) if alike else None

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> NDArray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        row: NDArray = self._parts[part][index - self._ends[part] + len(self._parts[part])]
        return row


def read_npz(path: Path, in_memory: int | None = None) -> dict[str, NDArray | StoredRows]:
    """The arrays of an `.npz`; large ones stay in the file where they can, once their checksum is verified.

    Args:
        in_memory: arrays up to this many bytes are read whole; None: `IN_MEMORY`.

    Raises:
        OSError, ValueError, zipfile.BadZipFile, zlib.error: the file is not an `.npz`, or damaged.
    """
    most = IN_MEMORY if in_memory is None else in_memory
    with zipfile.ZipFile(path) as archive:
        found = members(archive)
        check_whole(member for member in found if not _stays(member, most))
        return {
            member.name: _stored(archive, member, path) if _stays(member, most) else member.read(archive)
            for member in found
        }


def read_npy(path: Path) -> NDArray | StoredRows:
    """The array of an `.npy`; a large one stays in the file where it can.

    Raises:
        OSError, ValueError: the file is not an `.npy` of plain values, or damaged.
    """
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.memmap):
        raise ValueError("it is no .npy")
    stays = array.nbytes > IN_MEMORY and array.flags.c_contiguous and array.ndim > 0 and len(array) > 0
    if stays:
        return StoredRows(path, array.offset, array.dtype, array.shape)
    return np.array(array)


def _stays(member: Member, in_memory: int) -> bool:
    """Whether an array's rows are read from the file one by one."""
    return (
        member.info.compress_type == zipfile.ZIP_STORED
        and member.info.file_size > in_memory
        and not member.fortran_order
        and member.shape != ()
        and member.shape[0] > 0
    )


def _stored(archive: zipfile.ZipFile, member: Member, path: Path) -> StoredRows:
    """An array as rows in the file, once its checksum is verified."""
    info = member.info
    with archive.open(info) as file:
        while file.read(_PIECE):  # the end of the member compares its checksum
            pass
    with path.open("rb") as raw:
        raw.seek(info.header_offset)
        before = sum(struct.unpack("<HH", raw.read(_LOCAL_HEADER)[-4:])) + _LOCAL_HEADER
    return StoredRows(path, info.header_offset + before + member.header, member.dtype, member.shape)
