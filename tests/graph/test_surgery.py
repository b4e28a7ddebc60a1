from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_graphsurgeon.logger.logger import OnnxGraphSurgeonException

from trtq.graph.surgery import cleaned, copied, in_order


def exported(graph: gs.Graph) -> bytes:
    return gs.export_onnx(graph, do_type_check=False).SerializeToString(deterministic=True)


@st.composite
def graphs(draw: st.DrawFn) -> gs.Graph:
    """Graphs without cycles, their nodes in any order, with constants, inputs that are left out and outputs
    that nobody reads."""
    tensors: list[gs.Tensor] = [gs.Variable("x", np.float32, ["N", 2])]
    tensors.append(gs.Constant("c", np.ones(2, np.float32)))
    nodes = []
    for i in range(draw(st.integers(1, 12))):
        read = draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=3))
        if draw(st.booleans()):
            read.insert(1, gs.Variable.empty())
        made = [gs.Variable(f"t{i}.{k}", np.float32) for k in range(draw(st.integers(1, 2)))]
        nodes.append(gs.Node("Op", f"n{i}", {"axis": i}, read, made, domain="some"))
        tensors += made
    ends = draw(st.lists(st.sampled_from(tensors[2:]), min_size=1, max_size=2, unique_by=id))
    return gs.Graph(draw(st.permutations(nodes)), tensors[:1], ends, opset=17, ir_version=8)


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_what_is_made_is_what_graph_surgeon_makes(graph: gs.Graph) -> None:
    before = exported(graph)
    mine, theirs = copied(graph), graph.copy()
    assert exported(mine) == exported(theirs) == before
    for own, other in zip(mine.nodes, theirs.nodes, strict=True):
        for tensor, like in zip([*own.inputs, *own.outputs], [*other.inputs, *other.outputs], strict=True):
            assert [n.name for n in tensor.outputs] == [n.name for n in like.outputs]
            assert [n.name for n in tensor.inputs] == [n.name for n in like.inputs]
    assert exported(in_order(mine)) == exported(theirs.toposort())
    assert exported(cleaned(mine)) == exported(theirs.cleanup())
    for own, other in zip(mine.inputs, theirs.inputs, strict=True):
        assert [n.name for n in own.outputs] == [n.name for n in other.outputs]
    if not mine.nodes:
        return
    mine.nodes[0].attrs["axis"] = -1
    mine.nodes[0].inputs = []
    mine.nodes[0].outputs.clear()
    assert exported(graph) == before


def backwards(length: int) -> gs.Graph:
    tensors = [gs.Variable(f"t{i}", np.float32, [1]) for i in range(length + 1)]
    nodes = [gs.Node("Relu", f"n{i}", {}, [tensors[i]], [tensors[i + 1]]) for i in range(length)]
    return gs.Graph(nodes[::-1], tensors[:1], tensors[-1:], opset=17)


def test_a_long_chain_is_sorted_whatever_its_order() -> None:
    graph = in_order(backwards(5000))
    assert [node.name for node in graph.nodes] == [f"n{i}" for i in range(5000)]


def test_a_cycle_is_an_error() -> None:
    graph = backwards(3)
    graph.nodes[-1].inputs = [graph.outputs[0]]
    with pytest.raises(OnnxGraphSurgeonException, match="Cycle"):
        in_order(graph)


def test_bodies_are_copied_and_sorted_as_well() -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    c = onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    out = onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, [1])
    body = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["a"], ["b"])], "body", [], [out])
    nodes = [
        onnx.helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body),
        onnx.helper.make_node("Neg", ["x"], ["a"]),
    ]
    graph = gs.import_onnx(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x, c], [y])))
    assert exported(copied(graph)) == exported(graph)
    assert [node.op for node in in_order(copied(graph)).nodes] == ["Neg", "If"]
