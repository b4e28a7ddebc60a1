from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from mixed import mixed_net
from nets import normal

import trtq
from trtq.cache import Cache, Key
from trtq.calibration.collect import collect
from trtq.calibration.methods import parse_method, scales_from
from trtq.console import SILENT
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.gate.metrics import load_metric
from trtq.graph.fold import fold
from trtq.graph.groups import groups
from trtq.graph.model import load_model
from trtq.graph.place import place
from trtq.graph.quantization import Quantization
from trtq.recovery.sensitivity import Sensitivity, analyse, fast_rows, measured
from trtq.simulation.simulator import Simulator

_DEMO = Path(trtq.__file__).parent / "demo"


@pytest.fixture(scope="module")
def quantization() -> Quantization:
    """The demo's network, calibrated on a few rows."""
    return _calibrated(_DEMO / "digits.onnx", _rows("calib").subset(range(32)))


def _rows(name: str) -> Samples:
    return load_samples(str(_DEMO / f"{name}.npz"), load_model(_DEMO / "digits.onnx").inputs)


def _calibrated(path: Path, samples: Samples) -> Quantization:
    model = load_model(path)
    fold(model.graph)
    plan = place(model, input_shapes={s.name: (1, *s.shape[1:]) for s in model.inputs})
    statistics = collect(model.graph, plan.tensors, samples)
    return Quantization(model.graph, plan, scales_from(statistics, parse_method("mse")))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path)


def test_groups_are_ranked_by_their_noise(quantization: Quantization, cache: Cache) -> None:
    found = analyse(quantization, _rows("calib").subset(range(16)), cache, SILENT)
    noises = [effect.noise for effect in found.effects]
    assert noises == sorted(noises, reverse=True)
    assert {e.group for e in found.effects} == set(groups(quantization.graph, quantization.plan))
    assert found.int8.noise > noises[0]  # all of them together make more noise than the worst
    assert found.rows == 16
    assert found.metric is None


def test_all_but_one_ranks_what_helps_most_first(quantization: Quantization, cache: Cache) -> None:
    found = analyse(quantization, _rows("calib").subset(range(16)), cache, SILENT, mode="all-but")
    noises = [effect.noise for effect in found.effects]
    assert noises == sorted(noises)
    assert noises[0] < found.int8.noise


def test_with_a_metric_the_groups_are_ranked_by_it(quantization: Quantization, cache: Cache) -> None:
    samples, metric = _rows("eval").subset(range(100)), load_metric("top1")
    found = analyse(quantization, samples, cache, SILENT, metric=metric)
    ranks = [(effect.metric, -effect.noise) for effect in found.effects]
    assert ranks == sorted(ranks)
    assert all(effect.metric is not None for effect in found.effects)
    reference = Simulator(quantization, samples).reference
    (output,) = reference.values()
    assert found.reference == np.mean(output.argmax(axis=1) == samples.targets["label"])
    assert "top1" in found.text()


def test_an_interrupted_analysis_goes_on_where_it_was(quantization: Quantization, cache: Cache) -> None:
    simulator = Simulator(quantization, _rows("calib").subset(range(4)))
    key = Key("sensitivity", "m", "d")
    first, second, *_ = groups(quantization.graph, quantization.plan)
    cache.store(key, json.dumps({second.name: [12.5, 0.25, None]}).encode())
    found = measured(simulator, "only", cache, key, SILENT)
    assert [effect.group for effect in found][:2] == [first, second]
    assert (found[1].sqnr_db, found[1].noise) == (12.5, 0.25)  # not measured again
    (alone,) = simulator.effects("only", [first])
    assert found[0] == alone
    assert measured(simulator, "only", cache, key, SILENT) == found


def test_another_range_is_another_analysis(quantization: Quantization, cache: Cache) -> None:
    samples = _rows("calib").subset(range(4))
    wider = {name: np.float32(4 * scale) for name, scale in quantization.scales.items()}
    found = analyse(quantization, samples, cache, SILENT)
    other = analyse(dataclasses.replace(quantization, scales=wider), samples, cache, SILENT)
    assert other.int8.noise > 2 * found.int8.noise
    assert analyse(quantization, samples, cache, SILENT) == found


@pytest.mark.parametrize("metric", [None, "cosine"])
def test_an_analysis_is_read_as_it_was_written(
    quantization: Quantization, cache: Cache, tmp_path: Path, metric: str | None
) -> None:
    samples = _rows("calib").subset(range(4))
    found = analyse(quantization, samples, cache, SILENT, metric=load_metric(metric) if metric else None)
    found.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == found


@pytest.mark.parametrize("content", ["{}", '{"format": "trtq-plan-1"}', '{"format": "trtq-sensitivity-1"}'])
def test_what_is_no_analysis_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(InputError, match="not a sensitivity analysis"):
        Sensitivity.load(path)


def test_the_text_has_a_line_for_every_group(quantization: Quantization, cache: Cache) -> None:
    found = analyse(quantization, _rows("calib").subset(range(4)), cache, SILENT)
    lines = found.text().splitlines()
    assert len(lines) == 3 + len(found.effects)
    assert lines[3].endswith(found.effects[0].group.name)
    assert f"{found.effects[0].sqnr_db:.1f}" in lines[3]


def test_the_fast_ranking_takes_a_few_passes() -> None:
    assert fast_rows(500, 50) == 30
    assert fast_rows(100, 50) == 8
    assert fast_rows(4, 50) == 4


def test_the_fast_ranking_agrees_with_the_exact_one(zoo: Path, cache: Cache) -> None:
    path = zoo / "models" / "resnet20_cifar10.onnx"
    with np.load(zoo / "cifar10" / "calib.npz") as stored:
        pixels = stored["images"].transpose(0, 3, 1, 2) / np.float32(255)
    mean, std = (np.float32(v).reshape(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    images = ((pixels - mean) / std).astype(np.float32)
    samples = Samples("cifar10", tuple(load_model(path).inputs), {"input": images}, {}, "hash").spread(128)
    quantization = _calibrated(path, samples.spread(32))
    exact = analyse(quantization, samples, cache, SILENT)
    fast = analyse(quantization, samples, cache, SILENT, fast=True)
    assert fast.rows == 19
    ranks = [{e.group.name: i for i, e in enumerate(found.effects)} for found in (exact, fast)]
    n = len(ranks[0])
    squares = sum((ranks[0][name] - ranks[1][name]) ** 2 for name in ranks[0])
    assert 1 - 6 * squares / (n**3 - n) > 0.75  # Spearman's rank correlation


def test_the_layer_that_destroys_scores_beside_boxes_comes_first(cache: Cache, tmp_path: Path) -> None:
    onnx.save(mixed_net(), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=normal(64, 16))
    samples = load_samples(str(tmp_path / "x.npz"), load_model(tmp_path / "m.onnx").inputs)
    model = load_model(tmp_path / "m.onnx")
    fold(model.graph)
    plan = place(model)
    scales = scales_from(collect(model.graph, plan.tensors, samples), parse_method("max"))
    for mode in ("only", "all-but"):
        found = analyse(Quantization(model.graph, plan, scales), samples, cache, SILENT, mode=mode)
        assert found.effects[0].group.nodes == ("cls",)
        assert found.int8.sqnr_db < 12
