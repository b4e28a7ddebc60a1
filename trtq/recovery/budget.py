"""The time that recovering may take."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from trtq.errors import InputError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """A deadline on the clock `time.perf_counter`; None: there is none."""

    deadline: float | None = None

    @classmethod
    def parse(cls, text: str | None) -> Budget:
        """The budget that `90`, `90s`, `10m` or `1.5h` means, running from now.

        Raises:
            InputError: not a positive time.
        """
        if text is None:
            return cls()
        number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
        try:
            seconds = float(number) * _UNITS[unit]
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise InputError(f"{text!r} is no time", remedy="write it as 90s, 10m or 1h")
        return cls(time.perf_counter() + seconds)

    @property
    def left(self) -> float | None:
        """Seconds left, not below 0; None without a deadline."""
        return None if self.deadline is None else max(self.deadline - time.perf_counter(), 0.0)

    @property
    def over(self) -> bool:
        """Whether no time is left."""
        return self.left == 0.0


NO_BUDGET = Budget()
