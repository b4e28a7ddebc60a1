"""Rounding of weights: what it leaves of a layer's error, what it leaves alone, and how it is stored."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from small_graphs import Case, outputs, small_case

from trtq.graph.place import leave_out
from trtq.graph.quantization import Quantization
from trtq.recovery.fixes.rounding import _columns, round_weights, rounded_codes


def error(weights: np.ndarray, codes: np.ndarray, scales: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Squared error of each output over all positions."""
    return np.square((weights - codes * scales[:, None]) @ inputs.T).sum(axis=1)


def test_with_two_inputs_that_are_nearly_equal_errors_make_up_for_each_other() -> None:
    """0.4 + 0.4 of a step: to the nearest both vanish, but their sum is nearer to 1 than to 0."""
    moments = np.array([[[1.0, 0.999], [0.999, 1.0]]])
    codes = rounded_codes(np.array([[[0.4, 0.4]]]), moments, np.ones((1, 1)))
    assert sorted(codes.ravel()) == [0, 1]


def test_inputs_that_have_nothing_in_common_are_rounded_to_the_nearest() -> None:
    weights = np.random.default_rng(0).normal(size=(3, 5, 70)) * 20
    moments = np.stack([np.diag(np.random.default_rng(k).uniform(0.5, 2, 70)) for k in range(3)])
    codes = rounded_codes(weights, moments, np.ones((3, 5)))
    np.testing.assert_array_equal(codes, np.clip(np.rint(weights), -127, 127))


def test_no_code_leaves_its_range() -> None:
    weights = np.full((1, 1, 4), 127.49)
    moments = np.eye(4)[None] + 3.0
    assert rounded_codes(weights, moments, np.ones((1, 1))).max() == 127


def test_a_layer_whose_inputs_do_not_vary_is_rounded_to_the_nearest(tmp_path: Path) -> None:
    """Second moments about a mean of 1000 that are smaller than their rounding errors are not positive."""

    def constant_inputs(case: Case) -> None:
        case.output(case.linear(case.input("x", 40), 40, 8), 8)

    x = (1000 + 1e-3 * np.random.default_rng(0).normal(size=(64, 40))).astype(np.float32)
    case = small_case(tmp_path, constant_inputs, x)
    rounded = round_weights(case.quantized(), case.samples)
    assert rounded.codes == {} or np.isfinite(outputs(rounded.rewritten(), case.samples)[0]).all()


@pytest.mark.parametrize("seed", range(5))
def test_outputs_are_nearly_as_good_as_the_best_of_all_roundings(seed: int) -> None:
    """Six weights: all 64 ways to round up or down are tried."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(200, 2)) @ random.normal(size=(2, 6)) + 0.1 * random.normal(size=(200, 6))
    weights, scales = random.normal(size=(4, 6)) * 5, np.ones(4)
    codes = rounded_codes(weights[None], (inputs.T @ inputs / 200)[None], scales[None])[0]
    down = np.floor(weights)
    every = np.array(
        [error(weights, down + np.array(up), scales, inputs) for up in product((0, 1), repeat=6)]
    )
    nearest = error(weights, np.rint(weights), scales, inputs)
    found = error(weights, codes, scales, inputs)
    assert found.sum() < 0.5 * nearest.sum()
    assert found.sum() < 6 * every.min(axis=0).sum()


@pytest.mark.parametrize(
    "pads", [{"pads": [1, 0, 2, 1], "dilations": [1, 2]}, {"auto_pad": "SAME_UPPER"}], ids=str
)
def test_the_columns_of_a_convolution_give_its_output(pads: dict[str, object], tmp_path: Path) -> None:
    def conv(case: Case) -> None:
        x = case.input("x", 4, 7, 6)
        weight = case.weight(6, 2, 3, 2)
        attributes = {"kernel_shape": [3, 2], "strides": [2, 1], **pads}
        case.output(case.node("Conv", x, weight, group=2, **attributes), 6, None, None)

    case = small_case(tmp_path, conv)
    (node,) = (n for n in case.graph.nodes if n.op == "Conv")
    (expected,) = outputs(case.graph, case.samples)
    x = np.concatenate([row["x"] for row in (case.samples.row(i, ["x"]) for i in range(len(case.samples)))])
    columns = _columns(node, x.reshape(-1, 4, 7, 6), 10**6)
    weights = node.inputs[1].values.reshape(2, 3, -1)
    found = np.einsum("goi,gpi->gop", weights, columns).reshape(2, 3, len(expected), -1)
    found = found.transpose(2, 0, 1, 3).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def correlated(folder: Path) -> Case:
    """A layer whose inputs are mixtures of a few, and a layer behind it."""

    def layers(case: Case) -> None:
        h = case.node("Relu", case.linear(case.input("x", 12), 12, 16))
        case.output(case.linear(h, 16, 4), 4)

    random = np.random.default_rng(1)
    x = (random.normal(size=(64, 3)) @ random.normal(size=(3, 12))).astype(np.float32)
    return small_case(folder, layers, x)


def noise(case: Case, quantization: Quantization) -> float:
    expected, found = (outputs(g, case.samples)[0] for g in (case.graph, quantization.rewritten()))
    return float(np.square(expected - found).sum())


def test_the_outputs_of_a_layer_are_better_and_its_scales_stay(tmp_path: Path) -> None:
    case = correlated(tmp_path)
    plain = case.quantized()
    first, second = plain.plan.int8_nodes
    only = replace(plain, plan=leave_out(plain.graph, plain.plan, {second: "test"}))
    rounded = round_weights(only, case.samples)
    assert rounded.graph is only.graph
    assert rounded.scales == only.scales
    assert len(rounded.codes) == 1
    before, after = (
        {t.name: t.values for t in q.rewritten().tensors().values() if t.name.endswith("/scale")}
        for q in (only, rounded)
    )
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert noise(case, rounded) < noise(case, only)
    nowhere = leave_out(plain.graph, plain.plan, dict.fromkeys((first, second), "test"))
    assert round_weights(replace(plain, plan=nowhere), case.samples).codes == {}


def test_a_layer_left_in_floating_point_has_its_own_weights(tmp_path: Path) -> None:
    case = correlated(tmp_path)
    rounded = round_weights(case.quantized(), case.samples)
    nodes = dict.fromkeys(rounded.plan.int8_nodes, "test")
    without = replace(rounded, plan=leave_out(rounded.graph, rounded.plan, nodes))
    np.testing.assert_array_equal(
        outputs(without.rewritten(), case.samples), outputs(case.graph, case.samples)
    )


@pytest.mark.parametrize("weights", ["int8", "qdq"])
def test_codes_survive_the_cache_and_both_forms_of_weights(tmp_path: Path, weights: str) -> None:
    case = correlated(tmp_path)
    rounded = round_weights(case.quantized(), case.samples)
    again = Quantization.from_bytes(rounded.to_bytes())
    inside = rounded.with_corrections_inside()
    assert again.to_bytes() == rounded.to_bytes()
    assert again.sha256 == rounded.sha256 != case.quantized().sha256
    assert not inside.codes
    expected = outputs(rounded.rewritten(), case.samples)
    for form in (again, inside):
        np.testing.assert_array_equal(outputs(form.rewritten(weights=weights), case.samples), expected)


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    case = correlated(tmp_path)
    one, three = (round_weights(case.quantized(), case.samples, workers=n) for n in (1, 3))
    assert one.to_bytes() == three.to_bytes()
