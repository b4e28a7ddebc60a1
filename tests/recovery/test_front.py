"""The front of latency and noise: against all placements of a small network whose noises add up."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
from nets import loaded, net, normal

from trtq.cost.placement import Latencies
from trtq.cost.sources import source_for
from trtq.graph.place import place
from trtq.recovery.front import Front

SHAPES = {"x": (8, 32, 32, 32)}


@pytest.fixture(scope="module")
def latencies(tmp_path_factory: pytest.TempPathFactory) -> Latencies:
    """Six convolutions, the third of them depthwise, and a residual addition, on an L4."""
    kernels = {f"w{i}": normal(32, 1 if i == 2 else 32, 3, 3, seed=i) for i in range(6)}
    body = "\n".join(
        f"c{i} = Conv<pads = [1, 1, 1, 1], group = {32 if i == 2 else 1}>({source}, w{i}) r{i} = Relu(c{i})"
        for i, source in enumerate(("x", "r0", "r1", "r2", "s", "r4"))
    ).replace("c4 =", "s = Add(r3, r0) c4 =")
    text = f"g (float[8,32,32,32] x) => (float[8,32,32,32] r5) {{ {body} }}"
    model = loaded(net(text, **kernels), tmp_path_factory.mktemp("front"))
    source = source_for(model.graph, SHAPES, gpu="L4")
    assert source is not None
    return Latencies(model.graph, place(model, input_shapes=SHAPES), source, "fp16")


def every(latencies: Latencies) -> list[frozenset[str]]:
    units = tuple(latencies.units)
    return [frozenset(s) for s in chain.from_iterable(combinations(units, k) for k in range(len(units) + 1))]


@pytest.fixture(scope="module", params=[0, 1, 2])
def alone(latencies: Latencies, request: pytest.FixtureRequest) -> dict[str, float]:
    """Noise of each unit, over two decades."""
    random = np.random.default_rng(request.param)
    return {name: float(10 ** random.uniform(-4, -2)) for name in latencies.units}


def total(alone: dict[str, float], left_out: frozenset[str]) -> float:
    return sum(noise for name, noise in alone.items() if name not in left_out)


def test_no_placement_beats_a_corner_and_all_lie_on_the_hull(
    latencies: Latencies, alone: dict[str, float]
) -> None:
    front = Front(latencies, alone, lambda s: total(alone, s))
    assert front.corners[0].microseconds == pytest.approx(min(map(latencies.of, every(latencies))), abs=1e-4)
    assert front.corners[-1].left_out == frozenset(alone)
    for fast, exact in zip(front.corners, front.corners[1:], strict=False):
        assert fast.microseconds < exact.microseconds
        assert fast.noise > exact.noise
        price = (exact.microseconds - fast.microseconds) / (fast.noise - exact.noise)
        line = fast.microseconds + price * fast.noise
        best = min(latencies.of(s) + price * total(alone, s) for s in every(latencies))
        assert line == pytest.approx(best, rel=0.002)


@pytest.mark.parametrize("ratio", [0.8, 0.4, 0.1, 0.01])
def test_the_noise_holds_and_little_speed_is_lost(
    latencies: Latencies, alone: dict[str, float], ratio: float
) -> None:
    target = ratio * total(alone, frozenset())
    found = Front(latencies, alone, lambda s: total(alone, s)).fastest(target)
    assert total(alone, found) <= target
    best = min(latencies.of(s) for s in every(latencies) if total(alone, s) <= target)
    assert latencies.of(found) <= 1.03 * best


def test_what_units_do_together_is_measured(latencies: Latencies, alone: dict[str, float]) -> None:
    """Alone no unit makes much noise; all but the last two together do."""
    last = frozenset(list(latencies.units)[-2:])

    def noise(left_out: frozenset[str]) -> float:
        return 0.0 if last <= left_out else 1.0

    assert last <= Front(latencies, alone, noise).fastest(0.5)


def test_each_set_is_measured_once_and_none_when_time_is_over(
    latencies: Latencies, alone: dict[str, float]
) -> None:
    asked: list[frozenset[str]] = []

    def noise(left_out: frozenset[str]) -> float:
        asked.append(left_out)
        return total(alone, left_out)

    front = Front(latencies, alone, noise)
    for ratio in (0.5, 0.3, 0.5):
        front.fastest(ratio * total(alone, frozenset()))
    assert len(asked) == len(set(asked))
    asked.clear()
    assert Front(latencies, alone, noise, over=lambda: True).fastest(0.0) == frozenset(alone)
    assert not asked


def test_units_that_do_not_pay_say_so(latencies: Latencies, alone: dict[str, float]) -> None:
    front = Front(latencies, alone, lambda s: total(alone, s))
    left_out = front.fastest(0.05 * total(alone, frozenset()))
    slower = front.slower_in_int8(left_out)
    for name in left_out:
        more = latencies.of(left_out - {name}) - latencies.of(left_out)
        assert (name in slower) == (more >= -1e-6)
        if more >= 0.05:
            assert f"INT8 costs {more:.1f} µs more here" in slower[name]
