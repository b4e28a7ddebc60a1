"""What is a component of an output and what is not: arrays as models' heads make them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from trtq.simulation.components import WHOLE, Components, components

RANDOM = np.random.default_rng


def sigmoid(x: NDArray) -> NDArray:
    return 1 / (1 + np.exp(-x))


def pixels(random: np.random.Generator, *shape: int, size: float = 640) -> NDArray:
    return random.uniform(0, size, shape)


def scores(random: np.random.Generator, *shape: int) -> NDArray:
    return sigmoid(random.normal(-4, 3, shape))


def rare(random: np.random.Generator, rows: int, classes: int, positions: int) -> NDArray:
    """Scores of classes from common ones to ones that never occur."""
    return scores(random, rows, classes, positions) * np.geomspace(1, 1e-6, classes)[:, None]


def split(*parts: NDArray) -> list[list[int]]:
    """The groups of parts that are laid one behind the other along axis 1."""
    found = components([np.concatenate(parts, axis=1).astype(np.float32)])
    assert found.axis == (1 if len(found.indices) else None)
    return [list(map(int, indices)) for indices in found.indices]


def span(*bounds: int) -> list[int]:
    return list(range(*bounds))


@pytest.mark.parametrize("classes", [1, 2, 8, 80, 365, 1203])
def test_boxes_beside_scores(classes: int) -> None:
    random = RANDOM(0)
    found = split(pixels(random, 16, 4, 50), rare(random, 16, classes, 50))
    assert found == [span(4), span(4, 4 + classes)]


@pytest.mark.parametrize("classes", [2, 80, 1203])
def test_boxes_beside_logits(classes: int) -> None:
    random = RANDOM(1)
    found = split(pixels(random, 16, 4, 50), random.normal(-3, 3, (16, classes, 50)))
    assert found == [span(4), span(4, 4 + classes)]


def test_one_objectness_among_six_channels() -> None:
    random = RANDOM(2)
    found = split(pixels(random, 16, 4, 50), scores(random, 16, 1, 50), pixels(random, 16, 1, 50, size=90))
    assert found == [[0, 1, 2, 3, 5], [4]]


def keypoints(random: np.random.Generator, rows: int, count: int, positions: int) -> NDArray:
    """x, y, visibility over and over."""
    xy = pixels(random, rows, count, 2, positions)
    seen = scores(random, rows, count, 1, positions)
    return np.concatenate([xy, seen], axis=2).reshape(rows, 3 * count, positions)


def test_keypoints_with_their_visibility_between_them() -> None:
    random = RANDOM(3)
    head = pixels(random, 16, 4, 30), scores(random, 16, 1, 30), keypoints(random, 16, 17, 30)
    visible = [4, *range(7, 56, 3)]
    assert split(*head) == [[i for i in range(56) if i not in visible], visible]


@pytest.mark.parametrize("landmarks", [5, 98])
def test_one_score_between_boxes_and_landmarks(landmarks: int) -> None:
    random = RANDOM(4)
    head = (
        pixels(random, 16, 4, 30) + 20,
        scores(random, 16, 1, 30),
        pixels(random, 16, 2 * landmarks, 30) + 20,
    )
    assert split(*head)[1] == [4]


def test_three_scales_over_and_over() -> None:
    random = RANDOM(5)
    head = np.stack([random.normal(0, s, (16, 10, 20)) for s in (0.3, 20, 4000)], axis=2)
    assert split(head.reshape(16, 30, 20)) == [span(2, 30, 3), span(1, 30, 3), span(0, 30, 3)]


def test_scores_need_no_gap() -> None:
    """Boxes, scores and mask coefficients; a box in metres with sizes, angle and scores."""
    random = RANDOM(13)
    head = pixels(random, 16, 4, 50), scores(random, 16, 80, 50), random.normal(size=(16, 32, 50))
    assert split(*head) == [span(4), span(84, 116), span(4, 84)]
    place, size = random.uniform(-70, 70, (16, 3, 50)), random.uniform(1, 9, (16, 3, 50))
    turn = random.uniform(-3, 3, (16, 1, 50))
    assert split(place, size, turn, scores(random, 16, 3, 50)) == [span(7), span(7, 10)]


def test_depth_in_millimetres_beside_confidence() -> None:
    random = RANDOM(6)
    assert split(random.uniform(400, 8000, (16, 1, 9, 9)), scores(random, 16, 1, 9, 9)) == [[0], [1]]
    many = random.uniform(400, 8000, (16, 1, 9, 9)), scores(random, 16, 150, 9, 9)
    assert split(*many) == [[0], span(1, 151)]


def test_two_heads_of_different_scale() -> None:
    random = RANDOM(7)
    found = split(random.normal(0, 0.02, (16, 64, 5)), random.normal(0, 30, (16, 32, 5)))
    assert found == [span(64, 96), span(64)]


def test_vectors() -> None:
    random = RANDOM(8)
    assert split(pixels(random, 64, 4), scores(random, 64, 8)) == [span(4), span(4, 12)]


def test_a_head_laid_out_flat() -> None:
    """All positions of each channel, or all channels of each position, one behind the other."""
    random = RANDOM(9)
    head = np.concatenate([20 + pixels(random, 32, 4, 40), scores(random, 32, 8, 40)], axis=1)
    assert split(head.reshape(32, -1)) == [span(160), span(160, 480)]
    boxes = [i for i in range(480) if i % 12 < 4]
    assert split(head.transpose(0, 2, 1).reshape(32, -1))[0] == boxes


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 2, 1, 3), (0, 3, 2, 1)])
def test_the_axis_may_be_any(order: tuple[int, ...]) -> None:
    random = RANDOM(10)
    head = np.concatenate([pixels(random, 8, 4, 6, 5), rare(random, 8, 20, 30).reshape(8, 20, 6, 5)], axis=1)
    found = components([head.transpose(order).astype(np.float32)])
    assert found.axis == order.index(1)
    assert [list(own) for own in found.indices] == [span(4), span(4, 24)]


def test_what_is_zero_or_constant_belongs_to_the_small_ones() -> None:
    random = RANDOM(11)
    zero, same = np.zeros((16, 1, 30)), np.full((16, 1, 30), 0.002)
    boxes = pixels(random, 16, 4, 30)
    assert split(zero, boxes, same, scores(random, 16, 3, 30))[1] == [0, 5, 6, 7, 8]
    for nothing in (zero, same, 1e-6 * scores(random, 16, 1, 30)):
        assert split(boxes, np.repeat(nothing, 4, axis=1)) == []


ROWS = 64
WHOLE_OUTPUTS: dict[str, Callable[[np.random.Generator], NDArray]] = {
    "logits": lambda r: r.normal(0, 1, (ROWS, 1000)) * np.geomspace(1, 12, 1000),
    "logits, one class of a wide range": lambda r: r.normal(0, 4, (ROWS, 10)) * ([1] * 9 + [6]),
    "softmax": lambda r: softmax(r.normal(0, 8, (ROWS, 100)) - np.linspace(0, 40, 100)),
    "percentages": lambda r: 100 * softmax(r.normal(0, 4, (ROWS, 10)) - np.repeat([0, 14], 5)),
    "multi-label scores": lambda r: rare(r, ROWS, 40, 1)[:, :, 0],
    "log-probabilities": lambda r: np.log(softmax(r.normal(0, 8, (ROWS, 100)))),
    "one-hot map": lambda r: np.eye(5)[r.integers(0, 4, (ROWS, 8, 8))],
    "segmentation logits": lambda r: r.normal(0, 3, (ROWS, 21, 8, 8)) + 8 * np.eye(21)[0][:, None, None],
    "segmentation with classes that never occur": lambda r: scaled(r, [1] * 9 + [0], (ROWS, 10, 8, 8), 6),
    "tanh": lambda r: np.tanh(r.normal(size=(ROWS, 8)) * np.geomspace(1e-4, 4, 8)),
    "embedding, one dimension 10 times": lambda r: outlying(r, 384, {57: 10}),
    "embedding, one dimension 60 times": lambda r: outlying(r, 384, {57: 60}),
    "embedding, the first dimension 60 times": lambda r: outlying(r, 384, {0: 60}),
    "embedding, two dimensions": lambda r: outlying(r, 384, {131: 40, 308: 80}),
    "embedding, two that are neighbours": lambda r: outlying(r, 384, {131: 40, 132: 80}),
    "embedding, one dimension died": lambda r: outlying(r, 384, {77: 1e-3}),
    "token embeddings": lambda r: outlying(r, 384, {77: 50}).repeat(3, 0).reshape(ROWS, 3, 384),
    "small embedding, two dimensions": lambda r: outlying(r, 64, {9: 30, 40: 60}),
    "sparse features": lambda r: np.maximum(r.normal(-2, 1, (ROWS, 256)), 0) * r.lognormal(0, 2, 256),
    "features with dead channels": lambda r: np.maximum(outlying(r, 64, {3: 0.01, 17: 0.01, 60: 0}), 0),
    "few features, one died": lambda r: np.maximum(outlying(r, 16, {5: 0.01}), 0),
    "scattered weak channels": lambda r: r.normal(0, 40, (ROWS, 96)) * r.choice([1, 0.02], 96),
    "images": lambda r: r.uniform(0, 255, (ROWS, 3, 12, 12)),
    "depth": lambda r: r.uniform(0.1, 80, (ROWS, 1, 12, 12)),
    "spectrogram": lambda r: r.exponential(1, (ROWS, 80, 10)) * np.geomspace(1e3, 1e-3, 80)[:, None],
    "boxes alone": lambda r: pixels(r, ROWS, 4, 20),
    "normalized boxes beside scores": lambda r: np.concatenate(
        [r.uniform(0, 1, (ROWS, 4)), scores(r, ROWS, 9)], 1
    ),
    "all zero": lambda r: np.zeros((ROWS, 5)),
    "hidden and cell state": lambda r: np.stack(
        [np.tanh(r.normal(0, 0.5, (ROWS, 128))), r.normal(0, 1, (ROWS, 128)) + 11 * np.eye(128)[5]], 1
    ),
    "one number": lambda r: r.normal(0, 100, (ROWS, 1)),
    "rows of one number": lambda r: r.normal(0, 100, ROWS),
    "few rows": lambda r: r.normal(0, 100, (3, 1000)),
    "no rows": lambda r: np.zeros((0, 4)),
}


def softmax(logits: NDArray, axis: int = 1) -> NDArray:
    powers = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def outlying(random: np.random.Generator, size: int, factors: dict[int, float]) -> NDArray:
    """Normal values, some dimensions of which have another scale."""
    scale = np.ones(size)
    scale[list(factors)] = list(factors.values())
    return random.normal(0, 1, (ROWS, size)) * scale


def scaled(random: np.random.Generator, scale: list[float], shape: tuple[int, ...], std: float) -> NDArray:
    return random.normal(0, std, shape) * np.reshape(scale, (-1, 1, 1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WHOLE_OUTPUTS)
def test_what_is_whole(name: str, seed: int) -> None:
    assert components([WHOLE_OUTPUTS[name](RANDOM(seed)).astype(np.float32)]) == WHOLE


def test_integers_and_what_is_not_finite_are_whole() -> None:
    mixed = np.concatenate([np.full((16, 4), 640), np.ones((16, 8))], axis=1)
    assert components([mixed.astype(np.int64)]) == WHOLE
    assert components([np.where(mixed == 640, np.inf, mixed)]) == WHOLE


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_axis_whose_length_changes_is_not_split(dtype: type) -> None:
    random = RANDOM(12)
    head = np.concatenate([pixels(random, 4, 4, 30), scores(random, 4, 8, 30)], axis=1).astype(dtype)
    assert components([head, head[:, :, :9]]).axis == 1
    assert components([head, head[:, :9]]) == WHOLE


@given(seed=st.integers(0, 99), batch=st.integers(1, 32), classes=st.integers(1, 100))
def test_batches_order_and_few_rows_change_nothing(seed: int, batch: int, classes: int) -> None:
    random = RANDOM(seed)
    head = np.concatenate([pixels(random, 32, 4, 20), scores(random, 32, classes, 20)], axis=1)
    shuffled = random.permutation(head)
    expected = components([head])
    others = [
        components([shuffled]),
        components([head[i : i + batch] for i in range(0, 32, batch)]),
        components([head[:4]]),
    ]
    assert len(expected) == 2
    for found in others:
        assert [list(own) for own in found.indices] == [list(own) for own in expected.indices]


def test_parts_and_labels() -> None:
    array = np.arange(2 * 6 * 3).reshape(2, 6, 3)
    split = Components(1, (np.array([0, 1, 2, 5]), np.array([3, 4])), (640.0, 0.9876))
    first, second = split.parts(array)
    np.testing.assert_array_equal(first, array[:, [0, 1, 2, 5]])
    np.testing.assert_array_equal(second, array[:, 3:5])
    assert split.labels() == [
        "channels 0-2, 5 of axis 1 (up to 640)",
        "channels 3-4 of axis 1 (up to 0.9876)",
    ]
    scattered = Components(2, (np.arange(0, 30, 3), np.array([1])), (1.0, 0.1))
    assert scattered.labels()[0] == "channels 0, 3, 6, 9, ... (10 in all) of axis 2 (up to 1)"
    assert scattered.labels()[1].startswith("channel 1 of")
    assert WHOLE.parts(array)[0] is array
    assert WHOLE.labels() == []
    assert (len(split), len(WHOLE)) == (2, 1)


FAMILIES = Path(__file__).parents[1] / "families"


def outputs_of(session: onnxruntime.InferenceSession, feed: dict[str, NDArray]) -> dict[str, NDArray]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def test_a_trained_detector() -> None:
    session = onnxruntime.InferenceSession(FAMILIES / "detector" / "detector.onnx")
    with np.load(FAMILIES / "detector" / "eval.npz") as data:
        images = (data["pixels"][:16] / np.float32(255)).transpose(0, 3, 1, 2)
    (found,) = outputs_of(session, {"images": images}).values()
    assert [list(own) for own in components([found]).indices] == [span(4), span(4, found.shape[1])]


@pytest.mark.parametrize("model", ["resnet20_cifar10", "minilm_l6", "efficientnet_lite0"])
def test_no_tensor_inside_a_trained_network_has_components(model: str, zoo: Path) -> None:
    """Hundreds of feature maps with outliers, dead and constant channels, and the outputs with them."""
    proto = onnx.shape_inference.infer_shapes(onnx.load(zoo / "models" / f"{model}.onnx"))
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(info for info in proto.graph.value_info if info.name not in known)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    found = outputs_of(session, zoo_rows(model, zoo))
    rows = len(next(iter(zoo_rows(model, zoo).values())))
    floats = {n: a for n, a in found.items() if a.dtype == np.float32 and a.ndim > 1 and len(a) == rows}
    assert len(floats) > 50
    assert [name for name, array in floats.items() if components([array]) != WHOLE] == []


def zoo_rows(model: str, zoo: Path) -> dict[str, NDArray]:
    if model == "minilm_l6":
        with np.load(zoo / "stsb" / "eval.npz") as data:
            return {name: data[name][:24] for name in ("input_ids", "attention_mask")}
    if model == "resnet20_cifar10":
        with np.load(zoo / "cifar10" / "eval.npz") as data:
            images = data["images"][:24].transpose(0, 3, 1, 2).astype(np.float32)
        return {"input": (images / 255 - 0.45) / 0.23}
    from PIL import Image

    files = sorted((zoo / "imagenet_sample" / "eval").glob("*.jpg"))[:8]
    images = np.stack([np.asarray(Image.open(file).convert("RGB"), np.float32) for file in files])
    session = onnxruntime.InferenceSession(zoo / "models" / f"{model}.onnx")
    return {session.get_inputs()[0].name: (images.transpose(0, 3, 1, 2) / 255 - 0.498) / 0.502}


@pytest.mark.parametrize("model", ["ppocrv4_detector", "ppocrv4_recognizer"])
def test_outputs_of_text_recognition_are_whole(model: str, zoo: Path) -> None:
    folder = "ppocr_det" if model.endswith("detector") else "ppocr_rec"
    with np.load(zoo / folder / "eval.npz") as data:
        rows = data["x"][:8]
    session = onnxruntime.InferenceSession(zoo / "models" / f"{model}.onnx")
    assert all(components([array]) == WHOLE for array in outputs_of(session, {"x": rows}).values())


def test_the_state_of_a_recurrent_network_is_whole(zoo: Path) -> None:
    session = onnxruntime.InferenceSession(zoo / "models" / "silero_vad_16k.onnx")
    with np.load(zoo / "silero_vad" / "16k_eval.npz") as data:
        feeds = [{"input": data["input"][row], "state": data["state"][row]} for row in range(100)]
    runs = [outputs_of(session, feed) for feed in feeds]
    for name in runs[0]:
        assert components([np.stack([run[name] for run in runs])]) == WHOLE
