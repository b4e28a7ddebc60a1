"""Reading and writing models: what is wrong with a file is said, and what is right computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import onnx_graphsurgeon as gs
import pytest
from nets import engine, graph_of, loaded, net, normal, run, saved

import trtq.graph.model
from trtq.errors import InputError
from trtq.graph.fold import fold
from trtq.graph.inputs import InputSpec
from trtq.graph.model import export, load_model, save_model, serialized

X = normal(2, 3, 8, 8, seed=1)
WEIGHT = normal(16, 3, 3, 3)
CONV = "g (float[N,3,8,8] x) => (float[N,16,6,6] y) { y = Conv(x, w) }"


def conv(**kwargs: int) -> onnx.ModelProto:
    return net(CONV, w=WEIGHT, **kwargs)


# -- files that cannot be used


@pytest.mark.parametrize("content", [b"hello, this is text\n" * 9, b'{"a": 1}', b"", b"\x00" * 64])
def test_a_file_of_another_kind(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(InputError, match="not an ONNX model") as caught:
        load_model(tmp_path / "model.onnx")
    assert caught.value.file == str(tmp_path / "model.onnx")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path, problem in ((tmp_path, "is a folder"), (tmp_path / "nothing.onnx", "does not exist")):
        with pytest.raises(InputError, match=problem):
            load_model(path)


def test_a_truncated_file_is_never_accepted(tmp_path: Path) -> None:
    whole = saved(net("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }"), tmp_path).read_bytes()
    for size in range(len(whole)):
        (tmp_path / "model.onnx").write_bytes(whole[:size])
        with pytest.raises(InputError):
            load_model(tmp_path / "model.onnx")


def with_external_data(folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save_model(conv(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_external_data_is_read_and_belongs_to_the_hash(tmp_path: Path) -> None:
    path = with_external_data(tmp_path)
    before = load_model(path)
    np.testing.assert_array_equal(before.graph.nodes[0].inputs[1].values, WEIGHT)
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[5] ^= 1
    (tmp_path / "weights.bin").write_bytes(data)
    assert load_model(path).sha256 != before.sha256


def test_missing_external_data_names_the_file(tmp_path: Path) -> None:
    path = with_external_data(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"external data is missing[\s\S]*weights\.bin"):
        load_model(path)


def test_truncated_external_data(tmp_path: Path) -> None:
    path = with_external_data(tmp_path)
    (tmp_path / "weights.bin").write_bytes((tmp_path / "weights.bin").read_bytes()[:-1])
    with pytest.raises(InputError, match="external data cannot be read"):
        load_model(path)


def test_an_operator_of_another_opset_names_its_node(tmp_path: Path) -> None:
    model = conv()
    model.graph.node[0].op_type = "Gelu"
    with pytest.raises(InputError, match=r"unknown operator 'Gelu'[\s\S]*node 'y'[\s\S]*opset, 17,"):
        loaded(model, tmp_path)
    model.graph.node[0].name = ""
    with pytest.raises(InputError, match="the node that makes 'y'"):
        loaded(model, tmp_path)


def test_a_custom_domain_is_refused_inside_a_body(tmp_path: Path) -> None:
    model = net(
        "g (float[N,4] x, bool c) => (float[N,4] y) {"
        " y = If(c) <then_branch = t () => (float[N,4] a) { a = Relu(x) },"
        "           else_branch = e () => (float[N,4] b) { b = Relu(x) }> }"
    )
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    model.graph.node[0].attribute[1].g.node[0].domain = "com.example"
    with pytest.raises(InputError, match=r"'Relu' is in the body of an If"):
        loaded(model, tmp_path)


@pytest.mark.parametrize("side", ["input", "output"])
def test_no_inputs_or_no_outputs(side: str, tmp_path: Path) -> None:
    model = conv()
    if side == "input":
        model.graph.initializer.append(onnx.numpy_helper.from_array(X, "x"))
    del getattr(model.graph, side)[:]
    with pytest.raises(InputError, match="no inputs or no outputs"):
        loaded(model, tmp_path)


def test_an_input_without_a_shape(tmp_path: Path) -> None:
    model = conv()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(InputError, match="'x' has no shape"):
        loaded(model, tmp_path)


def test_a_bfloat16_input_is_refused(tmp_path: Path) -> None:
    model = net("g (bfloat16[N,4] x) => (bfloat16[N,4] y) { y = Abs(x) }")
    with pytest.raises(InputError, match="a dtype that NumPy lacks"):
        loaded(model, tmp_path)


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_sequence_is_refused(side: str, tmp_path: Path) -> None:
    text = {
        "input": "g (seq(float[4]) s, float[4] x) => (float[4] y) { y = Abs(x) }",
        "output": "g (float[4] x) => (seq(float[4]) t, float[4] y) { t = SequenceConstruct(x) y = Abs(x) }",
    }
    model = net(text[side])
    with pytest.raises(InputError, match=f"model {side} '[st]' is of sequence type"):
        loaded(model, tmp_path)


# -- files that can


@pytest.mark.parametrize(("opset", "ir_version"), [(9, 4), (10, 5), (11, 6), (12, 7), (9, 8)])
def test_old_opsets_are_upgraded_and_compute_the_same(opset: int, ir_version: int, tmp_path: Path) -> None:
    nodes = """
        c = Conv(x, w)
        n = BatchNormalization(c, gamma, beta, mean, variance)
        r = Relu(n)
        p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
        f = Flatten(p)
        d = Dropout(f)
        m = ReduceMean<axes=[1], keepdims=1>(d)
        s = Sub(d, m)
        y = Softmax<axis=1>(s)"""
    model = net(
        f"g (float[N,3,8,8] x) => (float[N,?] y) {{{nodes}}}",
        opset=opset,
        ir_version=ir_version,
        w=WEIGHT,
        gamma=normal(16),
        beta=normal(16),
        mean=normal(16),
        variance=np.ones(16, np.float32),
    )
    upgraded = loaded(model, tmp_path).graph
    assert upgraded.opset == 13
    np.testing.assert_allclose(run(upgraded, {"x": X})["y"], run(model, {"x": X})["y"], rtol=1e-6)


def test_newer_opsets_stay(tmp_path: Path) -> None:
    assert loaded(conv(opset=18), tmp_path).graph.opset == 18
    assert loaded(conv(opset=17), tmp_path, opset=19).graph.opset == 19


def test_an_operator_that_the_converter_cannot_upgrade(tmp_path: Path) -> None:
    model = net(
        "g (float[4,N,8] x) => (float[?,?,?,?] y) { y = RNN<hidden_size = 2>(x, w, r) }",
        opset=6,
        ir_version=4,
        w=normal(1, 2, 8),
        r=normal(1, 2, 2),
    )
    with pytest.raises(InputError, match=r"opset 6 cannot be upgraded to 13[\s\S]*export the model again"):
        loaded(model, tmp_path)


@pytest.mark.parametrize("opset", [9, 13])
def test_initializers_that_are_also_inputs_are_weights(opset: int, tmp_path: Path) -> None:
    model = conv(opset=opset, ir_version=3)
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, WEIGHT.shape))
    read = loaded(model, tmp_path)
    assert read.inputs == [InputSpec("x", np.dtype(np.float32), ("N", 3, 8, 8))]
    save_model(read.graph, tmp_path / "again.onnx")
    np.testing.assert_array_equal(run(tmp_path / "again.onnx", {"x": X})["y"], run(model, {"x": X})["y"])
    assert engine(tmp_path / "again.onnx", tmp_path, x=X.shape).compiled.kernels


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "local": 1]>
        g (float[N,4] x) => (float[N,4] y) { t = local.twice(x) y = local.twice(t) }
        <domain: "local", opset_import: ["": 17]> twice (a) => (b) { b = Add(a, a) }"""
    )
    read = loaded(model, tmp_path)
    assert [node.op for node in read.graph.nodes] == ["Add", "Add"]
    x = normal(2, 4)
    np.testing.assert_array_equal(run(read.graph, {"x": x})["y"], 4 * x)


def test_node_names_are_unique(tmp_path: Path) -> None:
    model = net("g (float[N] x) => (float[N] y) { a = Abs(x) b = Abs(a) c = Abs(b) d = Abs(c) y = Abs(d) }")
    for node, name in zip(model.graph.node, ["n", "", "n", "n_1", ""], strict=True):
        node.name = name
    assert [n.name for n in loaded(model, tmp_path).graph.nodes] == ["n", "Abs_1", "n_2", "n_1", "Abs_4"]


def test_node_names_are_unique_across_bodies(tmp_path: Path) -> None:
    model = net(
        "g (float[N,4] x, bool c) => (float[N,4] y) { a = Abs(x)"
        " y = If(c) <then_branch = t () => (float[N,4] u) { u = Abs(a) },"
        "           else_branch = e () => (float[N,4] v) { v = Neg(a) }> }"
    )
    for body in (attribute.g for attribute in model.graph.node[1].attribute):
        body.node[0].name = "a"
    graph = loaded(model, tmp_path).graph
    names = [n.name for g in (graph, *graph.subgraphs(recursive=True)) for n in g.nodes]
    assert len(names) == len(set(names)) == 4


def test_inputs_of_fixed_batch_and_float16(tmp_path: Path) -> None:
    text = "g (float16[4,8] x, int64[4,?] ids) => (float16[4,8] y) { y = Relu(x) }"
    x, ids = loaded(net(text), tmp_path).inputs
    assert x == InputSpec("x", np.dtype(np.float16), (4, 8))
    assert (ids.dtype, ids.shape[0]) == (np.dtype(np.int64), 4)
    assert not isinstance(ids.shape[1], int)


def test_a_quantized_model_is_recognised(tmp_path: Path) -> None:
    text = "g (float[N,4] x) => (float[N,4] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
    model = net(text, s=np.float32(0.1), z=np.int8(0))
    assert loaded(model, tmp_path).is_quantized
    assert not loaded(conv(), tmp_path).is_quantized


@pytest.mark.parametrize("op", ["QLinearAdd", "MatMulNBits"])
def test_other_tools_operators_say_that_the_model_is_quantized(op: str, tmp_path: Path) -> None:
    model = conv()
    model.graph.node[0].op_type, model.graph.node[0].domain = op, "com.microsoft"
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(InputError, match=rf"unknown operator '{op}'[\s\S]*quantized already"):
        loaded(model, tmp_path)


# -- writing


def test_saving_and_loading_gives_the_same_graph_and_the_same_bytes(tmp_path: Path) -> None:
    first = loaded(conv(), tmp_path)
    save_model(first.graph, tmp_path / "a" / "model.onnx")
    second = load_model(tmp_path / "a" / "model.onnx")
    save_model(second.graph, tmp_path / "b.onnx")
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert second.inputs == first.inputs
    np.testing.assert_array_equal(run(tmp_path / "b.onnx", {"x": X})["y"], run(conv(), {"x": X})["y"])


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[gs.Graph]:
    """A graph that is above the limit of one file."""
    monkeypatch.setattr(trtq.graph.model, "PROTOBUF_LIMIT", 16)
    return graph_of(conv())


def test_weights_above_the_limit_go_beside_the_model(small_limit: gs.Graph, tmp_path: Path) -> None:
    path = tmp_path / "out" / "big.onnx"
    for _ in range(2):  # writing over an older one leaves no more than writing anew
        save_model(small_limit, path)
        assert sorted(p.name for p in path.parent.iterdir()) == ["big.onnx", "big.onnx.data"]
        assert (path.parent / "big.onnx.data").stat().st_size == WEIGHT.nbytes
    stored = onnx.load(path, load_external_data=False)
    assert {e.key: e.value for e in stored.graph.initializer[0].external_data}["location"] == "big.onnx.data"
    np.testing.assert_array_equal(run(path, {"x": X})["y"], run(conv(), {"x": X})["y"])
    np.testing.assert_array_equal(load_model(path).graph.nodes[0].inputs[1].values, WEIGHT)
    assert engine(path, tmp_path, x=X.shape).compiled.kernels


def test_what_is_handed_to_a_loader_above_the_limit_is_a_passing_file(small_limit: gs.Graph) -> None:
    with serialized(small_limit) as model:
        assert isinstance(model, Path)
        np.testing.assert_array_equal(run(model, {"x": X})["y"], run(conv(), {"x": X})["y"])
    assert not model.parent.exists()


def test_what_is_handed_to_a_loader_below_the_limit_are_bytes() -> None:
    with serialized(graph_of(conv())) as model:
        assert isinstance(model, bytes)
    assert run(onnx.load_from_string(model), {"x": X})["y"].shape == (2, 16, 6, 6)


@pytest.mark.parametrize("limit", [2**31, 16], ids=["one file", "external data"])
def test_a_path_that_cannot_be_written(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trtq.graph.model, "PROTOBUF_LIMIT", limit)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        save_model(graph_of(conv()), tmp_path / "file" / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# -- what a file says of tensors inside it


STALE = """g (float[N,3,8,8] x) => (float[?,?] y) {
    h = Relu(x)
    s = Shape(h)
    n = Slice(s, zero, one)
    w = Slice(s, three, four)
    wf = Cast<to = 1>(w)
    k = Mul(wf, half)
    c = Cast<to = 7>(k)
    m = Concat<axis = 0>(n, rest, c)
    r = Reshape(h, m)
    y = ReduceSum<keepdims = 0>(r, one)
}"""


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (onnx.TensorProto.FLOAT, [1, 3, 8, 8]),
        (onnx.TensorProto.FLOAT, ["N", 3, 8, 4]),
        (onnx.TensorProto.FLOAT, [3, 8]),
        (onnx.TensorProto.FLOAT16, ["N", 3, 8, 8]),
    ],
)
@pytest.mark.parametrize("in_body", [False, True])
def test_a_stale_shape_or_type_is_not_folded(kind: int, shape: list, in_body: bool, tmp_path: Path) -> None:
    """The input was given a dynamic batch, or another size, and the tensors behind it kept what they said."""
    constants = {name: np.int64([i]) for i, name in enumerate(["zero", "one", "two", "three", "four"])}
    constants |= {"rest": np.int64([-1]), "half": np.float32([0.5])}
    text = STALE
    if in_body:
        head, _, body = STALE.partition("{")
        body = body.replace("y =", "z =").rstrip()[:-1]
        text = f"""{head.replace(") =>", ", bool[1] cond) =>", 1)} {{
            y = If (cond) <then_branch = t () => (float[?,?] z) {{ {body} }},
                           else_branch = e () => (float[?,?] f) {{ f = ReduceMax<keepdims = 0>(x, axes) }}>
        }}"""
        constants["axes"] = np.int64([1, 2])
    used = {name: value for name, value in constants.items() if name in text}
    model, plain = net(text, opset=18, **used), net(text, opset=18, **used)
    graph = next(a.g for a in model.graph.node[0].attribute) if in_body else model.graph
    graph.value_info.append(onnx.helper.make_tensor_value_info("h", kind, shape))
    feed = {"x": normal(5, 3, 8, 8)} | ({"cond": np.array([True])} if in_body else {})
    expected = onnx.reference.ReferenceEvaluator(plain).run(None, feed)[0]
    read = loaded(model, tmp_path).graph
    fold(read)
    found = onnx.reference.ReferenceEvaluator(export(read)).run(None, feed)[0]
    np.testing.assert_array_equal(found, expected)


def test_inputs_left_out_at_the_end_are_dropped(tmp_path: Path) -> None:
    """TensorRT's parser refuses the empty name; in the middle it has to stay."""
    make = onnx.helper.make_node
    nodes = [
        make("Conv", ["x", "w", ""], ["c"]),
        make("Resize", ["c", "", "s", ""], ["r"]),
        make("Clip", ["r", "", ""], ["y"]),
    ]
    model = net("g (float[N,2,4,4] x) => (float[?,?,?,?] y) { y = Relu(x) }", w=normal(3, 2, 3, 3))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([1, 1, 2, 2]), "s"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    found = loaded(model, tmp_path)
    assert [[t.name for t in n.inputs] for n in found.graph.nodes] == [["x", "w"], ["c", "", "s"], ["r"]]
    assert found.mended
    x = normal(2, 2, 4, 4)
    np.testing.assert_array_equal(run(found.graph, {"x": x})["y"], run(model, {"x": x})["y"])
    assert engine(found.graph, tmp_path, x=(2, 2, 4, 4)).compiled.kernels


@pytest.mark.parametrize("size", [-1, "", " ", None])
def test_axes_without_a_size_or_a_name_are_open(size: int | str | None, tmp_path: Path) -> None:
    model = net("g (float[N,6] x) => (float[N,6] y) { y = Relu(x) }")
    for value in (*model.graph.input, *model.graph.output):
        dim = value.type.tensor_type.shape.dim[0]
        dim.Clear()
        if isinstance(size, int):
            dim.dim_value = size
        elif size is not None:
            dim.dim_param = size
    (spec,) = loaded(model, tmp_path).inputs
    assert spec.shape == (None, 6)
