"""The time that a job may take."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """A deadline on the clock `time.perf_counter`; None: there is none."""

    deadline: float | None = None

    @classmethod
    def of(cls, seconds: float | None) -> Budget:
        """So many seconds from now; None: there is no deadline."""
        return cls() if seconds is None else cls(time.perf_counter() + seconds)

    @property
    def left(self) -> float | None:
        """Seconds left, not below 0; None without a deadline."""
        return None if self.deadline is None else max(self.deadline - time.perf_counter(), 0.0)

    @property
    def over(self) -> bool:
        """Whether no time is left."""
        return self.left == 0.0


NO_BUDGET = Budget()
