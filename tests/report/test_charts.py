"""Positions in the report's pictures."""

from __future__ import annotations

import math
import operator
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtq.report.charts import ROW, Scale, bars_path, flow_path, lane_x, percent, ticks


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 9))
def test_ticks_are_round_even_and_inside(low: float, span: float, most: int) -> None:
    found = ticks(low, low + span, most)
    assert len(found) <= most
    assert all(low - 1e-6 * span <= tick <= low + span + 1e-6 * span for tick in found)
    steps = {f"{b - a:.6g}" for a, b in pairwise(found)}
    for step in steps:
        mantissa = float(step) / 10 ** math.floor(math.log10(float(step)) + 1e-9)
        assert min(abs(mantissa - round_) for round_ in (1, 2, 5, 10)) < 1e-3


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(0, 10, [0, 5, 10]), (0.2, 4.1, [1, 2, 3, 4]), (-3, 3, [-2, 0, 2]), (7, 7, [7])],
)
def test_ticks_worked_by_hand(low: float, high: float, found: list[float]) -> None:
    assert ticks(low, high) == found


def test_positions() -> None:
    assert Scale(2, 6).at(3) == 25
    assert Scale(6, 2, operator.neg).at(5) == 25  # downwards
    assert Scale(1, 100, math.log).at(10) == pytest.approx(50)
    assert Scale(1, 1).at(1) == 50
    assert [percent(x) for x in (-3, 12.345, 120)] == ["0.00", "12.35", "100.00"]


def test_bars_are_as_high_as_the_logarithms_of_their_counts() -> None:
    path = bars_path([0, 9, 99])
    assert path == "M0 100V100.0H1V50.0H2V0.0H3V100Z"
    assert bars_path([0, 0]) == "M0 100V100.0H1V100.0H2V100Z"


def test_lines_of_a_node_start_and_end_at_the_edges_of_its_row() -> None:
    path = flow_path(1, through=(0,), into=(0, 1), out=True)
    starts = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)", path)]
    assert starts == [0, 0, 0, ROW / 2]
    assert path.count(f"V{ROW}") == 2  # the one that passes, and its own below
    assert f"{lane_x(1):g} {ROW / 2:g}" in path  # the branch ends at the dot
