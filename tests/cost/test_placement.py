"""The fastest placement: against all placements of small networks, and cuts against all sets."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nets import loaded, net, normal

from trtq.cost.interface import Kind, Latency, Rest
from trtq.cost.placement import Fastest, Latencies, least_energy, neighbours, units_of
from trtq.cost.sources import source_for
from trtq.graph.model import Model
from trtq.graph.place import place
from trtq.graph.plan import Plan

NAMES = "abcdef"
values = st.floats(-4, 4).map(lambda value: round(value, 3))


def subsets(names: str | tuple[str, ...]) -> list[frozenset[str]]:
    return [frozenset(s) for s in chain.from_iterable(combinations(names, k) for k in range(len(names) + 1))]


@given(
    alone=st.fixed_dictionaries(dict.fromkeys(NAMES, values)),
    pairs=st.dictionaries(
        st.sampled_from(list(combinations(NAMES, 2))), st.floats(-4, 0).map(lambda v: round(v, 3))
    ),
)
def test_the_cut_is_the_set_of_least_energy(
    alone: dict[str, float], pairs: dict[tuple[str, str], float]
) -> None:
    def energy(chosen: frozenset[str]) -> float:
        return sum(alone[name] for name in chosen) + sum(
            v for pair, v in pairs.items() if set(pair) <= chosen
        )

    assert energy(least_energy(alone, pairs)) == pytest.approx(min(map(energy, subsets(NAMES))), abs=1e-4)


def chain_of(layers: int) -> onnx.ModelProto:
    """Convolutions in a row with activations, a residual addition around the second and third."""
    body, last = [], "x"
    for i in range(layers):
        body.append(f"c{i} = Conv<pads = [1, 1, 1, 1]>({last}, w{i}) r{i} = Relu(c{i})")
        last = f"r{i}"
        if i == 2:
            body.append("s = Add(r2, r0)")
            last = "s"
    weights = {f"w{i}": normal(16, 16, 3, 3, seed=i) for i in range(layers)}
    text = f"g (float[2,16,16,16] x) => (float[2,16,16,16] {last}) {{ {' '.join(body)} }}"
    return net(text, **weights)


@dataclass(frozen=True)
class Reformats:
    """A source by hand: each node has a gain in INT8, and each tensor between types costs a reformat."""

    model: Model
    gains: dict[str, float]
    reformat: float
    kind: Kind = "measured"
    name: str = "made up"

    def latency(self, plan: Plan, rest: Rest) -> Latency:
        int8 = set(plan.int8_nodes)
        total = 100.0 - sum(self.gains[name] for name in int8)
        order = [node.name for node in plan.nodes]
        for before, after in zip([None, *order], [*order, None], strict=True):
            total += self.reformat * ((before in int8) != (after in int8))
        return Latency(total, (), self.kind, self.name, 0)


@given(gains=st.lists(values, min_size=6, max_size=6), reformat=st.floats(0.1, 3))
def test_a_chain_is_as_fast_as_any_placement(chained: Model, gains: list[float], reformat: float) -> None:
    plan = place(chained, input_shapes={"x": (2, 16, 16, 16)})
    named = dict(zip(plan.int8_nodes, gains, strict=True))
    latencies = Latencies(chained.graph, plan, Reformats(chained, named, reformat), "fp16")
    every = [latencies.of(s) for s in subsets(tuple(plan.int8_nodes))]
    assert latencies.of(Fastest(latencies).left_out()) == pytest.approx(min(every), abs=1e-4)


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return loaded(chain_of(6), tmp_path_factory.mktemp("chain"))


@pytest.mark.parametrize("gpu", ["T4", "L4", "A100 80GB", "RTX 4090"])
@pytest.mark.parametrize("rest", ["fp16", "fp32"])
def test_by_the_roofline_no_placement_is_faster(chained: Model, gpu: str, rest: Rest) -> None:
    shapes = {"x": (2, 16, 16, 16)}
    plan = place(chained, input_shapes=shapes)
    source = source_for(chained.graph, shapes, gpu=gpu)
    assert source is not None
    latencies = Latencies(chained.graph, plan, source, rest)
    every = [latencies.of(s) for s in subsets(tuple(latencies.units))]
    assert latencies.of(Fastest(latencies).left_out()) == pytest.approx(min(every), abs=1e-4)


def test_a_price_on_int8_moves_a_unit_to_floating_point(chained: Model) -> None:
    plan = place(chained, input_shapes={"x": (2, 16, 16, 16)})
    first, *others = plan.int8_nodes
    source = Reformats(chained, dict.fromkeys(plan.int8_nodes, 5.0), 1.0)
    fastest = Fastest(Latencies(chained.graph, plan, source, "fp16"))
    assert fastest.left_out() == frozenset()
    assert fastest.left_out({first: 4.9, **dict.fromkeys(others, 0.1)}) == frozenset()
    assert first in fastest.left_out({first: 5.1, **dict.fromkeys(others, 0.1)})


def test_neighbours_share_a_tensor_with_other_operators_in_between(tmp_path: Path) -> None:
    model = loaded(
        net(
            """g (float[2,8] x) => (float[2,8] y, float[2,8] z) {
                a = MatMul(x, w) t = Tanh(a) b = MatMul(t, w) c = MatMul(t, w) d = Relu(b) y = MatMul(d, w)
                z = Sigmoid(c)
            }""",
            w=normal(8, 8),
        ),
        tmp_path,
    )
    plan = place(model, input_shapes={"x": (2, 8)})
    found = neighbours(model.graph, units_of(model.graph, plan))
    assert {name: set(others) for name, others in found.items()} == {
        "a": {"b", "c"},
        "b": {"a", "c", "y"},
        "c": {"a", "b"},
        "y": {"b"},
    }


def test_what_spares_traffic_is_a_unit_of_its_own(chained: Model) -> None:
    plan = place(chained, input_shapes={"x": (2, 16, 16, 16)})
    units = units_of(chained.graph, plan)
    assert [name for name in units if name not in plan.int8_nodes] == [
        f"residual input of {edge.node}" for edge in plan.edges if edge.rule == "residual-add"
    ]
    assert np.prod([len(nodes) for nodes in units.values()]) == 1
