"""Simulating many plans of one quantization over the same rows.

A plan costs little more than the layers behind its first change:

- It becomes a model of its own, with quantizers only where the plan has them: switches at run time would
  keep ONNX Runtime from its fast layouts. All models share the memory of the weights, in floating point and
  quantized, so that none are written or parsed again.
- Activations at cuts through the graph are kept from one pass in fp32 and, once needed, from one with every
  quantizer. A plan is run from the last cut at which it still equals one of the two.
- Rows run in batches that stay in the processor's cache, each on one thread, several at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from numpy.typing import NDArray

from trtq.data.batches import Arrays, Batch
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.graph.foreign import View, reads
from trtq.graph.groups import Group, groups
from trtq.graph.model import QDQ_OPS, export
from trtq.graph.place import leave_out
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.graph.selecting import measured_tensors
from trtq.graph.surgery import copied, in_order
from trtq.numerics import dequantize
from trtq.simulation.finite import check_reference, first_not_finite, with_references
from trtq.simulation.kept import Kept, Shape, Specs
from trtq.simulation.outputs import Columns
from trtq.simulation.rows import Runner, Workers, taken
from trtq.simulation.similarity import Reference, noise_db, scored
from trtq.simulation.values import AllValues, Values

BATCH = 4
"""Rows at once; larger batches leave the processor's cache and are slower."""

KEPT_BYTES = 1 << 29
"""Most memory for the activations at the cuts, for each of the two passes; and so much for the rows. What is
above it, and outputs may be, goes into scratch files."""

SHARED_BYTES = 1 << 10
"""Weights above this size are handed to ONNX Runtime by address."""

Mode = Literal["only", "all-but"]
"""`only`: one group in INT8, all others in fp32; `all-but`: one group in fp32, all others in INT8."""

Switches = frozenset[tuple[str, int]]
"""The quantized inputs of a plan: node, and index of the input."""


class Scorer(Protocol):
    """What may score the outputs beside their noise; a metric of the gate is one."""

    @property
    def name(self) -> str:
        """As the user wrote it."""

    @property
    def fingerprint(self) -> str:
        """Equal for scorers that compute the same."""

    def value(self, outputs: AllValues, targets: Arrays, reference: AllValues | None = None) -> float:
        """One number for all rows, higher is better; `reference` holds the fp32 model's outputs."""


@dataclass(frozen=True)
class Score:
    """How far outputs are from those of the fp32 model.

    Attributes:
        sqnr_db: `noise` in dB.
        noise: sum of squared errors / sum of squared reference values over all rows: of each output that of
            its worst component, and of several outputs the mean (`similarity.Reference`).
        metric: the metric's value, where the simulator has one and the outputs are finite.
    """

    sqnr_db: float
    noise: float
    metric: float | None = None


@dataclass(frozen=True)
class Effect:
    """What one group does to the outputs; the figures are those of `Score`."""

    group: Group
    sqnr_db: float
    noise: float
    metric: float | None = None


class Simulator:
    """Runs any part of a quantization's plan over the same rows.

    Results depend neither on the number of workers nor on what was run before.

    Args:
        quantization: parts of its plan come from `place.leave_out`.
        samples: the rows; what is read of them is kept (see `KEPT_BYTES`).
        metric: scores the outputs, too.
        teacher: the model whose outputs are the reference, where that is not the quantization's graph.
        workers: batches run at once; default: one for each processor.
        ignore_nonfinite: compare only where the reference is finite.

    Raises:
        InputError: a row does not suit the model, or the model does not run on it, or its outputs are not
            finite there.
    """

    def __init__(
        self,
        quantization: Quantization,
        samples: Samples,
        *,
        metric: Scorer | None = None,
        teacher: gs.Graph | None = None,
        workers: int | None = None,
        ignore_nonfinite: bool = False,
    ) -> None:
        self.quantization, self.samples, self.metric = quantization, samples, metric
        self.workers = Workers(workers)
        self._lock = threading.Lock()
        self._program = _Program(quantization)
        self._batches = _Rows.of(taken(self._plain, samples.batches(BATCH)))
        self._cuts = self._affordable_cuts()
        self._float = self._pass(frozenset())
        self._expected = self._float.kept if teacher is None else self._taught(teacher)
        for index, batch in enumerate(self._batches.heads):
            outputs = self._expected.take(index, self._program.final)
            check_reference(outputs, ignore_nonfinite=ignore_nonfinite, samples=samples, batch=batch)
        self._scored = scored(self._expected.take(0, self._program.measured))
        self._measured_against = Reference(_OwnRows(self._expected, self._batches.heads, self._scored))
        self._whole: _Pass | None = None

    @cached_property
    def reference(self) -> dict[str, Values]:
        """The fp32 model's outputs, all rows of each.

        Raises:
            InputError: as `outputs`.
        """
        every = range(len(self._expected))
        return self._joined(self._expected.take(index, self._program.final) for index in every)

    def outputs(self, plan: Plan) -> dict[str, Values]:
        """The outputs with a plan, all rows of each.

        Raises:
            InputError: the plan is not part of the quantization's, or the model fixes a batch of several rows
                and an output does not have a row for each of them.
        """
        return self._joined(self._run(plan))

    def score(self, plan: Plan) -> Score:
        """How far the outputs with a plan are from the reference's.

        Raises:
            InputError: the plan is not part of the quantization's, or the metric does not suit the outputs.
        """
        columns, value = Columns(len(self.samples), self.samples.source), None

        def own_rows() -> Iterator[Arrays]:
            for batch, arrays in zip(self._batches.heads, self._run(plan), strict=True):
                if self.metric is not None:
                    columns.add(batch, {name: arrays[name] for name in self._program.final})
                yield {name: batch.own(arrays[name]) for name in self._scored}

        noise = self._measured_against.noise(own_rows())
        if self.metric is not None:
            outputs = columns.values
            if first_not_finite(outputs, self.reference) is None:
                outputs = with_references(self.reference, outputs)
                value = self.metric.value(outputs, dict(self.samples.targets), self.reference)
        return Score(noise_db(noise), noise, value)

    def effects(self, mode: Mode = "only", among: Sequence[Group] | None = None) -> Iterator[Effect]:
        """The effect of each group, one at a time, in the order of the groups (paper section 5.1).

        Args:
            among: default: all groups of the quantization.

        Raises:
            InputError: as `score`.
        """
        graph, plan = self.quantization.graph, self.quantization.plan
        every = groups(graph, plan)

        def effect(group: Group) -> Effect:
            left_out = [g for g in every if (g == group) == (mode == "all-but")]
            nodes = dict.fromkeys((name for g in left_out for name in g.nodes), "left out to measure")
            found = self.score(leave_out(graph, plan, nodes))
            return Effect(group, found.sqnr_db, found.noise, found.metric)

        yield from Workers(self.workers.count).map(effect, every if among is None else among)

    def _run(self, plan: Plan) -> Iterator[Arrays]:
        """The outputs of every batch."""
        switches = self._program.switches(plan)
        known = [self._float]
        if 2 * len(switches) > len(self._program.quantized):
            with self._lock:
                self._whole = self._whole or self._pass(frozenset(self._program.quantized))
            known.append(self._whole)
        base = max(known, key=lambda known: self._program.first_change(switches ^ known.switches))
        if switches == base.switches:
            return (base.kept.take(index, self._program.outputs) for index in range(len(base.kept)))
        change = self._program.first_change(switches ^ base.switches)
        start = max(cut for cut in self._cuts if cut <= change)
        batches = self._batches.beside(base.kept, self._program.alive(start))
        return self._simulate(switches, start, batches, self._program.outputs)

    def _taught(self, teacher: gs.Graph) -> Kept:
        """Another model's outputs of every batch."""
        runner = Runner(teacher, self._program.outputs)
        return Kept(runner.over(self.samples, self._batches, workers=self.workers), KEPT_BYTES)

    def _plain(self, feed: Arrays) -> Arrays:
        """The fp32 model's outputs for a feed."""
        (found,) = self._simulate(frozenset(), 0, _Rows.of([Batch(feed, 0, 1, 0)]), self._program.outputs)
        return found

    def _pass(self, switches: Switches) -> _Pass:
        """A pass over all rows that keeps the outputs and the activations at the cuts."""
        alive = sorted(set().union(*(self._program.alive(cut) for cut in self._cuts)))
        names = list(dict.fromkeys([*self._program.outputs, *alive]))
        return _Pass(switches, Kept(self._simulate(switches, 0, self._batches, names), KEPT_BYTES))

    def _affordable_cuts(self) -> list[int]:
        """Positions in front of quantized nodes where few bytes are alive, and the start."""
        program, first = self._program, _Rows.of([self._batches[0]])
        positions = [position for position in program.changing if program.alive(position)]
        names = sorted(set().union(*(program.alive(position) for position in positions)))
        found = next(self._simulate(frozenset(), 0, first, names)) if names else {}
        batch_bytes = {name: array.nbytes for name, array in found.items()}
        count = len(self.samples) / (first.heads[0].rows + first.heads[0].padding)

        def size(tensors: Iterable[str]) -> float:
            return count * sum(batch_bytes[name] for name in tensors)

        kept: set[str] = set()
        cuts = [0]
        for position in sorted(positions, key=lambda position: size(program.alive(position))):
            kept |= program.alive(position)
            if size(kept) > KEPT_BYTES:
                break
            cuts.append(position)
        return cuts

    def _simulate(
        self, switches: Switches, start: int, batches: _Rows, names: Sequence[str]
    ) -> Iterator[Arrays]:
        """Named tensors of every batch, computed from the activations at the cut `start`.

        Args:
            batches: they feed the model's inputs, and the activations at that cut.
        """
        specs = batches.specs
        computed = [name for name in names if name not in specs]
        model, weights = self._program.part(switches, start, specs, computed)

        def named(batch: Batch, outputs: Arrays) -> Arrays:
            arrays = batch.feed | outputs
            return {name: arrays[name] for name in names}

        return Runner(model, weights=weights).over(self.samples, batches, named, workers=self.workers)

    def _joined(self, found: Iterable[Arrays]) -> dict[str, Values]:
        """All rows of every output."""
        columns = Columns(len(self.samples), self.samples.source)
        for batch, arrays in zip(self._batches.heads, found, strict=True):
            columns.add(batch, {name: arrays[name] for name in self._program.final})
        return columns.values


@dataclass(frozen=True)
class _Pass:
    """Outputs of every batch, and the activations at the cuts."""

    switches: Switches
    kept: Kept


@dataclass(frozen=True)
class _Rows(Sequence[Batch]):
    """Batches whose feeds are kept.

    Attributes:
        heads: the batches without their feeds.
        parts: arrays of every batch, with the names of those that are fed.
    """

    heads: Sequence[Batch]
    parts: tuple[tuple[Kept, frozenset[str]], ...]

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> _Rows:
        """Batches, read."""
        heads: list[Batch] = []

        def feeds() -> Iterator[Arrays]:
            for batch in batches:
                heads.append(replace(batch, feed={}))
                yield batch.feed

        kept = Kept(feeds(), KEPT_BYTES)
        return cls(heads, ((kept, frozenset(kept.specs)),))

    def beside(self, kept: Kept, names: frozenset[str]) -> _Rows:
        """With other arrays fed, too."""
        return _Rows(self.heads, (*self.parts, (kept, names)))

    @property
    def specs(self) -> Specs:
        """Of what is fed."""
        return {name: kept.specs[name] for kept, names in self.parts for name in names}

    def __len__(self) -> int:
        return len(self.heads)

    def __getitem__(self, index: Any) -> Any:
        feed: Arrays = {}
        for kept, names in self.parts:
            feed |= kept.take(index, names)
        return replace(self.heads[index], feed=feed)


@dataclass(frozen=True)
class _OwnRows(Sequence[Arrays]):
    """Some outputs of every batch, without the rows that only fill up a fixed batch."""

    kept: Kept
    heads: Sequence[Batch]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.heads)

    def __getitem__(self, index: Any) -> Any:
        found = self.kept.take(index, self.names)
        return {name: self.heads[index].own(array) for name, array in found.items()}


class _Program:
    """The nodes of a float graph in an order they can run in, and the quantizers that each input may have.

    Attributes:
        nodes: of the float graph.
        final: names of the graph's outputs, as far as they can be computed (`graph.foreign.View`).
        measured: names of the tensors that noise is measured on (`selecting.measured_tensors`).
        outputs: both, without repeats.
        quantized: (node, index of input) -> the tensor that the input reads when it is quantized.
        changing: positions of the nodes with such inputs.
    """

    def __init__(self, quantization: Quantization) -> None:
        graph = in_order(copied(quantization.graph))
        rewritten = quantization.rewritten()
        plain, full = export(graph), export(rewritten)
        self.nodes = [_copy(node) for node in plain.graph.node]
        self.final = list(View.of(plain.graph).outputs)
        self.measured = measured_tensors(graph)
        self.outputs = list(dict.fromkeys([*self.final, *self.measured]))
        opsets = [onnx.helper.make_opsetid(opset.domain, opset.version) for opset in plain.opset_import]
        self._header = {"opset_imports": opsets, "ir_version": plain.ir_version}
        self._position = {node.name: position for position, node in enumerate(self.nodes)}
        after = {node.name: node for node in full.graph.node}
        self._corrections_of = quantization.corrections_of
        self.quantized = {
            (node, index): after[node].input[index]
            for node, index in self._inputs(quantization.plan)
            if node in after
        }
        self.changing = sorted({self._position[name] for name, _ in self.quantized})
        self._made_by = {node.output[0]: _copy(node) for node in full.graph.node if node.op_type in QDQ_OPS}
        self._values: dict[str, NDArray] = {}
        for tensor in [*graph.tensors().values(), *rewritten.tensors().values()]:
            if isinstance(tensor, gs.Constant) and not _codes(tensor):
                self._values[tensor.name] = tensor.values
        for node in rewritten.nodes:
            if node.op == "DequantizeLinear" and isinstance(node.inputs[0], gs.Constant):
                codes, scale = node.inputs[0].values, node.inputs[1].values
                self._values[node.outputs[0].name] = dequantize(codes, scale, axis=node.attrs["axis"])
        self._shared = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values))
            for name, values in self._values.items()
            if values.dtype == np.float32 and values.nbytes > SHARED_BYTES
        }
        self._alive = self._alive_at(self.changing)

    def switches(self, plan: Plan) -> Switches:
        """The quantized inputs of a plan.

        Raises:
            InputError: one of them is not quantized with all of the quantization's plan.
        """
        inputs = self._inputs(plan)
        if strange := sorted(inputs - self.quantized.keys()):
            raise InputError(f"the plan is not part of the quantization's: '{strange[0][0]}'")
        return frozenset(inputs)

    def _inputs(self, plan: Plan) -> set[tuple[str, int]]:
        """The inputs that a plan gives other tensors: quantized ones, and corrected biases."""
        return plan.inputs | {(each.node, each.index) for each in self._corrections_of(plan)}

    def first_change(self, switches: Switches) -> int:
        """Position of the first node that has one of these inputs; behind the last if there are none."""
        return min((self._position[node] for node, _ in switches), default=len(self.nodes))

    def alive(self, position: int) -> frozenset[str]:
        """Tensors computed in front of a position in `changing`, and read behind it or outputs; none at 0."""
        return self._alive.get(position, frozenset())

    def part(
        self, switches: Switches, start: int, specs: Specs, names: Iterable[str]
    ) -> tuple[bytes, dict[str, onnxruntime.OrtValue]]:
        """The model that computes named tensors from the cut `start`, and the weights that it shares.

        Args:
            specs: of what may be its inputs.
        """
        needed = set(names)
        nodes: list[onnx.NodeProto] = []
        for node in reversed(self.nodes[start:]):
            if not needed.isdisjoint(node.output):
                chain = [*self._switched(node, switches)]
                nodes += reversed(chain)
                needed.update(name for each in chain for name in reads(each))
        unique = {node.name: node for node in reversed(nodes)}
        graph = onnx.helper.make_graph(
            list(unique.values()),
            "part",
            [_value_info(name, *specs[name]) for name in sorted(needed & specs.keys())],
            [onnx.ValueInfoProto(name=name) for name in names],
            [self._initializer(name) for name in sorted(needed & self._values.keys())],
        )
        model = onnx.helper.make_model(graph, **self._header)
        return model.SerializeToString(), {n: self._shared[n] for n in sorted(needed & self._shared.keys())}

    def _switched(self, node: onnx.NodeProto, switches: Switches) -> Iterator[onnx.NodeProto]:
        """The node with quantized inputs where `switches` says, behind the quantizers that it reads."""
        switched = _copy(node)
        for index in range(len(node.input)):
            if (node.name, index) in switches:
                switched.input[index] = self.quantized[node.name, index]
                if switched.input[index] not in self._values:
                    dequantizer = self._made_by[switched.input[index]]
                    yield self._made_by[dequantizer.input[0]]
                    yield dequantizer
        yield switched

    def _initializer(self, name: str) -> onnx.TensorProto:
        values = self._values[name]
        if name not in self._shared:
            return onnx.numpy_helper.from_array(values, name)
        external = onnx.TensorProto(
            name=name, data_type=onnx.TensorProto.FLOAT, dims=values.shape, data_location="EXTERNAL"
        )
        external.external_data.add(key="location", value="memory")
        return external

    def _alive_at(self, positions: Iterable[int]) -> dict[int, frozenset[str]]:
        made = {name: position for position, node in enumerate(self.nodes) for name in node.output if name}
        last = dict.fromkeys(self.outputs, len(self.nodes))
        for position, node in enumerate(self.nodes):
            for name in reads(node):
                last[name] = max(last.get(name, 0), position)
        return {
            position: frozenset(
                name for name, source in made.items() if source < position <= last.get(name, -1)
            )
            for position in positions
        }


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    """The node alone: one that is part of a model keeps all of the model in memory."""
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    return alone


def _codes(tensor: gs.Constant) -> bool:
    """Whether a constant is a quantized weight: what is kept of it is the dequantized one."""
    return tensor.dtype == np.int8 and tensor.outputs[0].op == "DequantizeLinear"


def _value_info(name: str, dtype: np.dtype, shape: Shape) -> onnx.ValueInfoProto:
    """Dtype and shape of an input; dimensions that differ between batches are dynamic."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    return onnx.helper.make_tensor_value_info(name, kind, shape)
