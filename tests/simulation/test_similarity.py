"""Similarity against hand-worked values and Polygraphy's own comparison functions."""

from __future__ import annotations

import numpy as np
import pytest

from trtq.errors import InputError
from trtq.simulation.similarity import (
    MAX_SQNR_DB,
    Reference,
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


def test_one_value_has_no_angle():
    """1 - e²/2 of the error relative to the reference's: what the cosine of small errors is."""
    reference = np.array([[3.0], [4.0], [5.0]])
    rms = np.sqrt(50 / 3)
    found = cosine(reference, reference + np.array([[0.5], [0.0], [-1.0]]), samples=3)
    np.testing.assert_allclose(found, [1 - 0.5**2 / rms**2 / 2, 1, 1 - 1 / rms**2 / 2])
    np.testing.assert_allclose(cosine(reference, 10 * reference, samples=3), -1)
    many = np.random.default_rng(0).normal(size=(1, 1000))
    angle = cosine(many, many + 0.1 * np.roll(many, 1))[0]
    single = cosine(many.T, many.T + 0.1 * np.roll(many, 1).T, samples=1000).mean()
    assert single == pytest.approx(angle, abs=1e-3)
    assert cosine(np.zeros((2, 1)), np.array([[0.0], [1.0]]), samples=2).tolist() == [1, 0]


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
        ({"y": np.ones(2)}, {"y": np.ones(3)}, "2 rows.*3, each"),
        ({"y": np.ones((2, 3))}, {"y": np.ones((2, 3, 1, 1))}, r"2 rows, each \(3,\).*2, each \(3, 1, 1\)"),
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


def mixed(rows: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Reference and candidate: boxes that are nearly exact beside scores that are not."""
    random = np.random.default_rng(0)
    reference = np.concatenate([random.uniform(50, 640, (rows, 4, 9)), random.uniform(0, 1, (rows, 8, 9))], 1)
    candidate = reference.copy()
    candidate[:, :4] += random.normal(0, 1, (rows, 4, 9))
    candidate[:, 4:] += random.normal(0, 0.5, (rows, 8, 9))
    return reference, candidate


def by_hand(reference: np.ndarray, candidate: np.ndarray) -> tuple[float, float]:
    """Cosine and SQNR in dB of all values together."""
    r, c = reference.ravel(), candidate.ravel()
    return float(r @ c / np.sqrt((r @ r) * (c @ c))), float(10 * np.log10(r @ r / ((r - c) @ (r - c))))


def test_the_worst_component_decides() -> None:
    reference, candidate = mixed()
    found = compare({"y": reference}, {"y": candidate})["y"]
    boxes, scores = by_hand(reference[:, :4], candidate[:, :4]), by_hand(reference[:, 4:], candidate[:, 4:])
    assert by_hand(reference, candidate)[1] > scores[1] + 30  # what one sum of squares says
    assert (found.cosine, found.sqnr_db) == pytest.approx(scores)
    assert found.max_abs_error == np.abs(reference - candidate).max()
    assert [(part.cosine, part.sqnr_db) for part in found.parts] == [
        pytest.approx(boxes),
        pytest.approx(scores),
    ]
    assert [part.max_abs_error for part in found.parts] == [
        np.abs(reference - candidate)[:, own].max() for own in (slice(4), slice(4, 12))
    ]
    assert sqnr_db(reference, candidate) == pytest.approx(scores[1])
    assert cosine(reference, candidate) == pytest.approx(scores[0])


def test_of_each_sample_the_worst_component() -> None:
    reference, candidate = mixed()
    candidate[3, :4] += 400
    expected = [
        min(by_hand(r[:4], c[:4])[1], by_hand(r[4:], c[4:])[1])
        for r, c in zip(reference, candidate, strict=True)
    ]
    np.testing.assert_allclose(sqnr_db(reference, candidate, samples=12), expected)
    assert worst_samples({"y": reference}, {"y": candidate}, 12) == tuple(np.argsort(expected)[:5])


def test_a_plain_output_keeps_its_figure_to_the_last_digit() -> None:
    random = np.random.default_rng(1)
    reference = random.normal(size=(20, 30)).astype(np.float32)
    candidate = (reference + random.normal(0, 0.03, (20, 30))).astype(np.float32)
    r, c = reference.reshape(1, -1), candidate.reshape(1, -1)

    def energy(values: np.ndarray) -> np.float64:
        return np.einsum("ij,ij->i", values, values, dtype=np.float64)[0]

    found = compare({"y": reference}, {"y": candidate})["y"]
    assert found.sqnr_db == 10 * (np.log10(energy(r)) - np.log10(energy(r - c)))
    dot = np.einsum("ij,ij->i", r, c, dtype=np.float64)[0]
    assert found.cosine == dot / (np.sqrt(energy(r)) * np.sqrt(energy(c)))
    assert found.parts == ()


def test_noise_is_the_mean_over_outputs_of_the_worst_components() -> None:
    reference, candidate = mixed()
    plain, off = np.ones((12, 5)), np.full((12, 5), 1.1)
    batches = [{"y": reference[i : i + 5], "z": plain[i : i + 5]} for i in (0, 5, 10)]
    found = [{"y": candidate[i : i + 5], "z": off[i : i + 5]} for i in (0, 5, 10)]
    worst = 10 ** (-by_hand(reference[:, 4:], candidate[:, 4:])[1] / 10)
    measured = Reference(batches)
    assert measured.noise(found) == pytest.approx((worst + 0.01) / 2)
    assert measured.sqnr_db(found) == pytest.approx(-10 * np.log10((worst + 0.01) / 2))
    first = 10 ** (-by_hand(reference[:5, 4:], candidate[:5, 4:])[1] / 10)
    assert measured.noise(found[:1]) == pytest.approx((first + 0.01) / 2)


def test_noise_that_is_none_or_not_finite() -> None:
    reference = mixed()[0]
    broken = np.where(reference > 600, np.nan, reference)
    assert Reference([{"y": reference}]).noise([{"y": reference}]) == 0
    assert Reference([{"y": reference}]).sqnr_db([{"y": reference}]) == MAX_SQNR_DB
    assert Reference([{"y": reference}]).sqnr_db([{"y": broken}]) == -MAX_SQNR_DB


def test_only_the_reference_decides_on_the_components() -> None:
    """A candidate that mixes scales, or mixes them no more, is measured like any other."""
    reference, _ = mixed()
    plain = np.random.default_rng(2).normal(size=reference.shape)
    lost = np.where(np.arange(12)[:, None] < 4, 0.5, reference)
    assert compare({"y": reference}, {"y": lost})["y"].parts[1].sqnr_db == MAX_SQNR_DB
    assert compare({"y": plain}, {"y": reference})["y"].parts == ()
