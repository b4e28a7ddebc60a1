"""The cheapest set of groups to leave out: against brute force, and with interactions."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixed import mixed_net
from nets import normal

import trtq
from trtq.budget import Budget
from trtq.calibration.calibrate import calibrate
from trtq.console import SILENT
from trtq.graph.place import leave_out
from trtq.graph.plan import NodePlan, Plan
from trtq.job import Job
from trtq.recipe import Recipe
from trtq.recovery.partial import Search, cheapest_set, given_away
from trtq.recovery.speed import speed_of
from trtq.simulation.simulator import Score, Simulator

GROUPS = "abcdefgh"
AMOUNT = st.integers(1, 1000).map(float)


def price(costs: dict[str, float], left_out: frozenset[str]) -> float:
    return sum(costs[group] for group in left_out)


def best_price(costs: dict[str, float], alone: dict[str, float], target: float) -> float:
    """By trying every set of groups whose noises add up."""
    sets = (frozenset(c) for n in range(len(costs) + 1) for c in combinations(costs, n))
    return min(price(costs, s) for s in sets if sum(alone[g] for g in costs if g not in s) <= target)


@given(
    costs=st.lists(AMOUNT, min_size=8, max_size=8),
    noises=st.lists(AMOUNT, min_size=8, max_size=8),
    share=st.floats(0.01, 1),
)
def test_the_target_holds_at_little_cost(costs: list[float], noises: list[float], share: float) -> None:
    cost, alone = dict(zip(GROUPS, costs, strict=True)), dict(zip(GROUPS, noises, strict=True))
    target = share * sum(noises)

    def noise(left_out: frozenset[str]) -> float:
        return sum(alone[group] for group in GROUPS if group not in left_out)

    found = cheapest_set(cost, alone, noise, target)
    assert noise(found) <= target
    for group in found:  # nothing can be put back
        assert noise(found - {group}) > target
    # Greedy by density is within one group of the best (the fractional knapsack bound).
    assert price(cost, found) <= best_price(cost, alone, target) + max(costs)


def test_nothing_is_left_out_where_nothing_must_be() -> None:
    assert cheapest_set({"a": 1.0}, {"a": 1.0}, lambda s: 1.0, target=1.0) == frozenset()


def test_all_is_left_out_where_nothing_else_holds() -> None:
    assert cheapest_set({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0}, lambda s: 5.0, 1.0) == {"a", "b"}


def test_a_cheap_group_goes_before_a_dear_one_that_makes_more_noise() -> None:
    costs, alone = {"dear": 100.0, "cheap": 1.0}, {"dear": 3.0, "cheap": 2.0}

    def noise(left_out: frozenset[str]) -> float:
        return sum(alone[group] for group in alone if group not in left_out)

    assert cheapest_set(costs, alone, noise, target=3.5) == {"cheap"}


def test_interactions_are_seen() -> None:
    """Alone `a` and `b` look harmless; together they make most of the noise, so one of them has to go."""
    costs = {"a": 1.0, "b": 1.0, "c": 50.0, "d": 50.0}
    alone = {"a": 0.1, "b": 0.1, "c": 1.0, "d": 1.0}

    def noise(left_out: frozenset[str]) -> float:
        kept = alone.keys() - left_out
        return sum(alone[g] for g in kept) + (10.0 if {"a", "b"} <= kept else 0.0)

    found = cheapest_set(costs, alone, noise, target=2.15)
    assert len(found) == 1
    assert found < {"a", "b"}


def test_groups_that_make_up_for_others_are_not_left_out() -> None:
    """Without `c` there is more noise, since it takes some of `a`'s and `d`'s away: behind it in the ranking
    nothing would hold."""
    costs = {"a": 1.0, "b": 2.0, "c": 1.5, "d": 9.0}
    alone = {"a": 4.0, "b": 2.0, "c": 3.0, "d": 1.0}

    def noise(left_out: frozenset[str]) -> float:
        kept = alone.keys() - left_out
        return 3.0 * ("a" in kept) + 2.0 * ("b" in kept) + ("d" in kept) + 5.0 * ("c" not in kept)

    for roughly in (True, False):
        assert cheapest_set(costs, alone, noise, 1.5, roughly=roughly) == {"a", "b"}


def test_each_set_is_measured_once() -> None:
    seen: list[frozenset[str]] = []
    costs = {group: float(i + 1) for i, group in enumerate(GROUPS)}

    def noise(left_out: frozenset[str]) -> float:
        seen.append(left_out)
        return float(len(GROUPS) - len(left_out))

    cheapest_set(costs, dict.fromkeys(GROUPS, 1.0), noise, target=4.0)
    assert len(seen) == len(set(seen))


def test_a_rough_set_holds_and_takes_few_runs_for_many_targets() -> None:
    random = np.random.default_rng(0)
    names = [f"g{number}" for number in range(64)]
    costs, alone = ({name: float(random.lognormal()) for name in names} for _ in range(2))
    seen: set[frozenset[str]] = set()

    def noise(left_out: frozenset[str]) -> float:
        seen.add(left_out)
        return sum(alone[group] for group in alone if group not in left_out)

    targets = [share * noise(frozenset()) for share in (0.5, 0.2, 0.3, 0.25, 0.27)]
    rough = [cheapest_set(costs, alone, noise, target, roughly=True) for target in targets]
    assert all(noise(found) <= target for found, target in zip(rough, targets, strict=True))
    assert len(seen) < 40
    for found, target in zip(rough, targets, strict=True):
        assert price(costs, cheapest_set(costs, alone, noise, target)) <= price(costs, found)


@pytest.mark.parametrize("allowed", range(12))
def test_what_holds_is_returned_when_the_time_is_over(allowed: int) -> None:
    calls = 0
    costs = {group: float(i + 1) for i, group in enumerate(GROUPS)}

    def noise(left_out: frozenset[str]) -> float:
        nonlocal calls
        calls += 1
        return float(len(GROUPS) - len(left_out))

    found = cheapest_set(costs, dict.fromkeys(GROUPS, 1.0), noise, 4.0, over=lambda: calls >= allowed)
    assert len(GROUPS) - len(found) <= 4.0


def searched(cache: Path, budget: Budget, gpu: str | None = None) -> Search:
    """Of the demo's network, which has residual additions and an average pooling."""
    demo = Path(trtq.__file__).parent / "demo"
    files = {"model": str(demo / "digits.onnx"), "data": str(demo / "calib.npz")}
    job = Job.open(Recipe(**files, method="max", cache=str(cache)), SILENT)
    start = calibrate(job, job.place())
    speed = None if gpu is None else speed_of(replace(job, recipe=replace(job.recipe, gpu=gpu)), start.plan)
    return Search(replace(job, budget=budget), start, job.key("sensitivity", start), speed=speed)


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Search:
    return searched(tmp_path_factory.mktemp("cache"), Budget())


@pytest.mark.parametrize("ratio", [0.95, 0.8, 0.5, 0.2, 0.02])
def test_inputs_that_cost_nothing_go_first(search: Search, ratio: float) -> None:
    everything = search.noise(frozenset())
    found = search.cheapest(ratio)
    left = frozenset(found.notes["left_out"])
    assert search.noise(left) <= ratio * everything
    assert left <= search.free or search.free <= left
    assert (search.noise(search.free) <= ratio * everything) == (left <= search.free)
    assert len(search.free) == 4  # three residual inputs and the pooling's


def test_no_set_is_run_again_for_another_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, seen, score = searched(tmp_path, Budget()), list[str](), Simulator.score

    def counting(self: Simulator, plan: Plan) -> Score:
        seen.append(" ".join(edge.node + str(edge.index) for edge in plan.edges))
        return score(self, plan)

    monkeypatch.setattr(Simulator, "score", counting)
    for ratio in (0.2, 0.3, 0.2):
        search.cheapest(ratio)
    assert len(seen) == len(set(seen)) > 0


@pytest.mark.parametrize("ratio", [0.8, 0.2, 0.02])
def test_what_is_found_roughly_holds_too(search: Search, ratio: float) -> None:
    rough, cheapest = search.cheapest(ratio, roughly=True), search.cheapest(ratio)
    assert search.left(cheapest) <= ratio
    assert search.left(rough) <= ratio
    assert search.price(cheapest) <= search.price(rough)
    assert search.left(search.leaving_out(frozenset())) == 1


@pytest.mark.parametrize("ratio", [0.8, 0.3, 0.05])
def test_by_latency_the_plan_is_the_one_that_was_measured(ratio: float, tmp_path: Path) -> None:
    """What is left out for noise and what for latency is written in two steps, and measured in one."""
    search = searched(tmp_path, Budget(), gpu="T4")
    found = search.cheapest(ratio)
    left = frozenset(found.notes["left_out"])
    assert search.noise(left) <= ratio * search.noise(frozenset())
    nodes = {node: "left out" for name in left for node in search.groups[name].nodes}
    whole = search.leaving_out(frozenset())
    joint = leave_out(whole.graph, whole.plan, nodes)
    assert found.plan.edges == joint.edges
    assert found.plan.weights == joint.weights
    assert {node.rule for node in found.plan.nodes if not node.int8} <= {"sensitive", "cost"}
    assert search.front()[-1][1].plan.int8_nodes == []


def test_a_spent_budget_leaves_the_search_incomplete(search: Search, tmp_path: Path) -> None:
    assert search.whole
    assert not searched(tmp_path, Budget(0.0)).whole


def test_layers_are_left_out_for_scores_that_boxes_drown(tmp_path: Path) -> None:
    """The boxes are good already: nothing of theirs goes into floating point for the sake of 10 dB more."""
    onnx.save(mixed_net(), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=normal(64, 16))
    files = {"model": str(tmp_path / "m.onnx"), "data": str(tmp_path / "x.npz")}
    job = Job.open(Recipe(**files, method="max", cache=str(tmp_path / "cache")), SILENT)
    start = calibrate(job, job.place())
    found = Search(job, start, job.key("sensitivity", start)).cheapest(0.1)
    assert list(found.notes["left_out"]) == ["cls"]


@pytest.mark.parametrize(
    ("macs", "expected"), [((60, 30, 10), 0.3), ((60, None, 10), 1 / 3), ((0, 0, 0), 0.0)]
)
def test_what_is_given_away_is_what_was_left_out_as_sensitive(
    macs: tuple[int | None, ...], expected: float
) -> None:
    rules = ("weighted", "sensitive", "excluded")
    nodes = [
        NodePlan(rule, "Conv", rule == "weighted", rule, "reason", each)
        for rule, each in zip(rules, macs, strict=True)
    ]
    assert given_away(Plan("hash", nodes, [], [])) == pytest.approx(expected)
