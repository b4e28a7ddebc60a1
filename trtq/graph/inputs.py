"""What a model takes: name, type and shape of each input, and which of its axes is the batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

Dims = Sequence[int | str | None]
"""Dimensions as a model says them; dynamic ones are strings or None."""


class InputSpec(NamedTuple):
    """A model input.

    Attributes:
        shape: dynamic dimensions are strings or None.
        batch_axis: the axis of the batch; None: the input has none, and a sample's value is fed as it stands.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]
    batch_axis: int | None = 0

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {dims_text(self.shape)}"

    @property
    def row_dims(self) -> tuple[int | str | None, ...]:
        """The dimensions of a row: all but the batch."""
        axis = self.batch_axis
        return self.shape if axis is None else (*self.shape[:axis], *self.shape[axis + 1 :])

    @property
    def batch_dim(self) -> int | str | None:
        """The dimension of the batch; 1 where there is none."""
        return 1 if self.batch_axis is None else self.shape[self.batch_axis]

    def row_shape(self, fed: Sequence[int]) -> tuple[int, ...]:
        """The shape of a row from that of a feed."""
        if self.batch_axis is None:
            return tuple(fed)
        return (*fed[: self.batch_axis], *fed[self.batch_axis + 1 :])

    def fed_shape(self, row: Sequence[int], batch: int = 1) -> tuple[int, ...]:
        """The shape of a feed of `batch` rows of shape `row`."""
        if self.batch_axis is None:
            return tuple(row)
        return (*row[: self.batch_axis], batch, *row[self.batch_axis :])


def dims_text(dims: Dims) -> str:
    """Such as "?x3x224x224"; a scalar is named so."""
    return "x".join("?" if d is None else str(d) for d in dims) or "scalar"


def fits(dims: Dims, shape: Sequence[int]) -> bool:
    """Whether an array of this shape suits the dimensions."""
    return len(dims) == len(shape) and all(
        not isinstance(want, int) or want == got for want, got in zip(dims, shape, strict=True)
    )


def guess_batch_axes(inputs: Sequence[InputSpec], outputs: Iterable[Dims | None]) -> list[InputSpec]:
    """The inputs with the batch axes that the model's shapes suggest; the data may show another.

    An axis named like the batch (see `_batch_name`) is it: of Nx576 and 2xNx128 both have one. Else the first
    axis is the batch where it is dynamic or 1. One of a fixed size above 1 is the batch if it is that of all
    inputs, and if each output's fixed first axis is a multiple of it: six cameras that give one answer are no
    batch of six. A scalar has none.
    """
    leads = {spec.shape[0] for spec in inputs if spec.shape}
    made = [dims[0] for dims in outputs if dims]
    batch = _batch_name(inputs)

    def axis(spec: InputSpec) -> int | None:
        if batch is not None and batch in spec.shape:
            return spec.shape.index(batch)
        if not spec.shape:
            return None
        lead = spec.shape[0]
        if not isinstance(lead, int) or lead == 1:
            return 0
        divided = all(size % lead == 0 for size in made if isinstance(size, int))
        return 0 if len(leads) == 1 and divided else None

    return [spec._replace(batch_axis=axis(spec)) for spec in inputs]


def _batch_name(inputs: Sequence[InputSpec]) -> str | None:
    """The name of the dynamic batch, if it can be told: the one that speaks of a batch, or the one that some
    input has first, or, where no first one is in all inputs with named axes, another one that is."""
    named = [[dim for dim in spec.shape if isinstance(dim, str)] for spec in inputs]
    every = [dim for dims in named for dim in dims]
    spoken = {dim for dim in every if "batch" in dim.lower()}
    if len(spoken) == 1:
        return spoken.pop()
    first = {spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], str)}
    common = set.intersection(*(set(dims) for dims in named if dims)) if every else set()
    inner = common - first
    if len(inner) == 1 and not common & first and len([dims for dims in named if dims]) > 1:
        return inner.pop()
    return first.pop() if len(first) == 1 else None


def fixed_batch(inputs: Iterable[InputSpec]) -> int | None:
    """The batch size that a model's inputs fix; None where the batch of all is dynamic."""
    sizes = [spec.batch_dim for spec in inputs if spec.shape and spec.batch_axis is not None]
    return max((size for size in sizes if isinstance(size, int)), default=None)
