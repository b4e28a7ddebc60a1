"""Plugins in TensorRT for RTX: libraries that are loaded, and what is said where a plugin is missing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign import foreign_net, middle
from nets import saved

from trtq.backends.interface import BuildOptions
from trtq.backends.network import load_plugins, logger
from trtq.backends.tensorrt_rtx import build
from trtq.errors import InputError

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def test_a_missing_plugin_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"node 'm' \(Scaled\)[\s\S]*--plugin-lib LIB\.so"):
        build(saved(middle(), tmp_path), tmp_path / "m.plan")


def test_a_plugin_of_another_version_is_named(tmp_path: Path) -> None:
    model = foreign_net(
        "g (float[1,3,8,8] x) => (float[1,3,2,2] y) { y = ROIAlign_TRT(x, rois, images) }",
        rois=np.ones((1, 4), np.float32),
        images=np.zeros(1, np.int32),
    )
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("plugin_version", "0"))
    with pytest.raises(InputError, match=r'has ROIAlign_TRT in version 2: set[\s\S]*plugin_version to "2"'):
        build(saved(model, tmp_path), tmp_path / "m.plan")


def test_a_library_is_loaded_for_the_build(tmp_path: Path) -> None:
    """Any library will do: what it registers is its own affair."""
    library, compiler = tmp_path / "empty.so", shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source = b"int trtq_loaded = 41;"
    subprocess.run([compiler, "-shared", "-x", "c", "-o", library, "-"], input=source, check=True)
    load_plugins(trt, logger(trt), [str(library)])
    assert str(library) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_a_library_that_cannot_be_loaded_is_named(content: bytes | None, tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    if content is not None:
        library.write_bytes(content)
    options = BuildOptions(plugin_lib=(str(library),))
    with pytest.raises(InputError, match=r"plugin library cannot be loaded[\s\S]*lib\.so"):
        build(saved(middle(), tmp_path), tmp_path / "m.plan", options=options)
