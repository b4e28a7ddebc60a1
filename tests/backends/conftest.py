"""Engines of small graphs, and the folder of trained models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx
import pytest

from trtq.backends.interface import Build, Range


@pytest.fixture
def build_engine(tmp_path: Path) -> Callable[..., Build]:
    """Build a model, or a file, for one target with the real builder."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    from trtq.backends import tensorrt_rtx

    def build(
        model: onnx.ModelProto | Path,
        profile: Mapping[str, Range] | None = None,
        targets: Sequence[str] = ("8.6",),
    ) -> Build:
        path = tmp_path / "model.onnx"
        if isinstance(model, Path):
            path = model
        else:
            onnx.save(model, path)
        return tensorrt_rtx.build(path, tmp_path / "model.plan", profile=profile, targets=targets)

    return build


@pytest.fixture
def downloads(request: pytest.FixtureRequest) -> Path:
    """Where the bindings' wheels are kept (environment variable TRTQ_BINDINGS)."""
    if folder := os.environ.get("TRTQ_BINDINGS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        return Path(folder)
    assert request.config.cache is not None
    return request.config.cache.mkdir("tensorrt_bindings")
