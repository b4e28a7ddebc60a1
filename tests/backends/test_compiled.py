"""Reading the compiled graph: the message's grammar, and what TensorRT for RTX does with Q/DQ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_nets import Net

from trtq.backends.compiled import Compiled, CompiledLayer, CompiledTensor, int8_nodes, parse_layers
from trtq.backends.interface import Build, Range

# -- the message's grammar

MESSAGE = """Layers:
Name: __mye1_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: 
Name: a, b: [c]_myl0_1, LayerType: correlation, Inputs: [ { Name: x }], Outputs: [, Dimensions: [-1,4,5], Strides: [20,5,1], StrideOrder: [2,1,0], Datatype: Int8, Format: (Arbitrary) Format with stride order = [1,2,0] }], Constants: [ { Name: w, Dimensions: [3], Strides: [1], StrideOrder: [0], Datatype: Int4, Format: (Linear) Row major linear format }, { Name: s, Dimensions: [], Strides: [], StrideOrder: [], Datatype: Float, Format: (Linear) Row major linear format }], Outputs: [ { Name: y, Dimensions: [-1,2], Strides: [2,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: a, b: [c]]\x1f[ONNX Layer: p][ONNX Layer: q]\x1f[ONNX Layer: two
lines]
Name: from another version, LayerType: novel

I/O Tensors:
 Name: x, IOMode: Input, DataType: Int8, Dimensions: [-1,4,5]

Engine Metadata:
 Multi-Device: Disabled
"""  # noqa: E501, W291


def test_message_is_read_field_by_field() -> None:
    compiled = parse_layers(MESSAGE, batch=7)
    call, layer = compiled.layers
    assert (call.kind, call.inputs, call.onnx_nodes) == ("shape_call", (), ())
    assert (layer.name, layer.kind) == ("a, b: [c]_myl0_1", "correlation")
    assert layer.inputs == (
        CompiledTensor(
            "x }], Outputs: [", (-1, 4, 5), "Int8", "(Arbitrary) Format with stride order = [1,2,0]"
        ),
    )
    assert [(t.name, t.dims, t.datatype) for t in layer.constants] == [
        ("w", (3,), "Int4"),
        ("s", (), "Float"),
    ]
    assert layer.onnx_nodes == ("a, b: [c]", "p][ONNX Layer: q", "two\nlines")
    assert compiled.batch == 7
    assert compiled.unread == ("Name: from another version, LayerType: novel",)


@pytest.mark.parametrize("text", ["", "Autotuning format combination"])
def test_a_message_of_another_kind_is_not_taken_for_an_empty_engine(text: str) -> None:
    assert parse_layers(text).unread == (text,)


def test_kernels_and_bytes_by_hand() -> None:
    compiled = parse_layers(MESSAGE, batch=7)
    assert compiled.kernels == 1  # the shape call writes nothing
    # x: n x 4 x 5 Int8; w: 3 Int4 in 2 bytes; s: one Float; y: n x 2 Half
    assert compiled.bytes_moved() == 7 * 20 + 2 + 4 + 7 * 4
    assert compiled.bytes_moved(1) == 20 + 2 + 4 + 4


MARKERS = (", LayerType: ", ", Inputs: [", ", Dimensions: [", "\x1f", "Name: ", "\n\nI/O")
names = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1).filter(
    lambda text: not any(marker in text for marker in MARKERS) and text.strip() == text
)
tensors = st.builds(
    CompiledTensor,
    names,
    st.lists(st.integers(-1, 9)).map(tuple),
    st.sampled_from(["Float", "Half", "Int8", "Int64", "Bool"]),
    st.just("(NHWC) Channel major format"),
)
tensor_lists = st.lists(tensors, max_size=3).map(tuple)
layers = st.builds(
    CompiledLayer,
    names,
    st.sampled_from(["kgen", "gemm"]),
    tensor_lists,
    tensor_lists,
    tensor_lists,
    st.lists(names, max_size=3).map(tuple),
)
graphs = st.builds(Compiled, st.lists(layers, max_size=3).map(tuple), st.integers(1, 64))


def write(compiled: Compiled) -> str:
    """The message TensorRT would log for `compiled`."""

    def of(tensors: tuple[CompiledTensor, ...]) -> str:
        return ",".join(
            f" {{ Name: {t.name}, Dimensions: [{','.join(map(str, t.dims))}], Strides: [1], "
            f"StrideOrder: [0], Datatype: {t.datatype}, Format: {t.format} }}"
            for t in tensors
        )

    return "Layers:\n" + "".join(
        f"Name: {layer.name}, LayerType: {layer.kind}, Inputs: [{of(layer.inputs)}], "
        f"Constants: [{of(layer.constants)}], Outputs: [{of(layer.outputs)}], TacticName: , StreamId: 0, "
        f"Metadata: {chr(0x1F).join(f'[ONNX Layer: {node}]' for node in layer.onnx_nodes)}\n"
        for layer in compiled.layers
    )


@given(graphs)
def test_any_names_survive_the_message(compiled: Compiled) -> None:
    assert parse_layers(write(compiled), compiled.batch) == compiled


@given(graphs)
def test_json_round_trip(compiled: Compiled) -> None:
    assert Compiled.from_json(json.loads(json.dumps(compiled.to_json()))) == compiled


def test_a_node_computed_twice_is_int8_only_if_both_are() -> None:
    codes, real = CompiledTensor("q", (1,), "Int8", ""), CompiledTensor("r", (1,), "Float", "")
    exact = CompiledLayer("a", "gemm", (codes,), (codes,), (real,), ("node",))
    other = CompiledLayer("b", "gemm", (real,), (real,), (real,), ("node",))
    assert int8_nodes([exact], ["node"]) == {"node"}
    assert int8_nodes([exact, other], ["node"]) == set()


# -- what the real builder does with Q/DQ

Case = tuple[onnx.ModelProto, set[str]]
"""A model whose node of interest is called `node` (or as in the set), and the nodes that run in INT8."""

CASES: dict[str, Callable[[], Case]] = {}


def case(name: str, **kwargs: Any) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    def register(make: Callable[..., Case]) -> Callable[..., Case]:
        CASES[name] = lambda: make(**kwargs)
        return make

    return register


@case("conv 1d", dims=1)
@case("conv 2d", dims=2)
@case("conv 3d", dims=3)
@case("conv 1x1", kernel=1)
@case("conv dilated", dilation=2)
@case("conv grouped", groups=4)
@case("conv depthwise", groups=32)
@case("conv depthwise 1d", dims=1, groups=32)
@case("conv depthwise 3d", dims=3, groups=32)
@case("conv of 3 channels", channels=3)
@case("conv of 17 channels", channels=17)
@case("conv opset 13", opset=13)
@case("conv fp16 with fp16 scales", opset=19, dtype=np.float16)
@case("conv weights per tensor", weights="tensor")
@case("conv weights that are activations", weights="activation")
@case("conv weights per input channel", weights="input channel", int8=False)
@case("conv only input quantized", weights="float", int8=False)
@case("conv only weights quantized", quantized_input=False, int8=False)
@case("conv fp32", quantized_input=False, weights="float", int8=False)
def conv(
    dims: int = 2,
    kernel: int = 3,
    dilation: int = 1,
    groups: int = 1,
    channels: int = 32,
    opset: int = 17,
    dtype: type = np.float32,
    quantized_input: bool = True,
    weights: str = "channel",
    int8: bool = True,
) -> Case:
    net = Net(opset, dtype)
    x = net.input(2, channels, *[16] * dims)
    shape = (32, channels // groups, *[kernel] * dims)
    w = {
        "channel": lambda: net.weight(*shape, axis=0),
        "input channel": lambda: net.weight(*shape, axis=1),
        "tensor": lambda: net.qdq(net.weight(*shape)),
        "activation": lambda: net.qdq(net.input(*shape, name="w")),
        "float": lambda: net.weight(*shape),
    }[weights]()
    bias = net.const(np.ones(32, dtype))
    attrs = {"kernel_shape": [kernel] * dims, "dilations": [dilation] * dims, "group": groups}
    y = net.op("Conv", net.qdq(x) if quantized_input else x, w, bias, name="node", **attrs)
    return net.model(net.op("Relu", y)), {"node"} if int8 else set()


@case("transposed conv", axis=1)
@case("transposed conv, weights per tensor", axis=None)
def transposed_conv(axis: int | None) -> Case:
    net = Net()
    w = net.weight(32, 32, 3, 3, axis=axis)
    w = net.qdq(w) if axis is None else w
    y = net.op("ConvTranspose", net.qdq(net.input(2, 32, 8, 8)), w, name="node", kernel_shape=[3, 3])
    return net.model(y), set()  # a floating-point deconvolution: Q/DQ only costs


@case("gemm")
@case("gemm transA", transA=1)
@case("gemm transB", transB=1)
@case("gemm alpha", alpha=0.5)
@case("gemm fp16", opset=19, dtype=np.float16)
@case("gemm K = 3", k=3)
@case("gemm N = 1", n=1)
@case("gemm only input quantized", quantized_weight=False)
@case("gemm only weight quantized", quantized_input=False)
@case("gemm fp32", quantized_input=False, quantized_weight=False)
def gemm(
    k: int = 64,
    n: int = 32,
    opset: int = 17,
    dtype: type = np.float32,
    quantized_input: bool = True,
    quantized_weight: bool = True,
    **attrs: Any,
) -> Case:
    net = Net(opset, dtype)
    x = net.input(*((k, 8) if attrs.get("transA") else (8, k)))
    output_axis = 0 if attrs.get("transB") else 1
    w = net.weight(*((n, k) if output_axis == 0 else (k, n)), axis=output_axis if quantized_weight else None)
    bias = net.const(np.ones(n, dtype))
    y = net.op("Gemm", net.qdq(x) if quantized_input else x, w, bias, name="node", **attrs)
    return net.model(y), {"node"} if quantized_input and quantized_weight else set()


@case("matmul", left=(2, 8, 64), right=(64, 32), axis=1)
@case("matmul of a stack of weights", left=(2, 8, 64), right=(2, 64, 32), axis=2)
@case("matmul vector x matrix", left=(64,), right=(64, 32), axis=1)
@case("matmul matrix x vector", left=(8, 64), right=(64,))
@case("matmul weights per input row", left=(8, 64), right=(64, 64), axis=0, int8=False)
@case("matmul of activations", left=(2, 8, 64), right=(2, 64, 16), activations=True)
@case("matmul of activations, broadcast", left=(2, 8, 64), right=(64, 16), activations=True)
@case("matmul of activations, one quantized", left=(2, 8, 64), right=(2, 64, 16), one=True, int8=False)
def matmul(
    left: tuple[int, ...],
    right: tuple[int, ...],
    axis: int | None = None,
    activations: bool = False,
    one: bool = False,
    int8: bool = True,
) -> Case:
    net = Net()
    x = net.qdq(net.input(*left))
    if one:
        w = net.input(*right, name="w")
    elif activations:
        w = net.qdq(net.input(*right, name="w"))
    else:
        w = net.weight(*right, axis=axis) if axis is not None else net.qdq(net.weight(*right))
    return net.model(net.op("MatMul", x, w, name="node")), {"node"} if int8 else set()


@case("attention", int8={"scores", "context"})
@case("attention fused", output=True, int8={"scores", "context"})
@case("attention fused fp16", output=True, dtype=np.float16, int8={"scores", "context"})
@case("attention without softmax", softmax=False, int8={"scores"})
@case("attention without softmax, output quantized", softmax=False, output=True, int8={"scores"})
@case("attention without value", value=False, int8={"scores"})
@case("attention without query and key", query=False, int8={"context"})
@case(
    "attention fp16 without softmax and value", softmax=False, value=False, dtype=np.float16, int8={"scores"}
)
@case("attention fp16", query=False, softmax=False, value=False, dtype=np.float16, int8=set())
@case(
    "attention fp16, only output",
    query=False,
    softmax=False,
    value=False,
    output=True,
    dtype=np.float16,
    int8=set(),
)
def attention(
    int8: set[str],
    query: bool = True,
    softmax: bool = True,
    value: bool = True,
    output: bool = False,
    dtype: type = np.float32,
) -> Case:
    net = Net(19, dtype)
    q, k, v = (net.input(2, 4, 64, 32, name=name) for name in "qkv")
    k = net.op("Transpose", k, perm=[0, 1, 3, 2])
    scores = net.op("MatMul", *((net.qdq(q), net.qdq(k)) if query else (q, k)), name="scores")
    scores = net.op("Mul", scores, np.array(0.2, dtype))
    p = net.op("Softmax", net.op("Add", scores, net.input(2, 1, 64, 64, name="mask")), axis=-1)
    context = net.op(
        "MatMul", net.qdq(p, 1 / 127) if softmax else p, net.qdq(v) if value else v, name="context"
    )
    return net.model(net.op("Relu", net.qdq(context)) if output else context), int8


@case("attention operator fp16")
def attention_operator() -> Case:
    """ONNX's Attention computes both products in half, though all its inputs come from Q/DQ."""
    net = Net(23, np.float16)
    q, k, v = (net.qdq(net.input(2, 4, 64, 32, name=name)) for name in "qkv")
    return net.model(net.op("Attention", q, k, v, name="node")), set()


@pytest.mark.parametrize("name", CASES)
def test_int8_nodes(name: str, build_engine: Callable[..., Build]) -> None:
    model, expected = CASES[name]()
    compiled = build_engine(model).compiled
    nodes = {"node", "scores", "context"} & {node.name for node in model.graph.node}
    computed = {node for layer in compiled.layers if layer.computes for node in layer.onnx_nodes}
    assert nodes <= computed  # not merely overlooked
    assert int8_nodes(compiled.layers, nodes) == expected
    assert compiled.unread == ()


def pooled(op: str, quantized: bool = True) -> onnx.ModelProto:
    """Conv, pooling, conv; `quantized`: Q/DQ before the pooling as well as after."""
    net = Net()

    def conv(x: gs.Tensor) -> gs.Variable:
        return net.op("Conv", net.qdq(x), net.weight(32, 32, 3, 3, axis=0), kernel_shape=[3, 3])

    x = conv(net.input(2, 32, 16, 16))
    x = net.qdq(x) if quantized else x
    return net.model(conv(net.op(op, x, name="pool", kernel_shape=[2, 2], strides=[2, 2])))


@pytest.mark.parametrize(
    ("op", "quantized", "datatype"),
    [("MaxPool", True, "Int8"), ("MaxPool", False, "Int8"), ("AveragePool", True, "Float")],
)
def test_pooling(op: str, quantized: bool, datatype: str, build_engine: Callable[..., Build]) -> None:
    """MaxPool runs on INT8 codes, even when only its consumer is quantized; AveragePool never does."""
    layers = build_engine(pooled(op, quantized)).compiled.layers
    (pool,) = (layer for layer in layers if layer.kind.endswith("pool"))
    assert [t.datatype for t in pool.inputs + pool.outputs] == [datatype] * 2


@pytest.mark.parametrize(("quantized", "datatypes"), [(True, ["Float", "Int8"]), (False, ["Float", "Float"])])
def test_residual_add(quantized: bool, datatypes: list[str], build_engine: Callable[..., Build]) -> None:
    """A quantized skip connection is read as INT8, so the fp32 tensor is never written."""
    net = Net()

    def conv(x: gs.Tensor) -> gs.Variable:
        w = net.weight(32, 32, 3, 3, axis=0)
        return net.op("Conv", x, w, kernel_shape=[3, 3], pads=[1] * 4)

    start = net.op("Relu", conv(net.qdq(net.input(2, 32, 16, 16))))
    codes = net.qdq(start)
    add = net.op("Add", conv(codes), codes if quantized else start, name="add")
    layers = build_engine(net.model(conv(net.qdq(net.op("Relu", add))))).compiled.layers
    (kernel,) = (layer for layer in layers if "add" in layer.onnx_nodes)
    assert sorted(t.datatype for t in kernel.inputs) == datatypes


def test_parallel_branches_do_not_count_their_synchronisation(build_engine: Callable[..., Build]) -> None:
    net = Net()
    x = net.qdq(net.input(4, 32, 16, 16))
    branches = [
        net.op("Conv", x, net.weight(32, 32, 1, 1, axis=0), name=f"branch{i}", kernel_shape=[1, 1])
        for i in range(3)
    ]
    compiled = build_engine(net.model(*branches)).compiled
    kinds = [layer.kind for layer in compiled.layers]
    assert {"signal", "wait"} < set(kinds)
    assert compiled.kernels == len([kind for kind in kinds if kind not in ("signal", "wait")])
    assert len(int8_nodes(compiled.layers, [f"branch{i}" for i in range(3)])) == 3


def test_odd_node_names(build_engine: Callable[..., Build]) -> None:
    names = [
        "a, b: [c]",
        "a][ONNX Layer: b",
        "x }], Outputs: [",
        "two\nlines",
        "ünï",
        "{ Name: q, Dimensions: [1]",
    ]
    net = Net()
    x = net.input("N", 32, 8, 8)
    for name in names:
        x = net.op("Conv", net.qdq(x), net.weight(32, 32, 1, 1, axis=0), name=name, kernel_shape=[1, 1])
    profile = {"x": Range((1, 32, 8, 8), (2, 32, 8, 8), (4, 32, 8, 8))}
    compiled = build_engine(net.model(x), profile).compiled
    assert int8_nodes(compiled.layers, names) == set(names)
    assert compiled.batch == 2


def test_bytes_of_a_real_engine(build_engine: Callable[..., Build]) -> None:
    """ReLU on N x 8 floats is one kernel that reads and writes 32 bytes a row."""
    net = Net()
    model = net.model(net.op("Relu", net.input("N", 8)))
    compiled = build_engine(model, {"x": Range((1, 8), (4, 8), (9, 8))}).compiled
    assert compiled.kernels == 1
    assert compiled.bytes_moved() == 4 * 64
    assert compiled.bytes_moved(3) == 3 * 64
    fixed = build_engine(model, {"x": Range((4, 8), (4, 8), (4, 8))}).compiled
    assert {fixed.bytes_moved(1), fixed.bytes_moved(9)} == {4 * 64}  # nothing dynamic is left


def test_a_gather_reads_no_more_of_a_table_than_it_writes(build_engine: Callable[..., Build]) -> None:
    net = Net()
    ids = net.input("N")
    ids.dtype = np.int32
    model = net.model(net.op("Gather", net.random.normal(size=(1000, 8)).astype(np.float32), ids))
    compiled = build_engine(model, {"x": Range((4,), (4,), (4,))}).compiled
    read, written = 4 * 4 + 4 * 8 * 4, 4 * 8 * 4
    assert compiled.bytes_moved() == read + written


ZOO = {
    "resnet20_cifar10": {"input": (3, 32, 32)},
    "efficientnet_lite0": {"input": (3, 224, 224)},
    "minilm_l6": {"input_ids": (64,), "attention_mask": (64,)},
}


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("name", ZOO)
def test_trained_models(
    name: str, quantized: bool, zoo: Path, build_engine: Callable[..., Build], tmp_path: Path
) -> None:
    """With Q/DQ on both inputs of every Conv, Gemm and MatMul all of them run in INT8; without, none."""
    graph = gs.import_onnx(onnx.shape_inference.infer_shapes(onnx.load(zoo / "models" / f"{name}.onnx")))
    graph.fold_constants().cleanup().toposort()
    nodes = [node for node in graph.nodes if node.op in ("Conv", "Gemm", "MatMul")]
    if quantized:
        quantize_everything(graph, nodes)
    onnx.save(gs.export_onnx(graph), tmp_path / "model.onnx")
    profile = {key: Range((1, *row), (8, *row), (32, *row)) for key, row in ZOO[name].items()}
    compiled = build_engine(tmp_path / "model.onnx", profile).compiled
    assert int8_nodes(compiled.layers, [n.name for n in nodes]) == {n.name for n in nodes if quantized}
    assert compiled.unread == ()


def quantize_everything(graph: gs.Graph, nodes: list[gs.Node]) -> None:
    """Q/DQ on both inputs of `nodes`: activations with scale 0.05, weights with their own, per channel."""
    net = Net()
    net.graph = graph
    done: dict[str, gs.Variable] = {}

    def activation(tensor: gs.Variable) -> gs.Variable:
        if tensor.name not in done:
            done[tensor.name] = net.qdq(tensor)
        return done[tensor.name]

    for node in nodes:
        x, w = node.inputs[:2]
        node.inputs[0] = activation(x)
        if isinstance(w, gs.Variable):
            node.inputs[1] = activation(w)
        else:
            axis = 0 if node.op == "Conv" or node.attrs.get("transB") else w.values.ndim - 1
            node.inputs[1] = net.weight(*w.values.shape, axis=axis)
    graph.cleanup().toposort()
