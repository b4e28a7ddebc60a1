"""What a job does more often the more nodes or rows there are, counted and not timed."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from trtq.console import SILENT
from trtq.graph import surgery
from trtq.graph.model import export
from trtq.pipeline import quantize
from trtq.recipe import Recipe
from trtq.simulation.session import MANY_NODES, simulation_session

BLOCK = 4
"""Nodes of a residual block."""


def chain(blocks: int) -> gs.Graph:
    """Residual blocks of Conv, Relu, Add and Tanh."""
    x = first = gs.Variable("x", np.float32, ["N", 2, 1, 1])
    nodes = []
    weights = np.random.default_rng(0).standard_normal((blocks, 2, 2, 1, 1)).astype(np.float32) / 2
    for i, weight in enumerate(weights):
        made = {op: gs.Variable(f"{op}{i}", np.float32) for op in ("Conv", "Relu", "Add", "Tanh")}
        reads = {"Conv": [x, gs.Constant(f"w{i}", weight)], "Relu": [made["Conv"]]}
        reads |= {"Add": [made["Relu"], x], "Tanh": [made["Add"]]}
        nodes += [gs.Node(op, f"{op}{i}", inputs=reads[op], outputs=[made[op]]) for op in made]
        x = made["Tanh"]
    return gs.Graph(nodes, [first], [x], opset=17, ir_version=8)


def counted(monkeypatch: pytest.MonkeyPatch, folder: Path, blocks: int) -> Counter[str]:
    """How often quantizing a chain copies or sorts a graph, or starts a session."""
    folder.mkdir()
    (folder / "m.onnx").write_bytes(export(chain(blocks)).SerializeToString())
    rows = np.random.default_rng(1).standard_normal((4, 2, 1, 1)).astype(np.float32)
    np.savez(folder / "d.npz", x=rows)
    calls: Counter[str] = Counter()

    def noted(name: str, function, *arguments, **options):
        calls[name] += 1
        return function(*arguments, **options)

    with monkeypatch.context() as patched:
        passes = ((gs.Graph, "copy"), (gs.Graph, "toposort"), (gs.Graph, "cleanup"), (gs.Graph, "tensors"))
        for owner, name in (*passes, (surgery, "holds_bodies")):  # each pass of `surgery` asks for them once
            original = getattr(owner, name)
            patched.setattr(
                owner, name, lambda *a, _n=name, _f=original, **o: noted(_n, partial(_f, *a, **o))
            )
        started = onnxruntime.InferenceSession
        patched.setattr(onnxruntime, "InferenceSession", partial(noted, "session", started))
        recipe = Recipe(model=str(folder / "m.onnx"), data=str(folder / "d.npz"), cache=str(folder / "c"))
        quantize(recipe, None, SILENT)
    return calls


def test_passes_over_the_graph_do_not_grow_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few, many = (counted(monkeypatch, tmp_path / str(blocks), blocks) for blocks in (3, 24))
    assert few == many
    assert few["session"]
    assert few["holds_bodies"]


def test_a_model_of_many_nodes_runs_as_its_parts_do() -> None:
    """Above `MANY_NODES` sessions leave out a search of ONNX Runtime's; below they do not."""
    blocks = MANY_NODES // BLOCK + 1
    graph = chain(blocks)
    middle = f"Tanh{blocks // 2}"
    whole = simulation_session(export(graph).SerializeToString(), 1, [middle, graph.outputs[0].name])
    x = np.random.default_rng(2).standard_normal((1, 2, 1, 1)).astype(np.float32)
    inside, end = whole.run(None, {"x": x})
    tensors = graph.tensors()
    first = gs.Graph(
        graph.nodes[: BLOCK * (blocks // 2 + 1)], graph.inputs, [tensors[middle]], opset=17, ir_version=8
    )
    (part,) = simulation_session(export(first).SerializeToString(), 1).run(None, {"x": x})
    np.testing.assert_array_equal(part, inside)
    assert np.isfinite(end).all()
