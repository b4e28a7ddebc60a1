"""Collecting statistics of small models with ONNX Runtime; results are exact, so equal means equal bytes."""

from __future__ import annotations

import itertools
import signal
import threading
import time
import tracemalloc
from collections.abc import Iterable, Mapping

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray

from trtq.calibration.collect import collect
from trtq.calibration.statistics import Histogram, Statistics
from trtq.data.samples import Column, Samples
from trtq.errors import InputError
from trtq.graph.inputs import InputSpec

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.integers(-8, 9, (6, 5)).astype(np.float32) / 8  # sums of few bits: the same in any order


def graph_of(text: str, **constants: NDArray) -> gs.Graph:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    for name, values in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return gs.import_onnx(model)


def samples_of(graph: gs.Graph, **columns: Column) -> Samples:
    specs = tuple(InputSpec(t.name, np.dtype(t.dtype), tuple(t.shape)) for t in graph.inputs)
    return Samples("rows", specs, columns, {}, "0" * 64)


def linear(batch: int | str = "N") -> gs.Graph:
    """y = relu(x w)"""
    return graph_of(
        f"g (float[{batch},6] x) => (float[{batch},5] y) {{ h = MatMul(x, w) y = Relu(h) }}", w=WEIGHT
    )


def rows(count: int, seed: int = 0) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    return (random.integers(-64, 65, (count, 6)) / 16 * 2.0 ** random.integers(-3, 9, (count, 1))).astype(
        np.float32
    )


def expected(values: Mapping[str, Iterable[NDArray]], count: int) -> bytes:
    """The statistics of arrays computed without any model."""
    histograms = {}
    for name, parts in values.items():
        histograms[name] = Histogram()
        for part in parts:
            histograms[name].add(np.asarray(part, np.float32))
    return Statistics(histograms, count).to_bytes()


def expected_linear(x: NDArray) -> bytes:
    h = x @ WEIGHT
    return expected({"x": [x], "h": [h], "y": [np.maximum(h, 0)]}, len(x))


TENSORS = ["x", "h", "y"]


@pytest.mark.parametrize("workers", [1, 2, 4, None])
def test_statistics_are_of_inputs_activations_and_outputs(workers: int | None) -> None:
    x = rows(37)
    graph = linear()
    statistics = collect(graph, TENSORS, samples_of(graph, x=x), workers=workers)
    assert list(statistics.histograms) == TENSORS
    assert statistics.to_bytes() == expected_linear(x)


def test_order_and_shards_do_not_count() -> None:
    x = rows(40)
    graph = linear()
    whole = collect(graph, TENSORS, samples_of(graph, x=x)).to_bytes()
    shuffled = np.random.default_rng(1).permutation(x)
    assert collect(graph, TENSORS, samples_of(graph, x=shuffled), workers=2).to_bytes() == whole
    total = Statistics.empty(TENSORS)
    for part in np.split(shuffled, [1, 7, 30]):
        total.merge(collect(graph, TENSORS, samples_of(graph, x=part)))
    assert total.to_bytes() == whole
    assert collect(graph, TENSORS, samples_of(graph, x=x).subset(range(40))).to_bytes() == whole


@pytest.mark.parametrize("count", [1, 4, 8, 10])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_fixed_batch_gives_the_statistics_of_the_dynamic_model(count: int, workers: int) -> None:
    """The rows that fill up the last batch are not counted."""
    x = rows(count)
    fixed = collect(linear(4), TENSORS, samples_of(linear(4), x=x), workers=workers)
    assert fixed.rows == count
    assert fixed.to_bytes() == expected_linear(x)


def test_a_fixed_batch_folded_into_more_rows() -> None:
    """Two rows of h for each one of x, as where attention heads join the batch."""
    graph = graph_of(
        "g (float[4,6] x) => (float[8,3] y) { h = Reshape(x, s) y = Relu(h) }", s=np.array([8, 3])
    )
    x = rows(6)
    statistics = collect(graph, ["h", "y"], samples_of(graph, x=x))
    assert statistics.to_bytes() == expected({"h": [x], "y": [np.maximum(x, 0)]}, 6)


def test_inputs_alone_need_no_run() -> None:
    """The model fails on every row, but is not asked."""
    graph = graph_of("g (float[N,6] x) => (float[N,5] y) { y = Reshape(x, s) }", s=np.array([-1, 5]))
    x = rows(3)
    assert collect(graph, ["x"], samples_of(graph, x=x)).to_bytes() == expected({"x": [x]}, 3)
    with pytest.raises(InputError, match="does not run"):
        collect(graph, ["x", "y"], samples_of(graph, x=x))


def test_several_inputs_and_dtypes() -> None:
    graph = graph_of(
        """g (float16[N,3] a, int64[N] i, float[N,3] b) => (float[N,3] y) {
            c = Cast <to = 1> (a)
            e = Gather(table, i)
            s = Add(c, e)
            y = Add(s, b)
        }""",
        table=np.arange(30, dtype=np.float32).reshape(10, 3),
    )
    a = (RANDOM.integers(-50, 50, (9, 3)) / 8).astype(np.float16)
    b, i = rows(9)[:, :3], RANDOM.integers(0, 10, 9)
    statistics = collect(graph, ["a", "b", "e", "y"], samples_of(graph, a=a, i=i, b=b))
    e = np.arange(30).reshape(10, 3)[i]
    assert statistics.to_bytes() == expected({"a": [a], "b": [b], "e": [e], "y": [a + e + b]}, 9)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_row_may_have_its_own_shape(workers: int) -> None:
    graph = graph_of("g (float[N,L,2] x) => (float[N,2] y) { y = ReduceSum(x, axis) }", axis=np.array([1]))
    x = [rows(length)[:, :2] for length in (1, 5, 5, 3, 30, 2)]
    statistics = collect(graph, ["x", "y"], samples_of(graph, x=x), workers=workers)
    assert statistics.to_bytes() == expected({"x": x, "y": [row.sum(axis=0) for row in x]}, 6)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_shape_that_depends_on_the_values(workers: int) -> None:
    """Rows of one shape share buffers, but not where another row needs a larger, smaller or no one."""
    graph = graph_of(
        "g (float[N,6] x) => (float[M] y) { c = Greater(x, zero) f = Reshape(c, all) y = Compress(x, f) }",
        zero=np.float32(0),
        all=np.array([-1]),
    )
    x = rows(40)
    x[7], x[20] = np.abs(x[7]) + 1, -np.abs(x[20]) - 1
    statistics = collect(graph, ["x", "y"], samples_of(graph, x=x), workers=workers)
    assert statistics.to_bytes() == expected({"x": [x], "y": [row[row > 0] for row in x]}, 40)


def test_tensors_that_share_memory_in_the_model() -> None:
    graph = graph_of(
        "g (float[N,6] x) => (float[N,3,2] y) { h = Abs(x) i = Identity(h) y = Reshape(i, s) }",
        s=np.array([-1, 3, 2]),
    )
    x = rows(9)
    statistics = collect(graph, ["h", "i", "y"], samples_of(graph, x=x), workers=1)
    assert statistics.to_bytes() == expected({name: [np.abs(x)] for name in ("h", "i", "y")}, 9)


def test_the_graph_is_not_changed() -> None:
    graph = linear()
    before = gs.export_onnx(graph).SerializeToString()
    collect(graph, ["h"], samples_of(graph, x=rows(2)))
    assert gs.export_onnx(graph).SerializeToString() == before


@pytest.mark.parametrize(("batch", "count", "workers"), [("N", 23, 3), (4, 10, 1)])
def test_progress_counts_every_row_once(batch: int | str, count: int, workers: int) -> None:
    done: list[int] = []
    graph = linear(batch)
    collect(graph, ["h"], samples_of(graph, x=rows(count)), workers=workers, progress=done.append)
    assert sum(done) == count
    assert max(done) == (1 if batch == "N" else 4)


class Made:
    """Rows of 200 kB that exist only once they are read."""

    def __len__(self) -> int:
        return 300

    def __getitem__(self, index: int) -> NDArray:
        return np.full(50000, index, np.float32)


def test_nothing_of_a_row_is_kept_but_its_counts() -> None:
    graph = graph_of("g (float[N,50000] x) => (float[N,50000] y) { y = Relu(x) }")
    samples = samples_of(graph, x=Made())
    collect(graph, ["x", "y"], samples.subset([0]))  # compiled code is loaded once
    tracemalloc.start()
    try:
        statistics = collect(graph, ["x", "y"], samples, workers=2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert statistics.histograms["y"].total == 300 * 50000
    assert peak < 5_000_000  # all rows: 60 MB


# -- what goes wrong


def log_of(batch: int | str = "N") -> gs.Graph:
    return graph_of(f"g (float[{batch},6] x) => (float[{batch},6] y) {{ l = Log(x) y = Neg(l) }}")


@pytest.mark.parametrize(("value", "workers"), [(-1.0, 1), (0.0, 2)])  # log: NaN, -inf
def test_an_activation_that_is_not_finite(value: float, workers: int) -> None:
    x = np.ones((20, 6), np.float32)
    x[13, 2:4] = value
    with pytest.raises(InputError) as caught:
        collect(log_of(), ["x", "l"], samples_of(log_of(), x=x), workers=workers)
    assert caught.value.problem == "tensor 'l' is not finite for row 13 of the data"
    assert caught.value.cause == "2 of 6 values are NaN or infinite"
    assert caught.value.remedy


def test_an_activation_that_is_not_finite_in_a_fixed_batch() -> None:
    x = np.ones((10, 6), np.float32)
    x[9, 0] = -1
    with pytest.raises(InputError, match="'l' is not finite for rows 8 to 9 of the data"):
        collect(log_of(4), ["l"], samples_of(log_of(4), x=x))


def test_data_that_is_not_finite() -> None:
    x = np.ones((3, 6), np.float32)
    x[1, 0] = np.nan
    with pytest.raises(InputError, match="row 1 of input 'x' holds NaN"):
        collect(linear(), TENSORS, samples_of(linear(), x=x))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_row_that_the_model_does_not_take(workers: int) -> None:
    graph = graph_of("g (int64[N] i) => (float[N,5] y) { y = Gather(w, i) }", w=WEIGHT)
    index = np.array([0, 5, 2, 6, 1])  # of six rows
    with pytest.raises(InputError, match="does not run on row 3 of the data") as caught:
        collect(graph, ["y"], samples_of(graph, i=index), workers=workers)
    assert "idx=6" in str(caught.value.cause)


class Slow:
    """Rows that take a while to read, as from a disk, and how many were read."""

    def __init__(self, rows: NDArray, interrupt_at: int | None = None) -> None:
        self.rows, self.interrupt_at, self.read = rows, interrupt_at, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> NDArray:
        self.read += 1
        if self.read == self.interrupt_at:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.002)
        return self.rows[index]


def test_the_first_error_ends_the_work_of_all() -> None:
    x = np.ones((3000, 6), np.float32)
    x[5] = -1
    column = Slow(x)
    with pytest.raises(InputError, match="row 5"):
        collect(log_of(), ["l"], samples_of(log_of(), x=column), workers=2)
    assert column.read < 1000


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_the_work_of_all(workers: int) -> None:
    column = Slow(np.ones((3000, 6), np.float32), interrupt_at=20)
    with pytest.raises(KeyboardInterrupt):
        collect(log_of(), ["l"], samples_of(log_of(), x=column), workers=workers)
    assert column.read < 1000


def test_errors_of_the_caller_end_it_too() -> None:
    steps = itertools.count()

    def progress(_: int) -> None:
        if next(steps) == 3:
            raise RuntimeError("the terminal is gone")

    column = Slow(np.ones((3000, 6), np.float32))
    with pytest.raises(RuntimeError, match="terminal"):
        collect(log_of(), ["l"], samples_of(log_of(), x=column), workers=2, progress=progress)
    assert column.read < 1000
