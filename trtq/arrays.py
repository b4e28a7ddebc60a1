"""Arrays in `.npz` files, of which nothing is believed that their bytes do not bear out."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from trtq.files import PathLike

MOST_WHOLE = 1 << 32
"""Bytes that the arrays of a file that are read whole may have together."""

_HEADERS = {  # 3.0 is for records
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_MOST_EMPTY = 1 << 24  # rows of an array without values


@dataclass(frozen=True)
class Member:
    """An array as its header describes it, once that agrees with the size of the member.

    Attributes:
        header: bytes before the first value.
    """

    info: zipfile.ZipInfo
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool
    header: int

    def read(self, archive: zipfile.ZipFile) -> NDArray:
        """The whole array.

        Raises:
            ValueError, zipfile.BadZipFile, zlib.error: the member is damaged.
        """
        with archive.open(self.info) as file:
            array: NDArray = np.lib.format.read_array(file, allow_pickle=False)
            file.read(1)  # the end of the member compares its checksum
        return array


def members(archive: zipfile.ZipFile) -> list[Member]:
    """The arrays of an `.npz` in their order.

    Raises:
        ValueError: a member is no array of plain values, or has other bytes than its header says; two have
            the same name.
        zipfile.BadZipFile, zlib.error: the archive is damaged.
    """
    found = [_member(archive, info) for info in archive.infolist()]
    name, times = Counter(member.name for member in found).most_common(1)[0] if found else ("", 0)
    if times > 1:
        raise ValueError(f"it has {times} arrays '{name}'")
    return found


def check_whole(those: Iterable[Member]) -> None:
    """Refuse arrays that do not fit into memory together; compressed, they may be of a small file.

    Raises:
        ValueError: they have more than `MOST_WHOLE` bytes.
    """
    size = sum(member.info.file_size for member in those)
    if size > MOST_WHOLE:
        raise ValueError(
            f"arrays of {size / 1e9:.1f} GB would have to be read whole: write them with numpy.savez, not"
            " compressed, in C order, and they are read row by row"
        )


def read_arrays(content: bytes | PathLike) -> dict[str, NDArray]:
    """The arrays of an `.npz`, or of its bytes, read whole.

    Raises:
        OSError: the file cannot be read.
        ValueError, zipfile.BadZipFile, zlib.error: not an `.npz` of plain arrays, or a damaged one.
    """
    source: BinaryIO | Path = io.BytesIO(content) if isinstance(content, bytes) else Path(content)
    with zipfile.ZipFile(source) as archive:
        found = members(archive)
        check_whole(found)
        return {member.name: member.read(archive) for member in found}


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    name = info.filename.removesuffix(".npy")
    with archive.open(info) as file:
        try:
            version = np.lib.format.read_magic(file)
        except ValueError:
            raise ValueError(f"its member '{info.filename}' is no array") from None
        if version not in _HEADERS:
            raise ValueError(f"array '{name}' is no plain one: its format is {version}")
        shape, fortran_order, dtype = _HEADERS[version](file)
        header = file.tell()
    if dtype.hasobject or dtype.names is not None:
        raise ValueError(f"array '{name}' holds {'Python objects' if dtype.hasobject else 'records'}")
    if dtype.itemsize == 0 or any(size < 0 for size in shape):
        raise ValueError(f"array '{name}' has no values: it is {dtype.str} of shape {shape}")
    declared, had = prod(shape) * dtype.itemsize, info.file_size - header
    if declared != had:
        raise ValueError(
            f"array '{name}' has {had:,} bytes, and {declared:,} by its header: {dtype.str} of shape {shape}"
        )
    if declared == 0 and max(shape) > _MOST_EMPTY:
        raise ValueError(f"array '{name}' has no values: its shape is {shape}")
    return Member(info, name, dtype, shape, fortran_order, header)
