"""Outputs of a model, run once and then taken from the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from trtq import parallel
from trtq.cache import Cache
from trtq.console import SILENT
from trtq.data.samples import InputSpec, Samples
from trtq.evaluation import outputs_of

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)
SAMPLES = Samples("rows.npz", (InputSpec("x", np.dtype(np.float32), ("N", 3)),), {"x": ROWS}, {}, "d" * 64)


def doubling(path: Path, output: str) -> Path:
    """A model whose output, of any name, is its input added to itself."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3]) for n in ("x", output))
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], [output])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("name", ["y", "/head/y:0", "names", "executor"])
def test_a_second_run_is_the_first_ones(name: str, tmp_path: Path) -> None:
    model, cache = doubling(tmp_path / "m.onnx", name), Cache(tmp_path / "cache")
    for expected in (False, True):
        outputs, cached = outputs_of(model, SAMPLES, cache, SILENT, label="fp32")
        assert cached is expected
        assert outputs.executor == "simulation"
        assert list(outputs.arrays) == [name]
        np.testing.assert_array_equal(outputs.arrays[name], 2 * ROWS)


def test_another_model_is_run(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    outputs_of(doubling(tmp_path / "a.onnx", "a"), SAMPLES, cache, SILENT, label="a")
    outputs, cached = outputs_of(doubling(tmp_path / "b.onnx", "b"), SAMPLES, cache, SILENT, label="b")
    assert not cached
    assert list(outputs.arrays) == ["b"]


def test_large_outputs_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "KEPT_BYTES", ROWS.nbytes - 1)
    model, cache = doubling(tmp_path / "m.onnx", "y"), Cache(tmp_path / "cache")
    for _ in range(2):
        assert not outputs_of(model, SAMPLES, cache, SILENT, label="fp32")[1]
    assert not list(cache.entries())
