"""Calibrators: the contract with NVIDIA's own classes, each version in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from contract.bindings import run_checks

from trtq.backends.calibrators import CudaDevice
from trtq.errors import MissingBackendError


@pytest.mark.slow
@pytest.mark.parametrize("version", ["8.6.1", "10.0.1", "10.8.0", "10.16.1"])
def test_calibrators(version: str, downloads: Path, tmp_path: Path) -> None:
    run_checks("check_calibrators.py", version, downloads, tmp_path)


@pytest.mark.slow
def test_tensorrt_11(downloads: Path, tmp_path: Path) -> None:
    run_checks("check_without_calibrators.py", "11.4.0", downloads, tmp_path)


def test_tensorrt_rtx_has_none() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    from trtq.backends.calibrators import table_calibrator
    from trtq.calibration.table import Table

    with pytest.raises(MissingBackendError, match="has no calibrators"):
        table_calibrator(trt, Table({}))


def test_cuda_device_without_gpu() -> None:
    with pytest.raises(MissingBackendError, match=r"needs a GPU, and PyCUDA or cuda-bindings") as caught:
        CudaDevice()
    assert "pycuda: " in str(caught.value.cause)
    assert "cuda-bindings: " in str(caught.value.cause)
