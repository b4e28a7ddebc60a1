"""Similarity against hand-worked values and Polygraphy's own comparison functions."""

from __future__ import annotations

import numpy as np
import pytest

from trtq.errors import InputError
from trtq.gate.similarity import (
    MAX_SQNR_DB,
    check_comparable,
    compare,
    cosine,
    overall_sqnr_db,
    scored,
    sqnr_db,
    worst_samples,
)


def test_by_hand():
    reference, candidate = np.array([3.0, 4.0]), np.array([3.0, 3.5])
    assert sqnr_db(reference, candidate)[0] == pytest.approx(20.0)
    assert cosine(reference, candidate)[0] == pytest.approx(23 / (5 * np.hypot(3, 3.5)))


def test_edges():
    zero, one = np.zeros(3), np.ones(3)
    assert sqnr_db(one, one)[0] == MAX_SQNR_DB
    assert sqnr_db(zero, one)[0] == -MAX_SQNR_DB
    assert sqnr_db(zero, zero)[0] == MAX_SQNR_DB
    assert [cosine(zero, zero)[0], cosine(zero, one)[0], cosine(one, -one)[0]] == pytest.approx([1, 0, -1])


def test_per_sample_blocks():
    reference = np.array([[1.0], [1.0], [2.0], [0.0]])
    candidate = np.array([[1.0], [1.0], [2.0], [0.2]])
    np.testing.assert_allclose(sqnr_db(reference, candidate, samples=2), [MAX_SQNR_DB, 20.0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.bool_])
def test_dtypes(dtype):
    reference = np.array([[1, 0, 1], [1, 1, 0]]).astype(dtype)
    found = compare({"y": reference}, {"y": np.ones((2, 3), dtype)})["y"]
    assert found.max_abs_error == 1
    assert found.sqnr_db == pytest.approx(10 * np.log10(4 / 2))


def test_agrees_with_polygraphy():
    from polygraphy.comparator import IterationResult
    from polygraphy.comparator import compare as functions

    if not hasattr(functions, "SnrCompareFunc"):
        pytest.skip("this Polygraphy has no SnrCompareFunc")
    rng = np.random.default_rng(0)
    reference = {"y": rng.normal(size=(20, 30)).astype(np.float32)}
    candidate = {"y": (reference["y"] + rng.normal(0, 0.03, (20, 30))).astype(np.float32)}
    ours = compare(reference, candidate)["y"]
    pair = IterationResult(reference), IterationResult(candidate)
    assert functions.SnrCompareFunc()(*pair)["y"].snr == pytest.approx(ours.sqnr_db, rel=1e-5)
    assert functions.CosineSimilarityCompareFunc()(*pair)["y"].cosine_similarity == pytest.approx(ours.cosine)
    assert functions.SimpleCompareFunc()(*pair)["y"].max_absdiff == pytest.approx(ours.max_abs_error)


def test_worst_samples_are_ordered_and_never_exact():
    reference = {"a": np.ones((5, 4)), "b": np.ones((5, 1))}
    candidate = {"a": reference["a"].copy(), "b": reference["b"].copy()}
    candidate["a"][3] += 0.1
    candidate["b"][1] += 0.5
    assert worst_samples(reference, candidate, 5) == (1, 3)


@pytest.mark.parametrize(
    ("reference", "candidate", "message"),
    [
        ({}, {}, "no outputs"),
        ({"y": np.ones((0, 2))}, {"y": np.ones((0, 2))}, "no outputs"),
        ({"y": np.ones(2)}, {"z": np.ones(2)}, "no output 'y'"),
        ({"y": np.ones(2)}, {"y": np.ones(3)}, r"\(2,\).*\(3,\)"),
        ({"y": np.array([1, np.nan])}, {"y": np.ones(2)}, "row 1"),
    ],
)
def test_what_cannot_be_compared(reference, candidate, message):
    with pytest.raises(InputError, match=message):
        check_comparable(reference, candidate)


def test_an_exact_output_does_not_hide_the_noise_of_another() -> None:
    assert overall_sqnr_db([40.0]) == pytest.approx(40.0)
    assert overall_sqnr_db([40.0, MAX_SQNR_DB]) == pytest.approx(40.0 + 10 * np.log10(2))
    assert overall_sqnr_db([40.0, 20.0]) == pytest.approx(-10 * np.log10((1e-4 + 1e-2) / 2))
    assert overall_sqnr_db([MAX_SQNR_DB]) == MAX_SQNR_DB


def test_noise_is_measured_on_floats() -> None:
    classes, logits = np.arange(3), np.ones((3, 2), np.float32)
    assert scored({"class": classes, "logits": logits}) == ["logits"]
    assert scored({"class": classes}) == ["class"]
