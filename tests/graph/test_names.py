"""Names that passes make up: free ones, whatever the model's are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from nets import graph_of, net, normal, run
from onnx_graphsurgeon.logger.logger import G_LOGGER

from trtq.calibration.collect import collect
from trtq.calibration.methods import parse_method, scales_from
from trtq.calibration.refine import refine_ranges
from trtq.console import SILENT
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.graph.fold import fold
from trtq.graph.half import convert_to_half
from trtq.graph.model import Model, load_model, save_model
from trtq.graph.names import Names
from trtq.graph.place import place
from trtq.graph.quantization import Quantization
from trtq.migration.to_table import table_of
from trtq.recovery.fixes.bias import correct_biases
from trtq.recovery.fixes.shift import shift
from trtq.recovery.fixes.smooth import smooth
from trtq.simulation.simulator import Simulator

# -- the allocator


def test_a_free_name_is_kept_and_no_name_is_given_twice() -> None:
    names = Names(graph_of(net("g (float[N] x) => (float[N] y) { a = Abs(x) y = Neg(a) }")))
    assert [names.tensor("b"), names.tensor("b"), names.tensor("b_1")] == ["b", "b_1", "b_1_1"]
    assert [names.tensor(name) for name in "xay"] == ["x_1", "a_1", "y_1"]
    assert [names.node("a"), names.node("x"), names.node("x")] == ["a_1", "x", "x_1"]


def test_names_in_bodies_and_of_several_graphs_are_taken() -> None:
    inner = net(
        """g (float[N] x, bool c) => (float[N] y) {
            y = If (c) <
                then_branch = t () => (float[N] p) { e = Exp(x) p = Mul(e, k) },
                else_branch = e () => (float[N] q) { q = Neg(x) }
            >
        }""",
        k=np.float32(2),
    )
    other = net("g (float[N] o) => (float[N] r) { r = Abs(o) }")
    names = Names(graph_of(inner), graph_of(other))
    for taken in "xcyepkqor":
        assert names.tensor(taken) == f"{taken}_1"


# -- a model whose names are all those that were made up for it


NET = """g (float[N,3,8,8] x) => (float[N,6] y, float[N,8,8,8] h) {
    c = Conv<pads = [1, 1, 1, 1]>(x, w1, b)
    n = BatchNormalization(c, gamma, beta, mean, variance)
    h = Relu(n)
    d = Conv<pads = [1, 1, 1, 1]>(h, w2, b)
    s = Add(d, h)
    e = Conv(s, w3)
    p = GlobalAveragePool(e)
    f = Flatten(p)
    g = MatMul(f, w4)
    u = Add(g, b6)
    t = Einsum<equation = "ij,kj->ik">(u, w5)
    r = Softmax(t)
    y = Mul(r, factor)
}"""

CONSTANTS = {
    "w1": normal(8, 3, 3, 3, seed=1),
    "w2": normal(8, 8, 3, 3, seed=2),
    "w3": normal(8, 8, 1, 1, seed=3),
    "w4": normal(8, 6, seed=4),
    "w5": normal(6, 6, seed=5),
    "b": normal(8, seed=6),
    "b6": normal(6, seed=7),
    "gamma": np.abs(normal(8, seed=8)),
    "beta": normal(8, seed=9),
    "mean": normal(8, seed=10),
    "variance": np.abs(normal(8, seed=11)) + 0.5,
    "factor": np.float32(3),
}


def renamed(model: onnx.ModelProto, tensors: Mapping[str, str], nodes: Mapping[str, str]) -> onnx.ModelProto:
    """The model with other names for what is no input and no output of it."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for node in copy.graph.node:
        node.name = nodes.get(node.name, node.name)
        for names in (node.input, node.output):
            names[:] = [tensors.get(name, name) for name in names]
    for initializer in copy.graph.initializer:
        initializer.name = tensors.get(initializer.name, initializer.name)
    return copy


class Made:
    """All that is made of a model."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        onnx.save(model, folder / "model.onnx")
        self.model: Model = load_model(folder / "model.onnx", opset=19)
        self.original = self.model.graph.copy()
        fold(self.model.graph)
        self.x = normal(16, 3, 8, 8, seed=12)
        np.savez(folder / "x.npz", x=self.x)
        self.samples: Samples = load_samples(str(folder / "x.npz"), self.model.inputs)
        self.plan = place(self.model)
        self.statistics = collect(self.model.graph, self.plan.tensors, self.samples)
        scales = scales_from(self.statistics, parse_method("max"))
        self.start = Quantization(self.model.graph, self.plan, scales)

    def graphs(self) -> list[gs.Graph]:
        """Float and Q/DQ graphs of every kind."""
        graph, plan, samples = self.model.graph, self.plan, self.samples
        corrected = correct_biases(self.start, samples, SILENT, workers=1)
        found = [shift(graph, plan, samples, workers=1), smooth(graph, plan, samples, workers=1)]
        made = [changed.graph for changed in found if changed is not None]
        made += [graph, convert_to_half(graph), corrected.with_corrections_inside().graph]
        for quantization in (
            self.start,
            corrected,
            *(replace(self.start, graph=c.graph) for c in found if c is not None),
        ):
            made += [quantization.rewritten(), quantization.rewritten(weights="qdq")]
            made.append(quantization.rewritten(rest="fp16"))
        return made

    def names(self) -> tuple[set[str], set[str]]:
        """Tensors and nodes that were made up."""

        def of(graph: gs.Graph) -> tuple[set[str], set[str]]:
            return set(graph.tensors()), {node.name for node in graph.nodes}

        tensors, nodes = (set().union(*each) for each in zip(*map(of, self.graphs()), strict=True))
        old_tensors, old_nodes = of(self.original)
        return tensors - old_tensors, nodes - old_nodes


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(0, 60, 12))
def test_a_model_that_has_all_the_names_already(turn: int, tmp_path: Path) -> None:
    """Its tensors and nodes get the names that were made up for it with others; nothing else changes."""
    plain = Made(net(NET, **CONSTANTS), tmp_path)
    tensors, nodes = (sorted(names) for names in plain.names())
    assert (len(tensors) > 60, len(nodes) > 25) == (True, True)
    model = net(NET, **CONSTANTS)
    own = [*(n.output[0] for n in model.graph.node if n.output[0] not in "yh"), *CONSTANTS]
    taken = dict(zip(own, tensors[turn:] + tensors[:turn], strict=False))
    node_names = dict(zip((n.name for n in model.graph.node), nodes[turn % len(nodes) :], strict=False))
    other = Made(renamed(model, taken, node_names), tmp_path)
    assert run(plain.model.graph, {"x": plain.x}).keys() == run(other.model.graph, {"x": plain.x}).keys()
    for one, another in zip(plain.graphs(), other.graphs(), strict=True):
        another.tensors(check_duplicates=True)
        assert len({node.name for node in another.nodes}) == len(another.nodes)
        expected, found = (run(graph, {"x": plain.x}) for graph in (one, another))
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)


def test_what_reads_made_up_tensors_finds_them(tmp_path: Path) -> None:
    """The simulator, the search for ranges and the table of a Q/DQ model, for names that are taken."""
    plain = Made(net(NET, **CONSTANTS), tmp_path)
    taken = {
        "factor": "x/scale",
        "b6": "h/scale",
        "u": "h/quantized",
        "f": "x/dequantized",
        "r": "s/zero_point",
    }
    nodes = {"y": "h/QuantizeLinear", "p": "x/DequantizeLinear"}
    other = Made(renamed(net(NET, **CONSTANTS), taken, nodes), tmp_path)
    scores = [Simulator(made.start, made.samples, workers=1).score(made.plan) for made in (plain, other)]
    assert scores[0] == scores[1]
    tables = []
    for made in (plain, other):
        save_model(made.start.rewritten(), path := tmp_path / "int8.onnx")
        tables.append(table_of(load_model(path)).scales)
    assert {taken.get(name, name): scale for name, scale in tables[0].items()} == tables[1]
    refined = [
        refine_ranges(
            made.start,
            made.statistics,
            parse_method("max"),
            [parse_method("mse")],
            made.samples,
            SILENT,
            workers=1,
        )
        for made in (plain, other)
    ]
    assert refined[0].exceptions
    first, second = ([method.name for method in found.exceptions.values()] for found in refined)
    assert first == second


# -- messages of GraphSurgeon


def test_no_two_tensors_share_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """GraphSurgeon, asked to speak, finds none, where layers share weights and biases either."""
    text = """g (float[N,3,8,8] x) => (float[N,8,8,8] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, w, b)
        r = Relu(a)
        c = Conv<pads = [1, 1, 1, 1]>(r, v, b)
        d = Conv<pads = [1, 1, 1, 1]>(c, v, b)
        e = Conv<pads = [1, 1, 1, 1]>(d, v, b)
        y = Add(e, c)
    }"""
    constants = {"w": normal(8, 3, 3, 3), "v": normal(8, 8, 3, 3, seed=1) / 10, "b": normal(8)}
    made = Made(net(text, **constants), tmp_path)
    monkeypatch.setattr(G_LOGGER, "_severity", G_LOGGER.WARNING)
    x = {"x": made.x}
    expected = run(made.original, x)["y"]
    for graph in made.graphs():
        found = run(graph, x)["y"]
        assert np.square(found - expected).sum() < 0.01 * np.square(expected).sum()
    assert "share the same name" not in "".join(capsys.readouterr())


def test_graphsurgeon_says_nothing() -> None:
    code = """
import trtq.graph.model
import numpy as np, onnx_graphsurgeon as gs
x = gs.Variable("x", np.float32, [1])
nodes = [gs.Node("Abs", "n", {}, [x], [gs.Variable("y")]), gs.Node("Neg", "n", {}, [x], [gs.Variable("y")])]
graph = gs.Graph(nodes, [x], [nodes[0].outputs[0]], opset=17)
graph.tensors()
gs.export_onnx(graph, do_type_check=False)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout + found.stderr == ""
