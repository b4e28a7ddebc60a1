"""Costs by engines that were timed layer by layer, here or elsewhere.

A kernel of another placement takes what it took in the engine that had it in that precision, corrected by the
roofline for what it reads and writes in other datatypes than there. What no engine had is the roofline's,
scaled to what the engines took. So figures of an FP16 and of an INT8 engine cost every placement between
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trtq.backends.compiled import CompiledLayer
from trtq.cost.fused import Kernel
from trtq.cost.interface import Kind, Latency, Precision, Rest
from trtq.cost.layers import PRECISIONS, layer_load
from trtq.cost.modelled import Modelled, priced
from trtq.cost.placed import Conversion, Placed
from trtq.cost.roofline import Load
from trtq.graph.plan import Edge, NodePlan, Plan

UNSURE = 4.0
"""By at most this factor the roofline corrects what a kernel took."""


@dataclass(frozen=True)
class TimedLayer:
    """A layer of an engine and what it takes, in microseconds, without what the profiler adds.

    Attributes:
        nodes: the ONNX nodes that it came from.
        compiled: what it reads and writes; None where only its name is known.
    """

    name: str
    microseconds: float
    nodes: tuple[str, ...]
    compiled: CompiledLayer | None

    @property
    def converts(self) -> bool:
        if self.compiled is not None:
            return self.compiled.converts
        return self.name.startswith("Reformatting CopyNode") or self.name.endswith(" copy")


@dataclass(frozen=True)
class TimedEngine:
    """An engine that was timed.

    Attributes:
        precision: INT8 if any of its products is, else what most of them compute in.
        batch: stands for dynamic dimensions.
    """

    source: str
    precision: Precision
    layers: tuple[TimedLayer, ...]
    batch: int = 1

    @property
    def microseconds(self) -> float:
        return sum(layer.microseconds for layer in self.layers)


@dataclass
class _Taken:
    """What a kernel took in an engine, and what the roofline says of that: 0 where it says nothing."""

    microseconds: float = 0.0
    modelled: float = 0.0

    def add(self, microseconds: float, modelled: float) -> None:
        self.microseconds += microseconds
        self.modelled += modelled


class Timed:
    """A `CostSource` by timed engines.

    Args:
        modelled: the roofline that fills in what no engine had.
        engines: those timed first are believed first.
    """

    def __init__(self, modelled: Modelled, engines: Sequence[TimedEngine], kind: Kind) -> None:
        self.kind: Kind = kind
        self._modelled = modelled
        self._engines = tuple(engines)
        self._kernels: dict[tuple[str, Precision], _Taken] = {}
        self._conversions: dict[tuple[str, Precision], _Taken] = {}
        self._all: dict[Precision, _Taken] = {}
        self._converting = _Taken()
        kernels = modelled.fused.kernels
        self._owner = {node: position for position, kernel in enumerate(kernels) for node in kernel.nodes}
        for engine in engines:
            self._learn(engine)

    @property
    def name(self) -> str:
        return ", ".join(engine.source for engine in self._engines)

    @property
    def share(self) -> float:
        """How much of what the engines took, conversions aside, is of layers that the model has."""
        layers = [layer for engine in self._engines for layer in engine.layers if not layer.converts]
        found = sum(layer.microseconds for layer in layers if self._homes(layer))
        return found / max(sum(layer.microseconds for layer in layers), 1e-9)

    def latency(self, plan: Plan, rest: Rest) -> Latency:
        """See `CostSource`."""
        return priced(
            self._modelled.placed(plan, rest),
            kernel=self._kernel,
            conversion=self._conversion,
            why=self._why,
            kind=self.kind,
            source=self.name,
        )

    # --- what the engines tell ---

    def _learn(self, engine: TimedEngine) -> None:
        """Remember what each kernel took, and what the roofline says of it in this engine's placement."""
        taken: dict[str, float] = {}
        layers: dict[int, list[TimedLayer]] = {}
        for layer in engine.layers:
            if layer.microseconds > 0 and layer.converts:
                self._learn_conversion(layer, engine.batch)
            elif layer.microseconds > 0:
                homes = self._homes(layer)
                weights = [self._weight(home, engine.precision) for home in homes]
                for home, weight in zip(homes, weights, strict=True):
                    node = self._kernel_at(home).nodes[0]
                    taken[node] = taken.get(node, 0.0) + layer.microseconds * weight / sum(weights)
                    layers.setdefault(home, []).append(layer)
        known = set(self._kernels)
        plan, rest = self._placement(engine, layers)
        for each in self._modelled.placed(plan, rest):
            node, precision = each.kernel.nodes[0], each.load.precision
            if node in taken and (node, precision) not in known:
                there = _Taken(taken[node], self._modelled.kernel(each))
                self._kernels[node, precision] = there
                self._all.setdefault(precision, _Taken()).add(there.microseconds, there.modelled)

    def _placement(
        self, engine: TimedEngine, layers: Mapping[int, Sequence[TimedLayer]]
    ) -> tuple[Plan, Rest]:
        """The placement that an engine has, from the datatypes of its layers.

        Of INT8 products the factors are INT8; all else goes by the inputs of the layer, in their order.
        """
        nodes, edges = [], []
        for home, found in layers.items():
            kernel = self._kernel_at(home)
            compiled = [layer.compiled for layer in found if layer.compiled is not None]
            computing = [layer for layer in compiled if layer.computes]
            is_int8 = any(layer.int8 for layer in computing) or (not compiled and engine.precision == "int8")
            nodes += [NodePlan(name, "", is_int8, "timed", "") for name in kernel.weighted]
            types = [tensor.datatype for layer in (computing or compiled)[:1] for tensor in layer.inputs]
            for i, read in enumerate(kernel.reads):
                factor = i < kernel.operands
                listed = types[i] if i < len(types) else types[-1] if types else ""
                if is_int8 if factor else listed == "Int8":
                    edges += [
                        Edge(read.tensor, node, index, "timed", read.tensor) for node, index in read.ends
                    ]
        halves = any(
            tensor.datatype == "Half"
            for layer in engine.layers
            if layer.compiled is not None
            for tensor in (*layer.compiled.inputs, *layer.compiled.outputs)
        )
        return Plan("", nodes, edges, []), "fp16" if halves or engine.precision != "fp32" else "fp32"

    def _kernel_at(self, position: int) -> Kernel:
        return self._modelled.fused.kernels[position]

    def _learn_conversion(self, layer: TimedLayer, batch: int) -> None:
        load = None if layer.compiled is None else layer_load(layer.compiled, batch)
        modelled = 0.0 if load is None else self._modelled.time(load).microseconds
        every = [self._converting] if modelled else []
        if layer.compiled is not None and layer.compiled.inputs and layer.compiled.outputs:
            made = PRECISIONS.get(layer.compiled.outputs[0].datatype, "fp32")
            every.append(self._conversions.setdefault((layer.compiled.inputs[0].name, made), _Taken()))
        for taken in every:
            taken.add(layer.microseconds, modelled)

    def _homes(self, layer: TimedLayer) -> list[int]:
        """The kernels of the model that a layer is; one that computes nothing is those without products."""
        found = list(dict.fromkeys(self._owner[node] for node in layer.nodes if node in self._owner))
        if layer.compiled is None or layer.compiled.computes:
            return found
        return [home for home in found if not self._kernel_at(home).gemms] or found

    def _weight(self, home: int, precision: Precision) -> float:
        """By which a layer's time is divided among several kernels."""
        load = Load(precision, tuple(self._kernel_at(home).gemms), ())
        return self._modelled.time(load).microseconds

    # --- what another placement takes ---

    def _kernel(self, each: Placed) -> float:
        modelled = self._modelled.kernel(each)
        taken = self._kernels.get((each.kernel.nodes[0], each.load.precision))
        return modelled * (self._scale(each.load.precision) if taken is None else _ratio(taken, modelled))

    def _conversion(self, each: Conversion) -> float:
        modelled = self._modelled.time(each.load).microseconds
        taken = self._conversions.get((each.tensor, each.made))
        if taken is not None:
            return modelled * _ratio(taken, modelled)
        return modelled * (_quotient(self._converting) or self._scale(each.load.precision))

    def _scale(self, precision: Precision) -> float:
        """What the engines took of what the roofline says, in a precision or else in all."""
        taken = self._all.get(precision) or _Taken(
            sum(t.microseconds for t in self._all.values()), sum(t.modelled for t in self._all.values())
        )
        return _quotient(taken) or 1.0

    def _why(self, each: Placed) -> str:
        known = (each.kernel.nodes[0], each.load.precision) in self._kernels
        return self.kind if known else "by the roofline, scaled"


def _quotient(taken: _Taken) -> float:
    return taken.microseconds / taken.modelled if taken.modelled else 0.0


def _ratio(taken: _Taken, modelled: float) -> float:
    """What the roofline is to be multiplied by for a kernel that an engine had."""
    if not taken.modelled:
        return taken.microseconds / modelled
    corrected = min(max(modelled / taken.modelled, 1 / UNSURE), UNSURE) * taken.microseconds
    return corrected / modelled
