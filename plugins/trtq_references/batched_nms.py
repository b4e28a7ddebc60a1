"""BatchedNMS_TRT and BatchedNMSDynamic_TRT (TensorRT's plugin/batchedNMSPlugin).

Class by class, the `topK` best boxes whose score is above the threshold are gone through in order, and each
that is kept drops the later ones that overlap it by more than the IoU threshold; the `keepTopK` best of all
classes are the result.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtq_references.boxes import Array, ordered, overlaps


def BatchedNMSDynamic_TRT(
    boxes: Array,
    scores: Array,
    *,
    shareLocation: int = 1,
    backgroundLabelId: int = -1,
    numClasses: int,
    topK: int,
    keepTopK: int,
    scoreThreshold: float,
    iouThreshold: float,
    isNormalized: int = 1,
    clipBoxes: int = 1,
    scoreBits: int = 16,
    caffeSemantics: int = 1,
) -> tuple[NDArray, ...]:
    """Detections of every image, padded with zeros, and with the class -1.

    Args:
        boxes: (batch, boxes, classes, 4), or (batch, boxes, 1, 4) with `shareLocation`.
        scores: (batch, boxes, classes).
        isNormalized: whether coordinates lie between 0 and 1; else a box holds the pixels that its corners
            name, and so does an intersection with `caffeSemantics`.
        clipBoxes: whether coordinates are limited to 0 to 1.
        scoreBits: bits that float16 scores are sorted by; float32's all count.

    Returns:
        numbers of detections (batch, 1), int32; boxes (batch, keepTopK, 4); scores and classes
        (batch, keepTopK), float32.
    """
    batch, count = boxes.shape[:2]
    scores = scores.reshape(batch, count, numClasses)
    pixel = 0.0 if isNormalized else 1.0
    shared = pixel if caffeSemantics else 0.0
    numbers = np.zeros((batch, 1), np.int32)
    found_boxes = np.zeros((batch, keepTopK, 4), np.float32)
    found_scores = np.zeros((batch, keepTopK), np.float32)
    found_classes = np.full((batch, keepTopK), -1, np.float32)
    for image in range(batch):
        kept: list[tuple[float, int, Array]] = []
        for label in range(numClasses):
            if label != backgroundLabelId:
                own, values = boxes[image, :, 0 if shareLocation else label], scores[image, :, label]
                best = _best(values, scoreThreshold, topK)
                rows = _suppressed(own, best, iouThreshold, keepTopK, pixel, shared)
                kept += [(float(values[row]), label, own[row]) for row in rows]
        kept = sorted(kept, key=lambda detection: -detection[0])[:keepTopK]
        numbers[image] = len(kept)
        for row, (score, label, box) in enumerate(kept):
            found_boxes[image, row] = box.clip(0, 1) if clipBoxes else box
            found_scores[image, row], found_classes[image, row] = score, label
    return numbers, found_boxes, found_scores, found_classes


BatchedNMS_TRT = BatchedNMSDynamic_TRT
"""The same for networks whose batch is implicit in TensorRT."""


def _best(scores: Array, threshold: float, most: int) -> NDArray[np.intp]:
    """The rows whose scores are above the threshold, best first."""
    rows = np.flatnonzero(scores > np.float32(threshold))
    return rows[np.argsort(-scores[rows], kind="stable")][:most]


def _suppressed(
    boxes: Array, rows: NDArray[np.intp], threshold: float, most: int, pixel: float, shared: float
) -> list[int]:
    """The rows, best first, that no better one that was kept overlaps, at most so many."""
    boxes = ordered(boxes)
    kept: list[int] = []
    while len(rows) and len(kept) < most:
        kept.append(int(rows[0]))
        touching = overlaps(boxes[rows[0]], boxes[rows[1:]], pixel, shared) > np.float32(threshold)
        rows = rows[1:][~touching]
    return kept
