"""ONNX Runtime: the simulator of a Q/DQ model, on the CPU, or on a GPU with `onnxruntime-gpu`."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from trtq.errors import InputError
from trtq.graph.functions import holds_attention, with_attention_defined
from trtq.graph.model import model_files
from trtq.graph.weights import IN_MEMORY, Light, read_light
from trtq.simulation.narrow import holds_narrow, in_float32
from trtq.simulation.processors import processors

_SESSION_CONFIG = {
    "session.disable_quant_qdq": "1",
    "session.disable_double_qdq_remover": "1",
}
"""With these, Q/DQ stay exact quantizers around floating-point operators. By default ONNX Runtime
fuses them into integer operators of its own, which quantize biases and can saturate."""

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

_CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}
"""float32 stays float32, and convolutions are not chosen by timing them: runs repeat."""

_REWRITTEN = ":narrow-types-rounded:attention-as-defined"
"""What is not left to ONNX Runtime, for the fingerprint."""

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"

_HOLDS_WEIGHTS = 1 << 25
"""A file above this size holds its weights itself; it is not parsed to look for external data."""

_FATAL = 4
"""ONNX Runtime's log level: errors are raised, so they are not logged as well."""


def simulation_session(
    model: str | Path | bytes | Light,
    threads: int | None = None,
    outputs: Sequence[str] | None = None,
    weights: Mapping[str, onnxruntime.OrtValue] | None = None,
) -> onnxruntime.InferenceSession:
    """A session that runs Q/DQ faithfully: floating-point operators between exact quantizers.

    What is float16 or bfloat16 in the model is rounded to that, and overflows (see `trtq.simulation.narrow`).
    It runs on the GPU where ONNX Runtime can (see `execution_providers`), else on the CPU.

    Args:
        model: an ONNX file, or a serialized model (see `trtq.graph.model.serialized`).
        threads: threads within an operator; None: one for each processor.
        outputs: names of any tensors of the graph to make its outputs; None: the model's own. Tensors
            inside that are float16 or bfloat16 come as float32.
        weights: values of the initializers that the model says are external, shared and not copied.

    Raises:
        InputError: ONNX Runtime cannot load the model.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads or _every_thread()
    options.enable_mem_pattern = False  # it keeps one more buffer for every shape, and saves no time
    options.log_severity_level = _FATAL
    for key, value in _SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    if _is_large(model):
        options.add_session_config_entry("session.disable_prepacking", "1")
    if weights:
        options.add_external_initializers(list(weights), list(weights.values()))
    file = None if isinstance(model, bytes | Light) else model
    try:
        source = _simulable(model, outputs)
        if isinstance(source, Light):
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(source.folder))
            source = source.model
        return onnxruntime.InferenceSession(
            source if isinstance(source, bytes) else str(source), options, providers=execution_providers()
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise InputError("ONNX Runtime cannot load the model", file=file, cause=error) from error


def _every_thread() -> int:
    """ONNX Runtime's own choice (0), all of the machine's cores, unless this process may not use them all."""
    return processors() if processors() < (os.cpu_count() or 1) else 0


def _is_large(model: str | Path | bytes | Light) -> bool:
    """Whether a second copy of the weights, laid out for the processor, would take too much memory."""
    if isinstance(model, Light):
        return True
    if isinstance(model, bytes):
        return len(model) > IN_MEMORY
    with contextlib.suppress(InputError, OSError):  # ONNX Runtime says what is wrong with it
        if Path(model).stat().st_size > _HOLDS_WEIGHTS:
            return Path(model).stat().st_size > IN_MEMORY
        return sum(file.stat().st_size for file in model_files(model)) > IN_MEMORY
    return False


@functools.cache
def execution_providers() -> list[Any]:
    """ONNX Runtime's providers with their options: CUDA's first where it is installed and starts.

    Where it is installed and does not start, a warning says so, once. An empty CUDA_VISIBLE_DEVICES keeps the
    GPU out.
    """
    if _CUDA not in onnxruntime.get_available_providers():
        return [_CPU]
    cuda = (_CUDA, _CUDA_OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = _CUDA in onnxruntime.InferenceSession(_identity(), providers=[cuda, _CPU]).get_providers()
    if started:
        return [cuda, _CPU]
    warnings.warn(
        "ONNX Runtime's CUDA provider is installed but does not start (GPU, driver, CUDA libraries?);"
        " models run on the CPU",
        RuntimeWarning,
        stacklevel=2,
    )
    return [_CPU]


def simulation_fingerprint() -> str:
    """Changes when a simulated result may: ONNX Runtime's version, the session's settings, and the GPU."""
    settings = ",".join(f"{key}={value}" for key, value in _SESSION_CONFIG.items())
    device = ":cuda" if len(execution_providers()) > 1 else ""
    return f"onnxruntime-{onnxruntime.__version__}:{settings}{_REWRITTEN}{device}"


def _simulable(
    model: str | Path | bytes | Light, outputs: Sequence[str] | None
) -> str | Path | bytes | Light:
    """The model in float32 where it holds narrow types, with Attention as ONNX defines it, and with other
    outputs where some are named.

    A model that needs none of these stays as it is.
    """
    if isinstance(model, bytes):
        proto, folder = onnx.load_from_string(model), None
    elif isinstance(model, Light):
        proto, folder = onnx.load_from_string(model.model), model.folder
    else:
        proto, folder = read_light(Path(model)), Path(model).absolute().parent
    narrow, attention = holds_narrow(proto), holds_attention(proto)
    if not narrow and not attention and outputs is None:
        return model
    if attention:
        proto = with_attention_defined(proto)
    if narrow:
        proto = in_float32(proto)
    if outputs is not None:
        del proto.graph.output[:]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    content = proto.SerializeToString()
    return content if folder is None else Light(content, folder)


def _identity() -> bytes:
    shape = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "identity",
        [shape("x", onnx.TensorProto.FLOAT, [1])],
        [shape("y", onnx.TensorProto.FLOAT, [1])],
    )
    opset = onnx.helper.make_opsetid("", 13)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()
