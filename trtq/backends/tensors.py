"""An engine's inputs and outputs, and arrays as it stores them: TensorRT's datatypes and NumPy's."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtq.errors import InputError
from trtq.graph.codes import Code

DTYPES: dict[str, np.dtype] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(np.float32),  # NumPy has no bfloat16: see `Tensor.stored`
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}
"""TensorRT's datatype -> that of the arrays that go in and come out."""


class Tensor(NamedTuple):
    """An input or output of an engine.

    Attributes:
        kind: TensorRT's name of its datatype, such as `FLOAT`.
        shape: -1 where it is dynamic.
        on_host: its values are read or written on the CPU, because shapes depend on them.
        code: what its numbers stand for, where floats go in and come out all the same.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    is_input: bool
    on_host: bool
    code: Code | None = None

    @property
    def dtype(self) -> np.dtype:
        """Of its arrays."""
        return np.dtype(np.float32) if self.code else self._stored_dtype

    @property
    def _stored_dtype(self) -> np.dtype:
        return DTYPES[self.kind]

    def stored(self, array: NDArray) -> NDArray:
        """An array as the engine reads it: contiguous, of the engine's datatype, bfloat16 as its bits.

        Raises:
            InputError: the values would not stay what they are.
        """
        if self.code is not None:
            array = self.code.encoded(array)
        if array.dtype != self._stored_dtype:
            with np.errstate(all="ignore"):
                converted = array.astype(self._stored_dtype)
            if not _same_numbers(array, converted):
                raise InputError(
                    f"input '{self.name}' of the engine is {self.kind} and cannot hold the data's values",
                    cause=f"the data's array is {array.dtype}",
                    remedy="give the data in the engine's datatype",
                )
            array = converted
        array = np.ascontiguousarray(array).reshape(array.shape)
        return _to_bfloat16(array) if self.kind == "BF16" else array

    def empty(self, shape: tuple[int, ...]) -> NDArray:
        """An array for values as the engine stores them."""
        return np.empty(shape, np.uint16 if self.kind == "BF16" else self._stored_dtype)

    def values(self, stored: NDArray) -> NDArray:
        """The inverse of `stored`."""
        if self.code is not None:
            return self.code.decoded(stored)
        return _from_bfloat16(stored) if self.kind == "BF16" else stored


def _same_numbers(array: NDArray, converted: NDArray) -> bool:
    """Whether values are what they were: the same integers, or the same floats but for rounding."""
    if array.dtype.kind == converted.dtype.kind == "f":
        return np.array_equal(np.isfinite(array), np.isfinite(converted))
    integers = array.dtype.kind in "iub" and converted.dtype.kind in "iub"
    return integers and np.array_equal(converted, array)


def _to_bfloat16(array: NDArray) -> NDArray:
    """float32 rounded to the nearest bfloat16, ties to even: its bits as uint16."""
    bits = array.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), bits >> 16 | 0x40, rounded).astype(np.uint16)


def _from_bfloat16(bits: NDArray) -> NDArray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
