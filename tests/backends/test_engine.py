"""Engines over rows: on a GPU, or what is said without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from trtq.backends import runner
from trtq.backends.engine import fingerprint, run_engine
from trtq.backends.interface import Gpu
from trtq.data.samples import InputSpec, Samples
from trtq.errors import InputError, MissingBackendError


def samples_of(x: np.ndarray) -> Samples:
    return Samples("rows", (InputSpec("x", np.dtype(np.float32), ("n", 3)),), {"x": x}, {}, "0" * 64)


def negation(path: Path) -> Path:
    text = '<ir_version: 9, opset_import: ["": 17]> g (float[n,3] x) => (float[n,3] y) { y = Neg(x) }'
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def build_engine(path: Path, model: Path) -> Path:
    pytest.importorskip("tensorrt_rtx")
    code = (
        "import sys, tensorrt_rtx as trt\n"
        "logger = trt.Logger(trt.Logger.ERROR); builder = trt.Builder(logger)\n"
        "network = builder.create_network(0); parser = trt.OnnxParser(network, logger)\n"
        "assert parser.parse_from_file(sys.argv[1])\n"
        "config = builder.create_builder_config(); profile = builder.create_optimization_profile()\n"
        "profile.set_shape('x', (2, 3), (4, 3), (8, 3)); config.add_optimization_profile(profile)\n"
        "open(sys.argv[2], 'wb').write(builder.build_serialized_network(network, config))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(model), str(path)], check=True)
    return path


@pytest.mark.gpu
def test_an_engine_runs_on_the_gpu(tmp_path: Path, gpu_for_rtx: None) -> None:
    plan = build_engine(tmp_path / "m.plan", negation(tmp_path / "m.onnx"))
    x = np.random.default_rng(0).normal(size=(17, 3)).astype(np.float32)
    found = run_engine(plan, samples_of(x))
    assert found.executor == "engine"
    np.testing.assert_array_equal(found.arrays["y"], -x)


def test_an_engine_says_what_is_missing(tmp_path: Path) -> None:
    plan = build_engine(tmp_path / "m.plan", negation(tmp_path / "m.onnx"))
    x = np.zeros((1, 3), np.float32)
    with pytest.raises(MissingBackendError, match="gate the quantized ONNX model"):
        run_engine(plan, samples_of(x))
    with pytest.raises(InputError, match="cannot read the file"):
        run_engine(tmp_path / "none.plan", samples_of(x))


def test_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    assert onnxruntime.__version__ in fingerprint("m.onnx")["executor"]
    trt = pytest.importorskip("tensorrt_rtx")
    model = negation(tmp_path / "m.onnx")
    plan = build_engine(tmp_path / "m.plan", model)
    monkeypatch.setattr(runner, "find_gpu", lambda: Gpu("Some GPU", "8.9", "570.86.15"))
    assert fingerprint(plan) == {
        "executor": "engine",
        "gpu": "Some GPU",
        "compute_capability": "8.9",
        "driver": "570.86.15",
        "tensorrt": f"tensorrt_rtx-{trt.__version__}",
    }
    monkeypatch.setattr(runner, "find_gpu", lambda: None)
    with pytest.raises(MissingBackendError, match="only on an NVIDIA GPU"):
        fingerprint(plan)
