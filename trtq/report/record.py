"""`report.json`: what the report shows that no other file of the results holds, of bounded size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trtq.files import PathLike, decode, read_own_json, write_json

FORMAT = "trtq-report-1"

IN_USE = "in use"
"""What the threshold that the engine has is called among those of the methods."""


@dataclass(frozen=True)
class Data:
    """Rows of a job: where they come from, as the user wrote it, and how many."""

    source: str
    rows: int


@dataclass(frozen=True)
class LayerNoise:
    """What a group of nodes alone in INT8 adds to the outputs.

    Attributes:
        nodes: their names.
        op: their operators.
        sqnr_db: of the outputs.
        share: of the noise that all groups make alone.
        mac_share: of the multiply-accumulates; None: not known.
    """

    nodes: tuple[str, ...]
    op: str
    sqnr_db: float
    share: float
    mac_share: float | None


@dataclass(frozen=True)
class Noise:
    """The noise of each layer.

    Attributes:
        step: of the workflow, whose quantization was measured.
        rows: of calibration data that it was measured on.
        layers: the noisiest first, the first few of them.
        count: how many there are.
    """

    step: str
    rows: int
    layers: tuple[LayerNoise, ...]
    count: int


@dataclass(frozen=True)
class Threshold:
    """Where a method cuts a tensor off.

    Attributes:
        method: its name, or `IN_USE`.
        amax: the largest magnitude kept.
        beyond: share of the values above it, which saturate.
        sqnr_db: of the tensor's own values with it; None: exact.
    """

    method: str
    amax: float
    beyond: float
    sqnr_db: float | None


@dataclass(frozen=True)
class TensorValues:
    """A tensor's values over all calibration rows.

    Attributes:
        readers: nodes that read it quantized.
        counts: of |x|, in bars of equal width from 0 to `amax`.
        amax: the largest |x|.
        low, high: the smallest and largest x.
        thresholds: of the range in use, then of every method.
    """

    tensor: str
    readers: tuple[str, ...]
    counts: tuple[int, ...]
    amax: float
    low: float
    high: float
    thresholds: tuple[Threshold, ...]


@dataclass(frozen=True)
class Thumbnail:
    """An image input of a sample: base64 of a PNG."""

    input: str
    png: str


@dataclass(frozen=True)
class Sample:
    """A sample of the evaluation data: its number and its images."""

    number: int
    images: tuple[Thumbnail, ...]


@dataclass(frozen=True)
class Cost:
    """What an engine of the model has to do, by a model of what TensorRT fuses; nothing was built for it.

    Attributes:
        engine: which one: FP32, FP16, or with INT8.
        kernels: how many one inference launches.
        bytes: that they read and write, weights included.
    """

    engine: str
    kernels: int
    bytes: int


@dataclass(frozen=True)
class GraphNode:
    """A node of the folded float model.

    Attributes:
        inputs: positions of the nodes that it reads from.
    """

    name: str
    op: str
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Record:
    """What the report shows beside the other files.

    Attributes:
        made: when, in ISO 8601, UTC.
        command: the command line; empty where Python called.
        model: as the user wrote it.
        sha256: of the model.
        versions: package -> version.
        noise: None where it was not measured.
        tensors: those that lose most to rounding and saturation, the first few of them.
        tensor_count: how many are quantized.
        samples: the least similar ones, where an input is an image.
        costs: none where shapes are not known.
        batch: rows of the inference that costs are of.
        nodes: in an order in which they can run; none where there are too many to draw.
        node_count: how many there are.
    """

    made: str
    command: str
    model: str
    sha256: str
    data: Data
    eval: Data
    versions: Mapping[str, str]
    noise: Noise | None = None
    tensors: tuple[TensorValues, ...] = ()
    tensor_count: int = 0
    samples: tuple[Sample, ...] = ()
    costs: tuple[Cost, ...] = ()
    batch: int = 1
    nodes: tuple[GraphNode, ...] = ()
    node_count: int = field(default=0)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: PathLike) -> None:
        """Write `report.json` in one move."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: PathLike) -> Record:
        """Read `report.json`.

        Raises:
            InputError: the file is missing, not JSON, or not such a record.
        """
        return read_own_json(path, "record of the report", cls.from_json)

    @classmethod
    def from_json(cls, value: Any) -> Record:
        """The record in JSON values.

        Raises:
            ValueError: they are not one, a node of the graph reads one that comes after it, or a tensor is
                always zero.
        """
        record = decode(value, cls, format=FORMAT)
        for position, tensor in enumerate(record.tensors):
            if not (tensor.amax > 0 and tensor.counts and min(tensor.counts) >= 0):
                raise ValueError(f"`tensors[{position}]`: its `amax` or one of its `counts` is out of range")
        for position, node in enumerate(record.nodes):
            if any(not 0 <= source < position for source in node.inputs):
                raise ValueError(f"`nodes[{position}].inputs`: it reads a node that does not come before it")
        return record
