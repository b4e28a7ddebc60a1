"""The options of a recipe as a Python program gives them, for type checkers and editors.

They are the fields of `trtq.recipe.Recipe`, where each is explained; a test keeps both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypedDict

if TYPE_CHECKING:
    from onnx import ModelProto

    from trtq.calibration.methods import Method
    from trtq.data.feeding import InputOptions
    from trtq.data.memory import Data
    from trtq.data.preprocess import Preprocess
    from trtq.graph.memory import ModelInMemory
    from trtq.memory import Function
    from trtq.simulation.pool import Pool


class IndexedRows(Protocol):
    """A map-style data set, such as PyTorch's."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Path = str | PathLike[str]
"""A path, as text or as a `pathlib.Path`."""

ModelLike: TypeAlias = "Path | ModelProto | ModelInMemory | HasProto"
"""An ONNX model: a file, an `onnx.ModelProto`, or what `torch.onnx.export` returns."""

DataLike: TypeAlias = "Path | Data | Mapping[str, Any] | Iterable[Any] | IndexedRows | Callable[[], Any]"
"""Samples: a file, or what `trtq.Data` takes."""

MetricLike: TypeAlias = "str | Function | Callable[..., Any]"
"""A metric: a name, FILE.py:FUNCTION, or a function (outputs, targets) -> number, higher is better."""

Paths = Path | Sequence[Path]
Patterns = str | Sequence[str]
Shapes = Sequence[Sequence[int]]


class HasProto(Protocol):
    """What `torch.onnx.export` returns."""

    @property
    def model_proto(self) -> Any: ...


class Options(TypedDict, total=False):
    """Keyword arguments of `trtq.deploy` and of the other steps: the fields of `trtq.Recipe`."""

    model: ModelLike | None
    data: DataLike | None
    eval: DataLike | None
    metric: MetricLike | None
    output: Path | None
    method: Method | str | None
    max_drop: float | str | None
    confidence: float | None
    require_engine: bool | None
    min_reference: float | None
    ignore_nonfinite: bool | None
    min_int8: float | str | None
    min_sqnr: float | None
    recover: str | Sequence[Literal["fix", "partial", "learn"]] | None
    partial_limit: float | str | None
    budget: float | str | None
    labels: str | None
    plan: Path | None
    include: Patterns | None
    exclude: Patterns | None
    op_reference: Paths | None
    plugin_lib: Paths | None
    weights: Literal["int8", "qdq"] | None
    rest: Literal["auto", "fp16", "fp32"] | None
    objective: Literal["latency", "int8"] | None
    gpu: str | None
    profile_json: Paths | None
    layer_info: Paths | None
    io: Literal["float", "int8", "int8-in-out", "uint8"] | None
    backend: Literal["tensorrt", "tensorrt-rtx", "none"] | None
    target: str | float | Sequence[str | float] | None
    profile: Patterns | Mapping[str, Shapes] | None
    batch: int | None
    parallel: str | Pool | None
    threads: int | None
    cache: Path | None
    timing_cache: Path | None
    workspace: int | None
    optimization_level: int | None
    version_compatible: bool | None
    hardware_compatible: bool | None
    dla_core: int | None
    refit: bool | None
    strip_weights: bool | None
    lower_precision: Literal["fp16", "bf16"] | None
    state: Patterns | Mapping[str, str] | None
    preprocess: Mapping[str, Preprocess | Mapping[str, Any]] | None
    inputs: Mapping[str, InputOptions | Mapping[str, Any]] | None
    classes: Mapping[str, int] | Sequence[str] | None
