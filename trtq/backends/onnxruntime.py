"""ONNX Runtime on the CPU: the simulator of a Q/DQ model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnxruntime
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType

from trtq.errors import InputError

_SESSION_CONFIG = {
    "session.disable_quant_qdq": "1",
    "session.disable_double_qdq_remover": "1",
}
"""With these, Q/DQ stay exact quantizers around floating-point operators. By default ONNX Runtime
fuses them into integer operators of its own, which quantize biases and can saturate."""

_FATAL = 4
"""ONNX Runtime's log level: what goes wrong is raised, and said once."""


def simulation_session(
    model: str | Path | bytes, threads: int | None = None, outputs: Sequence[str] | None = None
) -> onnxruntime.InferenceSession:
    """A CPU session that runs Q/DQ faithfully: floating-point operators between exact quantizers.

    Args:
        model: an ONNX file, or a serialized model.
        threads: threads within an operator; None: all cores.
        outputs: names of any tensors of the graph to make its outputs; None: the model's own.

    Raises:
        InputError: ONNX Runtime cannot load the model.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = _FATAL
    for key, value in _SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    file = None if isinstance(model, bytes) else model
    try:
        source = _with_outputs(model, outputs) if outputs is not None else model
        return onnxruntime.InferenceSession(
            source if isinstance(source, bytes) else str(source), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise InputError("ONNX Runtime cannot load the model", file=file, cause=error) from error


class SimulationRunner(BaseRunner):
    """A runner of Polygraphy's for `simulation_session`.

    Polygraphy's own `OnnxrtRunner` imports torch where that is installed: it takes seconds, and Ctrl-C in
    the meantime is swallowed and ends in a crash.

    Args:
        model, threads: as for `simulation_session`.
    """

    def __init__(self, model: str | Path | bytes, threads: int | None = None) -> None:
        super().__init__(prefix="trtq-simulation")
        self._model, self._threads = model, threads

    def activate_impl(self) -> None:
        self._session = simulation_session(self._model, self._threads)

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for item in self._session.get_inputs():
            metadata.add(item.name, DataType.from_dtype(item.type, "onnxruntime"), item.shape)
        return metadata

    def infer_impl(self, feed_dict: dict[str, NDArray]) -> dict[str, NDArray]:
        names = [item.name for item in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, feed_dict), strict=True))

    def deactivate_impl(self) -> None:
        del self._session


def simulation_fingerprint() -> str:
    """Changes when a simulated result may: ONNX Runtime's version and the session's settings."""
    settings = ",".join(f"{key}={value}" for key, value in _SESSION_CONFIG.items())
    return f"onnxruntime-{onnxruntime.__version__}:{settings}"


def _with_outputs(model: str | Path | bytes, outputs: Sequence[str]) -> bytes:
    proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return proto.SerializeToString()
