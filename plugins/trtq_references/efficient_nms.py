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

Kept = list[tuple[int, int]]
"""Box and class of every detection of an image, best first."""


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
    boxes = _as_corners(boxes.reshape(batch, count, -1, 4), anchors, box_coding)
    if score_activation:
        scores = _sigmoid(scores)
    numbers = np.zeros((batch, 1), np.int32)
    found_boxes = np.zeros((batch, max_output_boxes, 4), np.float32)
    found_scores = np.zeros((batch, max_output_boxes), np.float32)
    found_classes = np.zeros((batch, max_output_boxes), np.int32)
    for image in range(batch):
        candidates = _candidates(scores[image], score_threshold, background_class)
        kept = _suppressed(boxes[image], candidates, iou_threshold, agnostic=bool(class_agnostic))
        kept = kept[:max_output_boxes]
        numbers[image] = len(kept)
        for row, (box, label) in enumerate(kept):
            found_boxes[image, row] = _box(boxes[image], box, label)
            found_scores[image, row] = scores[image, box, label]
            found_classes[image, row] = label
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
    corners = _as_corners(boxes.reshape(*boxes.shape[:2], -1, 4), None, center_point_box)
    rows: list[tuple[int, int, int]] = []
    for image in range(len(scores)):
        candidates = _candidates(scores[image], score_threshold, -1)
        kept = _suppressed(corners[image], candidates, iou_threshold, agnostic=False)
        rows += [(image, label, box) for box, label in kept[:most]]
    rows += [rows[-1] if rows else (-1, -1, -1)] * (len(scores) * most - len(rows))
    return np.array(rows, np.int32)


def _candidates(scores: Array, threshold: float, background: int) -> Kept:
    """Box and class of the scores of an image that reach the threshold, best first."""
    counted = scores >= np.float32(threshold)
    if 0 <= background < scores.shape[1]:
        counted[:, background] = False
    places = np.flatnonzero(counted)
    order = np.argsort(-scores.ravel()[places], kind="stable")[:MOST_CANDIDATES]
    return [(int(place) // scores.shape[1], int(place) % scores.shape[1]) for place in places[order]]


def _suppressed(boxes: Array, candidates: Kept, threshold: float, *, agnostic: bool) -> Kept:
    """The candidates that no better one that was kept overlaps."""
    coordinates = ordered(np.array([_box(boxes, *each) for each in candidates], np.float32).reshape(-1, 4))
    labels = np.array([label for _, label in candidates], int)
    alive = np.ones(len(candidates), bool)
    kept = []
    for index, candidate in enumerate(candidates):
        if alive[index]:
            kept.append(candidate)
            later = alive & (np.arange(len(alive)) > index)
            if not agnostic:
                later &= labels == labels[index]
            rivals = np.flatnonzero(later)
            touching = overlaps(coordinates[index], coordinates[rivals]) >= np.float32(threshold)
            alive[rivals[touching]] = False
    return kept


def _box(boxes: Array, box: int, label: int) -> Array:
    """A box of an image, (boxes, classes or 1, 4), for a class."""
    return np.asarray(boxes[box, label if boxes.shape[1] > 1 else 0])


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
