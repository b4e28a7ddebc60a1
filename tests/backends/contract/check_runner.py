"""Every name of TensorRT's API that running an engine takes, looked up in NVIDIA's own bindings.

Run by tests/backends/test_runner.py, once for each version.
"""

from __future__ import annotations

import tensorrt_bindings as trt
from runner_api import NOT_BEFORE_10, RTX_ONLY, exists, used_names
from snippet import snippet_names

from trtq.backends.runner import output_allocator

MAJOR = int(trt.__version__.split(".")[0])


def test_every_name_that_is_not_asked_for_first_exists() -> None:
    missing = {name for name in used_names() - RTX_ONLY if not exists(trt, name)}
    assert missing - {"EngineStat", "EngineStat.STRIPPED_WEIGHTS_SIZE", "ICudaEngine.get_engine_stat"} == (
        NOT_BEFORE_10 if MAJOR == 8 else set()
    )
    assert hasattr(trt, "EngineStat") == hasattr(trt.ICudaEngine, "get_engine_stat")


def test_every_name_of_the_documented_snippet_exists() -> None:
    assert [name for name in sorted(snippet_names()) if not exists(trt, name)] == []


def test_nothing_but_rtx_answers_for_its_engines_validity() -> None:
    """Where it is answered, the answer's types must be there, too."""
    assert hasattr(trt.Runtime, "get_engine_validity") == hasattr(trt, "EngineValidity")


def test_an_allocator_is_one_of_nvidias() -> None:
    asked = []
    allocator = output_allocator(trt, lambda name, size: asked.append((name, size)) or 4096)
    assert isinstance(allocator, trt.IOutputAllocator)
    assert allocator.reallocate_output_async("y", 0, 12, 256, 0) == 4096
    allocator.notify_shape("y", trt.Dims([3, 1]))
    assert (asked, allocator.shape, allocator.error) == ([("y", 12)], (3, 1), None)
