"""Outputs that hold NaN or infinities: where they are, and what can still be compared.

Nothing can be compared with a reference that is not finite, so it is refused. Where the user asks for it
(`--ignore-nonfinite`), those values alone are left out, and a candidate that is not finite anywhere else
still fails.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtq.data.batches import Batch
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.simulation.values import AllValues, Values, batches_of, dtype_of, each


def check_reference(
    outputs: AllValues,
    *,
    ignore_nonfinite: bool = False,
    samples: Samples | None = None,
    batch: Batch | None = None,
) -> None:
    """Refuse a reference that is not finite.

    Args:
        outputs: output name -> values, rows first.
        ignore_nonfinite: refuse only rows of an output that have no finite value at all.
        samples: the rows that the outputs belong to; messages number rows as their source does.
        batch: the part of the samples that the outputs belong to; None: all of them.

    Raises:
        InputError: it names the output and the row.
    """
    for name, values in outputs.items():
        finite, sizes = _finite(values)
        broken = (finite == 0) & (sizes > 0) if ignore_nonfinite else finite < sizes
        if not broken.any():
            continue
        row = _row(int(broken.argmax()), len(broken), samples, batch)
        remedy = "look at the model, or leave that row out"
        if not ignore_nonfinite:
            remedy += "; --ignore-nonfinite compares only where the reference is finite"
        raise InputError(
            f"output {name!r} of the reference is NaN or infinite in row {row}"
            + (", all of it" if ignore_nonfinite else ""),
            file=samples.source if samples else None,
            cause=f"{int((sizes - finite).sum())} of {int(sizes.sum())} values are, in"
            f" {int((finite < sizes).sum())} rows",
            remedy=remedy,
        )


def first_not_finite(outputs: AllValues, reference: AllValues | None = None) -> tuple[str, int] | None:
    """Name and row of the first NaN or infinity in the outputs, or None.

    Args:
        reference: values count only where the reference's are finite; of other shapes they always do.
    """
    for name, values in outputs.items():
        if reference is not None:
            _, values = both_compared(reference[name], values)
        finite, sizes = _finite(values)
        if (finite < sizes).any():
            return name, int(np.argmax(finite < sizes))
    return None


def compared(reference: NDArray, candidate: NDArray, fill: float = 0.0) -> tuple[NDArray, NDArray]:
    """Both arrays with `fill` where the reference is not finite; themselves where it is finite everywhere, or
    they differ in shape."""
    if not _broken(reference) or reference.shape != candidate.shape:
        return reference, candidate
    finite = np.isfinite(reference)
    return (
        np.where(finite, reference, reference.dtype.type(fill)),
        np.where(finite, candidate, candidate.dtype.type(fill)),
    )


def both_compared(reference: Values, candidate: Values, fill: float = 0.0) -> tuple[Values, Values]:
    """`compared` of all rows of an output."""
    pairs = each(lambda r, c: compared(r, c, fill), reference, candidate)
    return pairs if isinstance(pairs, tuple) else ([r for r, _ in pairs], [c for _, c in pairs])


def all_compared(reference: AllValues, candidate: AllValues) -> tuple[dict[str, Values], dict[str, Values]]:
    """`both_compared` of every output of the reference."""
    pairs = {name: both_compared(values, candidate[name]) for name, values in reference.items()}
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


def with_references(reference: AllValues, candidate: AllValues) -> dict[str, Values]:
    """The candidate's outputs with the reference's own values where those are not finite.

    A metric with labels reads them so, in both models alike: a class that is masked with -inf stays masked.
    """
    return {name: each(_taking_references, values, candidate[name]) for name, values in reference.items()}


def ignored(reference: AllValues) -> list[str]:
    """A sentence for every output of the reference that is not finite everywhere."""
    counts = {name: _finite(values) for name, values in reference.items()}
    return [
        f"output {name!r}: {int((sizes - finite).sum())} of {int(sizes.sum())} values are not finite in the"
        " reference and were not compared"
        for name, (finite, sizes) in counts.items()
        if (finite < sizes).any()
    ]


def _finite(values: Values) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each row, how many of its values are finite, and how many there are; a scalar is one row."""
    if dtype_of(values).kind != "f":
        none = np.zeros(1, np.int64)
        return none, none
    finite = [np.isfinite(np.atleast_1d(batch)) for batch in batches_of(values)]
    counts = [own.reshape(len(own), -1).sum(axis=1) if own.size else [0] * len(own) for own in finite]
    sizes = [[own[:1].size] * len(own) for own in finite]
    return np.concatenate(counts).astype(np.int64), np.concatenate(sizes).astype(np.int64)


def _broken(array: NDArray) -> bool:
    """Whether something in an array is not finite."""
    return array.dtype.kind == "f" and not np.isfinite(array).all()


def _taking_references(reference: NDArray, candidate: NDArray) -> NDArray:
    """The candidate with the reference's values where those are not finite and the shapes are equal."""
    if not _broken(reference) or reference.shape != candidate.shape:
        return candidate
    return np.where(np.isfinite(reference), candidate, reference)


def _row(index: int, length: int, samples: Samples | None, batch: Batch | None) -> int:
    """The row of the source that entry `index` of an output with `length` entries belongs to."""
    if samples is None:
        return index
    if batch is None:
        return samples.row_number(index * len(samples) // length)
    position = index * (batch.rows + batch.padding) // length
    return samples.row_number(batch.start + min(position, batch.rows - 1))
