"""Integer divisions that kill ONNX Runtime, run in this process: it is still there afterwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from jobs import inside, trtq_command
from numpy.typing import NDArray

from trtq.graph.division import with_safe_division
from trtq.graph.fold import fold
from trtq.simulation.session import simulation_session

RANDOM = np.random.default_rng(0)


def model_of(text: str, opset: int = 17, **constants: NDArray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}, "own": 1]> {text}')
    for name, values in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return model


def run(model: onnx.ModelProto, **feed: NDArray) -> NDArray:
    (found,) = simulation_session(model.SerializeToString(), 1).run(None, feed)
    return np.asarray(found)


def truncated(a: NDArray, b: NDArray) -> NDArray:
    """Quotients towards zero, by Python's integers, in as many bits."""
    bits = 8 * a.dtype.itemsize
    exact = [
        abs(int(x)) // abs(int(y)) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a, b, strict=True)
    ]
    return np.array([(q + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1) for q in exact], a.dtype)


@pytest.mark.parametrize(("kind", "dtype"), [("int32", np.int32), ("int64", np.int64)])
@pytest.mark.parametrize("opset", [8, 13, 17])
def test_quotients_are_those_of_the_integers(kind: str, dtype: type, opset: int) -> None:
    text = f"g ({kind}[N] a, {kind}[N] b) => ({kind}[N] c) {{ c = Div(a, b) }}"
    edge = np.iinfo(dtype)
    a = np.array([edge.min, edge.min, edge.max, edge.min, 7, -7, 7, 0], dtype)
    b = np.array([-1, 1, -1, edge.min, -2, 2, -1, -1], dtype)
    np.testing.assert_array_equal(run(model_of(text, opset), a=a, b=b), truncated(a, b))
    a = RANDOM.integers(edge.min, edge.max, 500, dtype)
    b = RANDOM.choice(np.array([-3, -2, -1, 1, 2, 1000, edge.min], dtype), 500)
    np.testing.assert_array_equal(run(model_of(text, opset), a=a, b=b), truncated(a, b))


MINIMUM, MINUS_ONE = np.array([-(2**63)]), np.array([-1])


@pytest.mark.parametrize(
    "text",
    [
        "g (int64[1] x) => (int64[1] y) { d = Div(low, minus) y = Add(x, d) }",
        "g (int64[1] x) => (int64[1] y) { a = Neg(one) d = Div(low, a) y = Add(x, d) }",
        """g (int64[1] x) => (int64[1] y) {
            y = If (flag) <then_branch = then () => (int64[1] t) { d = Div(low, minus) t = Add(x, d) },
                           else_branch = other () => (int64[1] e) { e = Identity(x) }>
        }""",
        """g (int64[1] x) => (int64[1] y) { d = own.Halve(low, minus) y = Add(x, d) }
        <opset_import: ["": 17], domain: "own"> Halve (a, b) => (c) { c = Div(a, b) }""",
    ],
)
def test_constants_are_folded_and_run(text: str) -> None:
    constants = {"low": MINIMUM, "minus": MINUS_ONE, "one": np.array([1]), "flag": np.array(True)}
    model = model_of(text, **constants)
    assert run(model, x=np.array([5])) == [5 - 2**63]
    graph = gs.import_onnx(model)
    if not model.functions:
        fold(graph)
        assert run(gs.export_onnx(graph), x=np.array([5])) == [5 - 2**63]


def test_what_is_harmless_stays_as_it_is() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) { v = ReduceMean(x) s = Sqrt(v) a = Div(x, s) y = Div(a, w) }"
    model = model_of(text, w=np.full(4, -1, np.float32))
    assert with_safe_division(model) is model
    model = model_of("g (int64[N] x) => (int64[N] y) { y = Div(x, two) }", two=np.array([2]))
    assert with_safe_division(model) is model
    unknown = model_of(
        "g (float[N,4] x) => (float[N,4] y) { a = Relu(x) b = Abs(x) c = Div(a, b) y = Neg(c) }"
    )
    assert [node.op_type for node in with_safe_division(unknown).graph.node].count("Mul") == 0


def test_data_cannot_end_a_job(tmp_path: Path) -> None:
    text = """g (float[N,4] x, int64[N] a, int64[N] b) => (float[N,4] y) {
        q = Div(a, b) f = Cast<to = 1>(q) g = Unsqueeze(f, one) z = MatMul(x, w) y = Add(z, g)
    }"""
    weight = RANDOM.normal(size=(4, 4)).astype(np.float32)
    onnx.save(model_of(text, w=weight, one=np.array([1])), str(tmp_path / "m.onnx"))
    rows = RANDOM.normal(size=(8, 4)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=rows, a=np.full(8, -(2**63)), b=np.full(8, -1))
    with inside(tmp_path):
        made = trtq_command("calibrate", "m.onnx", "--data", "d.npz", "--method", "max", "-o", "t.cache")
    assert made.code == 0, made.err
