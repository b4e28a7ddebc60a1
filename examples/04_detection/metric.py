import numpy as np


def found(outputs, targets):
    """1 for every image whose box matches (IoU >= 0.5) and whose class is right; the metric is the mean."""
    boxes, truth = outputs["box"], targets["true_box"]  # (samples, 4): x0, y0, x1, y1
    low = np.maximum(boxes[:, :2], truth[:, :2])
    high = np.minimum(boxes[:, 2:], truth[:, 2:])
    overlap = np.prod(np.clip(high - low, 0, None), axis=1)
    union = area(boxes) + area(truth) - overlap
    right = outputs["scores"].argmax(axis=1) == targets["kind"]
    return (overlap / union >= 0.5) & right


def area(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
