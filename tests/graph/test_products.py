"""The table of products: complete against ONNX's own schemas, and its counts against bodies and by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
import pytest
from nets import graph_of, net, normal
from onnx import TensorProto, helper

from trtq.graph.products import PRODUCTS, is_quantizer, macs, product, quantizers
from trtq.graph.shapes import concrete_shapes

NO_PRODUCTS = """
    Abs Acos Acosh Adagrad Adam Add And ArgMax ArgMin ArrayFeatureExtractor Asin Asinh Atan Atanh
    AveragePool BatchNormalization Bernoulli Binarizer BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr
    BitwiseXor BlackmanWindow Cast CastLike CastMap CategoryMapper Ceil Celu CenterCropPad Clip Col2Im
    Compress Concat ConcatFromSequence Constant ConstantOfShape Cos Cosh CumProd CumSum DepthToSpace
    DequantizeLinear Det DictVectorizer Div Dropout DynamicQuantizeLinear Elu Equal Erf Exp Expand
    EyeLike FeatureVectorizer Flatten Floor Gather GatherElements GatherND Gelu GlobalAveragePool
    GlobalLpPool GlobalMaxPool Gradient Greater GreaterOrEqual GridSample GroupNormalization
    HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If ImageDecoder Imputer
    InstanceNormalization IsInf IsNaN LRN LabelEncoder LayerNormalization LeakyRelu Less LessOrEqual Log
    LogSoftmax Loop LpNormalization LpPool Max MaxPool MaxRoiPool MaxUnpool Mean
    MeanVarianceNormalization MelWeightMatrix Min Mish Mod Momentum Mul Multinomial Neg
    NegativeLogLikelihoodLoss NonMaxSuppression NonZero Normalizer Not OneHot OneHotEncoder Optional
    OptionalGetElement OptionalHasElement Or PRelu Pad Pow QuantizeLinear RMSNormalization RandomNormal
    RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare RegexFullMatch
    Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding Round Scaler Scan Scatter
    ScatterElements ScatterND Selu SequenceAt SequenceConstruct SequenceEmpty SequenceErase
    SequenceInsert SequenceLength SequenceMap Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
    SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth Split SplitToSequence Sqrt Squeeze
    StringConcat StringNormalizer StringSplit Sub Sum SwiGLU Swish Tan Tanh TensorScatter
    TfIdfVectorizer ThresholdedRelu Tile TopK Transpose TreeEnsemble TreeEnsembleClassifier
    TreeEnsembleRegressor Trilu Unique Unsqueeze Upsample Where Xor ZipMap
"""
"""Operators of ONNX that do not sum up products of two tensors: they move, compare, reduce, normalize,
interpolate, or work element by element."""

SCHEMAS = onnx.defs.get_all_schemas_with_history()


def test_every_operator_of_onnx_is_classified() -> None:
    """A new version of ONNX brings new operators: put each into the table, or into `NO_PRODUCTS`."""
    names = {schema.name for schema in SCHEMAS}
    assert names - PRODUCTS.keys() - set(NO_PRODUCTS.split()) == set()
    assert PRODUCTS.keys() & set(NO_PRODUCTS.split()) == set()


def operators(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """The operators of a body, and of the bodies in it."""
    found = set()
    for node in nodes:
        found.add(node.op_type)
        for attribute in node.attribute:
            found |= operators(attribute.g.node)
    return found


@pytest.mark.parametrize("schema", [s for s in SCHEMAS if s.has_function], ids=lambda s: s.name)
def test_an_operator_made_of_products_is_one(schema: Any) -> None:
    inside = operators(schema.function_body.node)
    assert (schema.name in PRODUCTS) == bool(inside & PRODUCTS.keys())


# -- operators that ONNX writes out as others


def one_node(op: str, inputs: dict[str, tuple[int, ...]], opset: int, **attributes: Any) -> onnx.ModelProto:
    """A model of one node, n; with a past (`pk`), it gives the present as well."""
    outputs = ["y", "present_key", "present_value"] if "pk" in inputs else ["y"]
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    result = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    node = helper.make_node(op, list(inputs), outputs, "n", **attributes)
    graph = helper.make_graph([node], "g", given, result)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


def counted(model: onnx.ModelProto) -> int | None:
    """Multiply-accumulates of the node called n."""
    graph = graph_of(model)
    return macs(next(node for node in graph.nodes if node.name == "n"), concrete_shapes(graph, {}))


def written_out(model: onnx.ModelProto, op: str) -> int:
    """Multiply-accumulates of the MatMuls in ONNX's own definition of an operator."""
    body = graph_of(onnx.inliner.inline_selected_functions(model, [("", op)], inline_schema_functions=True))
    shapes = concrete_shapes(body, {})
    products = [macs(node, shapes) for node in body.nodes if node.op == "MatMul"]
    assert products
    return sum(count for count in products if count is not None)


PAST = {"mask": (5, 10), "pk": (2, 4, 3, 8), "pv": (2, 4, 3, 6)}
HEADS = {"q_num_heads": 4, "kv_num_heads": 4}


@pytest.mark.parametrize(
    ("inputs", "attributes", "expected"),
    [
        # (rows, heads, queries, size) x (rows, heads, keys, size): 2 * 4 * 5 * 7 * 8, then values of size 6
        ({"q": (2, 4, 5, 8), "k": (2, 4, 7, 8), "v": (2, 4, 7, 6)}, {}, 2 * 4 * 5 * 7 * (8 + 6)),
        ({"q": (2, 5, 32), "k": (2, 7, 32), "v": (2, 7, 24)}, HEADS, 2 * 4 * 5 * 7 * (8 + 6)),
        ({"q": (1, 32, 64), "k": (1, 32, 64), "v": (1, 32, 64)}, HEADS, 4 * 32 * 32 * (16 + 16)),
        # four heads of queries share two heads of keys and values
        (
            {"q": (2, 5, 32), "k": (2, 7, 16), "v": (2, 7, 12)},
            {"q_num_heads": 4, "kv_num_heads": 2},
            2 * 4 * 5 * 7 * (8 + 6),
        ),
        ({"q": (2, 4, 5, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 6)}, {}, 2 * 4 * 5 * 7 * (8 + 6)),
        # three keys of the past: ten in all
        ({"q": (2, 4, 5, 8), "k": (2, 4, 7, 8), "v": (2, 4, 7, 6)} | PAST, {}, 2 * 4 * 5 * 10 * (8 + 6)),
        ({"q": (2, 5, 32), "k": (2, 7, 32), "v": (2, 7, 24)} | PAST, HEADS, 2 * 4 * 5 * 10 * (8 + 6)),
        ({"q": (1, 4, 1, 8), "k": (1, 4, 9, 8), "v": (1, 4, 9, 8)}, {"is_causal": 1}, 4 * 9 * 16),
    ],
    ids=["4-D", "3-D", "self", "grouped 3-D", "grouped 4-D", "past 4-D", "past 3-D", "one query"],
)
@pytest.mark.parametrize("opset", [23, 24])
def test_macs_of_attention(
    inputs: dict[str, tuple[int, ...]], attributes: dict[str, int], expected: int, opset: int
) -> None:
    model = one_node("Attention", inputs, opset, **attributes)
    assert counted(model) == expected
    assert written_out(model, "Attention") == expected


@pytest.mark.parametrize(("size", "points"), [((2, 3, 5, 7), 5 * 7), ((2, 3, 4, 5, 7), 4 * 5 * 7)])
def test_macs_of_affine_grid(size: tuple[int, ...], points: int) -> None:
    """Each of the axes' coordinates at each point is a row of theta, (axes) x (axes + 1)."""
    axes = len(size) - 2
    text = f"g (float[2,{axes},{axes + 1}] t) => (float y) {{ n = AffineGrid(t, size) y = Identity(n) }}"
    graph = graph_of(net(text, opset=20, size=np.int64(size)))
    node = next(n for n in graph.nodes if n.op == "AffineGrid")
    assert macs(node, concrete_shapes(graph, {})) == 2 * points * axes * (axes + 1)


# -- by hand


def test_macs_of_a_causal_convolution() -> None:
    """(2 rows, 6 channels, 9 positions), each a sum over 4 taps of its own channel."""
    tensors = [gs.Variable("x"), gs.Variable("w")]
    node = gs.Node("CausalConvWithState", inputs=tensors, outputs=[gs.Variable("y")])
    assert macs(node, {"x": (2, 6, 9), "w": (6, 1, 4), "y": (2, 6, 9)}) == 2 * 6 * 9 * 4


@pytest.mark.parametrize(("rule", "passes"), [("linear", 1), ("gated", 1), ("delta", 2), ("gated_delta", 2)])
def test_macs_of_linear_attention(rule: str, passes: int) -> None:
    """2 rows, 5 steps; 4 heads of queries of size 3 read states of 3 x 7, which 2 heads of keys write."""
    tensors = [gs.Variable(name) for name in ("q", "k", "v")]
    attributes = {"update_rule": rule, "q_num_heads": 4, "kv_num_heads": 2}
    node = gs.Node("LinearAttention", attrs=attributes, inputs=tensors, outputs=[gs.Variable("y")])
    shapes = {"q": (2, 5, 4 * 3), "k": (2, 5, 2 * 3), "v": (2, 5, 2 * 7)}
    assert macs(node, shapes) == 2 * 5 * (4 * 3 * 7 + passes * 2 * 3 * 7)


@pytest.mark.parametrize("group", [1, 2])
def test_macs_of_a_deformable_convolution(group: int) -> None:
    """As of a convolution: 16 channels of 6 x 6 values, each a sum over 6 / group channels of 3 x 3."""
    text = f"""g (float[2,6,8,8] x, float[2,18,6,6] o) => (float[?,?,?,?] y) {{
        y = DeformConv<kernel_shape = [3,3], group = {group}>(x, w, o)
    }}"""
    graph = graph_of(net(text, opset=19, w=normal(16, 6 // group, 3, 3)))
    expected = 2 * 16 * 6 * 6 * (6 // group) * 9
    assert macs(graph.nodes[0], concrete_shapes(graph, {})) == expected


INTEGERS = {
    "z": np.uint8(128),
    "s": np.float32(0.1),
    "k": np.ones((4, 3, 3, 3), np.int8),
    "m": np.ones((5, 7), np.int8),
    "wz": np.int8(0),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("g (uint8[2,3,8,8] x) => (int32[?,?,?,?] y) { y = ConvInteger(x, k, z) }", 2 * 4 * 36 * 27),
        (
            "g (uint8[2,3,8,8] x) => (uint8[?,?,?,?] y)"
            " { y = QLinearConv<strides = [2,2]>(x, s, z, k, s, wz, s, z) }",
            2 * 4 * 9 * 27,
        ),
        ("g (uint8[2,6,5] x) => (int32[?,?,?] y) { y = MatMulInteger(x, m, z) }", 2 * 6 * 5 * 7),
        ("g (uint8[6,5] x) => (uint8[?,?] y) { y = QLinearMatMul(x, s, z, m, s, wz, s, z) }", 6 * 5 * 7),
    ],
    ids=["ConvInteger", "QLinearConv", "MatMulInteger", "QLinearMatMul"],
)
def test_macs_of_integer_operators(text: str, expected: int) -> None:
    graph = graph_of(net(text, **{name: values for name, values in INTEGERS.items() if f" {name}" in text}))
    assert macs(graph.nodes[0], concrete_shapes(graph, {})) == expected


def test_macs_of_a_linear_regressor() -> None:
    """6 rows of 4 features into 3 targets."""
    node = gs.Node("LinearRegressor", attrs={"coefficients": [0.5] * 12}, inputs=[gs.Variable("x")])
    node.domain = "ai.onnx.ml"
    assert macs(node, {"x": (6, 4)}) == 6 * 4 * 3


# -- other domains


def of_domain(op: str, domain: str) -> gs.Node:
    node = gs.Node(op)
    node.domain = domain
    return node


@pytest.mark.parametrize(
    "op",
    [
        "Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention",
        "DecoderMaskedSelfAttention",
        "FusedConv", "NhwcConv", "FusedMatMul", "FusedGemm", "GemmFastGelu", "TransposeMatMul", "MoE", "QMoE",
        "MatMulNBits", "DynamicQuantizeLSTM", "AttnLSTM", "GatedDeltaNet", "Rfft", "SparseToDenseMatMul",
        "CustomQKVToContextPluginDynamic", "DCNv2", "ModulatedDeformConv2d",
        "MultiscaleDeformableAttnPlugin_TRT",
    ],
)  # fmt: skip
def test_products_of_other_domains_are_known_by_name_alone(op: str) -> None:
    """They count, but how much work they are is not known."""
    found = product(of_domain(op, "com.microsoft"))
    assert found is not None
    assert found.float_reason
    assert macs(of_domain(op, "com.microsoft"), {}) is None


@pytest.mark.parametrize(
    "op",
    [
        "Gelu",
        "SkipLayerNormalization",
        "EfficientNMS_TRT",
        "ROIAlign",
        "ConvertColor",
        "BiasSoftmax",
        "Trilu",
    ],
)
def test_other_operators_of_other_domains_do_not_count(op: str) -> None:
    assert product(of_domain(op, "com.microsoft")) is None


# -- models that are quantized already


def test_the_operators_of_onnx_that_quantize() -> None:
    assert {schema.name for schema in SCHEMAS if is_quantizer(schema.name)} == {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "QLinearMatMul",
        "QLinearConv",
    }


@pytest.mark.parametrize(
    "op",
    [
        "QLinearAdd", "QLinearSigmoid", "QAttention", "QGemm", "QMoE", "QOrderedMatMul",
        "QEmbedLayerNormalization",
        "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM",
        "MatMulIntegerToFloat", "MulInteger", "ReduceSumInteger", "GatherBlockQuantized", "QuantizeWithOrder",
        "DequantizeBFP", "GemmFloat8", "TRT_FP8QuantizeLinear", "TRT_INT4DequantizeLinear", "TRT_FP4QDQ",
        "FakeQuantize", "Quant", "BipolarQuant",
    ],
)  # fmt: skip
def test_other_tools_operators_that_quantize(op: str) -> None:
    assert is_quantizer(op)


@pytest.mark.parametrize(
    "op", ["QuickGelu", "Quantile", "CustomQKVToContextPluginDynamic", "Attention", "Equal"]
)
def test_names_that_only_look_alike(op: str) -> None:
    assert not is_quantizer(op)


def test_what_quantizes_is_found_in_bodies_of_bodies() -> None:
    model = net(
        """g (float[N,4] x, bool c) => (float[N,4] y) {
            y = If(c) <
                then_branch = one () => (float[N,4] a) { a = Relu(x) },
                else_branch = two () => (float[N,4] b) {
                    b = If(c) <then_branch = three () => (float[N,4] d) {
                                   q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) },
                               else_branch = four () => (float[N,4] e) { e = Relu(x) }>
                }
            >
        }""",
        s=np.float32(0.1),
        z=np.int8(0),
    )
    assert quantizers(graph_of(model)) == ("DequantizeLinear", "QuantizeLinear")
