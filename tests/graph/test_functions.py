"""Operators written as smaller ones: the values of ONNX's reference implementation, and TensorRT builds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_graphsurgeon as gs
import pytest
from nets import Arrays, engine, loaded, net, normal, run
from numpy.typing import NDArray
from onnx.backend.test.loader import load_model_tests

from trtq.backends.coverage import coverage
from trtq.graph.fold import fold
from trtq.graph.functions import EXPANDED, expand_functions
from trtq.graph.place import place
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization

BATCH, QUERIES, KEYS, SIZE, VALUE_SIZE, PAST = 2, 5, 5, 8, 6, 3

FORMS = list(
    itertools.product(
        (3, 4), ((4, 4), (4, 2)), (None, "bool", "float"), (False, True), (False, True), (False, True)
    )
)
"""Rank, heads of queries and of keys, mask, causal, past, dynamic axes."""


def attention(
    rank: int,
    heads: tuple[int, int],
    mask: str | None,
    causal: bool,
    past: bool,
    dynamic: bool,
    *,
    opset: int = 24,
    dtype: type = np.float32,
    **attributes: Any,
) -> tuple[onnx.ModelProto, Arrays]:
    """A model that is one Attention, and a feed; a mask hides all keys from one query."""
    sizes = {"b": BATCH, "q": QUERIES, "k": KEYS, "p": PAST, "t": KEYS + PAST if past else KEYS}
    many, few = heads
    shapes: dict[str, list[int | str]] = {
        name: ["b", axis, count * size] if rank == 3 else ["b", count, axis, size]
        for name, axis, count, size in (
            ("Q", "q", many, SIZE),
            ("K", "k", few, SIZE),
            ("V", "k", few, VALUE_SIZE),
        )
    }
    if mask:
        shapes["mask"] = ["b", 1, "q", "t" if past else "k"]
    if past:
        shapes |= {"past_key": ["b", few, "p", SIZE], "past_value": ["b", few, "p", VALUE_SIZE]}
    feed = {
        name: normal(*(sizes.get(str(d), d) for d in shape), seed=seed, dtype=dtype)  # type: ignore[arg-type]
        for seed, (name, shape) in enumerate(shapes.items())
    }
    if mask:
        allowed = feed["mask"] > -0.5
        allowed[0, 0, 1] = False
        feed["mask"] = allowed if mask == "bool" else np.where(allowed, feed["mask"], dtype(-np.inf))
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(values.dtype) for name, values in feed.items()}
    if rank == 3:
        attributes |= {"q_num_heads": many, "kv_num_heads": few}
    every = ["Q", "K", "V", "mask", "past_key", "past_value"]
    outputs = ["Y", "present_key", "present_value"] if past else ["Y"]
    node = onnx.helper.make_node(
        "Attention",
        [n if n in feed else "" for n in every],
        outputs,
        "att",
        is_causal=int(causal),
        **attributes,
    )
    infos = [
        onnx.helper.make_tensor_value_info(n, kinds[n], s if dynamic else feed[n].shape)
        for n, s in shapes.items()
    ]
    ends = [onnx.helper.make_tensor_value_info(n, kinds["Q"], None) for n in outputs]
    graph = onnx.helper.make_graph([node], "g", infos, ends)
    opsets = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), feed


def check_same(model: onnx.ModelProto, feed: Arrays, folder: Path, atol: float = 1e-5) -> gs.Graph:
    """The folded graph, which holds no function any more and computes what ONNX's reference does."""
    graph = loaded(model, folder, opset=19).graph
    fold(graph)
    assert not {node.op for node in graph.nodes} & EXPANDED
    expected = onnx.reference.ReferenceEvaluator(model).run(None, dict(feed))
    for values, found in zip(expected, run(graph, feed).values(), strict=True):
        assert found.dtype == np.asarray(values).dtype
        np.testing.assert_allclose(found, values, rtol=0, atol=atol)
    return graph


def is_own(graph: gs.Graph) -> bool:
    """Whether an attention is written as trtq does it, not as ONNX defines it."""
    return "att/scores" in graph.tensors()


@pytest.mark.parametrize("form", FORMS[::7])
def test_attention_is_what_onnx_says(form: tuple[Any, ...], tmp_path: Path) -> None:
    graph = check_same(*attention(*form), tmp_path)
    _, _, mask, _, past, dynamic = form
    assert is_own(graph) != bool(mask and past and dynamic)  # whether the mask is long enough is not known


@pytest.mark.slow
@pytest.mark.parametrize("opset", [23, 25])
@pytest.mark.parametrize("form", FORMS)
def test_every_attention_is_what_onnx_says(form: tuple[Any, ...], opset: int, tmp_path: Path) -> None:
    check_same(*attention(*form, opset=opset), tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of ONNX, while it makes all its examples
def test_onnx_s_own_examples_of_attention(tmp_path: Path) -> None:
    """The inputs and outputs that ONNX publishes for each feature, but those in bfloat16."""
    count = 0
    for example in load_model_tests(kind="node"):  # all of them: ONNX collects its examples once only
        if all(node.op_type != "Attention" for node in example.model.graph.node):
            continue
        opset = max((o.version for o in example.model.opset_import if not o.domain), default=0)
        if not 0 < opset < 26 or "bf16" in example.name or "expanded" in example.name:
            continue
        graph = loaded(example.model, tmp_path).graph
        fold(graph)
        ((inputs, outputs),) = example.data_sets
        feed = dict(zip((value.name for value in example.model.graph.input), inputs, strict=True))
        for expected, found in zip(outputs, run(graph, feed).values(), strict=True):
            atol = 2e-3 if expected.dtype == np.float16 else 1e-5
            np.testing.assert_allclose(found, expected, rtol=5e-3, atol=atol, err_msg=example.name)
        count += 1
    assert count > 80


@pytest.mark.parametrize(
    ("attributes", "own"),
    [
        ({"scale": 0.3}, True),
        ({"softcap": 0.0, "softmax_precision": 1, "qk_matmul_output_mode": 0}, True),
        ({"softcap": 2.5}, False),
    ],
)
def test_attributes_of_attention(attributes: Mapping[str, Any], own: bool, tmp_path: Path) -> None:
    graph = check_same(*attention(3, (4, 2), "bool", True, False, True, **attributes), tmp_path)
    assert is_own(graph) == own


def test_keys_and_values_for_the_next_step_without_a_past(tmp_path: Path) -> None:
    model, feed = attention(3, (4, 2), None, True, False, True)
    model.graph.node[0].output.extend(["present_key", "present_value"])
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in ("present_key", "present_value")
    )
    assert is_own(check_same(model, feed, tmp_path))


def test_a_softmax_in_another_precision_is_left_to_onnx(tmp_path: Path) -> None:
    form = (3, (4, 4), None, False, False, False)
    model, feed = attention(*form, dtype=np.float16, softmax_precision=onnx.TensorProto.FLOAT)
    assert not is_own(check_same(model, feed, tmp_path, atol=4e-3))


def test_attention_in_half(tmp_path: Path) -> None:
    model, feed = attention(3, (4, 2), "bool", True, True, False, dtype=np.float16)
    assert is_own(check_same(model, feed, tmp_path, atol=4e-3))


def test_a_constant_mask_that_hides_no_query_costs_nothing(tmp_path: Path) -> None:
    """Only a mask that may hide all keys from a query makes TensorRT look for such rows."""
    counts = []
    for hidden in (False, True):
        model, feed = attention(4, (2, 2), "bool", False, False, False)
        mask = np.array(feed["mask"])
        mask[0, 0, 1, 0] = not hidden
        model.graph.initializer.append(onnx.numpy_helper.from_array(mask, "mask"))
        del model.graph.input[3]
        graph = check_same(model, {n: v for n, v in feed.items() if n != "mask"}, tmp_path)
        counts.append(sum(node.op == "Where" for node in graph.nodes))
    assert counts == [0, 1]


def attention_block(opset: int = 23) -> tuple[onnx.ModelProto, Mapping[str, NDArray]]:
    """A block as an exporter writes it, with the operators that TensorRT takes whole around Attention."""
    angles = np.arange(8)[:, None] / 100.0 ** (np.arange(4) / 4)
    weights: dict[str, NDArray] = {name: normal(32, 32, seed=i) / 5 for i, name in enumerate("wqkvo")}
    text = """g (float[2,8,32] x) => (float[2,8,32] y) {
        n = RMSNormalization(x, gain)
        qp = MatMul(n, q)
        kp = MatMul(n, k)
        vp = MatMul(n, v)
        qr = RotaryEmbedding<num_heads = 4>(qp, cosine, sine, ids)
        kr = RotaryEmbedding<num_heads = 4>(kp, cosine, sine, ids)
        att = Attention<q_num_heads = 4, kv_num_heads = 4, is_causal = 1>(qr, kr, vp)
        op = MatMul(att, o)
        h = Add(x, op)
        u = MatMul(h, w)
        y = Gelu(u)
    }"""
    constants = {
        "gain": np.linspace(0.5, 1.5, 32, dtype=np.float32),
        "cosine": np.cos(angles).astype(np.float32),
        "sine": np.sin(angles).astype(np.float32),
        "ids": np.tile(np.arange(8), (2, 1)),
    }
    return net(text, opset=opset, ir_version=10, **weights, **constants), {"x": normal(2, 8, 32)}


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
def test_the_products_of_attention_run_in_int8(rest: str, tmp_path: Path) -> None:
    block, _ = attention_block()
    model = loaded(block, tmp_path, opset=19)
    fold(model.graph)
    plan: Plan = place(model, input_shapes={"x": (2, 8, 32)})
    assert [n.name for n in plan.nodes if n.op == "MatMul"] == plan.int8_nodes
    assert {"att/MatMul", "att/MatMul_1"} < set(plan.int8_nodes)
    macs = {node.name: node.macs for node in plan.nodes}
    assert macs["att/MatMul"] == macs["att/MatMul_1"] == 2 * 4 * 8 * 8 * 8
    assert {"RMSNormalization", "RotaryEmbedding", "Gelu"} <= {node.op for node in model.graph.nodes}
    scales = dict.fromkeys(plan.tensors, np.float32(0.02))
    built = engine(Quantization(model.graph, plan, scales).rewritten(rest=rest), tmp_path)
    assert not coverage(plan, built.compiled).missed


def test_attention_in_a_body_is_expanded_too(tmp_path: Path) -> None:
    model = net(
        """g (float[1,2,4,8] x, bool c) => (float[1,2,4,8] y) {
            y = If(c) <
                then_branch = t () => (float[1,2,4,8] a) { a = Attention(x, x, x) },
                else_branch = e () => (float[1,2,4,8] b) { b = Relu(x) }
            >
        }""",
        opset=23,
        ir_version=10,
    )
    graph = loaded(model, tmp_path).graph
    fold(graph)
    assert "Attention" not in {n.op for body in graph.subgraphs() for n in body.nodes}
    x = normal(1, 2, 4, 8)
    feed = {"x": x, "c": np.array(True)}
    (expected,) = onnx.reference.ReferenceEvaluator(model).run(None, feed)
    np.testing.assert_allclose(run(graph, feed)["y"], expected, atol=1e-5)


OTHERS: dict[str, tuple[onnx.ModelProto, Arrays]] = {
    "affine grid": (
        net(
            """g (float[2,2,3] t, float[2,3,8,8] x) => (float[2,3,4,4] y) {
                grid = AffineGrid(t, size)
                y = GridSample(x, grid)
            }""",
            opset=20,
            size=np.array([2, 3, 4, 4]),
        ),
        {"t": normal(2, 2, 3), "x": normal(2, 3, 8, 8)},
    ),
    "crop": (
        net(
            "g (float[2,3,8,8] x) => (float[a,b,c,d] y) { y = CenterCropPad<axes = [2, 3]>(x, size) }",
            opset=18,
            size=np.array([4, 11]),
        ),
        {"x": normal(2, 3, 8, 8)},
    ),
    "loss": (
        net("g (float[2,3,8] x, int64[2,8] t) => (float l) { l = SoftmaxCrossEntropyLoss(x, t) }", opset=17),
        {"x": normal(2, 3, 8), "t": np.arange(16).reshape(2, 8) % 3},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_operators_that_tensorrt_lacks(name: str, tmp_path: Path) -> None:
    assert engine(check_same(*OTHERS[name], tmp_path), tmp_path).compiled.kernels


def test_what_depends_on_an_unknown_type_stays_whole() -> None:
    q = gs.Variable("q", np.float32)
    y = gs.Variable("y", np.float32)
    graph = gs.Graph([gs.Node("Attention", "att", {}, [q, q, q], [y])], [q], [y], opset=23)
    assert not expand_functions(graph)
    assert [node.op for node in graph.nodes] == ["Attention"]


def test_positions_are_not_quantized(tmp_path: Path) -> None:
    """A product that only says where GridSample reads stays in floating point."""
    model = loaded(
        net(
            """g (float[2,16,3] p, float[2,3,8,8] x) => (float[2,3,4,4] y) {
                f = MatMul(p, w)
                grid = Reshape(f, size)
                c = Conv(x, v)
                y = GridSample(c, grid)
            }""",
            w=normal(3, 2),
            v=normal(3, 3, 1, 1),
            size=np.array([2, 4, 4, 2]),
        ),
        tmp_path,
    )
    fold(model.graph)
    plan = place(model)
    assert plan.int8_nodes == ["c"]
    assert [node.rule for node in plan.nodes if node.name == "f"] == ["coordinates"]
