"""Benchmark engines: latency on a GPU, and the static comparison of what was compiled, which needs none.

The static comparison counts kernels and bytes; it does not give latency, which `timing` measures.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtq.backends.builders import BUILDERS, builder, chosen, describe_engine
from trtq.backends.compiled import Compiled, CompiledLayer
from trtq.backends.dialect import dialect_of
from trtq.backends.engine import why_not_loaded
from trtq.backends.interface import DEFAULT_OPTIONS, Build, BuildOptions, Profile
from trtq.backends.record import read_record
from trtq.backends.timing import Measuring, Timing, measure
from trtq.calibration.extents import measure_extents
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.files import PathLike
from trtq.graph.fold import fold
from trtq.graph.half_rules import half_by_rules
from trtq.graph.model import FP16_SCALE_OPSET, load_model, save_model

BLAMED_KERNELS = 5


@dataclasses.dataclass(frozen=True)
class Static:
    """What an engine runs, from its record.

    Attributes:
        precision: of most multiply-accumulate kernels: "int8", "fp16" or "fp32".
        kernels: launches per inference.
        bytes_moved: estimated bytes read and written per inference (`Compiled.bytes_moved`).
        compute: kernels that multiply and accumulate.
        int8: of those, the ones that do it in INT8.
        idle: names of kernels that only convert datatype or layout and whose result no INT8 kernel reads:
            they bought nothing.
    """

    engine: str
    precision: str
    batch: int
    kernels: int
    bytes_moved: int
    compute: int
    int8: int
    idle: tuple[str, ...]

    @property
    def int8_share(self) -> float:
        """Share of the multiply-accumulate kernels that run in INT8."""
        return self.int8 / self.compute if self.compute else 0.0


@dataclasses.dataclass(frozen=True)
class Result:
    """One engine: the static part where it has a record, the timing where a GPU measured it.

    Attributes:
        problem: why the GPU here did not measure it.
    """

    engine: Path
    static: Static | None
    timing: Timing | None
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**dataclasses.asdict(self), "engine": self.engine.name}


def build_three(
    model: PathLike,
    int8: PathLike,
    folder: PathLike,
    *,
    backend: str | None = None,
    profile: Profile | None = None,
    targets: Sequence[str] = (),
    options: BuildOptions = DEFAULT_OPTIONS,
    samples: Samples | None = None,
) -> dict[str, Build]:
    """FP32, FP16 and INT8 engines of one model: `model.fp32.plan` and so on.

    They are strongly typed from ONNX; of TensorRT 8.6, which is not, the FP16 engine is the fp32 model's with
    the builder's FP16 flag.

    Args:
        model: fp32 ONNX model; folded, and for FP16 converted (`half_by_rules`).
        int8: the same model with Q/DQ, as `trtq quantize` writes it.
        folder: where the engines go, and the ONNX models of the first two.
        samples: rows on which to measure what has to stay float32 in the FP16 engine.

    Raises:
        InputError, MissingBackendError: as the builder.
    """
    folder = Path(folder)
    graph = load_model(model, opset=FP16_SCALE_OPSET).graph
    fold(graph)
    models = {"fp32": folder / "model.fp32.onnx", "fp16": folder / "model.fp16.onnx", "int8": Path(int8)}
    save_model(graph, models["fp32"])
    extents = measure_extents(graph, samples) if samples else {}
    builder(backend).version()  # or the error that says what is missing
    typed = dialect_of(importlib.import_module(BUILDERS[chosen(backend)])).strong_typing
    if typed:
        graph = half_by_rules(graph, extents)
    save_model(graph, models["fp16"])
    how = {
        "fp32": dataclasses.replace(options, lower_precision=None),
        "fp16": dataclasses.replace(options, lower_precision=None if typed else "fp16"),
        "int8": options,
    }
    return {
        name: builder(backend).build(
            path, folder / f"model.{name}.plan", profile=profile, targets=targets, options=how[name]
        )
        for name, path in models.items()
    }


def static_of(engine: PathLike) -> Static | None:
    """What is known of an engine without running it; None where no record of it lies beside it.

    Raises:
        InputError: the file cannot be read, or the record is damaged.
    """
    record = read_record(engine)
    return None if record is None else summarize(Path(engine).name, record["compiled"])


def summarize(name: str, compiled: Compiled) -> Static:
    """The figures of a compiled graph."""
    compute = [layer for layer in compiled.layers if layer.computes]
    int8 = sum(layer.int8 for layer in compute)
    half = sum(_reads(layer, "Half", "BFloat16") and not layer.int8 for layer in compute)
    counts = {"int8": int8, "fp16": half, "fp32": len(compute) - int8 - half}
    return Static(
        engine=name,
        precision=max(counts, key=lambda precision: counts[precision]),
        batch=compiled.batch,
        kernels=compiled.kernels,
        bytes_moved=compiled.bytes_moved(),
        compute=len(compute),
        int8=int8,
        idle=tuple(layer.name for layer in idle_conversions(compiled)),
    )


def idle_conversions(compiled: Compiled) -> list[CompiledLayer]:
    """Kernels that only convert and whose output no INT8 multiply-accumulate kernel reads."""
    wanted = {tensor.name for layer in compiled.layers if layer.int8 for tensor in layer.inputs}
    return [
        layer
        for layer in compiled.layers
        if layer.converts and not any(tensor.name in wanted for tensor in layer.outputs)
    ]


def benchmark(
    engines: Sequence[PathLike],
    *,
    on_gpu: bool,
    how: Measuring | None = None,
    plugins: Sequence[str] = (),
) -> list[Result]:
    """Every engine's static figures where it has a record, and with `on_gpu` its timing.

    An engine that does not load on the GPU here keeps its static figures.

    Args:
        plugins: libraries of TensorRT plugins.

    Raises:
        InputError: not an engine, or one that neither has a record nor can be measured.
        MissingBackendError: as `measure`.
    """
    paths = [Path(engine) for engine in engines]
    problems = {path: why_not_loaded(path, plugins) if on_gpu else "there is no GPU" for path in paths}
    statics = {path: static_of(path) for path in paths}
    for path in paths:
        if problems[path] is not None and statics[path] is None:
            if not on_gpu:
                describe_engine(path)  # if it is none, that is the error
            raise InputError(
                "nothing is known about the engine",
                file=path,
                cause=f"{problems[path]}, and {path.name}.json is missing or another engine's",
                remedy="build it with trtq, or run this on a machine that the engine runs on",
            )
    here = [path for path in paths if problems[path] is None]
    timings = dict(zip(here, measure(here, how, plugins), strict=True))
    return [
        Result(path, statics[path], timings.get(path), problems[path] if on_gpu else None) for path in paths
    ]


def slower_than_float(results: Sequence[Result]) -> str | None:
    """A loud message if an INT8 engine is slower than an FP16 (or else FP32) one; None otherwise.

    Names the kernels of the INT8 engine that cost most and are not INT8 multiply-accumulates: what INT8
    cannot speed up. With timings these are measured; without them they are the ones that move most bytes,
    and the comparison is of bytes. Several engines of one precision, or two without a common input, are not
    of one model: no comparison.
    """
    precisions = Counter(r.static.precision for r in results if r.static is not None)
    if any(count > 1 for count in precisions.values()):
        return None
    by_precision = {r.static.precision: r for r in results if r.static is not None}
    int8, other = by_precision.get("int8"), by_precision.get("fp16") or by_precision.get("fp32")
    if int8 is None or other is None or int8.static is None or other.static is None:
        return None
    if _inputs(int8.engine).isdisjoint(_inputs(other.engine)):
        return None
    if int8.timing is not None and other.timing is not None:
        cost, other_cost, unit = int8.timing.p50_ms, other.timing.p50_ms, "ms"
    else:
        cost, other_cost, unit = int8.static.bytes_moved / 1e6, other.static.bytes_moved / 1e6, "MB moved"
    if cost <= other_cost:
        return None
    what = "IS SLOWER THAN" if unit == "ms" else "MOVES MORE BYTES THAN"
    head = (
        f"THE INT8 ENGINE {what} {other.static.precision.upper()}: {cost:.3f} against {other_cost:.3f} {unit}"
    )
    return "\n".join([head, *(f"  {line}" for line in _blame(int8))])


def text_of(results: Sequence[Result]) -> str:
    """The results as text: a line per engine, conversions that gained nothing, and how it was measured."""
    lines = []
    for result in results:
        name, static, timing = result.engine, result.static, result.timing
        if timing is not None:
            how = "CUDA graph" if timing.cuda_graph else f"no CUDA graph: {timing.note}"
            lines += [
                f"{name}: p50 {timing.p50_ms:.3f} ms, p90 {timing.p90_ms:.3f}, p99 {timing.p99_ms:.3f};"
                f" {timing.rows_per_second:.0f} rows/s at batch {timing.batch}",
                f"  {timing.runs} inferences timed on the GPU, {how}; loaded in {timing.load_ms:.0f} ms,"
                f" first inference {timing.first_ms:.1f} ms, {timing.device_bytes / 1e6:.1f} MB on the GPU",
            ]
        if result.problem is not None:
            lines.append(f"{name}: not timed: {result.problem}")
        if static is not None:
            lines.append(
                f"{name}: {static.precision}, {static.kernels} kernels,"
                f" about {static.bytes_moved / 1e6:.2f} MB moved at batch {static.batch},"
                f" {static.int8} of {static.compute} compute kernels in INT8 ({static.int8_share:.0%})"
            )
            lines += [f"  only converts, and no INT8 kernel reads it: {kernel}" for kernel in static.idle]
    if (warning := slower_than_float(results)) is not None:
        lines += ["", warning]
    lines += ["", *_conditions(results)]
    return "\n".join(lines)


def _blame(result: Result) -> list[str]:
    layers = _layers(result.engine)
    if result.timing is not None and result.timing.kernel_ms:
        int8 = {layer.name for layer in layers if layer.int8}
        costs = {name: ms for name, ms in result.timing.kernel_ms.items() if name not in int8}
        unit = "ms"
    else:
        batch = result.static.batch if result.static else 1
        costs = {
            layer.name: sum(t.size(batch) for t in layer.inputs + layer.outputs) / 1e6
            for layer in layers
            if layer.launches and not layer.int8
        }
        unit = "MB"
    kinds = {layer.name: _role(layer) for layer in layers}
    worst = sorted(costs, key=lambda name: -costs[name])[:BLAMED_KERNELS]
    return [f"{costs[name]:.3f} {unit}  {kinds.get(name, 'not in the record')}: {name}" for name in worst]


def _layers(engine: Path) -> tuple[CompiledLayer, ...]:
    record = read_record(engine)
    return record["compiled"].layers if record is not None else ()


def _inputs(engine: Path) -> set[tuple[str, tuple[int, ...]]]:
    """Names and dimensions of what an engine's layers read and none of them writes."""
    layers = _layers(engine)
    written = {tensor.name for layer in layers for tensor in layer.outputs}
    return {(t.name, t.dims) for layer in layers for t in layer.inputs if t.name not in written}


def _role(layer: CompiledLayer) -> str:
    if layer.converts:
        return "converts only"
    return "computes in floating point" if layer.computes else "pointwise"


def _reads(layer: CompiledLayer, *datatypes: str) -> bool:
    return any(tensor.datatype in datatypes for tensor in layer.inputs)


def _conditions(results: Sequence[Result]) -> list[str]:
    """How it was measured, and what therefore is not in the figures."""
    timings = [result.timing for result in results if result.timing is not None]
    if not timings:
        return [
            "Static comparison: read from what was compiled, nothing was run and nothing timed.",
            "A plan file is code: load only plans you built or whose origin you trust.",
        ]
    lines = [
        "Times are the GPU's, by CUDA events, without copies to and from the host; the engines took turns.",
        "Kernels that read float32 may compute in TF32, as is TensorRT's default.",
    ]
    if (clocks := timings[0].clocks) is not None:
        ranges = (f"{name} {low:.0f}/{mid:.0f}/{high:.0f}" for name, (low, mid, high) in clocks.items())
        lines.append(f"GPU meanwhile (smallest/median/largest): {', '.join(ranges)}")
    return lines
