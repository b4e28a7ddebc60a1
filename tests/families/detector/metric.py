"""Mean average precision at an overlap of 0.5, after non-maximum suppression."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

OVERLAP = 0.5
CANDIDATES = 40  # best-scored positions of an image that suppression looks at
MOST_KEPT = 10  # detections of an image


def map50(outputs: dict[str, NDArray], targets: dict[str, NDArray]) -> float:
    """Mean over the classes of the area under precision (its envelope) against recall, from 0 to 1.

    Args:
        outputs: `detections` (N, 4 + classes, positions): x0, y0, x1, y1, scores.
        targets: `objects` (N, objects, 5): x0, y0, x1, y1, class; class -1 is padding.
    """
    objects = targets["objects"]
    boxes, scores, kinds = _best(outputs["detections"])
    rows, free = np.arange(len(boxes)), objects[:, :, 4] >= 0
    found: list[tuple[NDArray, NDArray, NDArray]] = []
    for _ in range(MOST_KEPT):  # the best that is left of every image at once
        best = scores.argmax(axis=1)
        score, kind, box = scores[rows, best].copy(), kinds[rows, best], boxes[rows, best]
        scores[(_overlap(boxes, box) >= OVERLAP) & (kinds == kind[:, None])] = 0
        scores[rows, best] = 0
        overlaps = np.where(free & (objects[:, :, 4] == kind[:, None]), _overlap(objects, box), 0)
        object_ = overlaps.argmax(axis=1)
        hit = (overlaps[rows, object_] >= OVERLAP) & (score > 0)
        free[rows[hit], object_[hit]] = False
        found.append((score, kind, hit))
    score, kind, hit = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(-score, kind="stable")
    order = order[score[order] > 0]
    present = range(outputs["detections"].shape[1] - 4)
    counts = [np.sum(objects[:, :, 4] == k) for k in present]
    return float(np.mean([_area(hit[order][kind[order] == k], counts[k]) for k in present]))


def _best(detections: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Boxes (N, 40, 4), scores and classes (N, 40) of the positions with the highest scores."""
    scores, kinds = detections[:, 4:].max(axis=1), detections[:, 4:].argmax(axis=1)
    order = np.argpartition(-scores, CANDIDATES, axis=1)[:, :CANDIDATES]
    boxes = np.take_along_axis(detections[:, :4], order[:, None], axis=2).transpose(0, 2, 1)
    return boxes, np.take_along_axis(scores, order, axis=1), np.take_along_axis(kinds, order, axis=1)


def _overlap(boxes: NDArray, box: NDArray) -> NDArray:
    """Intersection over union of boxes (N, n, 4 or more) with one box (N, 4) for each image: (N, n)."""
    low, high = np.maximum(boxes[:, :, :2], box[:, None, :2]), np.minimum(boxes[:, :, 2:4], box[:, None, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    areas, area = (np.prod(b[..., 2:4] - b[..., :2], axis=-1) for b in (boxes, box))
    return shared / np.maximum(areas + area[:, None] - shared, 1e-9)


def _area(hits: NDArray, count: int) -> float:
    """The area under precision against recall of detections, best first, of which some hit an object."""
    recall = np.cumsum(hits) / max(count, 1)
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * envelope))
