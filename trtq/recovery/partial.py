"""Partial quantization: the cheapest groups of nodes to leave in floating point (paper section 5.1).

The search goes by the noise of the outputs, the mean over them of sum (r - c)² / sum r². It needs no labels,
and where quantizers do not interact it is the sum of what each group adds alone, so that a ranking is a good
start. What counts as cheap is microseconds where something tells what layers cost (`trtq.recovery.front`),
else multiply-accumulates in floating point, not layers.

Of an output that mixes scales the noise is that of its worst component, not the mean of them: layers are left
in floating point for what stands in the way, not for components that are good already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from trtq.cache import Key
from trtq.calibration.calibrate import effort_of_step
from trtq.cost.placement import Latencies, spared_input
from trtq.data.samples import Samples
from trtq.graph.groups import Group, groups
from trtq.graph.place import SPARING, leave_out
from trtq.graph.plan import BY_COST, Plan
from trtq.graph.quantization import Quantization
from trtq.job import Job
from trtq.recovery.front import Corner, Front
from trtq.recovery.sensitivity import measured
from trtq.recovery.speed import Speed, rest_of
from trtq.simulation.similarity import decibels
from trtq.simulation.simulator import Simulator

Noise = Callable[[frozenset[str]], float]
"""Groups left in floating point -> noise of the outputs with all others in INT8."""


def cheapest_set(
    costs: Mapping[str, float],
    alone: Mapping[str, float],
    noise: Noise,
    target: float,
    over: Callable[[], bool] = lambda: False,
    *,
    roughly: bool = False,
) -> frozenset[str]:
    """Groups to leave in floating point so that the noise is at most `target`, at little cost.

    1. Rank the groups by the noise they make alone, and bisect how many of the first to leave out; and by
       that per cost, and take one after the other, without those that only add noise, as they make up for
       what others do. More left out is not always less noise, so
    2. put groups back, the dearest first, while the target still holds.
    3. Rank all groups again by what they change now, with the others as they are (interactions show only
       there), and bisect and put back again; of all sets found the cheapest is taken.

    Args:
        costs: group -> cost of leaving it out, > 0.
        alone: group -> noise with this group alone in INT8.
        noise: is called once for every set.
        target: with all groups left out the noise must be within it.
        over: no further set is tried once this is true; what holds so far is returned.
        roughly: only what is taken one after the other in step 1, which takes few sets, and mostly the same
            for another target.
    """
    sets = _Sets(costs, noise, target, over)
    if roughly:
        return sets.one_by_one(alone)
    found = [sets.put_back(first) for first in sets.firsts(alone)]
    best = min(found, key=sets.price)
    if best and len(best) < len(costs) and not over():
        now: dict[str, float] = {}
        for group in costs:
            if over():
                return best
            now[group] = sets.noise(best - {group}) - sets.noise(best | {group})
        found.append(sets.put_back(sets.fewest({group: now[group] / costs[group] for group in costs})))
    return min([best, *found], key=sets.price)


class _Sets:
    """Sets of groups to leave out, each measured once; the arguments are those of `cheapest_set`."""

    def __init__(
        self, costs: Mapping[str, float], noise: Noise, target: float, over: Callable[[], bool]
    ) -> None:
        self._costs, self._target, self._over = costs, target, over
        self.noise: Noise = functools.cache(noise)

    def holds(self, left_out: frozenset[str]) -> bool:
        return len(left_out) == len(self._costs) or self.noise(left_out) <= self._target

    def price(self, left_out: frozenset[str]) -> tuple[float, int]:
        return sum(self._costs[group] for group in left_out), len(left_out)

    def firsts(self, alone: Mapping[str, float]) -> list[frozenset[str]]:
        """Sets that hold: by the noise that groups make alone, and by that per cost."""
        return [self.fewest(alone), self.one_by_one(alone)]

    def one_by_one(self, alone: Mapping[str, float]) -> frozenset[str]:
        """Groups that hold, those first that make most noise alone per cost, as far as each lowers the noise,
        and again until none does; the fewest of the first where that does not lead to the target."""
        worth = {name: alone[name] / self._costs[name] for name in alone}
        ranking = sorted(worth, key=lambda name: (-worth[name], name))
        left_out, least, before = frozenset[str](), self.noise(frozenset()), -1
        while before < len(left_out):
            before = len(left_out)
            for group in ranking:
                if least <= self._target:
                    return left_out
                if self._over():
                    return self.fewest(worth)
                if group not in left_out and (noise := self.noise(left_out | {group})) < least:
                    left_out, least = left_out | {group}, noise
        return self.fewest(worth)

    def fewest(self, worth: Mapping[str, float]) -> frozenset[str]:
        """The fewest groups that hold, of those most worth leaving out."""
        ranking = sorted(worth, key=lambda group: (-worth[group], group))
        few, many = 0, len(ranking)
        while few < many and not self._over():
            middle = (few + many) // 2
            if self.holds(frozenset(ranking[:middle])):
                many = middle
            else:
                few = middle + 1
        return frozenset(ranking[:many])

    def put_back(self, left_out: frozenset[str]) -> frozenset[str]:
        """The set less the groups, the dearest first, without which it still holds."""
        for group in sorted(left_out, key=lambda g: (-self._costs[g], g)):
            if self._over():
                break
            if self.holds(left_out - {group}):
                left_out -= {group}
        return left_out


FEWEST_ROWS, MOST_ROWS = 8, 64
MAC_BUDGET, RUNS_PER_GROUP = 2e12, 3
"""The noise is measured on as many rows, evenly spread over those to fit on, as let this many runs for each
group fit into this many multiply-accumulates, within those bounds: one for the noise that it makes alone, and
in `cheapest_set` one for what it changes and about one to try it in and out."""


def rows_to_search(job: Job, start: Quantization) -> Samples:
    """The calibration rows that the noise of a quantization's groups is measured on."""
    runs = RUNS_PER_GROUP * len(groups(start.graph, start.plan))
    affordable = MAC_BUDGET / max(runs * start.plan.macs_per_row, 1)
    return job.parts[0].spread(int(min(max(affordable, FEWEST_ROWS), MOST_ROWS)))


def is_searchable(job: Job, start: Quantization) -> bool:
    """Whether there is time to measure every group alone, each with a model of its own."""
    effort, runs = effort_of_step(job, start), RUNS_PER_GROUP * len(groups(start.graph, start.plan))
    return effort.takes("partial", runs * effort.quantized(0))


class Search:
    """Partial quantization of one quantization, on the job's calibration data.

    The residual inputs of additions and the inputs of average poolings are groups of their own: in floating
    point they cost no multiply-accumulates, only the traffic that INT8 spares, so they are the first to go.

    Attributes:
        groups: name -> group, in the order of the plan, those inputs last.
        alone: name -> noise of the outputs with this group alone in INT8.
        free: the names of those inputs.
        whole: whether all groups were measured before the budget was spent.

    Args:
        start: what to leave nodes out of.
        key: what the groups' noises are cached by; what an interrupted run has measured is not run again.
        speed: what engines cost, where as little of that as can be is to be lost, not multiply-accumulates.
    """

    def __init__(self, job: Job, start: Quantization, key: Key, *, speed: Speed | None = None) -> None:
        self._start, self._budget = start, job.budget
        self._known: dict[frozenset[str], float] = {}
        self._simulator = Simulator(
            start,
            rows_to_search(job, start),
            teacher=job.model.graph,
            workers=job.recipe.threads,
            ignore_nonfinite=job.recipe.ignore_nonfinite,
        )
        effects = measured(self._simulator, "only", job.cache, key, job.console, self._over)
        self.groups = {effect.group.name: effect.group for effect in effects}
        nodes = dict.fromkeys(start.plan.int8_nodes, "left out to measure")
        least = self._simulator.score(leave_out(start.graph, start.plan, nodes)).noise
        self.alone = {effect.group.name: max(effect.noise - least, 0.0) for effect in effects}
        self._costs = {name: float(group.macs or 1) for name, group in self.groups.items()}
        self._everything = self.noise(frozenset())
        spared = {edge.node: edge.rule for edge in start.plan.edges if edge.rule in SPARING}
        for node, rule in spared.items():
            if self._over():
                break
            name = spared_input(node, rule)
            self.groups[name] = Group(name, (node,), rule, 0)
            self._costs[name] = 1.0
            self.alone[name] = max(self._everything - self.noise(frozenset([name])), 0.0)
        self.free = frozenset(self.groups) - {effect.group.name for effect in effects}
        self.whole = len(self.groups) == len(groups(start.graph, start.plan)) + len(spared)
        self._front: Front | None = None
        if speed is not None and self.whole:
            latencies = Latencies(start.graph, start.plan, speed.source, rest_of(job.recipe))
            self._front = Front(latencies, self.alone, self.noise, self._over)

    def _over(self) -> bool:
        return self._budget.over

    def cheapest(self, ratio: float, *, roughly: bool = False) -> Quantization:
        """The start with the cheapest groups in floating point that leave `ratio` of its noise, or less; of
        all sets measured so far, for whatever ratio.

        Needs a `whole` search.

        Args:
            roughly: with a few groups too many, found in a fraction of the runs.
        """
        target = ratio * self._everything
        if self._front is not None:
            return self.leaving_out(self._front.fastest(target))
        if self.free and self.noise(self.free) <= target:
            among, always = self.free, frozenset[str]()
        else:
            among, always = frozenset(self.groups) - self.free, self.free
        costs, alone = ({name: by[name] for name in by if name in among} for by in (self._costs, self.alone))
        found = cheapest_set(
            costs, alone, lambda s: self.noise(s | always), target, self._over, roughly=roughly
        )
        holding = [left_out for left_out, noise in self._known.items() if noise <= target]
        return self.leaving_out(min([found | always, *holding], key=self._price))

    def left(self, found: Quantization) -> float:
        """The share of the start's noise that a set of groups leaves."""
        return self.noise(frozenset(found.notes["left_out"])) / self._everything

    def price(self, found: Quantization) -> tuple[float, int]:
        """What a set of groups costs, the less, the better."""
        return self._price(frozenset(found.notes["left_out"]))

    def _price(self, left_out: frozenset[str]) -> tuple[float, int]:
        return sum(self._costs[name] for name in left_out), len(left_out)

    def front(self) -> list[tuple[Corner, Quantization]]:
        """The corners of the front of latency and noise, the fastest first; none without costs."""
        corners = [] if self._front is None else self._front.corners
        return [(corner, self.leaving_out(corner.left_out)) for corner in corners]

    def first(self, count: int) -> Quantization:
        """The start without the `count` groups that alone make the most noise per multiply-accumulate."""
        ranking = sorted(self.groups, key=lambda name: -self.alone[name] / self._costs[name])
        return self.leaving_out(frozenset(ranking[:count]))

    def __len__(self) -> int:
        return len(self.groups)

    def noise(self, left_out: frozenset[str]) -> float:
        """Noise of the outputs with a set of groups left in floating point; each is run once."""
        if left_out not in self._known:
            plan = self._plan(left_out, lambda name: "left out to measure")
            self._known[left_out] = self._simulator.score(plan).noise
        return self._known[left_out]

    def leaving_out(self, left_out: frozenset[str]) -> Quantization:
        """The start with some groups in floating point; its notes say which and why."""
        slower = {} if self._front is None else self._front.slower_in_int8(left_out)
        reasons = {name: self._reason(name) for name in self.groups if name in left_out} | slower
        plan = self._plan(left_out - slower.keys(), self._reason)
        by_cost = {node: reason for name, reason in slower.items() for node in self.groups[name].nodes}
        plan = leave_out(self._start.graph, plan, by_cost, rule=BY_COST)
        return replace(self._start, plan=plan, notes={**self._start.notes, "left_out": reasons})

    def _plan(self, left_out: frozenset[str], reason: Callable[[str], str]) -> Plan:
        nodes = {node: reason(name) for name in left_out for node in self.groups[name].nodes}
        return leave_out(self._start.graph, self._start.plan, nodes)

    def _reason(self, name: str) -> str:
        alone = float(decibels(np.float64(1.0), np.float64(self.alone[name])))
        nodes = self.groups[name].nodes
        whole = "it" if len(nodes) == 1 else f"the group {', '.join(nodes)}"
        return f"sensitive: with {whole} alone in INT8 the outputs have {alone:.1f} dB"


def given_away(plan: Plan) -> float:
    """Share of the multiply-accumulates (of the nodes, where those are not known) that partial quantization
    left in floating point."""
    left_out = [node for node in plan.nodes if node.rule == "sensitive"]
    if any(node.macs is None for node in plan.nodes):
        return len(left_out) / len(plan.nodes)
    total = sum(node.macs or 0 for node in plan.nodes)
    return sum(node.macs or 0 for node in left_out) / total if total else 0.0
