"""On a machine with a GPU: device memory, and whole jobs. `pytest -m gpu` runs these, and hides no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from jobs import Run

from trtq.backends import cuda
from trtq.backends.builders import chosen, runs_on
from trtq.backends.calibrators import CudaDevice
from trtq.backends.interface import find_gpu

pytestmark = pytest.mark.gpu

BYTES = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)


@pytest.fixture(params=cuda.IMPLEMENTATIONS, ids=lambda made: made.name)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> cuda.Cuda:
    """Each implementation, as the one that is used."""
    try:
        opened: cuda.Cuda = request.param()
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(cuda, "open_cuda", lambda: opened)
    monkeypatch.setattr("trtq.backends.calibrators.open_cuda", lambda: opened)
    return opened


def test_memory_there_and_back(device: cuda.Cuda) -> None:
    stream, back = device.new_stream(), np.zeros_like(BYTES)
    start, end = device.new_event(), device.new_event()
    address = device.allocate(BYTES.nbytes)
    device.record(start, stream)
    device.to_device(address, BYTES, stream)
    device.to_host(back, address, stream)
    device.record(end, stream)
    device.synchronize(stream)
    device.free(address)
    np.testing.assert_array_equal(back, BYTES)
    assert device.elapsed_ms(start, end) > 0
    with pytest.raises(cuda.CudaError, match=r"(?i)out.of.memory"):
        device.allocate(1 << 50)


def test_a_graph_copies_what_is_there_when_it_is_launched(device: cuda.Cuda) -> None:
    stream, back = device.new_stream(), np.zeros_like(BYTES)
    staging, address = device.page_locked(BYTES.nbytes), device.allocate(BYTES.nbytes)
    graph = cuda.Graph(device.handle(stream), lambda: device.to_device(address, staging, stream))
    staging[:] = BYTES
    graph.launch()
    device.to_host(back, address, stream)
    device.synchronize(stream)
    graph.close()
    device.free(address)
    np.testing.assert_array_equal(back, BYTES)


def test_buffers_of_calibrators(device: cuda.Cuda) -> None:
    calibrators, stream = CudaDevice(), device.new_stream()
    batch = BYTES.view(np.float32).reshape(8, -1)
    back, address = np.zeros_like(batch), calibrators.allocate(batch.nbytes)
    calibrators.copy_from_host(address, batch)
    calibrators.synchronize()
    device.to_host(back, address, stream)
    device.synchronize(stream)
    calibrators.free(address)
    assert back.tobytes() == batch.tobytes()


def test_the_context_is_pytorchs(device: cuda.Cuda) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    tensor, stream = torch.zeros(len(BYTES), dtype=torch.uint8, device="cuda"), device.new_stream()
    torch.cuda.synchronize()
    device.to_device(tensor.data_ptr(), BYTES, stream)
    device.synchronize(stream)
    np.testing.assert_array_equal(tensor.cpu().numpy(), BYTES)


def test_a_job_is_gated_on_what_runs_here(trtq_run: Callable[..., Run], tmp_path: Path) -> None:
    """On the engine, or where the builder's engines do not run on this GPU, as on a machine without one."""
    gpu = find_gpu()
    assert gpu is not None
    run = trtq_run("demo", "-o", tmp_path / "out")
    assert run.code == 0
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    if runs_on(chosen(), gpu.compute_capability):
        assert "measured on the engine" in run.out + run.err
        assert verdict["executor"] == "engine"
    else:
        assert f"{chosen()} does not run on {gpu.name}" in run.err
        assert "17 of 17 weighted nodes in INT8" in run.out + run.err
