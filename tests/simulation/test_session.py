"""The simulator computes exactly what the Q/DQ equations say."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
from nets import net, normal
from onnx import TensorProto, helper, numpy_helper

from trtq.errors import InputError
from trtq.numerics import fake_quantize
from trtq.simulation.session import execution_providers, simulation_fingerprint, simulation_session


def quantized_linear(weights: np.ndarray, scale: float) -> onnx.ModelProto:
    """x -> Q -> DQ -> MatMul(weights) -> hidden -> Relu -> y, with an int8 weight -> DQ."""
    codes = np.rint(weights * 127).astype(np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["codes", "weight_scale", "zero"], ["weights"]),
        helper.make_node("MatMul", ["dq", "weights"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["y"]),
    ]
    constants = {
        "scale": np.float32(scale),
        "weight_scale": np.float32(1 / 127),
        "zero": np.int8(0),
        "codes": codes,
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weights.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weights.shape[1]])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture
def model():
    weights = np.random.default_rng(0).uniform(-1, 1, (64, 8)).astype(np.float32)
    return quantized_linear(weights, 0.02)


def test_equals_the_equations(model):
    x = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    codes = numpy_helper.to_array(model.graph.initializer[3])
    expected = np.maximum(fake_quantize(x, np.float32(0.02)) @ (codes * np.float32(1 / 127)), 0)
    (found,) = simulation_session(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_no_operator_is_fused_to_an_integer_one(model, tmp_path):
    """The graph that really runs still has its Q/DQ; with default settings it does not."""

    def operators(configure):
        path = str(tmp_path / "optimized.onnx")
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = path
        configure(options)
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [node.op_type for node in onnx.load(path).graph.node]

    from trtq.simulation.session import _SESSION_CONFIG

    def faithful(options):
        for key, value in _SESSION_CONFIG.items():
            options.add_session_config_entry(key, value)

    assert {"QuantizeLinear", "DequantizeLinear", "MatMul"} <= set(operators(faithful))
    assert "MatMul" not in operators(lambda options: None)


def test_any_tensor_can_be_an_output(model, tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    x = np.ones((2, 64), np.float32)
    session = simulation_session(path, threads=1, outputs=["hidden", "y"])
    hidden, y = session.run(None, {"x": x})
    np.testing.assert_array_equal(np.maximum(hidden, 0), y)
    assert hidden.min() < 0


def test_what_does_not_load(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    for bad, problem in ((path, "not an ONNX model"), (tmp_path / "none.onnx", "does not exist")):
        with pytest.raises(InputError, match=problem) as error:
            simulation_session(bad)
        assert str(bad) in str(error.value)


def test_fingerprint_names_the_version():
    assert onnxruntime.__version__ in simulation_fingerprint()


@pytest.fixture
def fresh_providers():
    """Providers are looked for anew, in the test and after it."""
    execution_providers.cache_clear()
    yield
    execution_providers.cache_clear()


def test_the_providers_of_a_session_are_those_that_start(model, fresh_providers):
    session = simulation_session(model.SerializeToString())
    wanted = [p if isinstance(p, str) else p[0] for p in execution_providers()]
    assert session.get_providers() == wanted
    assert simulation_fingerprint().endswith(":cuda") == ("CUDAExecutionProvider" in wanted)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="ONNX Runtime has CUDA here"
)
def test_without_a_gpu_the_cpu_runs_and_a_line_says_so(model, fresh_providers, monkeypatch):
    """As where the package for GPUs is installed on a machine without one."""
    claimed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: claimed)
    with pytest.warns(RuntimeWarning, match="does not start .* models run on the CPU"):
        session = simulation_session(model.SerializeToString())
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert ":cuda" not in simulation_fingerprint()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        simulation_session(model.SerializeToString())


def test_attention_is_as_onnx_defines_it() -> None:
    """A padding mask is one for all queries, which ONNX Runtime's own operator refuses."""
    model = net(
        "g (float[b,2,4,8] x, bool[b,1,1,4] m) => (float[b,2,4,8] y) { y = Attention(x, x, x, m) }",
        opset=23,
        ir_version=10,
    )
    feed = {"x": normal(2, 2, 4, 8), "m": np.array([1, 1, 1, 0, 1, 1, 0, 0], bool).reshape(2, 1, 1, 4)}
    (expected,) = onnx.reference.ReferenceEvaluator(model).run(None, feed)
    (found,) = simulation_session(model.SerializeToString(), threads=1).run(None, feed)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_attention_without_a_mask_but_with_a_past() -> None:
    """The mask is an input that is left out, as in a decoder with a cache; worked out in NumPy."""
    model = net(
        "g (float[b,2,3,4] x, float[b,2,5,4] pk, float[b,2,5,4] pv) => (float[b,2,3,4] y)"
        ' { y, k, v = Attention <is_causal = 1> (x, x, x, "", pk, pv) }',
        opset=23,
        ir_version=10,
    )
    feed = {"x": normal(2, 2, 3, 4), "pk": normal(2, 2, 5, 4), "pv": normal(2, 2, 5, 4)}
    keys, values = (np.concatenate([feed[past], feed["x"]], axis=2) for past in ("pk", "pv"))
    scores = feed["x"] @ keys.swapaxes(2, 3) / 2
    chances = np.exp(np.where(np.arange(3)[:, None] + 5 >= np.arange(8), scores, -np.inf))
    expected = chances / chances.sum(axis=-1, keepdims=True) @ values
    (found,) = simulation_session(model.SerializeToString(), threads=1).run(["y"], feed)
    np.testing.assert_allclose(found, expected, atol=1e-5)
