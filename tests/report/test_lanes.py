"""The drawing of a graph as lanes: followed from line to line, it is the graph again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trtq.report.lanes import BLOCK, MOST_BLOCKS, MOST_LANES, Row, blocks_of, rows_of

Graph = list[tuple[int, ...]]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Graphs whose nodes read up to three of those before them."""
    count = draw(st.integers(1, 30))
    return [
        tuple(draw(st.lists(st.integers(0, node - 1), max_size=3))) if node else () for node in range(count)
    ]


def read_back(rows: list[Row]) -> Graph:
    """What each node reads, as an eye follows the lines: from above down its lane to where it ends or
    branches off."""
    flowing: dict[int, int] = {}
    graph = []
    for row in rows:
        graph.append((*(flowing[lane] for lane in row.into), *row.undrawn))
        flowing = {lane: node for lane, node in flowing.items() if lane in row.through}
        if row.out:
            assert row.lane not in flowing, "two lines in one lane"
            flowing[row.lane] = row.node
    assert not flowing, "a line leads nowhere"
    return graph


@given(graphs())
def test_the_lines_are_the_graph(graph: Graph) -> None:
    assert [set(sources) for sources in read_back(rows_of(graph))] == [set(sources) for sources in graph]


@given(graphs())
def test_no_lane_is_too_far_right(graph: Graph) -> None:
    assert all(max([row.lane, *row.through]) <= MOST_LANES for row in rows_of(graph))


def test_a_chain_is_one_lane_and_a_branch_comes_back() -> None:
    residual = [(), (0,), (1,), (2, 0), (3,)]
    assert [(row.lane, row.through, row.into, row.out) for row in rows_of(residual)] == [
        (0, (), (), True),
        (1, (0,), (0,), True),
        (1, (0,), (1,), True),
        (0, (), (0, 1), True),
        (0, (), (0,), False),
    ]


def test_what_needs_more_lanes_is_named() -> None:
    many = MOST_LANES + 3
    fan = [*[()] * many, tuple(range(many))]
    last = rows_of(fan)[-1]
    assert last.undrawn == tuple(range(MOST_LANES, many))
    assert len(last.into) == MOST_LANES


@given(graphs())
def test_blocks_hold_every_node_once_in_order(graph: Graph) -> None:
    assert [row.node for block in blocks_of(graph) for row in block.rows] == list(range(len(graph)))


def test_blocks_end_where_one_line_goes_on() -> None:
    """No cut is inside a residual block of four nodes, and a long graph has not many more parts than a short
    one."""
    graph: Graph = [()]
    for _ in range(200):
        start = len(graph) - 1
        graph += [(start,), (start + 1,), (start + 2,), (start + 3, start)]
    blocks = blocks_of(graph)
    ends = [block.rows[-1].node for block in blocks[:-1]]
    assert all(end % 4 == 0 for end in ends)
    assert MOST_BLOCKS / 2 <= len(blocks) <= 2 * MOST_BLOCKS
    short = blocks_of(graph[: 10 * BLOCK])
    assert 5 <= len(short) <= 20


def test_an_empty_graph_has_no_blocks() -> None:
    assert blocks_of([]) == []
