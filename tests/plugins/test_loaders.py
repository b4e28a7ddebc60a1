"""The loaders that Polygraphy's scripts call, called directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import pytest
from polygraphy.backend.onnx import modify_outputs
from polygraphy.exception import PolygraphyException
from trtq_polygraphy.loaders import Int8OnnxFromPath, MarkSharedOutputs, SimulationFromOnnxBytes

import trtq
from trtq.calibration.table import Table
from trtq.cli.main import main
from trtq.simulation.similarity import sqnr_db

AMAX = 3.0


@pytest.fixture
def net(tmp_path: Path) -> str:
    """Two matmuls with a relu between: x (N, 32) -> first -> hidden -> y (N, 32)."""
    rng = np.random.default_rng(7)
    weights = [onh.from_array(rng.normal(size=(32, 32)).astype(np.float32), name) for name in ("w1", "w2")]
    nodes = [
        oh.make_node("MatMul", ["x", "w1"], ["first"], "matmul1"),
        oh.make_node("Relu", ["first"], ["hidden"], "relu"),
        oh.make_node("MatMul", ["hidden", "w2"], ["y"], "matmul2"),
    ]
    x, y = (oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ("N", 32)) for name in "xy")
    graph = oh.make_graph(nodes, "net", [x], [y], weights)
    path = tmp_path / "net.onnx"
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 19)], ir_version=9), path)
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Rows whose largest magnitude is AMAX."""
    rows = np.random.default_rng(8).uniform(-1, 1, (16, 32)).astype(np.float32)
    rows[5, 3] = -AMAX
    np.savez(tmp_path / "data.npz", x=rows)
    return str(tmp_path / "data.npz")


def scale_of(model: onnx.ModelProto, tensor: str) -> float:
    (scale,) = (t for t in model.graph.initializer if t.name == f"{tensor}/scale")
    return float(onh.to_array(scale))


def quantized(model: onnx.ModelProto) -> set[str]:
    return {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}


@pytest.mark.slow
def test_scales_come_from_the_data(net: str, data: str) -> None:
    model = Int8OnnxFromPath(net, data, method="max")()
    assert quantized(model) == {"x", "hidden"}
    assert scale_of(model, "x") == np.float32(AMAX / 127)


def test_scales_come_from_a_table_before_the_data_of_a_recipe(net: str, data: str, tmp_path: Path) -> None:
    table, recipe = tmp_path / "calibration.cache", tmp_path / "recipe.toml"
    Table({"x": np.float32(0.5), "hidden": np.float32(0.25)}).save(table)
    recipe.write_text('data = "data.npz"\nmethod = "max"\n')
    model = Int8OnnxFromPath(net, table=str(table), recipe=str(recipe))()
    assert (scale_of(model, "x"), scale_of(model, "hidden")) == (0.5, 0.25)


def test_a_recipe_preprocesses(net: str, data: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('data = "data.npz"\nmethod = "max"\n[preprocess.x]\nscale = "1/2"\n')
    assert scale_of(Int8OnnxFromPath(net, recipe=str(recipe))(), "x") == np.float32(AMAX / 2 / 127)


@pytest.mark.slow
def test_exclude_and_rest(net: str, data: str) -> None:
    model = Int8OnnxFromPath(net, data, method="max", exclude=["matmul2"], rest="fp16")()
    assert len([node for node in model.graph.node if node.op_type == "QuantizeLinear"]) == 1
    (matmul2,) = (node for node in model.graph.node if node.name == "matmul2")
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types[matmul2.input[1]] == onnx.TensorProto.FLOAT16


def test_simulation_quantizes_exactly(net: str, data: str) -> None:
    """One code of x is 3/127: values between two codes give the outputs of the nearer one."""
    session = SimulationFromOnnxBytes(
        lambda: Int8OnnxFromPath(net, data, method="max", exclude=["matmul2"])().SerializeToString()
    )()
    code = np.float32(AMAX / 127)
    on_codes = np.random.default_rng(9).integers(-127, 128, (4, 32)).astype(np.float32)
    (expected,) = session.run(None, {"x": on_codes * code})
    (found,) = session.run(None, {"x": (on_codes + 0.4) * code})
    np.testing.assert_array_equal(found, expected)


def test_layers_are_compared_without_fixes() -> None:
    """The fixes centre tensors of the demo: there, they would no longer be alike."""
    demo = Path(trtq.__file__).parent / "demo"
    fp32 = onnx.load(demo / "digits.onnx")
    tensors = [node.output[0] for node in fp32.graph.node if node.op_type == "Clip"]
    fp32 = modify_outputs(fp32, outputs=tensors)

    def worst(layers: bool) -> float:
        model, calibration = str(demo / "digits.onnx"), str(demo / "calib.npz")
        int8 = Int8OnnxFromPath(model, calibration, method="max", layers=layers)
        marked = MarkSharedOutputs(int8, fp32)()
        rows = {"image": np.load(demo / "calib.npz")["image"][:8]}
        found, expected = (
            session.run(None, rows)
            for session in (SimulationFromOnnxBytes(m.SerializeToString())() for m in (marked, fp32))
        )
        return min(float(sqnr_db(e, f)[0]) for e, f in zip(expected, found, strict=True))

    assert worst(layers=False) < 0
    assert worst(layers=True) > 10


def test_shared_outputs_are_marked(net: str, data: str) -> None:
    fp32 = onnx.load(net)
    del fp32.graph.output[:]
    fp32.graph.output.extend(onnx.ValueInfoProto(name=name) for name in ("gone", "hidden", "y"))
    model = MarkSharedOutputs(Int8OnnxFromPath(net, data, method="max"), fp32)()
    assert [output.name for output in model.graph.output] == ["hidden", "y"]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "nothing gives the scales"),
        ({"data": "data.npz", "table": "t.cache"}, "data and a table"),
        ({"recipe": "missing.toml"}, "cannot read the recipe"),
        ({"data": "missing.npz"}, "the data does not exist"),
        ({"data": "data.npz", "method": "best"}, "best"),
        ({"data": "data.npz", "exclude": ["conv*"]}, "conv"),
        ({"table": "missing.cache"}, "cannot read the calibration table"),
    ],
)
def test_bad_input_is_polygraphys_error(
    net: str, data: str, given: dict[str, Any], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PolygraphyException, match=problem):
        Int8OnnxFromPath(net, **given)()


def test_a_table_of_another_model_is_refused(net: str, data: str, model: str, tmp_path: Path) -> None:
    table = str(tmp_path / "calibration.cache")
    assert main(["calibrate", net, "--data", data, "--method", "max", "-q", "-o", table]) == 0
    Int8OnnxFromPath(net, table=table)()
    with pytest.raises(PolygraphyException, match="made for another model"):
        Int8OnnxFromPath(model, table=table)()


def test_a_file_that_is_no_model(data: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(PolygraphyException, match=r"broken\.onnx"):
        Int8OnnxFromPath(str(path), data)()
    with pytest.raises(PolygraphyException, match="cannot load the model"):
        SimulationFromOnnxBytes(b"not a model")()
