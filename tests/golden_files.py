"""What the golden files of the demo hold: the structure and scales of its Q/DQ model, and its verdict.

Made again, after a change that is meant, by

    trtq demo --recover none -o demo && PYTHONPATH=tests python tests/golden_files.py demo
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx

GOLDEN = Path(__file__).parent / "golden"


def described(path: Path) -> dict[str, Any]:
    """A Q/DQ model as JSON: a line for each node, scales to 6 digits, and the hash of all other constants."""
    graph = onnx.load(path).graph
    scales = {n.input[1] for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return {
        "nodes": [_line(node) for node in graph.node],
        "scales": {n: six_digits(v.ravel().tolist()) for n, v in sorted(values.items()) if n in scales},
        "constants": {
            name: f"{value.dtype}{list(value.shape)} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
            for name, value in sorted(values.items())
            if name not in scales
        },
    }


def _line(node: onnx.NodeProto) -> str:
    attributes = sorted(f"{a.name}={onnx.helper.get_attribute_value(a)}" for a in node.attribute)
    return f"{node.name}: {node.op_type}({', '.join(node.input)}) {attributes} -> {', '.join(node.output)}"


def verdict_of(path: Path) -> Any:
    """A verdict.json with floats to 6 digits, without which samples were the worst."""
    verdict = json.loads(path.read_text())
    del verdict["worst_samples"]
    return six_digits(verdict)


def six_digits(value: Any) -> Any:
    if isinstance(value, float):
        return float(np.format_float_positional(value, 6, fractional=False))
    if isinstance(value, list):
        return [six_digits(item) for item in value]
    return {key: six_digits(item) for key, item in value.items()} if isinstance(value, dict) else value


def main() -> None:
    folder = Path(sys.argv[1])
    for name, content in (
        ("model.int8.json", described(folder / "model.int8.onnx")),
        ("verdict.json", verdict_of(folder / "verdict.json")),
    ):
        (GOLDEN / name).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
