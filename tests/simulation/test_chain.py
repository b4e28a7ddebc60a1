"""Sessions and references in turn, against the same model written with ONNX's operators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from foreign import chain, foreign_net, middle, reference_file
from nets import net, normal, run, saved

from trtq.errors import InputError
from trtq.graph import references
from trtq.simulation.chain import Chain
from trtq.simulation.rows import Runner
from trtq.simulation.session import simulation_session

X = normal(3, 3, 8, 8)


@pytest.fixture(autouse=True)
def with_references(tmp_path: Path) -> Iterator[None]:
    references.use([str(reference_file(tmp_path))])
    yield
    references.use([])


def plain_chain() -> onnx.ModelProto:
    """`foreign.chain` in ONNX's operators."""
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in chain().graph.initializer}
    return net(
        "g (float[N,3,8,8] x) => (float[N,4,8,8] y, int32[N] s) {"
        " a = Conv<pads = [1,1,1,1]>(x, w1) m = Mul(a, half) b = Conv<pads = [1,1,1,1]>(m, w2) p = Add(b, a)"
        " total = ReduceSum<keepdims = 0>(b, axes) up = Greater(total, zero) s = Cast<to = 6>(up)"
        " q = Add(p, a) y = Conv<pads = [1,1,1,1]>(q, w3) }",
        **constants,
        half=np.float32(0.5),
        axes=np.array([1, 2, 3], np.int64),
        zero=np.float32(0),
    )


def test_a_chain_computes_what_the_operators_do() -> None:
    session = simulation_session(chain().SerializeToString(), threads=1)
    assert isinstance(session, Chain)
    expected = run(plain_chain(), {"x": X})
    assert [item.name for item in session.get_outputs()] == ["y", "s"]
    (given,) = session.get_inputs()
    assert (given.name, given.shape, given.type) == ("x", ["N", 3, 8, 8], "tensor(float)")
    for rows in (X, X[:1]):  # the sizes of a stage's inputs are not fixed by the first run
        y, s = session.run(None, {"x": rows})
        np.testing.assert_allclose(y, expected["y"][: len(rows)], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(s, expected["s"][: len(rows)])
    (s,) = session.run(["s"], {"x": X})
    np.testing.assert_array_equal(s, expected["s"])


def test_any_tensor_can_be_fetched_and_what_it_does_not_need_does_not_run(tmp_path: Path) -> None:
    names = ["a", "m", "b", "q"]
    session = simulation_session(chain().SerializeToString(), outputs=names)
    constants = run(plain_chain(), {"x": X})
    found = dict(zip(names, session.run(None, {"x": X}), strict=True))
    np.testing.assert_allclose(found["m"], found["a"] / 2, rtol=1e-6)
    assert found["q"].shape == constants["y"].shape
    references.use([str(reference_file(tmp_path, "def Scaled(x, *, factor): raise ValueError"))])
    (a,) = simulation_session(chain().SerializeToString(), outputs=["a"]).run(None, {"x": X})
    np.testing.assert_allclose(a, found["a"], rtol=1e-6)


def test_without_a_reference_the_model_ends_in_front_and_the_rest_is_refused() -> None:
    references.use([])
    session = simulation_session(chain().SerializeToString())
    (output,) = session.get_outputs()
    assert (output.name, output.shape, output.type) == ("a", ["N", 4, 8, 8], "tensor(float)")
    with pytest.raises(InputError, match=r"'Scaled' \(node 'm'\) can be computed by TensorRT only"):
        simulation_session(chain().SerializeToString(), outputs=["y"])
    nothing = foreign_net("g (float[N,4] x) => (float[N,4] y) { y = Unknown(x) }")
    with pytest.raises(InputError, match="'Unknown'"):
        simulation_session(nothing.SerializeToString())


def test_models_own_functions_are_not_foreign(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "local": 1, "custom": 1]>
        g (float[N,4] x) => (float[N,4] y) { m = local.twice(x) y = custom.Scaled<factor = 0.5>(m) }
        <domain: "local", opset_import: ["": 17]> twice (a) => (b) { b = Add(a, a) }"""
    )
    x = normal(2, 4)
    (y,) = simulation_session(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(y, x, rtol=1e-6)
    plain = simulation_session(saved(model, tmp_path), outputs=["m"])
    np.testing.assert_allclose(plain.run(None, {"x": x})[0], 2 * x, rtol=1e-6)


def test_half_is_rounded_in_front_of_references_and_behind_them() -> None:
    """References see float32 that holds half's values; half of 2049 is 2048, and 1.5 of it 3072."""
    model = foreign_net(
        "g (float16[N] x) => (float16[N] y) { a = Add(x, one) m = Scaled<factor = 1.5>(a) y = Neg(m) }",
        one=np.float16(1),
    )
    session = simulation_session(model.SerializeToString())
    (y,) = session.run(None, {"x": np.array([2048, 1], np.float16)})
    assert (y.dtype, y.tolist()) == (np.float16, [-3072, -3])


def test_a_runner_serves_threads_batches_and_reused_memory(tmp_path: Path) -> None:
    expected = run(plain_chain(), {"x": X})
    for reuse in (False, True):
        runner = Runner(saved(chain(), tmp_path), reuse=reuse)
        for _ in range(3):
            found = runner.run({"x": X, "other": X})
            np.testing.assert_allclose(found["y"], expected["y"], rtol=1e-4, atol=1e-4)


def test_weights_in_files_and_shared_ones_are_found(tmp_path: Path) -> None:
    """An operator that reads a weight itself, which is in a file beside the model, or handed over."""
    text = "g (float[N,64,64] x) => (float[N,64,64] y) { a = Neg(x) y, s = Paired(a, k) }"
    k, x = normal(1, 64, 64, seed=3), normal(2, 64, 64)
    model = foreign_net(text, k=k)
    file = tmp_path / "model.onnx"
    onnx.save_model(model, file, save_as_external_data=True, location="k.bin", size_threshold=0)
    del model.graph.initializer[:]
    external = onnx.TensorProto(name="k", data_type=1, dims=k.shape, data_location="EXTERNAL")
    external.external_data.add(key="location", value="memory")
    model.graph.initializer.append(external)
    shared = {"k": onnxruntime.OrtValue.ortvalue_from_numpy(k)}
    for session in (
        simulation_session(file, outputs=["y"]),
        simulation_session(model.SerializeToString(), outputs=["y"], weights=shared),
    ):
        np.testing.assert_allclose(session.run(None, {"x": x})[0], k - x, rtol=1e-6)


def test_an_error_behind_a_reference_names_it(tmp_path: Path) -> None:
    references.use([str(reference_file(tmp_path, "def Scaled(x, *, factor): return x[:, :2]"))])
    session = simulation_session(middle().SerializeToString())
    with pytest.raises(RuntimeError, match="behind the references of Scaled, whose results may"):
        session.run(None, {"x": X})


def test_the_fingerprint_of_a_simulation_has_the_references(tmp_path: Path) -> None:
    from trtq.simulation.session import simulation_fingerprint

    before = simulation_fingerprint()
    references.use([])
    assert simulation_fingerprint() != before
