"""What "accuracy" means for a model: the built-in metrics and the user's own function.

A metric takes dictionaries: `outputs` (rows first; arrays, or lists of arrays where the rows do not stack)
and `targets` (arrays, samples first). Where the outputs have k times as many rows as the targets, k
consecutive rows make one sample.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtq.code_hash import callable_sha256, script_sha256
from trtq.data.batches import Arrays
from trtq.errors import InputError
from trtq.gate import detections
from trtq.memory import Function, refuse_memory
from trtq.scripts import contained, load_function
from trtq.simulation import similarity
from trtq.simulation.finite import both_compared
from trtq.simulation.values import AllValues, Values, paired, same_shapes, shape_text

Float = NDArray[np.float64]

_TARGET_NAMES = ("label", "labels", "target", "targets")


Rows = Callable[[AllValues, Arrays, AllValues], Float]
"""(outputs, targets, reference outputs) -> float64 (samples, ...): what each sample contributes."""


class Scored(NamedTuple):
    """A metric of one model's outputs.

    Attributes:
        value: the metric.
        rows: what each sample contributes, (samples, ...); None where a function gave one number for all.
        seconds: that it took.
    """

    value: float
    rows: Float | None
    seconds: float


@dataclass(frozen=True)
class Metric:
    """One number per model, higher is better.

    Exactly one of `rows` and `function` is there.

    Attributes:
        name: as the user wrote it.
        fingerprint: equal for metrics that compute the same: the name, or for a file the hash of
            its bytes and of the user's modules that it imports, and the function's name.
        rows: the value is the mean of the rows, put through `summarise` if it is there.
        summarise: mean rows, with any leading axes -> values, of the leading axes' shape.
        function: (outputs, targets) -> the value, or float64 (samples,) whose mean it is.
        needs_targets: labels are needed; without, outputs are scored against the reference's.
        labels: targets -> the class numbers (samples, ...) that a built-in metric with labels reads.
        reads: (reference outputs, targets) -> a sentence on which arrays it reads, where that is not obvious.
        given: the function itself, where that was given and no name or file.
        at_best: `rows` if what cannot be compared with the reference were like it; None where everything can.
    """

    name: str
    fingerprint: str
    rows: Rows | None = None
    summarise: Callable[[Float], Float] | None = None
    function: Callable[[AllValues, Arrays], Float] | None = None
    needs_targets: bool = True
    labels: Callable[[Arrays], NDArray[np.int64]] | None = None
    reads: Callable[[AllValues, Arrays], str] | None = None
    at_best: Rows | None = None
    given: Function | None = None

    @property
    def per_sample(self) -> Rows | None:
        """Rows of shape (samples,) whose mean is the value, or None."""
        return self.rows if self.summarise is None else None

    def scored(self, outputs: AllValues, targets: Arrays, reference: AllValues | None = None) -> Scored:
        """The metric of `outputs`, and what each sample contributes to it.

        Args:
            reference: the reference model's outputs, which a label-free metric scores against; one with
                labels may still look at them to read both models' outputs the same way.

        Raises:
            InputError: the arrays do not suit the metric, or the user's function failed.
        """
        started = time.perf_counter()
        if self.function is not None:
            rows = self.function(outputs, targets)
        else:
            assert self.rows is not None
            rows = self.rows(outputs, targets, outputs if reference is None else reference)
        seconds = time.perf_counter() - started
        if rows.ndim == 0:
            return Scored(float(rows), None, seconds)
        mean = rows.mean(axis=0)
        return Scored(float(mean if self.summarise is None else self.summarise(mean)), rows, seconds)

    def value(self, outputs: AllValues, targets: Arrays, reference: AllValues | None = None) -> float:
        """The metric of `outputs`; as `scored`."""
        return self.scored(outputs, targets, reference).value


def load_metric(spec: str | Function) -> Metric:
    """The metric that `spec` names, or that it is.

    Args:
        spec: `NAME`, `NAME@OUTPUT`, `NAME@OUTPUT:TARGET`, `FILE.py:FUNCTION` or a function. NAME is one of

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
              1 where they are the reference's, 0.99 where they are 0.01 nats away;
            - `detections`: F1 of the boxes that match the reference's, or boxes given as targets;
            - `mAP`, `mAP50`: COCO's average precision against boxes given as targets. For which arrays hold
              what, `detections@boxes=NAME,...`, see `detections`.

            Positions whose label is negative (for `miou` also 255) are not scored. OUTPUT is
            needed when a metric with labels meets several outputs, TARGET when there are several
            target arrays of which not exactly one is named label(s) or target(s).
            FUNCTION(outputs, targets) takes dictionaries of arrays (read-only; a list of arrays where an
            output's rows differ in shape) and returns a number, higher is better, or one for each sample: the
            metric is then their mean, and its interval needs no further calls. A function of one number
            may have an attribute `per_sample`, which returns those; that their mean is the number is checked.

    Raises:
        InputError: unknown name, or the file or function is missing or does not import.
    """
    if isinstance(spec, Function):
        metric = _metric_of(spec.name, spec.function, spec.name, None, _fingerprint(spec.function))
        return replace(metric, given=spec)
    refuse_memory(spec, "the metric was a function", "give --metric FILE.py:FUNCTION, where the function is")
    if ".py:" in spec:
        path, name, function = load_function(spec, "metric")
        return _metric_of(spec, function, name, path, f"{script_sha256(path)}:{name}")
    name, _, selection = spec.partition("@")
    output, _, target = selection.partition(":")
    if name not in _BUILT_IN:
        raise InputError(
            f"unknown metric {name!r}", remedy=f"use one of {', '.join(_BUILT_IN)}, or FILE.py:FUNCTION"
        )
    return _BUILT_IN[name](spec, _Selection(output or None, target or None))


def rows_per_sample(outputs: AllValues, targets: Arrays) -> tuple[int, int]:
    """Number of samples, and k, the rows of output that make one sample (1 without targets).

    Raises:
        InputError: arrays of different lengths, or rows that are not a multiple of the samples.
    """
    rows = {len(array) for array in outputs.values()}
    samples = {len(array) for array in targets.values()} or rows
    if len(rows) != 1 or len(samples) != 1:
        lengths = {name: len(values) for name, values in {**outputs, **targets}.items()}
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

    def outputs(self, arrays: AllValues) -> list[str]:
        """Names of the chosen outputs; all of them where none was chosen."""
        if self.output is None:
            return list(arrays)
        if self.output not in arrays:
            raise InputError(f"no output {self.output!r}", cause=f"the outputs are {', '.join(arrays)}")
        return [self.output]

    def labelled(self, outputs: AllValues, targets: Arrays, reference: AllValues) -> _Labelled:
        """The chosen output, its labels and the reference's output, checked against each other."""
        names = self.outputs(outputs)
        if len(names) != 1:
            raise InputError(
                "the model has several outputs",
                cause=f"the outputs are {', '.join(names)}",
                remedy=f"say which one, such as top1@{names[0]}",
            )
        scores, expected = (_one_shape(names[0], side[names[0]]) for side in (outputs, reference))
        labels = self.labels(targets)
        if len(scores) != len(labels):
            raise InputError(
                f"output {names[0]!r} has {len(scores)} rows for {len(labels)} labels",
                remedy="a built-in metric needs one row per label; use FILE.py:FUNCTION for groups of rows",
            )
        if labels.ndim > 1 and labels.shape[1:] == (1,) and scores.shape != labels.shape:
            labels = labels[:, 0]
        return _Labelled(_without_nan(scores), labels, expected)

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
    def rows(outputs: AllValues, targets: Arrays, reference: AllValues) -> Float:
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
    def rows(outputs: AllValues, targets: Arrays, reference: AllValues) -> Float:
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

    def rows(outputs: AllValues, targets: Arrays, reference: AllValues) -> Float:
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
    score: Callable[[Values, Values, int], Float], fill: float, spec: str, selection: _Selection
) -> Metric:
    """A similarity metric; `fill` stands in both outputs where the reference is not finite.

    A sample that cannot be compared in an output is not at all alike in it, or at best quite alike; it is not
    where one of the models gives nothing and the other one something.
    """

    def scored(lost: float, outputs: AllValues, targets: Arrays, reference: AllValues) -> Float:
        samples, k = rows_per_sample(outputs, targets)
        found = []
        for name in _telling(selection.outputs(outputs), outputs, reference):
            pair = paired(reference[name], outputs[name])
            apart = ~same_shapes(*pair).reshape(samples, k).all(axis=1)
            empty = np.array([[not np.size(row) for row in side] for side in pair])
            one_sided = (empty[0] != empty[1]).reshape(samples, k).any(axis=1)
            scores = np.where(apart & ~one_sided, lost, score(*both_compared(*pair, fill), samples))
            found.append(scores)
        return np.mean(found, axis=0)

    rows, at_best = partial(scored, similarity.LOST), partial(scored, 1.0)
    return Metric(spec, spec, rows, needs_targets=False, at_best=at_best)


def _telling(names: list[str], outputs: AllValues, reference: AllValues) -> list[str]:
    """The outputs that say something of how alike the models are: not those, such as priors, that both have
    the same for every sample, unless all are so.

    Raises:
        InputError: the reference has no value in any of them, or only zeros.
    """
    rows = [row for name in names for row in reference[name]]
    if not any(map(np.any, rows)):
        found = "only zeros" if any(map(np.size, rows)) else "no values"
        raise InputError(
            f"nothing can be compared: the reference gives {found} for any sample",
            cause=f"the outputs are {', '.join(names)}",
            remedy="evaluate on samples in which the fp32 model finds something",
        )
    return [name for name in names if not _constant(reference[name], outputs[name])] or names


def _constant(reference: Values, candidate: Values) -> bool:
    """Whether two models give the same for each of several samples."""
    first = reference[0]
    return len(reference) > 1 and all(
        np.array_equal(first, row) for side in (reference, candidate) for row in side
    )


def _detections(spec: str, selection: _Selection) -> Metric:
    options = detections.Options.parse(spec, score=0.25)
    return Metric(
        spec,
        spec,
        partial(detections.counts, options),
        detections.f1,
        needs_targets=False,
        reads=partial(detections.text, options),
    )


def _average_precision(statistic: int, spec: str, selection: _Selection) -> Metric:
    options = detections.Options.parse(spec, score=0.0)
    detections.coco_classes()  # a missing package is best said before anything runs
    return Metric(
        spec,
        spec,
        function=partial(detections.average_precision, statistic, options),
        reads=partial(detections.text, options),
    )


_BUILT_IN: dict[str, Callable[[str, _Selection], Metric]] = {
    "top1": partial(_top, 1),
    "top5": partial(_top, 5),
    "accuracy": _accuracy,
    "f1": partial(_counted, _f1_of_counts, False),
    "miou": partial(_counted, _iou_of_counts, True),
    "cosine": partial(_label_free, similarity.cosine, 0.0),
    "sqnr": partial(_label_free, similarity.sqnr_db, 0.0),
    "kl": partial(_label_free, similarity.likelihood, -np.finfo(np.float16).max),  # no class at all
    "detections": _detections,
    **{name: partial(_average_precision, index) for name, index in detections.STATISTICS.items()},
}


def _fingerprint(function: Callable[..., Any]) -> str:
    """A hash of a function; another one each time where what it computes cannot be told from it."""
    return callable_sha256(function) or f"not known: {uuid.uuid4()}"


def _metric_of(
    spec: str, function: Callable[..., Any], name: str, path: Path | None, fingerprint: str
) -> Metric:
    """The metric that a user's function is.

    Args:
        spec: its name in verdicts; `name`, `path`: what messages call it, and its file.
    """
    per_sample = getattr(function, "per_sample", None)
    given = _Given(name, path)

    def checked(outputs: AllValues, targets: Arrays) -> Float:
        whole = given.values(function, outputs, targets, alone=True)
        if not callable(per_sample):
            return whole.reshape(()) if whole.size == 1 else whole
        values = given.values(per_sample, outputs, targets, alone=False)
        if not np.isclose(values.mean(), whole.mean(), rtol=1e-6, atol=1e-9):
            raise InputError(
                f"the mean of what 'per_sample' of the metric {name!r} returns is not the metric",
                file=path,
                cause=f"the mean is {values.mean():g}, and the metric {whole.mean():g}",
                remedy="leave 'per_sample' out where the metric is no mean over samples",
            )
        return values

    return Metric(spec, fingerprint, function=checked)


class NotFiniteScoreError(InputError):
    """A metric of NaN or infinity, such as a correlation with outputs that are all the same."""


@dataclass(frozen=True)
class _Given:
    """A user's metric, for messages: its name and its file, if it was read from one."""

    name: str
    path: Path | None

    def values(
        self, function: Callable[..., Any], outputs: AllValues, targets: Arrays, *, alone: bool
    ) -> Float:
        """What a function returns: numbers, one for each sample or, if `alone`, perhaps one for all of them.

        Raises:
            NotFiniteScoreError: they, or their mean, are not finite.
            InputError: the function fails or returns something else.
        """
        try:
            with contained():
                found = np.asarray(function(_read_only(outputs), _read_only(targets)))
            values = found.astype(np.float64)
        except (Exception, SystemExit) as error:
            raise InputError(
                f"the metric {self.name!r} failed", file=self.path, cause=f"{type(error).__name__}: {error}"
            ) from error
        self._check(found, values, rows_per_sample(outputs, targets)[0], alone)
        return values

    def _check(self, found: NDArray, values: Float, samples: int, alone: bool) -> None:
        numbers = found.dtype.kind in "biuf"
        with np.errstate(all="ignore"):
            finite = numbers and (values.size == 0 or bool(np.isfinite(values.mean())))
        if finite and (found.shape == (samples,) or (alone and found.size == 1)):
            return
        what = "a number, or one for each sample" if alone else "one number for each sample"
        shapes = f"its shape is {found.shape}, and there are {samples} samples"
        raise (NotFiniteScoreError if numbers and not finite else InputError)(
            f"the metric {self.name!r} did not return {what}",
            file=self.path,
            cause=shapes if finite else repr(found.tolist())[:200],
        )


def _read_only(values: AllValues) -> dict[str, Any]:
    """Views that a metric cannot change: both models and every resample are scored on the same data."""

    def view(array: NDArray) -> NDArray:
        own = np.asarray(array).view()
        own.flags.writeable = False
        return own

    return {
        name: view(own) if isinstance(own, np.ndarray) else [view(row) for row in own]
        for name, own in values.items()
    }


def _one_shape(name: str, values: Values) -> NDArray:
    """The values as one array.

    Raises:
        InputError: the samples' differ in shape.
    """
    if isinstance(values, np.ndarray):
        return values
    raise InputError(
        f"output {name!r} has another shape for each sample: {shape_text(values)}",
        remedy="use `detections` for boxes, or FILE.py:FUNCTION, which gets a list of arrays",
    )


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
