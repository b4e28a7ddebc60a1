"""Polygraphy itself, run as a user runs it: with trtq's runners, and on files that trtq writes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from polygraphy.comparator import RunResults

from trtq.cli.main import main
from trtq.report.inspection import inspect

pytestmark = pytest.mark.slow

POLYGRAPHY = [sys.executable, "-c", "import sys; from polygraphy.tools import main; sys.exit(main())"]
SIMULATION = "trtq-int8-simulation"
LOOSE = ("--atol", "2")

Compared = tuple[dict[str, NDArray], dict[str, NDArray]]
"""The outputs of trtq's runner and of ONNX Runtime, over all rows."""


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def polygraphy(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(*POLYGRAPHY, *arguments, cwd=cwd, **environment)


def outputs_of(saved: Path) -> Compared:
    results = RunResults.load(str(saved))
    (other,) = (runner for runner, _ in results.items() if runner != SIMULATION)
    return joined(results[SIMULATION]), joined(results[other])


def joined(iterations: Sequence[Mapping[str, NDArray]]) -> dict[str, NDArray]:
    return {name: np.concatenate([i[name] for i in iterations]) for name in iterations[0]}


def session_outputs(
    model: str | Path, images: NDArray, level: onnxruntime.GraphOptimizationLevel
) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": images})
    return logits


@pytest.fixture(scope="module")
def options(model: str, loader: Path) -> list[str]:
    """`polygraphy run` of the demo model; the data are named as they lie in the loader's folder."""
    calibration = ["--trtq-data", "loader.py:load_calibration", "--trtq-method", "entropy"]
    return ["run", model, "--trtq-int8", *calibration, "--onnxrt", "--data-loader-script", "loader.py"]


@pytest.fixture(scope="module")
def compared(options: list[str], loader: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    saved = tmp_path_factory.mktemp("compared") / "outputs.json"
    done = polygraphy(*options, *LOOSE, "--save-outputs", saved, cwd=loader.parent)
    assert done.returncode == 0, done.stdout
    assert f"Accuracy Comparison | {SIMULATION} vs. onnxrt-runner" in done.stdout
    assert "trtq | plan: 17 of 17 weighted nodes to INT8" in done.stdout
    return outputs_of(saved)


@pytest.fixture(scope="module")
def int8_model(model: str, loader: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `trtq quantize` writes for the same options, the extension's default precision among them."""
    path = tmp_path_factory.mktemp("quantized") / "model.int8.onnx"
    data = f"{loader}:load_calibration"
    options = ["--method", "entropy", "--rest", "fp32", "-q", "-o", str(path)]
    assert main(["quantize", model, "--data", data, *options]) == 0
    return path


def test_both_models_run_on_all_rows(compared: Compared, model: str, demo: Path) -> None:
    int8, fp32 = compared
    evaluation = np.load(demo / "eval.npz")
    expected = session_outputs(model, evaluation["image"], onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    np.testing.assert_allclose(fp32["logits"], expected, atol=1e-4)
    assert np.abs(int8["logits"] - fp32["logits"]).max() > 1e-2  # it is quantized
    correct = [np.mean(found["logits"].argmax(1) == evaluation["label"]) for found in (int8, fp32)]
    assert correct[0] > 0.99 * correct[1] > 0.9


def test_simulation_is_of_the_model_that_trtq_writes_with_exact_quantizers(
    compared: Compared, int8_model: Path, demo: Path
) -> None:
    images = np.load(demo / "eval.npz")["image"]
    exact = session_outputs(int8_model, images, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    difference = np.abs(compared[0]["logits"] - exact)
    assert np.mean(difference < 1e-4) > 0.95  # a value on the edge of two codes may go either way
    assert difference.max() < 0.2


def test_generated_script_runs_alone_and_gives_the_same_result(
    compared: Compared,
    options: list[str],
    loader: Path,
    tmp_path: Path,
) -> None:
    script, saved = tmp_path / "compare.py", tmp_path / "outputs.json"
    absolute = [str(loader) if option == "loader.py" else option for option in options]
    done = polygraphy(*absolute, *LOOSE, "--save-outputs", saved, "--gen-script", script, cwd=loader.parent)
    assert done.returncode == 0, done.stdout
    assert (
        "from trtq_polygraphy.loaders import Int8OnnxFromPath, SimulationFromOnnxBytes" in script.read_text()
    )
    done = run(sys.executable, script, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    for found, expected in zip(outputs_of(saved), compared, strict=True):
        np.testing.assert_array_equal(found["logits"], expected["logits"])


def test_polygraphy_decides_by_its_own_tolerances(options: list[str], loader: Path) -> None:
    done = polygraphy(*options, cwd=loader.parent)
    assert done.returncode == 1
    assert "FAILED | Output: 'logits' | Difference exceeds tolerance (rel=1e-05, abs=1e-05)" in done.stdout


def test_layers_are_compared_under_their_fp32_names(
    options: list[str], loader: Path, model: str, tmp_path: Path
) -> None:
    """Q/DQ and what folding removed are left out."""
    saved = tmp_path / "outputs.json"
    layers = ("--onnx-outputs", "*", "--compare", "cosine_similarity", "--save-outputs", saved)
    done = polygraphy(*options, *layers, cwd=loader.parent)
    assert done.returncode == 0, done.stdout
    assert "Output names did not match exactly" not in done.stdout
    int8, fp32 = outputs_of(saved)
    graph = onnx.load(model).graph
    folded = {node.input[0] for node in graph.node if node.op_type == "BatchNormalization"}
    assert fp32.keys() - int8.keys() == folded  # a convolution's output before its batch normalization
    assert int8.keys() < fp32.keys()


def test_the_first_example_passes_as_it_is_written(model: str, demo: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "plugins" / "README.md").read_text()
    example = text[text.index("# trtq in Polygraphy") :]
    script, command = (re.search(f"```{kind}\\n(.*?)```", example, re.DOTALL) for kind in ("python", "sh"))
    assert script is not None
    assert command is not None
    (tmp_path / "loader.py").write_text(script[1])
    shutil.copy(model, tmp_path / "model.onnx")
    shutil.copy(demo / "calib.npz", tmp_path)
    program, *arguments = shlex.split(command[1].replace("\\\n", " "), comments=True)
    assert program == "polygraphy"
    done = polygraphy(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "Passed: 32/32 iterations" in done.stdout


def test_problems_are_messages(model: str, tmp_path: Path) -> None:
    done = polygraphy("run", model, "--onnxrt", "--trtq-int8", "--trtq-data", "no.npz", cwd=tmp_path)
    assert done.returncode == 1
    assert "trtq | the data does not exist" in done.stdout
    assert "Traceback" not in done.stdout


def test_engine_of_a_generated_script_is_int8(model: str, loader: Path, tmp_path: Path) -> None:
    """It is built everywhere; whether it runs depends on the GPU."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    script, plan = tmp_path / "engine.py", tmp_path / "model.plan"
    done = polygraphy(
        *("run", model, "--trtq-engine", "--trtq-data", f"{loader}:load_calibration", "--trtq-method", "max"),
        *("--save-engine", plan, "--profiling-verbosity", "detailed", "-vvvv", "--gen-script", script),
        cwd=tmp_path,
        POLYGRAPHY_USE_TENSORRT_RTX="1",
    )
    assert done.returncode == 0, done.stdout
    done = run(sys.executable, script, cwd=tmp_path, POLYGRAPHY_USE_TENSORRT_RTX="0")
    assert plan.exists(), done.stdout
    layers = done.stdout[done.stdout.index("] Layers:") :]
    convolutions = [line for line in layers.splitlines() if "LayerType: correlation" in line]
    assert convolutions
    assert all("Datatype: Int8" in line for line in convolutions)


def test_polygraphy_inspects_and_converts_what_trtq_writes(int8_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    done = polygraphy("inspect", "model", int8_model, "--show", "layers", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "{image [dtype=float32, shape=('N', 1, 8, 8)]}" in done.stdout
    written = Counter(node.op_type for node in onnx.load(int8_model).graph.node)
    for op in ("QuantizeLinear", "DequantizeLinear", "Conv"):
        assert done.stdout.count(f"[Op: {op}]") == written[op] > 0
    plan = tmp_path / "model.plan"
    done = polygraphy(
        *("convert", int8_model, "-o", plan, "--compute-capabilities", "8.6"),
        cwd=tmp_path,
        POLYGRAPHY_USE_TENSORRT_RTX="1",
    )
    assert done.returncode == 0, done.stdout
    assert inspect(plan).to_json()["targets"] == ["8.6"]


def test_the_extension_is_light() -> None:
    """Polygraphy imports it at every start."""
    heavy = ["numba", "numpy", "onnx", "onnxruntime", "tensorrt_rtx", "trtq"]
    code = f"import sys, trtq_polygraphy.args; print([name for name in {heavy} if name in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=Path.cwd()).stdout == "[]\n"
