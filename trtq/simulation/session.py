"""ONNX Runtime: the simulator of a Q/DQ model, on the CPU, or on a GPU with `onnxruntime-gpu`."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
from numpy.typing import NDArray

from trtq.errors import InputError, TrtqError
from trtq.graph import references
from trtq.graph.division import with_safe_division
from trtq.graph.door import read_model
from trtq.graph.foreign import View, import_domains, needs_reference
from trtq.graph.functions import holds_attention, with_attention_defined
from trtq.graph.model import model_files
from trtq.graph.weights import IN_MEMORY, Light
from trtq.simulation.chain import Chain
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

MANY_NODES = 4096
"""Models of more nodes are loaded without a search whose time grows with the square of them."""

_SMALL_NODE = 1 << 10
"""Bytes that a node takes in a file, with its weights, below which another layout does not make it faster."""

_FATAL = 4
"""ONNX Runtime's log level: errors are raised, so they are not logged as well."""


Session: TypeAlias = onnxruntime.InferenceSession | Chain


def simulation_session(
    model: str | Path | bytes | Light,
    threads: int | None = None,
    outputs: Sequence[str] | None = None,
    weights: Mapping[str, onnxruntime.OrtValue] | None = None,
    *,
    optimized: bool = True,
    fused: bool = False,
) -> Session:
    """A session that runs Q/DQ faithfully: floating-point operators between exact quantizers.

    What is float16 or bfloat16 in the model is rounded to that, and overflows (see `trtq.simulation.narrow`).
    It runs on the GPU where ONNX Runtime can (see `execution_providers`), else on the CPU. Operators that
    ONNX Runtime does not know are computed by their references, in float32 (`trtq.simulation.chain`); where
    one has none, the model ends in front of it (`trtq.graph.foreign.View`).

    Args:
        model: an ONNX file, or a serialized model (see `trtq.graph.model.serialized`).
        threads: threads within an operator; None: one for each processor.
        outputs: names of any tensors of the graph to make its outputs; None: the model's own. Tensors
            inside that are float16 or bfloat16 come as float32.
        weights: values of the initializers that the model says are external, shared and not copied.
        optimized: False: for a few runs, of which making the session would be most.
        fused: as an engine may compute whose kernels hold many operators: only Casts round to float16 or
            bfloat16, and sums come in another order, that of a session that is not optimized.

    Raises:
        InputError: ONNX Runtime cannot load the model, or an output cannot be computed.
    """
    file = None if isinstance(model, bytes | Light) else model
    try:
        source, nodes = _simulable(model, outputs, fused)
        if isinstance(source, _Foreign):
            folder, shared = source.folder, weights or {}
            start = partial(_started, large=_is_large(model), threads=threads, weights=shared, folder=folder)
            read = partial(_values, weights=shared, folder=folder)
            return Chain(source.model, source.outputs, source.types, start, read)
        options = _options(_is_large(model), threads, weights)
        if fused or not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return _session(source, options, nodes)
    except TrtqError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise InputError("ONNX Runtime cannot load the model", file=file, cause=error) from error


def _options(
    large: bool, threads: int | None, weights: Mapping[str, onnxruntime.OrtValue] | None
) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads or processors()
    options.enable_mem_pattern = False  # it keeps one more buffer for every shape, and saves no time
    options.log_severity_level = _FATAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other processes want them, too
    for key, value in _SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    if large:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if weights:
        options.add_external_initializers(list(weights), list(weights.values()))
    return options


def _session(
    source: str | Path | bytes | Light, options: onnxruntime.SessionOptions, nodes: int
) -> onnxruntime.InferenceSession:
    """A session of a model of so many nodes."""
    left_out = _not_worth_it(source, nodes)
    if isinstance(source, Light):
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(source.folder))
        source = source.model
    return onnxruntime.InferenceSession(
        source if isinstance(source, bytes) else str(source),
        options,
        providers=execution_providers(),
        disabled_optimizers=left_out,
    )


def _not_worth_it(source: str | Path | bytes | Light, nodes: int) -> list[str]:
    """ONNX Runtime's searches, for nodes that compute the same and for convolutions that another layout
    suits, that would take more time for a model of so many nodes than they save."""
    if nodes <= MANY_NODES:
        return []
    small = False
    if nodes > 2 * MANY_NODES and not isinstance(source, Light):
        size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
        small = size < _SMALL_NODE * nodes
    layouts = ["NchwcTransformer"] if small or nodes > 16 * MANY_NODES else []
    return ["CommonSubexpressionElimination", *layouts]


def _started(
    model: onnx.ModelProto,
    large: bool,
    threads: int | None,
    weights: Mapping[str, onnxruntime.OrtValue],
    folder: Path | None,
) -> onnxruntime.InferenceSession:
    """A session of a part of a model, which reads some of its weights only."""
    own = {tensor.name for tensor in model.graph.initializer}
    shared = {name: value for name, value in weights.items() if name in own}
    content = model.SerializeToString()
    source = content if folder is None else Light(content, folder)
    return _session(source, _options(large, threads, shared), len(model.graph.node))


def _values(
    tensor: onnx.TensorProto, weights: Mapping[str, onnxruntime.OrtValue], folder: Path | None
) -> NDArray:
    """The values of an initializer: shared, in a file, or its own."""
    if tensor.name in weights:
        return np.asarray(weights[tensor.name].numpy())
    return onnx.numpy_helper.to_array(tensor, str(folder or ""))


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
    """Changes when a simulated result may: ONNX Runtime's version, the session's settings, the references of
    operators that it lacks, and the GPU."""
    settings = ",".join(f"{key}={value}" for key, value in _SESSION_CONFIG.items())
    device = ":cuda" if len(execution_providers()) > 1 else ""
    operators = f"references-{references.fingerprint()}"
    return f"onnxruntime-{onnxruntime.__version__}:{settings}{_REWRITTEN}:{operators}{device}"


@dataclass(frozen=True)
class _Foreign:
    """A model with operators that ONNX Runtime does not know.

    Attributes:
        model: in float32 where it held narrow types.
        folder: of its external weights; None where it has none.
        outputs: what of it is computed.
        types: tensor -> what the model said of it, or implies.
    """

    model: onnx.ModelProto
    folder: Path | None
    outputs: tuple[str, ...]
    types: Mapping[str, onnx.TypeProto]


def _simulable(
    model: str | Path | bytes | Light, outputs: Sequence[str] | None, fused: bool
) -> tuple[str | Path | bytes | Light | _Foreign, int]:
    """The model in float32 where it holds narrow types, with Attention as ONNX defines it, divisions that do
    not end the process, and other outputs where some are named; and how many nodes it has.

    A model that needs none of these stays as it is.
    """
    if isinstance(model, bytes):
        proto, folder = onnx.load_from_string(model), None
    elif isinstance(model, Light):
        proto, folder = onnx.load_from_string(model.model), model.folder
    else:
        proto, folder = read_model(model), Path(model).absolute().parent
    foreign = any(map(needs_reference, proto.graph.node))
    if foreign and proto.functions:  # calls of the model's own functions look like foreign operators
        inlined = onnx.inliner.inline_local_functions(proto)
        foreign = any(map(needs_reference, inlined.graph.node))
        proto = inlined if foreign else proto
    given, proto = proto, with_safe_division(proto)
    narrow, attention = holds_narrow(proto), holds_attention(proto)
    if proto is given and not narrow and not attention and outputs is None and not foreign:
        return model, len(proto.graph.node)
    types: dict[str, onnx.TypeProto] = {}
    if foreign:
        import_domains(proto)
        inferred = onnx.shape_inference.infer_shapes(proto).graph
        outputs = _computable(inferred, outputs)
        types = {v.name: v.type for v in (*inferred.value_info, *inferred.output)}
    if attention:
        proto = with_attention_defined(proto)
    if narrow:
        proto = in_float32(proto, fused=fused)
    if foreign:
        return _Foreign(proto, folder, tuple(outputs or ()), types), len(proto.graph.node)
    if outputs is not None:
        del proto.graph.output[:]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    content = proto.SerializeToString()
    return content if folder is None else Light(content, folder), len(proto.graph.node)


def _computable(graph: onnx.GraphProto, outputs: Sequence[str] | None) -> Sequence[str]:
    """The named outputs, or without names those that can be computed of a graph with foreign operators.

    Raises:
        InputError: one of them, or all, lie behind an operator without a reference.
    """
    view = View.of(graph)
    for name in outputs or ():
        if name in view.hidden:
            raise references.missing(view.hidden[name])
    if outputs is None and not view.outputs:
        raise references.missing(view.walls[0])
    return view.outputs if outputs is None else outputs


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
