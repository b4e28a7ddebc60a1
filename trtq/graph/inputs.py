"""What a model takes: name, type and shape of each input."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class InputSpec(NamedTuple):
    """A model input: dynamic dimensions of `shape` are strings or None; the first axis is the batch."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {'x'.join('?' if d is None else str(d) for d in self.shape)}"


def fixed_batch(inputs: Iterable[InputSpec]) -> int | None:
    """The batch size that a model's inputs fix; None where the first axis of all is dynamic."""
    sizes = [spec.shape[0] for spec in inputs if spec.shape]
    return max((size for size in sizes if isinstance(size, int)), default=None)
