from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from mixed import BOXES, SCORES, lowest_decibels, mixed_net
from nets import attention, loaded, max_scales, net, normal, run, tensor
from numpy.typing import NDArray

import trtq.simulation.simulator
from trtq.data.samples import Column, Samples
from trtq.errors import InputError
from trtq.gate.metrics import load_metric
from trtq.graph.fold import fold
from trtq.graph.groups import groups
from trtq.graph.place import leave_out, place
from trtq.graph.plan import Edge
from trtq.graph.quantization import Quantization
from trtq.numerics import fake_quantize, scale_from_amax
from trtq.simulation.kept import Kept
from trtq.simulation.simulator import Effect, Score, Simulator

_ROWS = 6

_RESIDUAL = """
    g (float[B,4,6,6] x) => (float[B,3] y, float[B,4,6,6] z) {
        a = Conv<pads = [1,1,1,1]>(x, w)
        r = Relu(a)
        b = Conv<pads = [1,1,1,1]>(r, w)
        z = Add(b, r)
        c = Conv<pads = [1,1,1,1], group = 4>(z, depthwise)
        d = Conv<pads = [1,1,1,1]>(z, other)
        both = Concat<axis = 1>(c, d)
        e = Relu(both)
        pooled = ReduceMean<axes = [2, 3], keepdims = 0>(e)
        y = Gemm(pooled, head, bias)
    }
"""
"""Shared weights, a residual, two branches, and an output in the middle."""


def _residual(batch: str) -> onnx.ModelProto:
    return net(
        _RESIDUAL.replace("B", batch),
        w=normal(4, 4, 3, 3, seed=1) / 4,
        depthwise=normal(4, 1, 3, 3, seed=2),
        other=normal(4, 4, 3, 3, seed=3),
        head=normal(8, 3, seed=4),
        bias=normal(3, seed=5),
    )


def _branching() -> onnx.ModelProto:
    """A body that reads a tensor from outside."""
    return net(
        """
        g (float[N,8] x) => (float[N,4] y) {
            h = MatMul(x, a)
            total = ReduceSum<keepdims = 0>(h)
            positive = Greater(total, zero)
            m = If(positive) <
                then_branch = t () => (float[N,8] u) { u = Relu(h) },
                else_branch = f () => (float[N,8] v) { v = Neg(h) }
            >
            k = MatMul(m, b)
            y = MatMul(k, c)
        }
        """,
        a=normal(8, 8, seed=1),
        b=normal(8, 8, seed=2),
        c=normal(8, 4, seed=3),
        zero=np.float32(0.0),
    )


def _samples(
    columns: Mapping[str, Column], model: onnx.ModelProto, folder: Path, **targets: NDArray
) -> Samples:
    return Samples("rows", tuple(loaded(model, folder).inputs), columns, targets, "hash")


def _quantization(model: onnx.ModelProto, feed: Mapping[str, NDArray], folder: Path) -> Quantization:
    opened = loaded(model, folder)
    fold(opened.graph)
    plan = place(opened)
    return Quantization(opened.graph, plan, max_scales(opened.graph, plan, feed))


def _case(name: str) -> tuple[onnx.ModelProto, dict[str, NDArray]]:
    if name == "attention":
        mask = np.arange(6)[None] < np.arange(1, _ROWS + 1)[:, None]
        return attention(), {"x": normal(_ROWS, 6, 8), "mask": mask.astype(np.int64)}
    if name == "body":
        return _branching(), {"x": normal(_ROWS, 8)}
    return _residual("B" if name == "residual" else "4"), {"x": normal(_ROWS, 4, 6, 6)}


def _open(name: str, folder: Path) -> tuple[Quantization, Samples]:
    model, columns = _case(name)
    feed = {key: array[:4] for key, array in columns.items()}
    return _quantization(model, feed, folder), _samples(columns, model, folder)


def _expected(quantization: Quantization, samples: Samples) -> dict[str, NDArray]:
    """The outputs of the rewritten model, four rows at a time; the last four overlap the first."""
    graph = quantization.rewritten() if quantization.plan.edges else quantization.graph
    parts = [slice(0, 4), slice(_ROWS - 4, _ROWS)]
    found = [run(graph, {k: np.asarray(v)[part] for k, v in samples.columns.items()}) for part in parts]
    return {name: np.concatenate([found[0][name], found[1][name][8 - _ROWS :]]) for name in found[0]}


def _partial_plans(quantization: Quantization):
    """Only one group in INT8, all but one, and all."""
    every = groups(quantization.graph, quantization.plan)
    for group in every:
        for mode in ("only", "all-but"):
            left = [g for g in every if (g == group) == (mode == "all-but")]
            nodes = {name: "to measure" for g in left for name in g.nodes}
            yield leave_out(quantization.graph, quantization.plan, nodes)
    yield quantization.plan


@pytest.mark.parametrize("name", ["residual", "fixed-batch", "attention", "body"])
@pytest.mark.parametrize("kept", ["in memory", "in files", "no cuts"])
def test_outputs_are_those_of_the_rewritten_model(
    name: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kept == "in files":
        monkeypatch.setattr(trtq.simulation.simulator, "Kept", lambda batches, _: Kept(batches, 0))
    if kept == "no cuts":  # every plan runs from the inputs
        monkeypatch.setattr(trtq.simulation.simulator, "KEPT_BYTES", 0)
    quantization, samples = _open(name, tmp_path)
    simulator = Simulator(quantization, samples, workers=2)
    fp32 = _expected(dataclasses.replace(quantization, plan=_nothing(quantization)), samples)
    for output, array in fp32.items():
        np.testing.assert_allclose(simulator.reference[output], array, rtol=1e-4, atol=1e-5)
    different = 0
    for plan in _partial_plans(quantization):
        expected = _expected(dataclasses.replace(quantization, plan=plan), samples)
        found = simulator.outputs(plan)
        assert found.keys() == expected.keys()
        for output, array in expected.items():
            np.testing.assert_allclose(found[output], array, rtol=1e-4, atol=1e-5)
            different += not np.allclose(array, fp32[output], rtol=1e-4, atol=1e-5)
    assert different > len(quantization.plan.int8_nodes)  # the comparison sees quantization


def _nothing(quantization: Quantization):
    plan = quantization.plan
    return leave_out(quantization.graph, plan, dict.fromkeys(plan.int8_nodes, "to measure"))


def test_no_node_in_int8_is_the_reference(tmp_path: Path) -> None:
    quantization, samples = _open("residual", tmp_path)
    simulator = Simulator(quantization, samples)
    assert simulator.score(_nothing(quantization)) == Score(200.0, 0.0, None)


def test_the_noise_of_one_product_is_that_of_its_rounded_operands(tmp_path: Path) -> None:
    x, w = normal(_ROWS, 8), normal(8, 5, seed=1)
    model = net("g (float[N,8] x) => (float[N,5] y) { y = MatMul(x, w) }", w=w)
    quantization = _quantization(model, {"x": x}, tmp_path)
    exact = x.astype(np.float64) @ w.astype(np.float64)
    rounded = fake_quantize(x, scale_from_amax(np.abs(x).max())).astype(np.float64) @ fake_quantize(
        w, scale_from_amax(np.abs(w).max(axis=0)), axis=1, narrow=True
    ).astype(np.float64)
    noise = np.square(exact - rounded).sum() / np.square(exact).sum()
    (effect,) = Simulator(quantization, _samples({"x": x}, model, tmp_path)).effects()
    assert effect.noise == pytest.approx(noise, rel=1e-3)
    assert effect.sqnr_db == pytest.approx(-10 * np.log10(noise), abs=0.01)


@pytest.mark.parametrize("mode", ["only", "all-but"])
def test_neither_workers_nor_order_change_an_effect(mode: str, tmp_path: Path) -> None:
    quantization, samples = _open("residual", tmp_path)
    every = groups(quantization.graph, quantization.plan)
    found: list[list[Effect]] = []
    for workers, among in [(1, every), (3, every[::-1])]:
        simulator = Simulator(quantization, samples, workers=workers)
        found.append(list(simulator.effects(mode, among)))
    assert found[0] == found[1][::-1]
    assert [effect.group for effect in found[0]] == every


def test_effects_agree_with_scores_and_metrics(tmp_path: Path) -> None:
    model, columns = _case("residual")
    labels = np.arange(_ROWS) % 3
    quantization = _quantization(model, columns, tmp_path)
    samples = _samples(columns, model, tmp_path, labels=labels)
    metric = load_metric("top1@y")
    simulator = Simulator(quantization, samples, metric=metric)
    scores = {effect.group.name: effect for effect in simulator.effects("all-but")}
    for group in groups(quantization.graph, quantization.plan):
        plan = leave_out(quantization.graph, quantization.plan, dict.fromkeys(group.nodes, "to measure"))
        outputs, effect = simulator.outputs(plan), scores[group.name]
        noises = [
            np.square(outputs[n] - r, dtype=np.float64).sum() / np.square(r, dtype=np.float64).sum()
            for n, r in simulator.reference.items()
        ]
        assert effect.noise == pytest.approx(np.mean(noises), rel=1e-4)
        assert effect.sqnr_db == pytest.approx(-10 * np.log10(np.mean(noises)), abs=1e-3)
        assert effect.metric == np.mean(outputs["y"].argmax(axis=1) == labels)


def test_rows_of_different_lengths_are_scored_together(tmp_path: Path) -> None:
    model = net(
        """
        g (float[N,L,8] x) => (float[N,L,4] y) {
            h = MatMul(x, a)
            r = Relu(h)
            y = MatMul(r, b)
        }
        """,
        a=normal(8, 8, seed=1),
        b=normal(8, 4, seed=2),
    )
    rows = [normal(length, 8, seed=length) for length in (3, 5, 5, 2)]
    quantization = _quantization(model, {"x": np.concatenate(rows)[None]}, tmp_path)
    simulator = Simulator(quantization, _samples({"x": rows}, model, tmp_path))
    graphs = (quantization.graph, quantization.rewritten())
    pairs = [[run(graph, {"x": row[None]})["y"] for row in rows] for graph in graphs]
    noise = sum(np.square(r - c, dtype=np.float64).sum() for r, c in zip(*pairs, strict=True))
    signal = sum(np.square(r, dtype=np.float64).sum() for r in pairs[0])
    assert simulator.score(quantization.plan).noise == pytest.approx(noise / signal, rel=1e-3)
    found = simulator.outputs(quantization.plan)["y"]
    for own, expected in zip(found, pairs[1], strict=True):
        np.testing.assert_allclose(own, expected[0], rtol=1e-3, atol=1e-3)


class _Made:
    """Rows of 1 MB that exist only once they are read."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> NDArray:
        return np.random.default_rng(index).normal(size=(1, 512, 512)).astype(np.float32)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trtq.simulation.simulator, "KEPT_BYTES", 4 << 20)
    text = "g (float[N,1,512,512] x) => (float[N,1,512,512] y) { a = Conv(x, w) y = Conv(a, w) }"
    model = net(text, w=normal(1, 1, 1, 1))
    quantization = _quantization(model, {"x": np.stack([_Made()[0]])}, tmp_path)
    samples = _samples({"x": _Made()}, model, tmp_path)
    list(Simulator(quantization, samples.subset([0, 1]), workers=2).effects())  # all is imported
    tracemalloc.start()
    try:
        effects = list(Simulator(quantization, samples, workers=2).effects("all-but"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(0 < effect.noise < 1 for effect in effects)
    assert peak < 90 << 20  # rows, and outputs twice: 180 MB


def test_a_plan_with_a_quantizer_more_is_refused(tmp_path: Path) -> None:
    quantization, samples = _open("residual", tmp_path)
    more = [*quantization.plan.edges, Edge("both", "e", 0, "by-hand", "both")]
    with pytest.raises(InputError, match="not part of"):
        Simulator(quantization, samples).score(dataclasses.replace(quantization.plan, edges=more))


def test_a_model_that_does_not_run_on_the_data_is_an_input_error(tmp_path: Path) -> None:
    model = net(
        "g (int64[N] x) => (float[N,4] y) { h = Gather(table, x) y = MatMul(h, w) }",
        table=normal(5, 8),
        w=normal(8, 4, seed=1),
    )
    quantization = _quantization(model, {"x": np.arange(5)}, tmp_path)
    with pytest.raises(InputError, match="does not run on row 0 of the data"):
        Simulator(quantization, _samples({"x": np.array([7])}, model, tmp_path))


def test_optional_inputs_and_outputs_that_are_left_out(tmp_path: Path) -> None:
    """Their empty names are no tensor that could be kept or asked for."""
    model = net(
        """g (float[N,8] x) => (float[N,4] y) {
            a = MatMul(x, w) d = Dropout(a) c = Clip(d, , most) y = MatMul(c, v)
        }""",
        w=normal(8, 8, seed=1),
        v=normal(8, 4, seed=2),
        most=np.float32(1),
    )
    model.graph.node[1].output.append("")
    quantization = _quantization(model, {"x": normal(4, 8)}, tmp_path)
    samples = _samples({"x": normal(_ROWS, 8)}, model, tmp_path)
    assert len(list(Simulator(quantization, samples).effects())) == 2


def test_behind_what_selects_noise_is_measured_in_front_of_it(tmp_path: Path) -> None:
    """Another sign selects another number of values; those that go in are compared."""
    model = net(
        """g (float[N,8] x) => (float[M] y) {
            a = MatMul(x, w) p = Greater(a, zero) f = Reshape(p, all) v = Reshape(a, all) y = Compress(v, f)
        }""",
        w=normal(8, 2048, seed=1),
        zero=np.float32(0),
        all=np.array([-1]),
    )
    quantization = _quantization(model, {"x": normal(4, 8)}, tmp_path)
    simulator = Simulator(quantization, _samples({"x": normal(_ROWS, 8)}, model, tmp_path))
    x = normal(_ROWS, 8)
    r, c = (tensor(graph, "a", {"x": x}) for graph in (quantization.graph, quantization.rewritten()))
    noise = np.square(r - c, dtype=np.float64).sum() / np.square(r, dtype=np.float64).sum()
    assert simulator.score(quantization.plan).noise == pytest.approx(noise, rel=1e-3)
    found = simulator.outputs(quantization.plan)["y"]
    for own, row in zip(found, c, strict=True):
        np.testing.assert_allclose(own, row[row > 0], rtol=1e-4)


def test_an_output_that_mixes_scales_has_the_noise_of_its_worst_component(tmp_path: Path) -> None:
    """Alone in INT8, a layer of the boxes is judged by them, and one of the scores by those."""
    model, x = mixed_net(), normal(21, 16)  # the last of the batches is a short one
    quantization = _quantization(model, {"x": x}, tmp_path)
    simulator = Simulator(quantization, _samples({"x": x}, model, tmp_path))
    effects = {effect.group.name: effect for effect in simulator.effects()}
    for group in groups(quantization.graph, quantization.plan):
        left_out = [n for n in quantization.plan.int8_nodes if n not in group.nodes]
        plan = leave_out(quantization.graph, quantization.plan, dict.fromkeys(left_out, "to measure"))
        found = run(dataclasses.replace(quantization, plan=plan).rewritten(), {"x": x})["y"]
        part = [SCORES] if {"k", "cls"} & set(group.nodes) else [BOXES]
        expected = lowest_decibels(run(quantization.graph, {"x": x})["y"], found, part)
        assert effects[group.name].sqnr_db == pytest.approx(expected, abs=0.02)
        assert effects[group.name].noise == pytest.approx(10 ** (-expected / 10), rel=0.01)
    assert min(effects.values(), key=lambda effect: effect.sqnr_db).group.nodes == ("cls",)


def _logarithm() -> onnx.ModelProto:
    return net("g (float[N,8] x) => (float[N,4] y) { h = MatMul(x, w) y = Log(h) }", w=np.abs(normal(8, 4)))


def test_outputs_that_are_not_finite_in_fp32_are_named_with_their_row(tmp_path: Path) -> None:
    rows = np.abs(normal(_ROWS, 8))
    quantization = _quantization(_logarithm(), {"x": rows}, tmp_path)
    rows[4] *= -1
    samples = _samples({"x": rows}, _logarithm(), tmp_path)
    with pytest.raises(InputError, match="output 'y' of the reference is NaN or infinite in row 4"):
        Simulator(quantization, samples)
    with pytest.raises(InputError, match="in row 4"):
        Simulator(quantization, samples.subset([1, 4]))


def test_only_what_is_finite_in_fp32_is_scored_if_asked_for(tmp_path: Path) -> None:
    """A zero column makes -inf in every row, in fp32 and INT8 alike: the rest is scored as if it were not."""
    weight = np.abs(normal(8, 4))
    rows = np.abs(normal(_ROWS, 8))
    whole = net("g (float[N,8] x) => (float[N,4] y) { h = MatMul(x, w) y = Log(h) }", w=weight)
    weight = np.insert(weight, 2, 0, axis=1)
    holed = net("g (float[N,8] x) => (float[N,5] y) { h = MatMul(x, w) y = Log(h) }", w=weight)
    scores = []
    for model in (whole, holed):
        quantization = _quantization(model, {"x": rows}, tmp_path)
        samples = _samples({"x": rows}, model, tmp_path)
        simulator = Simulator(quantization, samples, metric=load_metric("cosine"), ignore_nonfinite=True)
        scores.append(simulator.score(quantization.plan))
    assert scores[1] == pytest.approx(scores[0])
    assert scores[0].sqnr_db > 20
