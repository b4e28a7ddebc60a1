"""Small ONNX models from their text form, run by ONNX Runtime and built by TensorRT for RTX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from numpy.typing import ArrayLike, NDArray

from trtq.backends.interface import Build, Range
from trtq.graph.model import Model, export, load_model, name_nodes
from trtq.graph.plan import Plan
from trtq.numerics import scale_from_amax

Arrays = Mapping[str, NDArray]


def net(text: str, *, opset: int = 17, ir_version: int = 8, **constants: ArrayLike) -> onnx.ModelProto:
    """`g (inputs) => (outputs) { nodes }` in ONNX's text form; each node is called like its first output."""
    text = text.replace("<>", "")  # which the parser does not take for no attributes
    model = onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["": {opset}]> {text}')
    for name, values in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    for node in model.graph.node:
        node.name = node.output[0]
    return model


def graph_of(model: onnx.ModelProto) -> gs.Graph:
    graph = gs.import_onnx(model)
    name_nodes(graph)
    return graph


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def loaded(model: onnx.ModelProto, folder: Path, *, opset: int = 13) -> Model:
    return load_model(saved(model, folder), opset=opset)


def normal(*shape: int, seed: int = 0, dtype: type = np.float32) -> NDArray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def run(model: onnx.ModelProto | gs.Graph | Path, feed: Arrays) -> dict[str, NDArray]:
    """All outputs, computed by ONNX Runtime without any graph optimization."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if isinstance(model, gs.Graph):
        model = export(model)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feed)), strict=True))


def tensor(model: onnx.ModelProto | gs.Graph, name: str, feed: Arrays) -> NDArray:
    """The value of one tensor inside a model."""
    proto = (
        export(model)
        if isinstance(model, gs.Graph)
        else onnx.ModelProto.FromString(model.SerializeToString())
    )
    del proto.graph.output[:]
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return run(proto, feed)[name]


def max_scales(model: onnx.ModelProto | gs.Graph, plan: Plan, feed: Arrays) -> dict[str, np.float32]:
    """Scale of every tensor of the plan from the largest magnitude that one feed shows."""
    return {
        name: np.float32(
            scale_from_amax(np.abs(feed[name] if name in feed else tensor(model, name, feed)).max())
        )
        for name in plan.tensors
    }


def engine(model: onnx.ModelProto | gs.Graph | Path, folder: Path, **shapes: Sequence[int]) -> Build:
    """An engine of TensorRT for RTX for one target; `shapes` are those of inputs with dynamic axes."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    from trtq.backends import tensorrt_rtx

    if not isinstance(model, Path):
        model = saved(export(model) if isinstance(model, gs.Graph) else model, folder)
    profile = {name: Range(tuple(s), tuple(s), tuple(s)) for name, s in shapes.items()}
    return tensorrt_rtx.build(model, folder / "model.plan", profile=profile, targets=("8.6",))


def attention() -> onnx.ModelProto:
    """One head over (N, 6, 8) with a mask (N, 6): projections, scaled and masked scores, softmax, values."""
    text = """
        attention (float[N,6,8] x, int64[N,6] mask) => (float[N,6,8] y) {
            q = MatMul(x, wq)
            k = MatMul(x, wk)
            v = MatMul(x, wv)
            kt = Transpose<perm = [0, 2, 1]>(k)
            scores = MatMul(q, kt)
            scaled = Div(scores, root)
            bits = Unsqueeze(mask, one)
            floats = Cast<to = 1>(bits)
            bias = Mul(floats, far)
            masked = Add(scaled, bias)
            p = Softmax<axis = -1>(masked)
            context = MatMul(p, v)
            y = MatMul(context, wo)
        }
    """
    weights = {name: normal(8, 8, seed=i) for i, name in enumerate(("wq", "wk", "wv", "wo"))}
    constants = {"root": np.float32(2.0), "far": np.float32(-3.0), "one": np.array([1], np.int64)}
    return net(text, **constants, **weights)
