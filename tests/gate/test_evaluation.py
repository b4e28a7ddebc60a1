"""Outputs of a model, run once and then taken from the cache."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from jobs import Run
from nets import net, normal, saved
from onnx import TensorProto, helper

from trtq.backends import runner
from trtq.backends.engine import fingerprint, input_specs
from trtq.backends.interface import Gpu
from trtq.cache import Cache, Key
from trtq.console import SILENT, Console
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.errors import MissingBackendError
from trtq.files import sha256_file
from trtq.gate import evaluation
from trtq.gate.evaluation import Evaluation, outputs_of
from trtq.gate.verdict import Outcome
from trtq.graph.inputs import InputSpec
from trtq.recipe import Recipe
from trtq.simulation import outputs as simulated
from trtq.simulation.outputs import Outputs

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)
SAMPLES = Samples("rows.npz", (InputSpec("x", np.dtype(np.float32), ("N", 3)),), {"x": ROWS}, {}, "d" * 64)


PLAIN, REQUIRED = Recipe(), Recipe(require_engine=True)


def doubling(path: Path, output: str) -> Path:
    """A model whose output, of any name, is its input added to itself."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3]) for n in ("x", output))
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], [output])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("name", ["y", "/head/y:0", "names", "executor"])
def test_a_second_run_is_the_first_ones(name: str, tmp_path: Path) -> None:
    model, cache = doubling(tmp_path / "m.onnx", name), Cache(tmp_path / "cache")
    for expected in (False, True):
        outputs, cached = outputs_of(model, SAMPLES, PLAIN, cache, SILENT, label="fp32")
        assert cached is expected
        assert outputs.executor == "simulation"
        assert list(outputs.arrays) == [name]
        np.testing.assert_array_equal(outputs.arrays[name], 2 * ROWS)


def test_another_model_is_run(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    outputs_of(doubling(tmp_path / "a.onnx", "a"), SAMPLES, PLAIN, cache, SILENT, label="a")
    outputs, cached = outputs_of(doubling(tmp_path / "b.onnx", "b"), SAMPLES, PLAIN, cache, SILENT, label="b")
    assert not cached
    assert list(outputs.arrays) == ["b"]


def test_large_outputs_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated, "KEPT_BYTES", ROWS.nbytes - 1)
    model, cache = doubling(tmp_path / "m.onnx", "y"), Cache(tmp_path / "cache")
    for _ in range(2):
        assert not outputs_of(model, SAMPLES, PLAIN, cache, SILENT, label="fp32")[1]
    assert not list(cache.entries())


# --- engines: their outputs are those of a GPU -------------------------------------------------------------

GPU = Gpu("Some GPU", "8.6", "570.86.15")
PLANTED = Outputs({"y": np.full((4, 3), 7, np.float32)}, "engine")


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine of the doubling model."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    from trtq.backends import tensorrt_rtx
    from trtq.backends.interface import Range

    model = doubling(tmp_path / "m.onnx", "y")
    shapes = Range((1, 3), (4, 3), (8, 3))
    return tensorrt_rtx.build(model, tmp_path / "m.plan", profile={"x": shapes}, targets=("8.6",)).engine


def on(gpu: Gpu | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the driver answer so; nothing runs there."""
    monkeypatch.setattr(runner, "find_gpu", lambda: gpu)


def planted(engine: Path, cache: Cache, **others: str) -> None:
    """Outputs in the cache as if the engine had run here, but for some entries of the key."""
    entries = {"batch": None, **fingerprint(engine), **others}
    cache.store(Key("outputs", sha256_file(engine), SAMPLES.hash, entries), PLANTED.to_bytes())


def taken(engine: Path, cache: Cache, recipe: Recipe = PLAIN) -> bool:
    """Whether outputs come from the cache; the engine would have to run otherwise, which it cannot here."""
    try:
        outputs, cached = outputs_of(engine, SAMPLES, recipe, cache, SILENT, label="engine")
    except _Ran:
        return False
    assert cached
    assert outputs.executor == "engine"
    return True


class _Ran(Exception):
    pass


@pytest.fixture
def _runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say so where the engine would be run."""

    def run_engine(*arguments: object, **options: object) -> Outputs:
        raise _Ran

    monkeypatch.setattr(evaluation, "run_engine", run_engine)


@pytest.mark.usefixtures("_runs")
def test_outputs_of_an_engine_are_those_of_its_gpu_driver_and_tensorrt(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache", pytest.fail)
    on(GPU, monkeypatch)
    planted(engine, cache)
    assert taken(engine, cache)
    for other in (
        replace(GPU, name="Another GPU"),
        replace(GPU, compute_capability="8.9"),
        replace(GPU, driver="571.0"),
    ):
        on(other, monkeypatch)
        assert not taken(engine, cache)
    on(GPU, monkeypatch)
    for entry in ("gpu", "compute_capability", "driver", "tensorrt"):
        (here := Cache(tmp_path / entry, pytest.fail)).root.mkdir()
        planted(engine, here, **{entry: "another"})
        assert not taken(engine, here)
    engine.write_bytes(engine.read_bytes() + b"?")
    assert not taken(engine, cache)


@pytest.mark.usefixtures("_runs")
def test_an_engine_that_is_required_always_runs(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache", pytest.fail)
    on(GPU, monkeypatch)
    planted(engine, cache)
    assert not taken(engine, cache, REQUIRED)
    model = doubling(tmp_path / "s.onnx", "y")
    outputs_of(model, SAMPLES, PLAIN, cache, SILENT, label="fp32")
    assert outputs_of(model, SAMPLES, REQUIRED, cache, SILENT, label="fp32")[1]  # a simulation stays one


def test_without_its_gpu_nothing_is_taken_for_the_outputs_of_an_engine(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache", pytest.fail)
    on(GPU, monkeypatch)
    planted(engine, cache)
    on(None, monkeypatch)
    with pytest.raises(MissingBackendError, match="only on an NVIDIA GPU"):
        outputs_of(engine, SAMPLES, PLAIN, cache, SILENT, label="engine")


@pytest.mark.parametrize("options", [(), ("--require-engine",)])
def test_a_planted_entry_is_no_measurement(
    engine: Path,
    options: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trtq_run: Callable[..., Run],
) -> None:
    """Under the key that the GPU would have, and under one of the executor's name alone."""
    model = doubling(tmp_path / "m.onnx", "y")
    np.savez(tmp_path / "eval.npz", x=ROWS)
    samples = load_samples(str(tmp_path / "eval.npz"), SAMPLES.specs)
    cache = Cache(tmp_path / "cache")
    entries = [{"executor": "tensorrt_rtx-1.7.1.3"}]
    with monkeypatch.context() as there:
        on(GPU, there)
        entries.append({"batch": None, **fingerprint(engine)})
    for entry in entries:
        cache.store(Key("outputs", sha256_file(engine), samples.hash, entry), PLANTED.to_bytes())
    run = trtq_run(
        *("gate", model, engine, "--eval", tmp_path / "eval.npz", "--metric", "cosine", *options),
        *("--cache", cache.root),
    )
    assert run.code == 4
    assert "an engine runs only on an NVIDIA GPU" in run.err
    assert "measured on the engine" not in run.out


def test_a_simulation_that_claims_to_be_an_engine_is_run_again(tmp_path: Path) -> None:
    reports: list[str] = []
    model, cache = doubling(tmp_path / "m.onnx", "y"), Cache(tmp_path / "cache", reports.append)
    outputs_of(model, SAMPLES, PLAIN, cache, SILENT, label="fp32")
    (entry,) = cache.entries()
    names = ("batch", "executor")
    key = Key("outputs", entry.key["model"], entry.key["data"], {name: entry.key[name] for name in names})
    cache.store(key, PLANTED.to_bytes())
    outputs, cached = outputs_of(model, SAMPLES, PLAIN, cache, SILENT, label="fp32")
    assert (cached, outputs.executor) == (False, "simulation")
    np.testing.assert_array_equal(outputs.arrays["y"], 2 * ROWS)
    assert "another executor" in reports[0]


def test_a_model_that_mixes_rows_is_warned_of_from_the_cache_too(tmp_path: Path) -> None:
    rows = {"x": normal(8, 3), "labels": np.arange(8) % 3}
    np.savez(tmp_path / "eval.npz", **rows)
    text = "g (float[N,3] x) => (float[N,3] y) { m = ReduceMean<axes = [0]>(x) y = Sub(x, m) }"
    model = saved(net(text), tmp_path)
    recipe = replace(PLAIN, eval=str(tmp_path / "eval.npz"), metric="top1")
    for _ in range(2):
        console = Console(quiet=True)
        Evaluation.open(recipe, model, input_specs([model]), Cache(tmp_path / "cache"), console)
        assert "depends on the other rows of its batch (y)" in console.warnings[0]


def test_where_outputs_come_from_is_said_once(tmp_path: Path) -> None:
    model = saved(net("g (float[N,3] x) => (float[N,3] y) { y = Neg(x) }"), tmp_path)
    np.savez(tmp_path / "eval.npz", x=normal(8, 3))
    recipe, said = replace(PLAIN, eval=str(tmp_path / "eval.npz"), metric="cosine"), io.StringIO()
    cache, console = Cache(tmp_path / "cache"), Console(said)
    evaluation = Evaluation.open(recipe, model, input_specs([model]), cache, console)
    evaluation.verdict(model, again=True)
    assert "from the cache" not in said.getvalue()
    evaluation.verdict(model)
    assert "outputs of the candidate from the cache" in said.getvalue()


@pytest.mark.parametrize(
    ("fragile", "margin", "outcome", "again"),
    [
        (5, 0.15, Outcome.INCONCLUSIVE, "candidate 0.4000"),
        (0, 0.15, Outcome.PASS, "candidate 0.9000"),
        (5, 0.65, Outcome.PASS, None),
        (5, 0.05, Outcome.FAIL, None),
    ],
    ids=["luck", "not by luck", "proved", "fails"],
)
def test_a_doubtful_pass_has_to_be_one_with_other_roundings_too(
    fragile: int, margin: float, outcome: Outcome, again: str | None, tmp_path: Path
) -> None:
    """(v + 1/4096) - v is 0 in float16 where v is 1, but 1/4096 where the sum is not rounded, which decides
    the class; one row of ten is wrong in any case."""
    model = "g (float[N,3] x) => (float[N,2] y) { v, y = Split<axis = 1>(x, sizes) }"
    candidate = """g (float[N,3] x) => (float[N,2] y) {
        h = Cast<to = 10>(x)  v, rest = Split<axis = 1>(h, sizes)  sum = Add(v, little)  found = Sub(sum, v)
        least = Mul(v, zero)  class0 = Add(least, less)  both = Concat<axis = 1>(class0, found)
        y = Cast<to = 1>(both) }"""
    constants = {"little": np.float16(2**-12), "zero": np.float16(0), "less": np.float16(2**-13)}
    sizes = np.int64([1, 2])
    (tmp_path / "candidate").mkdir()
    files = (
        saved(net(model, opset=19, sizes=sizes), tmp_path),
        saved(net(candidate, opset=19, sizes=sizes, **constants), tmp_path / "candidate"),
    )
    labels = np.array([0] * fragile + [1] * (9 - fragile) + [0])
    x = np.float32([[i < fragile, label == 0, label == 1] for i, label in enumerate(labels)])
    np.savez(tmp_path / "eval.npz", x=x, labels=labels)
    recipe = replace(PLAIN, eval=str(tmp_path / "eval.npz"), metric="top1", max_drop=margin)
    opened = Evaluation.open(recipe, files[0], input_specs(files), Cache(tmp_path / "cache"), SILENT)
    verdict = opened.verdict(files[1])
    assert verdict.candidate == pytest.approx(0.9)
    assert verdict.outcome is outcome
    assert again in verdict.text() if again else "run again" not in verdict.text()
