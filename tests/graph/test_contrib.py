"""ONNX Runtime's fused operators written as ONNX's own, against ONNX Runtime's kernels and PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from nets import net
from numpy.typing import NDArray
from trtq_references.group_norm import GroupNorm

from trtq.graph.contrib import EXPANSIONS
from trtq.graph.fold import fold
from trtq.graph.model import Model, export, load_model

F = np.float32
Arrays = Mapping[str, NDArray]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(*shape: int, seed: int = 0, spread: float = 1.0) -> NDArray:
    return rng(seed).normal(0, spread, shape).astype(F)


def contrib(
    op: str,
    inputs: dict[str, NDArray | None],
    weights: Arrays | None = None,
    outputs: int = 1,
    opset: int = 17,
    dynamic: bool = True,
    domain: str = "com.microsoft",
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one operator: what is among `weights` is a constant, None is left out."""
    weights = weights or {}
    node = onnx.helper.make_node(
        op,
        [name if array is not None else "" for name, array in inputs.items()],
        [f"y{i}" for i in range(outputs)],
        "fused",
        domain=domain,
        **attributes,
    )
    values = [
        onnx.helper.make_tensor_value_info(
            name,
            onnx.helper.np_dtype_to_tensor_dtype(a.dtype),
            ["N", *a.shape[1:]] if dynamic else a.shape,
        )
        for name, a in inputs.items()
        if a is not None and name not in weights
    ]
    graph = onnx.helper.make_graph(
        [node],
        "g",
        values,
        [onnx.ValueInfoProto(name=name) for name in node.output],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)


def run(model: onnx.ModelProto, feed: Arrays) -> list[NDArray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(feed))


def folded(model: onnx.ModelProto, folder: Path) -> Model:
    onnx.save(model, folder / "model.onnx")
    loaded = load_model(folder / "model.onnx")
    fold(loaded.graph)
    return loaded


def same(model: onnx.ModelProto, feed: Arrays, folder: Path) -> list[str]:
    """Make sure that the expanded model computes the same; its operators."""
    graph = folded(model, folder).graph
    assert all(node.domain in (None, "", "ai.onnx") for node in graph.nodes)
    found = run(export(graph), feed)
    for expected, array in zip(run(model, feed), found, strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_allclose(array, expected, rtol=2e-4, atol=2e-5)
    return [node.op for node in graph.nodes]


X = normal(2, 4, 8)


@pytest.mark.parametrize("op", ["Gelu", "FastGelu", "QuickGelu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_gelus(op: str, dtype: type, tmp_path: Path) -> None:
    x = X.astype(dtype)
    try:
        run(contrib(op, {"x": x}), {"x": x})
    except Exception:
        pytest.skip("ONNX Runtime's CPU has no such kernel")
    graph = folded(contrib(op, {"x": x}), tmp_path).graph
    expected, found = (run(model, {"x": x})[0] for model in (contrib(op, {"x": x}), export(graph)))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=1e-2 if dtype == np.float16 else 2e-4, atol=2e-3)


@pytest.mark.parametrize("op", ["BiasGelu", "FastGelu"])
def test_gelus_with_a_bias(op: str, tmp_path: Path) -> None:
    bias = normal(8, seed=1)
    same(contrib(op, {"x": X, "b": bias}, {"b": bias}), {"x": X}, tmp_path)


@pytest.mark.parametrize(
    ("activation", "parameters"),
    [("Relu", None), ("Sigmoid", None), ("Tanh", None), ("LeakyRelu", [0.2]), ("Clip", [0.0, 0.5])],
)
@pytest.mark.parametrize("added", [False, True])
def test_fused_conv(activation: str, parameters: list[float] | None, added: bool, tmp_path: Path) -> None:
    x, w, b = normal(2, 3, 6, 6), normal(4, 3, 3, 3, seed=1), normal(4, seed=2)
    z = normal(2, 4, 6, 6, seed=3)
    attributes: dict[str, Any] = {"activation": activation, "pads": [1, 1, 1, 1]}
    if parameters:
        attributes["activation_params"] = parameters
    inputs = {"x": x, "w": w, "b": b} | ({"z": z} if added else {})
    feed = {"x": x} | ({"z": z} if added else {})
    operators = same(contrib("FusedConv", inputs, {"w": w, "b": b}, **attributes), feed, tmp_path)
    assert operators == ["Conv", *(["Add"] if added else []), activation]


def test_a_fused_activation_that_is_not_known_keeps_the_node(tmp_path: Path) -> None:
    x, w = normal(1, 3, 6, 6), normal(4, 3, 3, 3)
    model = contrib("FusedConv", {"x": x, "w": w}, {"w": w}, activation="Elusive")
    graph = folded(model, tmp_path).graph
    assert [node.op for node in graph.nodes] == ["FusedConv"]
    assert [len(tensor.outputs) for tensor in graph.inputs] == [1]


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "Sigmoid"])
def test_fused_gemm(activation: str, tmp_path: Path) -> None:
    a, b, c = normal(3, 5), normal(7, 5, seed=1), normal(7, seed=2)
    attributes = {"activation": activation, "transB": 1, "alpha": 0.5}
    if activation == "LeakyRelu":
        attributes["activation_alpha"] = 0.3
    model = contrib("FusedGemm", {"a": a, "b": b, "c": c}, {"b": b, "c": c}, **attributes)
    assert same(model, {"a": a}, tmp_path) == ["Gemm", activation]


@pytest.mark.parametrize("op", ["FusedMatMul", "TransposeMatMul"])
@pytest.mark.parametrize(("a", "b"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_fused_matmul(op: str, a: int, b: int, tmp_path: Path) -> None:
    left = normal(2, 5, 4) if a else normal(2, 4, 5)
    right = normal(2, 6, 5, seed=1) if b else normal(2, 5, 6, seed=1)
    model = contrib(op, {"a": left, "b": right}, transA=a, transB=b, alpha=0.25)
    assert "MatMul" in same(model, {"a": left, "b": right}, tmp_path)


@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("total", [False, True])
def test_skip_layer_normalization(beta: bool, bias: bool, total: bool, tmp_path: Path) -> None:
    skip, gamma = normal(2, 4, 8, seed=1), normal(8, seed=2)
    weights = {"gamma": gamma} | ({"beta": normal(8, seed=3)} if beta else {})
    weights |= {"bias": normal(8, seed=4)} if bias else {}
    inputs = {"x": X, "skip": skip, "gamma": gamma, "beta": weights.get("beta"), "bias": weights.get("bias")}
    model = contrib("SkipLayerNormalization", inputs, weights, outputs=4 if total else 1, epsilon=1e-3)
    if total:
        model.graph.node[0].output[1:3] = ["", ""]
        del model.graph.output[1:3]
    assert "LayerNormalization" in same(model, {"x": X, "skip": skip}, tmp_path)


@pytest.mark.parametrize("opset", [17, 18])
def test_normalizations_by_the_root_of_the_mean_square(opset: int, tmp_path: Path) -> None:
    gamma, skip = normal(8, seed=1), normal(2, 4, 8, seed=2)
    model = contrib(
        "SkipSimplifiedLayerNormalization",
        {"x": X, "skip": skip, "gamma": gamma},
        {"gamma": gamma},
        opset=opset,
        epsilon=1e-4,
    )
    same(model, {"x": X, "skip": skip}, tmp_path)
    model = contrib(
        "SimplifiedLayerNormalization",
        {"x": X, "gamma": gamma},
        {"gamma": gamma},
        opset=opset,
        domain="",
        axis=-1,
        stash_type=1,
        epsilon=1e-4,
    )
    same(model, {"x": X}, tmp_path)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_embedding(segments: bool, mask: bool, tmp_path: Path) -> None:
    ids = rng().integers(0, 10, (2, 4)).astype(np.int32)
    kinds = rng(1).integers(0, 2, (2, 4)).astype(np.int32)
    counted = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.int32)
    weights = {"words": normal(10, 8), "places": normal(6, 8, seed=1), "kinds": normal(2, 8, seed=2)}
    weights |= {"gamma": normal(8, seed=3), "beta": normal(8, seed=4)}
    inputs: dict[str, NDArray | None] = {"ids": ids, "segments": kinds if segments else None}
    inputs |= {name: weights[name] for name in ("words", "places")}
    inputs |= {"kinds": weights["kinds"] if segments else None}
    inputs |= {name: weights[name] for name in ("gamma", "beta")} | ({"mask": counted} if mask else {})
    if not segments:
        del weights["kinds"]
    model = contrib("EmbedLayerNormalization", inputs, weights, outputs=2, mask_index_type=int(mask))
    feed = {name: inputs[name] for name in ("ids", "segments", "mask") if inputs.get(name) is not None}
    same(model, feed, tmp_path)  # type: ignore[arg-type]


MASKS = {
    "none": None,
    "lengths": np.array([3], np.int32),
    "keys": np.array([[1, 1, 0, 1]], np.int32),
    "queries": np.tril(np.ones((1, 4, 4), np.int32)),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [0, 1])
def test_attention(mask: str, causal: int, tmp_path: Path) -> None:
    x, w, b = normal(1, 4, 8), normal(8, 24, seed=1, spread=0.5), normal(24, seed=2)
    inputs: dict[str, NDArray | None] = {"x": x, "w": w, "b": b, "mask": MASKS[mask]}
    model = contrib(
        "Attention", inputs, {"w": w, "b": b}, num_heads=2, unidirectional=causal, dynamic=mask != "lengths"
    )
    feed = {"x": x} | ({} if MASKS[mask] is None else {"mask": MASKS[mask]})
    operators = same(model, feed, tmp_path)  # type: ignore[arg-type]
    assert operators.count("MatMul") == 3


def test_attention_with_a_cache(tmp_path: Path) -> None:
    x, w, b = normal(2, 3, 8), normal(8, 24, seed=1, spread=0.5), normal(24, seed=2)
    past = normal(2, 2, 2, 5, 4, seed=3)
    inputs: dict[str, NDArray | None] = {"x": x, "w": w, "b": b, "mask": None, "past": past}
    model = contrib("Attention", inputs, {"w": w, "b": b}, outputs=2, num_heads=2, unidirectional=1)
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "two"
    same(model, {"x": x, "past": past}, tmp_path)


def test_attention_with_values_of_another_size(tmp_path: Path) -> None:
    x, w, b = normal(1, 4, 8), normal(8, 28, seed=1, spread=0.5), normal(28, seed=2)
    model = contrib("Attention", {"x": x, "w": w, "b": b}, {"w": w, "b": b}, num_heads=2)
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("qkv_hidden_sizes", [8, 8, 12]))
    same(model, {"x": x}, tmp_path)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("past", [False, True])
def test_multi_head_attention(bias: bool, mask: bool, past: bool, tmp_path: Path) -> None:
    query, key, value = normal(1, 3, 8), normal(1, 4, 8, seed=1), normal(1, 4, 8, seed=2)
    total = 6 if past else 4
    counted = np.array([[1, 1, 0, 1, 1, 1]], np.int32)[:, :total]
    weights = {"b": normal(24, seed=3)} if bias else {}
    olds = {"pk": normal(1, 2, 2, 4, seed=4), "pv": normal(1, 2, 2, 4, seed=5)} if past else {}
    inputs: dict[str, NDArray | None] = {"q": query, "k": key, "v": value, "b": weights.get("b")}
    inputs |= {"mask": counted if mask else None, "bias": None} | olds
    model = contrib("MultiHeadAttention", inputs, weights, outputs=3 if past else 1, num_heads=2)
    feed = {"q": query, "k": key, "v": value} | ({"mask": counted} if mask else {}) | olds
    assert same(model, feed, tmp_path).count("MatMul") == 2


@pytest.mark.parametrize(("queries", "keys", "past"), [(3, 3, 2), (1, 3, 2), (3, 5, 0), (5, 3, 0), (3, 1, 2)])
def test_causal_multi_head_attention(queries: int, keys: int, past: int, tmp_path: Path) -> None:
    """Positions start behind the past, however many queries there are."""
    feed = {"q": normal(1, queries, 8), "k": normal(1, keys, 8, seed=1), "v": normal(1, keys, 8, seed=2)}
    olds = {"pk": normal(1, 2, past, 4, seed=4), "pv": normal(1, 2, past, 4, seed=5)} if past else {}
    inputs: dict[str, NDArray | None] = {**feed, "b": None, "mask": None, "bias": None, **olds}
    model = contrib("MultiHeadAttention", inputs, outputs=3 if past else 1, num_heads=2, unidirectional=1)
    same(model, feed | olds, tmp_path)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("split", [False, True])
def test_rotary_embedding(interleaved: int, split: bool, tmp_path: Path) -> None:
    x = normal(2, 2, 3, 8) if split else normal(2, 3, 16)
    angles = rng(1).uniform(0, 3, (5, 4))
    tables = {"cos": np.cos(angles).astype(F), "sin": np.sin(angles).astype(F)}
    positions = np.array([[0, 1, 2], [2, 3, 4]], np.int64)
    model = contrib("RotaryEmbedding", {"x": x, "p": positions, **tables}, tables, interleaved=interleaved)
    same(model, {"x": x, "p": positions}, tmp_path)


@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize("last", [0, 1])
def test_group_norm(activation: int, last: int, tmp_path: Path) -> None:
    """ONNX Runtime's CPU has no kernel; PyTorch says what is right, of the reference, too."""
    x, gamma, beta = normal(2, 6, 4, 5), normal(6, seed=1), normal(6, seed=2)
    expected = torch.nn.functional.group_norm(
        torch.from_numpy(x), 3, torch.from_numpy(gamma), torch.from_numpy(beta), eps=1e-3
    )
    expected = torch.nn.functional.silu(expected) if activation else expected
    wanted = expected.numpy().transpose(0, 2, 3, 1) if last else expected.numpy()
    x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if last else x
    attributes = {"groups": 3, "activation": activation, "channels_last": last, "epsilon": 1e-3}
    model = contrib(
        "GroupNorm", {"x": x, "gamma": gamma, "beta": beta}, {"gamma": gamma, "beta": beta}, **attributes
    )
    found = run(export(folded(model, tmp_path).graph), {"x": x})[0]
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(GroupNorm(x, gamma, beta, **attributes), wanted, rtol=2e-4, atol=2e-5)


def test_a_chain_keeps_its_names_and_types(tmp_path: Path) -> None:
    """Fused operators behind each other: types are known although inference knows none of them."""
    gamma = normal(8, seed=1).astype(np.float16)
    nodes = [
        onnx.helper.make_node("FastGelu", ["x"], ["a"], "one", domain="com.microsoft"),
        onnx.helper.make_node(
            "SkipLayerNormalization", ["a", "x", "gamma"], ["b"], "two", domain="com.microsoft"
        ),
        onnx.helper.make_node("QuickGelu", ["b"], ["y"], "three", domain="com.microsoft"),
    ]
    kinds = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT16, ["N", 4, 8]) for n in "xy"]
    weights = [onnx.numpy_helper.from_array(gamma, "gamma")]
    graph = onnx.helper.make_graph(nodes, "g", kinds[:1], kinds[1:], weights)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    loaded = folded(model, tmp_path)
    tensors = loaded.graph.tensors()
    assert {tensors[name].dtype for name in ("a", "b", "y")} == {np.dtype(np.float16)}
    assert run(export(loaded.graph), {"x": X.astype(np.float16)})[0].dtype == np.float16


def test_an_attention_behind_fused_operators_knows_its_sizes(tmp_path: Path) -> None:
    x, gamma, w = normal(2, 4, 8), normal(8, seed=1), normal(8, 8, seed=2)
    make = onnx.helper.make_node
    nodes = [
        make("SkipLayerNormalization", ["x", "x", "gamma"], ["a"], "norm", domain="com.microsoft"),
        *(make("MatMul", ["a", "w"], [name], name) for name in "qkv"),
        make("MultiHeadAttention", list("qkv"), ["y"], "attention", domain="com.microsoft", num_heads=2),
    ]
    kinds = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N", 4, 8]) for n in "xy"]
    weights = [onnx.numpy_helper.from_array(a, n) for n, a in (("gamma", gamma), ("w", w))]
    graph = onnx.helper.make_graph(nodes, "g", kinds[:1], kinds[1:], weights)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    assert same(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), {"x": x}, tmp_path)


def test_bfloat16_stays_as_it_is(tmp_path: Path) -> None:
    model = contrib("QuickGelu", {"x": X})
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    cast = onnx.helper.make_node("Cast", ["w"], ["x"], to=onnx.TensorProto.BFLOAT16)
    model.graph.node.insert(0, cast)
    model.graph.input[0].CopyFrom(
        onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, ["N", 4, 8])
    )
    graph = folded(model, tmp_path).graph
    assert [node.op for node in graph.nodes] == ["Cast", "QuickGelu"]


def test_what_needs_shapes_from_others_is_expanded_after_them(tmp_path: Path) -> None:
    """The rank of b is known once the convolution is: its height of 1 then goes away."""
    x, w, k = normal(2, 3, 4, 6), normal(5, 3, 4, 1, seed=1), normal(5, 7, seed=2)
    make = onnx.helper.make_node
    nodes = [
        make("FusedConv", ["x", "w"], ["a"], "conv", domain="com.microsoft", activation="Relu"),
        make("Squeeze", ["a", "two"], ["b"], "squeeze"),
        make("FusedMatMul", ["b", "k"], ["y"], "product", domain="com.microsoft", transA=1),
    ]
    values = [
        onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, 4, 6]),
        onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None),
    ]
    constants = {"w": w, "k": k, "two": np.array([2])}
    weights = [onnx.numpy_helper.from_array(a, n) for n, a in constants.items()]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    assert "MatMul" in same(model, {"x": x}, tmp_path)


def test_bodies_of_control_flow_are_expanded_too(tmp_path: Path) -> None:
    model = net(
        "g (float[N,4] x, bool c) => (float[N,4] y) {"
        " y = If(c) <then_branch = t () => (float[N,4] a) { a = QuickGelu(x) },"
        "           else_branch = e () => (float[N,4] b) { b = BiasGelu(x, k) }> }",
        k=normal(4),
    )
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    for attribute in model.graph.node[0].attribute:
        attribute.g.node[0].domain = "com.microsoft"
    graph = folded(model, tmp_path).graph
    assert {node.domain for body in graph.subgraphs() for node in body.nodes} <= {None, ""}
    x = normal(3, 4, seed=1)
    for condition in (True, False):
        feed = {"x": x, "c": np.array(condition)}
        np.testing.assert_allclose(run(export(graph), feed)[0], run(model, feed)[0], rtol=1e-4, atol=1e-5)


def test_a_layer_normalization_in_an_older_opset_is_onnxs(tmp_path: Path) -> None:
    weights = {"gamma": normal(8, seed=1), "beta": normal(8, seed=2)}
    model = contrib("LayerNormalization", {"x": X, **weights}, weights, opset=12, domain="", epsilon=1e-3)
    assert same(model, {"x": X}, tmp_path) == ["LayerNormalization"]
    assert load_model(tmp_path / "model.onnx").graph.opset == 17


def test_every_expansion_is_tested() -> None:
    text = Path(__file__).read_text()
    assert [op for op in EXPANSIONS if f'"{op}"' not in text] == []
