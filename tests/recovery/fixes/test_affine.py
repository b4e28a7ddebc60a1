"""Affine quantization by operators: the function stays, it quantizes as ONNX does with a zero-point, each
channel of a depthwise input uses all codes, dead channels keep their room, what is tried is what is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from family import FOLDER, data_for, folded, quantized
from onnx.reference import ReferenceEvaluator
from small_graphs import Case, outputs, relative_error, small_case

from trtq.backends.compiled import Compiled
from trtq.budget import Budget
from trtq.calibration.calibrate import calibrate
from trtq.calibration.methods import parse_method
from trtq.calibration.search import Rows
from trtq.console import SILENT
from trtq.data.load import load_samples
from trtq.graph.ends import Ends
from trtq.graph.fit import check_fits, of_model
from trtq.graph.model import export
from trtq.graph.place import RESIDUAL, leave_out
from trtq.graph.quantization import Quantization
from trtq.job import Job
from trtq.recipe import Recipe
from trtq.recovery.fixes.affine import (
    _chances,
    _changed,
    _Trials,
    _without_kernels,
    insert_affine,
    most_that_fit,
    searched,
)
from trtq.recovery.fixes.bias import MeanInputs, correct_biases, mean_inputs
from trtq.recovery.fixes.channels import Channels
from trtq.recovery.fixes.fix import fix
from trtq.recovery.fixes.options import LEAST_FACTOR, Option, options
from trtq.recovery.fixes.rounding import round_weights
from trtq.recovery.fixes.sites import Affine, Site, find_sites, inserted
from trtq.recovery.trial import compiled
from trtq.simulation.rows import Workers
from trtq.simulation.similarity import compare, noise_db, sqnr_db


def silu(case: Case, x: gs.Variable) -> gs.Variable:
    return case.node("Mul", x, case.node("Sigmoid", x))


def separable(case: Case) -> None:
    """A SiLU that a depthwise and a grouped convolution read, and in floating point an addition."""
    x = case.input("x", 3, 6, 6)
    a = silu(case, case.conv(x, 3, 4, pads=(1, 1, 1, 1)))
    b = case.conv(a, 4, 4, group=4, pads=(1, 1, 1, 1))
    c = case.conv(a, 4, 4, group=2, pads=(1, 1, 1, 1))
    case.output(case.node("Add", case.node("Tanh", case.node("Add", b, c)), a), 4, None, None)


def gelu(case: Case) -> None:
    h = case.linear(case.input("x", 5, 4), 4, 6)
    one = case.node("Add", case.node("Erf", case.node("Div", h, np.float32(2**0.5))), np.float32(1))
    case.output(case.linear(case.node("Mul", case.node("Mul", h, one), np.float32(0.5)), 6, 3), 5, 3)


def gemm(case: Case) -> None:
    """Weights the one way and the other; a sigmoid gate."""
    x = case.input("x", 4)
    h = case.node("Gemm", x, case.weight(6, 4), case.weight(6), transB=1)
    gated = case.node("Mul", h, case.node("Sigmoid", case.node("Gemm", x, case.weight(4, 6), case.weight(6))))
    case.output(case.node("Gemm", gated, case.weight(3, 6), case.weight(3), transB=1), 3)


def joined(case: Case) -> None:
    """A Concat of a convolution and an activation."""
    x = case.input("x", 3, 6, 6)
    a, b = case.conv(x, 3, 4), silu(case, case.conv(x, 3, 2))
    case.output(case.conv(case.node("Concat", a, b, axis=1), 6, 5), 5, None, None)


BUILDS = [separable, gelu, gemm, joined]


def any_affine(site: Site, random: np.random.Generator) -> Affine:
    middle = random.normal(size=site.channels) if site.takes_middle else None
    return Affine(np.exp(random.normal(size=site.channels)), middle)


@pytest.mark.parametrize("build", BUILDS)
def test_any_factors_and_middles_keep_the_function(tmp_path: Path, build: Callable[[Case], None]) -> None:
    case, random = small_case(tmp_path, build), np.random.default_rng(1)
    sites = find_sites(case.graph, case.plan)
    graph, plan = inserted(case.graph, case.plan, {site: any_affine(site, random) for site in sites})
    assert sites
    assert all(site.takes_middle for site in sites)
    assert set(plan.tensors) >= {site.name for site in sites}
    check_fits(plan, graph)
    kept = [edge for edge in case.plan.edges if (edge.node, edge.index) in plan.inputs]
    assert of_model(plan, case.graph) == replace(case.plan, edges=kept)
    assert all(edge.rule == RESIDUAL for edge in case.plan.edges if edge not in kept)
    expected = outputs(case.graph, case.samples)
    assert relative_error(expected, outputs(graph, case.samples)) < 1e-5
    feed = next(case.samples.rows())
    assert relative_error([expected[0][:1]], ReferenceEvaluator(export(graph)).run(None, feed)) < 1e-5


def test_all_int8_readers_share_one_changed_tensor_and_others_read_what_they_read(tmp_path: Path) -> None:
    case = small_case(tmp_path, separable)
    (site,) = [site for site in find_sites(case.graph, case.plan) if len(site.readers) == 2]
    graph, plan = inserted(case.graph, case.plan, {site: Affine(np.full(4, 2.0), np.ones(4))})
    reading = [node.op for node in graph.tensors()[site.tensor].outputs]
    assert sorted(reading) == ["Add", "Pad"]
    assert [node.op for node in graph.tensors()[site.name].outputs] == ["Conv", "Conv"]
    quantized = case.quantized(graph)
    quantized = replace(quantized, plan=plan, scales=dict.fromkeys(plan.tensors, np.float32(0.1)))
    made = quantized.rewritten()
    assert [node.op for node in made.tensors()[site.name].outputs] == ["QuantizeLinear"]


def test_readers_that_add_unlike_zeros_take_no_middle(tmp_path: Path) -> None:
    def unlike(case: Case) -> None:
        a = silu(case, case.conv(case.input("x", 3, 6, 6), 3, 4))
        case.output(case.conv(a, 4, 2), 2, None, None)
        case.output(case.conv(a, 4, 2, pads=(1, 1, 1, 1)), 2, None, None)

    case = small_case(tmp_path, unlike)
    sites = find_sites(case.graph, case.plan)
    assert [(site.takes_middle, len(site.readers)) for site in sites] == [(True, 1), (False, 2)]


def test_a_zero_point_by_operators_is_that_of_onnx(tmp_path: Path) -> None:
    """The whole Q/DQ model against one with QuantizeLinear's own zero-point, with zeros around the input."""

    def padded(case: Case) -> None:
        a = case.node("Relu", case.conv(case.input("x", 3, 6, 6), 3, 4, pads=(1, 1, 1, 1)))
        case.output(case.conv(a, 4, 2, pads=(1, 1, 1, 1)), 2, None, None)

    case = small_case(tmp_path, padded)
    start = case.quantized()
    site = find_sites(case.graph, case.plan)[1]
    values, scale = np.zeros((1, 4), np.float32), np.float32(2**-6)
    option = Option(values, None, np.full(4, -64 * scale), np.full(4, 191 * scale), np.zeros(4), True)
    made = outputs(_changed(start, {site: option}).rewritten(), case.samples)[0]
    assert option.scale == scale
    np.testing.assert_array_equal(option.affine.middle, 64 * scale)
    other = replace(start, scales={**start.scales, site.tensor: scale}).rewritten()
    for node in other.nodes:
        if node.op in ("QuantizeLinear", "DequantizeLinear") and float(node.inputs[1].values.max()) == scale:
            node.inputs = [*node.inputs[:2], gs.Constant(f"{node.name}/zero", np.array(-64, np.int8))]
    assert sum(len(node.inputs) > 2 for node in other.nodes if "zero" in node.inputs[-1].name) >= 2
    assert relative_error([outputs(other, case.samples)[0]], [made]) < 1e-5


def test_an_addition_reads_floating_point_where_the_scaled_tensor_is_a_second_copy_anyway(
    tmp_path: Path,
) -> None:
    def gated(case: Case) -> None:
        a = silu(case, case.conv(case.input("x", 3, 6, 6), 3, 4))
        b = case.node("HardSwish", case.conv(a, 4, 4))
        case.output(case.conv(case.node("Add", b, a), 4, 2), 2, None, None)

    case = small_case(tmp_path, gated)
    (addition,) = [node for node in case.graph.nodes if node.op == "Add"]
    read = addition.inputs[1].name
    assert [edge.tensor for edge in case.plan.edges if edge.node == addition.name] == [read]
    sites = {site.tensor: site for site in find_sites(case.graph, case.plan)}
    graph, plan = inserted(case.graph, case.plan, {sites[read]: Affine(np.full(4, 2.0))})
    assert [edge for edge in plan.edges if edge.node == addition.name] == []
    nothing = leave_out(graph, plan, dict.fromkeys(plan.int8_nodes, "on purpose"))
    assert (nothing.edges, nothing.weights) == ([], [])
    others = {site: Affine(np.full(site.channels, 2.0)) for tensor, site in sites.items() if tensor != read}
    assert len(inserted(case.graph, case.plan, others)[1].edges) == len(case.plan.edges)


def test_a_reader_left_in_floating_point_is_no_reader(tmp_path: Path) -> None:
    case = small_case(tmp_path, separable)
    depthwise = next(node.name for node in case.graph.nodes if node.attrs.get("group") == 4)
    plan = leave_out(case.graph, case.plan, {depthwise: "on purpose"})
    assert all(depthwise not in site.readers for site in find_sites(case.graph, plan))


def test_moved_values_keep_their_common_range(tmp_path: Path) -> None:
    def pooled(case: Case) -> None:
        x = case.input("x", 3, 8, 8)
        a = silu(case, case.conv(x, 3, 4))
        b = case.node("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2])
        case.output(case.conv(a, 4, 2), 2, None, None)
        case.output(case.conv(b, 4, 2), 2, None, None)

    case = small_case(tmp_path, pooled)
    assert [site.tensor for site in find_sites(case.graph, case.plan)] == ["x"]


# --- factors ------------------------------------------------------------------------------------------------


def depthwise_of(weights: np.ndarray, *, group: int) -> gs.Node:
    x, y = gs.Variable("x", np.float32), gs.Variable("y", np.float32)
    return gs.Node("Conv", "conv", {"group": group}, [x, gs.Constant("w", weights)], [y])


def channels_of(values: np.ndarray) -> Channels:
    return Channels(values.min(axis=0), values.max(axis=0), values)


def test_the_factors_of_a_depthwise_input_are_the_ranges_of_its_channels() -> None:
    """With them one range for the tensor is a range of its own for each channel."""
    random = np.random.default_rng(0)
    values = (random.uniform(-1, 1, (400, 4)) * [100, 10, 1, 2]).astype(np.float32)
    node = depthwise_of(random.normal(size=(4, 1, 3, 3)).astype(np.float32), group=4)
    best = options(Site("x", 1, 4, ("conv",)), [node], channels_of(values), 100.0)[0]
    amax = np.abs(values).max(axis=0).astype(np.float64)
    assert not best.centred
    assert best.factors is not None
    np.testing.assert_allclose(best.factors / best.factors[0], amax / amax[0], rtol=2**-10)
    assert best.scale == pytest.approx(float((amax / best.factors).max()) / 127)
    scaled = values / best.factors
    own = np.rint(values / (amax / 127)) * (amax / 127)
    made = np.rint(scaled / best.scale) * best.scale * best.factors
    assert np.mean(np.square(made - values) / amax**2) < 1.1 * np.mean(np.square(own - values) / amax**2)
    assert best.share < 0.3  # what is left are the weights' own errors


def test_what_lies_to_one_side_of_zero_gets_all_codes() -> None:
    """Each channel of a depthwise input by the paper's equations 3 and 4, in float64."""
    random = np.random.default_rng(0)
    low, high = np.array([0, -0.3, 0, -4.0]), np.array([100, 10, 1, 0.5])
    values = random.uniform(low, high, (2000, 4)).astype(np.float32)
    values[0], values[1] = low, high
    node = depthwise_of(random.normal(size=(4, 1, 3, 3)).astype(np.float32), group=4)
    site = Site("x", 1, 4, ("conv",), takes_middle=True)
    best = options(site, [node], channels_of(values), 100.0)[0]
    assert best.centred
    assert best.factors is not None
    steps = best.scale * best.factors
    np.testing.assert_allclose(steps, (high - low) / 255, rtol=2**-10)
    codes = np.rint(best.affine.of(values) / best.scale)
    expected = np.rint(values.astype(np.float64) / steps) - np.rint(low / steps) - 128
    assert np.abs(codes - expected).max() <= 1  # the middle's last bits
    assert codes.min() >= -129
    assert codes.max() <= 128
    zero = best.affine.of(np.zeros((1, 4), np.float32)) / best.scale
    np.testing.assert_allclose(zero, np.rint(zero), atol=128 / 2048)


def test_a_range_is_cut_where_values_are_rare() -> None:
    """Of half the widest range: a ReLU keeps its zeros, what lies on both sides loses both ends."""
    relu = Option(
        np.zeros((1, 1), np.float32), None, np.zeros(1), np.full(1, 8.0), np.full(1, 0.5), True, 0.5
    )
    assert relu.scale == np.float32(4 / 255)
    np.testing.assert_allclose(relu.affine.of(np.float32([[0], [4]])) / relu.scale, [[-128], [127]], atol=0.1)
    even = replace(relu, low=np.full(1, -4.0), high=np.full(1, 4.0), usual=np.zeros(1))
    np.testing.assert_allclose(
        even.affine.of(np.float32([[-2], [2]])) / even.scale, [[-127], [128]], atol=0.6
    )


def test_zeros_that_are_added_keep_a_code() -> None:
    """Where all values are far from zero, a range without it would be the best for them."""
    values = np.random.default_rng(0).uniform(90, 100, (2000, 2)).astype(np.float32)
    node = depthwise_of(np.ones((2, 1, 3, 3), np.float32), group=2)
    site = Site("x", 1, 2, ("conv",), (1, 1, 1, 1), takes_middle=True)
    found = options(site, [node], channels_of(values), 100.0)
    assert any(option.centred for option in found)
    for option in found:
        zero = option.affine.of(np.zeros((1, 2), np.float32)) / option.scale
        assert zero.min() > -128.5
        assert zero.max() < 127.5


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_options_are_the_same_for_values_of_any_size(size: float) -> None:
    random = np.random.default_rng(0)
    values = (random.uniform(-0.1, 1, (200, 3)) * [50, 1, 7]).astype(np.float32)
    node = depthwise_of(random.normal(size=(3, 1, 3, 3)).astype(np.float32), group=3)
    site = Site("x", 1, 3, ("conv",), takes_middle=True)
    shares = [
        [option.share for option in options(site, [node], channels_of(values * by), float(by) * 50)]
        for by in (np.float32(1), np.float32(size))
    ]
    assert shares[0] == pytest.approx(shares[1], rel=1e-2)


@pytest.mark.parametrize("small", [0.0, 1e-6])
def test_the_factor_of_a_dead_channel_is_bounded(small: float) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (200, 3)).astype(np.float32) * [50, 1, small]
    node = depthwise_of(np.ones((3, 1, 3, 3), np.float32), group=3)
    site = Site("x", 1, 3, ("conv",), takes_middle=True)
    found = options(site, [node], channels_of(values.astype(np.float32)), 50.0)
    assert found
    for option in found:
        factors = np.ones(3) if option.factors is None else option.factors
        assert factors.min() >= factors.max() * LEAST_FACTOR * (1 - 2**-9)
        assert np.isfinite(factors).all()
        assert option.affine.middle is None or np.isfinite(option.affine.middle).all()


def test_channels_without_values_change_nothing() -> None:
    zeros = np.zeros((10, 2), np.float32)
    node = depthwise_of(np.ones((2, 1, 3, 3), np.float32), group=2)
    assert options(Site("x", 1, 2, ("conv",), takes_middle=True), [node], channels_of(zeros), 1.0) == []


def test_no_options_where_every_channel_is_alike() -> None:
    values = np.tile(np.linspace(-1, 1, 101, dtype=np.float32)[:, None], 3)
    node = depthwise_of(np.ones((3, 1, 1, 1), np.float32), group=3)
    assert options(Site("x", 1, 3, ("conv",)), [node], channels_of(values), 1.0) == []


def test_most_that_fit_asks_only_so_often() -> None:
    asked = []

    def fits(items: object) -> bool:
        asked.append(list(items))  # type: ignore[call-overload]
        return not {3, 5} & set(items)  # type: ignore[call-overload]

    assert most_that_fit(range(8), fits, 20) == [0, 1, 2, 4, 6, 7]
    assert most_that_fit([3, 1, 2], lambda items: len(items) < 3, 20) == [3, 1]
    asked.clear()
    kept = most_that_fit(range(8), fits, 4)
    assert len(asked) == 4
    assert kept == [0, 1]


# --- the search ---------------------------------------------------------------------------------------------


def option_of(factors: np.ndarray, *, amax: float = 1.0, centred: bool = False, part: float = 1.0) -> Option:
    """Of values between -amax / 5, or -amax without a middle, and amax."""
    high, none = np.full(factors.shape, amax), np.zeros(factors.shape)
    values = np.linspace(-amax / 5, amax, 50, dtype=np.float32)[:, None].repeat(factors.size, axis=1)
    return Option(values, factors, -high / (5 if centred else 1), high, none, centred, part)


def choices_of(count: int) -> tuple[dict[Site, list[Option]], dict[Site, float]]:
    """Sites with one option each, and what they promise, the first most."""
    sites = [Site(f"t{number}", 1, 2, ("conv",)) for number in range(count)]
    return {s: [option_of(np.ones(2))] for s in sites}, {s: 0.5**i for i, s in enumerate(sites, 1)}


def test_scales_that_add_up_are_all_taken() -> None:
    options, promises = choices_of(9)

    def noise(chosen: Mapping[Site, Option]) -> float:
        return 1 - sum(promises[site] for site in chosen)

    found = searched(options, promises, noise, Workers(1))
    assert list(found.choices) == list(options)
    assert found.plain == 1


def test_the_best_scales_are_not_lost_where_all_at_once_gain_nothing() -> None:
    """All others together undo what the first saves; and with all others it is better without the first."""
    options, promises = choices_of(9)
    best, good, *_ = options

    def noise(chosen: Mapping[Site, Option]) -> float:
        saved = sum(0.5 if site == best else 0.2 if site == good else -0.1 for site in chosen)
        return 1 - saved + (0.6 if best in chosen and len(chosen) == len(options) else 0)

    assert noise(dict.fromkeys(options, options[best][0])) > 1
    assert set(searched(options, promises, noise, Workers(1)).choices) == {best, good}


def test_nothing_more_is_tried_when_the_time_is_over() -> None:
    options, promises = choices_of(9)
    found = searched(options, promises, lambda chosen: 1.0, Workers(1), over=lambda: True)
    assert found.choices == {}
    assert found.runs == 6  # none, 1, 2, 4, 8 and all


@pytest.mark.parametrize(("largest", "parts"), [(0.1, [0.65]), (1.0, [1.0])])
def test_what_rows_held_back_lack_is_not_cut_off(largest: float, parts: list[float]) -> None:
    """A narrower range is the better there; the rows to fit on have values that it would cut off, or not."""
    option = option_of(np.ones(2), amax=largest)
    option = replace(option, low=np.full(2, -1.0), high=np.ones(2), share=0.5)
    site = Site("t", 1, 2, ("conv",))

    def noise(chosen: Mapping[Site, Option]) -> float:
        return sum(option.part for option in chosen.values()) if chosen else 2

    found = searched({site: [option]}, {site: 3.0}, noise, Workers(1))
    assert [option.part for option in found.choices.values()] == parts


GAINS = np.exp(np.linspace(-3, 3, 12)).astype(np.float32)
"""Of the channels of `spread`."""


def spread(case: Case) -> None:
    """A SiLU whose channels differ by orders of magnitude; a depthwise convolution makes up for it."""
    x = case.input("x", 3, 8, 8)
    first, second = case.weight(12, 3, 3, 3) / 4, case.weight(12, 1, 3, 3)
    first *= GAINS[:, None, None, None]
    second /= GAINS[:, None, None, None]
    same = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    a = silu(case, case.node("Conv", x, first, case.weight(12), **same))
    b = silu(case, case.node("Conv", a, second, case.weight(12), group=12, **same))
    case.output(case.conv(b, 12, 4), 4, None, None)


def job_of(folder: Path, case: Case, **options: object) -> Job:
    recipe = Recipe(
        model=str(folder / "m.onnx"),
        data=str(folder / "x.npz"),
        cache=str(folder / "cache"),
        threads=1,
        **{"rest": "fp32", **options},  # type: ignore[arg-type]
    )
    return Job.open(recipe, SILENT)


@pytest.mark.parametrize("corrected", [False, True])
def test_what_is_tried_is_what_is_made(tmp_path: Path, corrected: bool) -> None:
    """A run with all that an option decides as inputs is the quantization that it is written into."""
    case = small_case(tmp_path, spread)
    start = case.quantized()
    if corrected:
        start = round_weights(start, case.samples, workers=1)
        start = correct_biases(start, case.samples, SILENT, workers=1)
        assert start.codes
        assert start.corrections
    sites = find_sites(start.graph, start.plan)
    rows = Rows(start.graph, case.samples, threads=1, kept=True)
    trials = _Trials(rows, start, sites)
    assert noise_db(trials.noise({})) == pytest.approx(rows.sqnr_db(start, SILENT, ""), abs=1e-3)
    random = np.random.default_rng(0)
    for number in range(1, len(sites) + 1):
        chosen = {
            site: option_of(np.exp(random.normal(size=site.channels)), amax=3.0, centred=own, part=0.8)
            for own, site in zip([True, False, True], sites[:number], strict=False)
        }
        made = rows.sqnr_db(_changed(start, chosen), SILENT, "")
        assert noise_db(trials.noise(chosen)) == pytest.approx(made, abs=1e-3)


def biases(case: Case) -> None:
    """Readers that add a scalar, a vector, nothing, and what they share with another node, by a name that a
    bias might get; and that can add nothing."""
    x, shared = case.input("x", 4), gs.Constant("n8/bias", case.weight(4))
    h = case.node("Tanh", case.node("Gemm", x, case.weight(4, 4), case.weight(4)))
    for bias in ([np.float32(3)], [case.weight(1, 4)], [], [shared]):
        case.output(case.node("Gemm", h, case.weight(4, 4), *bias), 4)
        h = case.node("Tanh", case.graph.outputs[-1])
    assert [node.name for node in shared.outputs] == ["n8"]
    case.output(case.node("Exp", case.node("Add", case.node("MatMul", h, case.weight(4, 4)), x)), 4)
    case.output(case.node("Exp", case.node("Add", case.node("Neg", h), shared)), 4)


@pytest.mark.parametrize("factors", [False, True])
def test_readers_have_biases_of_any_kind(tmp_path: Path, factors: bool) -> None:
    case = small_case(tmp_path, biases)
    start, sites = case.quantized(), find_sites(case.graph, case.plan)
    assert [site.takes_middle for site in sites] == [True] * 5 + [False]
    random = np.random.default_rng(0)
    chosen = {
        site: option_of(np.exp(random.normal(size=4)), centred=site.takes_middle and not factors)
        for site in sites
    }
    rows = Rows(start.graph, case.samples, threads=1, kept=True)
    trials, made = _Trials(rows, start, sites), _changed(start, chosen)
    assert noise_db(trials.noise({})) == pytest.approx(rows.sqnr_db(start, SILENT, ""), abs=1e-3)
    assert noise_db(trials.noise(chosen)) == pytest.approx(rows.sqnr_db(made, SILENT, ""), abs=1e-3)
    assert relative_error(outputs(case.graph, case.samples), outputs(made.graph, case.samples)) < 1e-5


def test_fix_inserts_operators_where_nothing_can_be_folded(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    case = small_case(tmp_path, spread)
    job = job_of(tmp_path, case, method="max")
    start = case.quantized()
    made = fix(job, start).quantization
    assert made is not None
    assert "affine" in made.notes["fixes"]
    assert {"Pad", "Sub"} <= {node.op for node in made.graph.nodes}
    expected = outputs(case.graph, case.samples)
    plain, better = (sqnr_db(expected[0], outputs(q.rewritten(), case.samples)[0])[0] for q in (start, made))
    assert better > plain + 10
    assert relative_error(expected, outputs(made.graph, case.samples)) < 1e-5
    assert made.plan.int8_nodes == start.plan.int8_nodes
    before, after = compiled(job, start), compiled(job, made)
    assert before is not None
    assert after is not None
    assert after.kernels <= before.kernels


def test_biases_stay_as_they_are_where_correcting_them_hurts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(_: MeanInputs, quantization: Quantization) -> Quantization:
        made = corrected(mean_inputs([quantization], case.samples, SILENT, workers=1), quantization)
        worse = {name: replace(c, values=c.values + 100) for name, c in made.corrections.items()}
        return replace(made, corrections=worse)

    case = small_case(tmp_path, spread)
    corrected = MeanInputs.corrected
    monkeypatch.setattr(MeanInputs, "corrected", spoilt)
    made = fix(job_of(tmp_path, case, method="max", backend="none"), case.quantized()).quantization
    assert made is not None
    assert made.notes["fixes"] == "affine"


def test_without_a_builder_only_behind_pointwise_operators(tmp_path: Path) -> None:
    case = small_case(tmp_path, spread)
    made = insert_affine(job_of(tmp_path, case, method="max", backend="none"), case.quantized())
    assert made is not None
    added = [node for node in made.graph.nodes if node.name.endswith("/affine/Pad")]
    assert added
    assert all(node.inputs[0].inputs[0].op == "Mul" for node in added)


def test_a_rest_in_float16_holds_the_changed_tensors(tmp_path: Path) -> None:
    case = small_case(tmp_path, spread)
    made = insert_affine(job_of(tmp_path, case, method="max", backend="none"), case.quantized())
    assert made is not None
    expected = outputs(case.graph, case.samples)[0]
    whole, half = (
        sqnr_db(expected, outputs(made.rewritten(rest=rest), case.samples)[0].astype(np.float32))[0]
        for rest in ("fp32", "fp16")
    )
    assert half > whole - 1


def test_no_engine_is_built_when_the_budget_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Quantization] = []

    def stub(_: Job, quantization: Quantization) -> Compiled:
        asked.append(quantization)
        return Compiled(())

    monkeypatch.setattr("trtq.recovery.fixes.affine.compiled", stub)
    case = small_case(tmp_path, spread)
    job, start = job_of(tmp_path, case, method="max"), case.quantized()
    chances = _chances(job, start, find_sites(start.graph, start.plan))
    chosen = {site: some[0] for site, some in chances.options.items()}
    assert set(_without_kernels(job, start, chances, chosen)) == set(chosen)
    asked.clear()
    spent = replace(job, budget=Budget.of(0))
    assert _without_kernels(spent, start, chances, chosen) == {}
    assert asked == [start]


def test_model_inputs_that_are_to_be_int8_stay_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder takes everything."""
    monkeypatch.setattr("trtq.recovery.fixes.affine.compiled", lambda *_: Compiled(()))
    images = np.random.default_rng(0).uniform(0, 1, (32, 3, 6, 6)).astype(np.float32)
    case = small_case(tmp_path, separable, images)
    for ends, inserted_at in ((Ends(), {"x", "t2"}), (Ends(int8=True), {"t2"})):
        start = replace(case.quantized(), ends=ends)
        made = insert_affine(job_of(tmp_path, case, method="max"), start)
        assert made is not None
        names = {tensor for tensor in made.plan.tensors if tensor.endswith("/affine")}
        assert names == {f"{tensor}/affine" for tensor in inserted_at}
        assert (made.delivered().inputs[0].dtype == np.int8) == ends.int8


@pytest.mark.slow
def test_operators_that_add_kernels_are_left_out(tmp_path: Path) -> None:
    """Of a family's Concat of pooled tensors: TensorRT for RTX 1.7.1 multiplies them one by one."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    model = folded("yolo_modern")
    samples = data_for(model.inputs)
    start = quantized(model, samples)
    np.savez(tmp_path / "x.npz", **{name: np.stack(list(own)) for name, own in samples.columns.items()})
    recipe = Recipe(model=str(model.path), data=str(tmp_path / "x.npz"), rest="fp32", threads=1)
    job = Job.open(replace(recipe, cache=str(tmp_path / "cache")), SILENT)
    random = np.random.default_rng(0)
    pooled = next(n for n in model.graph.nodes if n.op == "Concat" and n.inputs[-1].inputs[0].op == "MaxPool")
    sites = {
        site: option_of(random.uniform(0.5, 2, site.channels))
        for site in find_sites(start.graph, start.plan)
        if site.tensor in (pooled.outputs[0].name, "silu")
    }
    before, every = compiled(job, start), compiled(job, _changed(start, sites))
    assert before is not None
    assert every is not None
    assert every.kernels > before.kernels
    kept = _without_kernels(job, start, _chances(job, start, list(sites)), sites)
    assert [site.tensor for site in kept] == ["silu"]


@pytest.mark.slow
def test_a_detector_of_silu_and_depthwise_convolutions(tmp_path: Path) -> None:
    """YOLOX's head behind separable convolutions (tools/make_yolox.py): scores and boxes on other images."""
    folder = FOLDER / "detector"
    recipe = Recipe.load(folder / "recipe.toml")
    recipe = replace(recipe, model=str(folder / "yolox.onnx"), data=str(folder / "calib.npz"), threads=1)
    recipe = replace(recipe, rest="fp32", method=parse_method("max"), cache=str(tmp_path), backend="none")
    job = Job.open(recipe, SILENT)
    job = replace(job, data=job.data.spread(48))
    start = calibrate(job, job.place())
    made = insert_affine(job, start)
    assert made is not None
    rows = load_samples(str(folder / "eval.npz"), job.model.inputs, recipe.preprocess).subset(range(48))
    expected = outputs(job.model.graph, rows)[0]
    plain, scaled = (
        compare({"out": expected}, {"out": outputs(q.rewritten(), rows)[0]}) for q in (start, made)
    )
    assert len(plain["out"].parts) == 2  # boxes in pixels, and scores
    assert plain["out"].sqnr_db < 10
    assert scaled["out"].sqnr_db > plain["out"].sqnr_db + 10
    assert made.plan.int8_nodes == [node.name for node in made.plan.nodes]
