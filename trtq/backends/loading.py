"""A plan file brought onto the GPU, or why it does not come: one message, whoever refuses it.

Plan files are code: what is loaded here runs on the GPU and, in version-compatible plans, on the CPU. Load
only plans you built or whose origin you trust.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtq.backends.network import collection_paused, load_plugins
from trtq.backends.record import read_record
from trtq.errors import InputError, MissingBackendError, TrtqError
from trtq.files import sha256_file, write_bytes

_INVALID = {
    "MALFORMED_ENGINE": "the file is damaged",
    "UNSUPPORTED_CC": "it has no kernels for this GPU's compute capability",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old",
    "VERSION_MISMATCH": "it was built by another version of TensorRT for RTX",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory",
    "CUDA_ERROR": "CUDA's driver or runtime does not work",
}
"""RTX's reasons against an engine (`EngineInvalidityDiagnostics`) -> what they mean."""


@collection_paused()
def load(trt: Any, log: Any, path: Path, plugins: Sequence[str] = ()) -> tuple[Any, Any]:
    """The runtime and the engine of a plan file, ready for contexts. The runtime must outlive the engine.

    Args:
        log: of `trtq.backends.network.logger`; what TensorRT says is quoted from it.
        plugins: libraries of TensorRT plugins.

    Raises:
        MissingBackendError: TensorRT for RTX does not run it on this GPU, or with this driver.
        InputError: it does not load, or lacks its weights and the model is not beside it.
    """
    load_plugins(trt, log, plugins)
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = True  # or version-compatible plans do not load
    content = path.read_bytes()
    if hasattr(runtime, "get_engine_validity"):
        _check_validity(trt, runtime, log, content, path)
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise InputError(
            "the engine does not load on this machine",
            file=path,
            cause=_said(log) or f"{trt.__name__} {trt.__version__} gives no reason",
            remedy=f"build it here, with {trt.__name__} {trt.__version__} and for this GPU",
        )
    if _stripped(trt, engine, path):
        _refit(trt, engine, log, path)
    return runtime, engine


class KernelCache:
    """What TensorRT for RTX compiles for this GPU, kept beside the plan so that the next process need not.

    Other versions of TensorRT compile when they build: for them nothing is kept.
    """

    def __init__(self, plan: Path) -> None:
        self.path = Path(f"{plan}.kernels")
        self._cache: Any = None
        self._known = b""

    def context(self, trt: Any, engine: Any) -> Any:
        """A context for the engine; RTX compiles kernels for its shapes before they run, not meanwhile."""
        if trt.__name__ != "tensorrt_rtx":
            return engine.create_execution_context()
        runtime_config = engine.create_runtime_config()
        strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        runtime_config.dynamic_shapes_kernel_specialization_strategy = strategy
        self._cache = runtime_config.create_runtime_cache()
        with contextlib.suppress(OSError):
            self._known = self.path.read_bytes()
            self._cache.deserialize(self._known)  # False, and nothing taken, if another machine wrote it
        runtime_config.set_runtime_cache(self._cache)
        return engine.create_execution_context(runtime_config)

    def save(self) -> None:
        """Write what is new; nothing where the folder cannot be written to."""
        if self._cache is None:
            return
        content = bytes(memoryview(self._cache.serialize()))
        if content != self._known:
            with contextlib.suppress(TrtqError, OSError):
                write_bytes(self.path, content)


def _check_validity(trt: Any, runtime: Any, log: Any, content: bytes, path: Path) -> None:
    """Let RTX look at the plan's header: it says why an engine does not run here, which loading does not."""
    header = content[: runtime.engine_header_size]
    validity, diagnostics = runtime.get_engine_validity(header)
    if validity != trt.EngineValidity.INVALID:
        return
    members = trt.EngineInvalidityDiagnostics.__members__
    reasons = [name for name in members if int(members[name].value) & int(diagnostics)]
    said = [f"{name}: {_INVALID.get(name, 'see the documentation')}" for name in reasons]
    kind = InputError if "MALFORMED_ENGINE" in reasons else MissingBackendError
    raise kind(
        f"TensorRT for RTX {trt.__version__} does not run the engine on this machine",
        file=path,
        cause="\n".join([*said, *log.errors]) or "it gives no reason",
        remedy=_remedy(reasons),
    )


def _remedy(reasons: list[str]) -> str:
    if "MALFORMED_ENGINE" in reasons:
        return "copy or build it again"
    if "UNSUPPORTED_CC" in reasons:
        return "build it for this GPU (--target), or with --backend tensorrt where RTX does not know the GPU"
    if "VERSION_MISMATCH" in reasons:
        return "build it again with the installed version, or install the version that built it"
    return "update the NVIDIA driver, or use a machine that fits; `trtq doctor` shows what is here"


def _said(log: Any) -> str:
    """What TensorRT logged as errors, each once."""
    return "\n".join(dict.fromkeys(log.errors))


def _stripped(trt: Any, engine: Any, path: Path) -> bool:
    """Whether the plan was built without its weights."""
    record = read_record(path, sha256_file(path))
    if record is not None:
        return "strip_weights" in record.get("options", {})
    if not hasattr(trt, "EngineStat"):
        return False
    return int(engine.get_engine_stat(trt.EngineStat.STRIPPED_WEIGHTS_SIZE)) > 0


def _refit(trt: Any, engine: Any, log: Any, path: Path) -> None:
    """Give an engine that was built without weights those of its model.

    Raises:
        InputError: the model does not lie beside the plan, or does not fit.
    """
    record = read_record(path, sha256_file(path))
    model = None if record is None else path.parent / record["model"]
    if record is None or model is None or not model.is_file() or sha256_file(model) != record["model_sha256"]:
        raise InputError(
            "the engine was built without its weights, and its model does not lie beside it",
            file=path,
            cause=None if record is None else f"that is {record['model']}, SHA-256 {record['model_sha256']}",
            remedy="put the ONNX model that it was built from, and the engine's .json, beside it",
        )
    refitter = trt.Refitter(engine, log)
    weights = trt.OnnxParserRefitter(refitter, log)
    if not weights.refit_from_file(str(model)) or not refitter.refit_cuda_engine():
        told = [weights.get_error(i).desc() for i in range(weights.num_errors)]
        raise InputError(
            "the engine does not take the weights of its model",
            file=path,
            cause="\n".join(told) or _said(log),
            remedy="build it again",
        )
