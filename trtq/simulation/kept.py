"""Arrays of many batches, which need not fit into memory."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from trtq.data.batches import Arrays


class _Place(NamedTuple):
    """Where an array lies in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


class Kept(Sequence[Arrays]):
    """The arrays of batches, in the order in which they came: the first ones in memory, the others in a
    scratch file, from which each is read when it is asked for. The file goes with the process.

    Any number of threads may read.

    Attributes:
        nbytes: of all arrays.

    Args:
        batches: the arrays of each.
        in_memory: bytes that stay there.
    """

    def __init__(self, batches: Iterable[Arrays], in_memory: int) -> None:
        self._batches: list[dict[str, Any]] = []
        self._file: Any = None
        self._lock = threading.Lock()
        self.nbytes = 0
        for arrays in batches:
            self.nbytes += sum(array.nbytes for array in arrays.values())
            fits = self.nbytes <= in_memory
            self._batches.append(arrays if fits else {n: self._written(a) for n, a in arrays.items()})

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Arrays: ...

    @overload
    def __getitem__(self, index: slice) -> list[Arrays]: ...

    def __getitem__(self, index: int | slice) -> Arrays | list[Arrays]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        arrays = self._batches[index]
        return {n: self._read(a) if isinstance(a, _Place) else a for n, a in arrays.items()}

    def _written(self, array: np.ndarray) -> _Place | np.ndarray:
        if array.dtype.hasobject:
            return array
        self._file = self._file or tempfile.TemporaryFile(prefix="trtq-")  # noqa: SIM115
        place = _Place(self._file.seek(0, 2), array.shape, array.dtype)
        self._file.write(np.ascontiguousarray(array).data)
        return place

    def _read(self, place: _Place) -> np.ndarray:
        array = np.empty(place.shape, place.dtype)
        with self._lock:
            self._file.seek(place.offset)
            self._file.readinto(array.reshape(-1).view(np.uint8).data)
        return array
