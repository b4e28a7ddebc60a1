"""Sequences through a model, against a loop over ONNX's reference implementation written here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import pytest
from numpy.typing import NDArray

from trtq.cache import Cache, Key
from trtq.calibration.collect import collect, collect_sharded
from trtq.console import SILENT
from trtq.data.feeding import Feeding
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.graph.model import load_model
from trtq.simulation import workers as parallel
from trtq.simulation.outputs import run_model, run_sharded
from trtq.simulation.pool import Pool
from trtq.simulation.states import with_states
from trtq.simulation.workers import Work, cut

LENGTHS = [5, 1, 9, 4, 70, 80]
NUMBERS = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
ROWS = len(NUMBERS)
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(ROWS, 1, 4)).astype(np.float32)
START = np.tanh(RANDOM.normal(size=(len(LENGTHS), 2, 1, 3))).astype(np.float32)

STREAM = """<ir_version: 8, opset_import: ["": 17]>
g (float[1,4] x, float[2,1,3] h) => (float[1,3] y, float[2,1,3] hn)
  <int64 zero = {0}, int64 one = {1}, int64[1] axes = {0}> {
  h0 = Gather <axis = 0> (h, zero)  h1 = Gather <axis = 0> (h, one)
  a = MatMul(x, w)   b = MatMul(h0, u)   s = Add(a, b)   n0 = Tanh(s)
  c = MatMul(n0, v)  t = Add(c, h1)      y = Tanh(t)
  q0 = Unsqueeze(n0, axes)  q1 = Unsqueeze(y, axes)  hn = Concat <axis = 0> (q0, q1)
}"""

GROWING = """<ir_version: 8, opset_import: ["": 17]>
g (float[N,4] x, float[N,past,4] cache) => (float[N,4] y, float[N,more,4] grown) <int64[1] axes = {1}> {
  now = Unsqueeze(x, axes)  grown = Concat <axis = 1> (cache, now)
  y = ReduceMean <axes = [1], keepdims = 0> (grown)
}"""


def model(path: Path, text: str) -> Path:
    proto = onnx.parser.parse_model(text)
    random = np.random.default_rng(1)
    for name, shape in (("w", (4, 3)), ("u", (3, 3)), ("v", (3, 3))):
        if any(name in node.input for node in proto.graph.node):
            values = random.normal(size=shape).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(proto, path)
    return path


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    return model(tmp_path / "stream.onnx", STREAM)


@pytest.fixture
def samples(stream: Path, tmp_path: Path) -> Samples:
    np.savez(tmp_path / "rows.npz", x=X, h=START, sequence=NUMBERS)
    feeding = Feeding(state={"h": "hn"})
    return load_samples(str(tmp_path / "rows.npz"), load_model(stream).inputs, None, feeding)


def by_hand(path: Path) -> tuple[dict[str, NDArray], NDArray]:
    """The outputs of every row, and the state that it was fed."""
    session = onnx.reference.ReferenceEvaluator(str(path))
    found: dict[str, list[NDArray]] = {"y": [], "hn": []}
    fed = []
    for index, number in enumerate(NUMBERS):
        first = index == 0 or number != NUMBERS[index - 1]
        state = START[number] if first else found["hn"][-1]
        fed.append(state)
        y, hn = session.run(["y", "hn"], {"x": X[index], "h": state})
        found["y"].append(y)
        found["hn"].append(hn)
    return {"y": np.concatenate(found["y"]), "hn": np.array(found["hn"])}, np.array(fed)


def test_a_model_follows_its_own_states(stream: Path, samples: Samples) -> None:
    found = run_model(stream, samples)
    expected, _ = by_hand(stream)
    for name, array in expected.items():
        np.testing.assert_allclose(found.arrays[name], array, rtol=0, atol=1e-5)


def test_the_states_that_occur(stream: Path, samples: Samples, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    known = with_states(stream, samples, cache, SILENT, workers=2)
    _, states = by_hand(stream)
    np.testing.assert_allclose([row["h"] for row in known.rows()], states, rtol=0, atol=1e-5)
    assert known.hash != samples.hash
    assert known.sequences == samples.sequences
    spread = known.subset(range(1, 6))
    assert spread.sequences is None
    np.testing.assert_allclose([row["h"] for row in spread.rows()], states[1:6], rtol=0, atol=1e-5)


def test_states_come_from_the_cache(
    stream: Path, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache")
    first = with_states(stream, samples, cache, SILENT)
    monkeypatch.setattr("trtq.simulation.states.Runner", None)  # nothing is run
    again = with_states(stream, samples, cache, SILENT)
    np.testing.assert_array_equal([r["h"] for r in first.rows()], [r["h"] for r in again.rows()])


def test_calibration_sees_the_states_that_occur(stream: Path, samples: Samples, tmp_path: Path) -> None:
    known = with_states(stream, samples, Cache(tmp_path / "cache"), SILENT)
    found = collect(load_model(stream).graph, ["h", "y"], known)
    expected, states = by_hand(stream)
    assert found.histograms["h"].amax == pytest.approx(np.abs(states).max(), rel=1e-5)
    assert found.histograms["y"].amax == pytest.approx(np.abs(expected["y"]).max(), rel=1e-5)
    assert found.histograms["h"].total == states.size


def test_shards_end_where_sequences_do(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = cut(samples, Key.of("outputs", model="m", data="d"), 1)
    assert [len(shard.samples) for shard in shards] == [sum(LENGTHS)]  # the last sequence starts at row 89
    ends = np.cumsum(LENGTHS)
    monkeypatch.setattr(parallel, "SHARD_ROWS", 10)
    shards = cut(samples, Key.of("outputs", model="m", data="d"), 1)
    assert np.cumsum([len(shard.samples) for shard in shards]).tolist() == [15, 89, 169]
    assert set(np.cumsum([len(shard.samples) for shard in shards])) <= set(ends)
    assert all(shard.samples.sequences is not None for shard in shards)


@pytest.mark.parametrize(
    "pool", [None, pytest.param(Pool("loky", processes=2), marks=pytest.mark.slow)], ids=["here", "loky"]
)
def test_shards_give_the_same(
    pool: Pool | None, stream: Path, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "SHARD_ROWS", 10)
    cache = Cache(tmp_path / "cache")
    known = with_states(stream, samples, cache, SILENT)
    whole = run_model(stream, known)
    work = Work(Key.of("outputs", model="m", data="d"), cache, SILENT, "outputs", pool)
    assert run_sharded(stream, known, work).to_bytes() == whole.to_bytes()
    graph = load_model(stream).graph
    work = Work(Key.of("statistics", model="m", data="d"), cache, SILENT, "statistics", pool)
    sharded = collect_sharded(graph, ["h", "y"], known, work)
    assert sharded.to_bytes() == collect(graph, ["h", "y"], known).to_bytes()


def test_a_state_that_grows(tmp_path: Path) -> None:
    """A cache of all rows so far: y is the mean of the sequence up to here."""
    path = model(tmp_path / "growing.onnx", GROWING)
    np.savez(tmp_path / "rows.npz", x=X[:, 0], sequence=NUMBERS)
    inputs = load_model(path).inputs
    samples = load_samples(str(tmp_path / "rows.npz"), inputs, None, Feeding(state={"cache": "grown"}))
    known = with_states(path, samples, Cache(tmp_path / "cache"), SILENT)
    starts = np.cumsum([0, *LENGTHS[:-1]])
    means = [X[starts[number] : index + 1, 0].mean(axis=0) for index, number in enumerate(NUMBERS)]
    assert [row["cache"].shape for row in known.rows()] == [
        (1, index - starts[number], 4) for index, number in enumerate(NUMBERS)
    ]
    short = known.subset(range(6))
    found = [run_model(path, known.subset([index])).arrays["y"][0] for index in range(len(short))]
    np.testing.assert_allclose(found, means[:6], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("output", "words"),
    [("hx", "no output 'hx' to be the state 'h'"), ("y", "'y' does not suit the input 'h'")],
)
def test_outputs_that_are_no_state(
    output: str, words: str, stream: Path, samples: Samples, tmp_path: Path
) -> None:
    feeding = Feeding(state={"h": output})
    samples = load_samples(str(tmp_path / "rows.npz"), load_model(stream).inputs, None, feeding)
    with pytest.raises(InputError, match=words):
        run_model(stream, samples)
