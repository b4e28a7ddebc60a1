"""The steps of `gpu_check.py`: each a function of the prepared folder that gives JSON, or raises."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import trtq
from trtq.backends import bench, cuda, tensorrt, tensorrt_rtx
from trtq.backends.builders import BUILDERS, builder
from trtq.backends.calibrators import CudaDevice, data_calibrator, table_calibrator
from trtq.backends.clocks import Clocks
from trtq.backends.engine import run_engine
from trtq.backends.interface import BuildOptions, Profile, Range, find_gpu
from trtq.backends.network import logger
from trtq.backends.runner import open_engine
from trtq.backends.timing import Measuring, measure
from trtq.calibration.table import Table
from trtq.console import SILENT
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.errors import TrtqError
from trtq.gate.decision import decide
from trtq.gate.metrics import load_metric
from trtq.gate.tensors import compare_three, some_rows
from trtq.graph.fold import fold
from trtq.graph.model import load_model
from trtq.graph.quantization import Quantization
from trtq.recovery.learning import learn
from trtq.simulation.outputs import run_model
from trtq.simulation.similarity import compare

PRECISIONS = ("fp32", "fp16", "int8", "int8-fp16")
PACKAGES = (
    *("numpy", "onnx", "onnxruntime", "polygraphy", "torch", "pycuda", "cuda-bindings", "cuda-core"),
    *("tensorrt", "tensorrt-rtx"),
)
STEPS_LEARNED = 60
QUICK = Measuring(warm_up_ms=100, duration_s=0.5)

Json = dict[str, Any]


class Skipped(Exception):
    """Why a step makes no sense here."""


def steps(folder: Path) -> dict[str, Callable[[], Any]]:
    """The steps by name, the most valuable first."""
    models = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    whole = [model for model in models if (model / "about.json").exists()]
    found: dict[str, Callable[[], Any]] = {"environment": environment}
    for made in cuda.IMPLEMENTATIONS:
        found[f"memory by {made.name}"] = functools.partial(memory, made)
    found |= {f"loading {model.name}": functools.partial(loading, model) for model in whole}
    installed = [backend for backend in BUILDERS if importlib.util.find_spec(BUILDERS[backend])]
    found |= {f"engines of {b}": functools.partial(_package, b) for b in BUILDERS if b not in installed}
    for step, backend, model in itertools.product(ENGINE_STEPS, installed, whole):
        found[f"{step} {model.name} {backend}"] = functools.partial(ENGINE_STEPS[step], model, backend)
    found |= {f"integer products {m.name}": functools.partial(check_integer_products, m) for m in models}
    found |= {f"simulation {model.name}": functools.partial(simulation, model) for model in whole}
    for model, device in itertools.product(whole, ("cuda", "cpu")):
        found[f"learn {model.name} on {device}"] = functools.partial(learning, model, device)
    found["clocks"] = clocks
    for step, model in itertools.product(TENSORRT_STEPS if tensorrt.NAME in installed else (), whole):
        found[f"{step} {model.name} tensorrt"] = functools.partial(TENSORRT_STEPS[step], model, tensorrt.NAME)
    return found


# --- the machine ------------------------------------------------------------------------------------------


def environment() -> Json:
    """Machine, card, driver and versions."""
    gpu = find_gpu()
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        card = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        card = str(error)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "gpu": gpu and dataclasses.asdict(gpu),
        "nvidia_smi": card,
        "versions": {"trtq": trtq.__version__, **{name: version(name) for name in PACKAGES}},
    }


def version(package: str) -> str | None:
    """The installed version of a package, None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory(made: type[cuda.PyCuda] | type[cuda.CudaBindings]) -> Json:
    """One implementation of `Cuda`: the primary context twice, beside PyTorch; memory, events and a graph."""
    _gpu()
    try:
        first, device = made(), made()
    except ImportError as error:
        raise Skipped(str(error)) from error
    cuda.IMPLEMENTATIONS = (made,)
    before = device.free_memory()
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    stream, found = device.new_stream(), np.zeros_like(data)
    address = first.allocate(data.nbytes)
    start, end = device.new_event(), device.new_event()
    device.record(start, stream)
    device.to_device(address, data, stream)
    device.to_host(found, address, stream)
    device.record(end, stream)
    device.synchronize(stream)
    result: Json = {
        "free_bytes": before,
        "copied_back_equal": bool(np.array_equal(found, data)),
        "copies_ms": device.elapsed_ms(start, end),
        "page_locked_equal": _through_page_locked(device, address, data, stream),
        "graph_equal": _through_graph(device, address, data, stream),
        "calibrator_buffers_equal": _through_calibrator_buffers(data),
        "beside_torch": _beside_torch(device, data, stream),
    }
    first.free(address)
    try:
        device.allocate(1 << 50)
        result["too_much"] = "allocated"
    except cuda.CudaError as error:
        result["too_much"] = str(error)
    return result


def _through_page_locked(device: cuda.Cuda, address: int, data: np.ndarray, stream: Any) -> bool:
    staging, back = device.page_locked(data.nbytes), device.page_locked(data.nbytes)
    staging[:] = data[::-1]
    device.to_device(address, staging, stream)
    device.to_host(back, address, stream)
    device.synchronize(stream)
    return bool(np.array_equal(back, data[::-1]))


def _through_graph(device: cuda.Cuda, address: int, data: np.ndarray, stream: Any) -> bool:
    """A captured copy from page-locked memory copies what is there when it is launched."""
    staging, back = device.page_locked(data.nbytes), np.zeros_like(data)
    graph = cuda.Graph(device.handle(stream), lambda: device.to_device(address, staging, stream))
    staging[:] = data
    graph.launch()
    device.to_host(back, address, stream)
    device.synchronize(stream)
    graph.close()
    return bool(np.array_equal(back, data))


def _through_calibrator_buffers(data: np.ndarray) -> bool:
    """What the calibrators hand to TensorRT: a batch copied into a device buffer."""
    device, opened = CudaDevice(), cuda.open_cuda()
    batch = data.view(np.float32)[: 1 << 17].reshape(8, -1)
    back, address = np.zeros_like(batch), device.allocate(batch.nbytes)
    device.copy_from_host(address, batch)
    device.synchronize()
    stream = opened.new_stream()
    opened.to_host(back, address, stream)
    opened.synchronize(stream)
    device.free(address)
    return back.tobytes() == batch.tobytes()


def _beside_torch(device: cuda.Cuda, data: np.ndarray, stream: Any) -> Any:
    """PyTorch's memory is ours: one context."""
    torch = importlib.import_module("torch") if version("torch") else None
    if torch is None or not torch.cuda.is_available():
        return "no PyTorch with a GPU"
    tensor = torch.zeros(len(data), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    device.to_device(tensor.data_ptr(), data, stream)
    device.synchronize(stream)
    equal = bool(np.array_equal(tensor.cpu().numpy(), data))
    total = (torch.ones(1000, device="cuda") * 2).sum().item()
    return {"equal": equal, "torch_computes": total == 2000, "torch": torch.__version__}


def clocks() -> Json:
    """What NVML tells of the card while it multiplies."""
    torch = _torch()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    with Clocks() as sampled:
        until = time.perf_counter() + 1
        while time.perf_counter() < until:
            for _ in range(10):
                a @ a
            torch.cuda.synchronize()
    return {"ranges": sampled.ranges()}


# --- engines ----------------------------------------------------------------------------------------------


def loading(folder: Path) -> Json:
    """For every prepared plan: RTX's verdict on its header, and whether it loads or the exact message."""
    trt = _package("tensorrt-rtx")
    runtime, found = trt.Runtime(logger(trt)), {}
    for plan in sorted(folder.glob("*.plan")):
        validity, bits = runtime.get_engine_validity(plan.read_bytes()[: runtime.engine_header_size])
        found[plan.name] = {"validity": validity.name, "diagnostics": int(bits), "loads": _load(plan)}
    return found


def build(folder: Path, backend: str) -> Json:
    """Engines of every precision built here, for this card."""
    _package(backend)
    (folder / backend).mkdir(exist_ok=True)
    return {precision: tried(_build, folder, backend, precision) for precision in PRECISIONS}


def _build(folder: Path, backend: str, precision: str) -> Json:
    plan = folder / backend / f"{precision}.plan"
    targets = (tensorrt_rtx.CURRENT,) if backend == tensorrt_rtx.NAME else ()
    started = time.perf_counter()
    built = builder(backend).build(
        folder / f"{precision}.onnx", plan, profile=profile_of(folder), targets=targets
    )
    seconds = time.perf_counter() - started
    compiled = bench.summarize(plan.name, built.compiled)
    kernels = {"int8_kernels": compiled.int8, "of": compiled.compute}
    return {**kernels, "seconds": round(seconds, 2), "loads": _load(plan), "warnings": built.warnings}


def gate(folder: Path, backend: str) -> Json:
    """The verdicts on fp32 against the engines, and against the simulation."""
    rows = _rows(folder)
    reference = run_model(folder / "fp32.onnx", rows).arrays
    metric = load_metric(_about(folder)["metric"])

    def decided(outputs_of: Callable[..., Any], candidate: Path) -> Json:
        outputs = outputs_of(candidate, rows)
        verdict = decide(
            *(reference, outputs.arrays, dict(rows.targets), metric),
            max_drop=0.01,
            confidence=None,
            executor=outputs.executor,
        )
        return {"headline": verdict.headline(), "executor": outputs.executor}

    found = {name: tried(decided, run_engine, plan) for name, plan in _plans(folder, backend)}
    return {**found, "simulation": tried(decided, run_model, folder / "int8.onnx")}


def latency(folder: Path, backend: str) -> Json:
    """The engines' times, and what `trtq bench` says of them."""
    plans = [plan for _, plan in _plans(folder, backend)]
    results = bench.benchmark(plans, on_gpu=True, how=Measuring(duration_s=2))
    return {"engines": [result.to_json() for result in results], "text": bench.text_of(results)}


def against_simulation(folder: Path, backend: str) -> Json:
    """How far each engine's outputs are from those of its ONNX model on the CPU."""
    rows = _rows(folder)

    def compared(precision: str, plan: Path) -> Json:
        engine = run_engine(plan, rows).arrays
        simulation = run_model(folder / f"{precision}.onnx", rows).arrays
        return {
            name: {
                "sqnr_db": similarity.sqnr_db,
                "max_abs_error": similarity.max_abs_error,
                "argmax_differs": float((simulation[name].argmax(-1) != engine[name].argmax(-1)).mean()),
            }
            for name, similarity in compare(simulation, engine).items()
        }

    return {name: tried(compared, name, plan) for name, plan in _plans(folder, backend)}


def three_way(folder: Path, backend: str) -> Json:
    """fp32, simulation and engine, tensor by tensor."""
    _package(backend)
    report = compare_three(
        folder / "fp32.onnx", folder / "int8.onnx", some_rows(_rows(folder)), backend=backend
    )
    return {"text": report.text()}


def processes(folder: Path, backend: str) -> Json:
    """Time to load and to the first result, twice: the second time RTX finds its compiled kernels."""

    def twice(plan: Path) -> list[Json]:
        Path(f"{plan}.kernels").unlink(missing_ok=True)
        timings = [measure([plan], QUICK)[0] for _ in range(2)]
        return [{"load_ms": t.load_ms, "first_ms": t.first_ms} for t in timings]

    return {name: tried(twice, plan) for name, plan in _plans(folder, backend)}


def implicit_from_table(folder: Path, backend: str) -> Json:
    """An implicitly quantized engine (TensorRT 10 and before) from our table."""
    table = Table.load(folder / "table.cache")
    return _implicit(folder, functools.partial(table_calibrator, table=table))


def implicit_from_calibrator(folder: Path, backend: str) -> Json:
    """The same, with TensorRT's own calibration on our samples."""
    samples = _rows(folder, "calib")
    calibrator = functools.partial(
        data_calibrator, algorithm="EntropyCalibration2", samples=samples, model="0" * 64, batch_size=8
    )
    return _implicit(folder, calibrator)


def _implicit(folder: Path, calibrator: Callable[[Any], Any]) -> Json:
    _package("tensorrt")
    kept = _about(folder)["floating_point"]
    built = tensorrt.build(
        folder / "fp32.onnx",
        folder / "implicit.plan",
        profile=profile_of(folder),
        implicit=tensorrt.Implicit(calibrator, kept),
    )
    (result,) = bench.benchmark([built.engine], on_gpu=True, how=QUICK)
    return {**result.to_json(), "warnings": built.warnings}


def refit(folder: Path, backend: str) -> Json:
    """An engine without weights takes them from its model, and gives the outputs of one that has them."""
    _package(backend)
    rows, outputs = _rows(folder), []
    for options in (BuildOptions(), BuildOptions(strip_weights=True)):
        plan = folder / "refit.plan"
        builder(backend).build(folder / "int8.onnx", plan, profile=profile_of(folder), options=options)
        outputs.append(run_engine(plan, rows).arrays)
    return {name: bool(np.array_equal(outputs[0][name], outputs[1][name])) for name in outputs[0]}


def _plans(folder: Path, backend: str) -> list[tuple[str, Path]]:
    """Of each precision a plan that loads here: built here, or prepared."""
    _package(backend)
    found = []
    for precision in PRECISIONS:
        plans = [folder / backend / f"{precision}.plan", folder / f"{precision}.default.plan"]
        if backend != tensorrt_rtx.NAME:
            plans = plans[:1]
        if loads := [plan for plan in plans if plan.exists() and _load(plan) is True]:
            found.append((precision, loads[0]))
    if not found:
        raise Skipped("no engine loads here")
    return found


def _load(plan: Path) -> bool | str:
    """True, or why it does not load."""

    def opened() -> bool:
        with open_engine(plan):
            return True

    found = tried(opened)
    return True if found is True else str(found["error"])


# --- arithmetic -------------------------------------------------------------------------------------------


def check_integer_products(folder: Path) -> Json:
    """Whether INT8 tensor cores (torch._int_mm) give the simulation's sums, bit for bit."""
    torch, found = _torch(), {}
    with np.load(folder / "products.npz") as stored:
        for i in range(sum(name.startswith("a") for name in stored.files)):
            a, b, c = (stored[f"{part}{i}"] for part in "abc")
            rows, columns = max(32, -(-len(a) // 8) * 8), -(-b.shape[1] // 8) * 8
            inner = -(-len(b) // 8) * 8
            padded_a, padded_b = np.zeros((rows, inner), np.int8), np.zeros((inner, columns), np.int8)
            padded_a[: len(a), : len(b)], padded_b[: len(b), : b.shape[1]] = a, b
            on_gpu = torch._int_mm(torch.from_numpy(padded_a).cuda(), torch.from_numpy(padded_b).cuda())
            sums = on_gpu.cpu().numpy()[: len(a), : b.shape[1]]
            found[str(stored[f"name{i}"])] = {
                "shape": [*a.shape, b.shape[1]],
                "equal": bool(np.array_equal(sums, c)),
                "largest": int(np.abs(c).max()),
                "rounded_off": float(stored[f"off{i}"]),
            }
    return {"all_equal": all(each["equal"] for each in found.values()), "products": found}


def simulation(folder: Path) -> Json:
    """Whether the simulation here gives what it gave where the folder was prepared."""
    found = {}
    for name in ("fp32", "int8"):
        outputs = run_model(folder / f"{name}.onnx", _rows(folder)).arrays
        with np.load(folder / f"{name}.outputs.npz") as before:
            found[name] = {
                n: {
                    "equal": bool(np.array_equal(a, before[n])),
                    "largest": float(np.abs(a - before[n]).max()),
                }
                for n, a in outputs.items()
            }
    return found


def learning(folder: Path, device: str) -> Json:
    """A short `learn` on the GPU or the CPU: seconds, and decibels gained, which should be about the same."""
    torch = _torch()
    learn.FEWEST_STEPS = learn.MOST_STEPS = STEPS_LEARNED
    teacher = load_model(folder / "fp32.onnx").graph
    fold(teacher)
    samples = _rows(folder, "calib")
    count = len(samples) // samples.group
    fitting, held_back = samples.subset(range(count * 3 // 4)), samples.subset(range(count * 3 // 4, count))
    quantization = Quantization.from_bytes((folder / "quantization.npz").read_bytes())
    started = time.perf_counter()
    with _only_cpu(torch) if device == "cpu" else contextlib.nullcontext():
        learned = learn.learn(quantization, teacher, fitting, held_back, SILENT)
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "steps": learned.steps,
        "before_db": learned.before_db,
        "after_db": learned.after_db,
    }


@contextlib.contextmanager
def _only_cpu(torch: Any) -> Iterator[None]:
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = available


# --- what steps share -------------------------------------------------------------------------------------


def tried(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a part of a step gives, or its error: the other parts go on."""
    try:
        return function(*arguments)
    except TrtqError as error:
        return {"error": f"exit code {int(error.exit_code)}: {error}"}
    except Exception:  # what a GPU machine throws is what this script is for
        return {"error": traceback.format_exc()[-1500:]}


def _torch() -> Any:
    """PyTorch with a GPU."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise Skipped(str(error)) from error
    if not torch.cuda.is_available():
        raise Skipped("PyTorch finds no GPU")
    return torch


def _package(backend: str) -> Any:
    """The module of a backend, where it and a GPU are."""
    _gpu()
    try:
        return importlib.import_module(BUILDERS[backend])
    except ImportError as error:
        raise Skipped(str(error)) from error


def _gpu() -> None:
    if find_gpu() is None:
        raise Skipped("there is no GPU")


def _about(folder: Path) -> Json:
    found: Json = json.loads((folder / "about.json").read_text())
    return found


def profile_of(folder: Path) -> Profile:
    """The optimization profile that its engines have."""
    return {
        name: Range(*(tuple(shape) for shape in shapes)) for name, shapes in _about(folder)["profile"].items()
    }


def _rows(folder: Path, name: str = "eval") -> Samples:
    return load_samples(str(folder / f"{name}.npz"), load_model(folder / "fp32.onnx").inputs)


ENGINE_STEPS = {
    "build": build,
    "gate": gate,
    "latency": latency,
    "against simulation": against_simulation,
    "three-way": three_way,
    "processes": processes,
}
"""What is done with each model and backend."""

TENSORRT_STEPS = {
    "implicit from table": implicit_from_table,
    "implicit from calibrator": implicit_from_calibrator,
    "refit": refit,
}
