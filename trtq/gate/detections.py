"""Detections: what a detector found, matched with what fp32 found or with the boxes given as targets.

The rows of a detector's outputs are boxes, of which each sample has its own number in its own order, so they
are matched and not compared row by row: a box counts as found where one of the same class overlaps it by an
IoU of 0.5 or more. `detections` is the F1 of the matches; `mAP` and `mAP50` are COCO's, by pycocotools.

Which outputs hold what is told by their names and shapes, or said: `detections@boxes=NAME,scores=NAME,...`

- `boxes` (K, 4) with `scores` (K,) or (K, classes), and `classes` (K,), as torchvision and SSD give them;
- the same, padded, with `count`: EfficientNMS (num_dets, det_boxes, det_scores, det_classes);
- `picked` (K, 3) by NonMaxSuppression: batch, class and box, with `boxes` (N, 4) and `scores` (classes, N);
- `rows`: one output (K, 5) of corners and a score, with `classes` beside it or without; (K, 6) with score and
  class in either order; or (K, 7): batch, corners, class, score;
- what a YOLO gives before suppression, where that is said: `yolo` (N, 4 + classes), box and scores of each of
  N places, or `yolox` with an objectness in between, by which the scores are multiplied; either way round.
  Boxes are then centres and sides unless `format` says otherwise, and suppressed by class from `nms` on.

Targets: an array named like boxes (samples, M, 4), corners, and one named like labels or classes (samples,
M); a negative class or a box without area is padding.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtq.data.batches import Arrays
from trtq.errors import InputError, MissingBackendError
from trtq.simulation.values import AllValues, dtype_of, shape_text

Float = NDArray[np.float64]

FORMATS: Mapping[str, Callable[[Float], Float]] = {
    "xyxy": lambda b: b,
    "yxyx": lambda b: b[:, [1, 0, 3, 2]],
    "xywh": lambda b: np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1),
    "cxcywh": lambda b: np.concatenate([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], axis=1),
}
"""Name -> corners x1, y1, x2, y2 of boxes (K, 4) in that format."""

ROLES = ("boxes", "scores", "classes", "count", "picked", "rows", "yolo", "yolox")
"""What an output may hold."""

STATISTICS: Mapping[str, int] = {"mAP": 0, "mAP50": 1}
"""Metric -> which of COCOeval's numbers it is."""

_WORDS = {
    "count": ("num_det", "num_box", "numdet", "valid", "count"),
    "classes": ("class", "label", "cls"),
    "scores": ("score", "conf", "prob"),
    "boxes": ("box",),
}
"""What the names of outputs and targets say, in lower case; the first that fits."""

_RAW = ("yolo", "yolox")
"""Roles of what is not suppressed yet."""

_MOST_SUPPRESSED = 1000
"""Places of a sample, those of the highest scores, that suppression looks at."""

_MOST_TURNED = 0.01
"""Share of boxes whose corners may be the wrong way round."""


class Found(NamedTuple):
    """The boxes of one sample: corners (K, 4), scores (K,), class numbers (K,)."""

    boxes: Float
    scores: Float
    classes: NDArray[np.int64]

    def only(self, where: NDArray) -> Found:
        """Some of them."""
        return Found(self.boxes[where], self.scores[where], self.classes[where])


@dataclass(frozen=True)
class Options:
    """What stands behind the `@` of a metric.

    Attributes:
        names: role -> output.
        format: of the outputs' boxes, one of `FORMATS`.
        iou: least overlap of a match.
        score: boxes that score less are left out, where the scores are within 0...1.
        nms: overlap with a better box of its class from which one is suppressed, where that is done here.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    format: str = "xyxy"
    iou: float = 0.5
    score: float = 0.25
    nms: float = 0.45

    @classmethod
    def parse(cls, spec: str, score: float) -> Options:
        """From `NAME@KEY=VALUE,...`; `score` is the default.

        Raises:
            InputError: an unknown key or value.
        """
        given = dict(part.partition("=")[::2] for part in spec.partition("@")[2].split(",") if part)
        known = (*ROLES, "format", "iou", "score", "nms")
        layout = given.get("format", "cxcywh" if given.keys() & set(_RAW) else "xyxy")
        if (unknown := [key for key in given if key not in known]) or layout not in FORMATS:
            raise InputError(
                f"the metric {spec!r} says {unknown[0] if unknown else layout!r}",
                remedy=f"write KEY=VALUE with {', '.join(known)}; format is {', '.join(FORMATS)}",
            )
        defaults = {"iou": cls.iou, "score": score, "nms": cls.nms}
        try:
            bounds = [float(given.get(key, default)) for key, default in defaults.items()]
        except ValueError as error:
            raise InputError(f"the metric {spec!r} has a bound that is not a number", cause=error) from error
        return cls({role: given[role] for role in ROLES if role in given}, layout, *bounds)


@dataclass(frozen=True)
class Reader:
    """How detections are read from outputs; the reference decides for both models.

    Attributes:
        names: role -> output.
        bounded: whether all scores are within 0...1.
        class_first: a row's class stands before its score.
    """

    options: Options
    names: Mapping[str, str]
    bounded: bool = True
    class_first: bool = False

    @classmethod
    def of(cls, reference: AllValues, options: Options) -> Reader:
        """For a reference's outputs.

        Raises:
            InputError: it cannot be told which outputs hold boxes, or what they hold is none.
        """
        names = roles(reference, options.names)
        reader = cls(options, names, class_first=_class_first(reference, names))
        scores = np.concatenate([own.scores for own in reader._read(reference)])
        return replace(reader, bounded=bool(((scores >= 0) & (scores <= 1)).all()))

    def check(self, found: Iterable[Found]) -> None:
        """Refuse boxes whose second corners lie before their first.

        Raises:
            InputError: too many do.
        """
        boxes = np.concatenate([own.boxes for own in found])
        if len(boxes) and np.mean((boxes[:, 2:] < boxes[:, :2]).any(axis=1)) > _MOST_TURNED:
            raise InputError(
                f"the boxes in output {self.names.get('boxes', self.names.get('rows'))!r} are not"
                f" {self.options.format}",
                cause="their second corners lie before the first",
                remedy="say what they are, such as detections@format=cxcywh (or xywh, yxyx)",
            )

    def read(self, outputs: AllValues) -> list[Found]:
        """The detections of every sample, without those that score too little."""
        least = self.options.score if self.bounded else -np.inf
        return [own.only(own.scores >= least) for own in self._read(outputs)]

    def text(self) -> str:
        """Which outputs are read."""
        reads = ", ".join(f"{role} from {name!r}" for role, name in self.names.items())
        return f"detections: {reads}; IoU from {self.options.iou:g}" + (
            f", scores from {self.options.score:g}" if self.bounded and self.options.score > 0 else ""
        )

    def _read(self, outputs: AllValues) -> Iterator[Found]:
        for index in range(len(next(iter(outputs.values())))):
            arrays = {role: np.asarray(outputs[name][index]) for role, name in self.names.items()}
            raw = [role for role in _RAW if role in arrays]
            columns = _columns(arrays[raw[0]], raw[0] == "yolox") if raw else arrays
            found = _from_arrays(self._split(columns) if "rows" in columns else columns)
            boxes = FORMATS[self.options.format](found.boxes)
            good = (found.classes >= 0) & np.isfinite(boxes).all(axis=1) & np.isfinite(found.scores)
            found = found._replace(boxes=boxes).only(good)
            yield suppressed(found, self.options) if raw else found

    def _split(self, arrays: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """The columns of rows as arrays of their own, beside what other outputs hold."""
        rows = _rank(arrays["rows"], 2)
        corners, behind = np.split(rows[:, 1:] if rows.shape[1] == 7 else rows, [4], axis=1)
        order = ("classes", "scores") if rows.shape[1] == 7 or self.class_first else ("scores", "classes")
        columns = dict(zip(order, behind.T, strict=False))
        return {"boxes": corners, **columns, **{role: own for role, own in arrays.items() if role != "rows"}}


def roles(outputs: AllValues, given: Mapping[str, str]) -> dict[str, str]:
    """Role -> output, as given, else as names and shapes say.

    Raises:
        InputError: there is no such output, or nothing that holds boxes.
    """
    if missing := [name for name in given.values() if name not in outputs]:
        raise InputError(f"no output {missing[0]!r}", cause=f"the outputs are {', '.join(outputs)}")
    if raw := {role: given[role] for role in _RAW if role in given}:
        return raw
    names = dict(given)
    for name, values in outputs.items():
        role = _role(name.lower(), np.shape(values[0]), dtype_of(values).kind)
        known = given.keys() & {"boxes", "rows"} and role in ("boxes", "rows")
        if role is not None and not known and name not in names.values():
            names.setdefault(role, name)
    if "boxes" in names:
        names.pop("rows", None)
    if not names.keys() & {"boxes", "rows"}:
        raise InputError(
            "it cannot be told which output holds the boxes",
            cause="; ".join(f"{name}: {dtype_of(own)} {shape_text(own)}" for name, own in outputs.items()),
            remedy="say it: detections@boxes=NAME,scores=NAME,classes=NAME or detections@rows=NAME, or before"
            " suppression detections@yolo=NAME (or yolox)",
        )
    return {role: names[role] for role in ROLES if role in names}


def match(found: Found, truth: Found, iou: float) -> int:
    """How many of the boxes found match a true one of their class, the highest score first; each matches the
    free one that it overlaps most, if the IoU is `iou` or more."""
    overlaps = np.where(found.classes[:, None] == truth.classes, overlap(found.boxes, truth.boxes), 0.0)
    matched = 0
    for index in np.argsort(-found.scores, kind="stable"):
        if overlaps.shape[1] and overlaps[index].max() >= iou:
            overlaps[:, overlaps[index].argmax()] = 0.0
            matched += 1
    return matched


def suppressed(found: Found, options: Options) -> Found:
    """Those that score enough and overlap no better box of their class by `options.nms` or more."""
    best = np.argsort(-found.scores, kind="stable")[:_MOST_SUPPRESSED]
    found = found.only(best[found.scores[best] >= options.score])
    left, kept = np.arange(len(found.scores)), []
    while len(left):
        first, left = left[0], left[1:]
        kept.append(first)
        covered = overlap(found.boxes[[first]], found.boxes[left])[0] >= options.nms
        left = left[~(covered & (found.classes[left] == found.classes[first]))]
    return found.only(np.array(kept, np.intp))


def overlap(one: Float, other: Float) -> Float:
    """Intersection over union of boxes (K, 4) and (M, 4): (K, M); 1 for equal ones without area."""
    low, high = np.maximum(one[:, None, :2], other[:, :2]), np.minimum(one[:, None, 2:], other[:, 2:])
    shared = (high - low).clip(0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1) for boxes in (one, other)]
    union = areas[0][:, None] + areas[1] - shared
    equal = (one[:, None] == other).all(axis=2).astype(np.float64)
    return np.divide(shared, union, out=equal, where=union > 0)


def counts(options: Options, outputs: AllValues, targets: Arrays, reference: AllValues) -> Float:
    """Matches, boxes found that match nothing, and true boxes not found, of each sample (samples, 3).

    Raises:
        InputError: the outputs or targets do not hold detections, or there is no true box at all.
    """
    reader = Reader.of(reference, options)
    expected, found, given = reader.read(reference), reader.read(outputs), truths(targets)
    reader.check(expected)
    truth = expected if given is None else given
    if len(found) != len(truth):
        raise InputError(f"the targets hold boxes for {len(truth)} samples, the outputs for {len(found)}")
    if not any(len(own.boxes) for own in truth):
        raise InputError(
            "there is no box to find in any sample",
            remedy="evaluate on samples that show something, or take all boxes: detections@score=0",
        )
    hits = np.array([match(f, t, options.iou) for f, t in zip(found, truth, strict=True)])
    sizes = np.array([[len(f.boxes), len(t.boxes)] for f, t in zip(found, truth, strict=True)])
    return np.stack([hits, sizes[:, 0] - hits, sizes[:, 1] - hits], axis=1).astype(np.float64)


def f1(mean: Float) -> Float:
    """F1 from (..., 3) matches, false boxes and missed ones; NaN where there are none of either."""
    hit, false, missed = np.moveaxis(mean, -1, 0)
    whole = 2 * hit + false + missed
    return np.divide(2 * hit, whole, out=np.full_like(whole, np.nan), where=whole > 0)


def text(options: Options, reference: AllValues, targets: Arrays) -> str:
    """Which outputs are read, and what they are matched with."""
    truth = "what fp32 finds" if truths(targets) is None else "the boxes of the targets"
    return f"{Reader.of(reference, options).text()}; matched with {truth}"


def truths(targets: Arrays) -> list[Found] | None:
    """The boxes given as targets, of each sample; None where there are none.

    Raises:
        InputError: they are no boxes, or their classes are not theirs.
    """
    named = {_word(name.lower()): array for name, array in targets.items()}
    boxes = named.get("boxes")
    if boxes is None:
        return None
    if boxes.ndim != 3 or boxes.shape[2] != 4:
        raise InputError(
            f"the targets' boxes have the shape {boxes.shape}",
            remedy="give corners (samples, M, 4), classes (samples, M) beside them, or no array named boxes",
        )
    classes = named.get("classes", np.zeros(boxes.shape[:2]))
    if classes.shape != boxes.shape[:2]:
        raise InputError(
            "the targets' classes are not those of their boxes",
            cause=f"boxes {boxes.shape}, classes {classes.shape}",
            remedy="give boxes (samples, M, 4) and classes (samples, M), -1 where there is none",
        )
    found = []
    for own, numbers in zip(boxes.astype(np.float64), map(_numbers, classes), strict=True):
        there = (numbers >= 0) & (own[:, 2:] > own[:, :2]).all(axis=1)
        found.append(Found(own, np.ones(len(own)), numbers).only(there))
    return found


def average_precision(statistic: int, options: Options, outputs: AllValues, targets: Arrays) -> Float:
    """COCO's average precision, by pycocotools: a number of `COCOeval.stats`.

    Raises:
        InputError: the outputs or targets do not hold detections.
    """
    coco, evaluate = coco_classes()
    truth = truths(targets)
    if truth is None:
        raise InputError(
            "mAP needs boxes as targets",
            cause=f"the targets are {', '.join(targets) or 'none'}",
            remedy="give boxes (samples, M, 4) and classes (samples, M), or use `detections`",
        )
    found = Reader.of(outputs, options).read(outputs)
    with contextlib.redirect_stdout(io.StringIO()):
        known, answers = coco(), coco()
        for side, samples in ((known, truth), (answers, found)):
            side.dataset = _dataset(samples)
            side.createIndex()
        judged = evaluate(known, answers, "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return np.asarray(max(judged.stats[statistic], 0.0))  # it is -1 where there is no true box


def coco_classes() -> tuple[Any, Any]:
    """pycocotools' COCO and COCOeval.

    Raises:
        MissingBackendError: it is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingBackendError(
            "pycocotools is not installed, and mAP needs it",
            cause=error,
            remedy="pip install 'trtq[map]', or use `detections`, which needs nothing",
        ) from error
    return COCO, COCOeval


def _dataset(samples: list[Found]) -> dict[str, Any]:
    """Boxes as COCO has them; image and annotation numbers from 1."""
    annotations: list[dict[str, Any]] = []
    for image, found in enumerate(samples, 1):
        for box, score, number in zip(found.boxes, found.scores, found.classes, strict=True):
            width, height = box[2:] - box[:2]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(number),
                    "bbox": [*box[:2], width, height],
                    "area": width * height,
                    "score": score,
                    "iscrowd": 0,
                }
            )
    numbers = sorted({own["category_id"] for own in annotations})
    return {
        "info": {},
        "images": [{"id": image} for image in range(1, len(samples) + 1)],
        "annotations": annotations,
        "categories": [{"id": number} for number in numbers],
    }


def _word(name: str) -> str | None:
    return next((role for role, words in _WORDS.items() if any(word in name for word in words)), None)


def _role(name: str, shape: tuple[int, ...], kind: str) -> str | None:
    """What an output holds, by its name, the shape of a sample and its kind of datatype."""
    shape = shape[1:] if len(shape) > 2 and shape[0] == 1 else shape
    last = shape[-1] if shape else 0
    if kind in "iu" and len(shape) == 2 and last == 3:
        return "picked"
    named = _word(name)
    if kind == "f" and len(shape) == 2 and last in (5, 6, 7) and named in (None, "boxes"):
        return "rows"
    if named == "boxes" and last != 4:
        return None
    if named is None and kind == "f" and len(shape) == 2 and last == 4:
        return "boxes"
    return named


def _columns(array: NDArray, with_objectness: bool) -> dict[str, NDArray]:
    """Boxes and scores of a YOLO's places, which lie along the longer axis."""
    places = _rank(array, 2)
    places = places.T if places.shape[0] < places.shape[1] else places
    boxes, scores = np.split(places, [4], axis=1)
    if with_objectness:
        scores = scores[:, :1] * scores[:, 1:]
    if not scores.shape[1]:
        raise InputError(
            f"there are no scores beside the boxes in an array {array.shape}",
            remedy="yolo=NAME takes 4 + classes columns, yolox=NAME 5 + classes",
        )
    return {"boxes": boxes, "scores": scores.max(axis=1), "classes": scores.argmax(axis=1)}


def _class_first(reference: AllValues, names: Mapping[str, str]) -> bool:
    """Whether rows of six columns hold the class before the score: one is whole numbers, the other is not."""
    if "rows" not in names:
        return False
    rows = np.concatenate([_rank(np.asarray(own), 2) for own in reference[names["rows"]]])
    if rows.shape[1] != 6 or not len(rows):
        return False
    whole = [np.array_equal(column, np.rint(column)) for column in (rows[:, 4], rows[:, 5])]
    return whole[0] and (not whole[1] or rows[:, 4].max() > 1)


def _from_arrays(arrays: Mapping[str, NDArray]) -> Found:
    boxes = _rank(arrays["boxes"], 2).astype(np.float64)
    scores = np.asarray(arrays.get("scores", np.ones(len(boxes))), np.float64)
    if "picked" in arrays:
        picked = _rank(arrays["picked"], 2)
        picked = picked[(picked >= 0).all(axis=1)]
        own = _rank(scores, 2)[picked[:, 1], picked[:, 2]] if "scores" in arrays else np.ones(len(picked))
        return Found(boxes[picked[:, 2]], own, _numbers(picked[:, 1]))
    classes = arrays.get("classes")
    if scores.ndim > 1 and scores.shape[-1] != len(boxes):
        scores = _rank(scores, 2)
        classes = scores.argmax(axis=1) if classes is None else classes
        scores = scores.max(axis=1)
    numbers = np.zeros(len(boxes)) if classes is None else np.ravel(classes)
    found = Found(boxes, scores.ravel(), _numbers(numbers))
    if len({len(own) for own in found}) > 1:
        raise InputError(
            "boxes, scores and classes of a sample differ in number",
            cause=", ".join(f"{role} {array.shape}" for role, array in arrays.items()),
            remedy="say which outputs belong together: detections@boxes=NAME,scores=NAME,classes=NAME",
        )
    count = int(np.ravel(arrays["count"])[0]) if "count" in arrays else len(boxes)
    return found.only(np.arange(len(boxes)) < count)


def _rank(array: NDArray, rank: int) -> NDArray:
    """The array without leading axes of 1 that are too many, or with one where each sample has one entry."""
    while array.ndim > rank and array.shape[0] == 1:
        array = array[0]
    if array.ndim == rank - 1:
        return array[None]
    if array.ndim != rank:
        raise InputError(f"detections cannot be read from an array {array.shape}")
    return array


def _numbers(classes: NDArray) -> NDArray[np.int64]:
    return np.where(np.isfinite(classes), np.rint(classes), -1).astype(np.int64)
