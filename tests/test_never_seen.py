"""What calibration never saw gets no range: its nodes stay in floating point, and everything says so."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from jobs import Run
from nets import net, normal

from trtq.calibration.calibrate import NEVER_SEEN, rangeless
from trtq.calibration.methods import Method
from trtq.calibration.statistics import Histogram, Statistics
from trtq.calibration.table import Table
from trtq.console import SILENT
from trtq.graph.place import without_ranges
from trtq.graph.plan import Plan
from trtq.job import Job
from trtq.recipe import Recipe

_Trtq = Callable[..., Run]

WEIGHTS = {"a": normal(6, 5, seed=1), "b": normal(5, 4, seed=2), "c": normal(4, 4, seed=3)}
ROWS = 40


def branch() -> onnx.ModelProto:
    """h is what one of two branches gives: the values, or zeros where all inputs are below 100."""
    return net(
        """g (float[N,6] x) => (float[N,4] y) {
            first = MatMul(x, a)
            most = ReduceMax<keepdims = 0>(x)
            large = Greater(most, hundred)
            h = If(large) <
                then_branch = t () => (float[N,5] then_h) { then_h = Identity(first) },
                else_branch = e () => (float[N,5] else_h) { else_h = Mul(first, zero) }
            >
            second = MatMul(h, b)
            other = MatMul(first, b)
            y = Add(second, other)
        }""",
        hundred=np.float32(100),
        zero=np.float32(0),
        **{name: WEIGHTS[name] for name in "ab"},
    )


def empty_slice() -> onnx.ModelProto:
    """h has no row: only rows from the 1000th on; their sum, 0, is added to what is not empty."""
    return net(
        """g (float[N,6] x) => (float[N,4] y) {
            first = MatMul(x, a)
            head = MatMul(first, b)
            far = Slice(first, from, to, axes)
            h = Relu(far)
            second = MatMul(h, b)
            sum = ReduceSum(second, axes)
            y = Add(head, sum)
        }""",
        **{"from": np.array([1000]), "to": np.array([2000]), "axes": np.array([0])},
        **{name: WEIGHTS[name] for name in "ab"},
    )


def dead_relu() -> onnx.ModelProto:
    """h is ReLU of values that are always negative."""
    return net(
        """g (float[N,6] x) => (float[N,4] y) {
            first = MatMul(x, a)
            size = Abs(first)
            negative = Neg(size)
            h = Relu(negative)
            second = MatMul(h, b)
            other = MatMul(first, b)
            y = Add(second, other)
        }""",
        **{name: WEIGHTS[name] for name in "ab"},
    )


def times_zero() -> onnx.ModelProto:
    """h is a product with zero."""
    return net(
        """g (float[N,6] x) => (float[N,4] y) {
            first = MatMul(x, a)
            h = Mul(first, zero)
            second = MatMul(h, b)
            other = MatMul(first, b)
            y = Add(second, other)
        }""",
        zero=np.float32(0),
        **{name: WEIGHTS[name] for name in "ab"},
    )


def underflow() -> onnx.ModelProto:
    """The values of h are denormal."""
    return net(
        """g (float[N,6] x) => (float[N,4] y) {
            first = MatMul(x, a)
            h = Mul(first, tiny)
            second = MatMul(h, b)
            other = MatMul(first, b)
            y = Add(second, other)
        }""",
        tiny=np.float32(1e-39),
        **{name: WEIGHTS[name] for name in "ab"},
    )


MODELS: dict[Callable[[], onnx.ModelProto], str] = {
    branch: "calibration saw only zeros in 'h'",
    empty_slice: "calibration saw no value of 'h'",
    dead_relu: "calibration saw only zeros in 'h'",
    times_zero: "calibration saw only zeros in 'h'",
    underflow: "too small for a scale",
}


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, str]:
    """A model, its data, and the reason why 'second' stays in floating point."""
    return *written(request.param(), tmp_path), MODELS[request.param]


def written(model: onnx.ModelProto, folder: Path) -> tuple[Path, Path]:
    onnx.save(model, folder / "model.onnx")
    shape = [d.dim_value or ROWS for d in model.graph.input[0].type.tensor_type.shape.dim]
    np.savez(folder / "data.npz", x=normal(*shape, seed=9))
    return folder / "model.onnx", folder / "data.npz"


def quantized_inputs(path: Path) -> dict[str, set[str]]:
    """Node -> operators that make its inputs."""
    graph = onnx.load(path).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    return {node.name: {made_by.get(name, "") for name in node.input} for node in graph.node}


@pytest.mark.parametrize("method", ["max", "auto"])
def test_its_nodes_stay_in_floating_point(
    made: tuple[Path, Path, str], method: str, tmp_path: Path, trtq_run: _Trtq
) -> None:
    model, data, reason = made
    arguments = ("--data", data, "--method", method)
    for _ in range(2):  # the second time from the cache
        run = trtq_run("quantize", model, *arguments, "-o", tmp_path / "q.onnx")
        assert run.code == 0, run.err
        assert reason in run.err
        assert "warning" in run.err
        assert "second (MatMul)" in run.out
        assert reason in run.out
        inputs = quantized_inputs(tmp_path / "q.onnx")
        assert inputs["first"] == {"DequantizeLinear"}
        assert "DequantizeLinear" not in inputs["second"]
    assert "from the cache" in run.err
    run = trtq_run("calibrate", model, *arguments, "-o", tmp_path / "t.cache")
    assert run.code == 0, run.err
    table = Table.load(tmp_path / "t.cache")
    assert "h" not in table.scales
    assert "x" in table.scales
    assert 1.0 not in table.scales.values()
    assert reason in table.metadata[NEVER_SEEN]["h"]


def test_the_files_of_a_deployment_agree(
    made: tuple[Path, Path, str], tmp_path: Path, trtq_run: _Trtq
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    model, data, reason = made
    out = tmp_path / "out"
    run = trtq_run(
        *("deploy", model, "--data", data, "--eval", data, "--metric", "cosine", "--recover", "fix"),
        *("--min-sqnr", 90, "-o", out),
    )
    assert run.code == 1, run.err  # nothing reaches 90 dB: every step is tried
    plan, table = Plan.load(out / "plan.json"), Table.load(out / "calibration.cache")
    (node,) = [node for node in plan.nodes if node.name == "second"]
    assert (node.int8, node.rule) == (False, NEVER_SEEN)
    assert reason in node.reason
    assert list(table.scales)[: len(plan.tensors)] == plan.tensors
    assert "h" not in table.scales
    assert reason in html.unescape((out / "report.html").read_text())
    again = trtq_run(
        *("quantize", model, "--plan", out / "plan.json", "--table", out / "calibration.cache"),
        *("--rest", "fp16", "-o", tmp_path / "again.onnx"),
    )
    assert again.code == 0, again.err
    assert (tmp_path / "again.onnx").read_bytes() == (out / "model.int8.onnx").read_bytes()


def test_a_table_that_has_its_range_overrules_it(tmp_path: Path, trtq_run: _Trtq) -> None:
    model, _ = written(dead_relu(), tmp_path)
    Table({"x": np.float32(0.03), "first": np.float32(0.1), "h": np.float32(0.25)}).save(tmp_path / "t.cache")
    run = trtq_run("quantize", model, "--table", tmp_path / "t.cache", "-o", tmp_path / "q.onnx")
    assert run.code == 0, run.err
    assert quantized_inputs(tmp_path / "q.onnx")["second"] == {"DequantizeLinear"}
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    assert scales["h/scale"] == np.float32(0.25)


@pytest.mark.parametrize("command", ["quantize", "sensitivity"])
def test_where_nothing_is_left_in_int8_it_is_an_error(command: str, tmp_path: Path, trtq_run: _Trtq) -> None:
    model, data = written(dead_relu(), tmp_path)
    np.savez(data, x=np.zeros((ROWS, 6), np.float32))
    run = trtq_run(command, model, "--data", data, "-o", tmp_path / "out")
    assert run.code == 2
    assert "calibration leaves no node of the model in INT8" in run.err
    assert "calibration saw only zeros in 'x'" in run.err


@pytest.mark.slow
def test_sensitivity_and_study_leave_it_out(tmp_path: Path, trtq_run: _Trtq) -> None:
    model, data = written(dead_relu(), tmp_path)
    run = trtq_run("sensitivity", model, "--data", data, "--method", "max", "-o", tmp_path / "s.json")
    assert run.code == 0, run.err
    effects = json.loads((tmp_path / "s.json").read_text())["effects"]
    assert {name for effect in effects for name in effect["group"]["nodes"]} == {"first", "other"}
    run = trtq_run(
        *("study", model, "--data", data, "--eval", data, "--metric", "cosine", "--budget", "1s"),
        *("--method", "max", "-o", tmp_path / "study"),
    )
    assert run.code == 0, run.err
    tables = json.loads((tmp_path / "study" / "study.json").read_text())["tables"]
    methods = tables["Calibration methods, all layers INT8 (paper table 5)"]
    assert {row["floating_point"] for row in methods} == {1}


def residual() -> onnx.ModelProto:
    """Conv + Add whose residual input is always zero, then an average pooling of zeros and a product."""
    return net(
        """g (float[N,3,4,4] x) => (float[N,2] y, float[N,3,4,4] sum) {
            conv = Conv<pads = [1, 1, 1, 1]>(x, w)
            dead = Mul(x, zero)
            sum = Add(conv, dead)
            none = Mul(sum, zero)
            pooled = GlobalAveragePool(none)
            flat = Flatten(pooled)
            y = MatMul(flat, classes)
        }""",
        w=normal(3, 3, 3, 3),
        zero=np.float32(0),
        classes=normal(3, 2),
    )


def test_edges_of_additions_and_poolings_simply_go(tmp_path: Path, trtq_run: _Trtq) -> None:
    model, data = written(residual(), tmp_path)
    job = Job.open(Recipe(model=str(model), data=str(data)), SILENT)
    before = job.place()
    rules = {edge.rule for edge in before.edges}
    assert {"residual-add", "average-pool", "moved-input"} <= rules
    assert {edge.range for edge in before.edges if edge.node == "y"} == {"pooled"}  # of another tensor
    run = trtq_run(
        *("quantize", model, "--data", data, "--method", "max", "--rest", "fp32", "-o", tmp_path / "q.onnx")
    )
    assert run.code == 0, run.err
    for tensor in ("dead", "none", "pooled"):
        assert f"calibration saw only zeros in '{tensor}'" in run.err
    quantizers = [
        n.input[0] for n in onnx.load(tmp_path / "q.onnx").graph.node if n.op_type == "QuantizeLinear"
    ]
    assert quantizers == ["x"]


@pytest.mark.parametrize("tensor", ["x", "dead", "none", "pooled"])
def test_a_plan_without_a_range_is_one_that_can_be_carried_out(tensor: str, tmp_path: Path) -> None:
    model, data = written(residual(), tmp_path)
    job = Job.open(Recipe(model=str(model), data=str(data)), SILENT)
    before = job.place()
    plan = without_ranges(job.model.graph, before, {tensor: "because"}, rule=NEVER_SEEN)
    assert tensor not in plan.tensors
    assert set(plan.tensors) < set(before.tensors)
    quantized = {(item.node, item.index) for item in (*plan.edges, *plan.weights)}
    assert all((name, index) in quantized for name in plan.int8_nodes for index in range(2))
    assert {weight.node for weight in plan.weights} == set(plan.int8_nodes)
    pooling = {edge.node for edge in plan.edges} & {"pooled", "flat"}
    assert pooling == (set() if tensor in ("none", "pooled") else {"pooled", "flat"})


def test_a_tensor_that_only_held_back_rows_reach_has_its_range(tmp_path: Path, trtq_run: _Trtq) -> None:
    """`auto` fits on three quarters of the samples; the ranges are made from all of them."""
    model, data = written(dead_relu(), tmp_path)
    job = Job.open(Recipe(model=str(model), data=str(data)), SILENT)
    held_back = next(iter(job.parts[1].rows()))["x"]
    rows = np.zeros((ROWS, 6), np.float32)
    positions = [i for i, row in enumerate(job.data.rows()) if np.array_equal(row["x"], held_back)]
    rows[positions] = 1.0
    np.savez(data, x=rows)
    run = trtq_run("calibrate", model, "--data", data, "--method", "auto", "-o", tmp_path / "t.cache")
    assert run.code == 0, run.err
    scales = Table.load(tmp_path / "t.cache").scales
    assert scales["x"] == pytest.approx(1 / 127, rel=0.02)
    assert "saw only zeros in 'x'" not in run.err


def test_reasons() -> None:
    def of(*values: float) -> Histogram:
        histogram = Histogram()
        histogram.add(np.array(values, np.float32))
        return histogram

    statistics = Statistics({"seen": of(0, 2), "zeros": of(0, -0.0), "none": of(), "tiny": of(1e-40)})
    reasons = rangeless(statistics)
    assert list(reasons) == ["zeros", "none", "tiny"]
    assert reasons["none"] == "calibration saw no value of 'none'"
    method: Any = Method("percentile:1", lambda histogram: 0.0)
    assert rangeless(statistics, method)["seen"] == "percentile:1 keeps only zeros of 'seen'"
