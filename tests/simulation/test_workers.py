"""Shards in this process, in joblib's processes and on a Dask cluster of two: the same bytes everywhere."""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray

import trtq
from trtq.cache import Cache, Key
from trtq.calibration import collect as collecting
from trtq.calibration.collect import collect, collect_sharded
from trtq.calibration.methods import parse_method, scales_from
from trtq.calibration.statistics import Statistics
from trtq.console import SILENT, Console
from trtq.data.load import load_samples
from trtq.data.preprocess import Preprocess
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.graph.fold import fold
from trtq.graph.inputs import InputSpec
from trtq.graph.model import load_model
from trtq.graph.place import place
from trtq.graph.quantization import Quantization
from trtq.recipe import Recipe
from trtq.recovery.sensitivity import SHARD_GROUPS, analyse
from trtq.simulation import workers as parallel
from trtq.simulation.outputs import Outputs, run_model, run_sharded
from trtq.simulation.pool import Pool, parse_parallel
from trtq.simulation.processors import processors
from trtq.simulation.workers import Work

TENSORS = ["x", "h", "y"]
ROWS = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
SPECS = (InputSpec("x", np.dtype(np.float32), ("N", 6)),)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = log(x w), finite where x is positive."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N,6] x) => (float[N,5] y) { h = MatMul(x, w) e = Exp(h) y = Log(e) }"""
    )
    weight = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, path := tmp_path_factory.mktemp("model") / "model.onnx")
    return path


@pytest.fixture
def graph(model: Path) -> gs.Graph:
    return load_model(model).graph


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    return saved(tmp_path / "rows.npz", ROWS)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", pytest.fail)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "SHARD_ROWS", 8)


@pytest.fixture(scope="module")
def dask() -> Iterator[str]:
    """The address of a cluster of two worker processes."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as cluster:
        yield f"dask://{cluster.scheduler_address.removeprefix('tcp://')}"


@pytest.fixture(params=["loky:2", "dask"])
def pool(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("dask") if request.param == "dask" else request.param


def saved(path: Path, x: NDArray[np.float32]) -> Samples:
    np.savez(path, x=x)
    return load_samples(str(path), SPECS)


def key_of(samples: Samples, kind: str = "statistics") -> Key:
    return Key(kind, "f" * 64, samples.hash, {"tensors": TENSORS})


def statistics(graph: gs.Graph, samples: Samples, cache: Cache, where: str | None, console: Console = SILENT):
    work = Work(key_of(samples), cache, console, "statistics", where and parse_parallel(where))
    return collect_sharded(graph, TENSORS, samples, work)


def outputs(
    model: Path, samples: Samples, cache: Cache, where: str | None, batch_size: int | None = None
) -> Outputs:
    work = Work(key_of(samples, "outputs"), cache, SILENT, "gate", where and parse_parallel(where))
    return run_sharded(model, samples, work, batch_size=batch_size)


def kept(cache: Cache) -> list[str]:
    return [path.name.partition("-")[0] for path in sorted(cache.root.glob("*/*/*.npz"))]


# -- the result


def test_sensitivity_from_workers(tmp_path: Path, cache: Cache, pool: str) -> None:
    """Groups are shared out, a few to a worker at a time; a second run finds all in the cache."""
    demo = Path(trtq.__file__).parent / "demo"
    model = load_model(demo / "digits.onnx")
    fold(model.graph)
    plan = place(model)
    rows = load_samples(str(demo / "calib.npz"), model.inputs).subset(range(10, 30))
    scales = scales_from(collect(model.graph, plan.tensors, rows), parse_method("max"))
    quantization = Quantization(model.graph, plan, scales)
    here = analyse(quantization, rows, Cache(tmp_path / "other", pytest.fail), SILENT)
    assert len(here.effects) > 2 * SHARD_GROUPS
    assert analyse(quantization, rows, cache, SILENT, recipe=Recipe(parallel=pool)) == here
    assert analyse(quantization, rows, cache, SILENT, recipe=Recipe(parallel="dask://no.such.host:1")) == here


@pytest.mark.parametrize("rows", [1, 7, 8, 50, 1000])
def test_statistics_do_not_depend_on_the_shards(
    rows: int, graph: gs.Graph, samples: Samples, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "SHARD_ROWS", rows)
    assert statistics(graph, samples, cache, None).to_bytes() == collect(graph, TENSORS, samples).to_bytes()


def test_statistics_from_workers(graph: gs.Graph, samples: Samples, cache: Cache, pool: str) -> None:
    """Those of two parts of the data, too: their rows are not in a row."""
    whole = collect(graph, TENSORS, samples).to_bytes()
    total = Statistics.empty(TENSORS)
    for part in samples.split():
        total.merge(statistics(graph, part, cache, pool))
    assert total.to_bytes() == whole
    assert statistics(graph, samples, cache, pool).to_bytes() == whole


def test_outputs_from_workers(model: Path, samples: Samples, cache: Cache, pool: str) -> None:
    whole = run_model(model, samples, batch_size=4)
    sharded = outputs(model, samples, cache, pool, batch_size=4)
    assert sharded.to_bytes() == whole.to_bytes()
    assert cache.fetch(key_of(samples, "outputs")) == whole.to_bytes()


def test_shards_hold_whole_batches_and_whole_samples(tmp_path: Path, cache: Cache, model: Path) -> None:
    """Batches of 6, and 4 rows for each label: 12 rows are the least that hold both."""
    np.savez(tmp_path / "rows.npz", x=ROWS[:48], label=np.arange(12))
    samples = load_samples(str(tmp_path / "rows.npz"), SPECS)
    lengths = [len(shard.samples) for shard in parallel.cut(samples, key_of(samples), batch=6)]
    assert lengths == [12] * 4
    assert (
        outputs(model, samples, cache, None, 6).to_bytes()
        == run_model(model, samples, batch_size=6).to_bytes()
    )


def test_the_real_models_bytes(zoo: Path, cache: Cache, pool: str) -> None:
    """ResNet-20 on CIFAR images: floating point that depends on the order of sums."""
    model = load_model(zoo / "models" / "resnet20_cifar10.onnx")
    options = {"from": "images", "scale": "1/255", "layout": "NCHW"}
    preprocess = {"input": Preprocess.parse("input", options)}
    rows = load_samples(str(zoo / "cifar10" / "calib.npz"), model.inputs, preprocess).subset(range(40))
    tensors = [node.outputs[0].name for node in model.graph.nodes if node.op in ("Conv", "Relu", "Gemm")]
    work = Work(key_of(rows), cache, SILENT, "statistics", parse_parallel(pool))
    sharded = collect_sharded(model.graph, tensors, rows, work)
    assert sharded.to_bytes() == collect(model.graph, tensors, rows).to_bytes()
    assert outputs(model.path, rows, cache, pool).to_bytes() == run_model(model.path, rows).to_bytes()


@pytest.mark.slow
def test_a_model_with_external_data_reaches_a_cluster(
    model: Path, samples: Samples, cache: Cache, dask: str, tmp_path: Path
) -> None:
    """It has no disk in common with this machine, as far as the work knows."""
    (tmp_path / "apart").mkdir()
    apart = tmp_path / "apart" / "model.onnx"
    onnx.save(onnx.load(model), apart, save_as_external_data=True, location="weights", size_threshold=0)
    shipped = parallel.Shipped.of(apart, Pool("dask", dask))
    assert set(shipped.contents) == {"model.onnx", "weights"}
    assert parallel.Shipped.of(apart, Pool("loky")).contents == {}
    assert outputs(apart, samples, cache, dask).to_bytes() == run_model(model, samples).to_bytes()


# -- workers that die, shards that fail


def script(folder: Path, body: str) -> str:
    """A data script; in any other process than this one its body runs before the rows are given."""
    np.save(folder / "rows.npy", ROWS)
    code = f"""
        import os, pathlib, time
        import numpy as np

        FOLDER = pathlib.Path({str(folder)!r})

        def rows():
            if os.getpid() != {os.getpid()}:
                {body}
            yield {{"x": np.load(FOLDER / "rows.npy")}}
    """
    (folder / "data.py").write_text(textwrap.dedent(code))
    return f"{folder / 'data.py'}:rows"


DIE_ONCE = """
                try:
                    (FOLDER / "died").touch(exist_ok=False)
                except FileExistsError:
                    pass
                else:
                    os.kill(os.getpid(), 9)
"""


def test_a_worker_that_dies_is_replaced(graph: gs.Graph, cache: Cache, pool: str, tmp_path: Path) -> None:
    samples = load_samples(script(tmp_path, DIE_ONCE), SPECS)
    result = statistics(graph, samples, cache, pool)
    assert (tmp_path / "died").exists()
    assert result.to_bytes() == collect(graph, TENSORS, samples).to_bytes()


@pytest.mark.slow
def test_workers_that_always_die(graph: gs.Graph, cache: Cache, tmp_path: Path) -> None:
    samples = load_samples(script(tmp_path, "os.kill(os.getpid(), 9)"), SPECS)
    with pytest.raises(InputError) as caught:
        statistics(graph, samples, cache, "loky:2")
    assert caught.value.problem == (
        f"workers died 3 times; the first shard without a result is rows 0 to 7 of {samples.source}"
    )
    assert "memory" in str(caught.value.remedy)


def test_a_shard_that_fails_names_its_rows(graph: gs.Graph, cache: Cache, tmp_path: Path, pool: str) -> None:
    x = ROWS.copy()
    x[21] = 1e4  # exp overflows
    samples = saved(tmp_path / "rows.npz", x)
    with pytest.raises(InputError) as caught:
        statistics(graph, samples, cache, pool)
    assert caught.value.problem == (
        f"rows 16 to 23 of {samples.source} failed: tensor 'y' is not finite for row 21 of the data"
    )
    assert "NaN or infinite" in str(caught.value.cause)
    fitting, _ = samples.split()
    with pytest.raises(InputError, match="for row 21 of the data"):
        statistics(graph, fitting, cache, None)


def test_a_worker_that_reads_other_data(graph: gs.Graph, cache: Cache, tmp_path: Path, pool: str) -> None:
    samples = load_samples(script(tmp_path, "yield {'x': np.ones((50, 6), np.float32)}; return"), SPECS)
    with pytest.raises(InputError, match="a worker reads other data"):
        statistics(graph, samples, cache, pool)


def test_rows_made_in_memory_do_not_travel(graph: gs.Graph, cache: Cache) -> None:
    samples = Samples("rows", SPECS, {"x": ROWS}, {}, "0" * 64)
    assert statistics(graph, samples, cache, None).rows == 50
    cache.prune(lambda entry: False)
    with pytest.raises(InputError, match="made in memory"):
        statistics(graph, samples, cache, "loky:2")


# -- resuming


class Interrupted(Console):
    """Ctrl-C when more than `rows` rows are done; counts rows, and keeps what is said."""

    def __init__(self, rows: int = 1 << 30) -> None:
        super().__init__(quiet=True)
        self.left, self.done, self.said = rows, 0, [""]

    def say(self, label: str, text: str) -> None:
        self.said.append(text)

    def progress(self, label: str, total: int, unit: str = "row"):  # type: ignore[override]
        return contextlib.nullcontext(self._advance)

    def _advance(self, rows: int) -> None:
        self.done += rows
        if self.done > self.left:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("where", [None, "loky:2"])
def test_an_interrupted_job_goes_on_where_it_stopped(
    where: str | None, graph: gs.Graph, samples: Samples, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        statistics(graph, samples, cache, where, Interrupted(rows=25))
    assert kept(cache) == ["shard"] * 3
    run: list[int] = []
    real = collecting._statistics

    def counted(*arguments: Any) -> bytes:
        run.append(len(arguments[3]))
        return real(*arguments)

    monkeypatch.setattr(collecting, "_statistics", counted)
    console = Interrupted()
    result = statistics(graph, samples, cache, None, console)
    assert sum(run) == 50 - 24
    assert console.said[-1] == "3 of 7 shards were done before"
    assert console.done == 50
    assert result.to_bytes() == collect(graph, TENSORS, samples).to_bytes()
    assert kept(cache) == ["statistics"]


def test_a_single_shard_is_not_kept_apart(graph: gs.Graph, cache: Cache, tmp_path: Path) -> None:
    samples = saved(tmp_path / "rows.npz", ROWS[:8])
    statistics(graph, samples, cache, None)
    assert kept(cache) == ["statistics"]


# -- what --parallel takes


@pytest.mark.parametrize(
    ("text", "pool"),
    [
        ("", None),
        ("loky", Pool("loky")),
        ("loky:4", Pool("loky", processes=4)),
        ("dask://host:8786", Pool("dask", "host:8786")),
    ],
)
def test_backends(text: str, pool: Pool | None) -> None:
    assert parse_parallel(text) == pool
    assert str(pool or "") == text


@pytest.mark.parametrize("text", ["loky:0", "loky:x", "loky:", "dask", "dask://", "ray", "spark", "threads"])
def test_what_is_no_backend(text: str) -> None:
    with pytest.raises(ValueError, match="names no workers"):
        parse_parallel(text)
    with pytest.raises(InputError, match="parallel is") as caught:
        Recipe(parallel=text)
    assert caught.value.remedy == "use loky, loky:4 or dask://host:8786"


def test_threads_are_shared_out() -> None:
    assert Pool("loky").threads(None) == 1
    assert Pool("loky", processes=1).threads(None) == processors()
    assert Pool("loky", processes=10 * processors()).threads(None) == 1
    assert Pool("dask", "host:1").threads(None) == 1
    assert Pool("dask", "host:1").threads(3) == 3


@pytest.mark.slow
def test_no_scheduler(
    graph: gs.Graph, samples: Samples, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "_SECONDS_TO_CONNECT", 1)
    with pytest.raises(InputError, match="no Dask scheduler answers"):
        statistics(graph, samples, cache, "dask://127.0.0.1:9")
