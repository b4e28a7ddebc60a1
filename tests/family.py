"""One small graph of each model family (tools/make_families.py), and data for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trtq.calibration.collect import collect
from trtq.calibration.methods import parse_method, scales_from
from trtq.data.samples import Samples
from trtq.graph.fold import fold
from trtq.graph.inputs import InputSpec
from trtq.graph.model import FP16_SCALE_OPSET, Model, load_model
from trtq.graph.place import place
from trtq.graph.quantization import Quantization

FOLDER = Path(__file__).with_name("families")
FAMILIES = sorted(path.stem for path in FOLDER.glob("*.onnx"))
ROWS = 8
VOCABULARY = 64
OPEN_AXES = {"waveform": 400, "features": 48, "height": 32, "width": 32, "length": 12}


def data_for(inputs: list[InputSpec]) -> Samples:
    """Normal values, token ids, or masks of sequences that end early."""
    random = np.random.default_rng(0)

    def column(spec: InputSpec) -> NDArray:
        dims = [
            d if isinstance(d, int) else OPEN_AXES.get(spec.name, OPEN_AXES[str(d)]) for d in spec.shape[1:]
        ]
        if spec.name == "attention_mask":
            return (np.arange(dims[0]) < random.integers(4, dims[0] + 1, (ROWS, 1))).astype(np.int64)
        if spec.dtype.kind == "i":
            return random.integers(0, VOCABULARY, (ROWS, *dims))
        return random.normal(size=(ROWS, *dims)).astype(np.float32)

    return Samples("random", tuple(inputs), {spec.name: column(spec) for spec in inputs}, {}, "random")


def folded(family: str) -> Model:
    """The model of a family, at an opset that takes float16 scales."""
    model = load_model(FOLDER / f"{family}.onnx", opset=FP16_SCALE_OPSET)
    fold(model.graph)
    return model


def quantized(model: Model, samples: Samples) -> Quantization:
    """Every node that the rules let, by the maxima of the samples."""
    plan = place(model)
    scales = scales_from(collect(model.graph, plan.tensors, samples), parse_method("max"))
    return Quantization(model.graph, plan, scales)
