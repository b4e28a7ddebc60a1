"""How alike two models' outputs are, without labels: SQNR, cosine, largest error.

An output that mixes scales is judged by its components (see `components`), each by its own energy, and its
figure is that of the worst: in the gate (`compare`, `sqnr_db`, `cosine`) as in every search (`Reference`).

`samples` splits the rows into that many equal blocks of consecutive rows; each block is flattened. Every
function returns float64 of shape (samples,). Where a row has another shape in the candidate (it found another
number of boxes), the two cannot be compared: they count as if nothing in them were alike (`LOST`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtq.data.batches import Arrays
from trtq.errors import InputError
from trtq.simulation.components import WHOLE, Components, components
from trtq.simulation.finite import check_reference, compared
from trtq.simulation.values import (
    AllValues,
    Values,
    batches_of,
    dtype_of,
    paired,
    rank_of,
    same_shapes,
    shape_text,
)

MAX_SQNR_DB = 200.0
"""SQNR is clipped to ± this many dB: equal outputs would be at infinity, which JSON cannot carry.
float32 rounding alone is noise near 150 dB."""

LOST = 0.0
"""Cosine, SQNR in dB and likelihood of what cannot be compared: those of a candidate that gives only 0."""

Score = Callable[[NDArray, NDArray, int], NDArray[np.float64]]
"""(reference, candidate, samples) -> a figure for each sample."""


@dataclass(frozen=True)
class Part:
    """One component of an output, candidate against reference, over all samples.

    Attributes:
        label: which indices of which axis it is, and how large its values are.
        cosine, sqnr_db, max_abs_error: as in `Similarity`.
    """

    label: str
    cosine: float
    sqnr_db: float
    max_abs_error: float


@dataclass(frozen=True)
class Similarity:
    """One output, candidate against reference, over all samples.

    Attributes:
        cosine: cosine of the two flattened arrays, -1 to 1; of the worst component.
        sqnr_db: 10·log10(sum r² / sum (r - c)²), clipped to ± `MAX_SQNR_DB`; of the worst component.
        max_abs_error: largest |r - c|.
        parts: the components of an output that mixes scales; none where it is whole.
        not_compared: rows that have another shape in the candidate; the figures are those of the others, and
            `LOST` where there are no others.
    """

    cosine: float
    sqnr_db: float
    max_abs_error: float
    parts: tuple[Part, ...] = ()
    not_compared: int = 0


class Reference:
    """The fp32 model's outputs, and what the noise of all candidates of one search is measured against.

    The components are found once, on all batches. What is not finite in the reference is left out.

    Args:
        batches: the outputs of every batch.
    """

    def __init__(self, batches: Sequence[Arrays]) -> None:
        self._batches = batches
        self.components = {name: components(_Finite(batches, name)) for name in scored(batches[0])}
        self._signal = [
            {name: _energies(found, _finite(batch[name])) for name, found in self.components.items()}
            for batch in batches
        ]

    def noise(self, found: Iterable[Arrays]) -> float:
        """Noise of a candidate's outputs relative to their signal: of each output the worst component's, and
        of several outputs the mean, so that one which is exact does not hide what happens to the others.

        Args:
            found: the candidate's outputs, batch by batch; where they end early, so does what they are
                measured against.
        """
        signal, noise = ({name: np.zeros(len(c)) for name, c in self.components.items()} for _ in range(2))
        for raw, energies, outputs in zip(self._batches, self._signal, found, strict=False):
            for name, split in self.components.items():
                expected, candidate = compared(raw[name], outputs[name])
                signal[name] += energies[name]
                if expected.shape != candidate.shape:  # LOST
                    noise[name] += energies[name]
                    continue
                difference = _noise(expected, candidate).reshape(expected.shape)
                noise[name] += _energies(split, difference)
        return float(np.mean([_relative(decibels(signal[n], noise[n])).max() for n in self.components]))

    def sqnr_db(self, found: Iterable[Arrays]) -> float:
        """`noise` in dB, ± `MAX_SQNR_DB` at most."""
        return noise_db(self.noise(found))


class _Finite(Sequence[NDArray]):
    """One output of all batches, with 0 for what is not finite."""

    def __init__(self, batches: Sequence[Arrays], name: str) -> None:
        self._batches, self._name = batches, name

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return _finite(self._batches[index][self._name])


def _finite(array: NDArray) -> NDArray:
    return compared(array, array)[0]


def compare(reference: AllValues, candidate: AllValues) -> dict[str, Similarity]:
    """`Similarity` of every output in `reference`; both sides as checked by `check_comparable`."""
    return {name: _similarity(*paired(values, candidate[name])) for name, values in reference.items()}


def _similarity(reference: Values, candidate: Values) -> Similarity:
    split, same = _components(reference), same_shapes(reference, candidate)
    if not same.any():
        return Similarity(LOST, LOST, 0.0, not_compared=len(same))
    if isinstance(reference, np.ndarray) and isinstance(candidate, np.ndarray):
        pairs = list(zip(split.parts(reference), split.parts(candidate), strict=True))
    else:
        pairs = _pairs(split, reference, candidate, np.flatnonzero(same))
    figures = [
        (
            float(_plain_cosine(r, c, 1)[0]),
            float(_plain_sqnr_db(r, c, 1)[0]),
            float(np.abs(_noise(r, c)).max(initial=0.0)),
        )
        for r, c in pairs
    ]
    cosines, sqnrs, errors = zip(*figures, strict=True)
    parts = [Part(label, *found) for label, found in zip(split.labels(), figures, strict=False)]
    return Similarity(min(cosines), min(sqnrs), max(errors), tuple(parts), int((~same).sum()))


def sqnr_db(reference: Values, candidate: Values, samples: int = 1) -> NDArray[np.float64]:
    """Signal to quantization noise in dB, 10·log10(sum r² / sum (r - c)²); ± `MAX_SQNR_DB` at most.

    Of each sample that of its worst component.
    """
    return _worst(_plain_sqnr_db, reference, candidate, samples)


def decibels(signal: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """10·log10(signal / noise) of two energies; ± `MAX_SQNR_DB` at most, which no noise at all gives.

    Noise that is NaN, as that of outputs which are not finite is, counts as infinite.
    """
    noise = np.where(np.isnan(noise), np.inf, noise)
    with np.errstate(divide="ignore"):
        ratio = 10 * (np.log10(signal) - np.log10(np.where(noise == 0, 1, noise)))
    return np.where(noise == 0, MAX_SQNR_DB, np.clip(ratio, -MAX_SQNR_DB, MAX_SQNR_DB))


def overall_sqnr_db(sqnr_db: Sequence[float]) -> float:
    """SQNR in dB of the mean noise of several outputs, each relative to its signal.

    A mean of decibels would let an output that is exact, at `MAX_SQNR_DB`, hide what happens to the others.
    """
    return noise_db(float(_relative(np.array(sqnr_db, np.float64)).mean()))


def noise_db(noise: float) -> float:
    """SQNR in dB of noise relative to its signal."""
    return float(decibels(np.float64(1.0), np.float64(noise)))


def scored(outputs: AllValues) -> list[str]:
    """Names of the outputs that noise is measured on: the floating-point ones, or all if there are none."""
    floats = [name for name, values in outputs.items() if dtype_of(values).kind == "f"]
    return floats or list(outputs)


def cosine(reference: Values, candidate: Values, samples: int = 1) -> NDArray[np.float64]:
    """Cosine of the angle between reference and candidate; 1 if both are all zero, 0 if only one is.

    Of each sample that of its worst component. One value has no angle: there it is 1 - e²/2, as the cosine is
    for a small error e, relative to the root mean square of the reference's values; -1 at least.
    """
    return _worst(_plain_cosine, reference, candidate, samples)


def _plain_cosine(reference: NDArray, candidate: NDArray, samples: int) -> NDArray[np.float64]:
    r, c = _blocks(reference, samples), _blocks(candidate, samples)
    if r.shape[1] == 1:
        scale = np.square(r, dtype=np.float64).mean() or 0.5
        return np.clip(1 - np.square(r - c, dtype=np.float64)[:, 0] / (2 * scale), -1.0, 1.0)
    norms = np.sqrt(_energy(r)) * np.sqrt(_energy(c))
    dot = np.einsum("ij,ij->i", r, c, dtype=np.float64)
    both_zero = (_energy(r) == 0) & (_energy(c) == 0)
    return np.where(both_zero, 1.0, np.clip(dot / np.where(norms == 0, np.inf, norms), -1.0, 1.0))


def likelihood(reference: Values, candidate: Values, samples: int = 1) -> NDArray[np.float64]:
    """exp(-KL) of the reference's class probabilities from the candidate's, 0 to 1; the outputs are logits.

    KL is the mean over a sample's positions of sum p (ln p - ln q) in nats, with p and q the softmax over the
    classes: axis 1 of two or four dimensions with the rows', else the last.

    Raises:
        InputError: the outputs cannot be logits.
    """
    first = batches_of(reference)[0]
    if first.dtype.kind != "f" or first.ndim < 2 or first.shape[_class_axis(first)] == 1:
        raise InputError(
            "kl needs logits, one for each class",
            cause=f"the output is {dtype_of(reference)}, of each sample of shape {shape_text(reference)}",
            remedy="say which output has them, such as kl@logits",
        )
    if isinstance(reference, np.ndarray) and isinstance(candidate, np.ndarray):
        if not reference.size:
            return np.ones(samples)
        return np.exp(-_divergence(reference, candidate).reshape(samples, -1).mean(axis=1))
    rows = zip(*map(batches_of, paired(reference, candidate)), strict=True)
    found = [
        LOST if r.shape != c.shape else float(np.exp(-_divergence(r, c).mean())) if r.size else 1.0
        for r, c in rows
    ]
    return np.reshape(found, (samples, -1)).mean(axis=1)


def _divergence(reference: NDArray, candidate: NDArray) -> NDArray[np.float64]:
    """KL at every position, in nats."""
    axis = _class_axis(reference)
    p, q = (_log_softmax(array.astype(np.float64), axis) for array in (reference, candidate))
    return (np.exp(p) * (p - q)).sum(axis=axis)


def worst_samples(
    reference: AllValues, candidate: AllValues, samples: int, count: int = 5
) -> tuple[int, ...]:
    """Indices of the `count` samples whose lowest SQNR over the outputs is lowest, worst first.

    Samples that are reproduced exactly are never listed.
    """
    lowest = np.min([sqnr_db(r, candidate[name], samples) for name, r in reference.items()], axis=0)
    order = np.argsort(lowest, kind="stable")[:count]
    return tuple(int(i) for i in order if lowest[i] < MAX_SQNR_DB)


def check_comparable(reference: AllValues, candidate: AllValues, *, ignore_nonfinite: bool = False) -> None:
    """Refuse outputs of models that are not two versions of one.

    Rows may differ in shape, as another number of boxes does.

    Raises:
        InputError: no output or no row, an output missing in the candidate, other numbers of rows or ranks,
            or a reference that is not finite (see `finite.check_reference`).
    """
    if not reference or any(
        (isinstance(values, np.ndarray) and values.ndim == 0) or len(values) == 0
        for values in reference.values()
    ):
        raise InputError("the reference has no outputs to compare", remedy="give at least one sample")
    for name, values in reference.items():
        if name not in candidate:
            raise InputError(
                f"the candidate has no output {name!r}",
                cause=f"its outputs are {', '.join(candidate) or 'none'}",
                remedy="compare a model with its own quantized version: the output names must be equal",
            )
        found = candidate[name]  # of one rank less where each row has one entry: see `values.joined`
        if len(found) != len(values) or abs(rank_of(found) - rank_of(values)) > 1:
            raise InputError(
                f"output {name!r} has {len(values)} rows, each {shape_text(values)}, in the reference but"
                f" {len(found)}, each {shape_text(found)}, in the candidate"
            )
    check_reference(reference, ignore_nonfinite=ignore_nonfinite)


def _worst(score: Score, reference: Values, candidate: Values, samples: int) -> NDArray[np.float64]:
    """The lowest score of each sample among the components of the reference."""
    reference, candidate = paired(reference, candidate)
    split = _components(reference)
    if isinstance(reference, np.ndarray) and isinstance(candidate, np.ndarray):
        pairs = zip(split.parts(reference), split.parts(candidate), strict=True)
        return np.min([score(r, c, samples) for r, c in pairs], axis=0)
    k, same = len(reference) // samples, same_shapes(reference, candidate)
    return np.array(
        [
            min(float(score(r, c, 1)[0]) for r, c in _pairs(split, reference, candidate, own))
            if same[own].all()
            else LOST
            for own in np.arange(len(reference)).reshape(samples, k)
        ]
    )


def _components(values: Values) -> Components:
    """The components of an output's values; it is whole where they differ in rank."""
    batches = batches_of(values)
    return components(batches) if len({batch.ndim for batch in batches}) == 1 else WHOLE


def _pairs(
    split: Components, reference: Values, candidate: Values, rows: NDArray[np.intp]
) -> list[tuple[NDArray, NDArray]]:
    """The components of some rows, flat, of both sides."""

    def flat(values: Values) -> list[NDArray]:
        parts = [[part.ravel() for part in split.parts(np.asarray(values[row])[None])] for row in rows]
        return [np.concatenate(own) for own in zip(*parts, strict=True)]

    return list(zip(flat(reference), flat(candidate), strict=True))


def _plain_sqnr_db(reference: NDArray, candidate: NDArray, samples: int) -> NDArray[np.float64]:
    signal = _energy(_blocks(reference, samples))
    noise = _energy(_blocks(_noise(reference, candidate), samples))
    return decibels(signal, noise)


def _relative(sqnr_db: NDArray[np.float64]) -> NDArray[np.float64]:
    """Noise relative to its signal; none at `MAX_SQNR_DB`."""
    return np.where(sqnr_db >= MAX_SQNR_DB, 0.0, 10.0 ** (-sqnr_db / 10))


def _energies(split: Components, array: NDArray) -> NDArray[np.float64]:
    """The energy of each component."""
    return np.array([_energy(_blocks(part, 1))[0] for part in split.parts(array)])


def _class_axis(logits: NDArray) -> int:
    return 1 if logits.ndim in (2, 4) else -1


def _log_softmax(logits: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def _blocks(array: NDArray, samples: int) -> NDArray:
    """`array` as floating point of shape (samples, values of a sample)."""
    wanted = array.dtype if array.dtype in (np.float32, np.float64) else np.float64
    return array.reshape(samples, -1).astype(wanted, copy=False)


def _noise(reference: NDArray, candidate: NDArray) -> NDArray:
    return _blocks(reference, 1) - _blocks(candidate, 1)


def _energy(blocks: NDArray) -> NDArray[np.float64]:
    return np.einsum("ij,ij->i", blocks, blocks, dtype=np.float64)
