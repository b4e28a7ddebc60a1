"""Whatever a pass makes of a model computes what the model computes, by ONNX's reference implementation.

Integers, truth values and shapes are equal; floats are, to the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from nets import loaded, run
from numpy.typing import NDArray
from random_graphs import RandomModel, random_model

from trtq.calibration.collect import collect
from trtq.calibration.extents import measure_extents
from trtq.calibration.methods import parse_method, scales_from
from trtq.console import SILENT
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.graph.fit import check_fits
from trtq.graph.fold import PASSES, fold
from trtq.graph.half_rules import half_by_rules
from trtq.graph.model import Model, export
from trtq.graph.place import place
from trtq.graph.quantization import Quantization
from trtq.graph.shapes import infer_types
from trtq.recovery.fixes.bias import correct_biases
from trtq.recovery.fixes.shift import shift
from trtq.recovery.fixes.sites import Affine, find_sites, inserted
from trtq.recovery.fixes.smooth import smooth
from trtq.simulation.narrow import holds_narrow

Outputs = dict[str, NDArray]
Check = Callable[[gs.Graph, str], None]

FOLDING = [*PASSES, infer_types]
"""In place, one after the other, as `fold` runs them."""

RECOVERY = (shift, smooth)
"""(graph, plan, samples) -> a graph, or None where there is nothing to do."""


def first_of(seeds: range) -> list[Any]:
    """Parameters of which all but the first are slow tests."""
    return [seeds[0], *(pytest.param(seed, marks=pytest.mark.slow) for seed in seeds[1:])]


def check_same(expected: Outputs, found: Outputs, what: str) -> None:
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, f"{what}: {name}"
        assert found[name].shape == values.shape, f"{what}: {name}"
        if values.dtype.kind == "f" and values.size:
            atol = 2e-5 * max(1.0, float(np.abs(values).max()))
            np.testing.assert_allclose(found[name], values, rtol=0, atol=atol, err_msg=f"{what}: {name}")
        else:
            np.testing.assert_array_equal(found[name], values, err_msg=f"{what}: {name}")


def checker(random: RandomModel, seed: int) -> Check:
    expected = random.outputs()

    def check(graph: gs.Graph, what: str) -> None:
        for body in (graph, *graph.subgraphs(recursive=True)):
            body.tensors(check_duplicates=True)
        nodes = [n.name for body in (graph, *graph.subgraphs(recursive=True)) for n in body.nodes]
        assert len(set(nodes)) == len(nodes), f"seed {seed}, {what}"
        check_same(expected, random.outputs(export(graph)), f"seed {seed}, after {what}")

    return check


def samples_of(random: RandomModel, model: Model, folder: Path) -> Samples:
    """The model's feed, row by row where the model takes any batch."""
    np.savez(folder / "x.npz", **random.feed)
    return load_samples(str(folder / "x.npz"), model.inputs)


@pytest.mark.parametrize("first", first_of(range(0, 200, 20)))
def test_every_pass_keeps_the_function(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 20):
        random = random_model(seed, colliding=seed % 3 > 0)
        check = checker(random, seed)
        model = loaded(random.proto, tmp_path)
        check(model.graph, "load")
        for change in FOLDING:
            change(model.graph)
            check(model.graph.cleanup().toposort(), change.__name__)
        try:
            plan = place(model)
        except InputError:  # nothing to quantize
            continue
        samples = samples_of(random, model, tmp_path)
        for change in RECOVERY:
            if (changed := change(model.graph, plan, samples, workers=1)) is not None:
                check(changed.graph, change.__name__)
        values = np.random.default_rng(seed)
        affines = {
            site: Affine(
                values.uniform(0.2, 5, site.channels),
                values.normal(size=site.channels) if site.takes_middle else None,
            )
            for site in find_sites(model.graph, plan)
        }
        scaled, placed = inserted(model.graph, plan, affines)
        check_fits(placed, scaled)
        check(scaled, "operators inserted")


def forms(random: RandomModel, folder: Path) -> Iterator[tuple[str, gs.Graph]]:
    """Every kind of Q/DQ graph that is made of a model."""
    model = loaded(random.proto, folder, opset=19)
    fold(model.graph)
    samples = samples_of(random, model, folder)
    plan = place(model)
    scales = scales_from(collect(model.graph, plan.tensors, samples), parse_method("max"))
    start = Quantization(model.graph, plan, scales)
    corrected = correct_biases(start, samples, SILENT, workers=1)
    yield "int8", start.rewritten()
    yield "qdq", start.rewritten(weights="qdq")
    yield "corrected", corrected.rewritten()
    yield "corrected inside", corrected.with_corrections_inside().rewritten()
    if not any(True for _ in model.graph.subgraphs()):
        yield "fp16", start.rewritten(rest="fp16")


HALF_SHARE = 0.02
"""Largest error of a float output in float16, relative to its largest magnitude."""


@pytest.mark.parametrize("first", first_of(range(0, 60, 20)))
def test_float16_by_the_range_rules_keeps_the_function(first: int, tmp_path: Path) -> None:
    """Integers and shapes stay equal, floats stay close, by an evaluator that rounds to half."""
    compared = 0
    for seed in range(first, first + 20):
        random = random_model(seed, colliding=seed % 3 > 0)
        model = loaded(random.proto, tmp_path, opset=19)
        fold(model.graph)
        expected = random.outputs(export(model.graph))
        extents = measure_extents(model.graph, samples_of(random, model, tmp_path), workers=1)
        half = export(half_by_rules(model.graph, extents))
        found = random.outputs(half)
        for name, values in expected.items():
            assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape), f"{seed}: {name}"
            if values.dtype.kind == "f":
                finite = np.isfinite(values)
                np.testing.assert_array_equal(np.isfinite(found[name]), finite, err_msg=f"{seed}: {name}")
                largest = np.abs(values[finite]).max(initial=0.0)
                error = np.abs(found[name][finite] - values[finite]).max(initial=0.0)
                assert error <= HALF_SHARE * max(float(largest), 1.0), f"{seed}: {name}"
            elif values.dtype.kind in "iu":
                np.testing.assert_array_equal(found[name], values, err_msg=f"{seed}: {name}")
        compared += holds_narrow(half)
    assert compared > 10


@pytest.mark.parametrize("first", first_of(range(0, 24, 12)))
def test_names_do_not_matter(first: int, tmp_path: Path) -> None:
    """A model whose names are those that passes make up is quantized as it is with other names."""
    compared = 0
    for seed in range(first, first + 12):
        plain, colliding = random_model(seed), random_model(seed, colliding=True)
        feeds = [random.feed for random in (plain, colliding)]
        try:
            pairs = list(zip(forms(plain, tmp_path), forms(colliding, tmp_path), strict=True))
        except InputError:  # nothing to quantize
            continue
        for (what, first_graph), (_, second_graph) in pairs:
            second_graph.tensors(check_duplicates=True)
            results = [run(g, f) for g, f in zip((first_graph, second_graph), feeds, strict=True)]
            for one, other in zip(*(list(r.values()) for r in results), strict=True):
                np.testing.assert_array_equal(one, other, err_msg=f"seed {seed}, {what}")
        compared += 1
    assert compared > 3
