"""TensorRT proper: its API as NVIDIA's bindings have it, what the ONNX parser makes of nodes, and refusals.

Its builder needs TensorRT's libraries and a GPU. What is shared with TensorRT for RTX runs there.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
from contract.bindings import run_checks
from nets import net
from small_nets import Net

from trtq.backends import builders, tensorrt, tensorrt_rtx
from trtq.backends.builders import builder, chosen, describe_engine, engine_package
from trtq.backends.calibrators import DataCalibrator, TableCalibrator
from trtq.backends.dialect import dialect_of
from trtq.backends.interface import BuildOptions, Gpu, Range
from trtq.backends.network import compile_plan, logger, optimization_profile, use_timing_cache
from trtq.backends.record import sidecar
from trtq.calibration.table import Table
from trtq.data.samples import Samples
from trtq.errors import InputError, MissingBackendError
from trtq.files import sha256_file
from trtq.graph.inputs import InputSpec
from trtq.job import for_builder, with_timing_cache
from trtq.recipe import Recipe

GPU = Gpu("A100", "8.0", "570.86")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["8.6.1", "10.0.1", "10.3.0", "10.8.0", "10.16.1", "11.4.0"])
def test_every_name_used_is_in_nvidias_bindings(version: str, downloads: Path, tmp_path: Path) -> None:
    run_checks("check_builder.py", version, downloads, tmp_path)


def module(version: str) -> types.ModuleType:
    found = types.ModuleType("tensorrt")
    found.__version__ = version
    return found


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("8.5.3.1", "TensorRT 8.5"),
        ("8.6.1", "TensorRT 8.6"),
        ("9.2.0", "TensorRT 8.6"),  # as 8.6 is asked, which 9 still understands
        ("10.0.1", "TensorRT 10"),
        ("10.16.1.11", "TensorRT 10"),
        ("11.4.0.106", "TensorRT 11"),
        ("12.0.0", "TensorRT 11"),
    ],
)
def test_versions(version: str, name: str) -> None:
    assert dialect_of(module(version)).name == name


def test_versions_too_old() -> None:
    with pytest.raises(InputError, match=r"8\.4\.3 is too old"):
        dialect_of(module("8.4.3"))


@pytest.mark.parametrize(
    ("version", "options", "problem"),
    [
        ("8.5.3", BuildOptions(version_compatible=True), "version_compatible"),
        ("8.5.3", BuildOptions(optimization_level=5), "optimization_level"),
        ("8.6.1", BuildOptions(strip_weights=True), "strip_weights"),
        ("8.6.1", BuildOptions(lower_precision="bf16"), "bf16"),
        ("11.4.0", BuildOptions(lower_precision="fp16"), "lower_precision"),
        ("11.4.0", BuildOptions(dla_core=0, refit=True), "dla_core"),
    ],
)
def test_options_that_a_version_lacks(version: str, options: BuildOptions, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        dialect_of(module(version)).check(options)


def test_options_that_a_version_has() -> None:
    everything = BuildOptions(
        timing_cache=Path("t"),
        workspace=1,
        optimization_level=5,
        version_compatible=True,
        hardware_compatible=True,
        dla_core=0,
        refit=True,
        strip_weights=True,
        lower_precision="bf16",
    )
    dialect_of(module("10.16.1")).check(everything)
    for version in ("8.6.1", "10.16.1", "11.4.0"):
        dialect_of(module(version)).check(BuildOptions())
    assert BuildOptions().given() == []
    assert BuildOptions(refit=True, workspace=0).given() == ["workspace", "refit"]


def test_rtx_refuses_options_it_ignores(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    net = Net()
    onnx.save(net.model(net.op("Relu", net.input(2, 8))), tmp_path / "m.onnx")

    def build(**options: object) -> None:
        tensorrt_rtx.build(
            tmp_path / "m.onnx", tmp_path / "m.plan", targets=["8.6"], options=BuildOptions(**options)
        )

    for options in ({"optimization_level": 5}, {"hardware_compatible": True}, {"version_compatible": True}):
        with pytest.raises(InputError, match=f"TensorRT for RTX has no option {next(iter(options))}"):
            build(**options)
    with pytest.raises(MissingBackendError, match="refittable engines on a GPU only"):
        build(strip_weights=True)
    build(workspace=1 << 28)
    assert json.loads(sidecar(tmp_path / "m.plan").read_text())["options"] == {"workspace": str(1 << 28)}


@pytest.mark.parametrize(("kind", "found"), [("float", set()), ("float16", {"fp16"}), ("bfloat16", {"bf16"})])
def test_types_of_16_bits_are_seen_in_a_network(kind: str, found: set[str]) -> None:
    """A weakly typed build of TensorRT 8.5 fails without FP16 for them."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    model = net(f"g ({kind}[2,8] x) => ({kind}[2,8] y) {{ h = Relu(x) y = Relu(h) }}")
    network = trt.Builder(trt.Logger()).create_network()
    assert trt.OnnxParser(network, trt.Logger()).parse(model.SerializeToString())
    assert tensorrt.half_types(trt, network) == found


def test_a_version_11_network_builds_with_the_real_parser_and_builder(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    net = Net()
    y = net.op("MatMul", net.qdq(net.input(8, 64)), net.weight(64, 32, axis=1), name="matmul")
    onnx.save(net.model(y), tmp_path / "m.onnx")
    seen = []

    def prepare(builder: object, network: object, config: object) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM86, 0)
        seen.append(network.num_outputs)

    made = compile_plan(
        trt,
        dialect_of(module("11.4.0")),
        tmp_path / "m.onnx",
        (),
        BuildOptions(),
        strongly_typed=True,
        prepare=prepare,
    )
    assert seen == [1]
    assert tensorrt_rtx.is_plan(bytes(memoryview(made.plan))[:64])


def test_layers_of_onnx_nodes_in_a_parsed_network(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    net = Net()
    x = net.input("N", 3, 8, 8)
    x = net.op("Conv", x, net.weight(4, 3, 3, 3), np.zeros(4, np.float32), name="first/conv", pads=[1] * 4)
    x = net.op("Relu", x, name="relu")
    x = net.op("Flatten", net.op("GlobalAveragePool", x, name="pool"), name="flatten")
    x = net.op("Gemm", x, net.weight(4, 5), np.ones(5, np.float32), name="head")
    onnx.save(net.model(x), tmp_path / "m.onnx")
    log = logger(trt)
    built = trt.Builder(log)
    network = built.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(tmp_path / "m.onnx"))

    def found(*nodes: str) -> set[object]:
        return {layer.type for layer in tensorrt.layers_of(trt, network, nodes, tmp_path / "m.onnx")}

    assert found("first/conv") == {trt.LayerType.CONVOLUTION}
    assert trt.LayerType.MATRIX_MULTIPLY in found("head")  # and the bias
    assert trt.LayerType.CONVOLUTION not in found("head")
    assert found() == set()
    with pytest.raises(InputError, match="no layer of node 'absent'"):
        found("first/conv", "absent")
    some = tensorrt.layers_of(trt, network, ["relu", "absent"], tmp_path / "m.onnx", all_of_them=False)
    assert [layer.type for layer in some] == [trt.LayerType.ACTIVATION]


@pytest.mark.parametrize("quantized", [True, False])
def test_dla_is_implicit(quantized: bool, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    net = Net()
    x = net.input(8, 64)
    onnx.save(
        net.model(net.op("MatMul", net.qdq(x) if quantized else x, net.weight(64, 32))), tmp_path / "m.onnx"
    )
    log = logger(trt)
    built = trt.Builder(log)
    network = built.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(tmp_path / "m.onnx"))
    tensorrt.refuse_dla(trt, network, BuildOptions(), tmp_path / "m.onnx")
    if not quantized:
        tensorrt.refuse_dla(trt, network, BuildOptions(dla_core=1), tmp_path / "m.onnx")
        return
    with pytest.raises(InputError, match="DLA runs no explicit quantization") as caught:
        tensorrt.refuse_dla(trt, network, BuildOptions(dla_core=1), tmp_path / "m.onnx")
    assert "--table calibration.cache --dla-core 1" in str(caught.value)


@pytest.mark.parametrize(
    ("version", "given", "implicit", "rest", "lower", "weights"),
    [
        ("8.6.1", {"rest": "fp16"}, False, "fp32", "fp16", "qdq"),
        ("8.6.1", {"rest": "fp32"}, False, "fp32", None, "qdq"),
        ("8.6.1", {"rest": "fp16", "weights": "int8"}, False, "fp32", "fp16", "int8"),
        ("10.16.1", {"rest": "fp16"}, False, "fp16", None, None),
        ("10.16.1", {"rest": "fp16"}, True, "fp32", "fp16", None),
        ("10.16.1", {"rest": "fp32"}, True, "fp32", None, None),
        ("10.16.1", {"rest": "fp16", "lower_precision": "bf16"}, False, "fp32", "bf16", None),
        ("11.4.0", {"rest": "fp16"}, False, "fp16", None, None),
    ],
)
def test_half_and_weights_as_the_version_takes_them(
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    given: dict[str, str],
    implicit: bool,
    rest: str,
    lower: str | None,
    weights: str | None,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", module(version))
    recipe = for_builder(Recipe(backend="tensorrt", **given), implicit=implicit)
    assert (recipe.precision, recipe.lower_precision, recipe.weights) == (rest, lower, weights)


def test_calibration_runs_at_the_shapes_of_the_batches(tmp_path: Path) -> None:
    """Not at the profile's optimum: TensorRT reads as much of each buffer as the calibration profile says."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    profile = {"x": Range((1, 4, 16), (8, 32, 16), (32, 64, 16))}
    rows = np.ones((5, 12, 16), np.float32)
    samples = Samples(
        "here.npz", (InputSpec("x", np.dtype(np.float32), ("N", "L", 16)),), {"x": rows}, {}, "0" * 64
    )
    fed = DataCalibrator(samples, {"x": (8, 12, 16)}, 8, None, object(), True, None)
    given = TableCalibrator(Table.from_bytes(b"TRT-101601-EntropyCalibration2\n"))
    assert tensorrt.calibration_profile(fed, profile) == {"x": Range(*[(8, 12, 16)] * 3)}
    assert tensorrt.calibration_profile(given, profile) == {"x": Range(*[(8, 32, 16)] * 3)}

    net = Net()
    onnx.save(net.model(net.op("MatMul", net.input("N", "L", 16), net.weight(16, 8))), tmp_path / "m.onnx")
    log = logger(trt)
    built = trt.Builder(log)
    network = built.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(tmp_path / "m.onnx"))
    made = optimization_profile(built, network, tensorrt.calibration_profile(fed, profile), {}, tmp_path)
    assert [tuple(shape) for shape in made.get_shape("x")] == [(8, 12, 16)] * 3
    fed.shapes = {"x": (8, 12, 15)}
    with pytest.raises(InputError, match="shape 8x12x15 does not fit input 'x'"):
        optimization_profile(built, network, tensorrt.calibration_profile(fed, profile), {}, tmp_path)


def test_without_gpu_or_package(tmp_path: Path) -> None:
    with pytest.raises(MissingBackendError, match=r"TensorRT is not installed|on a GPU only"):
        tensorrt.build(tmp_path / "m.onnx", tmp_path / "m.plan")
    with pytest.raises(MissingBackendError, match="on a GPU only"):
        tensorrt.check_targets(["8.6"])


def test_builders_by_name() -> None:
    assert builder("tensorrt-rtx") is tensorrt_rtx
    assert builder("tensorrt") is tensorrt
    with pytest.raises(InputError, match="choose among tensorrt-rtx, tensorrt"):
        builder("tensorrt11")
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    assert builder() is tensorrt_rtx
    assert builder().version() == __import__("tensorrt_rtx").__version__


class TimingConfig:
    """What a builder's configuration does with timings: it takes its own, and empty ones."""

    def __init__(self) -> None:
        self.timings: bytes | None = None

    def create_timing_cache(self, content: bytes) -> bytes | None:
        return None if content == b"unreadable" else content

    def set_timing_cache(self, timings: bytes, *, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if timings not in (b"", b"timings"):
            return False
        self.timings = timings
        return True


@pytest.mark.parametrize("content", [None, b"timings"])
@pytest.mark.parametrize("own", [False, True])
def test_timings_are_read_where_they_are(own: bool, content: bytes | None, tmp_path: Path) -> None:
    config, path = TimingConfig(), tmp_path / "t"
    if content is not None:
        path.write_bytes(content)
    assert use_timing_cache(config, path, own=own) == ()
    assert config.timings == (content or b"")


@pytest.mark.parametrize("content", [b"of another GPU", b"unreadable"])
def test_timings_that_are_refused(content: bytes, tmp_path: Path) -> None:
    """Those of trtq's own cache are made again; a user's file is not touched."""
    config, path = TimingConfig(), tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(InputError, match="TensorRT refuses the timing cache"):
        use_timing_cache(config, path, own=False)
    assert config.timings is None
    (note,) = use_timing_cache(config, path, own=True)
    assert str(path) in note
    assert "it is replaced" in note
    assert config.timings == b""


def test_a_job_times_kernels_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def timing_cache(version: str, gpu: Gpu | None, **given: str) -> str | None:
        monkeypatch.setitem(sys.modules, "tensorrt", module(version))
        monkeypatch.setattr("trtq.job.find_gpu", lambda: gpu)
        return with_timing_cache(Recipe(cache=str(tmp_path), **given)).timing_cache

    here = timing_cache("10.16.1", GPU, backend="tensorrt")
    assert here is not None
    assert Path(here).parent == tmp_path / "timing"
    assert timing_cache("10.16.1", GPU, backend="tensorrt") == here
    others = [("10.13.0", GPU), ("10.16.1", Gpu(GPU.name, "8.0", "580.1")), ("10.16.1", Gpu("A10", "8.6"))]
    assert len({here, *(timing_cache(*other, backend="tensorrt") for other in others)}) == 4
    assert timing_cache("10.16.1", GPU, backend="tensorrt", timing_cache="/own") == "/own"
    assert Recipe(cache=str(tmp_path), timing_cache=here).build_options().own_timing_cache
    assert not Recipe(cache=str(tmp_path), timing_cache="/own").build_options().own_timing_cache
    assert timing_cache("10.16.1", GPU, backend="tensorrt-rtx") is None
    assert timing_cache("10.16.1", None, backend="tensorrt") is None


@pytest.mark.parametrize(
    ("gpu", "beside", "name"),
    [
        (None, True, "tensorrt-rtx"),
        (Gpu("GeForce RTX 4090", "8.9"), True, "tensorrt-rtx"),
        (Gpu("H100", "9.0"), True, "tensorrt"),
        (Gpu("H100", "9.0"), False, "tensorrt-rtx"),
    ],
)
def test_the_builder_is_the_one_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, beside: bool, name: str
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    monkeypatch.setattr(builders, "find_gpu", lambda: gpu)
    if beside:
        installed = module("10.16.1")
        installed.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
        monkeypatch.setitem(sys.modules, "tensorrt", installed)
    elif importlib.util.find_spec("tensorrt"):
        pytest.skip("TensorRT is installed here")
    assert chosen() == name
    assert chosen("tensorrt-rtx") == "tensorrt-rtx"


def test_other_cards_than_rtx_builds_for_need_tensorrt() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    for target in ("9.0", "8.7"):
        with pytest.raises(InputError, match=f"does not build for compute capability {target}") as caught:
            tensorrt_rtx.check_targets(["8.6", target])
        assert "--backend tensorrt" in str(caught.value)


def test_the_package_that_runs_a_plan() -> None:
    rtx = b"vtrt" + bytes(4) + (2).to_bytes(8, "little") + bytes(8) + bytes([1, 7, 1, 116]) + bytes(36)
    assert len(rtx) == 64
    assert engine_package(rtx) == "tensorrt_rtx"
    assert engine_package(rtx[:24] + bytes([10, 16, 1, 11]) + rtx[28:]) == "tensorrt"
    assert engine_package(b"ftrt" + rtx[4:]) == "tensorrt"
    assert engine_package(b"") == "tensorrt"


def test_engines_of_tensorrt_are_described_from_their_record(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    net = Net()
    onnx.save(net.model(net.op("Relu", net.input(2, 8))), tmp_path / "m.onnx")
    built = tensorrt_rtx.build(tmp_path / "m.onnx", tmp_path / "m.plan", targets=["8.6"])
    assert describe_engine(built.engine) == {
        "backend": "tensorrt-rtx",
        **tensorrt_rtx.describe_plan(built.engine),
    }
    record = json.loads(sidecar(built.engine).read_text())
    foreign = tmp_path / "other.plan"
    foreign.write_bytes(b"ftrt of TensorRT")
    with pytest.raises(InputError, match="not an engine"):
        describe_engine(foreign)
    record |= {"engine_sha256": sha256_file(foreign), "builder": "tensorrt", "version": "10.16.1"}
    sidecar(foreign).write_text(json.dumps(record))
    described = describe_engine(foreign)
    assert (described["backend"], described["version"], described["bytes"]) == ("tensorrt", "10.16.1", 16)
    assert described["build"]["compiled"] == built.compiled
