"""Small models with operators that ONNX does not define, and references of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from nets import net, normal
from numpy.typing import ArrayLike

REFERENCES = """
import numpy as np

def Scaled(x, *, factor=1.0):
    return (x * np.float32(factor)).astype(np.float32)

def Paired(a, b):
    return a + b, (a.reshape(len(a), -1).sum(axis=1) > 0).astype(np.int32)
"""
"""One output and an attribute; two outputs of different types."""

WEIGHTS = {"w1": normal(4, 3, 3, 3), "w2": normal(4, 4, 3, 3, seed=1), "w3": normal(4, 4, 3, 3, seed=2)}


def reference_file(folder: Path, text: str = REFERENCES) -> Path:
    path = folder / "references.py"
    path.write_text(text)
    return path


def foreign_net(text: str, domain: str = "custom", **constants: ArrayLike) -> onnx.ModelProto:
    """`net` whose operators that ONNX lacks are of a domain; the weights w1, w2 and w3 are at hand."""
    model = net(text, **{k: v for k, v in (WEIGHTS | constants).items() if k in text})
    if domain:
        model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    for node in model.graph.node:
        if not onnx.defs.has(node.op_type):
            node.domain = domain
    return model


def middle(domain: str = "custom") -> onnx.ModelProto:
    """A Conv in front of a scaling and one behind it; nodes are a, m, b and y."""
    return foreign_net(
        "g (float[N,3,8,8] x) => (float[N,4,6,6] y) {"
        " a = Conv<pads = [1,1,1,1]>(x, w1) m = Scaled<factor = 0.5>(a) b = Relu(m) y = Conv(b, w2) }",
        domain,
    )


def chain() -> onnx.ModelProto:
    """Two foreign operators in a row of Convs, the second with two outputs."""
    return foreign_net(
        "g (float[N,3,8,8] x) => (float[N,4,8,8] y, int32[N] s) {"
        " a = Conv<pads = [1,1,1,1]>(x, w1) m = Scaled<factor = 0.5>(a) b = Conv<pads = [1,1,1,1]>(m, w2)"
        " p, s = Paired(b, a) q = Add(p, a) y = Conv<pads = [1,1,1,1]>(q, w3) }"
    )


def samples(folder: Path, rows: int = 24, seed: int = 1, shape: tuple[int, ...] = (3, 8, 8)) -> Path:
    path = folder / f"data{seed}.npz"
    np.savez(path, x=normal(rows, *shape, seed=seed))
    return path


def attributes_of(node: onnx.NodeProto) -> Mapping[str, object]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
