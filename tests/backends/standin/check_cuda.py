"""Device memory, streams, events and graphs by the installed packages, on the stand-in driver."""

from __future__ import annotations

import ctypes
import time

import numpy as np
import pytest

from trtq.backends import cuda
from trtq.backends.calibrators import CudaDevice
from trtq.backends.clocks import Clocks
from trtq.backends.cuda import Cuda, CudaError, Graph, open_cuda
from trtq.backends.interface import Gpu, find_gpu

DATA = np.arange(1000, dtype=np.int32)
DRIVER = ctypes.CDLL("libcuda.so.1")


def installed() -> list[type]:
    found = []
    for implementation in cuda.IMPLEMENTATIONS:
        try:
            implementation()
        except ImportError:
            continue
        found.append(implementation)
    return found


@pytest.fixture(params=installed(), ids=lambda implementation: implementation.name)
def gpu(request: pytest.FixtureRequest) -> Cuda:
    return request.param()


def test_the_process_has_one() -> None:
    assert open_cuda() is open_cuda()


def test_copies_come_back_when_they_are_waited_for(gpu: Cuda) -> None:
    stream, found = gpu.new_stream(), np.zeros_like(DATA)
    address = gpu.allocate(DATA.nbytes)
    gpu.to_device(address, DATA, stream)
    gpu.to_host(found, address, stream)
    assert not found.any()
    gpu.synchronize(stream)
    np.testing.assert_array_equal(found, DATA)
    gpu.free(address)


def test_contexts_are_one_primary_context(gpu: Cuda) -> None:
    """What one instance allocates the next may use, as PyTorch and TensorRT may."""
    again, stream, found = type(gpu)(), gpu.new_stream(), np.zeros_like(DATA)
    address = gpu.allocate(DATA.nbytes)
    again.to_device(address, DATA, stream)
    again.to_host(found, address, stream)
    again.synchronize(stream)
    np.testing.assert_array_equal(found, DATA)
    gpu.free(address)


def test_memory_is_given_back(gpu: Cuda) -> None:
    before = gpu.free_memory()
    address = gpu.allocate(5000)
    assert gpu.free_memory() == before - 5000
    gpu.free(address)
    assert gpu.free_memory() == before


def test_no_bytes_have_an_address(gpu: Cuda) -> None:
    stream, nothing = gpu.new_stream(), np.zeros(0, np.float32)
    address = gpu.allocate(0)
    assert address
    gpu.to_device(address, nothing, stream)
    gpu.to_host(nothing, address, stream)
    gpu.synchronize(stream)
    gpu.free(address)


def test_page_locked_memory_lives_as_long_as_the_array(gpu: Cuda) -> None:
    stream = gpu.new_stream()
    staging, back = gpu.page_locked(DATA.nbytes), gpu.page_locked(DATA.nbytes)
    staging[:] = DATA.view(np.uint8)
    address = gpu.allocate(DATA.nbytes)
    gpu.to_device(address, staging, stream)
    gpu.to_host(back, address, stream)
    gpu.synchronize(stream)
    view = back[:4000].view(np.int32)
    del staging, back
    np.testing.assert_array_equal(view, DATA)
    gpu.free(address)


def test_events_measure_between_them(gpu: Cuda) -> None:
    stream, start, end = gpu.new_stream(), gpu.new_event(), gpu.new_event()
    gpu.record(start, stream)
    gpu.record(end, stream)
    gpu.synchronize(stream)
    assert 0 <= gpu.elapsed_ms(start, end) < 1000


def test_a_graph_repeats_what_was_issued(gpu: Cuda) -> None:
    stream, source, found = gpu.new_stream(), DATA.copy(), np.zeros_like(DATA)
    address = gpu.allocate(DATA.nbytes)
    graph = Graph(gpu.handle(stream), lambda: gpu.to_device(address, source, stream))
    source[:] = 7
    graph.launch()
    gpu.to_host(found, address, stream)
    gpu.synchronize(stream)
    assert (found == 7).all()
    graph.close()
    gpu.free(address)


def test_what_cannot_be_captured_leaves_the_stream_usable(gpu: Cuda) -> None:
    stream = gpu.new_stream()
    with pytest.raises(CudaError):
        Graph(gpu.handle(stream), lambda: gpu.synchronize(stream))
    gpu.synchronize(stream)


@pytest.mark.parametrize("size", [1 << 40, 1 << 62])
def test_too_much_memory(gpu: Cuda, size: int) -> None:
    with pytest.raises(CudaError, match=r"(?i)out.of.memory"):
        gpu.allocate(size)


def test_failures_name_the_error(gpu: Cuda) -> None:
    stream = gpu.new_stream()
    DRIVER.standin_fail(700)
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        gpu.synchronize(stream)


def test_calibrators_hand_over_batches() -> None:
    device, gpu = CudaDevice(), open_cuda()
    batch = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    address = device.allocate(batch.nbytes)
    copy = batch.copy()
    device.copy_from_host(address, copy)
    copy[:] = 0  # a batch is staged: it may go before the copy is done
    device.synchronize()
    stream, back = gpu.new_stream(), np.zeros_like(batch)
    gpu.to_host(back, address, stream)
    gpu.synchronize(stream)
    np.testing.assert_array_equal(back, batch)
    before = gpu.free_memory()
    device.free(address)
    assert gpu.free_memory() == before + batch.nbytes


def test_the_driver_is_named() -> None:
    assert find_gpu() == Gpu("Stand-in GPU", "9.0", "580.1")


def test_clocks_are_sampled_meanwhile() -> None:
    with Clocks() as clocks:
        time.sleep(0.2)
    found = clocks.ranges()
    assert found is not None
    low, middle, high = found["SM MHz"]
    assert low <= middle <= high <= 1980
    assert low < high  # it falls with each reading
    assert found["memory MHz"] == (2619, 2619, 2619)
    assert found["°C"] == (40, 40, 40)
    assert "W" not in found  # this card does not tell
