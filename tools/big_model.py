"""Memory and time of `trtq quantize` and of an engine build on models of BERT-large's size and above 2 GB.

    python tools/big_model.py                  both sizes: 4 GB of memory and 5 GB of disk, removed afterwards
    python tools/big_model.py --layers 4 8     a quick look
    python tools/big_model.py --deploy         the whole workflow with its defaults

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

HIDDEN, HEADS, INNER, VOCABULARY, LENGTH = 1024, 16, 4096, 30522, 32
ROWS = 4
SIZES = (24, 42)
"""Encoder layers: BERT-large's, and as many as make more than 2 GB."""

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
    arguments = parser.parse_args()
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
