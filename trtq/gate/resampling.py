"""Resampling a metric that gives one number for all samples: two calls for each draw, in a time budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtq.console import SILENT, Console
from trtq.gate.intervals import RESAMPLES_OF_FUNCTION, Float, bootstrap_calls

FEWEST = 20
"""Draws that say something of an interval."""


@dataclass(frozen=True)
class Resampling:
    """How an interval is resampled.

    Attributes:
        console: shows the progress.
        seconds: time for all draws, as long as there are `FEWEST`.
        longest: seconds that those may take; where they would take longer, nothing is drawn.
    """

    console: Console = SILENT
    seconds: float = 60.0
    longest: float = 600.0

    def draws(
        self, units: int, evaluate: Callable[[NDArray[np.int64]], tuple[float, float]], per_draw: float
    ) -> Float:
        """`evaluate(indices)` on as many resamples as there is time for: float64 of shape (2, draws).

        Args:
            units: how many there are to draw from.
            per_draw: seconds that a draw takes, by the calls on the samples themselves.
        """
        if per_draw * FEWEST > self.longest:
            return np.empty((2, 0))
        wanted = min(RESAMPLES_OF_FUNCTION, max(FEWEST, int(self.seconds / max(per_draw, 1e-9))))
        started = time.monotonic()

        def over(done: int) -> bool:
            spent = time.monotonic() - started
            return spent > self.seconds and (done >= FEWEST or spent > self.longest)

        with self.console.progress("resample", wanted, "draw") as advance:
            found = bootstrap_calls(units, evaluate, wanted, advance, over)
        return found if found.shape[1] >= FEWEST else np.empty((2, 0))


QUIETLY = Resampling()
