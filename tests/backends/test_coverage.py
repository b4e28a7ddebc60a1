"""The plan against the engine: what runs in INT8, what was meant to, and the share of the work."""

from __future__ import annotations

import pytest

from trtq.backends.compiled import Compiled, CompiledLayer, CompiledTensor
from trtq.backends.coverage import coverage, planned
from trtq.graph.plan import NodePlan, Plan


def plan_of(*nodes: tuple[str, bool, int | None]) -> Plan:
    """A plan of (name, int8, multiply-accumulates)."""
    planned = [NodePlan(name, "Conv", int8, "rule", "reason", macs) for name, int8, macs in nodes]
    return Plan("hash", planned, [], [])


def engine_of(**datatypes: str) -> Compiled:
    """An engine with one convolution kernel for each node, its two operands of the given datatype."""

    def tensor(datatype: str) -> CompiledTensor:
        return CompiledTensor("t", (1, 8), datatype, "")

    layers = (
        CompiledLayer(
            node, "correlation", (tensor(datatype),), (tensor(datatype),), (tensor("Float"),), (node,)
        )
        for node, datatype in datatypes.items()
    )
    return Compiled(tuple(layers))


def names(nodes: list[NodePlan]) -> list[str]:
    return [node.name for node in nodes]


def test_every_node_is_int8_missed_or_skipped() -> None:
    plan = plan_of(("a", True, 60), ("b", True, 30), ("c", False, 10))
    found = coverage(plan, engine_of(a="Int8", b="Half", c="Float"))
    assert (names(found.int8), names(found.missed), names(found.skipped)) == (["a"], ["b"], ["c"])
    assert found.mac_share == pytest.approx(0.6)
    assert found.node_share == pytest.approx(1 / 3)
    assert found.share == found.mac_share
    assert found.text().splitlines() == [
        "1 of 3 weighted nodes in INT8, 60.0% of the multiply-accumulates",
        "meant for INT8 but run in floating point: b (Conv)",
    ]


def test_a_node_that_no_kernel_names_is_not_int8() -> None:
    found = coverage(plan_of(("a", True, 1), ("gone", True, 1)), engine_of(a="Int8"))
    assert names(found.missed) == ["gone"]
    assert found.share == pytest.approx(0.5)


def test_unknown_work_is_counted_in_nodes() -> None:
    found = coverage(plan_of(("a", True, None), ("b", True, 5)), engine_of(a="Int8", b="Float"))
    assert found.mac_share is None
    assert found.share == pytest.approx(0.5)
    assert "50.0% of the weighted nodes" in found.text()


def test_a_node_in_two_kernels_is_int8_only_if_both_are() -> None:
    both = (*engine_of(a="Int8").layers, *engine_of(a="Half").layers)
    assert coverage(plan_of(("a", True, 1)), Compiled(both)).share == 0


@pytest.mark.parametrize(("left", "said"), [(0, "100.0%"), (1, "99.9%"), (2_000_000, "83.3%")])
def test_all_of_the_work_is_said_of_all_of_it_only(left: int, said: str) -> None:
    """One multiply-accumulate in ten million that is not in INT8 is not nothing."""
    plan = plan_of(("a", True, 10_000_000), ("b", False, left))
    text = coverage(plan, engine_of(a="Int8", b="Half")).text()
    assert text == f"1 of 2 weighted nodes in INT8, {said} of the multiply-accumulates"


def test_without_an_engine_the_plan_says_what_is_int8() -> None:
    found = planned(plan_of(("a", True, 60), ("b", True, 30), ("c", False, 10)))
    assert (names(found.int8), names(found.missed), names(found.skipped)) == (["a", "b"], [], ["c"])
    assert found.mac_share == pytest.approx(0.9)
    assert found.node_share == pytest.approx(2 / 3)
