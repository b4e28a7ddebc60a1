"""Small graphs with data, for the tests of the passes that change activations channel by channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.calibration.collect import collect
from trtq.calibration.methods import parse_method, scales_from
from trtq.console import Console
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.graph.fold import fold
from trtq.graph.model import load_model, serialized
from trtq.graph.place import place
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.job import Job
from trtq.recipe import Recipe
from trtq.simulation.session import simulation_session


@dataclass
class Case:
    """A graph under construction; then folded, placed and with samples."""

    graph: gs.Graph = field(default_factory=lambda: gs.Graph(opset=17))
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))
    plan: Plan = None  # type: ignore[assignment]
    samples: Samples = None  # type: ignore[assignment]

    def input(self, name: str, *shape: int) -> gs.Variable:
        self.graph.inputs.append(gs.Variable(name, np.float32, ["N", *shape]))
        return self.graph.inputs[-1]

    def output(self, tensor: gs.Variable, *shape: int | None) -> None:
        tensor.shape = ["N", *shape]
        self.graph.outputs.append(tensor)

    def node(self, op: str, *inputs: Any, **attributes: Any) -> gs.Variable:
        """A node; arrays among its inputs become constants."""
        index = len(self.graph.nodes)
        tensors = [
            t if isinstance(t, gs.Tensor) else gs.Constant(f"c{index}_{i}", np.asarray(t))
            for i, t in enumerate(inputs)
        ]
        output = gs.Variable(f"t{index}", np.float32)
        self.graph.nodes.append(gs.Node(op, f"n{index}", attributes, tensors, [output]))
        return output

    def weight(self, *shape: int) -> NDArray[np.float32]:
        return self.random.normal(size=shape).astype(np.float32)

    def ones(self, size: int) -> NDArray[np.float32]:
        return np.ones(size, np.float32)

    def linear(self, x: gs.Variable, inputs: int, outputs: int) -> gs.Variable:
        """MatMul and the Add of its bias."""
        return self.node("Add", self.node("MatMul", x, self.weight(inputs, outputs)), self.weight(outputs))

    def conv(
        self, x: gs.Variable, inputs: int, outputs: int, *, group: int = 1, pads: Sequence[int] = (0, 0, 0, 0)
    ) -> gs.Variable:
        weight = self.weight(outputs, inputs // group, 3, 3)
        attributes = {"pads": list(pads), "group": group, "kernel_shape": [3, 3]}
        return self.node("Conv", x, weight, self.weight(outputs), **attributes)

    def quantized(self, graph: gs.Graph | None = None, method: str = "max") -> Quantization:
        graph = graph or self.graph
        statistics = collect(graph, self.plan.tensors, self.samples)
        return Quantization(graph, self.plan, scales_from(statistics, parse_method(method)))


def small_case(folder: Path, build: Callable[[Case], None], x: NDArray[np.float32] | None = None) -> Case:
    """The graph that `build` makes, folded and placed, with random rows unless they are given."""
    case = Case()
    build(case)
    proto = gs.export_onnx(case.graph)
    proto.ir_version = 10
    onnx.save(proto, folder / "m.onnx")
    if x is None:
        x = case.random.normal(size=(32, *case.graph.inputs[0].shape[1:])).astype(np.float32)
    np.savez(folder / "x.npz", x=x)
    model = load_model(folder / "m.onnx")
    fold(model.graph)
    case.graph, case.plan = model.graph, place(model)
    case.samples = load_samples(str(folder / "x.npz"), model.inputs)
    return case


def outputs(graph: gs.Graph, samples: Samples, tensors: Sequence[str] | None = None) -> list[NDArray]:
    """The graph's outputs, or some of its tensors, with all rows one after the other."""
    with serialized(graph) as source:
        session = simulation_session(source, threads=1, outputs=tensors)
    rows = [session.run(None, feed) for feed in samples.rows()]
    return [np.concatenate(parts) for parts in zip(*rows, strict=True)]


def relative_error(expected: list[NDArray], found: list[NDArray]) -> float:
    """Largest difference over the largest magnitude."""
    pairs = zip(expected, found, strict=True)
    return max(float(np.abs(e - f).max() / np.abs(e).max()) for e, f in pairs)


def range_of(graph: gs.Graph, tensor: str, samples: Samples) -> tuple[NDArray, NDArray]:
    """Smallest and largest value of each channel (axis 1 of 4, else the last)."""
    (values,) = outputs(graph, samples, [tensor])
    values = np.moveaxis(values, 1 if values.ndim == 4 else -1, -1)
    values = values.reshape(-1, values.shape[-1])
    return values.min(axis=0), values.max(axis=0)


class Log(Console):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, label: str, text: str) -> None:
        self.lines.append(f"{label}: {text}")


def one_sided(case: Case) -> None:
    """Two layers whose inputs are mixtures of a few, far from zero: rounding errors have a mean."""
    h = case.node("Relu", case.linear(case.input("x", 12), 12, 16))
    case.output(case.linear(h, 16, 4), 4)


def job_of(folder: Path, console: Console | None = None, **options: object) -> tuple[Case, Job]:
    random = np.random.default_rng(2)
    x = (random.normal(size=(96, 3)) @ random.normal(size=(3, 12)) + 4).astype(np.float32)
    case = small_case(folder, one_sided, x)
    recipe = Recipe(
        model=str(folder / "m.onnx"), data=str(folder / "x.npz"), cache=str(folder / "cache"), rest="fp32"
    )
    return case, Job.open(replace(recipe, **options), console or Log())  # type: ignore[arg-type]
