"""The work that calibration may be, counted and not timed, so that a second run does the same.

Choosing a method, fixes and ranges of their own each build models and run rows. What they take is estimated
from the numbers of nodes, rows and multiply-accumulates before they begin. On most models all of them are far
below the limit; on one of many thousand small nodes it takes longer to build a session than to run all rows,
and on one of many tensors few rows for each of them are many. What would go beyond the limit is left out.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from trtq.console import Console
from trtq.graph.plan import Plan

LEAST_SECONDS, MOST_PASSES = 20.0, 100
"""The limit: about so many seconds, or the multiply-accumulates of so many passes over the data, whichever is
more."""

STEP_SECONDS = 900.0
"""The same for a step of recovery, which is tried only where calibration alone does not pass."""

NODE_BUILT, NODE_RUN, MAC, MEAN = 2.5e-4, 3e-6, 1e-10, 1e-4
"""About how many seconds a node takes to be copied, written and loaded, and to run on a row, how many a
multiply-accumulate takes, and the mean of what a layer reads of a row, on one core; measured on a 2.5 GHz
server processor."""

LEFT_OUT = "left_out"
"""Note of a quantization: what was left out since it would have been too much work."""


class Effort:
    """What calibration takes of its limit.

    Attributes:
        left_out: what did not fit, in order.

    Args:
        graph: the float graph.
        plan: of the graph.
        rows: of the data.
        bounded: False: there is no limit.
        least: in place of `LEAST_SECONDS`.
    """

    def __init__(
        self, graph: gs.Graph, plan: Plan, rows: int, *, bounded: bool, least: float | None = None
    ) -> None:
        self._nodes, self._macs, self._bounded = len(graph.nodes), plan.macs_per_row, bounded
        self._tensors, self._weights = len(plan.tensors), len(plan.weights)
        least = LEAST_SECONDS if least is None else least
        self._left = max(least, MOST_PASSES * rows * self._macs * MAC)
        self.left_out: list[str] = []

    def takes(self, what: str, *seconds: float) -> bool:
        """Whether something fits into what is left, which is then less; else it is left out.

        Args:
            seconds: its parts, by the methods below.
        """
        if self._bounded and sum(seconds) > self._left:
            self.left_out.append(what)
            return False
        self._left -= sum(seconds)
        return True

    def plain(self, rows: float) -> float:
        """The float model on rows."""
        return self._of(self._nodes, rows)

    def quantized(self, rows: float) -> float:
        """The model with Q/DQ on rows."""
        return self._of(self._nodes + 2 * self._tensors + self._weights, rows)

    def corrected(self, rows: float) -> float:
        """Biases corrected on rows: means of what each linear layer reads."""
        return self.plain(rows) + rows * self._weights * MEAN

    def alone(self, rows: float) -> float:
        """Rows with one tensor at a time in INT8."""
        return self._of(self._nodes + 3 * self._tensors, rows)

    def say(self, console: Console) -> None:
        """Tell what was left out, if anything was."""
        if self.left_out:
            console.say("left out", f"{', '.join(self.left_out)}: {_WHY}")

    def _of(self, nodes: int, rows: float) -> float:
        return nodes * (NODE_BUILT + rows * NODE_RUN) + rows * self._macs * MAC


TOO_LONG = (
    f"not tried: on so many nodes and tensors it takes more than about {STEP_SECONDS / 60:.0f} minutes;"
    " --budget TIME lets it run"
)
"""What is said of a step of recovery that does not fit."""

_WHY = (
    f"calibration takes no more than about {LEAST_SECONDS:.0f} s, or {MOST_PASSES} passes over the data;"
    " --budget TIME lets it take more"
)
