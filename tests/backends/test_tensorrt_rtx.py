"""Building with TensorRT for RTX: targets, files, errors, and what a plan file says about itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from small_nets import Net

from trtq.backends import tensorrt_rtx
from trtq.backends.interface import Build, Gpu, Range, ValuedProfile
from trtq.backends.record import sidecar
from trtq.errors import InputError, MissingBackendError

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

PROFILE = {"x": Range((1, 64), (8, 64), (32, 64))}


@pytest.fixture
def quantized() -> onnx.ModelProto:
    """An INT8 matmul on N x 64."""
    net = Net()
    y = net.op("MatMul", net.qdq(net.input("N", 64)), net.weight(64, 32, axis=1), name="matmul")
    return net.model(y)


def refused(build: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        build()
    return str(caught.value)


def test_build_leaves_plan_and_record(
    quantized: onnx.ModelProto, build_engine: Callable[..., Build], tmp_path: Path
) -> None:
    result = build_engine(quantized, PROFILE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.plan", "model.plan.json"]
    plan = tensorrt_rtx.describe_plan(result.engine)
    assert plan["version"] == trt.__version__
    assert plan["bytes"] == result.engine.stat().st_size
    assert plan["targets"] == ["8.6"]
    assert plan["build"]["compiled"] == result.compiled
    assert plan["build"]["profile"] == {"x": [[1, 64], [8, 64], [32, 64]]}
    assert plan["build"]["model"] == "model.onnx"


def test_header_names_every_target(build_engine: Callable[..., Build]) -> None:
    net = Net()
    model = net.model(net.op("Relu", net.input(2, 8)))
    for target in tensorrt_rtx.supported_targets():
        assert tensorrt_rtx.describe_plan(build_engine(model, targets=[target]).engine)["targets"] == [target]


def test_several_targets_run_the_graph_of_the_lowest(
    quantized: onnx.ModelProto, build_engine: Callable[..., Build]
) -> None:
    lowest = build_engine(quantized, PROFILE, ["8.6"])
    several = build_engine(quantized, PROFILE, ["8.9", "8.6", "8.9"])
    assert several.targets == ("8.9", "8.6")
    assert tensorrt_rtx.describe_plan(several.engine)["targets"] == ["8.6", "8.9"]
    assert kernels(several) == kernels(lowest)


def test_builds_repeat_kernel_by_kernel(
    quantized: onnx.ModelProto, build_engine: Callable[..., Build]
) -> None:
    assert kernels(build_engine(quantized, PROFILE)) == kernels(build_engine(quantized, PROFILE))


def kernels(build: Build) -> list[tuple[object, ...]]:
    """The compiled graph without TensorRT's internal tensor numbers."""
    return [
        (
            layer.kind,
            layer.onnx_nodes,
            *((t.dims, t.datatype, t.format) for t in layer.inputs + layer.outputs),
        )
        for layer in build.compiled.layers
    ]


def test_default_target_is_the_gpu_here_or_the_builders_set(
    quantized: onnx.ModelProto, build_engine: Callable[..., Build]
) -> None:
    result = build_engine(quantized, PROFILE, targets=())
    named = tensorrt_rtx.describe_plan(result.engine)["targets"]
    assert named == list(result.targets) if result.targets else {"8.0", "8.6", "8.9", "12.0"} <= set(named)


@pytest.mark.parametrize(
    ("gpu", "cause"),
    [
        (None, "no GPU or no NVIDIA driver"),
        (Gpu("NVIDIA H200", "9.0"), "does not run on NVIDIA H200, compute capability 9.0"),
    ],
)
def test_the_gpu_here_is_no_target_where_no_engine_runs(
    gpu: Gpu | None,
    cause: str,
    quantized: onnx.ModelProto,
    build_engine: Callable[..., Build],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For an H200 the builder makes one without a word, and it loads nowhere."""
    monkeypatch.setattr(tensorrt_rtx, "find_gpu", lambda: gpu)
    with pytest.raises(MissingBackendError, match="is the GPU in this machine") as refused:
        build_engine(quantized, targets=["current"], profile=PROFILE)
    assert cause in str(refused.value.cause)


@pytest.mark.parametrize(
    ("capability", "runs"), [("7.5", True), ("8.7", False), ("8.9", True), ("9.0", False), ("12.3", True)]
)
def test_gpus_that_engines_run_on(capability: str, runs: bool) -> None:
    assert tensorrt_rtx.runs_on(capability) == runs


def test_unknown_target(quantized: onnx.ModelProto, build_engine: Callable[..., Build]) -> None:
    message = refused(lambda: build_engine(quantized, PROFILE, ["8.6", "3.5"]))
    assert "3.5" in message
    assert ", ".join(tensorrt_rtx.supported_targets()) in message


def test_weights_in_a_file_beside_the_model(build_engine: Callable[..., Build], tmp_path: Path) -> None:
    net = Net()
    model = net.model(net.op("MatMul", net.input(8, 64), net.weight(64, 256), name="matmul"))
    path = tmp_path / "big.onnx"
    onnx.save(model, path, save_as_external_data=True, location="big.bin", size_threshold=0)
    assert b"big.bin" in path.read_bytes()
    assert build_engine(path).engine.stat().st_size > 64 * 256 * 4
    (tmp_path / "big.bin").unlink()
    assert "big.onnx" in refused(lambda: build_engine(path))


def test_attention_in_float32_hints_at_half(build_engine: Callable[..., Build]) -> None:
    """TensorRT for RTX 1.7 has kernels for ONNX's Attention in half alone."""
    net = Net(23)
    q, k, v = (net.input(2, 4, 64, 32, name=name) for name in "qkv")
    assert "--rest fp16" in refused(lambda: build_engine(net.model(net.op("Attention", q, k, v))))


def test_parser_errors_name_node_and_remedy(build_engine: Callable[..., Build], tmp_path: Path) -> None:
    net = Net()
    x = net.op("QuantizeLinear", net.input(8, 64), np.float32(0.1), np.int8(3), name="shifted", dtype=np.int8)
    affine = net.model(net.op("DequantizeLinear", x, np.float32(0.1), np.int8(3)))
    message = refused(lambda: build_engine(affine))
    assert "'shifted' (QuantizeLinear)" in message
    assert "zero-point 0" in message

    net = Net()
    unknown = net.model(net.op("NoSuchOperator", net.input(8, 64), name="odd"))
    message = refused(lambda: build_engine(unknown))
    assert "'odd' (NoSuchOperator)" in message
    assert "no such operator" in message

    net = Net()
    mismatch = net.model(net.op("MatMul", net.input(8, 64), net.weight(63, 2), name="mismatch"))
    message = refused(lambda: build_engine(mismatch))
    assert "'mismatch' (MatMul)" in message
    assert "must match" in message
    assert "cudaError" not in message  # the missing driver has nothing to do with it

    net = Net()
    bias = net.op("DequantizeLinear", np.ones(64, np.int32), np.float32(0.1), np.int32(0), name="bias")
    message = refused(lambda: build_engine(net.model(net.op("Add", net.input(8, 64), bias))))
    assert "'bias' (DequantizeLinear)" in message
    assert "leave biases in floating point" in message
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_builder_errors_are_passed_on(build_engine: Callable[..., Build]) -> None:
    net = Net()
    fp32 = net.model(net.op("MatMul", net.input(8, 64), net.weight(64, 64), name="fp32_matmul"))
    message = refused(lambda: build_engine(fp32, targets=["7.5"]))
    assert "fp32_matmul" in message
    assert "leave 7.5 out" in message


def test_warnings_are_passed_on(build_engine: Callable[..., Build]) -> None:
    net = Net(dtype=np.int64)
    x = net.input(2, 8, name="ids")
    warnings = build_engine(net.model(net.op("Add", x, x))).warnings
    assert any("ids" in warning and "Int64" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("profile", "problem"),
    [
        ({}, "does not name it"),
        ({"y": Range((1, 64), (1, 64), (1, 64))}, "no input of the model"),
        ({"x": Range((1, 63), (1, 63), (1, 63))}, "1x63 does not fit"),
        ({"x": Range((1,), (1,), (1,))}, "shape 1 does not fit"),
    ],
)
def test_profiles_that_do_not_fit(
    profile: dict[str, Range], problem: str, quantized: onnx.ModelProto, build_engine: Callable[..., Build]
) -> None:
    assert problem in refused(lambda: build_engine(quantized, profile))


def test_files_that_are_no_models(build_engine: Callable[..., Build], tmp_path: Path) -> None:
    assert "does not exist" in refused(lambda: build_engine(tmp_path / "absent.onnx"))
    for content in (b"", b"hello world", b"\x80" * 100):
        (tmp_path / "junk.onnx").write_bytes(content)
        assert "junk.onnx" in refused(lambda: build_engine(tmp_path / "junk.onnx"))
    assert not (tmp_path / "model.plan").exists()


def test_files_that_are_no_plans(
    quantized: onnx.ModelProto, build_engine: Callable[..., Build], tmp_path: Path
) -> None:
    engine = build_engine(quantized, PROFILE).engine
    whole = engine.read_bytes()
    for content, problem in [
        (b"", "not an engine"),
        (b"hello" * 20, "not an engine"),
        (whole[:40], "not an engine"),
        (whole[:-1], "truncated"),
        (whole[:8] + b"\x09" + whole[9:], "format 9"),
    ]:
        engine.write_bytes(content)
        assert problem in refused(lambda: tensorrt_rtx.describe_plan(engine))
    assert "cannot read" in refused(lambda: tensorrt_rtx.describe_plan(tmp_path / "absent.plan"))


def test_records_of_other_engines_are_ignored(
    quantized: onnx.ModelProto, build_engine: Callable[..., Build]
) -> None:
    engine = build_engine(quantized, PROFILE).engine
    record = sidecar(engine)
    record.write_text(record.read_text().replace(tensorrt_rtx.describe_plan(engine)["sha256"], "0" * 64))
    assert tensorrt_rtx.describe_plan(engine)["build"] is None
    record.write_text("{}")
    assert "damaged" in refused(lambda: tensorrt_rtx.describe_plan(engine))
    record.unlink()
    assert tensorrt_rtx.describe_plan(engine)["build"] is None


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # as Python marks a module that cannot be imported
    with pytest.raises(MissingBackendError, match=r"pip install 'trtq\[rtx\]'"):
        tensorrt_rtx.build(tmp_path / "model.onnx", tmp_path / "model.plan")


def test_a_failed_build_does_not_lock_the_next_one(tmp_path: Path) -> None:
    """Builders kept alive by tracebacks are collected now and then, but never inside TensorRT.

    In a process of its own, with collections at every possible moment: without the pause it never ends.
    """
    code = """
import gc, sys
from trtq.backends.tensorrt_rtx import build
from trtq.errors import InputError
for allocations in range(20, 320):
    gc.set_threshold(allocations, 1, 1)
    try:
        build(sys.argv[1], sys.argv[2])
    except InputError as error:
        error.itself = error  # a cycle, as frames and tracebacks make them
        gc.set_threshold(0)
print("done")
"""
    net = Net()
    onnx.save(net.model(net.op("NoSuchOperator", net.input(8, 64), name="odd")), tmp_path / "odd.onnx")
    command = [sys.executable, "-c", code, str(tmp_path / "odd.onnx"), str(tmp_path / "odd.plan")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert run.stdout == "done\n"


def test_several_profiles(quantized: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(quantized, tmp_path / "m.onnx")
    large = {"x": Range((64, 64), (128, 64), (256, 64))}

    def build(*further: dict[str, Range]) -> Build:
        return tensorrt_rtx.build(
            tmp_path / "m.onnx", tmp_path / "m.plan", profile=PROFILE, further=further, targets=["8.6"]
        )

    with pytest.raises(InputError, match="names 'z', which is no input"):
        build(large, {**large, "z": large["x"]})
    record = tensorrt_rtx.describe_plan(build(large).engine)["build"]
    assert record["profile"] == {"x": [[1, 64], [8, 64], [32, 64]]}
    assert record["further_profiles"] == [{"x": [[64, 64], [128, 64], [256, 64]]}]
    assert record["compiled"].batch == 8


@pytest.mark.parametrize(
    ("dims", "shapes"),
    [
        (("?", 3, "?", "?"), ((1, 3, 16, 24), (4, 3, 16, 24), (8, 3, 16, 24))),
        (("n", 3, "s", "s"), ((1, 3, 16, 24), (4, 3, 16, 24), (8, 3, 32, 24))),
        (("n", 3, "s", "s"), ((1, 3, 16, 16), (4, 3, 24, 24), (8, 3, 32, 32))),
        (("n", 3, "n", "n"), ((1, 3, 16, 24), (4, 3, 16, 24), (8, 3, 32, 32))),
    ],
)
def test_axes_of_one_name_that_differ(
    dims: tuple[int | str, ...], shapes: tuple[tuple[int, ...], ...], build_engine: Callable[..., Build]
) -> None:
    """TensorRT refuses a profile in which axes of one name differ; exporters call every open axis "?"."""
    net = Net()
    model = net.model(net.op("Conv", net.input(*dims), net.const(np.ones((4, 3, 3, 3), np.float32))))
    assert build_engine(model, {"x": Range(*shapes)}).compiled.kernels


def test_an_input_that_is_also_an_output_keeps_its_name(build_engine: Callable[..., Build]) -> None:
    """TensorRT's parser would call it `__x`, and the profile would not fit."""
    net = Net()
    x = net.input("N", 64)
    model = net.model(net.op("Relu", x))
    model.graph.output.append(model.graph.input[0])
    built = build_engine(model, PROFILE)
    assert {t.name for layer in built.compiled.layers for t in layer.inputs} >= {"x"}
    assert {t.name for layer in built.compiled.layers for t in layer.outputs} >= {"x_input_as_output"}


RESIZED = """<ir_version: 8, opset_import: ["": 17]>
g (float[N,4,8,8] x, int64[2] size, int32[2] other) => (float[N,4,h,w] y, int32[2] z) {
  all = Shape(x)  lead = Slice(all, from, to)
  sizes = Concat<axis=0>(lead, size)  y = Resize<mode="nearest">(x, , , sizes)  z = Neg(other)
}"""


def resized() -> onnx.ModelProto:
    """An input whose values are the sizes of the output, and one of the same kind that decides nothing."""
    model = onnx.parser.parse_model(RESIZED)
    for name, value in (("from", 0), ("to", 2)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value]), name))
    return model


def test_values_that_decide_shapes_have_ranges(build_engine: Callable[..., Build]) -> None:
    """What else is held makes no shapes, and no profile."""
    shapes = {"x": Range((1, 4, 8, 8), (2, 4, 8, 8), (4, 4, 8, 8))}
    held = {"size": Range((8, 12), (16, 16), (64, 32)), "other": Range((0, 0), (1, 1), (2, 2))}
    built = build_engine(resized(), ValuedProfile(shapes, held))
    assert built.compiled.kernels
    record = json.loads(sidecar(built.engine).read_text())
    assert record["profile_values"] == {"size": [[8, 12], [16, 16], [64, 32]]}
    assert record["profile"].keys() == {"x"}


@pytest.mark.parametrize("profile", [None, {}])
def test_without_them_the_input_is_named(
    profile: dict[str, Range] | None, build_engine: Callable[..., Build]
) -> None:
    model = resized()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    message = refused(lambda: build_engine(model, profile))
    assert "the values of input 'size' decide shapes" in message
    assert "--data" in message
    assert build_engine(
        model, ValuedProfile({}, {"size": Range((8, 8), (16, 16), (32, 32))})
    ).compiled.kernels
