"""How alike two models' outputs are, without labels: SQNR, cosine, largest error.

`samples` splits an array of rows into that many equal blocks of consecutive rows; each block is
flattened. Every function returns float64 of shape (samples,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtq.data.batches import Arrays
from trtq.errors import InputError
from trtq.gate.finite import check_reference

MAX_SQNR_DB = 200.0
"""SQNR is clipped to ± this many dB: equal outputs would be at infinity, which JSON cannot carry.
float32 rounding alone is noise near 150 dB."""


@dataclass(frozen=True)
class Similarity:
    """One output, candidate against reference, over all samples.

    Attributes:
        cosine: cosine of the two flattened arrays, -1 to 1.
        sqnr_db: 10·log10(sum r² / sum (r - c)²), clipped to ± `MAX_SQNR_DB`.
        max_abs_error: largest |r - c|.
    """

    cosine: float
    sqnr_db: float
    max_abs_error: float


def compare(reference: Arrays, candidate: Arrays) -> dict[str, Similarity]:
    """`Similarity` of every output in `reference`; both sides as checked by `check_comparable`."""
    return {
        name: Similarity(
            cosine=float(cosine(expected, candidate[name])[0]),
            sqnr_db=float(sqnr_db(expected, candidate[name])[0]),
            max_abs_error=float(np.abs(_noise(expected, candidate[name])).max(initial=0.0)),
        )
        for name, expected in reference.items()
    }


def sqnr_db(reference: NDArray, candidate: NDArray, samples: int = 1) -> NDArray[np.float64]:
    """Signal to quantization noise in dB, 10·log10(sum r² / sum (r - c)²); ± `MAX_SQNR_DB` at most."""
    signal = _energy(_blocks(reference, samples))
    noise = _energy(_blocks(_noise(reference, candidate), samples))
    return decibels(signal, noise)


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
    values = np.array(sqnr_db, np.float64)
    noise = np.where(values >= MAX_SQNR_DB, 0.0, 10.0 ** (-values / 10))
    return float(decibels(np.float64(1.0), noise.mean()))


def scored(outputs: Arrays) -> list[str]:
    """Names of the outputs that noise is measured on: the floating-point ones, or all if there are none."""
    floats = [name for name, array in outputs.items() if array.dtype.kind == "f"]
    return floats or list(outputs)


def cosine(reference: NDArray, candidate: NDArray, samples: int = 1) -> NDArray[np.float64]:
    """Cosine of the angle between reference and candidate; 1 if both are all zero, 0 if only one is."""
    r, c = _blocks(reference, samples), _blocks(candidate, samples)
    norms = np.sqrt(_energy(r)) * np.sqrt(_energy(c))
    dot = np.einsum("ij,ij->i", r, c, dtype=np.float64)
    both_zero = (_energy(r) == 0) & (_energy(c) == 0)
    return np.where(both_zero, 1.0, np.clip(dot / np.where(norms == 0, np.inf, norms), -1.0, 1.0))


def likelihood(reference: NDArray, candidate: NDArray, samples: int = 1) -> NDArray[np.float64]:
    """exp(-KL) of the reference's class probabilities from the candidate's, 0 to 1; the outputs are logits.

    KL is the mean over a sample's positions of sum p (ln p - ln q) in nats, with p and q the softmax over the
    classes: axis 1 of two or four dimensions, else the last.

    Raises:
        InputError: the outputs cannot be logits.
    """
    if reference.dtype.kind != "f" or reference.ndim < 2:
        raise InputError(
            "kl needs logits, one for each class",
            cause=f"the output is {reference.dtype} of shape {reference.shape}",
            remedy="say which output has them, such as kl@logits",
        )
    axis = 1 if reference.ndim in (2, 4) else -1
    p, q = (_log_softmax(array.astype(np.float64), axis) for array in (reference, candidate))
    divergence = (np.exp(p) * (p - q)).sum(axis=axis)
    return np.exp(-divergence.reshape(samples, -1).mean(axis=1))


def worst_samples(reference: Arrays, candidate: Arrays, samples: int, count: int = 5) -> tuple[int, ...]:
    """Indices of the `count` samples whose lowest SQNR over the outputs is lowest, worst first.

    Samples that are reproduced exactly are never listed.
    """
    lowest = np.min([sqnr_db(r, candidate[name], samples) for name, r in reference.items()], axis=0)
    order = np.argsort(lowest, kind="stable")[:count]
    return tuple(int(i) for i in order if lowest[i] < MAX_SQNR_DB)


def check_comparable(reference: Arrays, candidate: Arrays, *, ignore_nonfinite: bool = False) -> None:
    """Refuse outputs that cannot be compared.

    Raises:
        InputError: no output or no row, an output missing in the candidate, different shapes, or a
            reference that is not finite (see `finite.check_reference`).
    """
    if not reference or any(array.ndim == 0 or len(array) == 0 for array in reference.values()):
        raise InputError("the reference has no outputs to compare", remedy="give at least one sample")
    for name, expected in reference.items():
        if name not in candidate:
            raise InputError(
                f"the candidate has no output {name!r}",
                cause=f"its outputs are {', '.join(candidate) or 'none'}",
                remedy="compare a model with its own quantized version: the output names must be equal",
            )
        if candidate[name].shape != expected.shape:
            raise InputError(
                f"output {name!r} has shape {expected.shape} in the reference"
                f" but {candidate[name].shape} in the candidate"
            )
    check_reference(reference, ignore_nonfinite=ignore_nonfinite)


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
