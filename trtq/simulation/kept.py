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


Shape = tuple[int | None, ...] | None
"""None for a size that differs between batches, or for all where their number does."""

Specs = dict[str, tuple[np.dtype, Shape]]
"""Array name -> dtype and shape."""


def _joined(known: Shape, shape: tuple[int, ...]) -> Shape:
    if known is None or len(known) != len(shape):
        return None
    return tuple(old if old == new else None for old, new in zip(known, shape, strict=True))


class Kept(Sequence[Arrays]):
    """The arrays of batches, in the order in which they came: the first ones in memory, the others in a
    scratch file, from which each is read when it is asked for. The file goes with the process.

    Any number of threads may read.

    Attributes:
        nbytes: of all arrays.
        specs: theirs.

    Args:
        batches: the arrays of each.
        in_memory: bytes that stay there.
    """

    def __init__(self, batches: Iterable[Arrays], in_memory: int) -> None:
        self._batches: list[dict[str, Any]] = []
        self._file: Any = None
        self._lock = threading.Lock()
        self.nbytes = 0
        self.specs: Specs = {}
        for arrays in batches:
            for name, array in arrays.items():
                known = self.specs.get(name)
                shape = array.shape if known is None else _joined(known[1], array.shape)
                self.specs[name] = array.dtype, shape
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
        return self.take(index, self._batches[index])

    def take(self, index: int, names: Iterable[str]) -> Arrays:
        """Some of a batch's arrays."""
        arrays = self._batches[index]
        found = {name: arrays[name] for name in names}
        return {n: self._read(a) if isinstance(a, _Place) else a for n, a in found.items()}

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
