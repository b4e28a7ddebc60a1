"""The workflow: which steps follow calibration, what they achieve, and going on after an interruption."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from jobs import Case, save_case

from trtq import Deployment, Recipe, deploy
from trtq.console import Console
from trtq.errors import ExitCode
from trtq.gate.looks import MOST_LATER
from trtq.gate.verdict import Outcome, Verdict
from trtq.graph.plan import Plan
from trtq.recovery.workflow import LEAST_RATIO, MOST_GATES, MOST_REFINED, is_worse, noise_ratio
from trtq.simulation.similarity import Similarity


def verdict(drop: float | None, upper: float = 0.0, sqnr_db: float = 20.0, max_drop: float = 0.01) -> Verdict:
    return Verdict(
        gate=Outcome.FAIL,
        metric="top1",
        reference=1.0,
        candidate=None if drop is None else 1 - drop,
        relative_drop=drop,
        absolute_drop=drop,
        max_drop=max_drop,
        relative_interval=None if drop is None else (2 * drop - upper, upper),
        absolute_interval=None,
        confidence=None,
        proved=False,
        samples=100,
        samples_to_prove=None,
        executor="simulation",
        outputs={"y": Similarity(1.0, sqnr_db, 0.0)},
        worst_samples=(),
    )


@pytest.mark.parametrize(("drop", "upper"), [(0.02, 0.03), (0.1, 0.11), (0.012, 0.05), (0.011, 0.011)])
@pytest.mark.parametrize("confidence", [None, 0.95])
def test_the_noise_to_keep_solves_the_model_of_the_drop(
    drop: float, upper: float, confidence: float | None
) -> None:
    ratio = noise_ratio(verdict(drop, upper), None, confidence)
    error = (upper - drop) * (1 if confidence else 0.5)
    assert 0 < ratio <= 0.9
    if LEAST_RATIO < ratio < 0.9:
        assert drop * ratio + error * math.sqrt(ratio) == pytest.approx(0.01)


def test_without_an_interval_the_drop_alone_says_how_much_noise_to_keep() -> None:
    attempt = dataclasses.replace(verdict(0.04), relative_interval=None)
    assert noise_ratio(attempt, None, None) == pytest.approx(0.25)


def test_the_noise_to_keep_reaches_the_sqnr_asked_for() -> None:
    assert noise_ratio(verdict(-0.01, -0.005, sqnr_db=20.0), 26.0, None) == pytest.approx(10**-0.6)
    assert noise_ratio(verdict(-0.01, -0.005, sqnr_db=20.0), None, None) == 1.0


def test_what_cannot_be_measured_asks_for_much_less_noise() -> None:
    assert noise_ratio(verdict(None), None, None) == 1 / 16
    assert noise_ratio(verdict(1.0, 1.0), 300.0, None) == LEAST_RATIO


@pytest.mark.parametrize(
    ("drop", "other", "worse"),
    [(0.29, 0.1, True), (0.105, 0.1, False), (0.1, 0.29, False), (None, 0.1, True), (0.1, None, False)],
)
def test_fixed_outputs_may_decide_worse(drop: float | None, other: float | None, worse: bool) -> None:
    assert is_worse(verdict(drop, sqnr_db=17.0), verdict(other, sqnr_db=12.0)) is worse


class Log(Console):
    """Keeps what was said; interrupts the job when `stop` is."""

    def __init__(self, stop: str | None = None) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []
        self._stop = stop

    def say(self, label: str, text: str) -> None:
        self.lines.append(f"{label}: {text}")
        if label == self._stop:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Three layers; a channel of the second's input is 200 times as large as the others and hardly used."""
    random = np.random.default_rng(0)
    x = gs.Variable("x", np.float32, ["N", 16])
    graph = gs.Graph(opset=17, inputs=[x])

    def layer(name: str, value: gs.Variable, weight: np.ndarray, op: str | None) -> gs.Variable:
        shape = ["N", weight.shape[1]]
        bias = gs.Constant(f"{name}_bias", random.normal(size=weight.shape[1]).astype(np.float32))
        made = gs.Variable(f"{name}_out", np.float32, shape)
        weights = gs.Constant(f"{name}_weight", weight.astype(np.float32))
        graph.nodes.append(gs.Node("Gemm", name, {}, [value, weights, bias], [made]))
        if op is None:
            return made
        active = gs.Variable(f"{name}_active", np.float32, shape)
        graph.nodes.append(gs.Node(op, f"{name}_{op}", {}, [made], [active]))
        return active

    wide, narrow = random.normal(size=(16, 32)), random.normal(size=(32, 24))
    wide[:, 0] *= 200
    narrow[0] *= 1e-3
    hidden = layer("first", x, wide, "Elu")
    hidden = layer("second", hidden, narrow, "Relu")
    graph.outputs = [layer("third", hidden, random.normal(size=(24, 8)), None)]
    data = random.normal(size=(96, 16)).astype(np.float32)
    return save_case(graph, tmp_path_factory.mktemp("hard"), {"x": data})


def run(case: Case, output: Path, console: Console | None = None, **options: object) -> Deployment:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    recipe = Recipe(
        model=str(case.model),
        data=str(case.data),
        eval=str(case.data),
        metric="cosine",
        output=str(output),
        method="max",
        rest="fp32",
        cache=str(output.parent / "cache"),
    )
    return deploy(dataclasses.replace(recipe, **options), console=console or Log())  # type: ignore[arg-type]


def sqnr_db(done: Deployment) -> float:
    return min(output.sqnr_db for output in done.verdict.outputs.values())


def test_nothing_follows_a_pass(hard: Case, tmp_path: Path) -> None:
    done = run(hard, tmp_path / "out", max_drop="90%")
    assert [attempt.step for attempt in done.attempts] == ["calibrate"]


def test_nothing_follows_where_nothing_may(hard: Case, tmp_path: Path) -> None:
    done = run(hard, tmp_path / "out", min_sqnr=60.0, recover="none")
    assert [attempt.step for attempt in done.attempts] == ["calibrate"]
    assert done.exit_code is ExitCode.FAIL


def test_no_more_candidates_follow_than_share_the_error() -> None:
    """Both searches, which may try all that is free as well; calibration without fixes, `fix`, `learn`, every
    layer, and floating point alone; and of each of up to nine attempts the same with the rest in float32."""
    searches, steps, attempts = 2 * (MOST_GATES + 1 + MOST_REFINED), 5, 9
    assert searches + steps + attempts <= MOST_LATER


def test_a_confidence_is_shared_by_all_that_may_be_tried(hard: Case, tmp_path: Path) -> None:
    asked = {"max_drop": "50%", "confidence": 0.95}
    alone = run(hard, tmp_path / "alone", recover="none", **asked).verdict
    assert (alone.confidence, [note for note in alone.notes if "share" in note]) == (0.95, [])
    first = run(hard, tmp_path / "first", **asked).verdict
    assert first.confidence == pytest.approx(0.96)
    assert first.notes[-1].startswith("judged at 96 %: all candidates that this job may try")
    assert first.outcome is alone.outcome is Outcome.PASS


@pytest.mark.slow
def test_what_is_tried_later_is_judged_by_more_and_says_so(hard: Case, tmp_path: Path) -> None:
    plain = run(hard, tmp_path / "plain", min_sqnr=60.0, recover="none")
    options = {"min_sqnr": sqnr_db(plain) + 10, "recover": "partial"}
    proved = run(hard, tmp_path / "proved", confidence=0.95, **options).verdict
    assert proved.confidence == pytest.approx(1 - 0.01 / MOST_LATER)
    assert "judged at 99.98 %" in proved.notes[-1]
    estimated = run(hard, tmp_path / "estimated", **options).verdict
    assert any("others were judged on these samples before it" in note for note in estimated.notes)
    assert estimated.outcome is Outcome.PASS


@pytest.mark.slow
def test_partial_leaves_out_what_makes_the_noise(hard: Case, tmp_path: Path) -> None:
    plain = run(hard, tmp_path / "plain", min_sqnr=60.0, recover="none")
    wanted = sqnr_db(plain) + 10
    done = run(hard, tmp_path / "out", min_sqnr=wanted, recover="partial")
    assert [attempt.step for attempt in done.attempts] == ["calibrate", "partial"]
    assert done.exit_code is ExitCode.PASS
    assert sqnr_db(done) >= wanted
    left_out = {node.name: node for node in done.plan.nodes if not node.int8}
    assert left_out.keys() == {"second"}
    assert left_out["second"].rule == "sensitive"
    assert "dB" in left_out["second"].reason
    assert {node.name for node in done.coverage.int8} == {"first", "third"}
    record = json.loads((tmp_path / "out" / "workflow.json").read_text())
    assert [step["kept"] for step in record] == [False, True]
    assert Plan.load(tmp_path / "out" / "plan.json") == done.plan


@pytest.mark.slow
def test_what_partial_gives_away_is_recorded_and_warned_of(hard: Case, tmp_path: Path) -> None:
    plain = run(hard, tmp_path / "plain", min_sqnr=60.0, recover="none")
    options = {"min_sqnr": sqnr_db(plain) + 10, "recover": "partial"}
    share = 32 * 24 / (16 * 32 + 32 * 24 + 24 * 8)
    done = run(hard, tmp_path / "out", **options)
    record = json.loads((tmp_path / "out" / "workflow.json").read_text())
    assert [step["given_away"] for step in record] == [0, pytest.approx(share)]
    (warning,) = [text for text in done.verdict.warnings if "--partial-limit" in text]
    assert "'partial' gives away 52.2% of the multiply-accumulates" in warning
    assert "52.2%" in (tmp_path / "out" / "report.html").read_text()
    allowed = run(hard, tmp_path / "allowed", partial_limit="60%", **options)
    assert not [text for text in allowed.verdict.warnings if "--partial-limit" in text]


@pytest.mark.slow
def test_learning_comes_first_where_partial_gives_away_too_much(hard: Case, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    plain = run(hard, tmp_path / "plain", min_sqnr=60.0, recover="none")
    done = run(hard, tmp_path / "out", min_sqnr=sqnr_db(plain) + 10, recover="partial,learn")
    record = json.loads((tmp_path / "out" / "workflow.json").read_text())
    assert [step["step"] for step in record[:3]] == ["calibrate", "partial", "learn"]
    assert record[1]["note"].startswith("set aside: it would give away 52.2% of the multiply-accumulates")
    assert record[1]["outcome"] is None
    assert done.exit_code is ExitCode.PASS  # by learning, or by what was set aside


def test_partial_does_not_go_below_the_share(hard: Case, tmp_path: Path) -> None:
    done = run(hard, tmp_path / "out", min_sqnr=60.0, min_int8="100%", recover="partial")
    assert [attempt.step for attempt in done.attempts] == ["calibrate"]
    assert done.exit_code is ExitCode.FAIL
    assert len(done.plan.int8_nodes) == 3
    steps = json.loads((tmp_path / "out" / "workflow.json").read_text())
    assert [(step["step"], step["outcome"]) for step in steps] == [("calibrate", "fail"), ("partial", None)]
    assert steps[1]["note"] == "no layer can be left out with 100.0% in INT8"
    assert steps[1]["note"] in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_a_set_that_does_not_pass_is_kept_where_it_is_better(hard: Case, tmp_path: Path) -> None:
    for output in ("out", "again"):  # the second from the cache
        done = run(hard, tmp_path / output, min_sqnr=120.0, recover="partial")
        assert [attempt.step for attempt in done.attempts] == ["calibrate", "partial"]
        assert done.exit_code is ExitCode.FAIL
        assert done.best is done.attempts[1]
        before, after = (attempt.verdict.lowest_sqnr_db for attempt in done.attempts)
        assert after > before
        record = json.loads((tmp_path / output / "workflow.json").read_text())
        assert [step["kept"] for step in record] == [False, True]
        assert record[1]["note"].startswith(
            "no set of layers brings the outputs close enough; the best tried"
        )
        assert f"{after:.1f} dB" in record[1]["note"]
        assert record[1]["in_the_way"]["obstacles"][0]["nodes"] == ["second"]


@pytest.mark.slow
def test_learning_helps_with_every_layer_in_int8(hard: Case, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    done = run(hard, tmp_path / "out", min_sqnr=80.0, min_int8="100%", recover="learn")
    assert [attempt.step for attempt in done.attempts] == ["calibrate", "learn"]
    before, after = done.attempts
    gain = [min(o.sqnr_db for o in attempt.verdict.outputs.values()) for attempt in (before, after)]
    assert gain[1] > gain[0] + 1
    assert done.best is after
    assert len(done.plan.int8_nodes) == 3


@pytest.mark.slow
def test_an_interrupted_job_goes_on_from_its_last_step(hard: Case, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(hard, tmp_path / "out", Log(stop="engine"), min_sqnr=80.0, recover="fix")
    assert not (tmp_path / "out").exists()
    log = Log()
    done = run(hard, tmp_path / "out", log, min_sqnr=80.0, recover="fix")
    assert "calibration: max, from the cache; nothing was run" in log.lines
    again = run(hard, tmp_path / "other" / "out", min_sqnr=80.0, recover="fix")
    assert done.table.scales == again.table.scales
    int8 = [(folder / "model.int8.onnx").read_bytes() for folder in (done.folder, again.folder)]
    assert int8[0] == int8[1]


def test_a_spent_budget_ends_the_workflow(hard: Case, tmp_path: Path) -> None:
    log = Log()
    done = run(hard, tmp_path / "out", log, min_sqnr=80.0, budget="0.001s")
    assert [attempt.step for attempt in done.attempts] == ["calibrate"]
    assert any("the budget is spent" in line for line in log.lines)
    record = json.loads((tmp_path / "out" / "workflow.json").read_text())
    assert [step["step"] for step in record] == ["calibrate", "fix", "partial", "learn"]
    assert {step["note"] for step in record[1:]} == {"not tried: the budget was spent"}


def test_a_required_engine_does_not_set_off_recovery(hard: Case, tmp_path: Path) -> None:
    done = run(hard, tmp_path / "out", max_drop="90%", require_engine=True)
    assert [attempt.step for attempt in done.attempts] == ["calibrate"]
    assert done.exit_code is ExitCode.INCONCLUSIVE


@pytest.mark.slow
def test_labels_are_not_ignored_after_learning_without(hard: Case, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    data = tmp_path / "labelled.npz"
    with np.load(hard.data) as arrays:
        rows = len(next(iter(arrays.values())))
        np.savez(data, **arrays, label=np.zeros(rows, np.int64))
    options = {"data": str(data), "min_sqnr": 80.0, "min_int8": "100%", "recover": "learn"}
    without = run(hard, tmp_path / "out", **options)
    labelled = run(hard, tmp_path / "labelled", labels="label", **options)
    assert labelled.attempts[1].quantization.sha256 != without.attempts[1].quantization.sha256


@pytest.mark.slow
def test_a_search_is_not_made_twice(hard: Case, tmp_path: Path) -> None:
    run(hard, tmp_path / "out", min_sqnr=45.0, recover="partial")
    log = Log()
    run(hard, tmp_path / "again", log, min_sqnr=45.0, recover="partial")
    assert "partial: from the cache; nothing was run" in log.lines


def test_a_fix_is_no_other_builders_and_no_other_precisions(hard: Case, tmp_path: Path) -> None:
    """Where scales are inserted is decided by the kernels of the builder's engine, or by a rule without one;
    and what float16 cannot hold is looked for only where there is some."""
    said = []
    for number, options in enumerate(
        [{"backend": "none"}, {"backend": "none"}, {"backend": "none", "rest": "fp16"}, {}]
    ):
        log = Log()
        run(hard, tmp_path / f"out{number}", log, min_sqnr=90.0, recover="fix", **options)
        said.append("fix: from the cache; nothing was run" in log.lines)
    assert said == [False, True, False, False]
