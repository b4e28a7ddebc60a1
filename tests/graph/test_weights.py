"""Large weights stay in their files: the same model, without copies of it in memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from nets import net

from trtq.errors import InputError
from trtq.graph import model as graph_model
from trtq.graph import weights
from trtq.graph.fold import fold
from trtq.graph.half import convert_to_half
from trtq.graph.model import export, load_model, model_files, model_sha256, save_model, serialized
from trtq.graph.weights import FileValues, files_of, graph_sha256, read_light, values_of
from trtq.simulation.session import simulation_session

RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "a": RANDOM.normal(size=(6, 5)).astype(np.float32),
    "b": RANDOM.normal(size=(4, 5)).astype(np.float32),
    "bias": RANDOM.normal(size=4).astype(np.float32),
}
X = RANDOM.normal(size=(3, 6)).astype(np.float32)


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "IN_MEMORY", 0)
    monkeypatch.setattr(weights, "_SMALL", 16)


def proto() -> onnx.ModelProto:
    """y = x a bᵀ + bias: `b` is transposed by a node that folding evaluates."""
    return net(
        """g (float[N,6] x) => (float[N,4] y) {
            h = MatMul(x, a)
            t = Transpose(b)
            p = MatMul(h, t)
            y = Add(p, bias)
        }""",
        **WEIGHTS,
    )


@pytest.fixture(params=["whole", "apart"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The model in one file, and with external data."""
    path = tmp_path / "model.onnx"
    if request.param == "whole":
        onnx.save(proto(), path)
    else:
        onnx.save(proto(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    return path


def run(model: onnx.ModelProto) -> np.ndarray:
    return simulation_session(model.SerializeToString(), threads=1).run(None, {"x": X})[0]


EXPECTED = run(proto())


def test_weights_stay_in_their_file(file: Path) -> None:
    graph = load_model(file).graph
    assert set(files_of(graph)) == {"a", "b", "bias"}
    for name, values in WEIGHTS.items():
        assert np.array_equal(values_of(graph.tensors()[name]), values)
    assert isinstance(graph.tensors()["a"]._values, FileValues)
    fold(graph)
    assert set(files_of(graph)) == {"a", "bias"}  # folding needed the values of b
    assert np.array_equal(run(export(graph)), EXPECTED)


@pytest.mark.parametrize(("looked_at", "left"), [(4, {"a", "b"}), (1024, set())])
def test_weights_stay_in_their_file_in_another_opset(
    file: Path, looked_at: int, left: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_model, "LOOKED_AT", looked_at)
    graph = load_model(file, opset=19).graph
    assert graph.opset == 19
    assert [tensor.name for tensor in graph.inputs] == ["x"]
    assert set(files_of(graph)) == left  # what the converter may look at was read
    assert np.array_equal(run(export(graph)), EXPECTED)


def test_a_session_reads_the_same_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder than the one the session is made in."""
    monkeypatch.chdir("/")
    graph = load_model(file).graph
    with serialized(graph) as source:
        assert isinstance(source, weights.Light)
        assert WEIGHTS["a"].tobytes() not in source.model
        assert np.array_equal(simulation_session(source).run(None, {"x": X})[0], EXPECTED)
        (hidden,) = simulation_session(source, outputs=["h"]).run(None, {"x": X})
    np.testing.assert_allclose(hidden, X @ WEIGHTS["a"], rtol=1e-5)
    (hidden,) = simulation_session(file, outputs=["h"]).run(None, {"x": X})
    np.testing.assert_allclose(hidden, X @ WEIGHTS["a"], rtol=1e-5)


def test_the_hash_is_that_of_the_values_wherever_they_are(file: Path) -> None:
    graph = load_model(file).graph
    found = graph_sha256(graph)
    assert set(files_of(graph)) == {"a", "b", "bias"}  # none was kept in memory for it
    tensors = graph.tensors()
    for name in WEIGHTS:
        tensors[name].values = values_of(tensors[name])
    assert not files_of(graph)
    assert graph_sha256(graph) == found
    tensors["bias"].values = np.nextafter(WEIGHTS["bias"], np.float32(np.inf))
    assert graph_sha256(graph) != found


def test_changed_weights_go_along(file: Path) -> None:
    graph = load_model(file).graph
    graph.tensors()["bias"].values = WEIGHTS["bias"] + 1
    with serialized(graph) as source:
        (found,) = simulation_session(source).run(None, {"x": X})
    np.testing.assert_allclose(found, EXPECTED + 1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [1 << 30, 16])
def test_saved_models_are_whole(
    file: Path, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one file and with external data of their own: the source may go."""
    monkeypatch.setattr(graph_model, "PROTOBUF_LIMIT", limit)
    graph = load_model(file).graph
    save_model(graph, saved := tmp_path / "saved" / "saved.onnx")
    for source in model_files(file):
        source.unlink()
    assert len(model_files(saved)) == (1 if limit > 16 else 2)
    onnx.checker.check_model(saved, full_check=True)
    assert np.array_equal(run(onnx.load(saved)), EXPECTED)
    assert np.array_equal(run(export(load_model(saved).graph)), EXPECTED)


def test_half(file: Path) -> None:
    graph = load_model(file, opset=19).graph
    fold(graph)
    (found,) = simulation_session(export(convert_to_half(graph)).SerializeToString()).run(None, {"x": X})
    np.testing.assert_allclose(found, EXPECTED, rtol=2e-2, atol=2e-2)


def test_hash_and_files(file: Path) -> None:
    names = [path.name for path in model_files(file)]
    assert names in (["model.onnx"], ["model.onnx", "w.bin"])
    assert model_sha256(file) == load_model(file).sha256


def test_every_type_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that NumPy lacks, strings, scalars and empty tensors."""
    values = [
        np.arange(6).reshape(2, 3).astype(dtype)
        for dtype in ("f2", "f4", "f8", "i1", "i4", "i8", "u1", "?", ml_dtypes.bfloat16, ml_dtypes.int4)
    ]
    values += [np.float32(3), np.zeros((0, 4), np.float32), np.array(["one", "two"], object)]
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[1] x) => (float[1] y) { y = Identity(x) }'
    )
    for index, array in enumerate(values):
        tensor = onnx.numpy_helper.from_array(np.asarray(array), f"w{index}")
        model.graph.initializer.append(tensor)
        model.graph.node.append(onnx.helper.make_node("Identity", [f"w{index}"], [f"o{index}"]))
        info = onnx.helper.make_tensor_value_info(f"o{index}", tensor.data_type, tensor.dims)
        model.graph.output.append(info)
    onnx.save(model, path := tmp_path / "model.onnx")
    for limit in (1 << 30, 1):
        monkeypatch.setattr(graph_model, "PROTOBUF_LIMIT", limit)
        save_model(gs.import_onnx(onnx.load(path)), saved := tmp_path / f"{limit}.onnx")
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(saved).graph.initializer}
        for index, array in enumerate(values):
            assert stored[f"w{index}"].dtype == np.asarray(array).dtype or array.dtype == object
            assert np.array_equal(stored[f"w{index}"], array)


def test_weights_of_control_flow_are_read(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N,6] x, bool c) => (float[N,5] y) {
            y = If (c) <then_branch = t () => (float[N,5] p) { p = MatMul(x, a) },
                        else_branch = e () => (float[N,5] q) { z = Neg(x) q = MatMul(z, a) }>
        }"""
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHTS["a"], "a"))
    onnx.save(model, path := tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=0)
    graph = load_model(path).graph
    save_model(graph, saved := tmp_path / "saved.onnx")
    (tmp_path / "w").unlink()
    (found,) = simulation_session(saved).run(None, {"x": X, "c": np.array(False)})
    np.testing.assert_allclose(found, -X @ WEIGHTS["a"], rtol=1e-5)


def test_the_light_model_is_the_model(tmp_path: Path) -> None:
    """With the values put back it is what ONNX reads, message for message."""
    onnx.save(proto(), path := tmp_path / "model.onnx")
    light = read_light(path)
    assert [t.name for t in light.graph.initializer] == ["a", "b", "bias"]
    for tensor in light.graph.initializer:
        assert not tensor.raw_data
        weights.inline(tensor, tmp_path)
        tensor.ClearField("data_location")
    assert light == onnx.load(path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    """A file that ends too early is an error, wherever it ends."""
    content = proto().SerializeToString()
    path = tmp_path / "model.onnx"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(InputError):
            load_model(path)


def test_external_data_that_is_too_short(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(proto(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    data = tmp_path / "w.bin"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match="external data cannot be read"):
        load_model(path)


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname"])
def test_external_data_outside_the_models_folder(location: str, tmp_path: Path) -> None:
    model = proto()
    for tensor in model.graph.initializer:
        weights._refer(tensor, location, 0, len(tensor.raw_data))
        tensor.ClearField("raw_data")
    (tmp_path / "w.bin").write_bytes(bytes(1000))
    (tmp_path / "in").mkdir()
    onnx.save(model, path := tmp_path / "in" / "model.onnx")
    with pytest.raises(InputError, match="outside the model's folder"):
        load_model(path)


@pytest.mark.parametrize("size", [4, 1 << 16])
def test_model_and_data_that_are_links_into_one_folder(size: int, tmp_path: Path) -> None:
    """As download caches keep them: the links lie in a folder of their own."""
    values = np.arange(size, dtype=np.float32)
    graph = gs.Graph(
        [gs.Node("Add", "add", {}, [gs.Variable("x", np.float32, [size]), gs.Constant("w", values)])],
        opset=17,
    )
    graph.inputs = [graph.nodes[0].inputs[0]]
    graph.nodes[0].outputs = graph.outputs = [gs.Variable("y", np.float32, [size])]
    model = gs.export_onnx(graph)
    weights._refer(model.graph.initializer[0], "weights.bin", 0, values.nbytes)
    model.graph.initializer[0].ClearField("raw_data")
    for folder in ("blobs", "links"):
        (tmp_path / folder).mkdir()
    (tmp_path / "blobs" / "1").write_bytes(model.SerializeToString())
    (tmp_path / "blobs" / "2").write_bytes(values.tobytes())
    for name, blob in (("model.onnx", "1"), ("weights.bin", "2")):
        (tmp_path / "links" / name).symlink_to(f"../blobs/{blob}")
    loaded = load_model(tmp_path / "links" / "model.onnx").graph
    np.testing.assert_array_equal(weights.values_of(loaded.nodes[0].inputs[1]), values)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "apart"])
def test_memory(kind: str, tmp_path: Path) -> None:
    """Loading, rewriting and saving a model of 400 MB takes the memory of its INT8 weights."""
    code = f"""
        import resource
        import numpy as np, onnx, onnx_graphsurgeon as gs, onnxruntime
        from pathlib import Path
        from trtq.graph import weights
        from trtq.graph.fold import fold
        from trtq.graph.model import load_model, save_model
        from trtq.graph.place import place
        from trtq.graph.rewrite import rewrite

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        folder = Path({str(tmp_path)!r})
        before = peak()
        model = load_model(folder / "model.onnx")
        fold(model.graph)
        plan = place(model)
        assert len(plan.int8_nodes) == 25
        graph = rewrite(model.graph, plan, {{name: np.float32(1) for name in plan.tensors}})
        save_model(graph, folder / "int8.onnx")
        print(peak() - before)
    """
    nodes = [onnx.helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(25)]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x0", onnx.TensorProto.FLOAT, ["N", 2000])],
        [onnx.helper.make_tensor_value_info("x25", onnx.TensorProto.FLOAT, ["N", 2000])],
        [onnx.numpy_helper.from_array(np.ones((2000, 2000), np.float32), f"w{i}") for i in range(25)],
    )
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=kind == "apart", location="w")
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True
    )
    assert int(found.stdout) < 230e6  # INT8 weights: 100 MB; the largest weight in float64 and a copy: 64 MB
