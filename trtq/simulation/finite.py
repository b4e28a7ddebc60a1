"""Outputs that hold NaN or infinities: where they are, and what can still be compared.

Nothing can be compared with a reference that is not finite, so it is refused. Where the user asks for it
(`--ignore-nonfinite`), those values alone are left out, and a candidate that is not finite anywhere else
still fails.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtq.data.batches import Arrays, Batch
from trtq.data.samples import Samples
from trtq.errors import InputError


def check_reference(
    outputs: Arrays,
    *,
    ignore_nonfinite: bool = False,
    samples: Samples | None = None,
    batch: Batch | None = None,
) -> None:
    """Refuse a reference that is not finite.

    Args:
        outputs: output name -> array, rows first.
        ignore_nonfinite: refuse only rows of an output that have no finite value at all.
        samples: the rows that the outputs belong to; messages number rows as their source does.
        batch: the part of the samples that the outputs belong to; None: all of them.

    Raises:
        InputError: it names the output and the row.
    """
    for name, array in outputs.items():
        if array.dtype.kind != "f" or array.size == 0:
            continue
        finite = np.isfinite(array).reshape(len(array) if array.ndim else 1, -1)
        broken = ~(finite.any(axis=1) if ignore_nonfinite else finite.all(axis=1))
        if not broken.any():
            continue
        row = _row(int(broken.argmax()), len(broken), samples, batch)
        values = finite.size - int(finite.sum())
        remedy = "look at the model, or leave that row out"
        if not ignore_nonfinite:
            remedy += "; --ignore-nonfinite compares only where the reference is finite"
        raise InputError(
            f"output {name!r} of the reference is NaN or infinite in row {row}"
            + (", all of it" if ignore_nonfinite else ""),
            file=samples.source if samples else None,
            cause=f"{values} of {finite.size} values are, in {int((~finite.all(axis=1)).sum())} rows",
            remedy=remedy,
        )


def first_not_finite(outputs: Arrays, reference: Arrays | None = None) -> tuple[str, int] | None:
    """Name and row of the first NaN or infinity in the outputs, or None.

    Args:
        reference: values count only where the reference's are finite.
    """
    for name, array in outputs.items():
        if array.dtype.kind == "f":
            finite = np.isfinite(array)
            if reference is not None:
                finite |= ~np.isfinite(reference[name])
            rows = finite.reshape(len(array), -1).all(axis=1)
            if not rows.all():
                return name, int(np.argmin(rows))
    return None


def compared(reference: NDArray, candidate: NDArray, fill: float = 0.0) -> tuple[NDArray, NDArray]:
    """Both arrays with `fill` where the reference is not finite; themselves where it is finite everywhere."""
    if reference.dtype.kind != "f" or (finite := np.isfinite(reference)).all():
        return reference, candidate
    return (
        np.where(finite, reference, reference.dtype.type(fill)),
        np.where(finite, candidate, candidate.dtype.type(fill)),
    )


def all_compared(reference: Arrays, candidate: Arrays) -> tuple[Arrays, Arrays]:
    """`compared` of every output of the reference."""
    pairs = {name: compared(array, candidate[name]) for name, array in reference.items()}
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


def with_references(reference: Arrays, candidate: Arrays) -> Arrays:
    """The candidate's outputs with the reference's own values where those are not finite.

    A metric with labels reads them so, in both models alike: a class that is masked with -inf stays masked.
    """
    return {
        name: candidate[name]
        if array.dtype.kind != "f" or (finite := np.isfinite(array)).all()
        else np.where(finite, candidate[name], array)
        for name, array in reference.items()
    }


def ignored(reference: Arrays) -> list[str]:
    """A sentence for every output of the reference that is not finite everywhere."""
    counts = {
        name: array.size - int(np.isfinite(array).sum())
        for name, array in reference.items()
        if array.dtype.kind == "f"
    }
    return [
        f"output {name!r}: {count} of {reference[name].size} values are not finite in the reference and were"
        " not compared"
        for name, count in counts.items()
        if count
    ]


def _row(index: int, length: int, samples: Samples | None, batch: Batch | None) -> int:
    """The row of the source that entry `index` of an output with `length` entries belongs to."""
    if samples is None:
        return index
    if batch is None:
        return samples.row_number(index * len(samples) // length)
    position = index * (batch.rows + batch.padding) // length
    return samples.row_number(batch.start + min(position, batch.rows - 1))
