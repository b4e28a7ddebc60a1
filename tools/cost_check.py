"""The cost model against real engines' profiles.

    python tools/cost_check.py FOLDER [--gpu NAME] [--layers]

The folder holds, for each engine, what trtexec wrote: `X.graph.json` (--exportLayerInfo) and `X.profile.json`
(--exportProfile), and, if known, `X.profile.metadata.json` of TensorRT's engine explorer, which names the GPU
and has the time of the whole engine. Without a folder it is TRTQ_PROFILES. It prints

1. layers and whole engines by the roofline of the engine's own layers, against what was measured;
2. the same with constants fitted to one GPU's engines and checked on another's;
3. whole engines of a ResNet as predicted from its ONNX graph and a placement, for the ResNets of that
   explorer's examples, if their profiles are there;
4. what profiles of two engines say of the others, for the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from trtq.cost.gpus import Gpu, gpu_named
from trtq.cost.imported import closest_gpu, layer_times, read_engine
from trtq.cost.interface import Latency, Rest
from trtq.cost.layers import layer_load
from trtq.cost.modelled import Modelled
from trtq.cost.roofline import FITTED, Constants, Load, kernel_time
from trtq.cost.timed import Timed, TimedEngine
from trtq.errors import InputError
from trtq.graph.model import Model
from trtq.graph.place import POOL, RESIDUAL, place
from trtq.graph.plan import Plan
from trtq.graph.shapes import concrete_shapes, infer_types


@dataclass(frozen=True)
class Profiled:
    """An engine of the folder.

    Attributes:
        layers: what each has to do, and what it took by TensorRT's profiler, in microseconds.
        engine: the same as trtq imports it.
        whole_us: what the engine took without the profiler; None where it is not known.
    """

    name: str
    gpu: Gpu
    layers: tuple[tuple[str, Load, float], ...]
    engine: TimedEngine
    whole_us: float | None

    @property
    def profiled_us(self) -> float:
        return sum(us for _, _, us in self.layers)


def read_folder(folder: Path, gpu: str | None) -> list[Profiled]:
    return [_read(path, gpu) for path in sorted(folder.rglob("*.graph.json"))]


def _read(graph: Path, gpu: str | None) -> Profiled:
    stem = graph.name.removesuffix(".graph.json")
    profile = graph.with_name(f"{stem}.profile.json")
    metadata = graph.with_name(f"{stem}.profile.metadata.json")
    about = json.loads(metadata.read_text()) if metadata.exists() else {}
    batch = _batch(about)
    engine = read_engine(profile, graph, batch)
    milliseconds = itertools.chain.from_iterable(layer_times(profile).values())
    layers = [
        (layer.name, layer_load(layer.compiled, batch), 1e3 * ms)
        for layer, ms in zip(engine.layers, milliseconds, strict=True)
        if layer.compiled is not None and layer.compiled.launches and ms
    ]
    if missing := sum(layer.compiled is None and layer.microseconds > 0 for layer in engine.layers):
        print(f"{stem}: {missing} layers of the profile are not in the list of layers")
    whole = about.get("performance_summary", {}).get("GPU Compute Time")
    return Profiled(
        stem,
        _gpu(stem, about, gpu, engine),
        tuple(layers),
        engine,
        1e3 * whole[3] if whole else None,  # smallest, largest, mean, median
    )


def _batch(about: dict[str, Any]) -> int:
    shape = re.search(r"=(\d+)x", str(about.get("inference_options", {}).get("Input inference shape", "")))
    return int(shape[1]) if shape else 1


def _gpu(stem: str, about: dict[str, Any], said: str | None, engine: TimedEngine) -> Gpu:
    device = about.get("device_information", {}).get("Selected Device")
    for name in (said, device, *re.findall(r"[^-_. ]+", stem)):
        if name:
            try:
                return gpu_named(name)
            except InputError:
                continue
    found = closest_gpu([engine])
    print(f"{stem}: which GPU it was is not said; {found.name} is closest")
    return found


# --- 1: layers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """How well a roofline fits an engine: microseconds with and without the profiler, rank correlation."""

    profiled_us: float
    whole_us: float
    spearman: float
    error: float


def fit_of(engine: Profiled, constants: Constants = FITTED) -> Fit:
    times = [kernel_time(engine.gpu, load, constants).microseconds for _, load, _ in engine.layers]
    profiled = np.array(times) + constants.profiler_us
    measured = np.array([us for _, _, us in engine.layers])
    error = float(np.mean(np.abs(np.log(profiled / measured))))
    return Fit(float(profiled.sum()), sum(times), spearman(profiled, measured), error)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation; equal values share their mean rank."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def show_layers(engines: Sequence[Profiled], constants: Constants = FITTED) -> None:
    head = f"{'engine':<58} {'GPU':<10} {'by profiler, ms':>24} {'whole, ms':>20} Spearman  layers' error"
    print(head)
    for engine in engines:
        fit = fit_of(engine, constants)
        whole = "" if engine.whole_us is None else _against(fit.whole_us, engine.whole_us)
        profiled = _against(fit.profiled_us, engine.profiled_us)
        print(
            f"{engine.name[-58:]:<58} {engine.gpu.name:<10} {profiled:>24} {whole:>20}"
            f" {fit.spearman:8.2f} {math.expm1(fit.error):8.0%}"
        )
    for gpu in dict.fromkeys(engine.gpu.name for engine in engines):
        among = [engine for engine in engines if engine.gpu.name == gpu]
        predicted = [fit_of(engine, constants).profiled_us for engine in among]
        show_order(gpu, [e.name for e in among], predicted, [e.profiled_us for e in among])


def _against(predicted: float, measured: float) -> str:
    return f"{predicted / 1e3:.3f} / {measured / 1e3:.3f} {predicted / measured - 1:+.0%}"


def show_order(
    what: str, names: Sequence[str], predicted: Sequence[float], measured: Sequence[float]
) -> None:
    wrong = [
        f"{names[i]} and {names[j]}"
        for i, j in itertools.combinations(range(len(names)), 2)
        if (predicted[i] - predicted[j]) * (measured[i] - measured[j]) < 0
    ]
    print(f"order of {len(names)} engines, {what}: {'right' if not wrong else 'wrong: ' + '; '.join(wrong)}")


# --- 2: constants ---------------------------------------------------------------------------------------

_BOUNDS = {
    "launch_us": (1, 6),
    "ramp_us": (0.5, 6),
    "profiler_us": (1, 8),
    "memory": (0.5, 0.95),
    "convert": (0.5, 8),
    "tensor": (0.4, 1),
    "cuda": (0.3, 1),
    "narrow": (1, 64),
}


def fitted(engines: Sequence[Profiled]) -> Constants:
    """The constants with the least error on engines, found by changing one after the other."""

    def loss(constants: Constants) -> float:
        total = 0.0
        for engine in engines:
            fit = fit_of(engine, constants)
            total += fit.error + abs(math.log(fit.profiled_us / engine.profiled_us))
            total += abs(math.log(fit.whole_us / engine.whole_us)) if engine.whole_us else 0
        return total

    constants, step = FITTED, 1.3
    best = loss(constants)
    while step > 1.03:
        before = best
        for name, factor in itertools.product(_BOUNDS, (step, 1 / step)):
            value = min(max(getattr(constants, name) * factor, _BOUNDS[name][0]), _BOUNDS[name][1])
            changed = dataclasses.replace(constants, **{name: value})
            if (error := loss(changed)) < best:
                constants, best = changed, error
        if best == before:
            step = math.sqrt(step)
    return constants


def show_left_out(engines: Sequence[Profiled]) -> None:
    names = list(dict.fromkeys(engine.gpu.name for engine in engines))
    for left_out in names if len(names) > 1 else ():
        constants = fitted([engine for engine in engines if engine.gpu.name != left_out])
        values = ", ".join(f"{name} {value:.2g}" for name, value in dataclasses.asdict(constants).items())
        print(f"\nfitted without the {left_out} ({values}):")
        show_layers([engine for engine in engines if engine.gpu.name == left_out], constants)


# --- 3 and 4: ResNets of the engine explorer's examples ---------------------------------------------------


class _Net:
    """A ResNet in the making: shapes only, all weights are zeros."""

    def __init__(self, *shape: int) -> None:
        self.graph = gs.Graph(opset=17, name="resnet")
        self.graph.inputs = [gs.Variable("x", np.float32, list(shape))]

    def op(self, op: str, *inputs: gs.Tensor, **attrs: Any) -> gs.Variable:
        count = len(self.graph.nodes)
        output = gs.Variable(f"t{count}", np.float32)
        self.graph.nodes.append(gs.Node(op, f"{op}_{count}", attrs, list(inputs), [output]))
        return output

    def zeros(self, *shape: int) -> gs.Constant:
        return gs.Constant(f"w{len(self.graph.nodes)}_{len(shape)}", np.zeros(shape, np.float32))

    def conv(self, x: gs.Tensor, channels: tuple[int, int], size: int, stride: int = 1) -> gs.Variable:
        weights = (self.zeros(channels[1], channels[0], size, size), self.zeros(channels[1]))
        return self.op("Conv", x, *weights, strides=[stride] * 2, pads=[size // 2] * 4)

    def model(self, features: gs.Tensor, channels: int) -> Model:
        flat = self.op("Flatten", self.op("GlobalAveragePool", features))
        self.graph.outputs = [self.op("Gemm", flat, self.zeros(1000, channels), self.zeros(1000), transB=1)]
        infer_types(self.graph.cleanup().toposort())
        return Model(Path("resnet.onnx"), self.graph, "0" * 64)


def resnet18() -> Model:
    """As PyTorch exports it."""
    net = _Net(32, 3, 224, 224)
    stem = net.op("Relu", net.conv(net.graph.inputs[0], (3, 64), 7, 2))
    x, before = net.op("MaxPool", stem, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4), 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = 2 if stage and not block else 1
            y = net.op("Relu", net.conv(x, (before, width), 3, stride))
            y = net.conv(y, (width, width), 3)
            x = net.op(
                "Relu", net.op("Add", y, x if before == width else net.conv(x, (before, width), 1, stride))
            )
            before = width
    return net.model(x, 512)


def resnet50() -> Model:
    """As TensorFlow exports it: channels last in the input, padding apart, strides in first convolutions."""
    net = _Net(32, 224, 224, 3)
    image = net.op("Transpose", net.graph.inputs[0], perm=[0, 3, 1, 2])
    stem = net.op("Relu", net.conv(image, (3, 64), 7, 2))
    padded = net.op("Pad", stem, gs.Constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1])))
    x, before = net.op("MaxPool", padded, kernel_shape=[3, 3], strides=[2, 2]), 64
    for stage, (width, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
        for block in range(blocks):
            stride, after = 2 if stage and not block else 1, 4 * width
            shortcut = net.conv(x, (before, after), 1, stride) if not block else x
            y = net.op("Relu", net.conv(x, (before, width), 1, stride))
            y = net.conv(net.op("Relu", net.conv(y, (width, width), 3)), (width, after), 1)
            x, before = net.op("Relu", net.op("Add", y, shortcut)), after
    return net.model(x, 2048)


def _none(plan: Plan) -> Plan:
    nodes = [dataclasses.replace(node, int8=False) for node in plan.nodes]
    return dataclasses.replace(plan, nodes=nodes, edges=[], weights=[])


def _without(*rules: str) -> Callable[[Plan], Plan]:
    return lambda plan: dataclasses.replace(plan, edges=[e for e in plan.edges if e.rule not in rules])


@dataclass(frozen=True)
class Placement:
    """An engine as the ONNX graph and a placement make it: the file's name -> what the plan is."""

    name: str
    words: str
    plan: Callable[[Plan], Plan]
    rest: Rest


_A100 = (
    Placement("pytorch-resnet-A100-fp32-resnet", "float32", _none, "fp32"),
    Placement("pytorch-resnet-A100-fp16-resnet", "float16", _none, "fp16"),
    Placement(
        "pytorch-resnet-A100-qat-resnet-qat",
        "INT8, no Q/DQ on residual inputs and pooling",
        _without(RESIDUAL, POOL, "moved-input"),
        "fp16",
    ),
    Placement(
        "pytorch-resnet-A100-qat-residual-resnet-qat-residual",
        "INT8, none on pooling",
        _without(POOL),
        "fp16",
    ),
    Placement(
        "pytorch-resnet-A100-qat-residual-qgap-resnet-qat-residual-qgap",
        "INT8 as trtq places Q/DQ",
        lambda plan: plan,
        "fp16",
    ),
)
_RTX_3090 = (
    Placement("tensorflow-resnet-RTX-3090-fp32-resnet", "float32", _none, "fp32"),
    Placement("tensorflow-resnet-RTX-3090-fp16-resnet", "float16", _none, "fp16"),
    Placement(
        "tensorflow-resnet-RTX-3090-qat-resnet-qat", "INT8 as trtq places Q/DQ", lambda plan: plan, "fp16"
    ),
)


def show_placements(engines: Sequence[Profiled]) -> None:
    by_name = {engine.name: engine for engine in engines}
    for title, build, placements in (("ResNet-18", resnet18, _A100), ("ResNet-50", resnet50, _RTX_3090)):
        known = [each for each in placements if each.name in by_name]
        if not known:
            continue
        model = build()
        shapes = {t.name: tuple(t.shape) for t in model.graph.inputs}
        plan = place(model, input_shapes=shapes)
        found = concrete_shapes(model.graph, shapes)
        modelled = Modelled(model.graph, found, by_name[known[0].name].gpu)
        latencies = [modelled.latency(each.plan(plan), each.rest) for each in known]
        print(f"\n{title} from its ONNX graph, {modelled.name}: by profiler, ms; whole, ms")
        for each, latency in zip(known, latencies, strict=True):
            engine = by_name[each.name]
            whole = "" if engine.whole_us is None else _against(latency.microseconds, engine.whole_us)
            print(f"{each.words:<48} {_against(_profiled(latency), engine.profiled_us):>24} {whole:>24}")
        measured = [by_name[each.name].profiled_us for each in known]
        show_order(title, [each.words for each in known], list(map(_profiled, latencies)), measured)
        if build is resnet18 and len(known) == len(placements):
            _show_imported(model, plan, modelled, known, by_name)


def _profiled(latency: Latency) -> float:
    return latency.microseconds + FITTED.profiler_us * sum(part.kernels for part in latency.parts)


def _show_imported(
    model: Model,
    plan: Plan,
    modelled: Modelled,
    placements: Sequence[Placement],
    by_name: dict[str, Profiled],
) -> None:
    """What the profiles of float16 and of one INT8 engine say of all."""
    engines = [_renamed(by_name[each.name].engine, model.graph) for each in placements]
    for position in range(2, len(placements)):
        timed = Timed(modelled, [engines[1], engines[position]], "imported")
        print(f"\nimported: {placements[1].words}; {placements[position].words} (without the profiler, ms)")
        predicted = [timed.latency(each.plan(plan), each.rest).microseconds for each in placements]
        for each, us, engine in zip(placements, predicted, engines, strict=True):
            print(f"{each.words:<48} {_against(us, engine.microseconds):>24}")
        show_order("imported", [e.words for e in placements], predicted, [e.microseconds for e in engines])


def _renamed(engine: TimedEngine, graph: gs.Graph) -> TimedEngine:
    """An engine whose nodes have the graph's names: PyTorch numbered them with its Q/DQ nodes among them."""
    numbers = sorted({n for layer in engine.layers for n in _conv_numbers(layer.nodes)})
    convs = sorted((n.name for n in graph.nodes if n.op == "Conv"), key=lambda name: int(name.split("_")[1]))
    names = {f"Conv_{number}": name for number, name in zip(numbers, convs, strict=True)}

    def rename(node: str) -> str:
        for op in ("MaxPool", "GlobalAveragePool", "Gemm"):
            if node.startswith(op) or (op == "Gemm" and "ElementWise" in node):
                return next(n.name for n in graph.nodes if n.op == op)
        return names.get(node, node)

    layers = [dataclasses.replace(each, nodes=tuple(map(rename, each.nodes))) for each in engine.layers]
    return dataclasses.replace(engine, layers=tuple(layers))


def _conv_numbers(nodes: Iterable[str]) -> Iterable[int]:
    return (int(found[1]) for found in (re.fullmatch(r"Conv_(\d+)", node) for node in nodes) if found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=os.environ.get("TRTQ_PROFILES"))
    parser.add_argument("--gpu", help="of engines whose files do not name it")
    parser.add_argument("--layers", action="store_true", help="every layer of every engine")
    options = parser.parse_args()
    if not options.folder:
        print("skipped: no folder of profiles is given, and TRTQ_PROFILES is not set")
        return
    engines = read_folder(Path(options.folder), options.gpu)
    if not engines:
        print(f"skipped: no *.graph.json in {options.folder}")
        return
    for engine in engines if options.layers else ():
        print(engine.name)
        for name, load, us in engine.layers:
            time = kernel_time(engine.gpu, load)
            print(f"  {us:8.1f} {time.microseconds + FITTED.profiler_us:8.1f}  {time.why:<44} {name[-70:]}")
    show_layers(engines)
    show_left_out(engines)
    show_placements(engines)


if __name__ == "__main__":
    main()
