"""float16 and bfloat16 are simulated for what they are: against NumPy step by step, and onnx.reference."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import onnx.reference
import pytest
from family import FAMILIES, data_for, folded, quantized
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trtq.graph.half import convert_to_half
from trtq.graph.model import export
from trtq.simulation.narrow import holds_narrow, in_float32
from trtq.simulation.session import simulation_session

ACCURATE_DB = 55.0
"""What two orders of the same sums differ by is less than this."""

WHOLE_DB = 50.0
"""The same at the end of a deep network, where roundings add up."""


def simulated(model: onnx.ModelProto, **feed: NDArray) -> list[NDArray]:
    found: list[NDArray] = simulation_session(model.SerializeToString(), threads=1).run(None, feed)
    return found


def referenced(model: onnx.ModelProto, **feed: NDArray) -> list[NDArray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow is what is looked at
        found: list[NDArray] = onnx.reference.ReferenceEvaluator(model).run(None, feed)
    return found


def distance_db(reference: NDArray, candidate: NDArray) -> float:
    """SQNR where both are finite; they must be finite at the same places."""
    finite = np.isfinite(reference)
    np.testing.assert_array_equal(np.isfinite(candidate), finite)
    r, c = (x[finite].astype(np.float64) for x in (reference, candidate))
    noise = ((r - c) ** 2).sum()
    return float(10 * np.log10((r**2).sum() / noise)) if noise else np.inf


def model_of(
    nodes: list[onnx.NodeProto],
    constants: dict[str, NDArray] | None = None,
    *,
    kind: int = TensorProto.FLOAT16,
    shape: tuple[int | None, ...] = (None,),
    opset: int = 19,
) -> onnx.ModelProto:
    """Nodes from input x to output y, both of one element type."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def test_every_step_rounds_as_numpys_float16_does() -> None:
    x = np.float16([1.0, 3e-5, 7e-8, 255.9, 300.0, -0.1, 65504.0])
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("Add", ["square", "third"], ["sum"]),
        helper.make_node("Sqrt", ["sum"], ["root"]),
        helper.make_node("Sub", ["root", "x"], ["y"]),
    ]
    (found,) = simulated(model_of(nodes, {"third": np.float16(1 / 3)}), x=x)
    with np.errstate(over="ignore"):
        expected = np.sqrt(x * x + np.float16(1 / 3)) - x
    assert found.dtype == np.float16
    assert np.isinf(found[4])  # 300 squared is beyond 65504
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("up", "down"), [(1e5, 1e-5), (1e-7, 1e7)])
def test_a_detour_over_what_float16_cannot_hold_shows(up: float, down: float) -> None:
    """In float32 both chains give x back; in float16 the first is infinite, the second loses most bits."""
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["up"], ["up16"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["down"], ["down16"], to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["half", "up16"], ["far"]),
        helper.make_node("Mul", ["far", "down16"], ["back"]),
        helper.make_node("Cast", ["back"], ["y"], to=TensorProto.FLOAT),
    ]
    model = model_of(nodes, {"up": np.float32(up), "down": np.float32(down)}, kind=TensorProto.FLOAT)
    x = np.linspace(0.5, 2, 50, dtype=np.float32)
    (found,), (expected,) = simulated(model, x=x), referenced(model, x=x)
    np.testing.assert_array_equal(found, expected)
    assert not np.allclose(found, x, rtol=0.01)


def test_what_only_moves_or_chooses_values_is_not_rounded_twice() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Concat", ["r", "x"], ["c"], axis=0),
        helper.make_node("Max", ["c", "c"], ["y"]),
    ]
    wide = in_float32(model_of(nodes))
    assert [node.op_type for node in wide.graph.node] == ["Cast", "Relu", "Concat", "Max", "Cast"]


@pytest.mark.parametrize(("reduction", "expected"), [("add", np.inf), ("mul", np.inf), ("max", 25000)])
@pytest.mark.parametrize("op", ["ScatterElements", "ScatterND"])
def test_a_scatter_that_computes_overflows(op: str, reduction: str, expected: float) -> None:
    """50000 + 20000 and 50000 * 20000 are beyond float16, half of the sum is not."""
    indices = np.array([0, 1]) if op == "ScatterElements" else np.array([[0], [1]])
    nodes = [
        helper.make_node(op, ["x", "indices", "updates"], ["all"], reduction=reduction),
        helper.make_node("Mul", ["all", "half"], ["y"]),
    ]
    constants = {"indices": indices, "updates": np.float16([20000, 3]), "half": np.float16(0.5)}
    (found,) = simulated(model_of(nodes, constants), x=np.float16([50000, 0.5]))
    assert found[0] == expected
    assert np.isfinite(found[1])


def test_bfloat16_runs_and_rounds() -> None:
    """ONNX Runtime itself has no bfloat16 product on the CPU."""
    weight = np.random.default_rng(0).normal(size=(8, 4)).astype(bfloat16)
    nodes = [
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["b", "w"], ["p"]),
        helper.make_node("Cast", ["p"], ["y"], to=TensorProto.FLOAT),
    ]
    model = model_of(nodes, kind=TensorProto.FLOAT, shape=(None, 8))
    model.graph.initializer.append(
        helper.make_tensor("w", TensorProto.BFLOAT16, weight.shape, weight.tobytes(), raw=True)
    )
    x = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    (found,) = simulated(model, x=x)
    exact = x.astype(bfloat16).astype(np.float64) @ weight.astype(np.float64)
    np.testing.assert_allclose(found, exact, rtol=2**-8)
    np.testing.assert_array_equal(found, found.astype(bfloat16).astype(np.float32))


def test_bodies_of_control_flow_round_too() -> None:
    def branch(name: str, factor: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT16, None)
        return helper.make_graph([helper.make_node("Mul", ["x", factor], [name])], name, [], [value])

    nodes = [
        helper.make_node("If", ["c"], ["i"], then_branch=branch("t", "big"), else_branch=branch("e", "x")),
        helper.make_node("Mul", ["i", "small"], ["y"]),
    ]
    constants = {"c": np.array(True), "big": np.float16(1000), "small": np.float16(0.001)}
    model = model_of(nodes, constants)
    x = np.float16([1.3, 70.0])
    (found,) = simulated(model, x=x)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found, x * np.float16(1000) * np.float16(0.001))
    assert np.isinf(found[1])


def test_a_product_between_q_dq_reads_integers() -> None:
    """127 x 600 is beyond float16, but the engine sums up integers and never writes what is dequantized."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "t", "z"], ["v"]),
        helper.make_node("MatMul", ["d", "v"], ["y"]),
    ]
    constants = {
        "s": np.float16(600),
        "z": np.int8(0),
        "w": np.eye(2, dtype=np.int8),
        "t": np.float16(2**-4),
    }
    x = np.float16([[65504, 600]])
    (found,) = simulated(model_of(nodes, constants, shape=(None, 2)), x=x)
    np.testing.assert_array_equal(found, np.float16([[109 * 600 / 16, 600 / 16]]))
    nodes[3:] = [
        helper.make_node(
            "Transpose", ["v"], ["vt"], perm=[1, 0]
        ),  # as quantization-aware training exports it
        helper.make_node("MatMul", ["d", "vt"], ["y"]),
    ]
    (found,) = simulated(model_of(nodes, constants, shape=(None, 2)), x=x)
    np.testing.assert_array_equal(found, np.float16([[109 * 600 / 16, 600 / 16]]))
    nodes[3:] = [helper.make_node("Add", ["d", "d"], ["y"])]
    (found,) = simulated(model_of(nodes, constants, shape=(None, 2)), x=x)
    assert np.isinf(found[0, 0])


def test_a_model_without_narrow_types_is_left_alone() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], kind=TensorProto.FLOAT)
    assert not holds_narrow(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_as_onnx_reference_has_them(name: str) -> None:
    model = folded(name)
    feed = next(iter(data_for(model.inputs).batches(1))).feed
    half = export(convert_to_half(model.graph))
    for expected, found in zip(referenced(half, **feed), simulated(half, **feed), strict=True):
        assert distance_db(expected, found) > WHOLE_DB


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_each_node_is_as_onnx_reference_has_it(name: str) -> None:
    """With Q/DQ a flipped code changes all that follows: each node alone, on the reference's values."""
    model = folded(name)
    samples = data_for(model.inputs)
    feed = next(iter(samples.batches(1))).feed
    proto = onnx.shape_inference.infer_shapes(export(quantized(model, samples).rewritten(rest="fp16")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = onnx.reference.ReferenceEvaluator(proto)
        names = [output for node in proto.graph.node for output in node.output if output]
        values = dict(zip(names, evaluator.run(names, feed), strict=True)) | feed
    values |= {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for node in proto.graph.node:
        alone = helper.make_graph(
            [node],
            "alone",
            [value_info(n, values[n]) for n in dict.fromkeys(filter(None, node.input))],
            [value_info(n, values[n]) for n in node.output if n],
        )
        single = helper.make_model(alone, opset_imports=proto.opset_import, ir_version=10)
        found = simulated(single, **{n: np.asarray(values[n]) for n in node.input if n})
        for output, array in zip(filter(None, node.output), found, strict=True):
            expected = np.asarray(values[output])
            assert array.dtype == expected.dtype
            if array.dtype.kind == "f":
                assert distance_db(expected, array) > ACCURATE_DB, node.name
            elif node.op_type == "QuantizeLinear":  # float16 division in the reference: ties may differ
                assert np.abs(array.astype(int) - expected.astype(int)).max() <= 1
            else:
                np.testing.assert_array_equal(array, expected)


def value_info(name: str, value: NDArray) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.asarray(value).dtype)
    return helper.make_tensor_value_info(name, kind, np.shape(value))


def test_within_fused_kernels_only_casts_round() -> None:
    x = np.float32([1.0, 3e-5, 255.9, 300.0])
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["half", "half"], ["square"]),
        helper.make_node("Add", ["square", "third"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
    ]
    model = model_of(nodes, {"third": np.float16(1 / 3)}, kind=TensorProto.FLOAT)
    (found,) = simulation_session(model.SerializeToString(), threads=1, fused=True).run(None, {"x": x})
    half = x.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found, half * half + np.float32(np.float16(1 / 3)))
