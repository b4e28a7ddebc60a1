from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from trtq.errors import ExitCode, InputError
from trtq.gate.decision import decide
from trtq.gate.in_the_way import InTheWay, Obstacle
from trtq.gate.metrics import Metric, load_metric
from trtq.gate.verdict import Check, Outcome, Verdict, overall
from trtq.memory import Function
from trtq.simulation.similarity import MAX_SQNR_DB
from trtq.simulation.values import stacked

TOP1 = load_metric("top1")


def classifier(right: int, wrong: int) -> dict[str, np.ndarray]:
    """Scores of two classes; the label of every sample is 0."""
    return {"y": np.array([[1.0, 0.0]] * right + [[0.0, 1.0]] * wrong)}


def verdict(ref, cand, labels=None, metric=TOP1, executor="simulation", **options) -> Verdict:
    targets = {"labels": np.zeros(len(ref["y"]), int) if labels is None else labels}
    return decide(ref, cand, targets, metric, executor=executor, **options)


def test_the_point_estimate_decides_without_confidence():
    found = verdict(classifier(200, 0), classifier(198, 2))
    assert found.outcome is Outcome.PASS  # exactly 1 %
    assert found.relative_drop == pytest.approx(0.01)
    assert verdict(classifier(200, 0), classifier(197, 3)).outcome is Outcome.FAIL
    assert found.reference == 1.0
    assert found.candidate == pytest.approx(0.99)


def test_a_gate_that_few_samples_cannot_decide_says_so():
    found = verdict(classifier(200, 0), classifier(199, 1))
    low, high = found.relative_interval
    assert low < 0.005 < 0.01 < high
    assert not found.proved
    assert found.samples_to_prove > 200
    assert "200 samples cannot decide this" in found.text()
    assert str(found.samples_to_prove) in found.text()


@pytest.mark.parametrize(
    ("lost", "outcome"), [(0, Outcome.PASS), (30, Outcome.INCONCLUSIVE), (90, Outcome.FAIL)]
)
def test_with_confidence_pass_and_fail_are_proved(lost, outcome):
    found = verdict(classifier(3000, 500), classifier(3000 - lost, 500 + lost), confidence=0.95)
    assert found.outcome is outcome
    assert found.proved is (outcome is Outcome.PASS)
    says = {Outcome.PASS: "prove a drop below 1 %", Outcome.FAIL: "prove a drop above 1 %"}
    assert says.get(outcome, "cannot decide") in found.text()


def test_samples_to_prove_is_enough():
    """Repeating the same samples up to the promised number does prove the claim; one round less not."""
    reference, candidate = classifier(900, 100), classifier(895, 105)
    few = verdict(reference, candidate, confidence=0.95)
    assert few.outcome is Outcome.INCONCLUSIVE
    times = -(-few.samples_to_prove // 1000)

    def repeated(times):
        return [{"y": np.tile(arrays["y"], (times, 1))} for arrays in (reference, candidate)]

    assert verdict(*repeated(times), confidence=0.95).outcome is Outcome.PASS
    assert verdict(*repeated(times - 1), confidence=0.95).outcome is Outcome.INCONCLUSIVE


@pytest.mark.parametrize("metric", ["cosine", "f1", "accuracy"])
def test_bootstrapped_metrics(metric):
    rng = np.random.default_rng(0)
    shape = (60, 6, 3)  # a sequence with a label per position
    reference = {"y": rng.normal(size=shape)}
    near = {"y": reference["y"] + rng.normal(0, 1e-3, shape)}
    far = {"y": reference["y"] + rng.normal(0, 1.5, shape)}
    labels = reference["y"].argmax(-1)
    labels[:, 0] = rng.integers(0, 3, 60)
    options = {"labels": labels, "metric": load_metric(metric), "confidence": 0.95, "max_drop": 0.05}
    assert verdict(reference, near, **options).outcome is Outcome.PASS
    assert verdict(reference, far, **options).outcome is Outcome.FAIL


def test_a_metric_that_adds_up_over_its_calls_is_refused():
    """Without a reset the candidate's number is that of both models together, and half its drop is gone."""
    counted = [0, 0]

    def running(outputs, targets):
        counted[0] += int((outputs["y"].argmax(axis=1) == targets["labels"]).sum())
        counted[1] += len(targets["labels"])
        return counted[0] / counted[1]

    with pytest.raises(InputError, match=r"gave 1 for the reference, and then 0\.995"):
        verdict(classifier(200, 0), classifier(197, 3), metric=load_metric(Function(running)))
    counted[:] = 0, 0
    assert verdict(classifier(200, 0), classifier(200, 0), metric=load_metric(Function(running))).passed


def test_a_metric_may_differ_by_rounding_from_call_to_call():
    random = np.random.default_rng(0)

    def rounded(outputs, targets):
        return float((outputs["y"].argmax(axis=1) == 0).mean()) * (1 + 1e-7 * random.normal())

    assert verdict(classifier(200, 0), classifier(199, 1), metric=load_metric(Function(rounded))).passed


def test_a_function_over_groups_of_rows(tmp_path):
    path = tmp_path / "metric.py"
    path.write_text(
        "import numpy as np\n"
        "def correlation(outputs, targets):\n"
        "    pairs = outputs['y'].reshape(-1, 2)\n"
        "    assert len(pairs) == len(targets['score'])\n"
        "    return np.corrcoef(pairs[:, 0] - pairs[:, 1], targets['score'])[0, 1]\n"
    )
    rng = np.random.default_rng(1)
    reference = {"y": rng.normal(size=(200, 1))}
    targets = {"score": reference["y"][::2, 0] - reference["y"][1::2, 0] + rng.normal(0, 0.3, 100)}
    candidate = {"y": reference["y"] + rng.normal(0, 1e-3, (200, 1))}
    metric = load_metric(f"{path}:correlation")
    found = decide(reference, candidate, targets, metric, confidence=0.95, executor="engine")
    assert found.outcome is Outcome.PASS
    assert found.samples == 100
    assert found == decide(reference, candidate, targets, metric, confidence=0.95, executor="engine")


def test_label_free_reference_scores_one():
    rows = {"y": np.random.default_rng(0).normal(size=(40, 8))}
    found = decide(rows, rows, {}, load_metric("cosine"), confidence=0.9, executor="simulation")
    assert found.reference == pytest.approx(1.0)
    assert found.outcome is Outcome.PASS


def test_nan_in_the_candidate_fails_and_is_named():
    candidate = classifier(10, 0)
    candidate["y"][7, 1] = np.nan
    found = verdict(classifier(10, 0), candidate)
    assert found.outcome is Outcome.FAIL
    assert found.candidate is None
    assert found.notes == ("output 'y' of the candidate is NaN or infinite in sample 7",)
    assert Verdict.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found
    assert "not measurable" in found.text()


def test_margins_that_mean_nothing():
    with pytest.raises(InputError, match="scores 0"):
        verdict(classifier(0, 10), classifier(10, 0))
    rows = classifier(10, 0)
    with pytest.raises(InputError, match="use cosine"):
        decide(rows, rows, {}, load_metric("sqnr@y"), executor="simulation")
    with pytest.raises(InputError, match="allowed drop"):
        verdict(rows, rows, max_drop=1.5)
    with pytest.raises(InputError, match="confidence"):
        verdict(rows, rows, confidence=95)


def test_json_round_trip_is_strict():
    found = verdict(classifier(50, 3), classifier(49, 4), confidence=0.9)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert Verdict.from_json(json.loads(text)) == found


P, F, N = Outcome.PASS, Outcome.FAIL, Outcome.INCONCLUSIVE


@pytest.mark.parametrize(
    ("outcomes", "one"),
    [((), P), ((P, P), P), ((P, N), N), ((N, P, F), F), ((F, N), F), ((N, N), N), ((F, P), F)],
)
def test_the_worst_decides(outcomes, one):
    assert overall(outcomes) is one


def with_gate(gate: Outcome) -> Verdict:
    lost, confidence = {P: (0, None), F: (9, None), N: (1, 0.95)}[gate]
    found = verdict(classifier(100, 0), classifier(100 - lost, lost), confidence=confidence)
    assert found.gate is gate
    return found


@pytest.mark.parametrize("gate", [P, F, N])
@pytest.mark.parametrize("checks", [(), (P,), (F,), (N,), (P, F), (N, F)])
def test_one_outcome_of_gate_and_checks(gate, checks):
    made = [Check(f"check {i}", outcome, f"--check{i}: found") for i, outcome in enumerate(checks)]
    found = with_gate(gate).with_checks(*made)
    assert found.outcome is (F if F in (gate, *checks) else N if N in (gate, *checks) else P)
    assert found.exit_code is found.outcome.exit_code
    assert found.headline().startswith(f"{found.outcome.value.upper()}  ")
    assert "\n" not in found.headline()
    stored = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (stored["outcome"], stored["gate"]) == (found.outcome.value, gate.value)
    assert Verdict.from_json(stored) == found
    for check in made:
        assert (check.message in found.headline()) is not check.ok
    assert ("the gate itself" in found.headline()) is (gate is not found.outcome)


def test_what_is_in_the_way_is_kept():
    obstacle = Obstacle(("a", "b"), "MatMul+MatMul", 12.0, 0.75, None)
    found = dataclasses.replace(
        with_gate(F), in_the_way=InTheWay("2 layers", (obstacle,), "--exclude a", "try")
    )
    stored = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert stored["in_the_way"]["obstacles"][0]["rank"] == 1
    assert Verdict.from_json(stored) == found
    assert "1. a, b (MatMul+MatMul): 12.0 dB alone, 75.0% of the noise" in found.text()
    assert "try: --exclude a" in found.text()


def test_a_file_of_the_time_of_the_gate_alone():
    stored = with_gate(F).to_json()
    old = {name: item for name, item in stored.items() if name not in ("gate", "checks", "in_the_way")}
    assert Verdict.from_json(old) == with_gate(F)


def test_a_file_with_two_answers_is_refused():
    with pytest.raises(InputError, match="contradicts itself"):
        Verdict.from_json(with_gate(F).to_json() | {"outcome": "pass"})


@pytest.mark.parametrize("gate", [P, F, N])
def test_a_simulation_is_neither_pass_nor_fail_where_an_engine_is_required(gate):
    found = with_gate(gate).with_checks(Check("SQNR", F, "--min-sqnr: too low")).require_engine()
    assert found.outcome is N
    assert found.gate is (P if gate is P else N)
    assert "--require-engine" in found.headline()
    assert found.with_checks(Check("share", F, "--min-int8: too little")).outcome is F


@pytest.mark.parametrize("value", [{}, [], None, {"outcome": "maybe"}])
def test_what_is_not_a_verdict(value):
    with pytest.raises(InputError, match="not a verdict"):
        Verdict.from_json(value)


def test_require_engine():
    rows = classifier(10, 0)
    simulated = verdict(rows, rows)
    assert simulated.exit_code is ExitCode.PASS
    strict = simulated.require_engine()
    assert strict.outcome is Outcome.INCONCLUSIVE
    assert strict.exit_code is ExitCode.INCONCLUSIVE
    assert "simulation" in strict.text()
    engine = verdict(rows, rows, executor="engine")
    assert engine.require_engine() == engine


def yolo() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Boxes with a little noise beside scores that are turned round."""
    rng = np.random.default_rng(0)
    reference = np.concatenate([rng.uniform(50, 640, (20, 4, 6)), rng.uniform(0, 1, (20, 8, 6))], axis=1)
    reference[0, 0, 0], reference[0, 4, 0] = 640, 1
    candidate = reference + rng.normal(0, 0.1, reference.shape)
    candidate[:, 4:] = 1 - reference[:, 4:]
    return {"y": reference}, {"y": candidate}


def test_scores_beside_boxes_cannot_be_broken_unseen():
    reference, candidate = yolo()
    found = decide(reference, candidate, {}, load_metric("cosine"), executor="simulation")
    assert found.outcome is Outcome.FAIL
    r, c = (side["y"][:, 4:] for side in (reference, candidate))
    expected = 10 * np.log10((r**2).sum() / ((r - c) ** 2).sum())
    assert found.outputs["y"].sqnr_db == pytest.approx(expected)
    lines = found.text().splitlines()
    (index,) = (i for i, line in enumerate(lines) if line.startswith("  output y:"))
    assert lines[index].endswith("(the worst of 2 components)")
    assert f"SQNR {expected:.1f} dB" in lines[index]
    assert lines[index + 1].startswith("    channels 0-3 of axis 1 (up to 640): cosine 1.00000, SQNR")
    assert lines[index + 2].startswith("    channels 4-11 of axis 1 (up to 1):")
    assert f"SQNR {expected:.1f} dB" in lines[index + 2]


def test_components_in_json():
    reference, candidate = yolo()
    found = decide(reference, candidate, {}, load_metric("cosine"), executor="simulation")
    value = found.to_json()
    assert json.loads(json.dumps(value, allow_nan=False)) == value  # nothing but JSON's own values
    assert Verdict.from_json(value) == found
    assert [part["label"] for part in value["outputs"]["y"]["parts"]] == [
        "channels 0-3 of axis 1 (up to 640)",
        "channels 4-11 of axis 1 (up to 1)",
    ]


def test_a_verdict_from_before_there_were_components():
    value = verdict(classifier(50, 3), classifier(49, 4)).to_json()
    assert value["outputs"]["y"].pop("parts") == []
    assert Verdict.from_json(value) == verdict(classifier(50, 3), classifier(49, 4))


def rows_of_boxes(*counts, seed=0):
    """Boxes of which each sample has its own number."""
    rng = np.random.default_rng(seed)
    return {"boxes": stacked([rng.uniform(1, 9, (count, 4)).astype(np.float32) for count in counts])}


@pytest.mark.parametrize(
    ("other", "noise", "outcome"),
    [
        (1, 0.0, Outcome.PASS),  # 1 % at worst
        (4, 0.0, Outcome.INCONCLUSIVE),  # 4 % at worst, and none at best
        (100, 0.0, Outcome.INCONCLUSIVE),
        (4, 3.0, Outcome.FAIL),  # what can be compared is too far off
    ],
)
def test_samples_of_another_shape_never_pass_by_silence(other, noise, outcome):
    counts = np.random.default_rng(1).integers(2, 7, 100)
    reference = rows_of_boxes(*counts)
    candidate = {"boxes": [row + np.float32(noise) * (-1) ** np.arange(4) for row in reference["boxes"]]}
    for i in range(other):
        candidate["boxes"][i] = candidate["boxes"][i][:-1]
    found = decide(reference, candidate, {}, load_metric("cosine"), max_drop=0.015, executor="simulation")
    assert found.outcome is outcome
    assert found.outputs["boxes"].not_compared == other
    assert f"{other} of 100 rows have another shape" in " ".join(found.notes)
    if noise == 0:
        assert found.candidate == pytest.approx(1 - other / 100)
    assert Verdict.from_json(found.to_json()) == found


def test_what_differs_by_the_number_of_boxes_alone_is_not_proved_either():
    counts = [2] * 60 + [3] * 40
    reference, candidate = rows_of_boxes(*counts), rows_of_boxes(*[2] * 60 + [4] * 40)
    candidate["boxes"][:60] = reference["boxes"][:60]
    options = {"confidence": 0.95, "executor": "simulation"}
    assert decide(reference, candidate, {}, load_metric("cosine"), **options).outcome is Outcome.INCONCLUSIVE


def test_a_candidate_that_finds_nothing_fails():
    reference = rows_of_boxes(*[2, 3] * 20)
    found = decide(
        reference, rows_of_boxes(*[0] * 40), {}, load_metric("cosine"), confidence=0.95, executor="simulation"
    )
    assert (found.outcome, found.candidate) == (Outcome.FAIL, 0.0)


def test_one_box_in_every_sample_is_still_a_list_of_boxes():
    """A model whose samples all have one box gives no axis of boxes, and its candidate does."""
    ones, some = rows_of_boxes(*[1] * 40), rows_of_boxes(*[1] * 38, 2, 0)
    some["boxes"][:38] = ones["boxes"][:38]
    found = decide({"boxes": ones["boxes"][:, 0]}, some, {}, load_metric("cosine"), executor="simulation")
    assert found.outputs["boxes"].not_compared == 2
    assert found.outputs["boxes"].sqnr_db == MAX_SQNR_DB
    assert found.candidate == pytest.approx(38 / 40)


@pytest.mark.parametrize("metric", ["cosine", "kl"])
def test_a_reference_of_zeros_alone_says_nothing(metric: str):
    """A model that is fed zeros, or finds nothing, would pass with whatever weights."""
    nothing = {"y": np.zeros((40, 3), np.float32)}
    with pytest.raises(InputError, match="the reference gives only zeros for any sample"):
        decide(nothing, nothing, {}, load_metric(metric), executor="simulation")
    one = {"y": np.eye(40, 3, dtype=np.float32)}
    assert decide(one, one, {}, load_metric(metric), executor="simulation").passed


def test_where_nothing_is_found_nothing_can_be_compared():
    empty = rows_of_boxes(0, 0, 0)
    with pytest.raises(InputError, match="nothing can be compared"):
        decide(empty, empty, {}, load_metric("cosine"), executor="simulation")


def test_priors_do_not_hide_what_happens_to_scores():
    """An output that is the same for every sample is exact: with it half of a drop would be forgiven."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 20))
    off = scores + rng.normal(0, 0.2, (50, 20))
    alone = decide({"s": scores}, {"s": off}, {}, load_metric("cosine"), executor="simulation")
    priors = np.tile(rng.normal(size=(1, 9, 4)), (50, 1, 1))
    beside = [{"priors": priors, "s": own} for own in (scores, off)]
    found = decide(*beside, {}, load_metric("cosine"), executor="simulation")
    assert (alone.outcome, found.candidate) == (Outcome.FAIL, alone.candidate)
    broken = {"priors": priors + np.arange(50)[:, None, None], "s": scores}
    assert decide(beside[0], broken, {}, load_metric("cosine"), executor="simulation").candidate < 0.9


@pytest.mark.parametrize("name", ["cosine", "kl"])
def test_rows_that_do_not_stack_score_as_each_does_alone(name):
    """Token sequences of every length, one sample for each two rows."""
    rng = np.random.default_rng(2)
    reference = [rng.normal(size=(length, 7)) for length in (3, 5, 2, 2, 9, 1)]
    candidate = [row + rng.normal(0, 0.3, row.shape) for row in reference]
    metric, targets = load_metric(name), {"t": np.zeros(3)}
    found = metric.rows({"y": candidate}, targets, {"y": reference})
    alone = [
        metric.value({"y": c[None]}, {}, {"y": r[None]}) for r, c in zip(reference, candidate, strict=True)
    ]
    if name == "kl":
        np.testing.assert_allclose(found, np.reshape(alone, (3, 2)).mean(axis=1))
    else:
        for own, i in zip(found, (0, 2, 4), strict=True):
            r, c = (np.concatenate([a.ravel() for a in side[i : i + 2]]) for side in (reference, candidate))
            assert own == pytest.approx(r @ c / np.linalg.norm(r) / np.linalg.norm(c))


def test_sequences_are_what_is_independent():
    """Of 60 sequences of 10, 30 lose one answer each; then 3 lose all of theirs: the same drop, less sure."""
    reference, starts = classifier(600, 0), range(0, 600, 10)
    spread, bunched = (classifier(600, 0)["y"] for _ in range(2))
    spread[:300:10] = bunched[:30] = [0.0, 1.0]
    options = {"max_drop": 0.1, "confidence": 0.95}
    one = verdict(reference, {"y": spread}, sequences=starts, **options)
    other = verdict(reference, {"y": bunched}, sequences=starts, **options)
    assert one.relative_drop == other.relative_drop == pytest.approx(0.05)
    assert (one.outcome, other.outcome) == (Outcome.PASS, Outcome.INCONCLUSIVE)
    assert verdict(reference, {"y": bunched}, **options).outcome is Outcome.PASS
    assert other.relative_interval[1] > one.relative_interval[1] + 0.02
    assert any("600 samples are 60 sequences" in note for note in other.notes)


@pytest.mark.parametrize("metric", ["f1", "cosine"])
def test_a_resample_is_of_whole_sequences(metric):
    """Samples that are all alike in their sequence: the interval is that of one sample of each."""
    random = np.random.default_rng(5)
    reference = random.normal(size=(50, 4))
    candidate = reference + random.normal(scale=0.3, size=(50, 4))
    labels = reference.argmax(axis=1)
    loaded, five = load_metric(metric), [array.repeat(5, axis=0) for array in (reference, candidate, labels)]
    few = verdict({"y": reference}, {"y": candidate}, labels, loaded)
    many = verdict({"y": five[0]}, {"y": five[1]}, five[2], loaded, sequences=range(0, 250, 5))
    np.testing.assert_allclose(many.relative_interval, few.relative_interval)


def test_a_function_is_called_on_whole_sequences():
    """Two rows make a sample; a sequence that begins within one goes on from the sequence before."""
    seen = []

    def function(outputs, targets):
        seen.append(outputs["y"][:, 0].astype(int).tolist())
        return np.float64(1)

    rows = {"y": np.arange(12.0)[:, None]}
    metric = Metric("m", "m", function=function)
    decide(rows, rows, {"t": np.zeros(6)}, metric, executor="simulation", sequences=[0, 4, 7, 10])
    whole = {0: [0, 1, 2, 3], 4: [4, 5, 6, 7, 8, 9], 10: [10, 11]}
    assert len(seen) > 100
    for call in seen[2:]:
        parts = [whole[row] for row in call if row in whole]
        assert call == [row for part in parts for row in part]
        assert len(parts) == 3
