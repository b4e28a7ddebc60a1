"""The Pareto front of latency and noise: which units to leave in floating point for how little noise.

For every price of noise there is a fastest placement (`trtq.cost.placement`), with what each unit adds to
the noise alone. Those placements are the corners of the front, as far as units do not interact. So the first
corner is searched at which the noise that is really measured is low enough; then units go back to INT8, those
first that gain most, while it stays so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from trtq.cost.placement import LEAST_GAIN, Fastest, Latencies
from trtq.recovery.speed import reasons_of

MOST_CORNERS = 64
"""So many corners of the front are looked for; the largest gaps first."""


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
        """The corners, from the fastest with most noise to the one with none.

        Between two of them, the price at which they are alike either gives one that is better than both, or
        shows that there is none between them.
        """
        search = Fastest(self._latencies)
        first = self._corner(search.left_out())
        last = self._corner(frozenset(self._alone))
        found, waiting = {first, last}, [(first, last)]
        while waiting and len(found) < MOST_CORNERS:
            fast, exact = waiting.pop(0)
            if fast.noise <= exact.noise or exact.microseconds <= fast.microseconds:
                continue
            price = (exact.microseconds - fast.microseconds) / (fast.noise - exact.noise)
            penalty = {name: price * noise for name, noise in self._alone.items()}
            between = self._corner(search.left_out(penalty, [fast.left_out, exact.left_out]))
            alike = fast.microseconds + price * fast.noise
            if between not in found and between.microseconds + price * between.noise < alike - LEAST_GAIN:
                found.add(between)
                waiting += [(fast, between), (between, exact)]
        return _undominated(found)

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
        """The set less the units, those that gain most first, without which it is faster and still holds.

        Neighbours go back together, too: one alone may gain nothing, as it takes reformats on both sides.
        """
        failed: set[frozenset[str]] = set()
        while not self._over():
            here = self._latencies.of(left_out)
            gains = {some: here - self._latencies.of(left_out - some) for some in self._together(left_out)}
            better = [some for some, gain in gains.items() if gain > LEAST_GAIN and some not in failed]
            if not better:
                break
            back = min(better, key=lambda some: (-gains[some], sorted(some)))
            if self._holds(left_out - back, target):
                left_out -= back
            else:
                failed.add(back)
        return left_out

    def _together(self, left_out: frozenset[str]) -> set[frozenset[str]]:
        """Each unit alone, and each pair of neighbours."""
        links = self._latencies.neighbours
        pairs = {frozenset([name, other]) for name in left_out for other in links[name] & left_out}
        return pairs | {frozenset([name]) for name in left_out}


def _undominated(corners: Iterable[Corner]) -> list[Corner]:
    """The corners of which each is less noisy than all faster ones, by latency."""
    front: list[Corner] = []
    for corner in sorted(corners, key=lambda corner: (corner.microseconds, corner.noise)):
        if not front or corner.noise < front[-1].noise:
            front.append(corner)
    return front
