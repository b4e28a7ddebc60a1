"""A quantization: all that a Q/DQ model is made of, and what every step of the workflow takes and returns."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.arrays import read_arrays
from trtq.graph.codes import Image
from trtq.graph.ends import Ends
from trtq.graph.half import convert_to_half
from trtq.graph.model import PROTOBUF_LIMIT, export, weight_bytes
from trtq.graph.names import Names
from trtq.graph.plan import Plan
from trtq.graph.rewrite import rewrite, weight_scale
from trtq.graph.surgery import cleaned, copied
from trtq.graph.weights import graph_sha256
from trtq.numerics import dequantize

WeightScales = Mapping[tuple[str, int], NDArray[np.float32]]
"""(constant, axis) -> float32 scales (channels,) along that axis."""

WeightCodes = Mapping[tuple[str, int], NDArray[np.int8]]
"""(constant, axis) -> int8 codes, -127 to 127, of the constant's shape, with scales along that axis."""


@dataclass(frozen=True)
class Correction:
    """What a bias becomes where the node that it belongs to is INT8.

    Attributes:
        node, index: who reads the bias, as which of its inputs: a Conv, or the Add behind a MatMul.
        values: float32, of the bias's shape.
    """

    node: str
    index: int
    values: NDArray[np.float32]


@dataclass(frozen=True)
class Quantization:
    """A float graph, where its quantizers stand, and the ranges they have.

    Attributes:
        graph: folded, float32. Whoever holds a Quantization does not change its graph in place.
        plan: the placement.
        scales: activation tensor -> float32 scale (amax / 127), > 0.
        weight_scales: the scales of weights that were learned; all others are amax / 127 per channel.
        corrections: node -> what its bias becomes if it is INT8.
        codes: what weights are rounded to that are not rounded to the nearest.
        notes: JSON values that say where the ranges come from; the table's metadata.
        ends: which inputs and outputs of the delivered model are 8-bit numbers.
    """

    graph: gs.Graph
    plan: Plan
    scales: Mapping[str, np.float32]
    weight_scales: WeightScales = field(default_factory=dict)
    corrections: Mapping[str, Correction] = field(default_factory=dict)
    codes: WeightCodes = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    ends: Ends = field(default_factory=Ends)

    def delivered(self, *, weights: str | None = None, rest: str = "fp32") -> gs.Graph:
        """The Q/DQ graph as it is built and gated: `rewritten`, with the inputs and outputs of `ends`.

        Raises:
            InputError: as `rewritten`.
        """
        return self.ends.given_to(self.rewritten(weights=weights, rest=rest))

    def rewritten(self, *, weights: str | None = None, rest: str = "fp32") -> gs.Graph:
        """The Q/DQ graph.

        Args:
            weights: one of `rewrite.WEIGHT_FORMS`; default: int8.
            rest: precision of what is not quantized, fp32 or fp16.

        Raises:
            InputError: a tensor of the plan has no scale, or the graph cannot be converted to half.
        """
        graph = self.graph
        if rest == "fp16":
            graph = convert_to_half(graph, [node.name for node in self.plan.float32])
        return rewrite(
            graph,
            self.plan,
            self.scales,
            weights=weights or "int8",
            weight_scales=self.weight_scales,
            codes=self.codes,
            biases={(c.node, c.index): c.values for c in self.corrections_of(self.plan)},
        )

    def with_corrections_inside(self) -> Quantization:
        """The same Q/DQ model with the corrections and the weights of the codes in the float graph, which is
        then not the model's own."""
        if not (self.corrections or self.codes):
            return self
        graph, names = copied(self.graph), Names(self.graph)
        nodes = {node.name: node for node in graph.nodes}
        for correction in self.corrections_of(self.plan):
            inputs = nodes[correction.node].inputs
            name = names.tensor(f"{inputs[correction.index].name}/{correction.node}/corrected")
            inputs[correction.index] = gs.Constant(name, correction.values)
        scales = dict(self.weight_scales)
        for weight in self.plan.weights:
            if (codes := self.codes.get(key := (weight.tensor, weight.axis))) is not None:
                constant = nodes[weight.node].inputs[weight.index]
                scales.setdefault(key, weight_scale(constant.values, weight.axis))
                constant.values = dequantize(codes, scales[key], axis=weight.axis)
        return replace(self, graph=cleaned(graph), weight_scales=scales, corrections={}, codes={})

    def corrections_of(self, plan: Plan) -> list[Correction]:
        """The corrections of the nodes that are INT8 in a plan."""
        return [self.corrections[name] for name in plan.int8_nodes if name in self.corrections]

    @property
    def remark(self) -> str:
        """Remarks for the user, besides the figures; mostly none."""
        return str(self.notes.get("remark", ""))

    def with_remark(self, remark: str) -> Quantization:
        """The same with a remark among the notes."""
        return replace(self, notes={**self.notes, "remark": remark})

    @property
    def sha256(self) -> str:
        """Hash of everything, whatever the size."""
        header, arrays = self._contents()
        digest = hashlib.sha256(graph_sha256(self.graph).encode() + json.dumps(header).encode())
        for array in arrays.values():
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def storable(self) -> bool:
        """Whether `to_bytes` can hold it: 2 GB of weights or more are not copied into one message."""
        return weight_bytes(self.graph) < PROTOBUF_LIMIT

    def to_bytes(self) -> bytes:
        """An `.npz` of everything, if it is `storable`; equal quantizations give equal bytes."""
        header, arrays = self._contents()
        buffer = io.BytesIO()
        np.savez(
            buffer,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            graph=np.frombuffer(export(self.graph).SerializeToString(deterministic=True), np.uint8),
            **arrays,
        )
        return buffer.getvalue()

    def _contents(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All but the graph: JSON values, and arrays by name."""
        keys = list(self.weight_scales)
        header = {
            "plan": self.plan.to_json(),
            "notes": dict(self.notes),
            "tensors": list(self.scales),
            "weights": keys,
            "codes": list(self.codes),
            "corrections": [(name, c.node, c.index) for name, c in self.corrections.items()],
        }
        if self.ends:
            header["ends"] = asdict(self.ends)
        arrays: dict[str, Any] = {"scales": np.array(list(self.scales.values()), np.float32)}
        arrays |= {f"weight_{i}": self.weight_scales[key] for i, key in enumerate(keys)}
        arrays |= {f"codes_{i}": codes for i, codes in enumerate(self.codes.values())}
        arrays |= {f"bias_{i}": c.values for i, c in enumerate(self.corrections.values())}
        return header, arrays

    @classmethod
    def from_bytes(cls, content: bytes) -> Quantization:
        """The inverse of `to_bytes`."""
        stored = read_arrays(content)
        header = json.loads(stored["header"].tobytes())
        weights = {(t, int(axis)): stored[f"weight_{i}"] for i, (t, axis) in enumerate(header["weights"])}
        corrections = {
            name: Correction(node, index, stored[f"bias_{i}"])
            for i, (name, node, index) in enumerate(header["corrections"])
        }
        ends = header.get("ends", {})
        images = {name: Image(**image) for name, image in ends.pop("images", {}).items()}
        return cls(
            gs.import_onnx(onnx.load_from_string(stored["graph"].tobytes())),
            Plan.from_json(header["plan"]),
            dict(zip(header["tensors"], stored["scales"], strict=True)),
            weights,
            corrections,
            {(t, int(axis)): stored[f"codes_{i}"] for i, (t, axis) in enumerate(header["codes"])},
            header["notes"],
            Ends(images=images, **ends),
        )
