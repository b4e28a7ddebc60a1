"""What stands in the way of a pass: the layers, in order, with what each costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Obstacle:
    """INT8 nodes that go into floating point together, or nodes that are already there and should not be.

    Attributes:
        nodes: their names.
        op: their operators: `Conv`, or `MatMul+MatMul`.
        sqnr_db: of the outputs with these nodes alone in INT8; None: not measured.
        noise_share: of the noise that all such groups make alone; None: not measured.
        mac_share: of the multiply-accumulates of all weighted nodes; None: not known.
        reason: why they are in floating point, where they are.
    """

    nodes: tuple[str, ...]
    op: str
    sqnr_db: float | None
    noise_share: float | None
    mac_share: float | None
    reason: str = ""

    def text(self) -> str:
        """One line."""
        costs = [] if self.sqnr_db is None else [f"{self.sqnr_db:.1f} dB alone"]
        costs += [] if self.noise_share is None else [f"{self.noise_share:.1%} of the noise"]
        costs += [] if self.mac_share is None else [f"{self.mac_share:.1%} of the multiply-accumulates"]
        costs += [self.reason] if self.reason else []
        return f"{', '.join(self.nodes)} ({self.op}): {', '.join(costs)}"


@dataclass(frozen=True)
class InTheWay:
    """What stands in the way, and the way round it where one is known.

    Attributes:
        what: what was measured, and on how many rows; or why no layer is to blame.
        obstacles: the one that costs most first.
        options: command-line options with which the job would pass; None: none are known.
        advice: what `options` were tried by, or why there are none.
    """

    what: str
    obstacles: tuple[Obstacle, ...] = ()
    options: str | None = None
    advice: str = ""

    def lines(self) -> list[str]:
        """For a person."""
        ranked = [f"{rank}. {obstacle.text()}" for rank, obstacle in enumerate(self.obstacles, 1)]
        way = f"{self.advice}: {self.options}" if self.options else self.advice
        return [f"in the way: {self.what}", *ranked, *([way] if way else [])]

    def to_json(self) -> dict[str, Any]:
        """JSON values; each obstacle with its rank."""
        ranked = [
            {"rank": rank, **asdict(obstacle), "nodes": list(obstacle.nodes)}
            for rank, obstacle in enumerate(self.obstacles, 1)
        ]
        return {**asdict(self), "obstacles": ranked}
