"""Sequences as tensors, against ONNX Runtime, and built by TensorRT, which has none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from nets import engine, graph_of, net, normal, run

from trtq.graph.fold import fold

X = normal(2, 7, 4)
SPLIT = "s = SplitToSequence<axis = 1"
NODES = {
    "of one size": f"{SPLIT}>(x, three) y = SequenceAt(s, two)",
    "of many sizes": f"{SPLIT}>(x, sizes) y = SequenceAt(s, two)",
    "the last of many": f"{SPLIT}>(x, sizes) y = SequenceAt(s, last)",
    "of size 1": f"{SPLIT}>(x) y = SequenceAt(s, two)",
    "of size 1 from the end": f"{SPLIT}>(x) y = SequenceAt(s, last)",
    "without the axis": f"{SPLIT}, keepdims = 0>(x) y = SequenceAt(s, last)",
    "made": "r = Relu(x) s = SequenceConstruct(x, r) y = SequenceAt(s, last)",
    "joined": "r = Relu(x) s = SequenceConstruct(x, r) y = ConcatFromSequence<axis = 2>(s)",
}


def model_of(nodes: str) -> onnx.ModelProto:
    constants = {"three": np.array(3), "two": np.array(2), "last": np.array(-1), "sizes": np.array([1, 4, 2])}
    return net(
        f"g (float[2,7,4] x) => (float[] y) {{ {nodes.replace('y =', 'p =')} y = Abs(p) }}",
        **{name: values for name, values in constants.items() if name in nodes},
    )


def folded(nodes: str) -> gs.Graph:
    graph = graph_of(model_of(nodes))
    fold(graph)
    return graph


@pytest.mark.parametrize("name", NODES)
def test_parts_of_sequences(name: str) -> None:
    graph = folded(NODES[name])
    assert not [node.op for node in graph.nodes if "Sequence" in node.op]
    expected = run(model_of(NODES[name]), {"x": X})["y"]
    np.testing.assert_array_equal(run(graph, {"x": X})["y"], expected)


def test_tensorrt_builds_it(tmp_path: Path) -> None:
    assert engine(folded(NODES["of many sizes"]), tmp_path).compiled.kernels


def test_from_the_end_of_an_unknown_number_of_parts_stays() -> None:
    nodes = f"{SPLIT}>(x, three) y = SequenceAt(s, last)"
    assert "SequenceAt" in [node.op for node in folded(nodes).nodes]
