"""A drawing of a graph as a list: a node a line, what flows from node to node as lines in lanes beside them.

This is how version control draws histories. It suits chains with branches, which networks are; every node
keeps its name, and a graph of any length is as wide as a phone. Long graphs fall into blocks at the places
where least flows from above to below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_LANES = 10
"""What would need a lane further right is not drawn; the node says what it reads."""

BLOCK, MOST_BLOCKS = 12, 24
"""About as many nodes are in a block, or more where there would be more blocks than so many."""

LASTING = 4
"""What is read so many blocks further down (a mask, a skip connection of a U-Net) hinders no cut."""


@dataclass(frozen=True)
class Row:
    """A node's line.

    Attributes:
        node: its position in the graph.
        lane: where it stands, from 0.
        through: lanes that pass it.
        into: lanes that end in it from above; those that it reads and that go on are in `through`, too.
        out: whether something below reads it, by its own lane.
        undrawn: positions of nodes that it reads whose lines are not drawn.
    """

    node: int
    lane: int
    through: tuple[int, ...]
    into: tuple[int, ...]
    out: bool
    undrawn: tuple[int, ...] = ()


@dataclass(frozen=True)
class Block:
    """Nodes that follow each other; the rows are in their order."""

    rows: tuple[Row, ...]

    @property
    def width(self) -> int:
        """Lanes that it takes."""
        lanes = (max([row.lane, *row.through, *row.into]) for row in self.rows)
        return 1 + max(lanes, default=0)


def rows_of(inputs: Sequence[Sequence[int]]) -> list[Row]:
    """The lines of a graph.

    Args:
        inputs: of each node, the positions of those that it reads, all of them before it.
    """
    readers = [0] * len(inputs)
    for sources in inputs:
        for source in set(sources):
            readers[source] += 1
    lanes: list[int | None] = []  # the node whose output flows there
    rows = []
    for node, sources in enumerate(inputs):
        before = list(lanes)
        read = [lane for lane, source in enumerate(before) if source in sources]
        for source in set(sources):
            readers[source] -= 1
        lanes = [None if source is not None and not readers[source] else source for source in before]
        lane = _free(lanes, read)
        through = tuple(place for place, source in enumerate(lanes) if source is not None)
        undrawn = tuple(source for source in dict.fromkeys(sources) if source not in before)
        drawn = readers[node] > 0 and lane < MOST_LANES
        rows.append(Row(node, min(lane, MOST_LANES), through, tuple(read), drawn, undrawn))
        if drawn:
            lanes += [None] * (lane + 1 - len(lanes))
            lanes[lane] = node
    return rows


def _free(lanes: Sequence[int | None], read: Sequence[int]) -> int:
    """The lane for a node: the first that ends there, else the first that is free."""
    ending = [lane for lane in read if lanes[lane] is None]
    free = [lane for lane, source in enumerate(lanes) if source is None]
    return next(iter([*ending, *free]), len(lanes))


def blocks_of(inputs: Sequence[Sequence[int]]) -> list[Block]:
    """The lines of a graph in blocks of about one size, which end where least goes on to below.

    Args:
        inputs: as for `rows_of`.
    """
    size = max(BLOCK, math.ceil(len(inputs) / MOST_BLOCKS))
    rows, crossing = rows_of(inputs), _crossing(inputs, LASTING * size)
    blocks, start = [], 0
    while start < len(rows):
        latest = min(start + 2 * size, len(rows))
        candidates = range(min(start + size // 2, latest), latest + 1)
        middle = start + size
        end = min(candidates, key=lambda end: (crossing[end - 1], abs(end - middle)))
        end = len(rows) if len(rows) - end < size // 3 else end
        blocks.append(Block(tuple(rows[start:end])))
        start = end
    return blocks


def _crossing(inputs: Sequence[Sequence[int]], far: int) -> list[int]:
    """For each node, how many nodes up to it are read below it, but none that is read `far` lines below."""
    last = list(range(len(inputs)))
    for node, sources in enumerate(inputs):
        for source in sources:
            last[source] = node
    change = [0] * (len(inputs) + 1)
    for node, end in enumerate(last):
        if node < end <= node + far:
            change[node] += 1
            change[end] -= 1
    crossing, open_ = [], 0
    for step in change[:-1]:
        open_ += step
        crossing.append(open_)
    return crossing
