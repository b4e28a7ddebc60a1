"""fp32 against simulation, tensor by tensor: with quantization noise that is known, and on the demo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import trtq
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.gate.tensors import PART_DB, Compared, ThreeWay, compare_three
from trtq.graph.inputs import InputSpec
from trtq.simulation.similarity import MAX_SQNR_DB, sqnr_db

SCALE = np.float32(0.05)
ROWS = np.random.default_rng(0).normal(size=(21, 16)).astype(np.float32)
WEIGHT = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)


def samples(rows: np.ndarray = ROWS) -> Samples:
    spec = InputSpec("x", np.dtype(np.float32), ("N", 16))
    return Samples("rows", (spec,), {"x": rows}, {}, "0" * 64)


def save(path: Path, *, quantized: bool, renamed: bool = False, batch: int | str = "N") -> Path:
    """MatMul, Relu, Neg; with Q/DQ on the MatMul's input if `quantized`."""
    last = "other" if renamed else "y"
    first, second = ("m_", "r_") if renamed else ("m", "r")
    nodes = [
        helper.make_node("MatMul", ["d" if quantized else "x", "w"], [first], "matmul"),
        helper.make_node("Relu", [first], [second], "relu"),
        helper.make_node("Neg", [second], ["n"], "neg"),
        helper.make_node("Neg", ["n"], [last], "again"),
    ]
    constants = [numpy_helper.from_array(WEIGHT, "w")]
    if quantized:
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize"),
            *nodes,
        ]
        constants += [numpy_helper.from_array(SCALE, "s"), numpy_helper.from_array(np.int8(0), "z")]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 16])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [batch, 8])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def expected() -> dict[str, float]:
    """SQNR of the MatMul's output and of the Relu's, from the definition of Q/DQ."""
    codes = np.clip(np.rint(ROWS / SCALE), -128, 127).astype(np.float32)
    exact, rounded = ROWS @ WEIGHT, (codes * SCALE) @ WEIGHT
    relu = sqnr_db(np.maximum(exact, 0), np.maximum(rounded, 0))[0]
    return {"m": float(sqnr_db(exact, rounded)[0]), "r": float(relu), "y": float(relu)}


@pytest.mark.parametrize("batch", ["N", 7, 8])
def test_quantization_noise_of_every_tensor(tmp_path: Path, batch: int | str) -> None:
    fp32 = save(tmp_path / "fp32.onnx", quantized=False, batch=batch)
    int8 = save(tmp_path / "int8.onnx", quantized=True, batch=batch)
    rows = ROWS if batch != 8 else np.concatenate([ROWS, ROWS[:3]])
    found = compare_three(fp32, int8, samples(rows))
    assert [(t.tensor, t.op) for t in found.tensors] == [("m", "MatMul"), ("r", "Relu"), ("y", "Neg")]
    for tensor in found.tensors:
        tolerance = 0.3 if batch == 8 else 0.01  # other rows
        assert tensor.simulation_db == pytest.approx(expected()[tensor.tensor], abs=tolerance)
    assert found.engine is None
    assert found.parts_at is None
    assert all(t.engine_db is None for t in found.tensors)
    assert "needs a GPU" in found.text()
    assert found.to_json()["parts_at"] is None


def test_a_model_against_itself(tmp_path: Path) -> None:
    fp32 = save(tmp_path / "fp32.onnx", quantized=False)
    assert {t.simulation_db for t in compare_three(fp32, fp32, samples()).tensors} == {MAX_SQNR_DB}


def test_models_of_nothing_in_common(tmp_path: Path) -> None:
    fp32 = save(tmp_path / "fp32.onnx", quantized=False)
    other = save(tmp_path / "other.onnx", quantized=True, renamed=True)
    with pytest.raises(InputError, match="no tensor in common"):
        compare_three(fp32, other, samples())


def test_the_first_tensor_that_parts_is_named() -> None:
    tensors = (
        Compared("a", "conv1", "Conv", 40.0, 80.0),
        Compared("b", "conv2", "Conv", 35.0, PART_DB - 1),
        Compared("c", "conv3", "Conv", 30.0, 5.0),
    )
    found = ThreeWay(tensors, 32, "some GPU")
    assert found.parts_at == tensors[1]
    assert "part at 'b', the output of Conv 'conv2': 29.0 dB" in found.text()
    assert found.to_json()["parts_at"] == "b"
    agreeing = ThreeWay(tensors[:1], 32, "some GPU")
    assert agreeing.parts_at is None
    assert "agree on every tensor" in agreeing.text()


def test_demo(tmp_path: Path) -> None:
    from trtq.calibration.collect import collect
    from trtq.calibration.methods import parse_method, scales_from
    from trtq.data.load import load_samples
    from trtq.graph.fold import fold
    from trtq.graph.model import load_model, save_model
    from trtq.graph.place import place
    from trtq.graph.rewrite import rewrite

    demo = Path(trtq.__file__).parent / "demo"
    model = load_model(demo / "digits.onnx")
    fold(model.graph)
    data = load_samples(str(demo / "calib.npz"), model.inputs, {}).subset(range(16))
    plan = place(model)
    scales = scales_from(collect(model.graph, plan.tensors, data), parse_method("max"), {})
    save_model(rewrite(model.graph, plan, scales), tmp_path / "int8.onnx")
    found = compare_three(demo / "digits.onnx", tmp_path / "int8.onnx", data)
    assert {node.name for node in plan.nodes} <= {t.node for t in found.tensors}
    assert found.tensors[0].tensor == "stem_bn"
    assert found.tensors[-1].tensor == "logits"
    assert all(10 < t.simulation_db < 60 for t in found.tensors)
    assert found.tensors[0].simulation_db > found.tensors[-1].simulation_db
