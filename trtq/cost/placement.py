"""The fastest placement: which units of a plan pay in INT8, transitions counted.

A unit is what goes to floating point together: a group of nodes, or an input that only spares traffic. What
one unit costs depends on its neighbours, because a reformat stands wherever INT8 meets floating point: one
layer alone hardly ever pays where a whole chain does. Flipping units one at a time therefore stops far from
the fastest placement. Here all units are flipped at once:

1. Around a placement, what flipping each unit changes is asked of the source of costs, and what flipping two
   neighbours changes beyond that. A sum of such terms is an energy of pairs, and where flipping both is never
   dearer than each alone, as with reformats that vanish, its minimum is a minimum cut of a small graph.
2. The source says what that set of flips really changes. Where it is no gain, its connected parts are tried
   alone. From what was gained it goes on, until nothing is.

It begins at all units in INT8 and at none, and the better end counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations, pairwise, product

import onnx_graphsurgeon as gs

from trtq.cost.interface import CostSource, Latency, Rest
from trtq.graph.groups import groups
from trtq.graph.place import SPARING, leave_out
from trtq.graph.plan import Plan

MOST_ROUNDS = 20
"""How often the terms are asked for again around a better placement."""

MOST_TOGETHER = 8
"""Of more units that read what one writes, only consecutive ones count as neighbours."""

LEAST_GAIN = 1e-6
"""Microseconds that are none: figures of a model are sums of rounded ones."""

Units = Mapping[str, tuple[str, ...]]
"""Name -> its nodes: those of a group, or the one addition or pooling whose input is meant."""


def units_of(graph: gs.Graph, plan: Plan) -> dict[str, tuple[str, ...]]:
    """The units of a plan: its groups, and the inputs that only spare traffic."""
    found = {group.name: group.nodes for group in groups(graph, plan)}
    spared = [edge for edge in plan.edges if edge.rule in SPARING]
    return found | {spared_input(edge.node, edge.rule): (edge.node,) for edge in spared}


def spared_input(node: str, rule: str) -> str:
    """The name of the unit that is an input of an addition or pooling."""
    return f"{SPARING[rule]} of {node}"


class Latencies:
    """What a plan costs with some of its units in floating point; every set is asked for once.

    Attributes:
        units: by name.
        neighbours: unit -> those with which it shares a tensor, with nothing but other operators in between.
    """

    def __init__(self, graph: gs.Graph, plan: Plan, source: CostSource, rest: Rest) -> None:
        self.units: Units = units_of(graph, plan)
        self.neighbours = neighbours(graph, self.units)
        self._graph, self._plan, self._source, self._rest = graph, plan, source, rest
        self._known: dict[frozenset[str], float] = {}

    def of(self, left_out: frozenset[str]) -> float:
        """Microseconds of one inference."""
        if left_out not in self._known:
            self._known[left_out] = self.latency(left_out).microseconds
        return self._known[left_out]

    def latency(self, left_out: Collection[str]) -> Latency:
        """The same kernel by kernel."""
        return self._source.latency(self.plan(left_out), self._rest)

    def plan(self, left_out: Collection[str]) -> Plan:
        """The plan without those units."""
        nodes = {node: "by cost" for name in left_out for node in self.units[name]}
        return leave_out(self._graph, self._plan, nodes)


class Fastest:
    """Searches for the placement that costs least; what it has asked for serves the next search.

    Args:
        latencies: of the placements.
    """

    def __init__(self, latencies: Latencies) -> None:
        self._of, self._neighbours = latencies.of, latencies.neighbours
        self._all = frozenset(latencies.units)
        self._terms: dict[frozenset[str], _Terms] = {}
        self._pairs = [
            (name, other) for name, others in latencies.neighbours.items() for other in others if name < other
        ]

    def left_out(
        self, penalty: Mapping[str, float] | None = None, starts: Sequence[frozenset[str]] = ()
    ) -> frozenset[str]:
        """The units to leave in floating point.

        Args:
            penalty: unit -> what it costs on top where it is in INT8, in microseconds.
            starts: placements to begin at; default: all in INT8, and none.
        """
        penalty = penalty or {}
        ends = [self._descended(start, penalty) for start in starts or (frozenset(), self._all)]
        return min(ends, key=lambda end: (self._cost(end, penalty), sorted(end)))

    def _cost(self, left_out: frozenset[str], penalty: Mapping[str, float]) -> float:
        return self._of(left_out) + sum(cost for name, cost in penalty.items() if name not in left_out)

    def _descended(self, now: frozenset[str], penalty: Mapping[str, float]) -> frozenset[str]:
        cost = self._cost(now, penalty)
        for _ in range(MOST_ROUNDS):
            better = now
            for flips in self._proposed(now, penalty):
                changed = better ^ flips
                if (found := self._cost(changed, penalty)) < cost - LEAST_GAIN:
                    better, cost = changed, found
            if better == now:
                break
            now = better
        return now

    def _proposed(self, now: frozenset[str], penalty: Mapping[str, float]) -> Iterator[frozenset[str]]:
        """Sets of units to flip, all at once, in connected parts, and each alone, as far as they promise."""
        terms = self._terms_at(now)
        alone = {
            name: change + (penalty.get(name, 0.0) if name in now else -penalty.get(name, 0.0))
            for name, change in terms.alone.items()
        }
        chosen = least_energy(alone, terms.pairs)
        if chosen:
            yield chosen
            parts = list(_connected(chosen, self._neighbours))
            if len(parts) > 1:
                yield from parts
        yield from (frozenset([name]) for name in sorted(alone, key=alone.__getitem__) if alone[name] < 0)

    def _terms_at(self, now: frozenset[str]) -> _Terms:
        """The terms around a placement; of units whose neighbourhood is as in one seen before, that one's."""
        if now in self._terms:
            return self._terms[now]
        nearest = min(self._terms, key=lambda other: len(other ^ now), default=None)
        terms = _Terms({}, {})
        changed = self._all if nearest is None else self._around(self._around(now ^ nearest))
        base = self._of(now)
        for name in self._all:
            if nearest is not None and name not in changed:
                terms.alone[name] = self._terms[nearest].alone[name]
            else:
                terms.alone[name] = self._of(now ^ {name}) - base
        for pair in self._pairs:
            if nearest is not None and changed.isdisjoint(pair):
                terms.pairs[pair] = self._terms[nearest].pairs[pair]
            else:
                both = self._of(now.symmetric_difference(pair)) - base
                terms.pairs[pair] = both - sum(terms.alone[name] for name in pair)
        self._terms[now] = terms
        if {frozenset(), self._all} <= self._terms.keys():
            self._forget_independent()
        return terms

    def _forget_independent(self) -> None:
        """Pairs that do not interact in front of all others in INT8, nor of none, are not asked for again."""
        extremes = [self._terms[frozenset()].pairs, self._terms[self._all].pairs]
        self._pairs = [
            pair for pair in self._pairs if any(abs(pairs[pair]) > LEAST_GAIN for pairs in extremes)
        ]

    def _around(self, names: frozenset[str]) -> frozenset[str]:
        return names.union(*(self._neighbours[name] for name in names))


class _Terms:
    """What flipping a unit changes, and flipping two of them beyond that, in microseconds."""

    def __init__(self, alone: dict[str, float], pairs: dict[tuple[str, str], float]) -> None:
        self.alone, self.pairs = alone, pairs


def least_energy(alone: Mapping[str, float], pairs: Mapping[tuple[str, str], float]) -> frozenset[str]:
    """The set of names with the least sum of `alone` over them and of `pairs` over those within it.

    Exact where no pair is above 0; what is above counts as 0. The smallest such set.
    """
    graph = _Flow()
    weight = dict(alone)
    for (one, other), value in pairs.items():
        if value < 0:
            weight[one] += value
            graph.edge(one, other, -value)
    for name, value in weight.items():
        graph.edge(_SOURCE, name, max(-value, 0.0))
        graph.edge(name, _SINK, max(value, 0.0))
    return graph.source_side() - {_SOURCE}


_SOURCE, _SINK = "\0source", "\0sink"


class _Flow:
    """A minimum cut by Dinic's algorithm."""

    def __init__(self) -> None:
        self._residual: dict[str, dict[str, float]] = {_SOURCE: {}, _SINK: {}}

    def edge(self, start: str, end: str, capacity: float) -> None:
        """An edge; several between the same ends add up."""
        self._residual.setdefault(start, {})
        self._residual.setdefault(end, {})
        self._residual[start][end] = self._residual[start].get(end, 0.0) + capacity
        self._residual[end].setdefault(start, 0.0)

    def source_side(self) -> frozenset[str]:
        """The nodes on the source's side of the cut that is nearest to it."""
        while True:
            level = self._levels()
            if _SINK not in level:
                return frozenset(level)
            left = {node: iter(ends) for node, ends in self._residual.items()}
            while self._push(level, left):
                pass

    def _levels(self) -> dict[str, int]:
        level, waiting = {_SOURCE: 0}, deque([_SOURCE])
        while waiting:
            node = waiting.popleft()
            for end, capacity in self._residual[node].items():
                if capacity > LEAST_GAIN and end not in level:
                    level[end] = level[node] + 1
                    waiting.append(end)
        return level

    def _push(self, level: Mapping[str, int], left: Mapping[str, Iterator[str]]) -> bool:
        """Push flow along one shortest path; whether there was one."""
        path = [_SOURCE]
        while path[-1] != _SINK:
            node = path[-1]
            for end in left[node]:
                if self._residual[node][end] > LEAST_GAIN and level.get(end) == level[node] + 1:
                    path.append(end)
                    break
            else:
                path.pop()
                if not path:
                    return False
        steps = list(pairwise(path))
        amount = min(self._residual[start][end] for start, end in steps)
        for start, end in steps:
            self._residual[start][end] -= amount
            self._residual[end][start] += amount
        return True


def neighbours(graph: gs.Graph, units: Units) -> dict[str, frozenset[str]]:
    """Unit -> those that it shares a tensor with: one writes what the other reads, or both read what one
    operator wrote; operators that belong to no unit are looked through.

    Args:
        graph: the folded graph of the plan that the units are of.
    """
    owner: dict[str, list[str]] = {}
    for name, nodes in units.items():
        for node in nodes:
            owner.setdefault(node, []).append(name)
    order = {name: position for position, name in enumerate(units)}
    found: dict[str, set[str]] = {name: set() for name in units}
    reached: dict[str, set[str]] = {}

    def reading(tensor: gs.Tensor) -> set[str]:
        """The units that read a tensor first."""
        if tensor.name not in reached:
            reached[tensor.name] = together = set[str]()
            for node in tensor.outputs:
                together.update(owner.get(node.name, ()))
                if node.name not in owner:
                    together.update(*(reading(output) for output in node.outputs))
        return reached[tensor.name]

    makers = [(owner.get(node.name, []), node.outputs) for node in reversed(graph.nodes)]
    for names, tensors in [*makers, ([], graph.inputs)]:
        readers = sorted(set().union(*(reading(tensor) for tensor in tensors)), key=order.__getitem__)
        together = combinations(readers, 2) if len(readers) <= MOST_TOGETHER else pairwise(readers)
        for one, other in (*together, *product(names, readers), *combinations(names, 2)):
            if one != other:
                found[one].add(other)
                found[other].add(one)
    return {name: frozenset(others) for name, others in found.items()}


def _connected(names: frozenset[str], links: Mapping[str, frozenset[str]]) -> Iterator[frozenset[str]]:
    """The connected parts of a set."""
    left = set(names)
    while left:
        part, waiting = set[str](), [min(left)]
        while waiting:
            name = waiting.pop()
            if name in left:
                left.remove(name)
                part.add(name)
                waiting += links[name] & left
        yield frozenset(part)
