"""Budgets running, and running out."""

from __future__ import annotations

import time

from trtq.budget import Budget


def test_a_budget_runs_from_now() -> None:
    left = Budget.of(90.0).left
    assert left is not None
    assert 89 < left <= 90


def test_no_budget_is_never_over() -> None:
    budget = Budget.of(None)
    assert budget.left is None
    assert not budget.over


def test_a_spent_budget_is_over() -> None:
    budget = Budget.of(0.01)
    time.sleep(0.02)
    assert budget.over
    assert budget.left == 0
