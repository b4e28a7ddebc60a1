"""Engines without a GPU: run on stand-ins for the driver and TensorRT, and held against NVIDIA's bindings."""

from __future__ import annotations

from pathlib import Path

import pytest
from contract.bindings import run_checks as run_with_bindings
from contract.runner_api import exists, used_names
from contract.snippet import snippet_names
from standin.machine import run_checks

from trtq.backends.runner import output_allocator


@pytest.mark.slow
def test_device_memory(tmp_path: Path) -> None:
    run_checks("check_cuda.py", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["8.6.1", "10.16.1.11"])
def test_engines(version: str, tmp_path: Path) -> None:
    run_checks("check_engines.py", tmp_path, TRTQ_STANDIN_VERSION=version)


@pytest.mark.slow
def test_costs_of_layers(tmp_path: Path) -> None:
    run_checks("check_cost.py", tmp_path)


@pytest.mark.slow
def test_engines_that_do_not_compute_their_models(tmp_path: Path) -> None:
    run_checks("check_parted.py", tmp_path)


@pytest.mark.slow
def test_the_fastest_engine_is_found_by_timing(tmp_path: Path) -> None:
    run_checks("check_race.py", tmp_path)


def test_deploy_where_the_engine_does_not_load(tmp_path: Path) -> None:
    run_checks("check_deploy.py", tmp_path, tensorrt=False)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["8.6.1", "10.0.1", "10.8.0", "10.16.1", "11.4.0"])
def test_every_name_used_is_in_nvidias_bindings(version: str, downloads: Path, tmp_path: Path) -> None:
    run_with_bindings("check_runner.py", version, downloads, tmp_path)


def test_every_name_used_is_in_tensorrt_for_rtx() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    names = used_names()
    assert len(names) > 50  # the search itself works
    assert {"Runtime.deserialize_cuda_engine", "IExecutionContext.execute_async_v3"} <= snippet_names()
    names |= snippet_names()
    assert {name for name in names if not exists(trt, name)} == set()
    assert isinstance(output_allocator(trt, lambda name, size: 0), trt.IOutputAllocator)
