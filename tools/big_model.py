"""Memory and time of `trtq quantize` and of an engine build on models of BERT-large's size and above 2 GB, of
`trtq quantize` on models of many nodes, and of `trtq calibrate` on many rows.

    python tools/big_model.py                  both sizes: 4 GB of memory and 5 GB of disk, removed afterwards
    python tools/big_model.py --layers 4 8     a quick look
    python tools/big_model.py --deploy         the whole workflow with its defaults
    python tools/big_model.py --nodes 5000 20000 --shape chain wide decoder
                                               `quantize` of models of many small nodes
    python tools/big_model.py --rows 100000 1000000 10000000
                                               `calibrate` on many rows of 16 bytes

The weights are random and written to external data. Every command runs as a user runs it, in a process of
its own, whose peak resident memory the operating system gives. The slopes between two sizes say what a
7-billion-parameter decoder would need.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

HIDDEN, HEADS, INNER, VOCABULARY, LENGTH = 1024, 16, 4096, 30522, 32
ROWS = 4
SIZES = (24, 42)
"""Encoder layers: BERT-large's, and as many as make more than 2 GB."""

SHAPES = ("chain", "wide", "decoder")
"""Of models of many nodes."""

DECODER = 6.74e9
"""Parameters of a decoder of the 7-billion class (32 layers of 4096)."""


@dataclass(frozen=True)
class Cost:
    """What a command took: wall seconds, CPU seconds, and bytes of resident memory at its peak."""

    seconds: float
    cpu: float
    peak: int


class Writer:
    """Initializers whose values go straight into a file of external data."""

    def __init__(self, path: Path) -> None:
        self._file, self._location = path.open("wb"), path.name
        self._random = np.random.default_rng(0)
        self.initializers: list[onnx.TensorProto] = []

    def add(self, name: str, shape: tuple[int, ...], scale: float, centre: float = 0.0) -> str:
        values = self._random.standard_normal(shape, np.float32)
        values *= scale
        values += centre
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", self._location),
            ("offset", self._file.tell()),
            ("length", values.nbytes),
        ):
            tensor.external_data.add(key=key, value=str(value))
        self._file.write(values.data)
        self.initializers.append(tensor)
        return name

    def close(self) -> int:
        """Bytes written."""
        size = self._file.tell()
        self._file.close()
        return size


def make_encoder(path: Path, layers: int) -> int:
    """Write a BERT-like encoder over token ids; returns the bytes of its weights."""
    writer = Writer(path.with_suffix(".weights"))
    nodes: list[onnx.NodeProto] = []

    def node(op: str, inputs: list[str], name: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [name], name=f"{name}/{op}", **attributes))
        return name

    def linear(x: str, name: str, into: int, out: int) -> str:
        weight = writer.add(f"{name}.weight", (into, out), into**-0.5)
        product = node("MatMul", [x, weight], f"{name}.product")
        return node("Add", [product, writer.add(f"{name}.bias", (out,), 0.02)], name)

    def norm(x: str, name: str) -> str:
        gain = writer.add(f"{name}.gain", (HIDDEN,), 0.02, 1.0)
        return node("LayerNormalization", [x, gain, writer.add(f"{name}.bias", (HIDDEN,), 0.02)], name)

    def heads(x: str, name: str, order: tuple[int, ...]) -> str:
        return node("Transpose", [node("Reshape", [x, "split"], f"{name}.split")], name, perm=order)

    x = node("Gather", [writer.add("words", (VOCABULARY, HIDDEN), 1.0), "ids"], "embedded")
    for i in range(layers):
        at = f"layer{i}"
        q, k, v = (linear(x, f"{at}.{part}", HIDDEN, HIDDEN) for part in ("query", "key", "value"))
        scores = node(
            "MatMul",
            [heads(q, f"{at}.q", (0, 2, 1, 3)), heads(k, f"{at}.k", (0, 2, 3, 1))],
            f"{at}.scores",
        )
        weights = node("Softmax", [node("Mul", [scores, "temperature"], f"{at}.scaled")], f"{at}.weights")
        context = node("MatMul", [weights, heads(v, f"{at}.v", (0, 2, 1, 3))], f"{at}.heads")
        context = node("Transpose", [context], f"{at}.context", perm=(0, 2, 1, 3))
        joined = node("Reshape", [context, "join"], f"{at}.joined")
        x = norm(node("Add", [x, linear(joined, f"{at}.out", HIDDEN, HIDDEN)], f"{at}.sum"), f"{at}.norm")
        inner = linear(x, f"{at}.inner", HIDDEN, INNER)
        half = node("Mul", [inner, "half"], f"{at}.half")
        erf = node("Erf", [node("Mul", [inner, "sqrt_half"], f"{at}.sqrt_half")], f"{at}.erf")
        gelu = node("Mul", [half, node("Add", [erf, "one"], f"{at}.erf1")], f"{at}.gelu")
        x = norm(node("Add", [x, linear(gelu, f"{at}.outer", INNER, HIDDEN)], f"{at}.sum2"), f"{at}.norm2")
    small = {
        "split": np.array([0, 0, HEADS, HIDDEN // HEADS]),
        "join": np.array([0, 0, HIDDEN]),
        "temperature": np.float32((HIDDEN / HEADS) ** -0.5),
        "half": np.float32(0.5),
        "sqrt_half": np.float32(0.5**0.5),
        "one": np.float32(1),
    }
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", LENGTH])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["N", LENGTH, HIDDEN])],
        [*(onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in small.items()), *writer.initializers],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return writer.close()


def make_many_nodes(path: Path, shape: str, count: int) -> None:
    """Write a model of `count` small nodes, and 8 rows for it as `path`.npz.

    Args:
        shape: `chain`: residual blocks of Conv, Relu, Add and Tanh, one after another; `wide`: a fifth of
            the nodes are Convs that read the input, each with four nodes behind it, all added up; `decoder`:
            MatMul, Softmax, Add and Tanh, one block after another.
    """
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def node(op: str, *inputs: str) -> str:
        name = f"{op.lower()}{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [f"{name}.out"], name=name))
        return f"{name}.out"

    def weight(*sizes: int) -> str:
        values = random.standard_normal(sizes, np.float32) * np.float32(0.4)
        weights.append(onnx.numpy_helper.from_array(values, f"weight{len(weights)}"))
        return weights[-1].name

    x, sizes = "x", [4, 4] if shape == "decoder" else [4, 4, 4]
    if shape == "wide":
        ends = []
        for _ in range(count // 5):
            end = node("Conv", "x", weight(4, 4, 1, 1))
            for op in ("Relu", "Tanh", "Relu", "Tanh"):
                end = node(op, end)
            ends.append(end)
        x = node("Sum", *ends)
    while shape != "wide" and len(nodes) < count:
        if shape == "chain":
            inner = node("Relu", node("Conv", x, weight(4, 4, 1, 1)))
        else:
            inner = node("Softmax", node("MatMul", x, weight(4, 4)))
        x = node("Tanh", node("Add", inner, x))
    graph = helper.make_graph(
        nodes,
        shape,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *sizes])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, None)],
        weights,
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), os.fspath(path)
    )
    np.savez(path.with_suffix(".npz"), x=random.standard_normal((8, *sizes), np.float32))


def make_many_rows(path: Path, rows: int) -> None:
    """Write a model that takes four numbers, and rows for it as `path`.npz."""
    random = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(random.standard_normal((4, 4), np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"], name="product")],
        "rows",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [weight],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), os.fspath(path)
    )
    np.savez(path.with_suffix(".npz"), x=random.standard_normal((rows, 4), np.float32))


def run_small(make: Callable[[Path], None], step: str, method: str, parent: Path | None) -> Cost:
    """What a command takes on a model and data that are made for it."""
    with tempfile.TemporaryDirectory(prefix="trtq-big-", dir=parent) as name:
        folder = Path(name)
        make(model := folder / "model.onnx")
        options = ("--data", model.with_suffix(".npz"), "--method", method, "--cache", folder / "cache")
        return measure(sys.executable, "-m", "trtq", step, model, *options, "-o", folder / "out", "--quiet")


def measure(*command: object, allowed: tuple[int, ...] = (0,)) -> Cost:
    """Run a command to its end and ask the operating system what it took.

    Args:
        allowed: exit codes.

    Raises:
        SystemExit: it ended with another one.
    """
    started = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in allowed:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(map(str, command))}")
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(time.perf_counter() - started, cpu, usage.ru_maxrss * 1024)


def run(
    layers: int, method: str, parent: Path | None, *, deploy: bool = False
) -> tuple[int, dict[str, Cost]]:
    """Make a model, quantize it and build its engine; the bytes of its weights, and what each step took.

    Args:
        deploy: run the whole workflow with its defaults instead, whatever its gate says.
    """
    trtq = (sys.executable, "-m", "trtq")
    with tempfile.TemporaryDirectory(prefix="trtq-big-", dir=parent) as name:
        folder = Path(name)
        model, data, int8 = folder / "model.onnx", folder / "data.npz", folder / "int8.onnx"
        weights = make_encoder(model, layers)
        np.savez(data, ids=np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH)))
        if deploy:
            options = ("--data", data, "--eval", data, "--metric", "cosine", "--cache", folder / "cache")
            command = (*trtq, "deploy", model, *options, "--quiet", "-o", folder / "out")
            return weights, {"deploy": measure(*command, allowed=(0, 1))}
        options = ("--data", data, "--method", method, "--cache", folder / "cache", "--quiet")
        costs = {"quantize": measure(*trtq, "quantize", model, *options, "-o", int8)}
        costs["build"] = measure(*trtq, "build", int8, "--quiet", "-o", folder / "model.plan")
    return weights, costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=SIZES)
    parser.add_argument("--method", default="max", help="of calibration; default: max")
    parser.add_argument("--deploy", action="store_true", help="the whole workflow, with its defaults")
    parser.add_argument("--folder", type=Path, help="where the models are written, and removed again")
    parser.add_argument("--nodes", type=int, nargs="+", help="models of so many small nodes instead")
    parser.add_argument("--shape", nargs="+", default=SHAPES, choices=SHAPES, help="theirs; default: all")
    parser.add_argument("--rows", type=int, nargs="+", help="so many small rows instead")
    arguments = parser.parse_args()
    small: dict[str, tuple[Callable[[Path], None], str]] = {}
    for count in arguments.nodes or ():
        for shape in arguments.shape:
            make = partial(make_many_nodes, shape=shape, count=count)
            small[f"{shape} of {count} nodes"] = make, "quantize"
    for rows in arguments.rows or ():
        small[f"{rows} rows"] = partial(make_many_rows, rows=rows), "calibrate"
    if small:
        print("| model | step | peak memory | seconds | CPU |\n|-|-|-:|-:|-:|")
        for label, (make, step) in small.items():
            cost = run_small(make, step, arguments.method, arguments.folder)
            figures = f"{cost.peak / 1e9:.2f} GB | {cost.seconds:.0f} | {cost.cpu:.0f}"
            print(f"| {label} | {step} | {figures} |", flush=True)
        return
    print("| layers | parameters | weights | step | peak memory | peak / weights | seconds | CPU |")
    print("|-:|-:|-:|-|-:|-:|-:|-:|")
    runs = []
    for layers in arguments.layers:
        weights, costs = run(layers, arguments.method, arguments.folder, deploy=arguments.deploy)
        runs.append((weights, costs))
        for step, cost in costs.items():
            print(
                f"| {layers} | {weights / 4e6:.0f} M | {weights / 1e9:.2f} GB | {step} "
                f"| {cost.peak / 1e9:.2f} GB | {cost.peak / weights:.2f} | {cost.seconds:.0f} "
                f"| {cost.cpu:.0f} |",
                flush=True,
            )
    if len(runs) > 1:
        (small, before), (large, after) = runs[0], runs[-1]
        print(f"\nA decoder of {DECODER / 1e9:.2f} billion parameters on paper, from these slopes:")
        for step in before:
            slope = (after[step].peak - before[step].peak) / (large - small)
            rest = after[step].peak - slope * large
            needed = rest + slope * 4 * DECODER
            print(
                f"{step}: {rest / 1e9:.2f} GB + {slope:.2f} x the weights = {needed / 1e9:.0f} GB of memory"
                f" for {4 * DECODER / 1e9:.0f} GB of float32 weights"
            )
        print(f"disk: {4 * DECODER / 1e9:.0f} GB, and {DECODER / 1e9:.0f} GB each for INT8 model and engine")


if __name__ == "__main__":
    main()
