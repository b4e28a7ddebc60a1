"""tools/gpu_check.py runs everywhere and says what it could not measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trtq.backends.interface import find_gpu

SCRIPT = Path(__file__).parents[1] / "tools" / "gpu_check.py"


@pytest.mark.slow
def test_the_demo_is_checked(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    output = tmp_path / "check.json"
    subprocess.run(
        [sys.executable, str(SCRIPT), "-o", str(output), "--method", "max"],
        check=True,
        env={**os.environ, "TRTQ_CACHE": str(tmp_path / "cache")},
    )
    report = json.loads(output.read_text())
    demo = report["backends"]["tensorrt-rtx"]["demo"]
    assert "process" not in demo, "it crashed"
    assert [e["static"]["precision"] for e in demo["static"]["result"]] == ["fp32", "fp16", "int8"]
    three_way = demo["three_way"]["result"]
    assert three_way["tensors"][-1]["tensor"] == "logits"
    if find_gpu() is None:
        assert report["environment"]["gpu"] is None
        assert "no engine was run" in demo["not_run"]
        assert "latency" not in demo
        assert three_way["engine"] is None
    else:
        assert {"latency", "engine_against_simulation", "target current"} <= demo.keys()
