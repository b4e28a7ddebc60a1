"""Budgets as written, and running out."""

from __future__ import annotations

import time

import pytest

from trtq.errors import InputError
from trtq.recovery.budget import Budget


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("0.5s", 0.5)]
)
def test_times(text: str, seconds: float) -> None:
    left = Budget.parse(text).left
    assert left is not None
    assert seconds - 1 < left <= seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "0", "ten", "1d", "nan", "inf"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InputError, match="is no time"):
        Budget.parse(text)


def test_no_budget_is_never_over() -> None:
    budget = Budget.parse(None)
    assert budget.left is None
    assert not budget.over


def test_a_spent_budget_is_over() -> None:
    budget = Budget.parse("0.01s")
    time.sleep(0.02)
    assert budget.over
    assert budget.left == 0
