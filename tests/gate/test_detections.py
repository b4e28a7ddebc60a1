"""Detections against values worked by hand, in every form that detectors give them, and COCO's mAP."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from itertools import product

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import net
from numpy.typing import NDArray

from trtq.errors import InputError, MissingBackendError
from trtq.gate.decision import decide
from trtq.gate.detections import Found, match, overlap
from trtq.gate.metrics import load_metric
from trtq.gate.verdict import Outcome
from trtq.simulation.values import Values, stacked

A, B, C = [0, 0, 10, 10], [20, 20, 40, 40], [50, 0, 60, 30]
A_HALF = [0, 0, 10, 5]
"""IoU 0.5 with A."""
A_LESS = [0, 0, 10, 4.9]


def outputs(*samples: tuple[list, list, list], names: str = "boxes scores labels") -> dict[str, Values]:
    """Samples of boxes, scores and classes, as torchvision's detectors give them."""
    columns = zip(*samples, strict=True)
    shapes = ((-1, 4), (-1,), (-1,))
    kinds = (np.float32, np.float32, np.int64)
    return {
        name: stacked([np.array(own, kind).reshape(shape) for own in column])
        for name, column, shape, kind in zip(names.split(), columns, shapes, kinds, strict=True)
    }


REFERENCE = outputs(([A, B], [0.9, 0.8], [0, 1]), ([C], [0.7], [2]), ([], [], []))


def f1(candidate: Mapping[str, Values], spec: str = "detections", **targets: NDArray) -> float:
    return load_metric(spec).value(candidate, targets, REFERENCE)


def test_what_is_found_again_is_right() -> None:
    assert f1(REFERENCE) == 1.0
    other_order = outputs(([B, A], [0.8, 0.9], [1, 0]), ([C], [0.7], [2]), ([], [], []))
    assert f1(other_order) == 1.0


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (([A], [0.9], [0]), 2 * 2 / (2 * 2 + 0 + 1)),  # B is missed
        (([A, B], [0.9, 0.8], [0, 0]), 2 * 2 / (2 * 2 + 1 + 1)),  # B has another class
        (([A, B, B], [0.9, 0.8, 0.7], [0, 1, 1]), 2 * 3 / (2 * 3 + 1)),  # B is found twice
        (([A_HALF, B], [0.9, 0.8], [0, 1]), 1.0),
        (([A_LESS, B], [0.9, 0.8], [0, 1]), 2 * 2 / (2 * 2 + 1 + 1)),
        (([A, B], [0.9, 0.2], [0, 1]), 2 * 2 / (2 * 2 + 1)),  # B scores too little
        (([], [], []), 2 * 1 / (2 * 1 + 2)),
    ],
)
def test_f1_by_hand(sample: tuple[list, list, list], expected: float) -> None:
    candidate = outputs(sample, ([C], [0.7], [2]), ([], [], []))
    assert f1(candidate) == pytest.approx(expected)


def test_bounds_can_be_said() -> None:
    candidate = outputs(([A_LESS, B], [0.9, 0.2], [0, 1]), ([C], [0.7], [2]), ([], [], []))
    assert f1(candidate, "detections@iou=0.4,score=0.1") == 1.0
    for spec in ("detections@bound=1", "detections@iou=half", "detections@format=corners"):
        with pytest.raises(InputError, match="the metric 'detections@"):
            load_metric(spec)


def test_targets_are_the_truth_where_they_are_boxes() -> None:
    gt = np.array([[A, C], [C, [0, 0, 0, 0]], [[0] * 4] * 2], np.float32)
    classes = np.array([[0, 2], [2, -1], [-1, -1]])
    # found: A, B, C; true: A, C, C
    assert f1(REFERENCE, gt_boxes=gt, gt_labels=classes) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert f1(REFERENCE, labels=np.array([3, 1, 2])) == 1.0  # of each image: these are no boxes
    with pytest.raises(InputError, match="classes are not those of their boxes"):
        f1(REFERENCE, boxes=gt, classes=classes[:, :1])
    with pytest.raises(InputError, match=r"boxes have the shape \(3, 2, 5\)"):  # not taken for none at all
        f1(REFERENCE, gt_boxes=np.concatenate([gt, classes[..., None]], axis=2))


def padded(rows: list[NDArray], count: int) -> NDArray:
    return np.stack([np.pad(row, [(0, count - len(row)), *[(0, 0)] * (row.ndim - 1)]) for row in rows])


def efficient_nms() -> dict[str, Values]:
    boxes, scores, classes = REFERENCE.values()
    return {
        "num_dets": np.array([[len(row)] for row in boxes], np.int32),
        "det_boxes": padded(boxes, 5),
        "det_scores": padded(scores, 5) + np.float32(0.5),  # what the padding holds is not looked at
        "det_classes": padded(classes, 5),
    }


def rows(*columns: int) -> dict[str, Values]:
    """One output of rows; of image number, corners, score and class some columns."""
    boxes, scores, classes = REFERENCE.values()
    whole = [
        np.concatenate([np.zeros((len(b), 1)), b, s[:, None], c[:, None]], axis=1).astype(np.float32)
        for b, s, c in zip(boxes, scores, classes, strict=True)
    ]
    return {"output0": stacked([row[:, list(columns)] for row in whole])}


def by_class() -> dict[str, Values]:
    """Scores of every class, and boxes of another format."""
    boxes, scores, classes = REFERENCE.values()
    return {
        "pred_boxes": stacked(
            [np.concatenate([b[:, :2] / 2 + b[:, 2:] / 2, b[:, 2:] - b[:, :2]], 1) for b in boxes]
        ),
        "probabilities": stacked(
            [s[:, None] * np.eye(5, dtype=np.float32)[c] for s, c in zip(scores, classes, strict=True)]
        ),
    }


def mmdetection() -> dict[str, Values]:
    return {"dets": rows(1, 2, 3, 4, 5)["output0"], "labels": REFERENCE["labels"]}


@pytest.mark.parametrize(
    ("reference", "spec"),
    [
        (REFERENCE, "detections"),
        (efficient_nms(), "detections"),
        (rows(1, 2, 3, 4, 5, 6), "detections"),
        (rows(1, 2, 3, 4, 6, 5), "detections"),
        (rows(0, 1, 2, 3, 4, 6, 5), "detections"),
        (mmdetection(), "detections"),
        (by_class(), "detections@format=cxcywh"),
        (dict(zip("abc", REFERENCE.values(), strict=True)), "detections@boxes=a,scores=b,classes=c"),
    ],
    ids=["arrays", "EfficientNMS", "rows", "class first", "with image", "mmdetection", "by class", "named"],
)
def test_every_form_reads_the_same(reference: dict[str, Values], spec: str) -> None:
    """Against targets: A and C are right, B is a false one, and one box is missed."""
    gt = np.array([[A, C], [C, [0] * 4], [[0] * 4] * 2], np.float32)
    classes = np.array([[0, 2], [2, -1], [-1, -1]])
    metric = load_metric(spec)
    found = metric.value(reference, {"gt_boxes": gt, "gt_classes": classes}, reference)
    assert found == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metric.value(reference, {}, reference) == 1.0
    assert "from" in metric.reads(reference, {})


def test_what_nonmaxsuppression_picked() -> None:
    """ONNX's own operator on boxes y1, x1, y2, x2: B and one of the two A's of class 1 are left."""
    model = net(
        """g (float[1,3,4] boxes, float[1,2,3] scores) => (int64[K,3] selected) {
            selected = NonMaxSuppression(boxes, scores, most, iou, least)
        }""",
        most=np.array([9]),
        iou=np.float32([0.4]),
        least=np.float32([0.3]),
    )
    boxes = np.float32([[A, A_HALF, B]])[..., [1, 0, 3, 2]]
    scores = np.float32([[[0.1, 0.2, 0.6], [0.9, 0.7, 0.1]]])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (picked,) = session.run(None, {"boxes": boxes, "scores": scores})
    found = {"selected": [picked], "boxes": boxes, "scores": scores}
    metric = load_metric("detections@format=yxyx")
    truth = {"boxes": np.float32([[A, B]]), "classes": np.array([[1, 0]])}
    assert metric.value(found, truth, found) == 1.0
    assert metric.value(found, {**truth, "classes": np.array([[0, 0]])}, found) == pytest.approx(0.5)


RAW = np.array(
    [
        # centre, sides, scores of two classes
        [5, 5, 10, 10, 0.9, 0.1],  # A
        [5, 5, 10, 9.5, 0.8, 0.0],  # overlaps A by 0.95
        [5, 5, 10, 9.5, 0.0, 0.7],  # the same, of the other class
        [30, 30, 20, 20, 0.1, 0.6],  # B
        [55, 15, 10, 30, 0.2, 0.1],  # scores too little
        *[[100 * i, 0, 1, 1, 0.0, 0.0] for i in range(1, 6)],
    ],
    np.float32,
)
"""What a YOLO gives for 10 places before suppression."""


def raw(places: NDArray, turned: bool) -> dict[str, Values]:
    return {"out": stacked([places.T if turned else places])}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("objectness", [False, True])
def test_what_a_yolo_gives_before_suppression(turned: bool, objectness: bool) -> None:
    """With an objectness of 0.5 twice the scores say the same."""
    places, spec = RAW, "detections@yolo=out"
    if objectness:
        half = np.full((len(RAW), 1), 0.5, np.float32)
        places = np.concatenate([RAW[:, :4], half, 2 * RAW[:, 4:]], axis=1)
        spec = "detections@yolox=out"
    reference = raw(places, turned)
    corners = [A, [0, 0.25, 10, 9.75], [20, 20, 40, 40]]
    boxes = np.array([corners], np.float32)
    for classes, expected in (([0, 1, 1], 1.0), ([0, 0, 1], 2 * 2 / (2 * 2 + 1 + 1))):
        targets = {"boxes": boxes, "classes": np.array([classes])}
        found = load_metric(f"{spec},iou=0.94").value(reference, targets, reference)
        assert found == pytest.approx(expected)
    kept = load_metric(f"{spec},nms=0.96,iou=0.94").value(reference, targets, reference)
    assert kept == pytest.approx(2 * 3 / (2 * 3 + 1))  # all three are found, and one of the other class


def test_a_yolo_without_scores_is_refused() -> None:
    reference = raw(RAW[:, :5], False)
    with pytest.raises(InputError, match="no scores beside the boxes"):
        load_metric("detections@yolox=out").value(reference, {}, reference)


def test_one_box_in_every_sample_has_no_axis_of_boxes() -> None:
    """As a model gives it whose samples all have one box; the candidate finds two in one of them."""
    one = {"boxes": np.float32([A, B, C]), "scores": np.float32([0.9, 0.8, 0.7])}
    metric = load_metric("detections")
    assert metric.value(one, {}, one) == 1.0
    more = {
        "boxes": [np.float32([A]), np.float32([B, C]), np.float32([C])],
        "scores": [np.ones(n) for n in (1, 2, 1)],
    }
    assert metric.value(more, {}, one) == pytest.approx(2 * 3 / (2 * 3 + 1))


def test_what_is_not_said_is_told_by_names() -> None:
    named = {"a": REFERENCE["boxes"], "boxes": REFERENCE["boxes"], "scores": REFERENCE["scores"]}
    reads = load_metric("detections@boxes=a").reads
    expected = (
        "detections: boxes from 'a', scores from 'scores'; IoU from 0.5, scores from 0.25; matched with "
    )
    assert reads(named, {}) == expected + "what fp32 finds"
    assert reads(named, {"boxes": np.zeros((3, 1, 4))}) == expected + "the boxes of the targets"


def test_what_cannot_be_read_says_what_to_write() -> None:
    with pytest.raises(InputError, match="which output holds the boxes") as caught:
        load_metric("detections").value({"y": np.ones((2, 10))}, {}, {"y": np.ones((2, 10))})
    assert "y: float64 (10,)" in caught.value.cause
    assert "detections@boxes=NAME" in caught.value.remedy
    with pytest.raises(InputError, match="no output 'z'"):
        f1(REFERENCE, "detections@boxes=z")
    centres = {"boxes": np.float32([[[50, 50, 8, 8], [30, 60, 4, 4]]])}
    with pytest.raises(InputError, match="are not xyxy") as caught:
        load_metric("detections").value(centres, {}, centres)
    assert "format=cxcywh" in caught.value.remedy
    nothing = outputs(([], [], []), ([A], [0.1], [0]))
    with pytest.raises(InputError, match="no box to find"):
        load_metric("detections").value(nothing, {}, nothing)


@given(st.lists(st.tuples(*[st.integers(0, 20)] * 4), min_size=1, max_size=6))
def test_overlap_is_that_of_sets_of_pixels(corners: list[tuple[int, int, int, int]]) -> None:
    boxes = np.array([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in corners], np.float64)
    pixels = [set(product(range(x, right), range(y, low))) for x, y, right, low in boxes.astype(int).tolist()]
    for i, j in np.ndindex(len(boxes), len(boxes)):
        union = pixels[i] | pixels[j]
        expected = len(pixels[i] & pixels[j]) / len(union) if union else float((boxes[i] == boxes[j]).all())
        assert overlap(boxes[[i]], boxes[[j]])[0, 0] == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 9)] * 4, st.integers(0, 1)), max_size=7), st.randoms())
def test_detections_match_themselves_in_any_order(boxes: list[tuple[int, ...]], random) -> None:
    corners = np.array([[a, b, a + c, b + d] for a, b, c, d, _ in boxes], np.float64).reshape(-1, 4)
    found = Found(corners, np.linspace(1, 0, len(boxes)), np.array([own[4] for own in boxes], np.int64))
    order = list(range(len(boxes)))
    random.shuffle(order)
    assert match(found, found.only(np.array(order, int)), 0.5) == len(boxes)


def test_the_gate_on_detections() -> None:
    """One of 40 boxes is lost: F1 is 2·39 / (2·39 + 1); a candidate that finds nothing fails."""
    samples = [([A, B], [0.9, 0.8], [0, 1])] * 20
    reference, lost = outputs(*samples), outputs(([A], [0.9], [0]), *samples[1:])
    found = decide(reference, lost, {}, load_metric("detections"), max_drop=0.02, executor="simulation")
    assert found.candidate == pytest.approx(78 / 79)
    assert found.outcome is Outcome.PASS
    assert found.outputs["boxes"].not_compared == 1
    assert any(
        "boxes from 'boxes', scores from 'scores', classes from 'labels'" in note for note in found.notes
    )
    assert any("1 of 20 rows have another shape" in note for note in found.notes)
    empty = outputs(*[([], [], [])] * 20)
    assert (
        decide(reference, empty, {}, load_metric("detections"), executor="simulation").outcome is Outcome.FAIL
    )


def test_map_without_its_package_says_what_to_install() -> None:
    if importlib.util.find_spec("pycocotools"):
        pytest.skip("pycocotools is installed")
    with pytest.raises(MissingBackendError, match="pycocotools is not installed") as caught:
        load_metric("mAP")
    assert "trtq[map]" in caught.value.remedy


def test_map_by_hand() -> None:
    """Class 0: one box, right (AP 1). Class 2: two true boxes, one of them found: precision 1 up to a recall
    of one half, which 51 of COCO's 101 points are. Class 1 is found and not true: it does not count."""
    pytest.importorskip("pycocotools")
    gt = np.array([[A, C], [C, [0] * 4], [[0] * 4] * 2], np.float32)
    truth = {"boxes": gt, "classes": np.array([[0, 2], [2, -1], [-1, -1]])}
    for spec in ("mAP", "mAP50"):
        assert load_metric(spec).value(REFERENCE, truth) == pytest.approx((1 + 51 / 101) / 2)
    # IoU 0.5: right at the first of the ten thresholds only
    half = outputs(([A_HALF], [0.9], [0]), ([C], [0.7], [2]), ([], [], []))
    assert load_metric("mAP50").value(half, truth) == pytest.approx((1 + 51 / 101) / 2)
    assert load_metric("mAP").value(half, truth) == pytest.approx((0.1 + 51 / 101) / 2)
    with pytest.raises(InputError, match="mAP needs boxes as targets"):
        load_metric("mAP").value(REFERENCE, {"labels": np.arange(3)})
