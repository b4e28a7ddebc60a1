"""What the interval of a user's metric costs: how often it is called, and what few draws may claim."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from trtq.console import Console
from trtq.errors import InputError
from trtq.gate.decision import decide, score_reference
from trtq.gate.intervals import Units, bootstrap_evidence
from trtq.gate.metrics import Metric, load_metric
from trtq.gate.resampling import FEWEST, Resampling
from trtq.gate.verdict import Outcome, Verdict

COUNTED = """
import numpy as np
calls = []

def right(outputs, targets):
    calls.append(len(targets["labels"]))
    return outputs["y"].argmax(axis=1) == targets["labels"]

def share(outputs, targets):
    return right(outputs, targets).mean()

def twice(outputs, targets):
    return 2 * share(outputs, targets)
twice.per_sample = lambda outputs, targets: 2.0 * right(outputs, targets)

def another(outputs, targets):
    return share(outputs, targets)
another.per_sample = twice.per_sample

def curve(outputs, targets):
    if len(set(targets["labels"])) < 5:
        raise ValueError("it needs all classes")
    return share(outputs, targets)

def by_place(outputs, targets):  # reads labels of its own, so resamples make no sense
    return max((outputs["y"].argmax(axis=1) == OWN).mean(), 0.5)

def spread(outputs, targets):
    return float("inf") if not np.ptp(outputs["y"]) else 1.0

def wrong_length(outputs, targets):
    return 1.0
wrong_length.per_sample = lambda outputs, targets: right(outputs, targets)[1:]
"""


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    (tmp_path / "metrics.py").write_text(COUNTED)
    return tmp_path / "metrics.py"


LABELS = np.random.default_rng(0).integers(0, 5, 60)


def scores(wrong: int) -> dict:
    """Outputs that are right but for the first few."""
    found = np.eye(5, dtype=np.float32)[LABELS]
    found[:wrong] = np.roll(found[:wrong], 1, axis=1)
    return {"y": found}


def judged(metric: Metric, wrong: int = 3, **options) -> Verdict:
    targets = {"labels": LABELS}
    return decide(scores(1), scores(wrong), targets, metric, executor="simulation", **options)


def calls(metric: Metric) -> list[int]:
    """Of the metric's file: how many labels each had."""
    return sys.modules["trtq_script_metrics"].calls


def test_values_of_each_sample_need_no_further_calls(metrics: Path) -> None:
    """The verdict is that of the built-in metric which computes the same."""
    metric = load_metric(f"{metrics}:right")
    found, built_in = judged(metric), judged(load_metric("accuracy"))
    assert calls(metric) == [60, 60, 60]  # reference, candidate, and whether it gives the same again
    assert found.relative_interval == built_in.relative_interval
    assert (found.candidate, found.draws) == (built_in.candidate, None)
    known = score_reference(scores(1), {"labels": LABELS}, metric)
    assert judged(metric, scored=known) == found
    assert len(calls(metric)) == 6


def test_an_attribute_gives_the_values_of_each_sample(metrics: Path) -> None:
    found = judged(load_metric(f"{metrics}:twice"))
    assert (found.reference, found.candidate) == pytest.approx((2 * 59 / 60, 2 * 57 / 60))
    assert found.draws is None
    with pytest.raises(Exception, match="did not return one number for each sample") as caught:
        judged(load_metric(f"{metrics}:wrong_length"))
    assert "its shape is (59,), and there are 60 samples" in str(caught.value)


def test_values_of_each_sample_have_to_belong_to_the_metric(metrics: Path) -> None:
    with pytest.raises(InputError, match="'per_sample' of the metric 'another'") as caught:
        judged(load_metric(f"{metrics}:another"))
    assert "the mean is 1.96667, and the metric 0.983333" in str(caught.value)


def test_resamples_that_cannot_be_scored_are_left_out(metrics: Path) -> None:
    """Of 25 samples, some resamples miss one of five classes; few do of all."""
    few = {"labels": np.arange(25) % 5}
    outputs = {"y": np.eye(5, dtype=np.float32)[few["labels"]]}
    found = decide(outputs, outputs, few, load_metric(f"{metrics}:curve"), executor="simulation")
    left_out = int(next(note for note in found.notes if "cannot score" in note).split()[4])
    assert left_out / 1000 == pytest.approx(5 * 0.8**25, abs=0.02)
    assert found.relative_interval == (0, 0)
    rare = {"labels": np.array([0, 1, 2, 3] + 36 * [4])}  # one of four is nearly always missing
    outputs = {"y": np.eye(5, dtype=np.float32)[rare["labels"]]}
    metric = load_metric(f"{metrics}:curve")
    found = decide(outputs, outputs, rare, metric, executor="simulation", confidence=0.95)
    assert found.outcome is Outcome.INCONCLUSIVE


def test_resamples_prove_nothing_that_the_samples_contradict(metrics: Path) -> None:
    metric = load_metric(f"{metrics}:by_place")
    sys.modules["trtq_script_metrics"].OWN = LABELS
    found = judged(metric, 20, confidence=0.95)
    assert found.relative_drop == pytest.approx(19 / 59)
    assert not found.proved
    assert found.outcome is not Outcome.PASS


def test_a_candidate_whose_metric_is_no_number_fails(metrics: Path) -> None:
    metric = load_metric(f"{metrics}:spread")
    flat = {"y": np.ones((60, 5), np.float32)}
    found = decide(scores(1), flat, {"labels": LABELS}, metric, executor="simulation")
    assert (found.outcome, found.candidate) == (Outcome.FAIL, None)
    assert found.notes == (f"{metric.name} of the candidate is no number: inf",)
    assert Verdict.from_json(found.to_json()) == found
    with pytest.raises(InputError, match="did not return a number"):
        decide(flat, scores(1), {"labels": LABELS}, metric, executor="simulation")


def test_one_number_is_resampled_unless_nobody_asks(metrics: Path) -> None:
    metric = load_metric(f"{metrics}:share")
    found = judged(metric)
    assert found.draws == 1000
    assert len(calls(metric)) == 3 + 2 * 1000
    per_sample = judged(load_metric(f"{metrics}:twice"))  # 10,000 resamples
    assert found.relative_interval == pytest.approx(per_sample.relative_interval, abs=0.02)
    metric = load_metric(f"{metrics}:share")
    without = judged(metric, resampling=None)
    assert calls(metric) == [60, 60, 60]
    assert (without.relative_interval, without.draws, without.outcome) == (None, 0, found.outcome)
    assert Verdict.from_json(without.to_json()) == without


def slow(seconds: float) -> Metric:
    def function(outputs, targets):
        time.sleep(seconds)
        return np.mean(outputs["y"].argmax(axis=1) == targets["labels"])

    return Metric("slow", "slow", function=function)


def test_a_slow_metric_is_resampled_less_and_says_so() -> None:
    found = judged(slow(0.005), resampling=Resampling(seconds=0.3))
    assert found.draws is not None
    assert FEWEST <= found.draws <= 40
    assert found.relative_interval is not None
    (note,) = [note for note in found.notes if "one call of the metric takes" in note]
    assert f"{found.draws} resamples were drawn, 1000 are usual" in note
    assert any(line.endswith(", rough") for line in found.details())
    full = judged(slow(0.0))
    assert found.relative_interval == pytest.approx(full.relative_interval, abs=0.05)


@pytest.mark.parametrize("confidence", [None, 0.95])
def test_what_is_too_slow_to_be_resampled_proves_nothing(confidence: float | None) -> None:
    resampling = Resampling(seconds=0.01, longest=0.05)
    found = judged(slow(0.01), 1, confidence=confidence, resampling=resampling)
    assert found.draws == 0
    assert not found.proved
    assert found.outcome is (Outcome.PASS if confidence is None else Outcome.INCONCLUSIVE)
    assert any("no interval was resampled" in note for note in found.notes)


def test_progress_is_shown(capsys: pytest.CaptureFixture) -> None:
    class Counted(Console):
        def _lines(self, label, total, unit):
            print(label, total, unit)
            return print

    judged(slow(0.0), resampling=Resampling(Counted()))
    shown = capsys.readouterr().out.split()
    assert shown[:3] == ["resample", "1000", "draw"]
    assert shown[3:] == ["1"] * 1000


@pytest.mark.parametrize("draws", [60, 100, 400])
def test_few_draws_prove_less_and_never_more(draws: int) -> None:
    """Of margins whose exact bound is just 0, more than 5 % are not taken for proved."""
    rng = np.random.default_rng(1)
    reference = np.ones(draws)
    bound = 1.6448536269514722
    proved = [
        bootstrap_evidence(
            reference, 0.99 + 0.001 * (bound + rng.normal(size=draws)), 1, Units.each(99), 0.01, 0.95
        ).proved
        for _ in range(600)
    ]
    assert np.mean(proved) <= 0.08
    clear = [0.99 + 0.001 * (bound + 2 + rng.normal(size=draws)) for _ in range(100)]
    assert (
        np.mean([bootstrap_evidence(reference, own, 1, Units.each(99), 0.01, 0.95).proved for own in clear])
        > 0.9
    )
    assert not bootstrap_evidence(reference[:20], np.ones(20), 1, Units.each(99), 0.01, 0.95).proved
