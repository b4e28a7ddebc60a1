"""A quantization: all that a Q/DQ model is made of, and what every step of the workflow takes and returns."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.calibration.table import Table
from trtq.graph.half import convert_to_half
from trtq.graph.model import export
from trtq.graph.plan import Plan
from trtq.graph.rewrite import rewrite

WeightScales = Mapping[tuple[str, int], NDArray[np.float32]]
"""(constant, axis) -> float32 scales (channels,) along that axis."""


@dataclass(frozen=True)
class Quantization:
    """A float graph, where its quantizers stand, and the ranges they have.

    Attributes:
        graph: folded, float32. Whoever holds a Quantization does not change its graph in place.
        plan: the placement.
        scales: activation tensor -> float32 scale (amax / 127), > 0.
        weight_scales: the scales of weights that were learned; all others are amax / 127 per channel.
        notes: JSON values that say where the ranges come from; the table's metadata.
    """

    graph: gs.Graph
    plan: Plan
    scales: Mapping[str, np.float32]
    weight_scales: WeightScales = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def rewritten(self, *, weights: str = "int8", rest: str = "fp32") -> gs.Graph:
        """The Q/DQ graph.

        Args:
            weights: one of `rewrite.WEIGHT_FORMS`.
            rest: precision of what is not quantized, fp32 or fp16.

        Raises:
            InputError: a tensor of the plan has no scale, or the graph cannot be converted to half.
        """
        graph = convert_to_half(self.graph) if rest == "fp16" else self.graph
        return rewrite(graph, self.plan, self.scales, weights=weights, weight_scales=self.weight_scales)

    def table(self) -> Table:
        """The calibration table of the plan's tensors, with the notes as its metadata."""
        return Table({name: self.scales[name] for name in self.plan.tensors}, metadata=self.notes)

    def to_bytes(self) -> bytes:
        """An `.npz` of everything; the same quantization always gives the same bytes."""
        keys = list(self.weight_scales)
        header = {
            "plan": self.plan.to_json(),
            "notes": dict(self.notes),
            "tensors": list(self.scales),
            "weights": keys,
        }
        arrays: dict[str, Any] = {f"weight_{i}": self.weight_scales[key] for i, key in enumerate(keys)}
        buffer = io.BytesIO()
        np.savez(
            buffer,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            graph=np.frombuffer(export(self.graph).SerializeToString(deterministic=True), np.uint8),
            scales=np.array(list(self.scales.values()), np.float32),
            **arrays,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Quantization:
        """The inverse of `to_bytes`."""
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            header = json.loads(stored["header"].tobytes())
            weights = {(t, int(axis)): stored[f"weight_{i}"] for i, (t, axis) in enumerate(header["weights"])}
            return cls(
                gs.import_onnx(onnx.load_from_string(stored["graph"].tobytes())),
                Plan.from_json(header["plan"]),
                dict(zip(header["tensors"], stored["scales"], strict=True)),
                weights,
                header["notes"],
            )
