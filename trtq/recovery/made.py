"""What a step of the workflow made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from trtq.graph.quantization import Quantization
from trtq.job import Job


class Made(NamedTuple):
    """What a step made.

    Attributes:
        quantization: None where nothing is better than before.
        whole: whether the step was completed; if not, the result is not kept in the cache.
        reason: why there is no quantization, with the figures.
    """

    quantization: Quantization | None
    whole: bool
    reason: str = ""

    def to_bytes(self) -> bytes:
        """The quantization's bytes, or the reason's; of a `storable` quantization."""
        return self.reason.encode() if self.quantization is None else self.quantization.to_bytes()

    @classmethod
    def from_bytes(cls, content: bytes) -> Made:
        """The inverse of `to_bytes`, for a completed step."""
        if content.startswith(_ZIP):
            return cls(Quantization.from_bytes(content), True)
        return cls(None, True, content.decode())


_ZIP = b"PK"
"""What the bytes of an `.npz` begin with; no reason does."""


def made_once(
    job: Job, step: str, start: Quantization, make: Callable[[Quantization], Made], **entries: Any
) -> Made:
    """What `make` gives for a quantization, from the cache where it is there.

    Args:
        step: what it is called, to the user and in the key.
        entries: what it depends on beside the quantization and the data.
    """
    key = job.key("quantization", start, step=step, **entries)
    if (content := job.cache.fetch(key)) is not None:
        job.console.say(step, "from the cache; nothing was run")
        return Made.from_bytes(content)
    made = make(start)
    if made.whole and (made.quantization is None or made.quantization.storable):
        job.cache.store(key, made.to_bytes())
    return made
