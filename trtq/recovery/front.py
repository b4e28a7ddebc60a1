"""The Pareto front of latency and noise: which units to leave in floating point for how little noise.

For every price of noise there is a fastest placement (`trtq.cost.placement`), with what each unit adds to
the noise alone. Those placements are the corners of the front, as far as units do not interact. So the first
corner is searched at which the noise that is really measured is low enough; then units go back to INT8, those
first that gain most, while it stays so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from trtq.cost.placement import LEAST_GAIN, Fastest, Latencies
from trtq.recovery.speed import reasons_of

STEPS = 24
"""Prices of noise that the front is walked with."""


class Corner(NamedTuple):
    """A placement on the front.

    Attributes:
        left_out: units in floating point.
        microseconds: of one inference.
        noise: the sum of what the units in INT8 add alone.
    """

    left_out: frozenset[str]
    microseconds: float
    noise: float


class Front:
    """The front of one quantization.

    Args:
        latencies: of placements of its units.
        alone: unit -> noise that it adds alone.
        noise: units left out -> noise of the outputs; is called once for every set.
        over: no further set is measured once this is true.
    """

    def __init__(
        self,
        latencies: Latencies,
        alone: Mapping[str, float],
        noise: Callable[[frozenset[str]], float],
        over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._latencies, self._alone, self._noise, self._over = latencies, alone, noise, over
        self._known: dict[frozenset[str], float] = {}
        self.corners = self._walked()

    def fastest(self, target: float) -> frozenset[str]:
        """The units to leave out so that the noise is at most `target`, the engine as fast as can be."""
        few, many = 0, len(self.corners) - 1
        while few < many and not self._over():
            middle = (few + many) // 2
            if self._holds(self.corners[middle].left_out, target):
                many = middle
            else:
                few = middle + 1
        return self._put_back(self.corners[many].left_out, target)

    def slower_in_int8(self, left_out: frozenset[str]) -> dict[str, str]:
        """The units among those left out that would make the engine slower in INT8, and the reason."""
        here = self._latencies.of(left_out)
        slower = {name for name in left_out if self._latencies.of(left_out - {name}) >= here - LEAST_GAIN}
        return {
            name: reason for name, reason in reasons_of(self._latencies, left_out).items() if name in slower
        }

    def _walked(self) -> list[Corner]:
        """The corners, from the fastest with most noise to the one with none."""
        fastest, total = Fastest(self._latencies), sum(self._alone.values())
        nothing = frozenset[str]()
        everything = frozenset(self._alone)
        found = {fastest.left_out()}
        if total > 0:
            scale = max(self._latencies.of(everything), self._latencies.of(nothing)) / total
            last = nothing
            for step in range(STEPS):
                price = scale * 10 ** (8 * step / (STEPS - 1) - 3)
                last = fastest.left_out({name: price * noise for name, noise in self._alone.items()}, [last])
                found.add(last)
        found.add(everything)
        corners = [self._corner(left_out) for left_out in found]
        corners.sort(key=lambda corner: (corner.microseconds, corner.noise))
        least, front = math.inf, []
        for corner in corners:
            if corner.noise < least or corner.left_out == everything:
                front.append(corner)
                least = corner.noise
        return front

    def _corner(self, left_out: frozenset[str]) -> Corner:
        noise = sum(value for name, value in self._alone.items() if name not in left_out)
        return Corner(left_out, self._latencies.of(left_out), noise)

    def _holds(self, left_out: frozenset[str], target: float) -> bool:
        if len(left_out) == len(self._alone):
            return True
        if left_out not in self._known:
            self._known[left_out] = self._noise(left_out)
        return self._known[left_out] <= target

    def _put_back(self, left_out: frozenset[str], target: float) -> frozenset[str]:
        """The set less the units, those that gain most first, without which it is faster and still holds."""
        failed: set[str] = set()
        while not self._over():
            here = self._latencies.of(left_out)
            gains = {name: here - self._latencies.of(left_out - {name}) for name in left_out - failed}
            better = [
                name for name in sorted(gains, key=lambda n: (-gains[n], n)) if gains[name] > LEAST_GAIN
            ]
            if not better:
                break
            if self._holds(left_out - {better[0]}, target):
                left_out -= {better[0]}
            else:
                failed.add(better[0])
        return left_out
