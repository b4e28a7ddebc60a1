"""Plans that cannot be carried out are refused: what no rule of placement would ever write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import attention, loaded, net, normal

from trtq.errors import InputError
from trtq.graph.fit import check_fits
from trtq.graph.fold import fold
from trtq.graph.model import Model
from trtq.graph.place import place
from trtq.graph.plan import Edge, Plan, Weight

Edit = Callable[[Plan], Plan]


def mixed() -> onnx.ModelProto:
    """A Gemm of either layout, a transposed convolution, a product in a branch, and integers."""
    return net(
        """g (float[N,4] x, int64[N] index)
        => (float[N,3] y, float[N,4] picked, float[N,2,4,4] up, float[N,4] z) {
            g0 = Gemm(x, straight, bias)
            g1 = Gemm<transB = 1>(x, turned, bias)
            y = Add(g0, g1)
            picked = Gather(table, index)
            image = Reshape(x, shape)
            up = ConvTranspose<strides = [2, 2]>(image, kernel)
            most = ReduceMax<keepdims = 0>(x)
            large = Greater(most, limit)
            z = If(large) <
                then_branch = t () => (float[N,4] inner) { inner = MatMul(x, square) },
                else_branch = e () => (float[N,4] other) { other = Identity(x) }
            >
        }""",
        straight=normal(4, 3),
        turned=normal(3, 4),
        bias=normal(3),
        table=normal(5, 4),
        shape=np.array([-1, 1, 2, 2]),
        kernel=normal(1, 2, 2, 2),
        limit=np.float32(3),
        square=normal(4, 4),
    )


@pytest.fixture
def model(tmp_path: Path) -> Model:
    model = loaded(mixed(), tmp_path)
    fold(model.graph)
    return model


def test_what_the_rules_write_fits(model: Model, tmp_path: Path) -> None:
    plan = place(model)
    check_fits(plan, model.graph)
    assert [node.op for node in plan.nodes if node.rule == "subgraph"] == ["MatMul"]
    assert {weight.node: weight.axis for weight in plan.weights} == {"g0": 1, "g1": 0}
    folder = tmp_path / "attention"
    folder.mkdir()
    other = loaded(attention(), folder)
    fold(other.graph)
    check_fits(place(other), other.graph)


def int8(name: str) -> Edit:
    """The plan with a node of this name, or of this rule, made INT8."""
    return lambda plan: replace(
        plan, nodes=[replace(node, int8=node.int8 or name in (node.name, node.rule)) for node in plan.nodes]
    )


def with_edge(*edges: Edge) -> Edit:
    return lambda plan: replace(plan, edges=[*plan.edges, *edges])


def with_weight(*weights: Weight) -> Edit:
    return lambda plan: replace(plan, weights=[*plan.weights, *weights])


def with_axis(node: str, axis: int) -> Edit:
    return lambda plan: replace(
        plan, weights=[replace(w, axis=axis) if w.node == node else w for w in plan.weights]
    )


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (with_axis("g0", 0), "axis 0 of 'straight' is not the output channels of 'g0'"),
        (with_axis("g1", 1), "axis 1 of 'turned' is not the output channels of 'g1'"),
        (int8("up"), "'up' (ConvTranspose) cannot be INT8: TensorRT runs it in floating point"),
        (int8("subgraph"), "is in the body of an If, Loop or Scan"),
        (with_edge(Edge("index", "picked", 1, "mine", "index")), "'index' is int64, not float32 or float16"),
        (with_edge(Edge("x", "most", 0, "mine", "index")), "'index' is int64, not float32 or float16"),
        (with_weight(Weight("kernel", "up", 1, 1)), "'kernel' is not a weight of an INT8 product"),
        (with_weight(Weight("table", "picked", 0, 1)), "'table' is not a weight of an INT8 product"),
        (with_weight(Weight("bias", "g0", 2, 0)), "'bias' is not a weight of an INT8 product"),
        (
            with_edge(Edge("x", "most", 0, "mine", "y")),
            "input 0 of 'most' has a second range for 'x': that of 'y', after that of 'x'",
        ),
    ],
)
def test_what_they_never_write_does_not(model: Model, edit: Edit, cause: str) -> None:
    with pytest.raises(InputError, match="the plan does not fit the model") as raised:
        check_fits(edit(place(model)), model.graph)
    assert cause in str(raised.value.cause)
    assert raised.value.remedy


def test_a_quantizer_of_ones_own_is_allowed(model: Model) -> None:
    plan = with_edge(Edge("g0", "y", 0, "mine", "y"), Edge("x", "most", 0, "mine", "x"))(place(model))
    check_fits(plan, model.graph)
