"""Tensors that hold something else in the Q/DQ model: with changes that are known, and with errors that look
like changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trtq.data.samples import Samples
from trtq.gate.changed import ChannelFit
from trtq.gate.tensors import Compared, compare_three
from trtq.graph.inputs import InputSpec
from trtq.simulation.similarity import sqnr_db

Array = NDArray[np.float64]

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(32, 12)).astype(np.float32)
FIRST, SECOND = RNG.normal(size=(12, 6)), RNG.normal(size=(6, 4))
BIAS, LAST = RNG.normal(size=6), RNG.normal(size=4)
ONES, ZEROS = np.ones(6), np.zeros(6)


def scaled(factor: float, channel: int = 2) -> Array:
    return np.where(np.arange(6) == channel, factor, ONES)


class Net:
    """y = (x·first + bias)·second + last. If `quantized`, weights are rounded and hidden values quantized.

    The hidden channels are multiplied by `factor` and shifted by `offset`, and what reads them makes up for
    that unless `broken`.
    """

    def __init__(
        self, factor: Array = ONES, offset: Array = ZEROS, *, quantized: bool = True, broken: bool = False
    ) -> None:
        self.quantized = quantized
        self.first, self.bias = self.rounded(FIRST * factor), BIAS * factor + offset
        second = SECOND if broken else SECOND / factor[:, None]
        self.second, self.last = self.rounded(second), LAST - (ZEROS if broken else offset) @ second
        self.scale = np.abs(ROWS @ self.first + self.bias).max() / 127

    def rounded(self, weight: Array) -> Array:
        """As codes times a scale per output channel."""
        step = np.abs(weight).max(axis=0) / 127
        return np.rint(weight / step) * step if self.quantized else weight

    def hidden(self) -> Array:
        return ROWS @ self.first + self.bias

    def outputs(self) -> Array:
        codes = np.clip(np.rint(self.hidden() / self.scale), -128, 127)
        return codes * self.scale @ self.second + self.last

    def save(self, path: Path) -> Path:
        constants = {
            "w1": self.first.astype(np.float32),
            "b1": self.bias.astype(np.float32),
            "w2": self.second.astype(np.float32),
            "b2": self.last.astype(np.float32),
            "s": np.float32(self.scale),
            "z": np.int8(0),
        }
        pair = [
            helper.make_node("QuantizeLinear", ["h", "s", "z"], ["q"], "quantize"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize"),
        ]
        nodes = [
            helper.make_node("MatMul", ["x", "w1"], ["m"], "first"),
            helper.make_node("Add", ["m", "b1"], ["h"], "bias"),
            *(pair if self.quantized else []),
            helper.make_node("MatMul", ["d" if self.quantized else "h", "w2"], ["o"], "second"),
            helper.make_node("Add", ["o", "b2"], ["y"], "last"),
        ]
        graph = helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 12])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        return path


def comparison(folder: Path, net: Net, rows: NDArray[np.float32] = ROWS) -> dict[str, Compared]:
    fp32, int8 = Net(quantized=False).save(folder / "fp32.onnx"), net.save(folder / "int8.onnx")
    spec = InputSpec("x", np.dtype(np.float32), ("N", 12))
    found = compare_three(fp32, int8, Samples("rows", (spec,), {"x": rows}, {}, "0" * 64))
    assert ("* A fix changed" in found.text()) == any(t.changed for t in found.tensors)
    return {t.tensor: t for t in found.tensors}


EXACT = ROWS @ FIRST + BIAS
"""What the fp32 model's hidden tensor holds."""


@pytest.mark.parametrize(
    ("factor", "offset"),
    [(scaled(8), ZEROS), (ONES, 30 * scaled(0)), (scaled(8) * scaled(-3, 4), np.arange(6) * 2 - 7.0)],
    ids=["one channel times 8", "shifted", "both"],
)
def test_what_a_fix_did_is_taken_off(tmp_path: Path, factor: Array, offset: Array) -> None:
    net = Net(factor, offset)
    found = comparison(tmp_path, net)
    raw = float(sqnr_db(EXACT, net.hidden())[0])
    own = float(sqnr_db(EXACT, (net.hidden() - offset) / factor)[0])
    assert raw < 5
    assert own > 35
    assert found["h"].changed
    assert found["h"].simulation_db == pytest.approx(own, abs=2)  # what fits rounding goes with the fix
    assert not found["y"].changed
    last = Net(quantized=False)
    wanted = float(sqnr_db(last.hidden() @ last.second + last.last, net.outputs())[0])
    assert found["y"].simulation_db == pytest.approx(wanted, abs=0.1)


def test_without_a_fix_nothing_is_taken_off(tmp_path: Path) -> None:
    net = Net()
    found = comparison(tmp_path, net)
    assert not any(t.changed for t in found.values())
    assert found["h"].simulation_db == pytest.approx(float(sqnr_db(EXACT, net.hidden())[0]), abs=0.01)


def test_a_change_that_nothing_makes_up_for_is_an_error(tmp_path: Path) -> None:
    net = Net(scaled(8), 5 * ONES, broken=True)
    found = comparison(tmp_path, net)
    assert not any(t.changed for t in found.values())
    assert found["h"].simulation_db == pytest.approx(float(sqnr_db(EXACT, net.hidden())[0]), abs=0.01)
    assert found["y"].simulation_db < 10


@pytest.mark.parametrize("rows", [1, 2])
def test_two_values_of_a_channel_prove_nothing(tmp_path: Path, rows: int) -> None:
    found = comparison(tmp_path, Net(scaled(8)), ROWS[:rows])
    assert not any(t.changed for t in found.values())


@given(seed=st.integers(0, 2**32 - 1), axis=st.sampled_from([1, -1]), parts=st.integers(1, 3))
def test_sums_give_what_least_squares_gives(seed: int, axis: int, parts: int) -> None:
    rng = np.random.default_rng(seed)
    r = rng.normal(size=(6, 3, 5)) + rng.normal()
    shape = (3, 1) if axis == 1 else (5,)
    noise = rng.normal(size=(2, *r.shape)) * 0.01
    c = r * rng.uniform(0.5, 8, shape) + rng.normal(size=shape) * 9 + noise[0]
    k = c + noise[1]
    fit = ChannelFit(axis)
    for some in np.array_split(np.arange(6), parts):
        fit.add(r[some], c[some], k[some])
    lost = np.zeros(2)
    channels = [np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for x in (r, c, k)]
    for own, twin, simulation in zip(*channels, strict=True):
        (a, b), *_ = np.linalg.lstsq(np.stack([own, np.ones_like(own)], 1), twin, rcond=None)
        lost += [np.sum(((x - b) / a - own) ** 2) for x in (twin, simulation)]
    count = channels[0].shape[1]
    expected = 10 * np.log10(np.sum(r**2) / (lost * count / (count - 2)))
    assert fit.undone_db() == pytest.approx(tuple(expected), abs=1e-4)
    assert fit.twin_db == pytest.approx(10 * np.log10(np.sum(r**2) / np.sum((r - c) ** 2)), abs=1e-9)


def test_a_dead_channel_hides_no_fix() -> None:
    rng = np.random.default_rng(3)
    live, noise = rng.normal(size=(64, 1)), rng.normal(size=(64, 3)) * 0.01
    nearly_dead = np.where(np.arange(64) == 5, 1e-4, 0)[:, None]
    r = np.concatenate([live, np.zeros((64, 1)), nearly_dead], axis=1)
    c = r * [8, 1, 1] + [3, 0, 0] + noise
    fit = ChannelFit(-1)
    fit.add(r, c, c)
    lost = (noise[:, 0] / 8) @ (noise[:, 0] / 8) + np.sum((noise[:, 1:] - noise[:, 1:].mean(axis=0)) ** 2)
    expected = 10 * np.log10(np.sum(r**2) / lost)
    assert fit.undone_db() == pytest.approx((expected, expected), abs=0.2)


def test_channels_of_other_numbers_or_shapes_are_not_fitted() -> None:
    shapes = [((4, 3), (4, 3), (4, 5)), ((4,), (4,), (4,)), ((4, 3), (5, 3), (4, 3))]
    for r, c, k in shapes:
        fit = ChannelFit(-1)
        fit.add(np.ones(r), np.ones(c), np.ones(k))
        assert fit.undone_db() is None
    lengths = ChannelFit(1)
    for length in (3, 4):
        values = np.ones((8, length))
        lengths.add(values, values, values)
    assert lengths.undone_db() is None
