"""Constant folding: what is computed, what is left alone, and models that other tools fold wrongly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from nets import graph_of, loaded, net, normal, run
from numpy.typing import NDArray

from trtq.graph.evaluate import GROWTH, fold_constants
from trtq.graph.fold import fold
from trtq.graph.model import export, load_model, save_model


def ops(graph: gs.Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def evaluated(model: onnx.ModelProto, size_threshold: int | None = None) -> gs.Graph:
    graph = graph_of(model)
    fold_constants(graph, size_threshold)
    return graph.cleanup().toposort()


def constant(graph: gs.Graph, name: str) -> NDArray:
    tensor = graph.tensors()[name]
    assert isinstance(tensor, gs.Constant)
    values: NDArray = tensor.values
    return values


# -- the function stays


SCALED = """g (float[N,2,H,W] x) => (float[?,?,?,?] y) {
    shape = Shape(x)
    sides = Slice(shape, two, four)
    whole = Cast<to = 1>(sides)
    larger = Mul(whole, factor)
    target = Cast<to = 7>(larger)
    channels = Slice(shape, zero, two)
    sizes = Concat<axis = 0>(channels, target)
    %s
}"""

ENDS = {
    "Resize": 'y = Resize<mode = "nearest">(x, , , sizes)',
    "Reshape": "e = Expand(one, sizes) f = Cast<to = 1>(e) y = Reshape(f, sizes)",
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("value_info", [False, True])
def test_sizes_by_a_factor_that_is_no_integer(end: str, value_info: bool, tmp_path: Path) -> None:
    """16 * 1.5 is 24; who takes the casts away multiplies by 1."""
    bounds = {"zero": np.int64([0]), "two": np.int64([2]), "four": np.int64([4]), "one": np.int64(1)}
    model = net(SCALED % ENDS[end], factor=np.float32(1.5), **bounds)
    if value_info:
        model = onnx.shape_inference.infer_shapes(model)
    graph = loaded(model, tmp_path).graph
    fold(graph)
    assert run(graph, {"x": normal(1, 2, 16, 16)})["y"].shape == (1, 2, 24, 24)


def test_values_of_constant_nodes_have_onnx_dtypes() -> None:
    nodes = [
        onnx.helper.make_node("Constant", [], ["a"], value_float=1.5),
        onnx.helper.make_node("Constant", [], ["b"], value_floats=[1.0, 2.0]),
        onnx.helper.make_node("Constant", [], ["c"], value_int=3),
        onnx.helper.make_node("Constant", [], ["d"], value_ints=[4, 5]),
        onnx.helper.make_node("Mul", ["x", "a"], ["p"]),
        onnx.helper.make_node("Mul", ["p", "b"], ["y"]),
        onnx.helper.make_node("Add", ["c", "d"], ["z"]),
    ]
    info = onnx.helper.make_tensor_value_info
    model = net("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.output.append(info("z", onnx.TensorProto.INT64, [2]))
    graph = evaluated(model)
    assert ops(graph) == ["Mul", "Mul"]
    assert [constant(graph, name).dtype for name in "abz"] == [np.float32, np.float32, np.int64]
    np.testing.assert_array_equal(constant(graph, "z"), [7, 8])
    np.testing.assert_array_equal(run(graph, {"x": np.float32([1, 1])})["y"], [1.5, 3.0])


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        ("Gather(shape, three)", 7),
        ("Gather(shape, last)", [7]),
        ("Gather(shape, pairs)", [[5, 7], [7, 5]]),
        ("Slice(shape, two, end)", [5, 7]),
        ("Slice(shape, last, far_back, zero, last)", None),  # N is among them
        ("Slice(shape, last, one, zero, last)", [7, 5]),
        ("Gather(shape, zeros)", None),
        ("Slice(shape, one, two)", None),
    ],
)
def test_dimensions_that_are_known(taken: str, expected: object) -> None:
    """Of (N, C, 5, 7), worked out by hand."""
    model = net(
        f"g (float[N,C,5,7] x) => (int64[?] y) {{ shape = Shape(x) t = {taken} y = Identity(t) }}",
        zero=np.int64([0]),
        zeros=np.int64([0, 2]),
        one=np.int64([1]),
        two=np.int64([2]),
        three=np.int64(3),
        last=np.int64([-1]),
        pairs=np.int64([[2, 3], [3, 2]]),
        end=np.int64([2**62]),
        far_back=np.int64([-(2**62)]),
    )
    graph = evaluated(model)
    if expected is None:
        assert "Shape" in ops(graph)
    else:
        np.testing.assert_array_equal(constant(graph, "y"), np.int64(expected))


def test_what_onnx_runtime_lacks_is_evaluated_by_the_reference() -> None:
    """It adds no uint16; the rest of the constants is folded beside it."""
    model = net(
        "g (float[N,2] x) => (float[N,2] y) { s = Add(a, b) f = Cast<to = 1>(s) w = Transpose(v)"
        " m = MatMul(x, w) y = Mul(m, f) }",
        a=np.uint16([1, 2]),
        b=np.uint16([3, 4]),
        v=normal(2, 2),
    )
    graph = evaluated(model)
    assert ops(graph) == ["MatMul", "Mul"]
    np.testing.assert_array_equal(constant(graph, "f"), np.float32([4, 6]))


def test_weights_in_a_file_are_folded(tmp_path: Path) -> None:
    weights = normal(300, 200)
    model = net("g (float[N,200] x) => (float[N,300] y) { t = Transpose(w) y = MatMul(x, t) }", w=weights)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=0)
    graph = load_model(tmp_path / "m.onnx").graph
    fold(graph)
    assert ops(graph) == ["MatMul"]
    np.testing.assert_array_equal(constant(graph, "t"), weights.T)


# -- what is left alone


@pytest.mark.parametrize(
    "part",
    [
        "c = RandomUniformLike(k)",
        "c = RandomNormal<shape = [2]>()",
        "c = Bernoulli(k)",
        "q = QuantizeLinear(k, s, z) c = DequantizeLinear(q, s, z)",
        "c = DequantizeLinear(z2, s, z)",
        "b = Cast<to = 16>(k) c = Cast<to = 1>(b)",
    ],
)
def test_operators_that_stay(part: str) -> None:
    constants = {"k": np.float32([0.2, 0.7]), "s": np.float32(0.1), "z": np.int8(0), "z2": np.int8([3, 4])}
    model = net(f"g (float[N,2] x) => (float[N,2] y) {{ {part} y = Add(x, c) }}", **constants)
    assert len(evaluated(model).nodes) == len(model.graph.node)


def test_types_that_numpy_lacks_stay(tmp_path: Path) -> None:
    import ml_dtypes

    for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        values = np.array([1, 2], dtype)
        model = net(
            "g (float[N,2] x) => (float[N,2] y) { c = Identity(w) d = Cast<to = 1>(c) y = Add(x, d) }",
            opset=21,
            ir_version=10,
            w=values,
        )
        graph = evaluated(model)
        assert ops(graph) == ["Identity", "Cast", "Add"]
        save_model(graph, tmp_path / "m.onnx")
        (stored,) = onnx.load(tmp_path / "m.onnx").graph.initializer
        assert onnx.numpy_helper.to_array(stored).dtype == dtype


@pytest.mark.parametrize(
    "part",
    [
        "c = Expand(k, large)",
        "c = Tile(k, large)",
        "c = ConstantOfShape(large)",
        "zero = Sub(top, top) n = ReduceProd<keepdims = 0>(large) step = Div(n, n) r = Range(zero, n, step)"
        " c = Cast<to = 1>(r)",
        "column = ConstantOfShape(tall) row = ConstantOfShape(wide) c = Add(column, row)",
    ],
)
def test_small_constants_do_not_become_large_ones(part: str) -> None:
    """4 * GROWTH bytes."""
    side = int(np.sqrt(GROWTH))
    model = net(
        f"g (float[N] x) => (float y) {{ {part} s = ReduceMean<keepdims = 0>(c)"
        " t = ReduceMean<keepdims = 0>(x) y = Add(s, t) }",
        k=np.float32([1]),
        large=np.int64([GROWTH]),
        tall=np.int64([side, 1]),
        wide=np.int64([1, side]),
        top=np.int64(7),
    )
    graph = graph_of(model)
    fold_constants(graph)
    graph.cleanup()
    assert sum(t.values.nbytes for t in graph.tensors().values() if isinstance(t, gs.Constant)) < GROWTH
    found = run(graph, {"x": np.float32([0])})["y"]
    np.testing.assert_allclose(found, run(model, {"x": np.float32([0])})["y"], rtol=1e-6)


def test_tensors_above_the_threshold_stay() -> None:
    model = net("g (float[N,4] x) => (float[N,5] y) { w = Transpose(v) y = MatMul(x, w) }", v=normal(5, 4))
    assert ops(evaluated(model, size_threshold=79)) == ["Transpose", "MatMul"]
    assert ops(evaluated(model, size_threshold=80)) == ["MatMul"]


# -- control flow

BRANCHES = """g (float[N,4] x) => (float[N,4] y, float[N,4] z) {
    a = Abs(x)
    c = Not(%s)
    p, q = If (c) <
        then_branch = t () => (float[N,4] i, float[N,4] j) { %s },
        else_branch = e () => (float[N,4] k, float[N,4] l) { k = Neg(x) l = Neg(a) }
    >
    y = Relu(p)
    z = Add(p, q)
}"""


@pytest.mark.parametrize(
    "branch",
    [
        "i = Sqrt(a) j = Mul(i, x)",
        "i = Identity(a) j = Identity(i)",
        "h = Mul(a, f) i = Add(h, f) j = Add(i, h)",
        "y = Mul(a, f) i = Add(y, f) j = Sub(y, f)",
        "i = Sqrt(a) d = Not(no) j = If (d) <"
        " then_branch = u () => (float[N,4] m) { y = Mul(i, f) m = Add(y, a) },"
        " else_branch = v () => (float[N,4] n) { n = Neg(a) } >",
    ],
)
@pytest.mark.parametrize("copied", [False, True])
def test_a_branch_that_is_always_taken(branch: str, copied: bool) -> None:
    """Names that it shares with the graph around it stay apart."""
    model = net(BRANCHES % ("no", branch), no=np.array(False), f=normal(4))
    graph = graph_of(model)
    if copied:
        graph = graph.copy()
    fold(graph)
    assert "If" not in ops(graph)
    graph.tensors(check_duplicates=True)
    x = normal(3, 4)
    expected = run(model, {"x": x})
    for name, values in run(graph, {"x": x}).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-6)


def test_an_output_of_a_branch_that_nobody_wants() -> None:
    """It is still what another output is made of."""
    model = net(
        """g (float[N,4] x) => (float[N,4] y) {
            p, y = If (no) <
                then_branch = t () => (float[N,4] i, float[N,4] j) { i = Abs(x) j = Neg(i) },
                else_branch = e () => (float[N,4] k, float[N,4] l) { k = Sqrt(x) l = Exp(k) }
            >
        }""",
        no=np.array(True),
    )
    model.graph.node[0].output[0] = ""
    graph = graph_of(model)
    fold(graph)
    x = normal(3, 4)
    np.testing.assert_array_equal(run(graph, {"x": x})["y"], -np.abs(x))


def test_branches_of_an_unknown_condition_are_folded_within() -> None:
    model = net(
        """g (float[N,4] x, bool c) => (float[N,4] y) {
            t = Transpose(w)
            y = If (c) <
                then_branch = t () => (float[N,4] i) { u = Mul(t, f) i = MatMul(x, u) },
                else_branch = e () => (float[N,4] j) { v = Exp(w) j = MatMul(x, v) }
            >
        }""",
        w=normal(4, 4),
        f=np.float32(2),
    )
    graph = evaluated(model)
    assert [[n.op for n in body.nodes] for body in graph.subgraphs()] == [["MatMul"], ["MatMul"]]
    for condition in (True, False):
        feed = {"x": normal(3, 4), "c": np.array(condition)}
        np.testing.assert_array_equal(run(graph, feed)["y"], run(model, feed)["y"])


def test_a_loop_over_constants_is_evaluated_and_another_keeps_its_function() -> None:
    text = """g (float[N] x) => (float[?] y) {
        last = Loop (n, yes, %s) <body = b (int64 i, bool c, float[?] state) => (bool d, float[?] next) {
            d = Identity(c) two = Add(f, f) next = Mul(state, two)
        }>
        y = Add(x, last)
    }"""
    constants = {"n": np.int64(3), "yes": np.array(True), "f": np.float32([1.0]), "start": np.float32([1.0])}
    known = evaluated(net(text % "start", **constants))
    assert ops(known) == ["Add"]
    np.testing.assert_array_equal(constant(known, "last"), [8])
    other = net(text % "x", **constants)
    graph = evaluated(other)
    (body,) = graph.subgraphs()
    assert ops(body) == ["Identity", "Mul"]
    np.testing.assert_array_equal(run(graph, {"x": np.float32([1, 2])})["y"], [9, 18])


def test_an_output_that_depends_on_nothing() -> None:
    model = net(
        "g (float[N] x) => (float[N] y, float[2] z) { y = Relu(x) z = Mul(k, k) }", k=np.float32([2, 3])
    )
    graph = graph_of(model)
    fold(graph)
    assert list(export(graph).graph.output[1].name) == ["z"]
    np.testing.assert_array_equal(run(graph, {"x": np.float32([1])})["z"], [4, 9])
