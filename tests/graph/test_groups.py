from __future__ import annotations

from pathlib import Path

import onnx
from nets import attention, loaded, net, normal

from trtq.graph.fold import fold
from trtq.graph.groups import Group, groups
from trtq.graph.place import leave_out, place
from trtq.graph.plan import Plan


def _groups(model: onnx.ModelProto, folder: Path, **options) -> tuple[list[Group], Plan]:
    opened = loaded(model, folder)
    fold(opened.graph)
    plan = place(opened, **options)
    return groups(opened.graph, plan), plan


def test_the_products_of_one_attention_are_one_group(tmp_path: Path) -> None:
    shapes = {"x": (2, 6, 8), "mask": (2, 6)}
    found, _ = _groups(attention(), tmp_path, input_shapes=shapes)
    assert [group.nodes for group in found] == [("q",), ("k",), ("v",), ("scores", "context"), ("y",)]
    assert found[3].name == "scores"
    assert found[3].op == "MatMul+MatMul"
    assert found[3].macs == 2 * (2 * 6 * 6 * 8)
    assert found[0].macs == 2 * 6 * 8 * 8


def test_an_excluded_product_leaves_the_other_one_alone(tmp_path: Path) -> None:
    found, _ = _groups(attention(), tmp_path, exclude=["scores"])
    assert [group.nodes for group in found] == [("q",), ("k",), ("v",), ("context",), ("y",)]
    assert all(group.macs is None for group in found)


def test_a_softmax_behind_a_weighted_layer_groups_nothing(tmp_path: Path) -> None:
    model = net(
        "g (float[N,8] x) => (float[N,8] y) { h = MatMul(x, a) p = Softmax(h) y = MatMul(p, b) }",
        a=normal(8, 8),
        b=normal(8, 8, seed=1),
    )
    found, _ = _groups(model, tmp_path)
    assert [group.nodes for group in found] == [("h",), ("y",)]


def test_two_attentions_are_two_groups(tmp_path: Path) -> None:
    text = """
        g (float[N,6,8] x) => (float[N,6,8] y) {
            xt = Transpose<perm = [0, 2, 1]>(x)
            s1 = MatMul(x, xt)
            p1 = Softmax(s1)
            h = MatMul(p1, x)
            ht = Transpose<perm = [0, 2, 1]>(h)
            s2 = MatMul(h, ht)
            p2 = Softmax(s2)
            y = MatMul(p2, h)
        }
    """
    found, _ = _groups(net(text), tmp_path)
    assert [group.nodes for group in found] == [("s1", "h"), ("s2", "y")]


def test_a_residual_input_belongs_to_its_convolution(tmp_path: Path) -> None:
    model = net(
        """
        g (float[N,4,5,5] x) => (float[N,4,5,5] y) {
            a = Conv<pads = [1,1,1,1]>(x, wa)
            r = Relu(a)
            b = Conv<pads = [1,1,1,1]>(r, wb)
            y = Add(b, r)
        }
        """,
        wa=normal(4, 4, 3, 3),
        wb=normal(4, 4, 3, 3, seed=1),
    )
    opened = loaded(model, tmp_path)
    fold(opened.graph)
    plan = place(opened)
    found = groups(opened.graph, plan)
    assert [group.nodes for group in found] == [("a",), ("b",)]
    only = leave_out(opened.graph, plan, dict.fromkeys(found[0].nodes, "to measure"))
    assert {edge.node for edge in only.edges} == {"b", "y"}
