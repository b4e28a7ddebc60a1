"""A plan file brought onto the GPU, or why it does not come: one message, whoever refuses it.

Plan files are code: what is loaded here runs on the GPU and, in version-compatible plans, on the CPU. Load
only plans you built or whose origin you trust.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtq.backends.network import collection_paused, load_plugins, started
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
        MissingBackendError: TensorRT does not start; RTX does not run the engine on this GPU or driver.
        InputError: it does not load, or lacks its weights and the model is not beside it.
    """
    load_plugins(trt, log, plugins)
    runtime = started(trt.Runtime, log)
    if hasattr(runtime, "engine_host_code_allowed"):  # or version-compatible plans, of 8.6 on, do not load
        runtime.engine_host_code_allowed = True
    content = path.read_bytes()
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise _refusal(trt, runtime, log, content, path)
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
        found = self._cache and self._cache.serialize()
        if found is not None and (content := bytes(memoryview(found))) != self._known:
            with contextlib.suppress(TrtqError, OSError):
                write_bytes(self.path, content)


def _refusal(trt: Any, runtime: Any, log: Any, content: bytes, path: Path) -> TrtqError:
    """Why a plan does not load: what TensorRT logged, and what RTX says of its header."""
    reasons = _reasons(trt, runtime, content) if hasattr(runtime, "get_engine_validity") else []
    said = [f"{name}: {_INVALID.get(name, 'see the documentation')}" for name in reasons]
    missing = reasons and "MALFORMED_ENGINE" not in reasons
    return (MissingBackendError if missing else InputError)(
        "the engine does not load on this machine",
        file=path,
        cause="\n".join([*said, *dict.fromkeys(log.errors)]) or "TensorRT gives no reason",
        remedy=_remedy(reasons, f"{trt.__name__} {trt.__version__}"),
    )


def _reasons(trt: Any, runtime: Any, content: bytes) -> list[str]:
    """Names of what RTX has against an engine (`EngineInvalidityDiagnostics`); none if it is valid."""
    validity, bits = runtime.get_engine_validity(content[: runtime.engine_header_size])
    if validity != trt.EngineValidity.INVALID:
        return []
    members = trt.EngineInvalidityDiagnostics.__members__
    return [name for name in members if int(members[name].value) & int(bits)] or ["CUDA_ERROR"]


def _remedy(reasons: list[str], version: str) -> str:
    if "MALFORMED_ENGINE" in reasons:
        return "copy or build it again"
    if "UNSUPPORTED_CC" in reasons:
        return "build it for this GPU (--target), or with --backend tensorrt where RTX does not know the GPU"
    if not reasons or "VERSION_MISMATCH" in reasons:
        return f"build it here, with {version} and for this GPU"
    return "update the NVIDIA driver, or use a machine that fits; `trtq doctor` shows what is here"


def _stripped(trt: Any, engine: Any, path: Path) -> bool:
    """Whether the plan was built without its weights."""
    record = read_record(path)
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
    record = read_record(path)
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
            cause="\n".join(told or dict.fromkeys(log.errors)),
            remedy="build it again",
        )
