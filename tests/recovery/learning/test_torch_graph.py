"""The operators over PyTorch, against ONNX Runtime, one by one and in whole models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from numpy.typing import ArrayLike, NDArray

from trtq.errors import InputError
from trtq.graph.fold import fold
from trtq.graph.model import load_model, serialized
from trtq.simulation.session import simulation_session

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra qat)")

from trtq.recovery.learning.torch_graph import OPERATORS, TorchGraph  # noqa: E402 (needs torch)

RANDOM = np.random.default_rng(3)
NOTHING = None


def f(*shape: int) -> NDArray[np.float32]:
    return RANDOM.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> NDArray[np.float32]:
    return np.abs(f(*shape)) + np.float32(0.1)


def i(*values: Any) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def scalar(value: float, dtype: Any = np.float32) -> NDArray:
    return np.array(value, dtype)


IMAGE, SIGNAL, ROWS = f(2, 4, 7, 9), f(2, 4, 11), f(3, 5)
CUBE = f(2, 3, 4)
TRUE = np.array([[True, False, True], [False, False, True]])
OTHER = np.array([[True, True, False], [False, True, True]])
ANGLES = f(4, 4), f(4, 4)
GRU = [f(5, 2, 3), f(2, 12, 3), f(2, 12, 4), f(2, 24)]
LSTM = [f(5, 2, 3), f(2, 16, 3), f(2, 16, 4), f(2, 32)]

NEWER = {"RMSNormalization": 23, "RotaryEmbedding": 23, "Swish": 24}
"""Operators of opsets above 21."""

Case = tuple[str, list[ArrayLike | None], dict[str, Any]]

CASES: list[Case] = [
    *[(op, [IMAGE], {}) for op in ("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Identity", "Neg", "Relu")],
    *[(op, [IMAGE], {}) for op in ("Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Tanh", "HardSwish")],
    ("Mish", [IMAGE], {}),
    ("IsNaN", [np.array([[1, math.nan], [math.inf, 0]], np.float32)], {}),
    ("Swish", [IMAGE], {"alpha": 1.5}),
    *[(op, [positive(2, 5)], {}) for op in ("Log", "Reciprocal", "Sqrt")],
    *[(op, [f(2, 3, 4), f(3, 1)], {}) for op in ("Add", "Div", "Mul", "Sub", "Max", "Min", "Mean", "Sum")],
    *[(op, [f(2, 3), f(3), f(2, 1)], {}) for op in ("Max", "Min", "Mean", "Sum")],
    *[
        (op, [i(1, 2, 3), i(3, 2, 1)], {})
        for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    ],
    *[(op, [TRUE, OTHER], {}) for op in ("And", "Or", "Xor")],
    ("Not", [TRUE], {}),
    ("Round", [np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 0.4], np.float32)], {}),
    ("Div", [i(7, -7, 9), i(2, 2, -4)], {}),
    ("Pow", [positive(2, 3), f(3)], {}),
    ("Dropout", [ROWS], {}),
    ("Clip", [IMAGE, scalar(-0.5), scalar(0.7)], {}),
    ("Clip", [IMAGE, NOTHING, scalar(0.7)], {}),
    ("Clip", [i(1, 5, 9), scalar(2, np.int64)], {}),
    ("Elu", [IMAGE], {"alpha": 0.7}),
    ("Gelu", [IMAGE], {}),
    ("Gelu", [IMAGE], {"approximate": "tanh"}),
    ("HardSigmoid", [IMAGE], {"alpha": 0.3, "beta": 0.4}),
    ("LeakyRelu", [IMAGE], {}),
    ("PRelu", [IMAGE, positive(4, 1, 1)], {}),
    ("Softmax", [CUBE], {"axis": 1}),
    ("LogSoftmax", [CUBE], {}),
    ("Cast", [ROWS * 10], {"to": onnx.TensorProto.INT64}),
    ("Cast", [i(0, 2)], {"to": onnx.TensorProto.BOOL}),
    ("CastLike", [i(1, 2), ROWS], {}),
    ("Where", [TRUE, f(2, 3), f(3)], {}),
    # linear
    ("Conv", [IMAGE, f(6, 4, 3, 3), f(6)], {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
    ("Conv", [IMAGE, f(6, 2, 3, 2)], {"pads": [0, 1, 2, 0], "group": 2, "dilations": [1, 2]}),
    ("Conv", [IMAGE, f(4, 1, 3, 3)], {"auto_pad": "SAME_UPPER", "strides": [2, 2], "group": 4}),
    ("Conv", [IMAGE, f(4, 4, 2, 2)], {"auto_pad": "SAME_LOWER"}),
    ("Conv", [SIGNAL, f(5, 4, 3), f(5)], {"pads": [2, 0]}),
    ("Conv", [f(1, 2, 4, 5, 6), f(3, 2, 2, 2, 2)], {}),
    ("ConvTranspose", [IMAGE, f(4, 3, 3, 3), f(6)], {"strides": [2, 2], "group": 2, "pads": [1, 1, 1, 1]}),
    ("ConvTranspose", [IMAGE, f(4, 3, 3, 3), f(3)], {"strides": [2, 2], "output_padding": [1, 1]}),
    ("ConvTranspose", [SIGNAL, f(4, 2, 4)], {"strides": [2], "pads": [1, 0]}),
    ("Gemm", [f(3, 4), f(4, 5), f(5)], {}),
    ("Gemm", [f(4, 3), f(5, 4), f(3, 5)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("MatMul", [f(2, 3, 4), f(4, 5)], {}),
    ("Einsum", [f(2, 3, 4), f(2, 5, 4)], {"equation": "bik,bjk->bij"}),
    # windows
    ("AveragePool", [IMAGE], {"kernel_shape": [2, 3], "strides": [2, 2]}),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "pads": [1, 0, 1, 1]}),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "pads": [1, 0, 1, 1], "count_include_pad": 1}),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 3], "ceil_mode": 1}),
    ("AveragePool", [SIGNAL], {"kernel_shape": [3], "auto_pad": "SAME_UPPER", "strides": [2]}),
    ("GlobalAveragePool", [IMAGE], {}),
    ("GlobalMaxPool", [IMAGE], {}),
    ("MaxPool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 0, 1]}),
    ("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    ("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "dilations": [2, 1], "pads": [0, 1, 0, 1]}),
    ("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "auto_pad": "SAME_LOWER"}),
    ("MaxPool", [SIGNAL], {"kernel_shape": [3], "strides": [2]}),
    # normalization and sums
    ("LayerNormalization", [CUBE, f(4), f(4)], {"epsilon": 1e-3}),
    ("LayerNormalization", [CUBE, f(3, 4)], {"axis": 1}),
    ("BatchNormalization", [IMAGE, f(4), f(4), f(4), positive(4)], {}),
    ("InstanceNormalization", [IMAGE, f(4), f(4)], {}),
    ("GroupNormalization", [IMAGE, f(4), f(4)], {"num_groups": 2}),
    ("RMSNormalization", [CUBE, f(4)], {"epsilon": 1e-3}),
    ("RMSNormalization", [CUBE, f(3, 4)], {"axis": 1}),
    ("RotaryEmbedding", [f(2, 3, 16), *ANGLES, i([0, 1, 2], [3, 1, 0])], {"num_heads": 2}),
    ("RotaryEmbedding", [f(2, 2, 3, 12), *ANGLES, i([0, 1, 2], [3, 1, 0])], {"rotary_embedding_dim": 8}),
    ("RotaryEmbedding", [f(2, 2, 3, 8), f(2, 3, 4), f(2, 3, 4)], {"interleaved": 1}),
    *[(op, [CUBE, i(0, 2)], {"keepdims": 0}) for op in ("ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum")],
    *[(op, [CUBE, i(-1)], {}) for op in ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceMean")],
    ("ReduceSum", [CUBE], {}),
    ("ReduceSum", [CUBE], {"noop_with_empty_axes": 1}),
    ("ArgMax", [CUBE], {"axis": 1, "keepdims": 0}),
    ("CumSum", [CUBE, scalar(1, np.int64)], {}),
    ("CumSum", [CUBE, scalar(2, np.int64)], {"exclusive": 1, "reverse": 1}),
    # shapes and indices
    ("Shape", [CUBE], {}),
    ("Shape", [CUBE], {"start": 1, "end": -1}),
    ("Size", [CUBE], {}),
    ("ConstantOfShape", [i(2, 3)], {"value": onnx.helper.make_tensor("v", onnx.TensorProto.INT64, [1], [7])}),
    ("ConstantOfShape", [i(2)], {}),
    ("Range", [scalar(1, np.int64), scalar(9, np.int64), scalar(3, np.int64)], {}),
    ("Reshape", [CUBE, i(0, -1)], {}),
    ("Flatten", [CUBE], {"axis": 2}),
    ("Flatten", [CUBE], {"axis": -1}),
    ("Transpose", [CUBE], {"perm": [2, 0, 1]}),
    ("Transpose", [CUBE], {}),
    ("Unsqueeze", [CUBE, i(0, -1)], {}),
    ("Squeeze", [f(1, 3, 1), i(-1)], {}),
    ("Squeeze", [f(1, 3, 1)], {}),
    ("Concat", [f(2, 3), f(2, 1)], {"axis": 1}),
    ("Split", [CUBE, i(1, 3)], {"axis": 2}),
    ("Split", [f(7, 2)], {"num_outputs": 3}),
    ("Slice", [CUBE, i(1, -3), i(2**62, -1), i(0, 2)], {}),
    ("Slice", [CUBE, i(-1), i(-(2**62)), i(2), i(-2)], {}),
    ("Slice", [CUBE, i(0, 0), i(2, 2)], {}),
    ("Gather", [CUBE, i([0, -1], [1, 2])], {"axis": 1}),
    ("Gather", [CUBE, scalar(-1, np.int64)], {"axis": -1}),
    ("GatherElements", [ROWS, i([0, -1], [4, 2])], {"axis": 1}),
    ("GatherND", [CUBE, i([0, 1], [-1, 2])], {}),
    ("Expand", [f(3, 1), i(2, 1, 4)], {}),
    ("Tile", [ROWS, i(2, 1)], {}),
    ("Pad", [CUBE, i(0, 1, 2, 1, 0, 0), scalar(0.5)], {}),
    ("Pad", [CUBE, i(1, 2), NOTHING, i(-1)], {}),
    *[("Pad", [CUBE, i(0, 1, 2, 0, 2, 1)], {"mode": mode}) for mode in ("edge", "reflect")],
    ("Pad", [CUBE, i(0, 1, 2, 0, 2, 1)], {"mode": "wrap"}),
    ("DepthToSpace", [f(2, 8, 2, 3)], {"blocksize": 2}),
    ("DepthToSpace", [f(2, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", [f(2, 2, 4, 6)], {"blocksize": 2}),
    ("Trilu", [CUBE, scalar(1, np.int64)], {"upper": 0}),
    ("Trilu", [CUBE], {}),
    *[
        ("Resize", [IMAGE, NOTHING, np.array([1, 1, *factors], np.float32)], {"mode": mode, **coordinates})
        for mode in ("nearest", "linear")
        for factors in ([2, 2], [1.5, 0.7])
        for coordinates in (
            {},
            {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
            {"coordinate_transformation_mode": "align_corners", "nearest_mode": "round_prefer_ceil"},
            {"coordinate_transformation_mode": "pytorch_half_pixel", "nearest_mode": "ceil"},
        )
    ],
    ("Resize", [IMAGE, NOTHING, NOTHING, i(2, 4, 14, 5)], {"mode": "linear"}),
    # recurrent
    ("LSTM", LSTM, {"hidden_size": 4, "direction": "bidirectional"}),
    ("LSTM", [LSTM[0], *(t[:1] for t in LSTM[1:]), NOTHING, f(1, 2, 4), f(1, 2, 4)], {"hidden_size": 4}),
    ("GRU", GRU, {"hidden_size": 4, "direction": "bidirectional", "linear_before_reset": 1}),
    ("GRU", [GRU[0], *(t[:1] for t in GRU[1:3])], {"hidden_size": 4, "direction": "reverse"}),
]


def named(case: Case) -> str:
    op, inputs, attributes = case
    shapes = "x".join("none" if t is None else str(list(np.shape(t))) for t in inputs)
    return f"{op}-{shapes}-{'-'.join(f'{k}={v}' for k, v in attributes.items() if k != 'value')}"


def one_node(case: Case, opset: int = 21) -> tuple[onnx.ModelProto, dict[str, NDArray]]:
    """A model of one node whose float inputs of more than one value are the model's, and their values."""
    op, inputs, attributes = case
    names = ["" if value is None else f"in{k}" for k, value in enumerate(inputs)]
    arrays = {name: np.asarray(value) for name, value in zip(names, inputs, strict=True) if name}
    count = {"Split": 3, "LSTM": 3, "GRU": 2}.get(op, 1)
    outputs = [f"out{k}" for k in range(2 if op == "Split" and len(inputs) == 2 else count)]
    fed = {name for name, value in arrays.items() if value.ndim and value.dtype.kind == "f"} or {names[0]}
    constant = op == "Resize"
    fed = {"in0"} if constant else fed
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, names, outputs, "node", **attributes)],
        "g",
        [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(arrays[name].dtype), arrays[name].shape
            )
            for name in arrays
            if name in fed
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in arrays.items() if name not in fed],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    return model, {name: arrays[name] for name in fed}


def run(graph: gs.Graph, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
    with torch.no_grad():
        outputs = TorchGraph(graph)({name: torch.from_numpy(values) for name, values in feeds.items()})
    return {name: value.numpy() for name, value in outputs.items()}


@pytest.mark.parametrize("case", CASES, ids=named)
def test_operator_as_in_onnx_runtime(case: Case) -> None:
    model, feeds = one_node(case, NEWER.get(case[0], 21))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    expected = dict(zip(names, session.run(names, feeds), strict=True))

    found = run(gs.import_onnx(model), feeds)

    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == value.dtype
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5)


def test_every_operator_is_tested() -> None:
    assert OPERATORS.keys() - {op for op, _, _ in CASES} <= {"Constant", "Upsample"}


def test_axes_as_attributes_before_opset_18() -> None:
    model, feeds = one_node(("ReduceMean", [CUBE], {"axes": [0, 2], "keepdims": 0}), opset=13)
    np.testing.assert_allclose(
        run(gs.import_onnx(model), feeds)["out0"], CUBE.mean(axis=(0, 2)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (("Det", [f(3, 3)], {}), r"'node' \(Det\)"),
        (("Resize", [IMAGE, None, np.array([1, 1, 2, 2], np.float32)], {"mode": "cubic"}), "cubic"),
    ],
)
def test_what_cannot_be_run_is_named(case: Case, message: str) -> None:
    model, feeds = one_node(case)
    with pytest.raises(InputError, match=message):
        run(gs.import_onnx(model), feeds)


def test_gradients_reach_the_inputs_of_a_convolution() -> None:
    """d sum(y) / d bias of a Conv is the number of positions."""
    model, feeds = one_node(("Conv", [IMAGE, f(6, 4, 3, 3), f(6)], {"pads": [1, 1, 1, 1]}))
    graph = gs.import_onnx(model)
    bias = graph.tensors()["in2"]
    graph.inputs.remove(bias)
    bias.to_constant(feeds.pop("in2"))
    module = TorchGraph(graph)
    parameter = module.make_trainable("in2")

    module({name: torch.from_numpy(values) for name, values in feeds.items()})["out0"].sum().backward()

    assert [parameter] == list(module.parameters())
    np.testing.assert_allclose(parameter.grad.numpy(), np.full(6, 2 * 7 * 9), rtol=1e-6)


def _batch(shape: list[Any]) -> list[int]:
    return [d if isinstance(d, int) else {"batch": 2, "N": 2, "length": 48}.get(d, 32) for d in shape]


FAMILIES = sorted((Path(__file__).parents[2] / "families").glob("*.onnx"))


def assert_runs_alike(file: Path, tolerance: float) -> None:
    model = load_model(file)
    fold(model.graph)
    feeds = {
        spec.name: RANDOM.integers(1, 10, _batch(list(spec.shape))).astype(spec.dtype)
        if spec.dtype.kind in "iu"
        else f(*_batch(list(spec.shape)))
        for spec in model.inputs
    }
    feeds = {name: np.ones_like(value) if "mask" in name else value for name, value in feeds.items()}
    with serialized(model.graph) as source:
        session = simulation_session(source, 1)
    names = [output.name for output in session.get_outputs()]
    expected = dict(zip(names, session.run(names, feeds), strict=True))
    found = run(model.graph, feeds)
    for name, value in expected.items():
        assert math.isfinite(float(np.abs(value).max()))
        np.testing.assert_allclose(found[name], value, atol=tolerance * float(np.abs(value).max()))


@pytest.mark.parametrize("file", FAMILIES, ids=[file.stem for file in FAMILIES])
def test_families(file: Path) -> None:
    assert_runs_alike(file, 1e-5)


@pytest.mark.parametrize("name", ["resnet20_cifar10", "efficientnet_lite0", "minilm_l6"])
def test_trained_models(zoo: Path, name: str) -> None:
    assert_runs_alike(zoo / "models" / f"{name}.onnx", 1e-5)


def test_bfloat16_between_casts() -> None:
    """A block in bfloat16, its weights too, rounds as PyTorch rounds it."""
    bfloat16 = onnx.TensorProto.BFLOAT16
    weight = onnx.helper.make_tensor("w", bfloat16, [5, 4], f(20).tolist())
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["b"], "enter", to=bfloat16),
        onnx.helper.make_node("MatMul", ["b", "w"], ["m"], "product"),
        onnx.helper.make_node("Cast", ["m"], ["y"], "leave", to=onnx.TensorProto.FLOAT),
    ]
    x, y = (
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s)
        for n, s in (("x", [3, 5]), ("y", [3, 4]))
    )
    graph = gs.import_onnx(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y], [weight])))
    values = torch.tensor(onnx.numpy_helper.to_array(weight).astype(np.float32)).bfloat16()
    expected = (torch.tensor(ROWS).bfloat16() @ values).float().numpy()
    np.testing.assert_array_equal(run(graph, {"x": ROWS})["y"], expected)
