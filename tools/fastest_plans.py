"""The fastest plans of the zoo's models by GPU, and what TensorRT for RTX makes of them without one.

    python tools/fastest_plans.py ZOO [--gpu L4 --gpu T4 ...] [--build]

Of every model at a batch of 8 a line for each GPU: modelled microseconds of FP32, FP16, INT8 wherever it can
be and the fastest plan, the bytes that they move, and how many nodes the fastest has in INT8. With --build
engines of TensorRT for RTX are compiled from them, and bytes and kernels of those stand beside.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from trtq.backends import tensorrt_rtx
from trtq.cost.interface import Builder, Rest
from trtq.cost.sources import source_for
from trtq.graph.fold import fold
from trtq.graph.model import FP16_SCALE_OPSET, Model, load_model, save_model
from trtq.graph.place import place
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.recovery.speed import Speed

SHAPES = {
    "resnet20_cifar10": (8, 3, 32, 32),
    "efficientnet_lite0": (8, 3, 224, 224),
    "minilm_l6": (8, 64),
    "ppocrv4_recognizer": (8, 3, 48, 320),
}
GPUS = ("T4", "L4", "A100 80GB", "RTX 4090")
TARGET = "8.6"


def main() -> None:
    """Print all lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--gpu", action="append")
    parser.add_argument("--build", action="store_true")
    given = parser.parse_args()
    for name, shape in SHAPES.items():
        model = load_model(given.zoo / "models" / f"{name}.onnx", opset=FP16_SCALE_OPSET)
        fold(model.graph)
        for tensor in model.graph.inputs:
            tensor.shape = list(shape)
        shapes = {tensor.name: shape for tensor in model.graph.inputs}
        plan, made = place(model, input_shapes=shapes), dict[str, str]()
        for gpu in given.gpu or GPUS:
            for builder in ("tensorrt-rtx",) if given.build else ("tensorrt", "tensorrt-rtx"):
                print(
                    f"{name}, {gpu}, {builder}: {line(model, plan, shapes, gpu, builder, given.build, made)}"
                )


def line(
    model: Model,
    plan: Plan,
    shapes: dict[str, tuple[int, ...]],
    gpu: str,
    builder: Builder,
    build: bool,
    made: dict[str, str],
) -> str:
    """What the plans of one model cost; `made` keeps what was compiled."""
    source = source_for(model.graph, shapes, gpu=gpu, builder=builder)
    assert source is not None
    speed = Speed(model.graph, plan, source)
    fastest, rests = speed.fastest("fp16"), ("fp32", "fp16", "fp16", "fp16")
    plans = (speed.without_int8, speed.without_int8, plan, fastest)
    parts = []
    for name, placed, rest in zip(("FP32", "FP16", "INT8", "fastest"), plans, rests, strict=True):
        latency = speed.latency(placed, rest)  # type: ignore[arg-type]
        parts.append(f"{name} {latency.microseconds:.1f} µs {latency.bytes / 1e6:.1f} MB")
        if build:
            key = f"{rest} {placed.int8_nodes} {len(placed.edges)}"
            made[key] = made.get(key) or compiled(model, placed, rest)  # type: ignore[arg-type]
            parts[-1] += f" ({made[key]})"
    return f"{'; '.join(parts)}; {len(fastest.int8_nodes)} of {len(plan.int8_nodes)} nodes in INT8"


def compiled(model: Model, plan: Plan, rest: Rest) -> str:
    """Bytes and kernels of the engine; its scales are made up, as they decide neither."""
    quantization = Quantization(model.graph, plan, dict.fromkeys(plan.tensors, np.float32(0.05)))
    with tempfile.TemporaryDirectory() as folder:
        save_model(quantization.rewritten(rest=rest), path := Path(folder) / "model.onnx")
        engine = tensorrt_rtx.build(path, Path(folder) / "model.plan", targets=(TARGET,)).compiled
    return f"compiled: {engine.bytes_moved() / 1e6:.1f} MB, {engine.kernels} kernels"


if __name__ == "__main__":
    main()
