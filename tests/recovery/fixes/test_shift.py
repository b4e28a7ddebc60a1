"""Channel-wise shifting: the function stays, ranges are centred, and only where that is exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from small_graphs import Case, outputs, range_of, relative_error, small_case

from trtq.data.load import load_samples
from trtq.graph.fold import fold
from trtq.graph.model import load_model
from trtq.graph.place import place
from trtq.recovery.fixes.shift import shift


def post_norm(case: Case) -> None:
    """A transformer's feed-forward part: the normalized stream is read by a layer and by the residual Add."""
    x = case.input("x", 4)
    y = case.node("LayerNormalization", x, case.ones(4), np.array([5, -3, 0, 1], np.float32), axis=-1)
    h = case.node("Relu", case.linear(y, 4, 6))
    z = case.node("Add", case.linear(h, 6, 4), y)
    case.output(case.node("LayerNormalization", z, case.ones(4), np.zeros(4, np.float32), axis=-1), 4)


def test_the_function_stays_and_the_range_is_centred(tmp_path: Path) -> None:
    case = small_case(tmp_path, post_norm)
    found = shift(case.graph, case.plan, case.samples)
    assert found is not None
    shifted = found.graph
    assert relative_error(outputs(case.graph, case.samples), outputs(shifted, case.samples)) < 1e-5
    name = next(n for n in case.graph.nodes if n.op == "LayerNormalization").outputs[0].name
    low, high = range_of(shifted, name, case.samples)
    np.testing.assert_allclose(low, -high, atol=1e-5)
    before = range_of(case.graph, name, case.samples)
    np.testing.assert_allclose(high - low, before[1] - before[0], atol=1e-5)  # only moved


@pytest.mark.parametrize(("pads", "shifted"), [([0, 0, 0, 0], True), ([1, 1, 1, 1], False)])
def test_a_reader_that_pads_with_zeros_cannot_give_a_shift_back(
    tmp_path: Path, pads: list[int], shifted: bool
) -> None:
    def relu6(case: Case) -> None:
        x = case.input("x", 3, 5, 5)
        y = case.node("Clip", case.conv(x, 3, 4), np.float32(0), np.float32(6))
        case.output(case.conv(y, 4, 2, pads=pads), 2, None, None)

    case = small_case(tmp_path, relu6)
    changed = shift(case.graph, case.plan, case.samples)
    assert (changed is not None) is shifted
    if changed is not None:
        assert relative_error(outputs(case.graph, case.samples), outputs(changed.graph, case.samples)) < 1e-5
        clip = next(n for n in changed.graph.nodes if n.op == "Clip")
        low, high = (float(t.values) for t in clip.inputs[1:])
        assert high - low == pytest.approx(6)
        reached = range_of(changed.graph, clip.outputs[0].name, case.samples)
        assert reached[0].min() == pytest.approx(-reached[1].max(), abs=1e-5)


def test_nothing_to_shift_behind_a_relu(tmp_path: Path) -> None:
    def chain(case: Case) -> None:
        h = case.node("Relu", case.linear(case.input("x", 4), 4, 6))
        case.output(case.linear(h, 6, 2), 2)

    case = small_case(tmp_path, chain)
    assert shift(case.graph, case.plan, case.samples) is None


def test_a_stream_that_something_else_reads_is_left_alone(tmp_path: Path) -> None:
    def squared(case: Case) -> None:
        y = case.linear(case.input("x", 4), 4, 4)
        case.output(case.node("Add", case.linear(y, 4, 4), case.node("Mul", y, y)), 4)

    case = small_case(tmp_path, squared)
    assert shift(case.graph, case.plan, case.samples) is None


def test_minilm_keeps_its_function(zoo: Path) -> None:
    model = load_model(zoo / "models" / "minilm_l6.onnx")
    fold(model.graph)
    samples = load_samples(str(zoo / "stsb" / "calib.npz"), model.inputs).subset(range(8))
    found = shift(model.graph, place(model), samples)
    assert found is not None
    changed = found.graph
    assert [n.op for n in changed.nodes] == [n.op for n in model.graph.nodes]
    assert relative_error(outputs(model.graph, samples), outputs(changed, samples)) < 1e-4
    name = "/m/encoder/layer.3/attention/output/LayerNorm/LayerNormalization_output_0"
    before, after = (np.max(np.abs(range_of(g, name, samples))) for g in (model.graph, changed))
    assert after < 0.6 * before


def test_the_given_graph_is_not_changed(tmp_path: Path) -> None:
    case = small_case(tmp_path, post_norm)
    before = {t.name: t.values.copy() for t in case.graph.tensors().values() if isinstance(t, gs.Constant)}
    shift(case.graph, case.plan, case.samples)
    for name, values in before.items():
        np.testing.assert_array_equal(case.graph.tensors()[name].values, values)
