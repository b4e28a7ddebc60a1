"""Static figures worked out by hand, the three engines of the demo, and the command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import types
from functools import partial
from pathlib import Path

import onnx
import pytest

import trtq
from trtq.backends import bench
from trtq.backends.bench import Result, slower_than_float, summarize, text_of
from trtq.backends.compiled import Compiled, CompiledLayer, CompiledTensor
from trtq.backends.interface import BuildOptions
from trtq.backends.record import sidecar
from trtq.backends.timing import Measuring, Timing
from trtq.cli.bench import BENCH
from trtq.errors import InputError, MissingBackendError
from trtq.recipe import from_command_line, options

DEMO = Path(trtq.__file__).parent / "demo"
PRECISIONS = ("fp32", "fp16", "int8")


def tensor(name: str, datatype: str, size: int = 100) -> CompiledTensor:
    return CompiledTensor(name, (-1, size), datatype, "")


def layer(name: str, kind: str, inputs: list[CompiledTensor], output: CompiledTensor) -> CompiledLayer:
    return CompiledLayer(name, kind, tuple(inputs), (), (output,), ())


WEIGHT = CompiledTensor("w", (100, 100), "Int8", "")
QUANTIZE = layer("__myl_MulMinMaxRounCast_myl0_1", "kgen", [tensor("x", "Float")], tensor("q", "Int8"))
GEMM = layer("gemm", "gemm", [tensor("q", "Int8"), WEIGHT], tensor("g", "Float"))
IDLE = layer("__myl_CastMulCast_myl0_2", "kgen", [tensor("g", "Float")], tensor("i", "Half"))
ADD = layer("__myl_CastAdd_myl0_3", "kgen", [tensor("i", "Half")], tensor("a", "Float"))
FLOAT = layer("fc", "runtime_fusion", [tensor("a", "Float"), tensor("v", "Float")], tensor("y", "Float"))
CALL = CompiledLayer("shape", "shape_call", (), (), (), ())


def test_static_figures() -> None:
    found = summarize("m.plan", Compiled((CALL, QUANTIZE, GEMM, IDLE, ADD), batch=4))
    assert (found.kernels, found.compute, found.int8, found.int8_share) == (4, 1, 1, 1.0)
    assert found.precision == "int8"
    assert found.idle == (IDLE.name,)  # it only converts, and no INT8 kernel reads it
    per_row = (400 + 100) + (100 + 400) + (400 + 200) + (200 + 400)
    assert found.bytes_moved == 4 * per_row + 100 * 100


@pytest.mark.parametrize(
    ("layers", "precision"),
    [
        ((GEMM, FLOAT, GEMM), "int8"),
        ((FLOAT,), "fp32"),
        ((layer("h", "correlation", [tensor("x", "Half")], tensor("y", "Half")),), "fp16"),
    ],
)
def test_precision_is_that_of_most_kernels(layers: tuple[CompiledLayer, ...], precision: str) -> None:
    assert summarize("m", Compiled(layers)).precision == precision


def timing(p50: float, kernel_ms: dict[str, float]) -> Timing:
    return Timing(8, 500, p50, p50, p50, 8000 / p50, True, "", 1 << 20, 90, 4, kernel_ms, None)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """FP32, FP16 and INT8 engines of the demo, by the command."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    folder = tmp_path_factory.mktemp("three")
    arguments = ["--three", "--data", str(DEMO / "calib.npz"), "--method", "max", "--target", "8.6"]
    arguments += ["--cache", str(folder / "cache"), "-o", str(folder)]
    assert command(str(DEMO / "digits.onnx"), *arguments) == 0
    return {name: folder / f"model.{name}.plan" for name in PRECISIONS}


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    for each in BENCH.arguments:
        each.add_to(parser)
    for field in options(BENCH.options):
        read = partial(from_command_line, field.name)
        many = {"action": "append"} if field.metadata["kind"].many else {"type": read}
        flags = (*field.metadata["flags"], "--" + field.name.replace("_", "-"))
        parser.add_argument(*flags, dest=field.name, **many)
    given = parser.parse_args(arguments)
    given.recipe, given.quiet, given.command = None, True, BENCH
    return BENCH.run(given)


def test_three_engines(three: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    figures = {name: bench.static_of(engine) for name, engine in three.items()}
    assert {name: figure.precision for name, figure in figures.items()} == {n: n for n in PRECISIONS}
    assert figures["int8"].int8 == figures["int8"].compute == figures["fp32"].compute == 17
    assert figures["fp16"].bytes_moved < 0.6 * figures["fp32"].bytes_moved
    assert command(*map(str, three.values()), "--json", str(tmp_path / "b.json")) == 0
    shown = capsys.readouterr().out
    assert "model.int8.plan: int8" in shown
    assert "17 of 17 compute kernels in INT8 (100%)" in shown
    written = json.loads((tmp_path / "b.json").read_text())
    assert [e["static"]["precision"] for e in written["engines"]] == list(PRECISIONS)
    assert "Static comparison" in shown
    assert written["gpu"] is None
    assert all(e["timing"] is None for e in written["engines"])


def test_slower_int8_is_loud_and_names_kernels(three: dict[str, Path]) -> None:
    static = {name: bench.static_of(engine) for name, engine in three.items()}
    kernels = bench.describe_engine(three["int8"])["build"]["compiled"].layers
    pointwise = next(k.name for k in kernels if k.kind == "kgen" and not k.converts)
    conv = next(k.name for k in kernels if k.int8)
    int8 = Result(three["int8"], static["int8"], timing(0.5, {pointwise: 0.3, conv: 0.9, "elsewhere": 0.1}))
    fp16 = Result(three["fp16"], static["fp16"], timing(0.4, {}))
    message = slower_than_float([fp16, int8])
    assert message is not None
    head, *blamed = message.splitlines()
    assert head == "THE INT8 ENGINE IS SLOWER THAN FP16: 0.500 against 0.400 ms"
    assert blamed == [f"  0.300 ms  pointwise: {pointwise}", "  0.100 ms  not in the record: elsewhere"]
    assert message in text_of([fp16, int8])
    assert "Static" not in text_of([fp16, int8])
    faster = Result(three["int8"], static["int8"], timing(0.3, {}))
    assert slower_than_float([fp16, faster]) is None
    assert slower_than_float([fp16]) is None
    assert (
        slower_than_float([fp16, int8, faster]) is None
    )  # two INT8 engines: of which model is the FP16 one?


def test_engines_of_different_models_are_not_compared(three: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.plan"
    shutil.copy(three["fp32"], other)
    record = json.loads(sidecar(three["fp32"]).read_text().replace('"image"', '"picture"'))
    sidecar(other).write_text(json.dumps(record))
    int8 = Result(three["int8"], bench.static_of(three["int8"]), timing(0.5, {}))
    fp32 = bench.static_of(three["fp32"])
    assert slower_than_float([Result(three["fp32"], fp32, timing(0.1, {})), int8]) is not None
    assert slower_than_float([Result(other, fp32, timing(0.1, {})), int8]) is None


def test_static_comparison_is_of_bytes(three: dict[str, Path]) -> None:
    results = bench.benchmark([three["fp16"], three["int8"]], on_gpu=False)
    message = slower_than_float(results)
    assert message is not None
    assert "MOVES MORE BYTES THAN FP16" in message
    assert "SLOWER" not in message


def test_engines_without_a_record(three: dict[str, Path], tmp_path: Path) -> None:
    lonely = Path(shutil.copy(three["int8"], tmp_path / "lonely.plan"))
    assert not sidecar(lonely).exists()
    with pytest.raises(InputError, match="nothing is known about the engine"):
        bench.benchmark([lonely], on_gpu=False)
    with pytest.raises(InputError, match="not an engine"):
        bench.benchmark([DEMO / "digits.onnx"], on_gpu=False)


def test_nothing_is_timed_without_a_gpu(three: dict[str, Path]) -> None:
    with pytest.raises(MissingBackendError, match="only on an NVIDIA GPU"):
        bench.measure([three["int8"]])


@pytest.mark.gpu
def test_measured_on_the_gpu(three: dict[str, Path], gpu_for_rtx: None) -> None:
    (found,) = bench.measure([three["fp32"]], Measuring(duration_s=0.2))
    assert 0 < found.p50_ms <= found.p90_ms <= found.p99_ms
    assert found.batch == 8


def test_three_needs_scales_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing gives the scales"):
        command(str(DEMO / "digits.onnx"), "--three", "-o", str(tmp_path))
    with pytest.raises(InputError, match="one fp32 ONNX model and a folder"):
        command(str(DEMO / "digits.onnx"), "--three")


@pytest.mark.parametrize(("version", "half"), [("8.6.1", False), ("10.16.1", True)])
def test_fp16_is_the_builders_flag_where_the_model_cannot_say_it(
    version: str, half: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """TensorRT 8.6 has no strong typing: its FP16 engine is the float32 model's, with the flag."""
    built: dict[str, tuple[bool, str | None]] = {}

    class Recorder:
        def version(self) -> str:
            return version

        def build(self, model: Path, engine: Path, *, options: BuildOptions, **_: object) -> Path:
            kinds = {w.data_type for w in onnx.load(model).graph.initializer}
            built[engine.name] = (onnx.TensorProto.FLOAT16 in kinds, options.lower_precision)
            return engine

    tensorrt = types.ModuleType("tensorrt")
    tensorrt.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    monkeypatch.setattr(bench, "builder", lambda name: Recorder())
    model = DEMO / "digits.onnx"
    bench.build_three(model, model, tmp_path, backend="tensorrt")
    assert built == {
        "model.fp32.plan": (False, None),
        "model.fp16.plan": (half, None if half else "fp16"),
        "model.int8.plan": (False, None),
    }


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--iterations", "0", "--iterations is 0"),
        ("--duration", "-1", r"--duration is -1\.0"),
        ("--duration", "inf", "--duration is inf"),
        ("--warm-up", "nan", "--warm-up is nan"),
    ],
)
def test_measurements_that_cannot_be(option: str, value: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        command("model.plan", option, value)


def test_times_are_shown_with_what_they_leave_out(three: dict[str, Path]) -> None:
    measured = dataclasses.replace(
        timing(0.4, {}), clocks={"SM MHz": (1200.0, 1980.0, 1980.0), "W": (90, 300, 310)}
    )
    shown = text_of([Result(three["fp32"], bench.static_of(three["fp32"]), measured)])
    assert "p50 0.400 ms" in shown
    assert "loaded in 90 ms, first inference 4.0 ms" in shown
    assert "without copies to and from the host" in shown
    assert "TF32" in shown
    assert "SM MHz 1200/1980/1980, W 90/300/310" in shown
