"""References with NaN and infinities: refused with output and row, or compared where they are finite."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trtq.data.batches import Batch
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.gate.decision import decide
from trtq.gate.metrics import load_metric
from trtq.gate.verdict import Outcome, Verdict
from trtq.graph.inputs import InputSpec
from trtq.simulation.finite import check_reference, compared, first_not_finite, ignored, with_references

ROWS = Samples(
    "rows.npz",
    (InputSpec("x", np.dtype(np.float32), ("N", 1)),),
    {"x": np.zeros((12, 1), np.float32)},
    {},
    "0" * 64,
)


def test_the_first_place_that_is_not_finite():
    outputs = {"a": np.ones((2, 2)), "b": np.array([0, 1, np.inf, np.nan])}
    assert first_not_finite(outputs) == ("b", 2)
    assert first_not_finite({"ids": np.arange(3)}) is None
    assert first_not_finite(outputs, {"a": np.ones((2, 2)), "b": np.array([0, 0, -np.inf, 0])}) == ("b", 3)
    assert first_not_finite(outputs, outputs) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_reference_is_refused_with_output_and_row(value):
    y = np.zeros((5, 3), np.float32)
    y[3:, 1] = value
    with pytest.raises(InputError) as caught:
        check_reference({"x": np.ones(5), "y": y})
    assert caught.value.problem == "output 'y' of the reference is NaN or infinite in row 3"
    assert caught.value.cause == "2 of 15 values are, in 2 rows"
    assert "--ignore-nonfinite" in caught.value.remedy


def test_rows_are_numbered_as_the_source_does():
    rows = ROWS.subset([2, 5, 7, 11])
    y = np.array([[0.0], [0.0], [np.nan], [0.0]])
    with pytest.raises(InputError, match="in row 7") as caught:
        check_reference({"y": y}, samples=rows)
    assert caught.value.file == "rows.npz"
    with pytest.raises(InputError, match="in row 11"):  # the batch's second row
        check_reference({"y": y[1:3]}, samples=rows, batch=Batch({}, 2, 2, 0))
    with pytest.raises(InputError, match="in row 7"):  # an output with two entries for each row
        check_reference({"y": np.array([0, np.nan, 0, 0])}, samples=rows, batch=Batch({}, 2, 2, 0))
    with pytest.raises(InputError, match="in row 11"):  # two copies of the last row fill the batch up
        check_reference({"y": np.array([0, 0, 0, np.nan])}, samples=rows, batch=Batch({}, 2, 2, 2))


def test_a_row_without_any_finite_value_is_always_refused():
    some, none = np.array([[1.0, np.nan]] * 3), np.array([[1.0, 0.0], [np.nan, np.inf]])
    check_reference({"y": some}, ignore_nonfinite=True)
    with pytest.raises(InputError, match="in row 1, all of it"):
        check_reference({"y": none}, ignore_nonfinite=True)


@settings(deadline=None)
@given(arrays(np.float32, (4, 3)), arrays(np.float32, (4, 3)))
def test_both_sides_are_filled_where_the_reference_is_not_finite(reference, candidate):
    filled = compared(reference, candidate, 7)
    for given_array, array in zip((reference, candidate), filled, strict=True):
        assert array.dtype == np.float32
        for index in np.ndindex(4, 3):
            expected = given_array[index] if np.isfinite(reference[index]) else 7
            np.testing.assert_equal(array[index], expected)
    taken = with_references({"y": reference}, {"y": candidate})["y"]
    np.testing.assert_array_equal(taken, np.where(np.isfinite(reference), candidate, reference))


def judged(reference, candidate, metric="cosine", labels=None, **options) -> Verdict:
    targets = {} if labels is None else {"labels": np.array(labels)}
    reference, candidate = ({"y": np.array(side, np.float32)} for side in (reference, candidate))
    options = {"ignore_nonfinite": True, **options}
    return decide(reference, candidate, targets, load_metric(metric), executor="simulation", **options)


@settings(deadline=None)
@given(
    arrays(np.float32, (4, 5), elements=st.floats(-10, 10, width=32)),
    arrays(np.bool_, (4, 5)),
    st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_figures_are_those_of_the_finite_values_alone(values, broken, value):
    """SQNR and cosine, by hand in float64, whatever the candidate holds elsewhere."""
    values, broken[:, 0] = np.where(np.abs(values) < 0.1, 1.0, values).astype(np.float32), False
    found = judged(np.where(broken, value, values), np.where(broken, 123.0, 1.25 * values + 0.5))
    r = np.where(broken, 0.0, values.astype(np.float64))
    c = np.where(broken, 0.0, (1.25 * values + 0.5).astype(np.float64))
    sqnr = 10 * np.log10((r**2).sum() / ((r - c) ** 2).sum())
    assert found.outputs["y"].sqnr_db == pytest.approx(sqnr, abs=1e-3)
    cosines = (r * c).sum(axis=1) / np.sqrt((r**2).sum(axis=1) * (c**2).sum(axis=1))
    assert found.candidate == pytest.approx(cosines.mean(), abs=1e-5)
    assert found.reference == pytest.approx(1.0)
    text = f"output 'y': {broken.sum()} of 20 values are not finite in the reference and were not compared"
    assert (text in found.notes) == bool(broken.any())


def test_it_has_to_be_asked_for():
    with pytest.raises(InputError, match="'y' of the reference is NaN or infinite in row 1"):
        judged([[1, 2], [1, np.nan]], [[1, 2], [1, 2]], ignore_nonfinite=False)
    plain = judged([[1, 2], [3, 4]], [[1, 2], [3, 4]], ignore_nonfinite=False)
    assert plain.outcome is Outcome.PASS
    assert plain == judged([[1, 2], [3, 4]], [[1, 2], [3, 4]])
    assert not ignored({"y": np.ones(3), "ids": np.arange(3)})


@pytest.mark.parametrize("metric", ["cosine", "kl"])
def test_a_candidate_that_is_not_finite_elsewhere_fails(metric):
    reference = [[1, 2, -np.inf], [3, 1, -np.inf]]
    assert judged(reference, reference, metric).outcome is Outcome.PASS
    assert judged(reference, [[1, 2, 0], [3, 1, np.nan]], metric).outcome is Outcome.PASS
    found = judged(reference, [[1, 2, 0], [np.nan, 1, 0]], metric)
    assert found.outcome is Outcome.FAIL
    assert found.worst_samples == (1,)


def test_kl_is_that_of_the_classes_that_are_left():
    reference = np.array([[1.0, 2.0, -np.inf], [0.5, -1.0, -np.inf]])
    candidate = np.array([[1.5, 2.0, 9.0], [0.5, 1.0, -np.inf]])
    p, q = (np.exp(a[:, :2]) / np.exp(a[:, :2]).sum(axis=1, keepdims=True) for a in (reference, candidate))
    expected = np.exp(-(p * np.log(p / q)).sum(axis=1)).mean()
    assert judged(reference, candidate, "kl").candidate == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("metric", ["top1", "accuracy", "f1"])
def test_labels_see_masked_classes_as_the_reference_has_them(metric):
    """The class at -inf is never chosen, though the candidate has it highest and 0 would beat the others."""
    reference = [[-1, -2, -np.inf]] * 3 + [[-2, -1, -np.inf]] * 3
    candidate = [[-1, -2, 5]] * 3 + [[-2, -1, 5]] * 3
    found = judged(reference, candidate, metric, [0, 0, 0, 1, 1, 1])
    assert (found.reference, found.candidate) == (1, 1)


@pytest.mark.parametrize("metric", ["top1", "accuracy"])
def test_nan_is_never_the_highest_score(metric):
    """A comparison with NaN is false, so it would be ahead of all others."""
    scores = [[np.nan, 1, 2]] * 2 + [[1, 2, np.nan]] * 2
    found = judged(scores, scores, metric, [0, 2, 1, 2])
    assert found.reference == 0.5


def test_probabilities_are_told_from_logits_by_the_finite_ones():
    scores = [[0.3], [0.6], [0.7], [0.2]]
    reference = {"y": np.array([[0.3, 0.6], [0.7, np.nan]], np.float32)}
    metric = load_metric("accuracy")
    assert metric.value(reference, {"labels": np.array([[0, 1], [1, 0]])}) == 1.0
    assert judged(scores, scores, "accuracy", [0, 1, 1, 0]).reference == 1.0
