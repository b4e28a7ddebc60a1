"""A model that is given as a `ModelProto`: a file of it in a scratch folder, which every step reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtq.errors import InputError
from trtq.memory import InMemory, folder_of

if TYPE_CHECKING:
    from onnx import ModelProto


class ModelInMemory(InMemory):
    """A path to a copy of an `onnx.ModelProto`; what is done to the proto later does not count.

    A proto of more than 2 GB has its weights in a file beside the copy.

    Args:
        proto: complete, with all weights.

    Raises:
        InputError: its weights are in files of which it does not say where they are.
    """

    def __init__(self, proto: ModelProto) -> None:
        super().__init__("ModelProto")
        self.file = folder_of(self) / "model.onnx"
        _write(proto, self.file)

    def __fspath__(self) -> str:
        return os.fspath(self.file)


def model_in_memory(value: Any) -> ModelInMemory | None:
    """A `ModelProto`, or what `torch.onnx.export` returns, as a path; None for anything else."""
    if isinstance(value, ModelInMemory):
        return value
    if type(value).__module__.startswith("torch.onnx"):
        value = value.model_proto
    return ModelInMemory(value) if type(value).__name__ == "ModelProto" else None


def _write(proto: ModelProto, path: Path) -> None:
    import onnx_graphsurgeon as gs
    from onnx import TensorProto, helper

    from trtq.graph.model import PROTOBUF_LIMIT, save_model
    from trtq.graph.weights import nbytes

    tensors = proto.graph.initializer
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in tensors):
        raise InputError(
            "the ModelProto has no weights: they are in files, and it does not say in which folder",
            remedy="load it with onnx.load(path), which reads them, or give the path",
        )
    known = helper.get_all_tensor_dtypes()  # what has another type is refused where the file is read
    if sum(nbytes(tensor) for tensor in tensors if tensor.data_type in known) < PROTOBUF_LIMIT:
        path.write_bytes(proto.SerializeToString(deterministic=True))
    else:
        save_model(gs.import_onnx(proto), path)
