"""What end-to-end tests share: the command line in-process, and small models with data."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime

from trtq.cli.main import main


@dataclass(frozen=True)
class Run:
    """A finished command."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Deployed:
    """A folder of results, the cache that was used, and what the command said."""

    folder: Path
    cache: Path
    run: Run


@dataclass(frozen=True)
class Case:
    """A model and its data; the labels are the fp32 model's own decisions, so the reference scores 1."""

    model: Path
    data: Path


def trtq_command(*arguments: object) -> Run:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Run(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """A folder as the current one while the context lasts."""
    own = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(own)


def conv_case(folder: Path, batch: int | str, rows: int = 40) -> Case:
    """The model of `small` with a batch axis of its own."""
    random = np.random.default_rng(0)
    graph = gs.Graph(opset=17)
    graph.inputs = [gs.Variable("x", np.float32, [batch, 3, 8, 8])]
    weight = random.normal(size=(8, 3, 3, 3)).astype(np.float32)
    classes = random.normal(size=(8, 4)).astype(np.float32)
    tensors = graph.inputs
    for op, name, constants, attributes in (
        ("Conv", "conv", [gs.Constant("w", weight)], {"pads": [1, 1, 1, 1]}),
        ("Relu", "relu", [], {}),
        ("MaxPool", "pool", [], {"kernel_shape": [8, 8]}),
        ("Flatten", "flatten", [], {}),
        ("MatMul", "classes", [gs.Constant("fc", classes)], {}),
    ):
        output = gs.Variable(f"{name}_out", np.float32)
        graph.nodes.append(gs.Node(op, name, attributes, [*tensors, *constants], [output]))
        tensors = [output]
    tensors[0].shape = [batch, 4]
    graph.outputs = tensors
    x = random.normal(size=(rows, 3, 8, 8)).astype(np.float32)
    return save_case(graph, folder, {"x": x})


def save_case(graph: gs.Graph, folder: Path, inputs: dict[str, np.ndarray]) -> Case:
    """Write the model and its data; labels are the argmax of its first output."""
    proto = gs.export_onnx(graph)
    proto.ir_version = 10
    onnx.save(proto, folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    rows = len(next(iter(inputs.values())))
    size = graph.inputs[0].shape[0]
    step = size if isinstance(size, int) else rows
    labels: list[int] = []
    for start in range(0, rows, step):
        parts = {name: values[start : start + step] for name, values in inputs.items()}
        short = step - len(next(iter(parts.values())))
        padded = {n: np.concatenate([p, np.repeat(p[-1:], short, axis=0)]) for n, p in parts.items()}
        labels += list(session.run(None, padded)[0].argmax(axis=1)[: step - short])
    np.savez(folder / "data.npz", labels=np.array(labels), **inputs)
    return Case(folder / "model.onnx", folder / "data.npz")


def refused_case(folder: Path) -> Case:
    """A product and a determinant, which TensorRT's parser does not take."""
    random = np.random.default_rng(0)
    x, h, m = (gs.Variable(name, np.float32) for name in "xhm")
    x.shape = ["N", 32]
    y = gs.Variable("y", np.float32, ["N"])
    weight = gs.Constant("w", random.normal(size=(32, 16)).astype(np.float32))
    nodes = [
        gs.Node("MatMul", "product", {}, [x, weight], [h]),
        gs.Node("Reshape", "square", {}, [h, gs.Constant("s", np.array([-1, 4, 4]))], [m]),
        gs.Node("Det", "determinant", {}, [m], [y]),
    ]
    graph = gs.Graph(nodes, [x], [y], opset=17)
    np.savez(folder / "data.npz", x=random.normal(size=(48, 32)).astype(np.float32))
    proto = gs.export_onnx(graph)
    proto.ir_version = 9
    onnx.save(proto, folder / "model.onnx")
    return Case(folder / "model.onnx", folder / "data.npz")


def deploy_arguments(case: Case, output: Path, *more: object, metric: str = "cosine") -> Sequence[object]:
    """`deploy` of a case that is calibrated and evaluated on the same data."""
    return (
        "deploy",
        case.model,
        "--data",
        case.data,
        "--eval",
        case.data,
        "--metric",
        metric,
        "-o",
        output,
        *more,
    )
