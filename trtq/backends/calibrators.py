"""Calibrators for implicit quantization: NVIDIA's own classes, TensorRT 8.5 to 10.16, fed by `trtq`.

- `data_calibrator`: TensorRT measures the activations itself, on samples of `trtq`, with its entropy,
  min-max or legacy (percentile) algorithm.
- `table_calibrator`: TensorRT reads a table that `trtq` made, by any method, and measures nothing.

The base classes exist only in the `tensorrt` module, so the subclasses are made from the module given.

What the trampolines between C++ and Python do with errors shapes this module (found with the bindings of
8.6.1 and 10.16.1): an exception in `get_batch` is printed, swallowed and means "end of data", so a bad sample
would give a table of the samples before it; the same in `read_calibration_cache` means "no cache"; a list
with too few pointers is read beyond its end. Here no exception enters C++: it is kept in `error`, calibration
ends, nothing is written, and whoever builds raises it after the build. `stop_on_error` ends the build early.

The tests drive these classes from C++ through NVIDIA's bindings, with host memory for device memory. A
build by TensorRT's own library needs a GPU and was not run there; `CudaDevice` ran on a stand-in driver.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from trtq import __version__
from trtq.backends.cuda import open_cuda
from trtq.backends.inner import inner_scales
from trtq.backends.interface import Shape
from trtq.calibration.table import Table, metadata_path, version_number
from trtq.data.batches import batches
from trtq.data.samples import Samples
from trtq.errors import InputError, MissingBackendError, TrtqError
from trtq.files import PathLike, read_bytes, read_json, sha256_bytes, write_bytes, write_json

BASES = {
    "EntropyCalibration2": "IInt8EntropyCalibrator2",
    "EntropyCalibration": "IInt8EntropyCalibrator",
    "MinMaxCalibration": "IInt8MinMaxCalibrator",
    "LegacyCalibration": "IInt8LegacyCalibrator",
}
"""Algorithm as it stands in a table's header -> NVIDIA's class."""


class Device(Protocol):
    """Memory that TensorRT reads batches from."""

    def allocate(self, size: int) -> int:
        """The address of a new buffer of `size` bytes."""
        ...

    def copy_from_host(self, address: int, array: NDArray) -> None:
        """Start copying a C-contiguous array to the start of a buffer."""
        ...

    def synchronize(self) -> None:
        """Wait until all copies are done."""
        ...

    def free(self, address: int) -> None:
        """Give a buffer back."""
        ...


class CudaDevice:
    """Device memory of the first GPU, in the primary context, which TensorRT uses too.

    Every buffer is backed by page-locked host memory, so that the copies on the stream are asynchronous.

    Raises:
        MissingBackendError: neither PyCUDA nor cuda-bindings is installed and finds a GPU.
    """

    def __init__(self) -> None:
        try:
            self._cuda = open_cuda()
        except MissingBackendError as error:
            raise MissingBackendError(
                "calibration with TensorRT needs a GPU, and PyCUDA or cuda-bindings",
                cause=error.cause,
                remedy="pip install 'trtq[cuda]' on the machine with the GPU; or build with a table of"
                " `trtq calibrate`, which needs neither",
            ) from error
        self._stream = self._cuda.new_stream()
        self._staging: dict[int, NDArray] = {}

    def allocate(self, size: int) -> int:
        address = self._cuda.allocate(size)
        self._staging[address] = self._cuda.page_locked(size)
        return address

    def copy_from_host(self, address: int, array: NDArray) -> None:
        staging = self._staging[address]
        np.copyto(staging, array.reshape(-1).view(np.uint8))
        self._cuda.to_device(address, staging, self._stream)

    def synchronize(self) -> None:
        self._cuda.synchronize(self._stream)

    def free(self, address: int) -> None:
        del self._staging[address]
        self._cuda.free(address)


C = TypeVar("C", bound="Calibrator")
R = TypeVar("R")


def _kept(method: Callable[..., R]) -> Callable[..., R | None]:
    """Keep an exception of a method that C++ calls in the calibrator's `error`; after it, do nothing more."""

    @functools.wraps(method)
    def called(self: Calibrator, *args: Any) -> R | None:
        if self.error is not None:
            return None
        try:
            return method(self, *args)
        except (TrtqError, KeyboardInterrupt) as error:
            self.error = error
        except BaseException as error:
            self.error = InputError(
                f"calibration failed in {method.__name__}", cause=f"{type(error).__name__}: {error}"
            )
            self.error.__cause__ = error
        return None

    return called


class Calibrator:
    """What all calibrators of `trtq` share; use each for one build only.

    Attributes:
        error: what went wrong in a call from TensorRT. Raised after the build, whether it succeeded or not.
        table: the calibration table as bytes: given to TensorRT or, after calibration, written by it.
    """

    batch_size = 1
    quantile = 0.9999
    regression_cutoff = 1.0

    def __init__(self, table: bytes | None) -> None:
        super().__init__()  # of NVIDIA's class
        self.error: BaseException | None = None
        self.table = table

    def get_batch_size(self) -> int:
        return self.batch_size

    def read_calibration_cache(self) -> bytes | None:
        return self.table

    def get_quantile(self) -> float:
        return self.quantile

    def get_regression_cutoff(self) -> float:
        return self.regression_cutoff

    def read_histogram_cache(self, length: int) -> None:
        """None: the bindings pass `length` by value, so a histogram could not be handed over."""

    def write_histogram_cache(self, capsule: object, length: int) -> None:
        """Nothing is kept, since nothing could be read back."""


class TableCalibrator(Calibrator):
    """Hands TensorRT a table and refuses to calibrate (see `table_calibrator`)."""

    def __init__(self, table: Table) -> None:
        super().__init__(table.to_bytes())
        self._table = table

    def complete(self, trt: Any, network: Any) -> None:
        """Add scales for tensors that only TensorRT's network has (`trtq.backends.inner`)."""
        scales = inner_scales(trt, network, self._table.scales)
        self.table = dataclasses.replace(self._table, scales={**self._table.scales, **scales}).to_bytes()

    @_kept
    def get_batch(self, names: Sequence[str]) -> None:
        assert self.table is not None
        raise InputError(
            "TensorRT did not accept the calibration table and asked for data",
            cause=f"its header is {self.table.splitlines()[0].decode()}",
            remedy="look at TensorRT's log for the reason",
        )

    def write_calibration_cache(self, cache: memoryview) -> None:
        """Nothing: the table was not made by TensorRT."""


class DataCalibrator(Calibrator):
    """Feeds samples to TensorRT batch by batch (see `data_calibrator`).

    Attributes:
        shapes: input name -> shape of every batch; the calibration profile must have exactly these.
    """

    def __init__(
        self,
        samples: Samples,
        shapes: Mapping[str, Shape],
        batch_size: int,
        cache: CacheFile | None,
        device: Device | None,
        int64: bool,
        progress: Callable[[int], object] | None,
    ) -> None:
        super().__init__(cache.read() if cache else None)
        self.shapes = shapes
        self.batch_size = batch_size
        self._source = samples.source
        self._batches = batches(samples.rows(), batch_size, batch_size, samples.axes)
        self._cache = cache
        self._device = (device or CudaDevice()) if self.table is None else None
        self._buffers: dict[str, int] = {}
        self._int64 = int64
        self._progress = progress

    @_kept
    def get_batch(self, names: Sequence[str]) -> list[int] | None:
        addresses = None
        try:
            addresses = self._next_batch(names)
        finally:
            if addresses is None:  # TensorRT is done with the batch before
                self.close()
        return addresses

    @_kept
    def write_calibration_cache(self, cache: memoryview) -> None:
        self.table = bytes(cache)
        if self._cache and self._cache.read() is None:
            self._cache.write(self.table)

    def close(self) -> None:
        """Free the device buffers; done by itself at the end of the data and after an error."""
        while self._buffers:
            assert self._device is not None
            self._device.free(self._buffers.popitem()[1])

    def _next_batch(self, names: Sequence[str]) -> list[int] | None:
        if unknown := [name for name in names if name not in self.shapes]:
            raise InputError(
                f"the data has no array for the network's input '{unknown[0]}'",
                file=self._source,
                cause=f"it has {', '.join(self.shapes)}",
                remedy="calibrate the model that the data was loaded for",
            )
        if self._device is None:
            raise InputError(
                "TensorRT did not accept the calibration cache and asked for data",
                remedy="remove it to calibrate anew",
            )
        batch = next(self._batches, None)
        if batch is None:
            return None
        for name in names:
            array = self._as_network_type(name, batch.feed[name])
            if name not in self._buffers:
                self._buffers[name] = self._device.allocate(array.nbytes)
            self._device.copy_from_host(self._buffers[name], array)
        self._device.synchronize()
        if self._progress:
            self._progress(batch.rows)
        return [self._buffers[name] for name in names]

    def _as_network_type(self, name: str, array: NDArray) -> NDArray:
        """`array`, as int32 where it is int64 and TensorRT's parser makes that of it (before 10)."""
        if array.dtype != np.int64 or self._int64:
            return np.ascontiguousarray(array)
        narrow = array.astype(np.int32, order="C")
        if not np.array_equal(narrow, array):
            raise InputError(
                f"input '{name}' holds values beyond int32, which is what this TensorRT reads",
                file=self._source,
                remedy="look at that data, or build with TensorRT 10, which has int64",
            )
        return narrow


@dataclasses.dataclass(frozen=True)
class CacheFile:
    """A calibration table on disk that belongs to one model, data, method and version of TensorRT.

    Attributes:
        path: the table; beside it lies `<path>.json`.
        header: first line that this TensorRT and calibrator write.
        identity: `model` and `data` (SHA-256), `method` and `rows`, as they stand in `<path>.json`.
    """

    path: Path
    header: str
    identity: Mapping[str, Any]

    def read(self) -> bytes | None:
        """The table, byte for byte; None where there is no file.

        Raises:
            InputError: it is unreadable, or not of this version, calibrator, model, data or method, or was
                changed after it was written.
        """
        if not self.path.exists():
            return None
        try:
            content = read_bytes(self.path)
        except OSError as error:
            raise InputError(
                "cannot read the calibration cache", file=self.path, cause=error.strerror
            ) from error
        beside = metadata_path(self.path)
        found = read_json(beside, "calibration cache's metadata") if beside.exists() else {}
        header = content.split(b"\n", 1)[0].decode(errors="replace").strip()
        found = {**(found if isinstance(found, dict) else {}), "header": header}
        wanted = {"header": self.header, **self.identity, "sha256": sha256_bytes(content)}
        for what, value in wanted.items():
            if found.get(what) != value:
                raise InputError(
                    f"the calibration cache does not belong to this calibration: its {what} is another",
                    file=self.path,
                    cause=f"{what} of the cache: {found.get(what, 'unknown')}; of this calibration: {value}",
                    remedy="give another path, or remove the file to calibrate anew; to use a table as it is,"
                    " give it as the table",
                )
        return content

    def write(self, content: bytes) -> None:
        """Write the table and its metadata, each in one move."""
        write_bytes(self.path, content)
        metadata = {"sha256": sha256_bytes(content), **self.identity, "trtq": __version__}
        write_json(metadata_path(self.path), metadata)


def data_calibrator(
    trt: Any,
    algorithm: str,
    samples: Samples,
    *,
    model: str,
    batch_size: int,
    cache: PathLike | None = None,
    device: Device | None = None,
    quantile: float = Calibrator.quantile,
    regression_cutoff: float = Calibrator.regression_cutoff,
    progress: Callable[[int], object] | None = None,
) -> DataCalibrator:
    """A calibrator with which TensorRT measures the activations on samples.

    Samples are read as they are needed, one batch at a time. TensorRT calibrates with batches of one size: a
    last one that is not full is filled up with its last row. So every row counts, extremes do not depend on
    the batch size, and histograms do not where it divides the number of rows.

    Args:
        trt: the module `tensorrt` (or `tensorrt_bindings`), 8.5 to 10.16.
        algorithm: a key of `BASES`.
        samples: calibration data; every input's rows have one shape.
        model: SHA-256 of the model, for the cache.
        batch_size: rows of every batch; that of the calibration profile.
        cache: table to use if it belongs to this model, data, method and TensorRT, and to write otherwise if
            it does not exist.
        device: where batches are put; default `CudaDevice`, made only if there is something to calibrate.
        quantile, regression_cutoff: of LegacyCalibration: the quantile of |x| that becomes the range, and the
            fraction of the maximum at which its regression stops; both in (0, 1].
        progress: called with the number of rows handed over since the last call.

    Raises:
        MissingBackendError: this TensorRT has no calibrators; PyCUDA or a GPU is missing.
        InputError: an unknown algorithm; no rows, rows of several shapes, a batch size that the model does
            not take; a cache that belongs to something else.
    """
    for name, value in {"quantile": quantile, "regression cutoff": regression_cutoff}.items():
        if not 0 < value <= 1:
            raise InputError(f"the {name} must be above 0 and at most 1, not {value}")
    subclass = _subclass(trt, algorithm, DataCalibrator)
    method = f"tensorrt:{algorithm}"
    if algorithm == "LegacyCalibration":
        method += f":{quantile}:{regression_cutoff}"
    file = None
    if cache is not None:
        identity = {"model": model, "data": samples.hash, "method": method, "rows": len(samples)}
        file = CacheFile(Path(cache), f"TRT-{version_number(trt.__version__)}-{algorithm}", identity)
    shapes = _batch_shapes(samples, batch_size)
    int64 = hasattr(trt.DataType, "INT64")
    calibrator = subclass(samples, shapes, batch_size, file, device, int64, progress)
    calibrator.quantile, calibrator.regression_cutoff = quantile, regression_cutoff
    return calibrator


def table_calibrator(trt: Any, table: Table) -> TableCalibrator:
    """A calibrator that hands TensorRT `table`, with the header that this version accepts.

    It is of the class that the table's algorithm names, so that TensorRT reads the scales as they were meant.

    Raises:
        MissingBackendError: this TensorRT has no calibrators.
        InputError: an unknown algorithm.
    """
    subclass = _subclass(trt, table.algorithm, TableCalibrator)
    return subclass(dataclasses.replace(table, version=version_number(trt.__version__)))


def stop_on_error(trt: Any, calibrator: Calibrator) -> Any:
    """A progress monitor that ends the build once the calibrator has an error; None before TensorRT 10."""
    if not hasattr(trt, "IProgressMonitor"):
        return None
    base: Any = trt.IProgressMonitor

    class Monitor(base):
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            return calibrator.error is None

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def _subclass(trt: Any, algorithm: str, behaviour: type[C]) -> type[C]:
    """`behaviour` on top of NVIDIA's class for the algorithm."""
    if algorithm not in BASES:
        raise InputError(
            f"TensorRT has no calibrator '{algorithm}'", remedy=f"choose one of {', '.join(BASES)}"
        )
    if not hasattr(trt, BASES[algorithm]):
        raise MissingBackendError(
            f"TensorRT {trt.__version__} has no calibrators",
            cause="they were removed in TensorRT 11 and are not in TensorRT for RTX",
            remedy="quantize explicitly: `trtq migrate` makes a Q/DQ model of a calibration table; or"
            " pip install 'tensorrt>=8.5,<11'",
        )
    return type(behaviour.__name__, (behaviour, getattr(trt, BASES[algorithm])), {})


def _batch_shapes(samples: Samples, batch_size: int) -> dict[str, Shape]:
    if not len(samples):
        raise InputError(
            "there are no rows to calibrate with",
            file=samples.source,
            remedy="give a few hundred samples like those in production",
        )
    if batch_size < 1:
        raise InputError(f"the batch size must be at least 1, not {batch_size}")
    seen = {name: set(shapes) for name, shapes in samples.row_shapes().items()}
    for spec in samples.specs:
        name, size = spec.name, spec.batch_dim
        if spec.batch_axis is not None and isinstance(size, int) and size != batch_size:
            raise InputError(
                f"input '{name}' takes batches of {size}, not of {batch_size}",
                remedy=f"calibrate with a batch size of {size}",
            )
        if len(seen[name]) > 1:
            raise InputError(
                f"rows of input '{name}' have {len(seen[name])} different shapes",
                file=samples.source,
                cause="TensorRT calibrates at one shape",
                remedy="pad or crop the rows to one shape; or calibrate with `trtq calibrate` and build with"
                " its table",
            )
    return {spec.name: spec.fed_shape(seen[spec.name].pop(), batch_size) for spec in samples.specs}
