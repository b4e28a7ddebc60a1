"""Engines run, timed and refused on a machine that seems to have a GPU: each message, each exit code."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from jobs import trtq_command
from standin import make_plan

from trtq.backends import bench
from trtq.backends.cuda import CudaError, open_cuda
from trtq.backends.engine import batch_limits, input_specs, run_engine, why_not_loaded
from trtq.backends.record import sidecar
from trtq.backends.runner import Profile, open_engine
from trtq.backends.tensors import Tensor
from trtq.backends.timing import Measuring, measure
from trtq.data.samples import Samples
from trtq.errors import InputError, MissingBackendError, TrtqError
from trtq.files import sha256_file, write_json
from trtq.graph.inputs import InputSpec

DRIVER = ctypes.CDLL("libcuda.so.1")
DRIVER.standin_used.restype = ctypes.c_size_t
X = np.random.default_rng(0).normal(size=(17, 3)).astype(np.float32)
QUICK = Measuring(warm_up_ms=5, duration_s=0.02, iterations=10)
OLD = pytest.mark.skipif(
    os.environ.get("TRTQ_STANDIN_VERSION", "").startswith("8."), reason="TensorRT 8.6 has no such thing"
)
RANGES = [[2, 3], [4, 3], [8, 3]]
BATCHES = [{"x": RANGES}]


def model(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 17]> g {text}')


NEGATION = model("(float[n,3] x) => (float[n,3] y) { y = Neg(x) }")


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    """Writes a plan of a model, by default one that negates."""

    def write(made: onnx.ModelProto = NEGATION, **says: Any) -> Path:
        path = tmp_path / "m.plan"
        path.write_bytes(make_plan(made, **{"profiles": BATCHES, **says}))
        return path

    return write


def invalid(plan: Path, bits: int) -> Path:
    """A plan of RTX that is refused for these reasons (`EngineInvalidityDiagnostics`)."""
    content = bytearray(plan.read_bytes())
    content[40:44] = bits.to_bytes(4, "little")
    plan.write_bytes(content)
    return plan


def samples(x: np.ndarray = X, **more: np.ndarray) -> Samples:
    columns = {"x": x, **more}
    specs = tuple(InputSpec(n, a.dtype, ("n", *a.shape[1:])) for n, a in columns.items())
    return Samples("rows", specs, columns, {}, "0" * 64)


# --- what engines give ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rtx", [False, True])
@pytest.mark.parametrize("batch", [None, 2, 5, 8])
def test_rows_in_batches(plan: Any, rtx: bool, batch: int | None) -> None:
    found = run_engine(plan(rtx=rtx), samples(), batch_size=batch)
    assert found.executor == "engine"
    np.testing.assert_array_equal(found.arrays["y"], -X)


def test_nothing_is_left_on_the_device(plan: Any) -> None:
    run_engine(plan(), samples())
    with pytest.raises(InputError):
        run_engine(plan(fails="execute"), samples())
    assert DRIVER.standin_used() == 0


def test_inputs_are_asked_of_the_engine(plan: Any) -> None:
    assert input_specs([plan()]) == [InputSpec("x", np.dtype(np.float32), (None, 3))]


def test_the_profile_that_takes_the_shape(plan: Any) -> None:
    """Two of them: one row, or 4 to 8 rows."""
    path = plan(profiles=[{"x": [[1, 3]] * 3}, {"x": [[4, 3], [4, 3], [8, 3]]}])
    with open_engine(path) as engine:
        for rows in (1, 8, 1, 4):
            np.testing.assert_array_equal(engine.infer({"x": X[:rows]})["y"], -X[:rows])
        with pytest.raises(InputError, match="no optimization profile") as caught:
            engine.infer({"x": X[:3]})
    assert "profile 0: x: 3x3 is not within 1x3 to 1x3" in str(caught.value)
    assert "profile 1: x: 3x3 is not within 4x3 to 8x3" in str(caught.value)
    np.testing.assert_array_equal(run_engine(path, samples()).arrays["y"], -X)


@pytest.mark.parametrize(
    ("profiles", "limits"),
    [
        ([(1, 4)], (1, 4)),
        ([(1, 32), (1, 8)], (1, 8)),  # what both take: rows of any length stay in one of them
        ([(1, 1), (4, 16)], (4, 16)),
    ],
)
def test_rows_at_once(profiles: list[tuple[int, int]], limits: tuple[int, int]) -> None:
    from trtq.backends.interface import Range

    made = [Profile({"x": Range((low, 3), (low, 3), (high, 3))}, {}) for low, high in profiles]
    assert batch_limits(made, {}) == limits


@pytest.mark.parametrize(("kind", "most"), [("FLOAT", 0), ("HALF", 2**-10), ("BF16", 2**-7)])
def test_floats_of_an_engine(plan: Any, kind: str, most: float) -> None:
    """Relative to the value; a float has 23, 10 or 7 bits behind the point, and it is rounded twice."""
    found = run_engine(plan(kinds={"x": kind, "y": kind}), samples()).arrays["y"]
    assert found.dtype == (np.float16 if kind == "HALF" else np.float32)
    np.testing.assert_allclose(found.astype(np.float64), -X.astype(np.float64), rtol=most, atol=0)


def test_bfloat16_goes_to_the_nearest() -> None:
    tensor = Tensor("x", "BF16", (-1,), True, False)
    exact = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, -0.0, np.inf, np.nan, 3.4e38], np.float32)
    back = tensor.values(tensor.stored(exact))
    np.testing.assert_array_equal(back, [1, 1, 1 + 2**-6, -0.0, np.inf, np.nan, np.inf])
    assert np.signbit(back[3])


@pytest.mark.parametrize(("kind", "numbers"), [("INT8", np.int8), ("INT64", np.int64), ("BOOL", bool)])
def test_integers_of_an_engine(plan: Any, kind: str, numbers: type) -> None:
    element = {"INT8": "int8", "INT64": "int64", "BOOL": "bool"}[kind]
    x = np.array([[0, 1, 0], [1, 1, 0]]).astype(numbers)
    path = plan(model(f"({element}[n,3] x) => ({element}[n,3] y) {{ y = Identity(x) }}"))
    found = run_engine(path, samples(x)).arrays["y"]
    assert found.dtype == numbers
    np.testing.assert_array_equal(found, x)


def test_int64_data_for_an_engine_that_reads_int32(plan: Any) -> None:
    path = plan(model("(int64[n,3] x) => (int64[n,3] y) { y = Neg(x) }"), kinds={"x": "INT32", "y": "INT32"})
    x = np.array([[1, -2, 2**31 - 1], [0, 5, -(2**31) + 1]])
    np.testing.assert_array_equal(run_engine(path, samples(x)).arrays["y"], -x)
    with pytest.raises(InputError, match="is INT32 and cannot hold the data's values"):
        run_engine(path, samples(x + 1))


def test_values_that_half_cannot_hold(plan: Any) -> None:
    path = plan(kinds={"x": "HALF"})
    large = np.where(X > 1, np.float32(70000), X)
    with pytest.raises(InputError, match="is HALF and cannot hold the data's values"):
        run_engine(path, samples(large))


def test_a_static_engine(plan: Any) -> None:
    fixed = model("(float[4,3] x) => (float[4,3] y) { y = Neg(x) }")
    np.testing.assert_array_equal(run_engine(plan(fixed, profiles=[{}]), samples()).arrays["y"], -X)


def test_an_output_that_is_also_an_input_has_its_name(plan: Any) -> None:
    """The network calls it otherwise; an output whose own name ends alike keeps that."""
    text = "(float[n,3] x) => (float[n,3] x_input_as_output, float[n,3] y_input_as_output)"
    path = plan(model(text + " { x_input_as_output = Identity(x) y_input_as_output = Neg(x) }"))
    with open_engine(path) as engine:
        found = engine.infer({"x": X[:8]})
    assert found.keys() == {"x", "y_input_as_output"}
    np.testing.assert_array_equal(found["x"], X[:8])
    np.testing.assert_array_equal(found["y_input_as_output"], -X[:8])


def test_scalars(plan: Any) -> None:
    path = plan(model("(float x) => (float y) { y = Neg(x) }"), profiles=[{}])
    with open_engine(path) as engine:
        assert batch_limits(engine.profiles, {}) == (1, None)
        found = engine.infer({"x": np.array(2, np.float32)})["y"]
        assert found.shape == ()
        assert found == -2


def test_arrays_of_any_layout(plan: Any) -> None:
    with open_engine(plan()) as engine:
        for x in (X[:8:2], np.asfortranarray(X[:8]), X[:8][::-1], X[:8].astype(">f4")):
            np.testing.assert_array_equal(engine.infer({"x": x, "more": X})["y"], -x)


@pytest.mark.parametrize("kind", ["INT32", "BOOL"])
def test_floats_are_not_made_integers(plan: Any, kind: str) -> None:
    with pytest.raises(InputError, match=f"input 'x' of the engine is {kind}"):
        run_engine(plan(kinds={"x": kind}), samples())


def test_layouts_that_arrays_do_not_have(plan: Any) -> None:
    with pytest.raises(InputError, match="tensor 'y' of the engine is FLOAT in the layout CHW32"):
        run_engine(plan(formats={"y": "CHW32"}), samples())


def test_outputs_whose_shape_depends_on_the_data(plan: Any) -> None:
    path = plan(model("(float[n,3] x) => (int64[2,k] at) { at = NonZero(x) }"), data_dependent=["at"])
    sparse = np.where(X > 0.5, X, 0).astype(np.float32)
    with open_engine(path) as engine:
        for rows in (X[:8], sparse[:2], 0 * X[:2], sparse[:8]):
            np.testing.assert_array_equal(engine.infer({"x": rows})["at"], np.nonzero(rows))
    assert DRIVER.standin_used() == 0


def test_no_memory_for_such_an_output(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plan(model("(float[n,3] x) => (int64[2,k] at) { at = NonZero(x) }"), data_dependent=["at"])
    with open_engine(path) as engine:
        engine.bind({"x": X[:8]})

        def full(self: object, size: int) -> int:
            raise CudaError("CUDA_ERROR_OUT_OF_MEMORY")

        monkeypatch.setattr(type(open_cuda()), "allocate", full)
        engine.enqueue()
        with pytest.raises(InputError, match="OUT_OF_MEMORY"):
            engine.fetch()


def test_inputs_that_decide_shapes_are_read_on_the_host(plan: Any) -> None:
    reshape = model("(float[n,3] x, int64[2] shape) => (float[a,b] y) { y = Reshape(x, shape) }")
    path = plan(reshape, host=["shape"], values=[{"shape": [[1, 1], [3, 4], [9, 9]]}])
    with open_engine(path) as engine:
        found = engine.infer({"x": X[:6], "shape": np.array([9, 2])})["y"]
        np.testing.assert_array_equal(found, X[:6].reshape(9, 2))


@OLD
def test_values_that_decide_shapes_have_ranges(plan: Any) -> None:
    reshape = model("(float[n,3] x, int64[2] shape) => (float[a,b] y) { y = Reshape(x, shape) }")
    path = plan(reshape, host=["shape"], values=[{"shape": [[1, 1], [3, 4], [9, 9]]}])
    problem = r"shape: the values \(1, 18\) are not within"
    with open_engine(path) as engine, pytest.raises(InputError, match=problem):
        engine.infer({"x": X[:6], "shape": np.array([1, 18])})


# --- what engines need, and why they fail -----------------------------------------------------------------


def test_host_code_and_plugins_are_there(plan: Any) -> None:
    assert why_not_loaded(plan(needs=["host code", "plugins"])) is None


def with_record(path: Path, made: Path, digest: str) -> Path:
    record = {
        "engine_sha256": sha256_file(path),
        "builder": "tensorrt",
        "version": "10.16.1",
        "model": made.name,
        "model_sha256": digest,
        "targets": [],
        "profile": {},
        "options": {"strip_weights": "True"},
        "compiled": {"layers": [], "batch": 1},
    }
    write_json(sidecar(path), record)
    return path


SCALED = model("(float[n,3] x) => (float[n,3] y) <float[1] w = {2}> { y = Mul(x, w) }")


@OLD
def test_weights_are_taken_from_the_model_beside_the_plan(plan: Any, tmp_path: Path) -> None:
    made = tmp_path / "m.onnx"
    onnx.save(SCALED, made)
    path = with_record(plan(SCALED, stripped=True), made, sha256_file(made))
    np.testing.assert_array_equal(run_engine(path, samples()).arrays["y"], 2 * X)
    made.write_bytes(made.read_bytes() + b"\0")
    with pytest.raises(InputError, match="built without its weights, and its model does not lie beside it"):
        run_engine(path, samples())
    onnx.save(NEGATION, made)
    with_record(path, made, sha256_file(made))
    with pytest.raises(InputError, match="does not take the weights of its model"):
        run_engine(path, samples())


@OLD
def test_a_foreign_engine_without_weights(plan: Any) -> None:
    with pytest.raises(InputError, match="built without its weights"):
        run_engine(plan(SCALED, stripped=True), samples())


@pytest.mark.parametrize(
    ("fails", "problem", "said"),
    [
        ("deserialize", "does not load", "the engine was built by version 9.9.9"),
        ("context", "cannot be made ready", "createExecutionContext: out of memory"),
        ("execute", "the engine fails", "Myelin (no kernel)"),
        ("stream", "the engine fails", "CUDA_ERROR_ILLEGAL_ADDRESS"),
    ],
)
def test_what_tensorrt_says_is_quoted(plan: Any, fails: str, problem: str, said: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        run_engine(plan(fails=fails), samples())
    assert said in str(caught.value)
    assert caught.value.file is not None


def test_it_is_quoted_of_a_second_engine_too(plan: Any, tmp_path: Path) -> None:
    """TensorRT logs through the first logger as long as the first engine lives."""
    second = tmp_path / "second.plan"
    second.write_bytes(plan(fails="deserialize").read_bytes())
    with open_engine(plan()), pytest.raises(InputError, match=r"built by version 9\.9\.9"):
        run_engine(second, samples())


@pytest.mark.parametrize(
    ("bits", "kind", "said"),
    [
        (1, MissingBackendError, "VERSION_MISMATCH: it was built by another version"),
        (2, MissingBackendError, "UNSUPPORTED_CC: it has no kernels for this GPU"),
        (4, MissingBackendError, "OLD_CUDA_DRIVER: the NVIDIA driver is too old"),
        (8, MissingBackendError, "OLD_CUDA_RUNTIME"),
        (16, MissingBackendError, "INSUFFICIENT_GPU_MEMORY"),
        (32, InputError, "MALFORMED_ENGINE: the file is damaged"),
        (64, MissingBackendError, "CUDA_ERROR"),
        (
            2 + 4,
            MissingBackendError,
            "UNSUPPORTED_CC: it has no kernels for this GPU's compute capability\nOLD_",
        ),
    ],
)
def test_rtx_says_why_an_engine_does_not_run_here(
    plan: Any, bits: int, kind: type[TrtqError], said: str
) -> None:
    with pytest.raises(kind, match="the engine does not load on this machine") as caught:
        run_engine(invalid(plan(rtx=True), bits), samples())
    assert said in str(caught.value)


def test_kernels_that_rtx_compiled_are_kept_beside_the_plan(plan: Any) -> None:
    path = plan(rtx=True)
    kept = Path(f"{path}.kernels")
    run_engine(path, samples())
    assert kept.read_bytes() == b"standin Neg"
    before = kept.stat().st_mtime_ns
    run_engine(path, samples())
    assert kept.stat().st_mtime_ns == before  # nothing new
    kept.write_bytes(b"of another machine")
    run_engine(path, samples())
    assert kept.read_bytes() == b"standin Neg"


# --- the commands -----------------------------------------------------------------------------------------


@pytest.fixture
def case(tmp_path: Path) -> list[str]:
    """The arguments of a gate of a plan against its model."""
    onnx.save(NEGATION, tmp_path / "m.onnx")
    np.savez(tmp_path / "eval.npz", x=X)
    return [
        "gate",
        tmp_path / "m.onnx",
        tmp_path / "m.plan",
        "--eval",
        tmp_path / "eval.npz",
        "--metric",
        "cosine",
    ]


@pytest.mark.parametrize("rtx", [False, True])
def test_gate_of_an_engine(plan: Any, case: list[str], tmp_path: Path, rtx: bool) -> None:
    plan(rtx=rtx)
    run = trtq_command(*case, "--require-engine", "--json", tmp_path / "v.json")
    assert run.code == 0, run.err
    assert json.loads((tmp_path / "v.json").read_text())["executor"] == "engine"


def test_gate_of_two_engines_of_different_packages(plan: Any, case: list[str], tmp_path: Path) -> None:
    """One process runs both TensorRT and TensorRT for RTX."""
    other = tmp_path / "rtx.plan"
    other.write_bytes(plan(rtx=True).read_bytes())
    gate, _, candidate, *rest = case
    plan()
    run = trtq_command(gate, other, candidate, *rest)
    assert run.code == 0, run.err
    assert "measured on the engine" in run.out


@pytest.mark.parametrize(
    ("says", "bits", "code", "said"),
    [
        ({"fails": "deserialize"}, 0, 2, "the engine does not load on this machine"),
        ({"fails": "execute"}, 0, 2, "Myelin (no kernel)"),
        ({"fails": "stream"}, 0, 2, "CUDA_ERROR_ILLEGAL_ADDRESS"),
        (
            {"profiles": [{"x": [[1, 4], [2, 4], [8, 4]]}]},
            0,
            2,
            "no optimization profile of the engine takes",
        ),
        ({"rtx": True}, 2, 4, "UNSUPPORTED_CC"),
        ({"rtx": True}, 4, 4, "the NVIDIA driver is too old"),
        ({"rtx": True}, 32, 2, "the file is damaged"),
    ],
)
def test_gates_that_cannot_be(plan: Any, case: list[str], says: Any, bits: int, code: int, said: str) -> None:
    path = plan(**says)
    if bits:
        invalid(path, bits)
    run = trtq_command(*case)
    assert run.code == code
    assert said in run.err
    assert "internal error" not in run.err
    assert run.err.count("trtq: ") == 1


@pytest.mark.parametrize("command", ["gate", "bench"])
def test_plugin_libraries_are_loaded_with_engines(
    plan: Any, case: list[str], tmp_path: Path, command: str
) -> None:
    """A gate of two engines asks the first one for its inputs before anything runs."""
    library, other = tmp_path / "empty.so", tmp_path / "other.plan"
    compiler = shutil.which("cc") or shutil.which("g++")
    assert compiler is not None
    source = b"int trtq_loaded = 41;"
    subprocess.run([compiler, "-shared", "-x", "c", "-o", library, "-"], input=source, check=True)
    other.write_bytes(plan().read_bytes())
    gate, _, candidate, *rest = case
    commands = {
        "gate": [gate, other, candidate, *rest],
        "bench": ["bench", other, "--duration", "0.02", "--warm-up", "5"],
    }
    run = trtq_command(*commands[command], "--plugin-lib", library)
    assert run.code == 0, run.err
    assert str(library) in Path("/proc/self/maps").read_text()
    missing = trtq_command(*commands[command], "--plugin-lib", tmp_path / "missing.so")
    assert missing.code == 2
    assert "the plugin library cannot be loaded" in missing.err


def test_why_an_engine_does_not_load_is_said_in_a_line(plan: Any) -> None:
    assert why_not_loaded(plan()) is None
    problem = why_not_loaded(invalid(plan(rtx=True), 2))
    assert problem is not None
    assert "UNSUPPORTED_CC" in problem
    assert "build it for this GPU" in problem
    assert "\n" not in problem


# --- timing -----------------------------------------------------------------------------------------------


def test_engines_are_timed_in_turns(plan: Any, tmp_path: Path) -> None:
    first = plan()
    second = tmp_path / "second.engine"
    second.write_bytes(first.read_bytes())
    timings = measure([first, second], QUICK)
    for timing in timings:
        assert timing.batch == 4
        assert timing.runs >= 10
        assert 0 < timing.p50_ms <= timing.p90_ms <= timing.p99_ms
        assert timing.cuda_graph
        assert timing.kernel_ms == {"layer": 0.5}
        assert timing.device_bytes == 2 * 4 * 3 * 4
        assert timing.load_ms > 0 < timing.first_ms
    assert DRIVER.standin_used() == 0


def test_an_engine_that_cannot_be_captured_is_launched(plan: Any) -> None:
    path = plan(model("(float[n,3] x) => (int64[2,k] at) { at = NonZero(x) }"), data_dependent=["at"])
    (timing,) = measure([path], QUICK)
    assert not timing.cuda_graph
    assert timing.note == "the shape of an output depends on the data"


def test_engines_of_others_are_timed(plan: Any, tmp_path: Path) -> None:
    path = plan()
    assert not sidecar(path).exists()
    run = trtq_command("bench", path, "--duration", "0.02", "--warm-up", "5", "--json", tmp_path / "b.json")
    assert run.code == 0, run.err
    assert "CUDA graph; loaded in" in run.out
    assert "TF32" in run.out
    assert json.loads((tmp_path / "b.json").read_text())["engines"][0]["static"] is None


def test_a_slow_engine_is_timed_often_enough(plan: Any) -> None:
    (result,) = bench.benchmark([plan()], on_gpu=True, how=Measuring(0, 0, 25))
    assert result.timing is not None
    assert result.timing.runs >= 25


def test_an_engine_that_does_not_load_is_compared_by_its_record(plan: Any, tmp_path: Path) -> None:
    path = invalid(plan(rtx=True), 2)
    with pytest.raises(InputError, match="nothing is known about the engine") as caught:
        bench.benchmark([path], on_gpu=True)
    assert "UNSUPPORTED_CC" in str(caught.value)
    with_record(path, tmp_path / "m.onnx", "0" * 64)
    (result,) = bench.benchmark([path], on_gpu=True)
    assert result.timing is None
    assert result.static is not None
    assert "not timed: the engine does not load on this machine; UNSUPPORTED_CC" in bench.text_of([result])
