"""What "accuracy" means for a model: the built-in metrics and the user's own function.

A metric takes dictionaries of arrays: `outputs` (rows first) and `targets` (samples first). Where
the outputs have k times as many rows as the targets, k consecutive rows make one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from trtq.code_hash import script_sha256
from trtq.data.batches import Arrays
from trtq.errors import InputError
from trtq.scripts import load_function
from trtq.simulation import similarity
from trtq.simulation.finite import compared

Float = NDArray[np.float64]

_TARGET_NAMES = ("label", "labels", "target", "targets")


@dataclass(frozen=True)
class Metric:
    """One number per model, higher is better.

    Exactly one of `rows` and `function` is there.

    Attributes:
        name: as the user wrote it.
        fingerprint: equal for metrics that compute the same: the name, or for a file the hash of
            its bytes and of the user's modules that it imports, and the function's name.
        rows: (outputs, targets, reference outputs) -> float64 (samples, ...): what each sample
            contributes. The value is the mean of the rows, put through `summarise` if it is there.
        summarise: mean rows, with any leading axes -> values, of the leading axes' shape.
        function: (outputs, targets) -> float.
        needs_targets: labels are needed; without, outputs are scored against the reference's.
        labels: targets -> the class numbers (samples, ...) that a built-in metric with labels reads.
    """

    name: str
    fingerprint: str
    rows: Callable[[Arrays, Arrays, Arrays], Float] | None = None
    summarise: Callable[[Float], Float] | None = None
    function: Callable[[Arrays, Arrays], float] | None = None
    needs_targets: bool = True
    labels: Callable[[Arrays], NDArray[np.int64]] | None = None

    @property
    def per_sample(self) -> Callable[[Arrays, Arrays, Arrays], Float] | None:
        """(outputs, targets, reference outputs) -> float64 (samples,) whose mean is the value, or None."""
        return self.rows if self.summarise is None else None

    def value(self, outputs: Arrays, targets: Arrays, reference: Arrays | None = None) -> float:
        """The metric of `outputs`.

        Args:
            reference: the reference model's outputs, which a label-free metric scores against; one with
                labels may still look at them to read both models' outputs the same way.

        Raises:
            InputError: the arrays do not suit the metric, or the user's function failed.
        """
        if self.function is not None:
            return self.function(outputs, targets)
        assert self.rows is not None
        mean = self.rows(outputs, targets, outputs if reference is None else reference).mean(axis=0)
        return float(mean if self.summarise is None else self.summarise(mean))


def load_metric(spec: str) -> Metric:
    """The metric that `spec` names.

    Args:
        spec: `NAME`, `NAME@OUTPUT`, `NAME@OUTPUT:TARGET` or `FILE.py:FUNCTION`. NAME is one of

            - `top1`, `top5`: share of samples whose label is among the k highest scores;
            - `accuracy`: share of right labels: argmax over the classes (axis 1 or last), or for a
              single value per label logit > 0 (> 0.5 where the reference's outputs all lie in
              0...1); with a label per position, the mean over the samples' shares;
            - `f1`: of class 1 where there are two classes, else macro (the unweighted mean over the
              classes that occur in labels or predictions);
            - `miou`: mean over the occurring classes of intersection over union;
            - `cosine`: label-free, mean per-sample cosine with the reference's output, or the mean
              of that over several outputs;
            - `sqnr`: label-free, likewise, signal to quantization noise in dB; as with `cosine`, an output
              that mixes scales counts with its worst component (see `components`);
            - `kl`: label-free, likewise, exp(-KL) of the class probabilities (see `similarity.likelihood`):
              1 where they are the reference's, 0.99 where they are 0.01 nats away.

            Positions whose label is negative (for `miou` also 255) are not scored. OUTPUT is
            needed when a metric with labels meets several outputs, TARGET when there are several
            target arrays of which not exactly one is named label(s) or target(s).
            FUNCTION(outputs, targets) takes dictionaries of arrays (read-only) and returns a
            number, higher is better.

    Raises:
        InputError: unknown name, or the file or function is missing or does not import.
    """
    if ".py:" in spec:
        return _metric_of_file(spec)
    name, _, selection = spec.partition("@")
    output, _, target = selection.partition(":")
    if name not in _BUILT_IN:
        raise InputError(
            f"unknown metric {name!r}", remedy=f"use one of {', '.join(_BUILT_IN)}, or FILE.py:FUNCTION"
        )
    return _BUILT_IN[name](spec, _Selection(output or None, target or None))


def rows_per_sample(outputs: Arrays, targets: Arrays) -> tuple[int, int]:
    """Number of samples, and k, the rows of output that make one sample (1 without targets).

    Raises:
        InputError: arrays of different lengths, or rows that are not a multiple of the samples.
    """
    rows = {len(array) for array in outputs.values()}
    samples = {len(array) for array in targets.values()} or rows
    if len(rows) != 1 or len(samples) != 1:
        lengths = {name: len(array) for name, array in (outputs | targets).items()}
        raise InputError("arrays of different lengths", cause=f"rows: {lengths}")
    (row_count,), (sample_count,) = rows, samples
    if sample_count == 0 or row_count % sample_count:
        raise InputError(
            f"{row_count} rows of output do not make {sample_count} samples",
            remedy="give targets for every row, or for every group of k consecutive rows",
        )
    return sample_count, row_count // sample_count


@dataclass(frozen=True)
class _Selection:
    """Which output and target a built-in metric reads; None: the obvious one."""

    output: str | None
    target: str | None

    def outputs(self, arrays: Arrays) -> list[str]:
        """Names of the chosen outputs; all of them where none was chosen."""
        if self.output is None:
            return list(arrays)
        if self.output not in arrays:
            raise InputError(f"no output {self.output!r}", cause=f"the outputs are {', '.join(arrays)}")
        return [self.output]

    def labelled(self, outputs: Arrays, targets: Arrays, reference: Arrays) -> _Labelled:
        """The chosen output, its labels and the reference's output, checked against each other."""
        names = self.outputs(outputs)
        if len(names) != 1:
            raise InputError(
                "the model has several outputs",
                cause=f"the outputs are {', '.join(names)}",
                remedy=f"say which one, such as top1@{names[0]}",
            )
        scores, labels = outputs[names[0]], self.labels(targets)
        if len(scores) != len(labels):
            raise InputError(
                f"output {names[0]!r} has {len(scores)} rows for {len(labels)} labels",
                remedy="a built-in metric needs one row per label; use FILE.py:FUNCTION for groups of rows",
            )
        if labels.ndim > 1 and labels.shape[1:] == (1,) and scores.shape != labels.shape:
            labels = labels[:, 0]
        return _Labelled(_without_nan(scores), labels, reference[names[0]])

    def labels(self, targets: Arrays) -> NDArray[np.int64]:
        """The chosen target: class numbers (samples, ...)."""
        named = [name for name in targets if name in _TARGET_NAMES]
        name = self.target or (named[0] if len(named) == 1 else next(iter(targets), ""))
        if name not in targets or (self.target is None and len(named) != 1 and len(targets) != 1):
            raise InputError(
                f"no target {name!r}" if self.target else "cannot tell which array holds the labels",
                cause=f"the targets are {', '.join(targets) or 'none'}",
                remedy="name one array `labels`, or say which, such as top1@OUTPUT:TARGET",
            )
        labels = targets[name]
        if labels.dtype.kind not in "biuf" or not np.array_equal(labels, np.rint(labels)):
            raise InputError(f"target {name!r} does not hold class numbers", cause=f"dtype {labels.dtype}")
        return labels.astype(np.int64)


@dataclass(frozen=True)
class _Labelled:
    """One output (rows, ...), its labels (rows, positions...) and the reference's output."""

    scores: NDArray
    labels: NDArray[np.int64]
    reference: NDArray

    def classes(self) -> tuple[NDArray[np.int64], int]:
        """Predicted class per label (same shape as the labels), and how many classes there are."""
        scores, labels = self.scores, self.labels
        if scores.size == labels.size and scores.dtype.kind in "biu":
            highest = max(int(array.max()) for array in (scores, self.reference, labels))
            return scores.reshape(labels.shape).astype(np.int64), max(highest + 1, 2)
        if scores.size == labels.size:
            finite = self.reference[np.isfinite(self.reference)]
            probability = finite.min() >= 0 and finite.max() <= 1
            return (scores.reshape(labels.shape) > (0.5 if probability else 0)).astype(np.int64), 2
        # A sequence has its classes last, an image has them at axis 1, should both fit.
        fitting = [axis for axis in (1, -1) if _without(scores.shape, axis) == labels.shape]
        if not fitting:
            raise InputError(
                f"an output of shape {scores.shape} does not hold class scores for"
                f" labels of shape {labels.shape}"
            )
        axis = fitting[-1] if scores.ndim == 3 else fitting[0]
        return scores.argmax(axis=axis), scores.shape[axis]

    def check_labels(self, classes: int, ignored: NDArray[np.bool_]) -> None:
        """Refuse labels that are not classes, unless they are `ignored`."""
        highest = int(self.labels.max(where=~ignored, initial=-1))
        if highest >= classes or np.all(ignored):
            raise InputError(
                "no label is scored" if np.all(ignored) else f"label {highest} is not a class",
                cause=f"the output has {classes} classes, numbered from 0",
            )


def _top(k: int, spec: str, selection: _Selection) -> Metric:
    def rows(outputs: Arrays, targets: Arrays, reference: Arrays) -> Float:
        data = selection.labelled(outputs, targets, reference)
        scores, labels = data.scores, data.labels
        if scores.ndim != 2 or labels.ndim != 1 or scores.shape[1] < k:
            raise InputError(
                f"{spec} needs an output (rows, {k} or more classes) and one label per row,"
                f" not {scores.shape} and {labels.shape}"
            )
        data.check_labels(scores.shape[1], ignored=np.zeros(labels.shape, dtype=bool))
        if labels.min() < 0:
            raise InputError(f"{spec} cannot skip a sample: there is a negative label")
        own = np.take_along_axis(scores, labels[:, None], axis=1)
        # Ties go to the lower class, as in argmax: a constant output must not count as right.
        ahead = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < labels[:, None]))
        return (ahead.sum(axis=1) < k).astype(np.float64)

    return Metric(spec, spec, rows, labels=selection.labels)


def _accuracy(spec: str, selection: _Selection) -> Metric:
    def rows(outputs: Arrays, targets: Arrays, reference: Arrays) -> Float:
        data = selection.labelled(outputs, targets, reference)
        predicted, classes = data.classes()
        ignored = data.labels < 0
        data.check_labels(classes, ignored)
        scored = (~ignored).reshape(len(ignored), -1).sum(axis=1)
        if scored.min() == 0:
            raise InputError(f"sample {int(scored.argmin())} has no label to score")
        right = (predicted == data.labels) & ~ignored
        return right.reshape(len(right), -1).sum(axis=1) / scored

    return Metric(spec, spec, rows, labels=selection.labels)


def _counted(
    summarise: Callable[[Float], Float], ignore_255: bool, spec: str, selection: _Selection
) -> Metric:
    """A metric of the true positives, false positives and false negatives of every class."""

    def rows(outputs: Arrays, targets: Arrays, reference: Arrays) -> Float:
        data = selection.labelled(outputs, targets, reference)
        predicted, classes = data.classes()
        ignored = (data.labels < 0) | (ignore_255 & (data.labels == 255))
        data.check_labels(classes, ignored)
        samples = len(predicted)
        cell = classes * np.arange(samples).reshape(-1, *[1] * (predicted.ndim - 1))

        def count(values: NDArray[np.int64], where: NDArray[np.bool_]) -> NDArray[np.int64]:
            return np.bincount((cell + values)[where], minlength=samples * classes).reshape(samples, -1)

        hit = count(predicted, (predicted == data.labels) & ~ignored)
        counts = [hit, count(predicted, ~ignored) - hit, count(data.labels, ~ignored) - hit]
        return np.stack(counts, axis=1).astype(np.float64)

    return Metric(spec, spec, rows, summarise, labels=selection.labels)


def _f1_of_counts(counts: Float) -> Float:
    """F1 from (..., 3, classes) true positives, false positives, false negatives."""
    hit, false_hit, miss = np.moveaxis(counts, -2, 0)
    scores = _ratio(2 * hit, 2 * hit + false_hit + miss)
    return np.nan_to_num(scores[..., 1]) if counts.shape[-1] == 2 else np.nanmean(scores, axis=-1)


def _iou_of_counts(counts: Float) -> Float:
    """Mean intersection over union from the same counts."""
    hit, false_hit, miss = np.moveaxis(counts, -2, 0)
    return np.nanmean(_ratio(hit, hit + false_hit + miss), axis=-1)


def _label_free(
    score: Callable[[NDArray, NDArray, int], Float], fill: float, spec: str, selection: _Selection
) -> Metric:
    """A similarity metric; `fill` stands in both outputs where the reference is not finite."""

    def rows(outputs: Arrays, targets: Arrays, reference: Arrays) -> Float:
        samples, _ = rows_per_sample(outputs, targets)
        names = selection.outputs(outputs)
        pairs = [compared(reference[name], outputs[name], fill) for name in names]
        return np.mean([score(*pair, samples) for pair in pairs], axis=0)

    return Metric(spec, spec, rows, needs_targets=False)


_BUILT_IN: dict[str, Callable[[str, _Selection], Metric]] = {
    "top1": partial(_top, 1),
    "top5": partial(_top, 5),
    "accuracy": _accuracy,
    "f1": partial(_counted, _f1_of_counts, False),
    "miou": partial(_counted, _iou_of_counts, True),
    "cosine": partial(_label_free, similarity.cosine, 0.0),
    "sqnr": partial(_label_free, similarity.sqnr_db, 0.0),
    "kl": partial(_label_free, similarity.likelihood, -np.finfo(np.float16).max),  # no class at all
}


def _metric_of_file(spec: str) -> Metric:
    path, name, function = load_function(spec, "metric")

    def checked(outputs: Arrays, targets: Arrays) -> float:
        try:
            value = function(_read_only(outputs), _read_only(targets))
            value = value.item() if hasattr(value, "item") else value
        except (Exception, SystemExit) as error:
            raise InputError(
                f"the metric {name!r} failed", file=path, cause=f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(value, int | float) or math.isnan(value):
            raise InputError(f"the metric {name!r} did not return a number", file=path, cause=repr(value))
        return float(value)

    return Metric(spec, f"{script_sha256(path)}:{name}", function=checked)


def _read_only(arrays: Arrays) -> Arrays:
    """Views that a metric cannot change: both models and every resample are scored on the same data."""
    views = {name: array.view() for name, array in arrays.items()}
    for view in views.values():
        view.flags.writeable = False
    return views


def _without_nan(scores: NDArray) -> NDArray:
    """The scores with -inf for NaN, which no comparison would tell from the highest."""
    if scores.dtype.kind != "f" or not (broken := np.isnan(scores)).any():
        return scores
    return np.where(broken, scores.dtype.type(-np.inf), scores)


def _ratio(part: Float, whole: Float) -> Float:
    """part / whole, NaN where both are 0."""
    return np.divide(part, whole, out=np.full_like(whole, np.nan), where=whole != 0)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    if len(shape) < 2:
        return ()
    axis %= len(shape)
    return shape[:axis] + shape[axis + 1 :]
