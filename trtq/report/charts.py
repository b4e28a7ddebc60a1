"""Positions and paths of the report's pictures.

The page draws them as HTML and SVG of its own: no chart library that runs in a browser is below a few hundred
kilobytes, and those that draw beforehand bring fixed colours and sizes. Positions are percentages of the
drawing, so that text keeps its size on a phone, and colours are the page's, so that they follow dark mode and
paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ROW, LANE = 22, 13
"""Pixels of a line and of a lane in the drawing of a graph."""


@dataclass(frozen=True)
class Mark:
    """A position along an axis, in percent, and what stands there."""

    at: str
    label: str


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`; `curve` is an increasing function that spreads it."""

    low: float
    high: float
    curve: Callable[[float], float] = float

    def at(self, value: float) -> float:
        """The position of a value, in percent from the low end."""
        start, end = self.curve(self.low), self.curve(self.high)
        return 100 * (self.curve(value) - start) / (end - start) if end > start else 50.0


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """The range of some values with a margin on both sides."""
    low, high = min(values), max(values)
    margin = share * (high - low) or abs(high) * share or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: one, two or five times a power of ten apart, `most` at most."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(s for f in (1, 2, 5, 10, 20) if (high - low) / (s := f * power) <= most - 1 or f == 20)
    first = math.ceil(low / step - 1e-9)
    return [n * step + 0.0 for n in range(first, math.floor(high / step + 1e-9) + 1)]


def percent(position: float) -> str:
    """A position as text."""
    return f"{min(max(position, 0.0), 100.0):.2f}"


def bars_path(counts: Sequence[int]) -> str:
    """Bars of equal width, one unit each, as an SVG path in a drawing 100 high; heights are logarithms, so
    that a single value shows beside millions."""
    highest = math.log10(1 + max(counts, default=0)) or 1.0
    tops = (100 - 100 * math.log10(1 + count) / highest for count in counts)
    steps = "".join(f"V{top:.1f}H{index}" for index, top in enumerate(tops, 1))
    return f"M0 100{steps}V100Z"


def lane_x(lane: int) -> float:
    """The middle of a lane, in pixels."""
    return LANE * (lane + 0.5)


def flow_path(lane: int, through: Sequence[int], into: Sequence[int], out: bool) -> str:
    """The lines of one node's row as an SVG path."""
    x, middle = lane_x(lane), ROW / 2
    lines = [f"M{lane_x(other):g} 0V{ROW}" for other in through]
    for other in into:
        start = lane_x(other)
        lines.append(
            f"M{x:g} 0V{middle:g}"
            if other == lane
            else f"M{start:g} 0C{start:g} {middle:g} {x:g} 0 {x:g} {middle:g}"
        )
    if out:
        lines.append(f"M{x:g} {middle:g}V{ROW}")
    return "".join(lines)
