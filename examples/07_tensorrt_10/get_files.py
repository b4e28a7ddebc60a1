"""Copies the demo's model and data here."""

import shutil
from pathlib import Path

import trtq

demo = Path(trtq.__file__).parent / "demo"
shutil.copy(demo / "digits.onnx", "model.onnx")
for name in ("calib.npz", "eval.npz"):
    shutil.copy(demo / name, name)
