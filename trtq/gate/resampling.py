"""Resampling a metric that gives one number for all samples: two calls for each draw, in a time budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtq.console import SILENT, Console
from trtq.gate.intervals import RESAMPLES_OF_FUNCTION, Float, bootstrap_calls

SECONDS = 60.0
"""Time for all draws of one interval; the fewest may take longer."""

FEWEST, LONGEST = 20, 600.0
"""An interval has so many draws at least, and none is made where those would take more seconds than this."""


@dataclass(frozen=True)
class Resampling:
    """How an interval is resampled.

    Attributes:
        console: shows the progress.
        seconds: see `SECONDS`.
    """

    console: Console = SILENT
    seconds: float = SECONDS

    def draws(
        self, samples: int, evaluate: Callable[[NDArray[np.int64]], tuple[float, float]], per_draw: float
    ) -> Float:
        """`evaluate(indices)` on as many resamples as there is time for: float64 of shape (2, draws).

        Args:
            per_draw: seconds that a draw takes, by the calls on the samples themselves.
        """
        if per_draw * FEWEST > LONGEST:
            return np.empty((2, 0))
        wanted = min(RESAMPLES_OF_FUNCTION, max(FEWEST, int(self.seconds / max(per_draw, 1e-9))))
        started = time.monotonic()

        def over(done: int) -> bool:
            spent = time.monotonic() - started
            return spent > self.seconds and (done >= FEWEST or spent > LONGEST)

        with self.console.progress("resample", wanted, "draw") as advance:
            found = bootstrap_calls(samples, evaluate, wanted, advance, over)
        return found if found.shape[1] >= FEWEST else np.empty((2, 0))


QUIETLY = Resampling()
