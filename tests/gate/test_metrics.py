from __future__ import annotations

import importlib

import numpy as np
import pytest
import scipy.special
from sklearn.metrics import f1_score, jaccard_score, top_k_accuracy_score

from trtq.errors import InputError
from trtq.gate.metrics import load_metric, rows_per_sample
from trtq.simulation.similarity import MAX_SQNR_DB


@pytest.fixture
def scores():
    return np.random.default_rng(0).normal(size=(300, 10)).astype(np.float32)


@pytest.fixture
def labels():
    return np.random.default_rng(1).integers(0, 10, 300)


@pytest.mark.parametrize(("name", "k"), [("top1", 1), ("top5", 5)])
def test_top_k_against_sklearn(scores, labels, name, k):
    value = load_metric(name).value({"y": scores}, {"labels": labels})
    assert value == pytest.approx(top_k_accuracy_score(labels, scores, k=k))


def test_a_constant_output_is_only_right_for_the_first_class():
    outputs, labels = {"y": np.zeros((4, 6), np.float32)}, np.array([0, 1, 2, 5])
    assert load_metric("top1").value(outputs, {"labels": labels}) == 0.25
    assert load_metric("top5").value(outputs, {"labels": labels}) == 0.75


def test_per_sample_scores(scores, labels):
    metric = load_metric("top1")
    per_sample = metric.per_sample({"y": scores}, {"labels": labels[:, None]}, {"y": scores})
    np.testing.assert_array_equal(per_sample, scores.argmax(1) == labels)


def test_macro_f1_against_sklearn(scores, labels):
    value = load_metric("f1").value({"y": scores}, {"labels": labels})
    assert value == pytest.approx(f1_score(labels, scores.argmax(1), average="macro"))


def test_f1_of_classes_that_do_not_occur():
    scores = np.eye(5)[[0, 1, 1, 3]]
    labels = np.array([0, 1, 0, 3])
    expected = f1_score(labels, scores.argmax(1), average="macro")
    assert load_metric("f1").value({"y": scores}, {"labels": labels}) == pytest.approx(expected)


@pytest.mark.parametrize("columns", [1, 2])
def test_binary_f1_is_that_of_class_one(columns):
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=100), rng.integers(0, 2, 100)
    output = logits[:, None] if columns == 1 else np.stack([0 * logits, logits], axis=1)
    value = load_metric("f1").value({"y": output}, {"labels": labels})
    assert value == pytest.approx(f1_score(labels, logits > 0))


def test_probabilities_are_cut_at_one_half_as_the_reference_says():
    labels = np.array([0, 1, 1, 0])
    probability = {"y": np.array([[0.2], [0.9], [0.4], [0.1]])}
    assert load_metric("accuracy").value(probability, {"labels": labels}) == 0.75
    logits = {"y": np.array([[-2.0], [3.0], [0.4], [-1.0]])}
    assert load_metric("accuracy").value(logits, {"labels": labels}) == 1.0
    assert load_metric("accuracy").value(probability, {"labels": labels}, logits) == 0.5


def test_accuracy_per_position_skips_negative_labels():
    scores = np.zeros((2, 3, 4))  # sequence: classes last
    scores[..., 2] = 1
    labels = np.array([[2, 0, -100], [2, 2, 2]])
    assert load_metric("accuracy").value({"y": scores}, {"labels": labels}) == pytest.approx((0.5 + 1) / 2)
    image = np.moveaxis(np.broadcast_to(scores[:, :, None], (2, 3, 5, 4)), -1, 1)
    spread = np.repeat(labels[:, :, None], 5, axis=2)
    assert load_metric("accuracy").value({"y": image}, {"labels": spread}) == pytest.approx(0.75)
    with pytest.raises(InputError, match="sample 1 has no label"):
        load_metric("accuracy").value({"y": scores}, {"labels": np.array([[0, 0, 0], [-1, -1, -1]])})


def test_miou_against_sklearn():
    rng = np.random.default_rng(3)
    scores, labels = rng.normal(size=(4, 3, 8, 8)), rng.integers(0, 3, (4, 8, 8))
    labels[0, :2] = 255
    kept = labels != 255
    expected = jaccard_score(labels[kept], scores.argmax(1)[kept], average="macro")
    metric = load_metric("miou")
    assert metric.value({"y": scores}, {"labels": labels}) == pytest.approx(expected)
    ids = {"y": scores.argmax(1)[:, None]}
    assert metric.value(ids, {"labels": labels}) == pytest.approx(expected)
    assert metric.per_sample is None


def test_label_free_metrics():
    rng = np.random.default_rng(4)
    reference = {"a": rng.normal(size=(6, 5)), "b": rng.normal(size=(6, 2, 2))}
    same = load_metric("cosine").value(reference, {}, reference)
    assert same == pytest.approx(1.0)
    assert load_metric("sqnr").value(reference, {}, reference) == MAX_SQNR_DB
    off = {"a": reference["a"] * 1.1, "b": -reference["b"]}
    assert load_metric("cosine").value(off, {}, reference) == pytest.approx(0.0)
    assert load_metric("cosine@a").value(off, {}, reference) == pytest.approx(1.0)
    assert load_metric("sqnr@a").value(off, {}, reference) == pytest.approx(20.0)


def test_label_free_metrics_see_every_component():
    """4 boxes of a YOLO head drown the energy of 8 scores; kl reads what it always did."""
    rng = np.random.default_rng(5)
    reference = np.concatenate([rng.uniform(50, 640, (6, 4, 9)), rng.uniform(0, 1, (6, 8, 9))], 1)
    candidate = reference.copy()
    candidate[:, 4:] = 1 - reference[:, 4:]
    r, c = (a[:, 4:].reshape(6, -1) for a in (reference, candidate))
    cosines = (r * c).sum(1) / np.sqrt((r**2).sum(1) * (c**2).sum(1))
    noises = 10 * np.log10((r**2).sum(1) / ((r - c) ** 2).sum(1))
    found = {
        n: load_metric(n).value({"y": candidate}, {}, {"y": reference}) for n in ("cosine", "sqnr", "kl")
    }
    assert found["cosine"] == pytest.approx(cosines.mean())
    assert found["sqnr"] == pytest.approx(noises.mean())
    p, q = (scipy.special.softmax(a, axis=-1) for a in (reference, candidate))
    divergence = scipy.special.rel_entr(p, q).sum(axis=-1).mean(axis=1)
    assert found["kl"] == pytest.approx(np.exp(-divergence).mean())


@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 3), (5, 3, 2, 2)])
def test_kl_is_that_of_the_class_probabilities(shape: tuple[int, ...]) -> None:
    """Against SciPy; the classes are axis 1 of images and of vectors, and the last of sequences."""
    p, q = (np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 3 for seed in (0, 1))
    axis = 2 if len(shape) == 3 else 1
    divergence = scipy.special.rel_entr(scipy.special.softmax(p, axis), scipy.special.softmax(q, axis)).sum(
        axis
    )
    expected = np.exp(-divergence.reshape(5, -1).mean(axis=1)).mean()
    metric = load_metric("kl")
    assert metric.value({"y": q}, {}, {"y": p}) == pytest.approx(expected, rel=1e-6)
    assert metric.value({"y": p + 7}, {}, {"y": p}) == pytest.approx(1.0)
    assert not metric.needs_targets


def test_which_output_and_target():
    outputs = {"logits": np.eye(3), "hidden": np.ones((3, 4))}
    targets = {"labels": np.arange(3), "weights": np.ones(3)}
    assert load_metric("top1@logits").value(outputs, targets) == 1.0
    assert load_metric("top1@logits:weights").value(outputs, targets) == pytest.approx(1 / 3)
    with pytest.raises(InputError, match="logits, hidden"):
        load_metric("top1").value(outputs, targets)
    with pytest.raises(InputError, match="no output 'x'"):
        load_metric("top1@x").value(outputs, targets)
    with pytest.raises(InputError, match="cannot tell which"):
        load_metric("top1@logits").value(outputs, {"a": targets["labels"], "b": targets["labels"]})
    with pytest.raises(InputError, match="no target 'x'"):
        load_metric("top1@logits:x").value(outputs, targets)


@pytest.mark.parametrize(
    ("name", "output", "labels", "message"),
    [
        ("top1", np.eye(3), [0, 1, 3], "label 3 is not a class"),
        ("top1", np.eye(3), [0, 1, -1], "negative label"),
        ("top5", np.eye(3), [0, 1, 2], "5 or more classes"),
        ("top1", np.eye(3), [0.5, 1, 2], "class numbers"),
        ("top1", np.ones((6, 3)), [0, 1, 2], "one row per label"),
        ("accuracy", np.ones((3, 2, 2)), [0, 1, 2], "does not hold class scores"),
    ],
)
def test_data_that_does_not_suit(name, output, labels, message):
    with pytest.raises(InputError, match=message):
        load_metric(name).value({"y": output}, {"labels": np.array(labels)})


def test_rows_per_sample():
    assert rows_per_sample({"y": np.ones((6, 2))}, {"t": np.ones(3)}) == (3, 2)
    assert rows_per_sample({"y": np.ones((6, 2))}, {}) == (6, 1)
    with pytest.raises(InputError, match="do not make"):
        rows_per_sample({"y": np.ones((7, 2))}, {"t": np.ones(3)})
    with pytest.raises(InputError, match="different lengths"):
        rows_per_sample({"y": np.ones((6, 2)), "z": np.ones(5)}, {"t": np.ones(3)})


def test_unknown_metric_lists_the_known():
    with pytest.raises(InputError, match="top1, top5, accuracy, f1, miou, cosine, sqnr, kl, detections, mAP"):
        load_metric("bleu")


def _file(tmp_path, body):
    path = tmp_path / "metric.py"
    path.write_text(body)
    return path


def test_metric_from_a_file(tmp_path):
    path = _file(
        tmp_path, "def score(outputs, targets):\n    return (outputs['y'][::2] * targets['t']).mean()\n"
    )
    metric = load_metric(f"{path}:score")
    assert metric.value({"y": np.arange(6.0)}, {"t": np.ones(3)}) == 2.0
    assert metric.per_sample is None
    before = metric.fingerprint
    path.write_text(path.read_text() + "\n# changed\n")
    assert load_metric(f"{path}:score").fingerprint != before
    assert before.endswith(":score")


def test_a_function_reads_arrays_and_lists(tmp_path):
    """Boxes of which each sample has its own number, beside an output that stacks; neither can be changed."""
    path = _file(
        tmp_path,
        "import numpy as np\n"
        "def score(outputs, targets):\n"
        "    boxes, count = outputs['boxes'], outputs['count']\n"
        "    assert isinstance(boxes, list) and isinstance(count, np.ndarray)\n"
        "    assert not any(array.flags.writeable for array in [*boxes, count, targets['found']])\n"
        "    return [len(b) == c == f for b, c, f in zip(boxes, count[:, 0], targets['found'])]\n",
    )
    boxes = [np.ones((n, 4)) for n in (2, 0, 3)]
    outputs = {"boxes": boxes, "count": np.array([[2], [1], [3]])}
    found = load_metric(f"{path}:score").scored(outputs, {"found": np.array([2, 1, 3])})
    assert found.value == pytest.approx(2 / 3)
    assert found.rows.tolist() == [1, 0, 1]


def test_labels_need_one_shape():
    lists = {"y": [np.ones((n, 4)) for n in (2, 3)]}
    with pytest.raises(InputError, match=r"'y' has another shape for each sample: \(2 to 3, 4\)"):
        load_metric("top1").value(lists, {"labels": np.zeros(2, int)})


def test_a_metrics_fingerprint_covers_the_users_modules_behind_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    (tmp_path / "inner_of_metric.py").write_text("FACTOR = 2.0\n")
    helpers = tmp_path / "helpers_of_metric"
    helpers.mkdir()
    (helpers / "__init__.py").write_text("")
    (helpers / "scores.py").write_text("from inner_of_metric import FACTOR\n")
    path = _file(
        tmp_path,
        "import numpy as np\n"
        "def score(outputs, targets):\n"
        "    from helpers_of_metric import scores\n"
        "    return scores.FACTOR * float(np.mean(outputs['y']))\n",
    )
    found = [load_metric(f"{path}:score").fingerprint]
    assert load_metric(f"{path}:score").fingerprint == found[0]
    for changed, text in (
        (tmp_path / "inner_of_metric.py", "FACTOR = 3.0\n"),
        (helpers / "scores.py", "FACTOR = 2.0\n"),
    ):
        changed.write_text(text)
        found.append(load_metric(f"{path}:score").fingerprint)
    assert len(set(found)) == 3
    (tmp_path / "unrelated.py").write_text("")
    assert load_metric(f"{path}:score").fingerprint == found[-1]


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("def score(o, t): raise RuntimeError('boom')", "RuntimeError: boom"),
        ("def score(o, t): return float('nan')", "nan"),
        ("def score(o, t): return 'good'", "'good'"),
        ("def score(o, t): return o['y'][:2]", "its shape is (2,), and there are 3 samples"),
        ("def score(o, t): return o['y'] * float('nan')", "[nan, nan, nan]"),
        ("def score(o, t):\n    o['y'][0] = 1\n    return 1.0", "read-only"),
        ("import not_there", "ModuleNotFoundError"),
        ("exit(3)", "SystemExit"),
        ("def other(): pass", "no function 'score'"),
    ],
)
def test_a_metric_that_fails_names_file_and_cause(tmp_path, body, cause):
    path = _file(tmp_path, body)
    with pytest.raises(InputError) as error:
        load_metric(f"{path}:score").value({"y": np.ones(3)}, {})
    assert cause in str(error.value)
    assert str(path) in str(error.value)


def test_the_divergence_of_one_class_would_always_be_none():
    one = {"y": np.ones((3, 1))}
    with pytest.raises(InputError, match="kl needs logits"):
        load_metric("kl").value(one, {}, one)


def test_missing_metric_file(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_metric(f"{tmp_path}/none.py:score")
