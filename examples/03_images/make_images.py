"""Writes the demo's digits as PNG files, and its model with another range of pixels."""

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from PIL import Image

import trtq

demo = Path(trtq.__file__).parent / "demo"

for name, count in (("calib", 128), ("eval", 300)):
    arrays = np.load(demo / f"{name}.npz")
    images, labels = arrays["image"][:count, 0], arrays["label"][:count]
    pixels = np.rint((images - images.min()) / (images.max() - images.min()) * 255).astype(np.uint8)
    Path(name).mkdir(exist_ok=True)
    lines = ["file,label"]
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        Image.fromarray(image).resize((64, 64), Image.Resampling.NEAREST).save(f"{name}/{number:03}.png")
        lines.append(f"{number:03}.png,{label}")
    Path(f"{name}.csv").write_text("\n".join(lines) + "\n")

low, high = float(images.min()), float(images.max())
model = onnx.load(demo / "digits.onnx")
(given,) = model.graph.input
for node in model.graph.node:
    node.input[:] = ["pixels" if name == given.name else name for name in node.input]
constants = {"std": 0.5 * (high - low), "mean": 0.25 * (high - low) + low}
model.graph.initializer.extend(numpy_helper.from_array(np.float32(v), k) for k, v in constants.items())
model.graph.node.insert(0, helper.make_node("Add", ["scaled", "mean"], ["pixels"], "add_mean"))
model.graph.node.insert(0, helper.make_node("Mul", [given.name, "std"], ["scaled"], "times_std"))
onnx.checker.check_model(model)
onnx.save(model, "model.onnx")
