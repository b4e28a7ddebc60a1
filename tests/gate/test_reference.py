"""A reference near chance is told from one that knows something, whatever the metric and the labels."""

from __future__ import annotations

import numpy as np
import pytest

from trtq.gate import reference
from trtq.gate.metrics import load_metric
from trtq.gate.reference import doubt


def doubted(metric: str, scores, labels) -> str | None:
    outputs, targets, loaded = {"y": np.asarray(scores)}, {"labels": np.asarray(labels)}, load_metric(metric)
    return doubt(loaded, outputs, targets, loaded.value(outputs, targets))


def predictions(labels: np.ndarray, right: float, classes: int, seed: int = 0) -> np.ndarray:
    """Scores that are right for this share of the samples and say any class for the others."""
    random = np.random.default_rng(seed)
    said = np.where(random.random(labels.shape) < right, labels, random.integers(0, classes, labels.shape))
    return np.eye(classes)[said]


LABELS = np.random.default_rng(1).integers(0, 10, 2000)


@pytest.mark.parametrize("metric", ["top1", "top5", "accuracy", "f1", "miou"])
@pytest.mark.parametrize("seed", range(3))
def test_guesses_are_doubted_and_knowledge_is_not(metric: str, seed: int) -> None:
    guessed = np.random.default_rng(seed).normal(size=(2000, 10))
    assert doubted(metric, guessed, LABELS)
    for right in (0.3, 0.6, 1.0):
        known = guessed + 9 * predictions(LABELS, right, 10, seed)
        assert doubted(metric, known, LABELS) is None, right


def test_the_figures_are_those_of_the_reference_and_of_chance() -> None:
    scores = predictions(LABELS, 0.0, 10)
    text = doubted("top1", scores, LABELS)
    value = np.mean(scores.argmax(axis=1) == LABELS)
    assert text.startswith(f"the reference scores {value:.4g} in top1 on 2000 samples, and 0.")
    chance = float(text.partition(" samples, and ")[2].partition(" with")[0])
    assert chance == pytest.approx(0.1, abs=0.01)  # of 10 classes that are about as frequent


def test_a_constant_answer_is_chance_though_it_is_mostly_right() -> None:
    labels = (np.arange(400) % 20 == 0).astype(int)  # 95 % are 0
    constant = np.tile([1.0, 0.0], (400, 1))
    assert "scores 0.95 in top1 on 400 samples, and 0.95 with" in doubted("top1", constant, labels)
    assert doubted("top1", predictions(labels, 0.98, 2), labels) is None


def test_two_classes_far_from_perfect_are_not_doubted() -> None:
    labels = np.random.default_rng(2).integers(0, 2, 500)
    assert doubted("accuracy", predictions(labels, 0.4, 2), labels) is None  # right for 70 %
    assert doubted("accuracy", predictions(labels, 0.0, 2), labels)


def test_a_few_samples_are_no_reason_for_doubt() -> None:
    labels = np.arange(6) % 3
    assert doubted("top1", np.eye(3)[labels], labels) is None
    assert doubted("top1", np.eye(3)[labels[:1]], labels[:1]) is None


def test_labels_of_one_class_are_named() -> None:
    text = doubted("accuracy", np.eye(4)[[3] * 8], [3] * 8)
    assert text.startswith("every label of the evaluation data is 3")
    images = np.full((4, 6, 6), 2)
    images[:, 0] = -1  # not scored
    assert "data is 2" in doubted("miou", np.moveaxis(np.eye(4)[np.maximum(images, 0)], -1, 1), images)


def test_segmentation() -> None:
    """The upper half is mostly one class: that much any image knows of any other."""
    random = np.random.default_rng(3)
    labels = random.integers(0, 3, (12, 8, 8))
    labels[:, :4] = np.where(random.random((12, 4, 8)) < 0.9, 0, labels[:, :4])
    good = np.moveaxis(predictions(labels, 0.7, 3), -1, 1)
    blind = np.moveaxis(
        np.eye(3)[np.broadcast_to(np.where(np.arange(8) < 4, 0, 1)[:, None], (12, 8, 8))], -1, 1
    )
    for metric in ("miou", "accuracy", "f1"):
        assert doubted(metric, good, labels) is None
        assert doubted(metric, blind, labels)


def test_metrics_without_labels_of_their_own_are_not_judged(tmp_path) -> None:
    (tmp_path / "own.py").write_text("def score(outputs, targets): return 0.01")
    outputs, targets = {"y": np.ones((9, 2))}, {"labels": np.zeros(9, int)}
    assert doubt(load_metric(f"{tmp_path}/own.py:score"), outputs, targets, 0.01) is None
    assert doubt(load_metric("cosine"), outputs, targets, 1.0) is None


def test_large_outputs_are_judged_by_a_part_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MOST_VALUES", 3000)  # 300 of the samples
    assert doubted("top1", predictions(LABELS, 0.0, 10), LABELS)
    assert doubted("top1", predictions(LABELS, 0.5, 10), LABELS) is None
