"""Rows that stay in their `.npz` until they are asked for, so that memory does not grow with the data."""

from __future__ import annotations

import struct
import zipfile
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

IN_MEMORY = 1 << 24
"""Arrays up to this many bytes are read whole, and so are compressed ones."""

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
        self._path, self._offset = path, offset

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> NDArray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        values = prod(self.shape[1:])
        offset = self._offset + index * values * self.dtype.itemsize
        return np.fromfile(self._path, self.dtype, values, offset=offset).reshape(self.shape[1:])


def read_npz(path: Path) -> dict[str, NDArray | StoredRows]:
    """The arrays of an `.npz`; large ones that can be are left where they are, once their checksum is right.

    Raises:
        OSError, ValueError, zipfile.BadZipFile, zlib.error: the file is not an `.npz`, or damaged.
    """
    arrays: dict[str, NDArray | StoredRows] = {}
    with np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            arrays[name] = _stored(archive.zip, name, path) or archive[name]
    return arrays


def _stored(archive: zipfile.ZipFile, name: str, path: Path) -> StoredRows | None:
    """A large array as rows in the file, or None where it has to be read."""
    member = name if name in archive.namelist() else f"{name}.npy"
    info = archive.getinfo(member)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size <= IN_MEMORY:
        return None
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            return None
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
        shape, fortran_order, dtype = read_header(file)
        if fortran_order or dtype.hasobject:
            return None
        header = file.tell()
        while file.read(_PIECE):  # the end of the member compares its checksum
            pass
    with path.open("rb") as raw:
        raw.seek(info.header_offset)
        before = sum(struct.unpack("<HH", raw.read(_LOCAL_HEADER)[-4:])) + _LOCAL_HEADER
    return StoredRows(path, info.header_offset + before + header, dtype, shape)
