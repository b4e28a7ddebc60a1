"""Calibrators under NVIDIA's own bindings, driven from C++ as a builder does (see stub.cpp).

Host memory stands for device memory. Run by tests/backends/test_calibrators.py, once for each version.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorrt_bindings as trt

from trtq.backends.calibrators import BASES, data_calibrator, stop_on_error, table_calibrator
from trtq.calibration.table import Table, version_number
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.graph.inputs import InputSpec

MAJOR = int(trt.__version__.split(".")[0])
VERSION = {"8.6": 8601, "10.0": 100001, "10.8": 100800, "10.16": 101601}[
    ".".join(trt.__version__.split(".")[:2])
]
MODEL = "a" * 64
ALGORITHMS = {  # NVIDIA's enum CalibrationAlgoType
    "LegacyCalibration": 0,
    "EntropyCalibration": 1,
    "EntropyCalibration2": 2,
    "MinMaxCalibration": 3,
}
TENSOR_ROWS = "x: 3c010a14\nfeature/map:0: 3f800000\n"
ROWS = np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3)


class Calibration(ctypes.Structure):
    """stub.cpp's struct of the same name."""

    _fields_ = [
        ("algorithm", ctypes.c_int32),
        ("batch_size", ctypes.c_int32),
        ("batches", ctypes.c_int32),
        ("consumed", ctypes.c_void_p),
        ("consumed_length", ctypes.c_size_t),
        ("table", ctypes.c_void_p),
        ("table_length", ctypes.c_size_t),
    ]


STUB = ctypes.CDLL(f"libnvinfer.so.{MAJOR}")
STUB.drive.restype = Calibration
STUB.next_batch.restype = STUB.keeps_histogram.restype = STUB.step.restype = ctypes.c_bool
STUB.quantile.restype = STUB.regression_cutoff.restype = ctypes.c_double
STUB.last_argument.restype = ctypes.c_void_p

CONFIG = trt.Builder(trt.Logger()).create_builder_config()

pytestmark = pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT:DeprecationWarning")


def pointer(wrapped: Any) -> ctypes.c_void_p:
    """The C++ object that a configuration is given when `wrapped` is set on it."""
    if isinstance(wrapped, trt.IInt8Calibrator):
        CONFIG.int8_calibrator = wrapped
    else:
        CONFIG.progress_monitor = wrapped
    return ctypes.c_void_p(STUB.last_argument())


class Driven(NamedTuple):
    """What the builder's part saw."""

    algorithm: int
    batch_size: int
    batches: int
    consumed: bytes
    table: bytes


def computed_table(algorithm: str) -> bytes:
    return f"TRT-{VERSION}-{algorithm}\n{TENSOR_ROWS}".encode()


def drive(
    calibrator: Any, sizes: dict[str, int] | None = None, algorithm: str = "EntropyCalibration2"
) -> Driven:
    """Calibrate from C++, with the GIL released; `sizes` are the inputs' bytes in a batch."""
    sizes = sizes or {"x": calibrator.get_batch_size() * 24}
    names = (ctypes.c_char_p * len(sizes))(*(name.encode() for name in sizes))
    lengths = (ctypes.c_size_t * len(sizes))(*sizes.values())
    gc.collect()
    seen = STUB.drive(pointer(calibrator), len(sizes), names, lengths, computed_table(algorithm))
    consumed = ctypes.string_at(seen.consumed, seen.consumed_length)
    table = ctypes.string_at(seen.table, seen.table_length)
    return Driven(seen.algorithm, seen.batch_size, seen.batches, consumed, table)


class HostDevice:
    """Host memory as a `Device`; copies are done only when they are waited for, and freed memory is wiped."""

    def __init__(self) -> None:
        self.buffers: dict[int, ctypes.Array] = {}
        self.allocated = 0
        self._copies: list[tuple[int, np.ndarray]] = []

    def allocate(self, size: int) -> int:
        buffer = ctypes.create_string_buffer(size)
        self.allocated += 1
        self.buffers[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def copy_from_host(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        assert array.nbytes == len(self.buffers[address])
        self._copies.append((address, array))

    def synchronize(self) -> None:
        for address, array in self._copies:
            ctypes.memmove(address, array.ctypes.data, array.nbytes)
        self._copies.clear()

    def free(self, address: int) -> None:
        buffer = self.buffers.pop(address)
        ctypes.memset(address, 0xFF, len(buffer))


def samples_of(rows: Any = ROWS, **more: np.ndarray) -> Samples:
    columns = {"x": rows, **more}
    specs = [InputSpec("x", np.dtype(np.float32), ("N", 2, 3))]
    specs += [InputSpec(name, a.dtype, ("N", *a.shape[1:])) for name, a in more.items()]
    return Samples("calib.npz", tuple(specs), columns, {}, "d" * 64)


def calibrator_of(
    samples: Samples | None = None, algorithm: str = "EntropyCalibration2", **options: Any
) -> Any:
    options = {"model": MODEL, "batch_size": 2, "device": HostDevice(), **options}
    return data_calibrator(trt, algorithm, samples_of() if samples is None else samples, **options)


class BadRows:
    """Five rows of which number 3 is `bad`: a value, or an exception raised on reading it."""

    def __init__(self, bad: Any) -> None:
        self._bad = bad

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> Any:
        if index == 3 and isinstance(self._bad, BaseException):
            raise self._bad
        return self._bad if index == 3 else ROWS[index]


def test_version() -> None:
    assert version_number(trt.__version__) == VERSION


@pytest.mark.parametrize("algorithm", BASES)
def test_it_is_nvidias_class(algorithm: str) -> None:
    calibrator = calibrator_of(algorithm=algorithm)
    assert isinstance(calibrator, getattr(trt, BASES[algorithm]))
    assert isinstance(calibrator, trt.IInt8Calibrator)
    assert int(calibrator.get_algorithm()) == ALGORITHMS[algorithm]
    if MAJOR >= 10:
        STUB.interface_kind.restype = ctypes.c_char_p
        kind = "IInt8Calibrator" if algorithm == "LegacyCalibration" else BASES[algorithm]
        assert STUB.interface_kind(pointer(calibrator)) == kind.encode()


def test_a_configuration_takes_it_and_keeps_it_alive() -> None:
    with pytest.raises(TypeError, match="IInt8Calibrator"):
        CONFIG.int8_calibrator = object()
    calibrator = calibrator_of()
    alive = weakref.ref(calibrator)
    pointer(calibrator)
    del calibrator
    gc.collect()
    assert alive() is not None


@pytest.mark.parametrize("algorithm", BASES)
def test_cpp_sees_algorithm_batch_size_and_data(algorithm: str) -> None:
    device = HostDevice()
    done: list[int] = []
    calibrator = calibrator_of(algorithm=algorithm, device=device, progress=done.append)
    seen = drive(calibrator, algorithm=algorithm)
    assert calibrator.error is None
    assert (seen.algorithm, seen.batch_size, seen.batches) == (ALGORITHMS[algorithm], 2, 3)
    assert seen.consumed == np.concatenate([ROWS, ROWS[4:]]).tobytes()  # the last batch is filled up
    assert calibrator.table == seen.table == computed_table(algorithm)
    assert done == [2, 2, 1]
    assert device.allocated == 1
    assert not device.buffers


def test_inputs_are_given_by_name_in_the_networks_order() -> None:
    mask = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], bool)
    length = np.array([[7], [8], [9], [10]], np.int32)
    device = HostDevice()
    samples = samples_of(ROWS[:4], mask=mask, **{"length:0": length})
    seen = drive(calibrator_of(samples, device=device), {"length:0": 8, "x": 48, "mask": 4})
    batches = [(length[i : i + 2], ROWS[i : i + 2], mask[i : i + 2]) for i in (0, 2)]
    assert seen.consumed == b"".join(array.tobytes() for batch in batches for array in batch)
    assert device.allocated == 3
    assert not device.buffers


def test_int64_is_what_the_parser_makes_of_it() -> None:
    ids = np.array([[1, -2], [3, 2**31 - 1]])
    network = np.int64 if MAJOR >= 10 else np.int32
    seen = drive(calibrator_of(samples_of(ROWS[:2], ids=ids)), {"ids": ids.astype(network).nbytes})
    assert seen.consumed == ids.astype(network).tobytes()


@pytest.mark.skipif(MAJOR >= 10, reason="int64 exists since TensorRT 10")
def test_values_beyond_int32_are_an_error() -> None:
    calibrator = calibrator_of(samples_of(ROWS[:2], ids=np.array([[1], [2**31]])))
    assert drive(calibrator, {"ids": 8}).batches == 0
    assert "beyond int32" in str(calibrator.error)


def test_samples_are_read_as_needed() -> None:
    read = []

    class Column(BadRows):
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return ROWS[index]

    calibrator = calibrator_of(samples_of(Column(None)), batch_size=1)
    assert read == []
    assert STUB.next_batch(pointer(calibrator), b"x")
    assert len(read) <= 2


def test_end_of_data_stays_the_end() -> None:
    calibrator = calibrator_of()
    drive(calibrator)
    assert not STUB.next_batch(pointer(calibrator), b"x")
    assert calibrator.error is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full((2, 3), np.nan, np.float32), "row 3 of input 'x' holds NaN or infinite values"),
        (np.zeros((3, 3), np.float32), r"row 3 of input 'x' has shape \(3, 3\)"),
        (np.zeros((2, 3), np.int32), "row 3 of input 'x' is int32"),
        (OSError("disk on fire"), "OSError: disk on fire"),
        (StopIteration(), "StopIteration"),
    ],
)
def test_a_bad_row_is_an_error_not_the_end(bad: Any, message: str, tmp_path: Path) -> None:
    device = HostDevice()
    calibrator = calibrator_of(samples_of(BadRows(bad)), device=device, cache=tmp_path / "c")
    assert drive(calibrator).batches == 1
    assert isinstance(calibrator.error, InputError)
    with pytest.raises(InputError, match=message):
        raise calibrator.error
    assert not STUB.next_batch(pointer(calibrator), b"x")
    assert calibrator.table is None
    assert not device.buffers
    assert list(tmp_path.iterdir()) == []


def test_interrupt_is_kept() -> None:
    calibrator = calibrator_of(samples_of(BadRows(KeyboardInterrupt())))
    drive(calibrator)
    assert isinstance(calibrator.error, KeyboardInterrupt)


def test_an_exception_let_into_cpp_would_be_the_end_of_data(capfd: pytest.CaptureFixture) -> None:
    """Why errors are kept: what the bindings do with a calibrator that raises."""

    class Careless(trt.IInt8EntropyCalibrator2):
        def __init__(self) -> None:
            trt.IInt8EntropyCalibrator2.__init__(self)

        def get_batch(self, names: list[str]) -> list[int]:
            raise ValueError("bad batch")

    assert not STUB.next_batch(pointer(Careless()), b"x")
    assert "Exception caught in get_batch(): ValueError: bad batch" in capfd.readouterr().err


def test_input_without_data_is_an_error() -> None:
    calibrator = calibrator_of()
    assert drive(calibrator, {"x": 48, "y": 4}).batches == 0
    assert "the data has no array for the network's input 'y'" in str(calibrator.error)


def test_failing_device_is_an_error() -> None:
    class Full(HostDevice):
        def allocate(self, size: int) -> int:
            raise MemoryError(f"no {size} bytes")

    calibrator = calibrator_of(device=Full())
    drive(calibrator)
    assert calibrator.error.cause == "MemoryError: no 48 bytes"


def test_cache_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    drive(calibrator_of(cache=path))
    assert path.read_bytes() == computed_table("EntropyCalibration2")
    table = Table.load(path)
    assert table.metadata["model"] == MODEL
    assert table.metadata["data"] == "d" * 64
    assert table.metadata["method"] == "tensorrt:EntropyCalibration2"
    device = HostDevice()
    again = calibrator_of(cache=path, device=device)
    seen = drive(again)
    assert (seen.batches, seen.table) == (0, path.read_bytes())
    assert device.allocated == 0


@pytest.mark.parametrize("device", [None, HostDevice()])
def test_cache_needs_no_device(device: HostDevice | None, tmp_path: Path) -> None:
    drive(calibrator_of(cache=tmp_path / "c"))
    calibrator = calibrator_of(cache=tmp_path / "c", device=device)
    assert drive(calibrator).batches == 0
    assert not STUB.next_batch(pointer(calibrator), b"x")
    assert "did not accept the calibration cache" in str(calibrator.error)


def write_cache(path: Path, **changed: Any) -> None:
    """The cache of the default calibrator, with changed metadata or header."""
    drive(calibrator_of(cache=path))
    table = path.read_bytes().replace(str(VERSION).encode(), str(changed.pop("version", VERSION)).encode())
    path.write_bytes(table)
    metadata = Path(f"{path}.json")
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), **changed}))


@pytest.mark.parametrize(
    ("changed", "values"),
    [
        ({"version": 8503}, ["TRT-8503-EntropyCalibration2", f"TRT-{VERSION}-EntropyCalibration2"]),
        ({"model": "b" * 64}, ["b" * 64, MODEL]),
        ({"data": "c" * 64}, ["c" * 64, "d" * 64]),
        ({"method": "percentile:99.99"}, ["percentile:99.99", "tensorrt:EntropyCalibration2"]),
        ({"sha256": "e" * 64}, ["e" * 64, "sha256"]),
    ],
)
def test_cache_of_something_else_is_refused_and_kept(
    changed: dict[str, Any], values: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "c"
    write_cache(path, **changed)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError) as caught:
        calibrator_of(cache=path)
    assert caught.value.file == str(path)
    assert all(value in str(caught.value) for value in values)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_cache_of_another_algorithm_or_parameter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    drive(calibrator_of(cache=path))
    with pytest.raises(InputError, match="MinMaxCalibration"):
        calibrator_of(algorithm="MinMaxCalibration", cache=path)
    path = tmp_path / "legacy"
    drive(calibrator_of(algorithm="LegacyCalibration", cache=path), algorithm="LegacyCalibration")
    with pytest.raises(InputError, match=r"LegacyCalibration:0\.9999:1\.0.*LegacyCalibration:0\.5:1\.0"):
        calibrator_of(algorithm="LegacyCalibration", cache=path, quantile=0.5)


def test_foreign_cache_without_metadata_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(computed_table("EntropyCalibration2"))
    with pytest.raises(InputError, match="model of the cache: unknown"):
        calibrator_of(cache=path)
    assert path.read_bytes() == computed_table("EntropyCalibration2")


def test_cache_that_appears_during_calibration_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "c"
    calibrator = calibrator_of(cache=path)
    path.write_text("TRT-8503-EntropyCalibration2\n")
    drive(calibrator)
    assert "header of the cache: TRT-8503" in str(calibrator.error)
    assert path.read_text() == "TRT-8503-EntropyCalibration2\n"


def test_legacy_parameters() -> None:
    calibrator = calibrator_of(algorithm="LegacyCalibration", quantile=0.99999, regression_cutoff=0.25)
    assert STUB.quantile(pointer(calibrator)) == 0.99999
    assert STUB.regression_cutoff(pointer(calibrator)) == 0.25
    assert not STUB.keeps_histogram(pointer(calibrator))


@pytest.mark.parametrize("value", [0, 1.5, -1, float("nan")])
def test_impossible_quantile(value: float) -> None:
    with pytest.raises(InputError, match="the quantile must be"):
        calibrator_of(algorithm="LegacyCalibration", quantile=value)


@pytest.mark.parametrize("algorithm", BASES)
def test_table_is_handed_over_with_this_versions_header(algorithm: str) -> None:
    scales = {"x": np.float32(0.007876), "feature/map:0": np.float32(1), "a b": np.float32(1e-30)}
    old = Table(scales, version=7203, algorithm=algorithm, metadata={"method": "percentile:99.99"})
    calibrator = table_calibrator(trt, old)
    assert isinstance(calibrator, getattr(trt, BASES[algorithm]))
    seen = drive(calibrator, {"x": 24})
    assert seen.algorithm == ALGORITHMS[algorithm]
    assert seen.table == dataclasses.replace(old, version=VERSION).to_bytes()
    assert seen.table.splitlines()[0] == f"TRT-{VERSION}-{algorithm}".encode()
    assert Table.from_bytes(seen.table).scales == scales
    assert calibrator.error is None


def test_table_calibrator_refuses_to_calibrate() -> None:
    calibrator = table_calibrator(trt, Table({"x": np.float32(1)}))
    assert not STUB.next_batch(pointer(calibrator), b"x")
    assert "did not accept the calibration table" in str(calibrator.error)


def test_the_build_ends_after_an_error() -> None:
    calibrator = table_calibrator(trt, Table({"x": np.float32(1)}))
    monitor = stop_on_error(trt, calibrator)
    if MAJOR < 10:
        assert monitor is None
        return
    assert isinstance(monitor, trt.IProgressMonitor)
    assert STUB.step(pointer(monitor))
    STUB.next_batch(pointer(calibrator), b"x")
    assert not STUB.step(pointer(monitor))


def test_bad_requests() -> None:
    with pytest.raises(InputError, match="no calibrator 'Entropy'"):
        calibrator_of(algorithm="Entropy")
    with pytest.raises(InputError, match="no rows"):
        calibrator_of(samples_of(ROWS[:0]))
    with pytest.raises(InputError, match="at least 1"):
        calibrator_of(batch_size=0)


def test_batches_have_the_shapes_of_the_calibration_profile() -> None:
    assert calibrator_of(samples_of(ROWS, ids=np.zeros((5, 7), np.int32))).shapes == {
        "x": (2, 2, 3),
        "ids": (2, 7),
    }
    fixed = dataclasses.replace(samples_of(), specs=(InputSpec("x", np.dtype(np.float32), (4, 2, 3)),))
    with pytest.raises(InputError, match="takes batches of 4, not of 2"):
        calibrator_of(fixed)
    ragged = dataclasses.replace(
        samples_of([np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32)]),
        specs=(InputSpec("x", np.dtype(np.float32), ("N", 2, None)),),
    )
    with pytest.raises(InputError, match="2 different shapes"):
        calibrator_of(ragged)
