"""Bias correction: known mean errors go away exactly, and a layer with no place for a bias stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_graphs import Case, outputs, small_case

from trtq.calibration import kernels
from trtq.console import SILENT
from trtq.graph.place import leave_out
from trtq.graph.quantization import Quantization
from trtq.numerics import fake_quantize, quantize
from trtq.recovery.fixes.bias import correct_biases, mean_inputs


def test_a_known_mean_error_is_taken_out(tmp_path: Path) -> None:
    weight = np.array([[1.0, 0.3], [0.5, 1.0]], np.float32)

    def one_layer(case: Case) -> None:
        x = case.input("x", 2)
        case.output(case.node("Add", case.node("MatMul", x, weight), np.array([1, -2], np.float32)), 2)

    x = np.random.default_rng(3).uniform(1, 5, size=(40, 2)).astype(np.float32)
    case = small_case(tmp_path, one_layer, x)
    quantization = replace(case.quantized(), scales={"x": np.float32(2 / 127)})  # saturates at 2
    corrected = correct_biases(quantization, case.samples, SILENT)
    rounded = fake_quantize(weight, np.abs(weight).max(axis=0) / 127, axis=1, narrow=True)
    error = (fake_quantize(x, np.float32(2 / 127)) @ rounded - x @ weight).mean(axis=0)
    (correction,) = corrected.corrections.values()
    bias = correction.values
    np.testing.assert_allclose(bias, np.array([1, -2]) - error, rtol=1e-5)
    assert np.abs(error).min() > 0.3
    found = outputs(corrected.rewritten(), case.samples)[0]
    np.testing.assert_allclose(
        found.mean(axis=0), outputs(case.graph, case.samples)[0].mean(axis=0), rtol=1e-5
    )


@pytest.mark.parametrize("biased", [True, False])
def test_every_layer_is_corrected_for_its_own_error_alone(tmp_path: Path, biased: bool) -> None:
    def two_convs(case: Case) -> None:
        x = case.input("x", 3, 6, 6)
        first, second = case.weight(4, 3, 3, 3), case.weight(2, 4, 3, 3)
        extra = [case.weight(4)] if biased else []
        h = case.node("Relu", case.node("Conv", x, first, *extra, kernel_shape=[3, 3]))
        case.output(case.node("Conv", h, second, kernel_shape=[3, 3]), 2, None, None)

    case = small_case(tmp_path, two_convs)
    quantization = case.quantized()
    quantization = replace(quantization, scales={t: s / 2 for t, s in quantization.scales.items()})
    corrected = correct_biases(quantization, case.samples, SILENT)
    first, second = (n for n in corrected.graph.nodes if n.op == "Conv")
    hidden, y = second.inputs[0].name, second.outputs[0].name
    only_second = replace(
        quantization,
        plan=replace(
            quantization.plan,
            edges=[e for e in quantization.plan.edges if e.node == second.name],
            weights=[w for w in quantization.plan.weights if w.node == second.name],
        ),
    )
    (expected,), (found,) = (outputs(g, case.samples, [y]) for g in (case.graph, only_second.rewritten()))
    shift = corrected.corrections[second.name].values - second.inputs[2].values
    np.testing.assert_allclose(shift, (expected - found).mean(axis=(0, 2, 3)), rtol=1e-3, atol=1e-6)
    assert len(first.inputs) == 3
    np.testing.assert_array_equal(outputs(corrected.graph, case.samples), outputs(case.graph, case.samples))
    assert hidden in corrected.scales


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, object]]] = {
    "pointwise": ((4, 5, 6), (3, 4, 1, 1), {}),
    "depthwise": ((4, 7, 6), (4, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "uneven": ((4, 9, 8), (6, 2, 3, 2), {"group": 2, "pads": [1, 0, 2, 1], "strides": [2, 1]}),
    "dilated": ((3, 9, 9), (2, 3, 3, 3), {"dilations": [2, 3], "pads": [2, 3, 2, 3]}),
    "same upper": ((3, 8, 7), (2, 3, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [3, 2]}),
    "same lower": ((3, 8, 7), (2, 3, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [3, 2]}),
    "valid": ((3, 8, 7), (2, 3, 4, 3), {"auto_pad": "VALID"}),
    "one axis": ((3, 9), (2, 3, 3), {"pads": [1, 1], "strides": [2]}),
    "three axes": ((2, 5, 6, 7), (3, 2, 3, 1, 2), {"pads": [1, 0, 1, 0, 0, 1], "strides": [2, 1, 2]}),
}
"""Shapes of a row and of the weights, and attributes."""


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_every_convolution_has_the_mean_it_had(kind: str, tmp_path: Path) -> None:
    row, weights, attributes = CONVOLUTIONS[kind]

    def conv(case: Case) -> None:
        nodes = (case.input("x", *row), case.weight(*weights), case.weight(weights[0]))
        y = case.node("Conv", *nodes, kernel_shape=weights[2:], **attributes)
        case.output(y, weights[0], *[None] * (len(row) - 1))

    case = small_case(tmp_path, conv)
    start = case.quantized()
    one, other = (
        replace(start, scales={"x": np.float32(s * start.scales["x"])}) for s in (0.3, 2)
    )  # saturates; rounds
    means = mean_inputs([one, other], case.samples, SILENT)
    (expected,) = outputs(case.graph, case.samples)
    axes = (0, *range(2, expected.ndim))
    for quantization in (one, other):
        before, after = (
            outputs(q.rewritten(), case.samples)[0] for q in (quantization, means.corrected(quantization))
        )
        error = np.abs((before - expected).mean(axis=axes)).max()
        assert np.abs((after - expected).mean(axis=axes)).max() < 1e-3 * error


def test_codes_are_rounded_as_by_a_quantizer() -> None:
    values = np.arange(-400, 400, dtype=np.float32).reshape(1, -1) / 4  # ties among them
    sums = np.zeros((2, 1, 1, 800), np.float32)
    scales = np.array([0.5], np.float32)
    kernels.add_sums(values, np.ones((1, 1), np.bool_), scales, sums)
    np.testing.assert_array_equal(sums[0, 0], values)
    np.testing.assert_array_equal(sums[1, 0], quantize(values, scales[0]))


def test_nothing_without_a_place_for_a_bias(tmp_path: Path) -> None:
    def bare(case: Case) -> None:
        case.output(case.node("MatMul", case.input("x", 4), case.weight(4, 3)), 3)

    quantization = small_case(tmp_path, bare).quantized()
    case = small_case(tmp_path, bare)
    assert correct_biases(quantization, case.samples, SILENT) is quantization


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    def layer(case: Case) -> None:
        case.output(case.linear(case.input("x", 4), 4, 3), 3)

    case = small_case(tmp_path, layer)
    one, three = (correct_biases(case.quantized(), case.samples, SILENT, workers=n) for n in (1, 3))
    assert one.to_bytes() == three.to_bytes()


def test_a_layer_left_in_floating_point_keeps_its_bias(tmp_path: Path) -> None:
    def layers(case: Case) -> None:
        h = case.node("Relu", case.linear(case.input("x", 4), 4, 4))
        case.output(case.linear(h, 4, 3), 3)

    case = small_case(tmp_path, layers)
    corrected = correct_biases(case.quantized(), case.samples, SILENT)
    first, second = corrected.plan.int8_nodes
    without = replace(corrected, plan=leave_out(corrected.graph, corrected.plan, {first: "test"}))
    assert [c.node for c in without.corrections_of(without.plan)] == [corrected.corrections[second].node]
    nowhere = dict.fromkeys((first, second), "test")
    without = replace(corrected, plan=leave_out(corrected.graph, corrected.plan, nowhere))
    np.testing.assert_array_equal(
        outputs(without.rewritten(), case.samples), outputs(case.graph, case.samples)
    )


def test_corrections_survive_the_cache_and_can_be_baked_in(tmp_path: Path) -> None:
    def layer(case: Case) -> None:
        case.output(case.linear(case.input("x", 4), 4, 3), 3)

    case = small_case(tmp_path, layer)
    corrected = correct_biases(case.quantized(), case.samples, SILENT)
    again = Quantization.from_bytes(corrected.to_bytes())
    inside = corrected.with_corrections_inside()
    assert again.to_bytes() == corrected.to_bytes()
    assert not inside.corrections
    for form in (again, inside):
        np.testing.assert_array_equal(
            outputs(form.rewritten(), case.samples), outputs(corrected.rewritten(), case.samples)
        )


def test_a_second_correction_starts_anew(tmp_path: Path) -> None:
    def layer(case: Case) -> None:
        x = case.input("x", 4)
        case.output(case.node("Add", case.node("MatMul", x, case.weight(4, 3)), case.weight(3)), 3)

    case = small_case(tmp_path, layer)
    once = correct_biases(case.quantized(), case.samples, SILENT)
    twice = correct_biases(once, case.samples, SILENT)
    assert twice.to_bytes() == once.to_bytes()
