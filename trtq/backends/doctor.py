"""What is installed, what therefore works here, and what to install for the rest."""

from __future__ import annotations

import contextlib
import importlib.util
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version

from trtq.backends.interface import Gpu, find_gpu
from trtq.backends.tensorrt_rtx import runs_on, supported_targets

REQUIRED = ("numpy", "onnx", "onnx_graphsurgeon", "onnxruntime", "polygraphy", "numba")
"""Modules that trtq depends on."""

OPTIONAL = ("tensorrt_rtx", "tensorrt", "pycuda", "cuda.bindings", "torch")
"""Modules that make more of trtq work."""

_WITHOUT_CALIBRATORS = 11
"""First major version of TensorRT that has no IInt8Calibrator."""


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        section: the heading it stands under.
        name: what was looked for.
        ok: whether it is installed, or works.
        detail: version or device, or why it is not ok.
        remedy: what to do about it, or empty.
    """

    section: str
    name: str
    ok: bool
    detail: str
    remedy: str = ""


def diagnose() -> list[Finding]:
    """Look at the machine and the packages, and say what works with them. Never raises, runs no kernel."""
    versions = {module: installed_version(module) for module in REQUIRED + OPTIONAL}
    gpu = find_gpu()
    device = f"{gpu.name}, compute capability {gpu.compute_capability}" if gpu else "no NVIDIA GPU or driver"
    return [
        Finding("Machine", "python", True, f"{platform.python_version()}, {platform.platform()}"),
        Finding("Machine", "gpu", gpu is not None, device),
        *(_package(module, installed) for module, installed in versions.items()),
        *_abilities(versions, gpu),
    ]


def as_text(findings: Sequence[Finding]) -> str:
    """The findings as plain text, aligned, under their headings."""
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section] if lines else [section]
        lines.append(f"  {'ok' if finding.ok else '--'}  {finding.name:<{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"      {'':<{width}}  remedy: {finding.remedy}")
    return "\n".join(lines)


def installed_version(module: str) -> str | None:
    """The version of the package that a module comes from; None if there is no such module.

    A package may be called otherwise (`onnxruntime-gpu`), or have no metadata, as some in containers.
    """
    with contextlib.suppress(PackageNotFoundError):
        return version(module.replace(".", "-"))
    with contextlib.suppress(ImportError):  # of the package that it is in
        if importlib.util.find_spec(module) is not None:
            return _version_by_files(module)
    return None


def _version_by_files(module: str) -> str:
    """The version of the package whose files a module is among; every package's are read, which takes a
    second."""
    for package in packages_distributions().get(module, ()):
        with contextlib.suppress(PackageNotFoundError):
            return version(package)
    return "version unknown"


def _package(module: str, installed: str | None) -> Finding:
    if installed is None:
        remedy = "pip install --upgrade trtq" if module in REQUIRED else ""
        return Finding("Packages", module, False, "not installed", remedy)
    return Finding("Packages", module, True, installed)


def _abilities(versions: dict[str, str | None], gpu: Gpu | None) -> list[Finding]:
    targets, rtx_problem = _rtx_builder(versions["tensorrt_rtx"])
    providers, ort_problem = _execution_providers()
    tensorrt = versions["tensorrt"]
    need_gpu = "use a machine with an NVIDIA GPU and driver"
    builders = [f"tensorrt_rtx, for {', '.join(targets)}"] if targets else []
    builders += [f"tensorrt {tensorrt}"] if tensorrt and gpu else []
    memory = next((module for module in ("pycuda", "cuda.bindings") if versions[module] is not None), None)
    runners = ["tensorrt_rtx"] if gpu and memory and targets and runs_on(gpu.compute_capability) else []
    runners += ["tensorrt"] if gpu and memory and tensorrt else []

    if gpu is None:
        no_runner, runner_remedy = "no NVIDIA GPU or driver", need_gpu
    elif memory is None:
        no_runner, runner_remedy = "neither pycuda nor cuda.bindings is installed", "pip install 'trtq[cuda]'"
    else:
        no_runner = f"nothing installed runs on compute capability {gpu.compute_capability}"
        runner_remedy = "pip install 'trtq[tensorrt]' (or 'trtq[rtx]' on a GPU it supports)"

    missing = []
    if tensorrt is None or int(tensorrt.split(".")[0]) >= _WITHOUT_CALIBRATORS:
        missing.append("pip install 'tensorrt>=8.5,<11'")
    if memory is None:
        missing.append("pip install 'trtq[cuda]'")
    if gpu is None:
        missing.append(need_gpu)

    gate = "measured on the engine" if runners else "measured on the ONNX Runtime simulation"
    return [
        _ability("build engines", builders, rtx_problem, "pip install 'trtq[rtx]'"),
        _ability("run engines", runners, no_runner, runner_remedy),
        _ability(
            "INT8 calibrators",
            [] if missing else [f"tensorrt {tensorrt}, {memory} {versions[memory or '']}"],
            "needs tensorrt 8.5 to 10, pycuda or cuda.bindings, and a GPU",
            "; ".join(missing),
        ),
        _ability("simulate INT8", providers, ort_problem, "pip install onnxruntime"),
        _ability("gate", [gate] if runners or providers else [], ort_problem, "pip install onnxruntime"),
    ]


def _ability(name: str, means: Sequence[str], problem: str, remedy: str) -> Finding:
    section = "What works here"
    if means:
        return Finding(section, name, True, "; ".join(means))
    return Finding(section, name, False, problem, remedy)


def _rtx_builder(installed: str | None) -> tuple[tuple[str, ...], str]:
    """The targets of a builder that was created for the purpose; or none, and why."""
    if installed is None:
        return (), "tensorrt_rtx is not installed"
    try:
        import tensorrt_rtx as trt

        trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
        return supported_targets(), ""
    except Exception as error:  # a broken installation fails in many ways: libraries, bindings, versions
        return (), f"tensorrt_rtx {installed} is installed and does not work: {error}"


def _execution_providers() -> tuple[list[str], str]:
    """ONNX Runtime's execution providers; or none, and why."""
    try:
        import onnxruntime

        return onnxruntime.get_available_providers(), ""
    except Exception as error:  # as above
        return [], f"onnxruntime does not import: {error}"
