"""Where shards run: what `--parallel` names."""

from __future__ import annotations

from typing import NamedTuple

from trtq.simulation.processors import processors

MOST_PROCESSES = 1024


class Pool(NamedTuple):
    """The workers that `--parallel` names.

    Attributes:
        backend: loky or dask.
        address: host:port of the Dask scheduler.
        processes: of loky; None: one for each processor.
    """

    backend: str
    address: str = ""
    processes: int | None = None

    @property
    def on_this_machine(self) -> bool:
        """Whether the workers certainly see this machine's files."""
        return self.backend == "loky"

    def threads(self, wanted: int | None) -> int:
        """CPU threads of one worker: as wanted, or an equal part of this machine, or 1 in a cluster."""
        available = processors()
        share = available // (self.processes or available) if self.on_this_machine else 1
        return wanted or max(share, 1)

    def __str__(self) -> str:
        """As `parse_parallel` reads it."""
        if self.backend == "dask":
            return f"dask://{self.address}"
        return self.backend if self.processes is None else f"{self.backend}:{self.processes}"


def parse_parallel(text: str) -> Pool | None:
    """The workers that a text names; None for an empty one: this process.

    Raises:
        ValueError: no such backend, no address, or no number of processes.
    """
    if not text:
        return None
    if text.startswith("dask://") and (address := text.removeprefix("dask://")):
        return Pool("dask", address)
    name, _, count = text.partition(":")
    if name == "loky" and (text == name or (count.isdecimal() and 0 < int(count) <= MOST_PROCESSES)):
        return Pool(name, processes=int(count) if count else None)
    raise ValueError(f"{text!r} names no workers")
