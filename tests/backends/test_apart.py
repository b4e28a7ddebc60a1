"""Builds in a process of their own: what the real builder says of them, and what its crash leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from jobs import Run, conv_case, refused_case
from nets import net

from trtq.backends import tensorrt_rtx
from trtq.backends.apart import build_apart, try_build
from trtq.backends.interface import BuildOptions, Range
from trtq.backends.record import sidecar
from trtq.errors import BuildError, InputError

BATCHES = {"x": Range((1, 3, 8, 8), (8, 3, 8, 8), (32, 3, 8, 8))}


@pytest.fixture(autouse=True)
def _builder() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def test_what_builds_leaves_nothing(tmp_path: Path) -> None:
    case = conv_case(tmp_path, "N")
    before = sorted(tmp_path.iterdir())
    try_build("tensorrt-rtx", case.model, profile=BATCHES)
    assert sorted(tmp_path.iterdir()) == before


def test_what_the_parser_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    model = refused_case(tmp_path).model
    with pytest.raises(BuildError) as raised:
        try_build("tensorrt-rtx", model, profile={"x": Range((1, 32), (8, 32), (32, 32))})
    assert raised.value.problem == "TensorRT for RTX cannot parse the model"
    assert "'determinant' (Det)" in str(raised.value.cause)
    assert raised.value.remedy


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    case = conv_case(tmp_path, "N")
    with pytest.raises(InputError) as raised:
        try_build("tensorrt-rtx", case.model, profile={})
    assert not isinstance(raised.value, BuildError)


def test_a_crash_of_the_library_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = conv_case(tmp_path, "N")
    (tmp_path / "crashing").mkdir()
    (tmp_path / "crashing" / "tensorrt_rtx.py").write_text("import os\nos.abort()\n")
    monkeypatch.syspath_prepend(tmp_path / "crashing")
    with pytest.raises(BuildError, match="crashed") as raised:
        try_build("tensorrt-rtx", case.model, profile=BATCHES)
    assert "SIGABRT" in str(raised.value.cause)


def test_a_model_that_ends_the_builders_process_is_refused(
    tmp_path: Path, trtq_run: Callable[..., Run]
) -> None:
    """TensorRT for RTX 1.7 divides constants itself, and INT_MIN by -1 is a signal of the processor's."""
    text = "g (float[2,3] x) => (float[2,3] y) { q = Div(a, b) f = Cast<to = 1>(q) y = Add(x, f) }"
    lowest = np.array([[1, np.iinfo(np.int32).min, 3]], np.int32)
    model = tmp_path / "m.onnx"
    onnx.save(net(text, a=lowest, b=np.array([[1, -1, 1]], np.int32)), model)
    run = trtq_run("build", model, "--backend", "tensorrt-rtx", "-o", tmp_path / "m.plan")
    assert run.code == 2
    assert "crashed while it built an engine" in run.err
    assert "SIGFPE" in run.err
    assert list(tmp_path.iterdir()) == [model]


def test_an_engine_that_is_built_apart_is_the_same(tmp_path: Path) -> None:
    case = conv_case(tmp_path, "N")
    asked = {"profile": BATCHES, "targets": ["8.6"], "options": BuildOptions(workspace=1 << 28)}
    apart = build_apart("tensorrt-rtx", case.model, tmp_path / "apart.plan", **asked)
    here = tensorrt_rtx.build(case.model, tmp_path / "here.plan", **asked)
    assert (apart.targets, apart.notes) == (here.targets, here.notes)
    assert apart.compiled.kernels == here.compiled.kernels
    records = [json.loads(sidecar(made.engine).read_text()) for made in (apart, here)]
    assert records[0].keys() == records[1].keys()
    assert records[0]["options"] == records[1]["options"] == {"workspace": str(1 << 28)}
    assert tensorrt_rtx.describe_plan(apart.engine)["targets"] == ["8.6"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_build_ends_with_the_process_that_asked_for_it(tmp_path: Path) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text(
        "import os, pathlib, time\n"
        "own = pathlib.Path(__file__).with_name('own')\n"
        "own.write_text(str(os.getpid()))\n"
        "os.rename(own, own.with_name('pid'))\n"
        "time.sleep(100)\n"
    )
    code = "from trtq.backends.apart import *; try_build('tensorrt-rtx', Path('model.onnx'))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "TMPDIR": str(tmp_path)}
    asking = subprocess.Popen([sys.executable, "-c", code], env=env)
    try:
        while not (tmp_path / "pid").exists():
            assert asking.poll() is None
            time.sleep(0.02)
    finally:
        asking.send_signal(signal.SIGKILL)
        asking.wait()
    build = int((tmp_path / "pid").read_text())
    for _ in range(500):
        if not running(build):
            return
        time.sleep(0.02)
    os.kill(build, signal.SIGKILL)
    pytest.fail("the build still ran 10 s after the process that asked for it")


def running(process: int) -> bool:
    """Whether a process is there and no zombie, which waits for whoever adopted it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
