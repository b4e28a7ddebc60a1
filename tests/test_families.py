"""One small graph of each model family, as PyTorch's exporters wrote it (tools/make_families.py), through
everything: folded, placed, calibrated, rewritten, simulated, gated, built, and the engine read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from family import FAMILIES, FOLDER, ROWS, data_for, quantized

from trtq.backends.coverage import coverage
from trtq.backends.interface import profiles_from
from trtq.calibration.collect import collect
from trtq.calibration.methods import parse_method, scales_from
from trtq.data.load import load_samples
from trtq.gate.decision import decide
from trtq.gate.evaluation import metric_of
from trtq.gate.metrics import load_metric
from trtq.gate.verdict import Outcome
from trtq.graph.fold import fold
from trtq.graph.model import FP16_SCALE_OPSET, LOWEST_OPSET, load_model, save_model
from trtq.graph.place import place
from trtq.graph.products import product
from trtq.graph.quantization import Quantization
from trtq.recipe import Recipe
from trtq.simulation.outputs import run_model
from trtq.simulation.similarity import sqnr_db

pytestmark = pytest.mark.slow

FLOAT = {
    "segmenter": ["ConvTranspose"],
    "transducer": ["LSTM"],
    "vocoder": ["ConvTranspose", "ConvTranspose"],
    "keyword": ["GRU"],
    "keyword_modern": ["GRU"],
    "text_line": ["LSTM", "LSTM"],
    "unet": ["ConvTranspose"],
    "unet_modern": ["ConvTranspose"],
}
"""The operators of each family that stay in floating point; of all others, none do."""


def check(family: str, folder: Path, *, rest: str = "fp32") -> None:
    """Take a family from the exported file to an engine, and look at all that was made on the way."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    from trtq.backends import tensorrt_rtx

    file = FOLDER / f"{family}.onnx"
    model = load_model(file, opset=FP16_SCALE_OPSET if rest == "fp16" else LOWEST_OPSET)
    fold(model.graph)
    samples = data_for(model.inputs)
    profile = profiles_from({s.name: s.shape for s in model.inputs}, samples.row_shapes(), batch=ROWS)
    static = {s.name: s.shape for s in model.inputs}
    plan = place(model, input_shapes=static | {name: shapes.opt for name, shapes in profile.items()})

    weighted = [node.name for node in model.graph.nodes if product(node)]
    assert [node.name for node in plan.nodes] == weighted
    assert all(node.macs for node in plan.nodes)
    left = [node for node in plan.nodes if not node.int8]
    assert sorted(node.op for node in left) == FLOAT.get(family, [])
    assert all("floating point" in node.reason for node in left)

    scales = scales_from(collect(model.graph, plan.tensors, samples), parse_method("max"))
    quantized = folder / "model.int8.onnx"
    save_model(Quantization(model.graph, plan, scales).rewritten(rest=rest), quantized)
    reference = run_model(file, samples, threads=1).arrays
    found = run_model(quantized, samples, threads=1).arrays
    for name, values in found.items():
        assert np.isfinite(values).all()
        assert sqnr_db(reference[name], values)[0] > 25
    verdict = decide(reference, found, {}, load_metric("cosine"), executor="simulation")
    assert verdict.outcome is Outcome.PASS

    built = tensorrt_rtx.build(quantized, folder / "model.plan", profile=profile, targets=("8.6",))
    covered = coverage(plan, built.compiled)
    assert not covered.unread
    assert covered.skipped == left
    assert not covered.missed
    assert covered.share == plan.mac_share()


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path) -> None:
    check(family, tmp_path)


@pytest.mark.parametrize(
    "family",
    [
        *("bert", "cached_decoder_attention", "classifier", "decoder_modern", "diffusion_attention"),
        *("segmenter", "text_line", "yolo_modern"),
    ],
)
def test_rest_in_half(family: str, tmp_path: Path) -> None:
    check(family, tmp_path, rest="fp16")


def test_a_detector_that_plain_int8_breaks(tmp_path: Path) -> None:
    """The scores beside boxes of hundreds of pixels are lost, and the output's SQNR is theirs."""
    folder = FOLDER / "detector"
    recipe = Recipe.load(folder / "recipe.toml")
    model, metric = load_model(folder / "detector.onnx"), metric_of(recipe)
    fold(model.graph)
    calibration = load_samples(str(folder / "calib.npz"), model.inputs, recipe.preprocess).subset(range(32))
    evaluation = load_samples(str(folder / "eval.npz"), model.inputs, recipe.preprocess).subset(range(96))
    save_model(quantized(model, calibration).rewritten(), tmp_path / "model.int8.onnx")
    reference = run_model(model.path, evaluation, threads=1).arrays
    plain = run_model(tmp_path / "model.int8.onnx", evaluation, threads=1).arrays
    assert metric.value(reference, evaluation.targets) > 0.8
    assert metric.value(plain, evaluation.targets) < 0.6
    (expected,), (actual,) = reference.values(), plain.values()
    boxes, scores = (sqnr_db(expected[:, own], actual[:, own])[0] for own in (slice(4), slice(4, None)))
    assert boxes > 20
    assert sqnr_db(expected, actual)[0] == scores < 5
