"""`trtq inspect`: every kind of file, for people and as JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from jobs import Case, Deployed, Run

from trtq.calibration.statistics import Statistics
from trtq.errors import InputError
from trtq.files import sha256_file
from trtq.report.inspection import inspect


def test_an_fp32_model(small: Case) -> None:
    found = inspect(small.model)
    assert found.kind == "ONNX model"
    assert found.values["sha256"] == sha256_file(small.model)
    assert found.values["quantized"] is False
    assert found.values["operators"] == {"Conv": 1, "Relu": 1, "MaxPool": 1, "Flatten": 1, "MatMul": 1}
    assert found.values["inputs"] == ["x float32 Nx3x8x8"]
    assert "quantized no" in found.text()


def test_a_quantized_model(demo: Deployed) -> None:
    found = inspect(demo.folder / "model.int8.onnx")
    nodes = onnx.load(demo.folder / "model.int8.onnx").graph.node
    assert found.values["quantized"] is True
    dequantizers = sum(node.op_type == "DequantizeLinear" for node in nodes)
    assert found.values["operators"]["DequantizeLinear"] == dequantizers
    assert "17 of 17 weighted nodes between Q/DQ" in found.text()


def write(path: Path, nodes: str) -> Path:
    """A model (2, 4, 4) -> y with int8 weights c, scale s and zero-point z."""
    text = f"g (float[2,4,4] x) => (float y) {{ {nodes} }}"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    codes = np.random.default_rng(0).integers(-127, 128, (4, 4)).astype(np.int8)
    for name, values in {"c": codes, "s": np.float32(0.1), "z": np.int8(0)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    onnx.save(model, path)
    return path


def test_a_model_of_quantization_aware_training(tmp_path: Path) -> None:
    """As PyTorch writes a linear layer: the weight is transposed behind its DequantizeLinear."""
    nodes = """q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        w = DequantizeLinear(c, s, z) t = Transpose(w) m = MatMul(d, t) y = MatMul(m, t)"""
    found = inspect(write(tmp_path / "model.onnx", nodes))
    assert "1 of 2 weighted nodes between Q/DQ" in found.text()
    assert [node["int8"] for node in found.values["weighted"]] == [True, False]


def test_a_model_of_dynamic_quantization(tmp_path: Path) -> None:
    nodes = """q, r, p = DynamicQuantizeLinear(x) i = MatMulInteger(q, c, p, z) f = Cast<to = 1>(i)
        k = Mul(f, r) y = MatMul(k, x)"""
    found = inspect(write(tmp_path / "model.onnx", nodes))
    assert found.values["quantized"] is True
    assert "quantized 1 of 2 weighted nodes between Q/DQ or on integers" in found.text()


def test_bodies_are_described(tmp_path: Path) -> None:
    nodes = """k = MatMul(x, x)
        y = If(b) <then_branch = one () => (float[2,4,4] e) { m = MatMul(k, x) e = Relu(m) },
                   else_branch = two () => (float[2,4,4] a) { a = Relu(k) }>"""
    path = write(tmp_path / "model.onnx", nodes)
    model = onnx.load(path)
    model.graph.input.append(onnx.helper.make_tensor_value_info("b", onnx.TensorProto.BOOL, []))
    onnx.save(model, path)
    found = inspect(path)
    (then, inside), (other, _) = found.values["bodies"].items()
    assert then.startswith("then_branch of If")
    assert other.startswith("else_branch of If")
    assert inside == {"MatMul": 1, "Relu": 1}
    assert f"body      {then}: MatMul 1, Relu 1" in found.text()


def test_the_parts_of_an_attention_have_names_to_exclude(tmp_path: Path) -> None:
    text = (
        "g (float[1,4,8] x) => (float[1,4,8] y) { y = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x) }"
    )
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> {text}')
    model.graph.node[0].name = "att"
    onnx.save(model, tmp_path / "model.onnx")
    found = inspect(tmp_path / "model.onnx")
    assert found.values["operators"] == {"Attention": 1}
    assert [node["name"] for node in found.values["weighted"]] == ["att/MatMul", "att/MatMul_1"]


def test_a_line_for_each_reason(tmp_path: Path) -> None:
    nodes = " ".join(f"t{i} = MatMul({f't{i - 1}' if i else 'x'}, x)" for i in range(6))
    lines = inspect(write(tmp_path / "model.onnx", f"{nodes} y = Relu(t5)")).lines
    (weighted,) = [line for line in lines if line.startswith("weighted")]
    assert weighted.count("(MatMul)") == 6
    assert weighted.endswith(": it is not between Q/DQ")


def test_a_table(demo: Deployed) -> None:
    found = inspect(demo.folder / "calibration.cache")
    lines = (demo.folder / "calibration.cache").read_text().splitlines()
    assert found.kind == "calibration table"
    assert found.values["header"] == lines[0]
    assert len(found.values["tensors"]) == len(lines) - 1
    name, _, digits = lines[1].rpartition(": ")
    scale = np.frombuffer(bytes.fromhex(digits), ">f4")[0]
    assert found.values["tensors"][name]["scale"] == scale
    assert found.values["tensors"][name]["amax"] == pytest.approx(scale * 127)


def test_a_plan(demo: Deployed) -> None:
    found = inspect(demo.folder / "plan.json")
    assert found.kind == "plan"
    assert found.values == json.loads((demo.folder / "plan.json").read_text()) | {}
    assert "17 of 17 weighted nodes, 100.0% of the multiply-accumulates" in found.text()


def test_an_engine(demo: Deployed) -> None:
    engine = demo.folder / "model.plan"
    found = inspect(engine)
    assert found.values["sha256"] == sha256_file(engine)
    assert found.values["build"]["model_sha256"] == sha256_file(demo.folder / "model.int8.onnx")
    assert "caution   a plan file is code" in found.text()
    assert json.loads(json.dumps(found.to_json()))["bytes"] == engine.stat().st_size


def test_an_engine_without_its_record(demo: Deployed, tmp_path: Path) -> None:
    (tmp_path / "lone.plan").write_bytes((demo.folder / "model.plan").read_bytes())
    found = inspect(tmp_path / "lone.plan")
    assert found.values["build"] is None
    assert "kernels   not known" in found.text()


def test_statistics(demo: Deployed) -> None:
    path = next(demo.cache.glob("*/*/statistics-*.npz"))
    found = inspect(path)
    assert found.kind == "statistics"
    stored = Statistics.load(path)
    assert found.values["rows"] == stored.rows
    assert found.values["tensors"].keys() == stored.histograms.keys()


def test_a_sensitivity_analysis(small: Case, tmp_path: Path, trtq_run: Callable[..., Run]) -> None:
    path = tmp_path / "sensitivity.json"
    run = trtq_run("sensitivity", small.model, "--data", small.data, "--method", "max", "-o", path)
    assert run.code == 0, run.err
    found = inspect(path)
    assert found.kind == "sensitivity analysis"
    assert found.lines == run.out.splitlines()
    assert found.values == json.loads(path.read_text())


@pytest.mark.parametrize("content", ['{"format": "something-1"}', '{"format": "trtq-study-1"}', "[]", "7"])
def test_json_of_another_kind_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(InputError, match="not a"):
        inspect(tmp_path / "other.json")


@pytest.mark.parametrize("name", ["model.onnx", "a.plan", "a.json", "a.npz", "a.cache", "a"])
def test_what_is_none_of_these_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(InputError) as raised:
        inspect(tmp_path / name)
    assert raised.value.file == str(tmp_path / name)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        inspect(tmp_path / "nowhere")


def test_a_folder_of_results(demo: Deployed) -> None:
    """Every file that deploy leaves is described, and in the folder's line by what it is."""
    found = inspect(demo.folder)
    files = {path.name for path in demo.folder.iterdir()}
    assert found.values["files"].keys() == files
    assert len(found.lines) == len(files)
    assert found.lines[0].split()[:3] == ["verdict.json", "verdict:", "PASS"]
    for name, described in found.values["files"].items():
        assert described == inspect(demo.folder / name).to_json()
    json.dumps(found.to_json())


def test_a_folder_says_what_is_damaged(demo: Deployed, tmp_path: Path) -> None:
    shutil.copytree(demo.folder, tmp_path / "results")
    (tmp_path / "results" / "verdict.json").write_text("{")
    (tmp_path / "results" / "mine.json").write_text("{}")
    (line,) = [line for line in inspect(tmp_path / "results").lines if "damaged" in line]
    assert line.startswith("verdict.json")


def test_a_folder_without_results(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match="holds no results"):
        inspect(tmp_path)


def test_every_file_in_the_cache(demo: Deployed) -> None:
    kinds = {path.suffix: inspect(path).kind for path in demo.cache.glob("*/*/*") if path.suffix != ".bin"}
    assert {".npz", ".json"} <= kinds.keys()
    assert kinds[".json"] == "record of a cache entry"


def test_arrays_that_are_no_statistics(tmp_path: Path) -> None:
    np.savez(tmp_path / "calib.npz", image=np.zeros((3, 2), np.float32))
    assert inspect(tmp_path / "calib.npz").lines == ["array     image: float32 3x2"]


def test_a_recipe_says_what_is_not_the_default(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('max_drop = "2%"\nrest = "auto"\n[preprocess.x]\nscale = 2\n')
    assert [line.split() for line in inspect(tmp_path / "recipe.toml").lines] == [
        ["max-drop", "2%"],
        ["[preprocess.x]"],
    ]
