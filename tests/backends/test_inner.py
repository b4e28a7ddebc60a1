"""Scales of tensors that only TensorRT's network has, on networks of the real parser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trtq.demo
from trtq.backends.inner import inner_scales
from trtq.backends.network import logger
from trtq.calibration.foreign import read_table

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

DEMO = Path(trtq.demo.__file__).parent / "digits.onnx"
NVIDIAS = Path(__file__).parent / "data" / "h100" / "digits.EntropyCalibration2.cache"


def test_a_gemm_against_nvidias_calibrator() -> None:
    """Product, weights, bias and the bias made broadcastable are unnamed in the table, in this order: it was
    written for TensorRT 8.5's network, whose layers are the same."""
    table = read_table(NVIDIAS).scales
    weights, product, bias, moved = (
        table[f"(Unnamed Layer* {number}) [{kind}]_output"]
        for number, kind in ((37, "Constant"), (38, "Matrix Multiply"), (39, "Constant"), (40, "Shuffle"))
    )
    named = {name: scale for name, scale in table.items() if not name.startswith("(")}
    builder = trt.Builder(logger(trt))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger(trt))
    assert parser.parse_from_file(str(DEMO))
    found = inner_scales(trt, network, named)
    read_off = {
        "classifier.weight_output": weights,
        "classifier.bias_output": bias,
        "ONNXTRT_Broadcast_output": moved,
    }
    for name, scale in read_off.items():
        assert found[name] == pytest.approx(float(scale), rel=1e-3)  # a calibrator's histogram has 2048 bins
    assert found["classifier_output"] == table["logits"]  # measured, it was somewhat smaller
    assert product < table["logits"] < 1.3 * product
    assert all(isinstance(scale, np.float32) for scale in found.values())


def test_what_has_a_scale_keeps_it() -> None:
    builder = trt.Builder(logger(trt))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger(trt))
    assert parser.parse_from_file(str(DEMO))
    known = dict.fromkeys(["logits", "classifier_output", "classifier.weight_output"], np.float32(1))
    assert known.keys().isdisjoint(inner_scales(trt, network, known))
