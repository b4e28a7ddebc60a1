"""Fake quantization against ONNX Runtime, and what learning makes of a small network."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from mixed import lowest_decibels
from small_graphs import Case, outputs, small_case

from trtq.console import SILENT
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.graph.quantization import Quantization
from trtq.recipe import Recipe
from trtq.simulation.session import simulation_session
from trtq.simulation.similarity import noise_db, sqnr_db

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra qat)")

from trtq.budget import Budget  # noqa: E402
from trtq.recovery.learning import learn as learning  # noqa: E402
from trtq.recovery.learning.learn import Checkpoint, learn  # noqa: E402 (needs torch)
from trtq.recovery.learning.pupil import Pupil, fake_quantize  # noqa: E402

ONE = Recipe(threads=1)


def _qdq(values: np.ndarray, scale: np.float32) -> np.ndarray:
    """QuantizeLinear and DequantizeLinear of ONNX Runtime."""
    make = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [make("QuantizeLinear", ["x", "s", "z"], ["q"]), make("DequantizeLinear", ["q", "s", "z"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, values.shape)],
        [onnx.ValueInfoProto(name="y")],
        [
            onnx.numpy_helper.from_array(np.array(scale), "s"),
            onnx.numpy_helper.from_array(np.array(0, np.int8), "z"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    (found,) = simulation_session(model.SerializeToString(), 1).run(["y"], {"x": values})
    return found


@pytest.mark.parametrize("scale", np.float32([0.25, 0.013, 3.7e-5, 11.0]))
def test_fake_quantization_to_the_bit(scale: np.float32) -> None:
    random = np.random.default_rng(0).standard_normal(5000).astype(np.float32) * np.float32(60) * scale
    ties = (np.arange(-300, 300, dtype=np.float32) + np.float32(0.5)) * scale
    values = np.concatenate([random, ties])
    found = fake_quantize(torch.from_numpy(values), torch.tensor(scale)).numpy()
    np.testing.assert_array_equal(found, _qdq(values, scale))


def test_gradients_of_fake_quantization() -> None:
    """1 inside and 0 where it saturates; for the scale code - x / s inside, the code where it saturates."""
    values = torch.tensor([0.3, -1.6, 127.4, 130.0, -200.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    fake_quantize(values, scale).sum().backward()
    np.testing.assert_array_equal(values.grad.numpy(), [1, 1, 1, 0, 0])
    expected = (0 - 0.3) + (-2 + 1.6) + (127 - 127.4) + 127 - 128
    assert float(scale.grad) == pytest.approx(expected, abs=1e-4)


def build(case: Case) -> None:
    hidden = case.input("x", 16)
    for _ in range(2):
        hidden = case.node("Relu", case.node("Gemm", hidden, case.weight(16, 16), case.weight(16)))
        hidden.shape = ["N", 16]
    case.output(case.node("Gemm", hidden, case.weight(16, 4), case.weight(4)), 4)


@pytest.fixture
def start(tmp_path: Path) -> tuple[Case, Quantization]:
    """Three linear layers whose ranges are four times too wide."""
    x = np.random.default_rng(1).normal(size=(64, 16)).astype(np.float32)
    case = small_case(tmp_path, build, x)
    quantization = case.quantized()
    wide = {name: np.float32(4 * scale) for name, scale in quantization.scales.items()}
    return case, replace(quantization, scales=wide)


def sqnr(case: Case, quantization: Quantization, rows: Samples) -> float:
    (expected,), (found,) = outputs(case.graph, rows), outputs(quantization.rewritten(), rows)
    return float(sqnr_db(expected, found)[0])


@pytest.mark.slow
def test_learning_is_measured_as_onnx_runtime_does(start: tuple[Case, Quantization]) -> None:
    case, quantization = start
    fitting, held_back = case.samples.split()
    learned = learn(quantization, case.graph, fitting, held_back, SILENT, recipe=ONE)
    assert learned.before_db == pytest.approx(sqnr(case, quantization, held_back), abs=0.02)
    assert learned.after_db == pytest.approx(sqnr(case, learned.quantization, held_back), abs=0.02)
    assert learned.after_db > learned.before_db + 1


@pytest.mark.slow
def test_the_codes_written_are_those_learned(start: tuple[Case, Quantization]) -> None:
    case, quantization = start
    fitting, held_back = case.samples.split()
    after = learn(quantization, case.graph, fitting, held_back, SILENT, recipe=ONE).quantization
    pupil, written = Pupil(after, torch.device("cpu")), after.rewritten().tensors()
    for name, axis in pupil.codes:
        codes = written[f"{name}/{axis}/int8"].values
        represented = pupil.weight((name, axis)).detach() / pupil.weight_scales[name, axis]
        np.testing.assert_array_equal(codes, represented.round().numpy())


@pytest.mark.slow
def test_an_interrupted_run_ends_like_a_whole_one(start: tuple[Case, Quantization]) -> None:
    case, quantization = start
    fitting, held_back = case.samples.split()
    states: list[bytes] = []
    whole = learn(
        quantization,
        case.graph,
        fitting,
        held_back,
        SILENT,
        recipe=ONE,
        checkpoint=Checkpoint(save=states.append),
    )
    resumed = learn(
        quantization, case.graph, fitting, held_back, SILENT, recipe=ONE, checkpoint=Checkpoint(states[2])
    )
    assert resumed.quantization.to_bytes() == whole.quantization.to_bytes()


@pytest.mark.slow
def test_the_teacher_is_the_model_and_not_the_corrected_graph(start: tuple[Case, Quantization]) -> None:
    """A quantization whose biases are wrong is measured against the model."""
    case, quantization = start
    graph = quantization.graph.copy()
    graph.nodes[-1].inputs[2].values = graph.nodes[-1].inputs[2].values + np.float32(5)
    fitting, held_back = case.samples.split()
    wrong = replace(quantization, graph=graph)
    learned = learn(wrong, case.graph, fitting, held_back, SILENT, recipe=ONE, budget=Budget.of(0.001))
    assert learned.before_db == pytest.approx(sqnr(case, wrong, held_back), abs=0.02)


@pytest.mark.slow
def test_where_long_steps_only_harm_short_ones_learn(
    start: tuple[Case, Quantization], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias is off; rates a thousand times too high find nothing better than the start, the fine ones do."""
    case, _ = start
    quantization = case.quantized()
    graph = quantization.graph.copy()
    bias = graph.nodes[-1].inputs[2]
    bias.values = bias.values + np.float32(0.1) * np.abs(bias.values).mean()
    off = replace(quantization, graph=graph)
    for name in ("RATE_SCALES", "RATE_BIASES", "RATE_CODES"):
        monkeypatch.setattr(learning, name, 1000 * getattr(learning, name))
    monkeypatch.setattr(learning, "FINE", learning.FINE / 1000)
    monkeypatch.setattr(learning, "MOST_STEPS", learning.FEWEST_STEPS)
    fitting, held_back = case.samples.split()
    states: list[bytes] = []
    made = learn(
        off, case.graph, fitting, held_back, SILENT, recipe=ONE, checkpoint=Checkpoint(save=states.append)
    )
    known = [torch.load(io.BytesIO(state), weights_only=True) for state in states]
    coarse = math.ceil(learning.FEWEST_STEPS / math.ceil(len(fitting) / learning.BATCH))
    assert known[coarse - 1]["epoch"] == coarse
    assert noise_db(known[coarse - 1]["noise"]) == pytest.approx(made.before_db)
    assert made.after_db == pytest.approx(sqnr(case, made.quantization, held_back), abs=0.02)
    assert made.after_db > made.before_db + 0.1


def test_labels_must_be_class_numbers(start: tuple[Case, Quantization]) -> None:
    case, quantization = start
    fitting, held_back = case.samples.split()
    with pytest.raises(InputError, match="class number"):
        learn(quantization, case.graph, fitting, held_back, SILENT, recipe=Recipe(labels="label", threads=1))


@dataclass(frozen=True)
class Asked(Budget):
    """A budget that is spent once it was asked a number of times."""

    times: int = 0
    asked: list[None] = field(default_factory=list)

    @property
    def over(self) -> bool:
        self.asked.append(None)
        return len(self.asked) > self.times


@pytest.mark.slow
def test_a_run_that_a_budget_cut_short_goes_on_when_there_is_time(start: tuple[Case, Quantization]) -> None:
    case, quantization = start
    fitting, held_back = case.samples.split()
    states: list[bytes] = []
    budget = Asked(times=60)
    short = learn(
        quantization,
        case.graph,
        fitting,
        held_back,
        SILENT,
        recipe=ONE,
        budget=budget,
        checkpoint=Checkpoint(save=states.append),
    )
    whole = learn(quantization, case.graph, fitting, held_back, SILENT, recipe=ONE)
    resumed = learn(
        quantization, case.graph, fitting, held_back, SILENT, recipe=ONE, checkpoint=Checkpoint(states[-1])
    )
    assert 0 < short.steps < whole.steps
    assert (short.whole, whole.whole) == (False, True)
    assert resumed.steps == whole.steps
    assert resumed.quantization.to_bytes() == whole.quantization.to_bytes()


@pytest.mark.slow
def test_classes_masked_with_infinity(tmp_path: Path) -> None:
    """An error unless it is asked for; then what is left is measured and learned."""
    mask = np.array([0, 0, -np.inf, 0], np.float32)

    def masked(case: Case) -> None:
        hidden = case.node(
            "Relu", case.node("Gemm", case.input("x", 16), case.weight(16, 16), case.weight(16))
        )
        hidden.shape = ["N", 16]
        case.output(case.node("Add", case.node("Gemm", hidden, case.weight(16, 4), case.weight(4)), mask), 4)

    case = small_case(tmp_path, masked, np.random.default_rng(1).normal(size=(64, 16)).astype(np.float32))
    quantization = case.quantized()
    wide = {name: np.float32(4 * scale) for name, scale in quantization.scales.items()}
    quantization = replace(quantization, scales=wide)
    fitting, held_back = case.samples.split()
    with pytest.raises(InputError, match="of the reference is NaN or infinite in row 0"):
        learn(quantization, case.graph, fitting, held_back, SILENT, recipe=ONE)
    learned = learn(
        quantization, case.graph, fitting, held_back, SILENT, recipe=Recipe(threads=1, ignore_nonfinite=True)
    )
    for figure, made in ((learned.before_db, quantization), (learned.after_db, learned.quantization)):
        (expected,), (found,) = outputs(case.graph, held_back), outputs(made.rewritten(), held_back)
        finite = np.isfinite(mask)
        assert figure == pytest.approx(float(sqnr_db(expected[:, finite], found[:, finite])[0]), abs=0.02)
    assert learned.after_db > learned.before_db + 1


def mixed(case: Case) -> None:
    """Boxes in pixels beside scores, each of a layer of its own behind a common one."""
    x = case.input("x", 16)
    hidden = case.node("Relu", case.node("Gemm", x, case.weight(16, 16), case.weight(16)))
    hidden.shape = ["N", 16]
    boxes = case.node("Add", case.node("Gemm", hidden, 30 * case.weight(16, 4)), np.float32(320))
    scores = case.node("Sigmoid", case.node("Gemm", hidden, case.weight(16, 8) / 4))
    case.output(case.node("Concat", boxes, scores, axis=1), 12)


@pytest.mark.slow
def test_learning_is_measured_by_the_worst_component(tmp_path: Path) -> None:
    case = small_case(tmp_path, mixed, np.random.default_rng(1).normal(size=(64, 16)).astype(np.float32))
    quantization = case.quantized()
    wide = {name: np.float32(4 * scale) for name, scale in quantization.scales.items()}
    fitting, held_back = case.samples.split()
    learned = learn(replace(quantization, scales=wide), case.graph, fitting, held_back, SILENT, recipe=ONE)

    def lowest(found: Quantization) -> float:
        pair = outputs(case.graph, held_back)[0], outputs(found.rewritten(), held_back)[0]
        return lowest_decibels(*pair, [slice(0, 4), slice(4, 12)])

    assert learned.before_db == pytest.approx(lowest(replace(quantization, scales=wide)), abs=0.02)
    assert learned.after_db == pytest.approx(lowest(learned.quantization), abs=0.02)
    assert learned.after_db > learned.before_db + 1
