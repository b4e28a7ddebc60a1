"""Models with operators that only TensorRT has, from quantizing to the gate, as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from foreign import chain, foreign_net, reference_file, samples
from jobs import Run, trtq_command
from nets import normal, saved

from trtq.errors import ExitCode
from trtq.graph import references
from trtq.recovery.learning.torch_graph import TorchGraph
from trtq.simulation.session import simulation_session


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path / "cache"))
    yield
    references.use([])


def quantize(model: Path, folder: Path, *options: object) -> Run:
    run = trtq_command(
        *("quantize", model, "--data", samples(folder), "--method", "max", "-o", folder / "q.onnx"), *options
    )
    assert run.code == ExitCode.PASS, run.err
    return run


def gate(model: Path, folder: Path, *options: object) -> tuple[Run, dict]:
    run = trtq_command(
        *("gate", model, folder / "q.onnx", "--eval", samples(folder, seed=2), "--metric", "cosine"),
        *("--json", folder / "verdict.json", *options),
    )
    return run, json.loads((folder / "verdict.json").read_text())


def detector(domain: str) -> onnx.ModelProto:
    """Boxes and scores of 64 places, and TensorRT's own selection of them at the end."""
    return foreign_net(
        "g (float[N,3,8,8] x) => (int32[N,1] n, float[N,5,4] b, float[N,5] s, int32[N,5] c) {"
        " a = Conv<pads = [1,1,1,1]>(x, w1) f = Reshape(a, flat) rows = Transpose<perm = [0,2,1]>(f)"
        " boxes = Abs(rows) scores = Sigmoid(rows)"
        " n, b, s, c = EfficientNMS_TRT<max_output_boxes = 5, score_threshold = 0.3>(boxes, scores) }",
        domain,
        flat=np.array([0, 4, 64], np.int64),
    )


@pytest.mark.parametrize("domain", ["TRT", "custom", ""])
def test_a_detector_that_ends_with_a_plugin_is_gated_with_its_own_outputs(
    domain: str, tmp_path: Path
) -> None:
    model = saved(detector(domain), tmp_path)
    run = quantize(model, tmp_path)
    assert "1 of 1 weighted nodes to INT8" in run.out
    written = onnx.load(tmp_path / "q.onnx")
    (plugin,) = (node for node in written.graph.node if node.op_type == "EfficientNMS_TRT")
    assert (plugin.domain, list(plugin.output)) == (domain, ["n", "b", "s", "c"])
    run, verdict = gate(model, tmp_path)
    assert run.code in (ExitCode.PASS, ExitCode.FAIL)
    assert set(verdict["outputs"]) >= {"b", "s"}
    assert not verdict["warnings"]


def test_with_references_all_layers_are_quantized_and_gated(tmp_path: Path) -> None:
    model = saved(chain(), tmp_path)
    given = ("--op-reference", reference_file(tmp_path))
    assert "3 of 3 weighted nodes to INT8" in quantize(model, tmp_path, *given).out
    run, verdict = gate(model, tmp_path, *given)
    assert run.code == ExitCode.PASS
    assert set(verdict["outputs"]) == {"y", "s"}


def test_without_them_the_gate_compares_what_goes_in_and_says_so(tmp_path: Path) -> None:
    model = saved(chain(), tmp_path)
    run = quantize(model, tmp_path)
    assert "1 of 3 weighted nodes to INT8" in run.out
    assert "b (Conv), y (Conv): it lies behind 'm' (Scaled), which has no reference" in run.out
    run, verdict = gate(model, tmp_path)
    assert run.code == ExitCode.PASS
    assert set(verdict["outputs"]) == {"a"}
    (warning,) = verdict["warnings"]
    assert "Scaled (node 'm') can be computed by TensorRT only" in warning
    assert "compared at a; --op-reference" in warning
    assert warning in run.err


def test_an_unnamed_node_without_a_reference_is_warned_of_once(tmp_path: Path) -> None:
    proto = chain()
    for node in proto.graph.node:
        node.name = ""
    model, data = saved(proto, tmp_path), samples(tmp_path)
    job = ("--data", data, "--eval", data, "--metric", "cosine", "--method", "max", "--backend", "none")
    run = trtq_command("deploy", model, *job, "-o", tmp_path / "out")
    assert run.err.count("can be computed by TensorRT only") == 1


@pytest.mark.parametrize("given", [True, False])
def test_the_rest_in_half_keeps_the_compared_names(given: bool, tmp_path: Path) -> None:
    model = saved(chain(), tmp_path)
    options = ("--op-reference", reference_file(tmp_path)) if given else ()
    quantize(model, tmp_path, "--rest", "fp16", *options)
    run, verdict = gate(model, tmp_path, *options)
    assert run.code == ExitCode.PASS
    assert set(verdict["outputs"]) == ({"y", "s"} if given else {"a"})


def test_a_recipe_names_references_beside_itself(tmp_path: Path) -> None:
    model, recipe = saved(chain(), tmp_path), tmp_path / "recipe.toml"
    reference_file(tmp_path)
    recipe.write_text('op_reference = "references.py"\n')
    assert "3 of 3 weighted nodes to INT8" in quantize(model, tmp_path, "--recipe", recipe).out


def test_another_reference_is_another_result(tmp_path: Path) -> None:
    """What was computed with one file is not taken from the cache for another."""
    model = saved(chain(), tmp_path)
    given = ("--op-reference", reference_file(tmp_path))
    quantize(model, tmp_path, *given)
    first = (tmp_path / "q.onnx").read_bytes()
    text = (tmp_path / "references.py").read_text().replace("x * ", "3 * x * ")
    quantize(model, tmp_path, "--op-reference", reference_file(tmp_path, text))
    assert (tmp_path / "q.onnx").read_bytes() != first


@pytest.mark.slow
def test_workers_have_the_references(tmp_path: Path) -> None:
    model = saved(chain(), tmp_path)
    given = ("--op-reference", reference_file(tmp_path))
    quantize(model, tmp_path, *given)
    here = (tmp_path / "q.onnx").read_bytes()
    quantize(model, tmp_path, *given, "--parallel", "loky:2", "--cache", tmp_path / "other")
    assert (tmp_path / "q.onnx").read_bytes() == here


def test_learning_ends_in_front_of_such_an_operator(tmp_path: Path) -> None:
    references.use([str(reference_file(tmp_path))])
    model = chain()
    module = TorchGraph(gs.import_onnx(model))
    assert module.outputs == ["a"]
    x = normal(2, 3, 8, 8)
    (expected,) = simulation_session(model.SerializeToString(), outputs=["a"]).run(None, {"x": x})
    found = module({"x": torch.from_numpy(x)})["a"].detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
