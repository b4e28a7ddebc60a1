"""What a step of the workflow made."""

from __future__ import annotations

from typing import NamedTuple

from trtq.graph.quantization import Quantization


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
