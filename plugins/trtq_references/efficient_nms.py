"""EfficientNMS_TRT and EfficientNMS_ONNX_TRT (TensorRT's plugin/efficientNMSPlugin).

All pairs of a box and a class whose score reaches the threshold are sorted by score; the best 4096 are gone
through in that order, and each that is kept drops the later ones (of its class) that overlap it by the IoU
threshold or more. Equal scores keep the order of the boxes, which the plugin leaves open. By its source, the
plugin's kernel for thresholds below 0.007 may fill free places with boxes below the threshold, of score
-32768; its documentation says that they are removed, as they are here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtq_references.boxes import Array, ordered, overlaps

MOST_CANDIDATES = 4096
"""Scores that the plugin's kernel looks at."""

CORNERS, CENTER_SIZE = 0, 1
"""Values of `box_coding`."""

Pairs = NDArray[np.intp]
"""Boxes and classes (n, 2) of an image, best first."""


def EfficientNMS_TRT(
    boxes: Array,
    scores: Array,
    anchors: Array | None = None,
    *,
    score_threshold: float = 0.25,
    iou_threshold: float = 0.5,
    max_output_boxes: int = 100,
    background_class: int = -1,
    score_activation: int = 0,
    class_agnostic: int = 0,
    box_coding: int = CORNERS,
) -> tuple[NDArray, ...]:
    """Detections of every image, padded with zeros.

    Args:
        boxes: (batch, boxes, 4), or (batch, boxes, classes or 1, 4) for boxes of each class.
        scores: (batch, boxes, classes).
        anchors: (1 or batch, boxes, 4); with them, `boxes` are the raw predictions of a box head.
        score_activation: whether the scores are logits.
        class_agnostic: whether boxes of other classes are dropped, too.
        box_coding: 0 for corners, 1 for center and size.

    Returns:
        numbers of detections (batch, 1), boxes (batch, most, 4) as corners, scores and classes (batch, most).
    """
    batch, count, classes = scores.shape[:3]
    scores = scores.reshape(batch, count, classes)
    boxes = _as_corners(_by_class(boxes), anchors, box_coding)
    if score_activation:
        scores = _sigmoid(scores)
    numbers = np.zeros((batch, 1), np.int32)
    found_boxes = np.zeros((batch, max_output_boxes, 4), np.float32)
    found_scores = np.zeros((batch, max_output_boxes), np.float32)
    found_classes = np.zeros((batch, max_output_boxes), np.int32)
    for image in range(batch):
        candidates = _candidates(scores[image], score_threshold, background_class)
        agnostic = bool(class_agnostic)
        kept = _suppressed(boxes[image], candidates, iou_threshold, max_output_boxes, agnostic=agnostic)
        number, (rows, labels) = len(kept), kept.T
        numbers[image] = number
        found_boxes[image, :number] = _of_pairs(boxes[image], kept)
        found_scores[image, :number] = scores[image, rows, labels]
        found_classes[image, :number] = labels
    return numbers, found_boxes, found_scores, found_classes


def EfficientNMS_ONNX_TRT(
    boxes: Array,
    scores: Array,
    *,
    max_output_boxes_per_class: int = 100,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.25,
    center_point_box: int = 0,
) -> NDArray[np.int32]:
    """What TensorRT's parser made of ONNX's NonMaxSuppression: image, class and box of each detection.

    Unlike ONNX's operator it gives at most `max_output_boxes_per_class` detections of an image, of all
    classes, and always as many rows: they are filled up with the last one, with -1 where there is none.

    Args:
        boxes: (batch, boxes, 4).
        scores: (batch, boxes, classes).

    Returns:
        (batch * max_output_boxes_per_class, 3).
    """
    most = max_output_boxes_per_class
    corners = _as_corners(_by_class(boxes), None, center_point_box)
    rows: list[tuple[int, int, int]] = []
    for image in range(len(scores)):
        candidates = _candidates(scores[image], score_threshold, -1)
        kept = _suppressed(corners[image], candidates, iou_threshold, most, agnostic=False)
        rows += [(image, int(label), int(box)) for box, label in kept]
    rows += [rows[-1] if rows else (-1, -1, -1)] * (len(scores) * most - len(rows))
    return np.array(rows, np.int32)


def _by_class(boxes: Array) -> Array:
    """Boxes with an axis for classes, (batch, boxes, classes or 1, 4)."""
    return boxes if boxes.ndim == 4 else boxes[:, :, None]


def _candidates(scores: Array, threshold: float, background: int) -> Pairs:
    """The boxes and classes of an image whose scores reach the threshold."""
    counted = scores >= np.float32(threshold)
    if 0 <= background < scores.shape[1]:
        counted[:, background] = False
    places = np.flatnonzero(counted)
    order = np.argsort(-scores.ravel()[places], kind="stable")[:MOST_CANDIDATES]
    return np.stack(np.divmod(places[order], scores.shape[1]), axis=1)


def _suppressed(boxes: Array, candidates: Pairs, threshold: float, most: int, *, agnostic: bool) -> Pairs:
    """The candidates that no better one that was kept overlaps, at most so many."""
    coordinates, labels = ordered(_of_pairs(boxes, candidates)), candidates[:, 1]
    waiting = np.arange(len(candidates))
    kept: list[int] = []
    while len(waiting) and len(kept) < most:
        best, waiting = waiting[0], waiting[1:]
        kept.append(int(best))
        touching = overlaps(coordinates[best], coordinates[waiting]) >= np.float32(threshold)
        if not agnostic:
            touching &= labels[waiting] == labels[best]
        waiting = waiting[~touching]
    return candidates[kept]


def _of_pairs(boxes: Array, pairs: Pairs) -> Array:
    """The boxes (n, 4) of pairs, from those of an image (boxes, classes or 1, 4)."""
    rows, labels = pairs.T
    return np.asarray(boxes[rows, labels if boxes.shape[1] > 1 else 0])


def _as_corners(boxes: Array, anchors: Array | None, coding: int) -> Array:
    """Boxes as corners; raw predictions are decoded with their anchors first."""
    if anchors is not None:
        boxes = _decoded(boxes, anchors[:, :, None], coding)
    if coding == CORNERS:
        return boxes
    half = boxes[..., 2:] / 2
    return np.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], axis=-1)


def _decoded(boxes: Array, anchors: Array, coding: int) -> Array:
    """Boxes in the coding of the anchors: corners are moved, centers by sizes and sizes exponentially."""
    if coding == CORNERS:
        return ordered(boxes) + ordered(anchors)
    centers = boxes[..., :2] * anchors[..., 2:] + anchors[..., :2]
    return np.concatenate([centers, anchors[..., 2:] * np.exp(boxes[..., 2:])], axis=-1)


def _sigmoid(values: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-values)), np.float32)
