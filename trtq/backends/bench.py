"""Benchmark engines: latency on a GPU, and the static comparison of what was compiled, which needs none.

The static comparison counts kernels and bytes; it does not give latency. Engines are measured one after the
other at the optimum of their profile, after a warm-up, as CUDA graphs where the engine can be captured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trtq.backends.builders import builder, describe_engine
from trtq.backends.compiled import Compiled, CompiledLayer
from trtq.backends.interface import DEFAULT_OPTIONS, Build, BuildOptions, Profile
from trtq.calibration.extents import measure_extents
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.files import PathLike
from trtq.graph.fold import fold
from trtq.graph.half_rules import half_by_rules
from trtq.graph.model import FP16_SCALE_OPSET, load_model, save_model

WARM_UP_RUNS = 50
RUNS = 500
PROFILED_RUNS = 20
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
class Timing:
    """What a GPU measured.

    Attributes:
        p50_ms, p90_ms, p99_ms: percentiles of the latency of one inference, by CUDA events.
        rows_per_second: throughput of inferences issued back to back.
        cuda_graph: whether the inference was launched as a CUDA graph; if not, why is in `note`.
        device_bytes: device memory that loading the engine took.
        kernel_ms: TensorRT's profiler: layer -> average milliseconds; empty where it reports none.
        clocks: nvidia-smi before and after, MHz, °C and W; None without nvidia-smi.
    """

    batch: int
    runs: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    rows_per_second: float
    cuda_graph: bool
    note: str
    device_bytes: int
    kernel_ms: Mapping[str, float]
    clocks: Mapping[str, Mapping[str, str] | None]


@dataclasses.dataclass(frozen=True)
class Result:
    """One engine: the static part where it has a record, the timing where a GPU measured it."""

    engine: Path
    static: Static | None
    timing: Timing | None

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
    """FP32, FP16 and INT8 engines of one model, all strongly typed from ONNX: `model.fp32.plan` and so on.

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
    save_model(half_by_rules(graph, extents), models["fp16"])
    build = builder(backend).build
    return {
        name: build(path, folder / f"model.{name}.plan", profile=profile, targets=targets, options=options)
        for name, path in models.items()
    }


def static_of(engine: PathLike) -> Static | None:
    """What is known of an engine without running it; None where no record lies beside it.

    Raises:
        InputError: not an engine.
    """
    build = describe_engine(engine)["build"]
    return None if build is None else summarize(Path(engine).name, build["compiled"])


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


def measure(engine: PathLike, runs: int = RUNS, warm_up: int = WARM_UP_RUNS) -> Timing:
    """Time an engine on the first GPU. Loads the plan: only plans you built or trust.

    Raises:
        MissingBackendError: no GPU, PyCUDA or TensorRT for it here.
        InputError: the engine does not load or run.
    """
    from trtq.backends.device import clocks, open_engine

    with open_engine(Path(engine)) as loaded:
        for _ in range(warm_up):
            loaded.enqueue()
        loaded.synchronize()
        note = ""
        try:
            launch = loaded.captured()
            launch()
        except RuntimeError as error:
            launch, note = loaded.enqueue, str(error)
        loaded.synchronize()
        before = clocks()
        latencies = loaded.latencies(launch, runs)
        total_ms = loaded.back_to_back(launch, runs)
        after = clocks()
        p50, p90, p99 = (float(p) for p in np.percentile(latencies, (50, 90, 99)))
        return Timing(
            batch=loaded.batch,
            runs=runs,
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            rows_per_second=1000 * runs * loaded.batch / total_ms,
            cuda_graph=not note,
            note=note,
            device_bytes=loaded.bytes,
            kernel_ms=loaded.kernel_times(PROFILED_RUNS),
            clocks={"before": before, "after": after},
        )


def benchmark(engines: Sequence[PathLike], *, on_gpu: bool, runs: int = RUNS) -> list[Result]:
    """Every engine's static figures and, with `on_gpu`, its timing.

    Raises:
        InputError: not an engine, an engine that neither has a record nor can be measured, or no runs.
        MissingBackendError: as `measure`.
    """
    if runs < 1:
        raise InputError(f"{runs} runs measure nothing", remedy="give --runs a number from 1")
    results = []
    for engine in engines:
        static = static_of(engine)
        if static is None and not on_gpu:
            raise InputError(
                "nothing is known about the engine",
                file=engine,
                cause=f"there is no GPU, and {Path(engine).name}.json is missing or another engine's",
                remedy="build it with trtq, or run this on the machine with the GPU",
            )
        results.append(Result(Path(engine), static, measure(engine, runs) if on_gpu else None))
    return results


def slower_than_float(results: Sequence[Result]) -> str | None:
    """A loud message if an INT8 engine is slower than an FP16 (or else FP32) one; None otherwise.

    Names the kernels of the INT8 engine that cost most and are not INT8 multiply-accumulates: what INT8
    cannot speed up. With timings these are measured; without them they are the ones that move most bytes,
    and the comparison is of bytes.
    """
    by_precision = {r.static.precision: r for r in results if r.static is not None}
    int8, other = by_precision.get("int8"), by_precision.get("fp16") or by_precision.get("fp32")
    if int8 is None or other is None or int8.static is None or other.static is None:
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
        name, static, timing = result.engine.name, result.static, result.timing
        if timing is not None:
            how = "CUDA graph" if timing.cuda_graph else f"no CUDA graph: {timing.note}"
            lines.append(
                f"{name}: p50 {timing.p50_ms:.3f} ms, p90 {timing.p90_ms:.3f}, p99 {timing.p99_ms:.3f};"
                f" {timing.rows_per_second:.0f} rows/s at batch {timing.batch};"
                f" {timing.device_bytes / 1e6:.1f} MB on the GPU; {timing.runs} runs, {how}"
            )
            lines += [f"  clocks {when}: {_clocks_text(now)}" for when, now in timing.clocks.items()]
        if static is not None:
            lines.append(
                f"{name}: {static.precision}, {static.kernels} kernels,"
                f" about {static.bytes_moved / 1e6:.2f} MB moved at batch {static.batch},"
                f" {static.int8} of {static.compute} compute kernels in INT8 ({static.int8_share:.0%})"
            )
            lines += [f"  only converts, and no INT8 kernel reads it: {kernel}" for kernel in static.idle]
    if (warning := slower_than_float(results)) is not None:
        lines += ["", warning]
    if all(result.timing is None for result in results):
        lines += ["", "Static comparison: read from what was compiled, nothing was run and nothing timed."]
        lines.append("A plan file is code: load only plans you built or whose origin you trust.")
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
    build = describe_engine(engine)["build"]
    return build["compiled"].layers if build is not None else ()


def _role(layer: CompiledLayer) -> str:
    if layer.converts:
        return "converts only"
    return "computes in floating point" if layer.computes else "pointwise"


def _reads(layer: CompiledLayer, *datatypes: str) -> bool:
    return any(tensor.datatype in datatypes for tensor in layer.inputs)


def _clocks_text(now: Mapping[str, str] | None) -> str:
    return "not known" if now is None else ", ".join(f"{name} {value}" for name, value in now.items())
