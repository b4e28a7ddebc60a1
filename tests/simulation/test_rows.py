"""The runner of rows: order, workers, errors, and models that run on one row at a time only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from jobs import Case, conv_case, deploy_arguments, trtq_command
from numpy.typing import NDArray

from trtq.calibration.collect import collect
from trtq.calibration.extents import measure_extents
from trtq.console import SILENT
from trtq.data.batches import Batch, single_rows
from trtq.data.samples import InputSpec, Samples
from trtq.errors import InputError
from trtq.gate.tensors import compare_three
from trtq.graph.fold import fold
from trtq.graph.model import load_model
from trtq.graph.place import place
from trtq.graph.quantization import Quantization
from trtq.recovery.fixes.channels import collect_channels
from trtq.simulation.outputs import run_model
from trtq.simulation.rows import BRIEF, MOST_TOGETHER, Runner, Workers, runs_on_several
from trtq.simulation.simulator import Simulator

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(23, 6)).astype(np.float32)
WEIGHT = RANDOM.normal(size=(6, 5)).astype(np.float32)


def model_of(text: str, **constants: NDArray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    for name, values in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


def samples_of(model: onnx.ModelProto, **columns: NDArray) -> Samples:
    graph = gs.import_onnx(model)
    specs = tuple(InputSpec(t.name, np.dtype(t.dtype), tuple(t.shape)) for t in graph.inputs)
    return Samples("these rows", specs, columns, {}, "0" * 64)


def linear(batch: int | str = "N") -> onnx.ModelProto:
    return model_of(f"g (float[{batch},6] x) => (float[{batch},5] y) {{ y = MatMul(x, w) }}", w=WEIGHT)


def one_row_only(*, fails: bool) -> onnx.ModelProto:
    """y = x w for a row alone; more rows fail in the MatMul, or come out as one long row."""
    if fails:
        text = "g (float[N,6] x) => (float[N,5] y) { r = Reshape(x, one) y = MatMul(r, w) }"
        return model_of(text, w=WEIGHT, one=np.array([1, 6]))
    text = "g (float[N,6] x) => (float[N,M] y) { h = MatMul(x, w) y = Reshape(h, one) }"
    return model_of(text, w=WEIGHT, one=np.array([1, -1]))


# --- workers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7])
def test_results_come_in_order_whoever_is_first(count: int) -> None:
    def late(index: int) -> int:
        time.sleep(0.01 * (index % 3 == 0))
        return index

    assert list(Workers(count).map(late, range(20))) == list(range(20))


def busy(seconds: float) -> None:
    """Keep the processor busy."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.mark.parametrize(("seconds", "expected"), [(BRIEF, 4), (0.0, 4 * MOST_TOGETHER)])
def test_few_items_are_in_memory(seconds: float, expected: int) -> None:
    """Two for each worker, or two groups of items that take next to no time."""
    lock, alive, most = threading.Lock(), 0, 0

    def items() -> Iterator[int]:
        nonlocal alive, most
        for index in range(1000 if not seconds else 50):
            busy(seconds)
            with lock:
                alive += 1
                most = max(most, alive)
            yield index

    found = []
    for index in Workers(2).map(lambda index: index, items()):
        found.append(index)
        with lock:
            alive -= 1
    assert found == list(range(len(found)))
    assert most <= expected


def test_what_takes_next_to_nothing_is_worked_on_by_the_caller() -> None:
    """Where each waits for the interpreter, threads only hinder; of the items then one is in memory."""
    alive = most = 0
    workers: list[int] = []

    def items() -> Iterator[int]:
        nonlocal alive, most
        for index in range(20000):
            alive += 1
            most = max(most, alive) if index >= 10000 else 0
            yield index

    found = []
    for index in Workers(2).map(lambda index: workers.append(threading.get_ident()) or index, items()):
        found.append(index)
        alive -= 1
    assert found == list(range(20000))
    assert set(workers[10000:]) == {threading.get_ident()}
    assert most == 1


def test_what_comes_to_take_long_goes_to_threads_again() -> None:
    used: dict[int, int] = {}

    def work(index: int) -> int:
        busy(0.0 if index < 5000 else 0.003)
        used[index] = threading.get_ident()
        return index

    assert list(Workers(2).map(work, range(5100))) == list(range(5100))
    assert used[4999] == threading.get_ident()
    assert threading.get_ident() not in [used[index] for index in range(5050, 5100)]


def test_after_an_error_nothing_is_running() -> None:
    running, seen = threading.Semaphore(0), []

    def work(index: int) -> int:
        seen.append(index)
        if index == 3:
            raise RuntimeError("third")
        time.sleep(0.02)
        running.release()
        return index

    with pytest.raises(RuntimeError, match="third"):
        list(Workers(2).map(work, range(100)))
    finished = len(seen)
    time.sleep(0.05)
    assert len(seen) == finished < 10


# --- the runner --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 5, None])
@pytest.mark.parametrize("highest", [1, 4, 100])
def test_outputs_are_those_of_the_rows(workers: int | None, highest: int) -> None:
    model = linear()
    samples = samples_of(model, x=X)
    runner = Runner(gs.import_onnx(model))
    found = list(runner.over(samples, runner.batches(samples, highest), workers=workers))
    assert [len(outputs["y"]) for outputs in found] == [min(highest, 23 - i) for i in range(0, 23, highest)]
    np.testing.assert_allclose(np.concatenate([o["y"] for o in found]), X @ WEIGHT, rtol=1e-5, atol=1e-6)


def test_a_feed_may_hold_more_and_outputs_may_be_any_tensors() -> None:
    model = model_of(
        "g (float[N,6] x, float s) => (float[N,5] y) { h = MatMul(x, w) y = Mul(h, s) }", w=WEIGHT
    )
    runner = Runner(gs.import_onnx(model), ["h", "y"])
    found = runner.run({"x": X, "s": np.array(2, np.float32), "unused": X})
    assert runner.outputs == ("h", "y")
    np.testing.assert_array_equal(found["y"], 2 * found["h"])


def test_rows_of_different_shapes() -> None:
    model = model_of("g (float[N,L] x) => (float[N,1] y) { y = ReduceSum(x, a) }", a=np.array([1]))
    rows = [np.ones(length, np.float32) for length in (3, 3, 5, 1, 1, 1)]
    samples = samples_of(model, x=rows)  # type: ignore[arg-type]
    runner = Runner(gs.import_onnx(model))
    found = list(runner.over(samples, runner.batches(samples, 4), workers=2))
    assert [outputs["y"].ravel().tolist() for outputs in found] == [[3, 3], [5], [1, 1, 1]]


def test_buffers_hold_each_threads_own_outputs() -> None:
    model = linear()
    samples = samples_of(model, x=np.repeat(X, 20, axis=0))
    runner = Runner(gs.import_onnx(model), reuse=True)

    def total(batch: Batch, outputs: dict[str, NDArray]) -> float:
        time.sleep(0.0005)
        return float(outputs["y"].sum())

    found = list(runner.over(samples, samples.batches(), total, workers=4))
    np.testing.assert_allclose(found, np.repeat((X @ WEIGHT).sum(axis=1), 20), rtol=1e-4, atol=1e-5)


def test_single_rows_leave_the_padding_out() -> None:
    heads = np.arange(8).reshape(8, 1)  # two entries for each row
    batch = Batch({"x": np.arange(4), "h": heads, "s": np.array(7)}, 12, 3, 1)
    rows = list(single_rows(batch))
    assert [(row.start, row.rows, row.padding) for row in rows] == [(12, 1, 0), (13, 1, 0), (14, 1, 0)]
    assert [row.feed["x"].tolist() for row in rows] == [[0], [1], [2]]
    assert [row.feed["h"].ravel().tolist() for row in rows] == [[0, 1], [2, 3], [4, 5]]
    assert all(row.feed["s"] == 7 for row in rows)
    filled = list(single_rows(batch, filled=True))
    assert [(row.start, row.rows, row.padding) for row in filled] == [(12, 1, 3), (13, 1, 3), (14, 1, 3)]
    assert filled[1].feed["h"].ravel().tolist() == [2, 3] * 4


# --- errors ------------------------------------------------------------------------------------------------


def lookup() -> onnx.ModelProto:
    """Fails on the row whose index is not in the table."""
    return model_of(
        "g (int64[N] i) => (float[N,5] y) { h = Gather(table, i) y = MatMul(h, w) }",
        table=RANDOM.normal(size=(6, 6)).astype(np.float32),
        w=WEIGHT,
    )


def _simulate(model: Path, samples: Samples) -> object:
    graph = load_model(model)
    plan = place(graph)
    return Simulator(Quantization(graph.graph, plan, dict.fromkeys(plan.tensors, np.float32(1))), samples)


EVERYWHERE: dict[str, Callable[[Path, Samples], object]] = {
    "collect": lambda model, samples: collect(load_model(model).graph, ["h"], samples),
    "extents": lambda model, samples: measure_extents(load_model(model).graph, samples),
    "channels": lambda model, samples: collect_channels(load_model(model).graph, {"h": -1}, samples),
    "outputs": run_model,
    "simulator": _simulate,
    "tensors": lambda model, samples: compare_three(model, model, samples),
}


@pytest.mark.parametrize("place_", EVERYWHERE)
def test_an_error_names_the_row_and_the_source(place_: str, tmp_path: Path) -> None:
    """The row as the source numbers it: every other row of the source is looked at."""
    onnx.save(lookup(), model := tmp_path / "model.onnx")
    index = np.arange(40) % 6
    index[26] = 6
    samples = samples_of(lookup(), i=index).subset(range(0, 40, 2))
    with pytest.raises(InputError) as caught:
        EVERYWHERE[place_](model, samples)
    assert caught.value.problem.endswith("does not run on row 26 of the data")
    assert caught.value.file == "these rows"
    assert "idx=6" in str(caught.value.cause)


def test_a_batch_that_the_user_asked_for_is_not_changed(tmp_path: Path) -> None:
    onnx.save(one_row_only(fails=True), model := tmp_path / "model.onnx")
    samples = samples_of(one_row_only(fails=True), x=X)
    with pytest.raises(InputError, match="does not run on rows 0 to 3 of the data") as caught:
        run_model(model, samples, batch_size=4)
    assert "each of these rows alone" in str(caught.value.remedy)
    assert run_model(model, samples, batch_size=1).arrays["y"].shape == (23, 5)


# --- models that run on one row at a time only --------------------------------------------------------------


@pytest.mark.parametrize("fails", [True, False])
def test_outputs_of_a_model_for_one_row(fails: bool, tmp_path: Path) -> None:
    onnx.save(one_row_only(fails=fails), model := tmp_path / "model.onnx")
    samples = samples_of(one_row_only(fails=fails), x=X)
    done: list[int] = []
    found = run_model(model, samples, progress=done.append).arrays["y"]
    np.testing.assert_allclose(found, X @ WEIGHT, rtol=1e-5, atol=1e-6)
    assert done == [1] * 23
    assert not runs_on_several(load_model(model).graph, samples)


@pytest.mark.parametrize("batch", ["N", 1, 4])
def test_a_batch_that_works_is_kept(batch: int | str) -> None:
    samples = samples_of(linear(batch), x=X)
    runner = Runner(gs.import_onnx(linear(batch)))
    size = batch if isinstance(batch, int) else 8
    assert [b.rows for b in runner.batches(samples, 8)][:-1] == [size] * ((23 - 1) // size)
    assert runs_on_several(gs.import_onnx(linear(batch)), samples)


@pytest.mark.parametrize("fails", [True, False])
def test_the_simulator_of_a_model_for_one_row(fails: bool, tmp_path: Path) -> None:
    """It measures what it measures of the same model without the reshape."""
    scores = []
    for proto in (one_row_only(fails=fails), linear()):
        onnx.save(proto, path := tmp_path / "model.onnx")
        model = load_model(path)
        plan = place(model)
        quantization = Quantization(model.graph, plan, dict.fromkeys(plan.tensors, np.float32(0.03)))
        simulator = Simulator(quantization, samples_of(proto, x=X))
        np.testing.assert_allclose(simulator.reference["y"], X @ WEIGHT, rtol=1e-5, atol=1e-6)
        scores.append(simulator.score(plan).noise)
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert scores[0] > 1e-6


def for_one_row(folder: Path, batch: int | str = "N") -> Case:
    """A network that was exported with a batch of 1: a dynamic first axis, and a Reshape to one row."""
    case = conv_case(folder, batch, 48)
    model = onnx.load(case.model)
    flatten = next(node for node in model.graph.node if node.op_type == "Flatten")
    flatten.op_type = "Reshape"
    flatten.input.append("one")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 8]), "one"))
    onnx.save(model, case.model)
    return case


@pytest.mark.parametrize("batch", ["N", 1])
def test_a_model_for_one_row_is_deployed(batch: int | str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    case = for_one_row(tmp_path, batch)
    options = ("--method", "auto", "--max-drop", "50%")
    run = trtq_command(*deploy_arguments(case, tmp_path / "out", *options, metric="top1"))
    assert run.code == 0, run.err
    assert run.out.splitlines()[-1].startswith("PASS")
    measured = trtq_command("sensitivity", case.model, "--data", case.data, "-o", tmp_path / "s.json")
    assert measured.code == 0, measured.err
    tensors = ("--tensors", tmp_path / "t.json")
    candidate = tmp_path / "out" / "model.int8.onnx"
    gated = trtq_command(
        "gate", case.model, candidate, "--eval", case.data, "--metric", "top1", "--max-drop", "50%", *tensors
    )
    assert gated.code == 0, gated.err


@pytest.mark.slow
def test_learning_from_a_model_for_one_row(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed (extra qat)")
    from trtq.data.load import load_samples
    from trtq.recovery.learning.learn import learn

    case = for_one_row(tmp_path)
    model = load_model(case.model)
    fold(model.graph)
    plan = place(model)
    samples = load_samples(str(case.data), model.inputs)
    statistics = collect(model.graph, plan.tensors, samples)
    scales = {name: np.float32(histogram.amax / 100) for name, histogram in statistics.histograms.items()}
    learned = learn(Quantization(model.graph, plan, scales), model.graph, *samples.split(), SILENT)
    assert learned.whole
    assert learned.after_db >= learned.before_db
