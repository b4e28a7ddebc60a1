"""Where an INT8 deployment departs: every tensor in fp32, in the simulation, and in the engine.

fp32 against simulation is what quantization costs; simulation against engine is where TensorRT departs
from the Q/DQ model. Tensors are compared in the order in which the model computes them, so the first one that
departs is where to look.

A fix may have changed what a tensor holds, without changing what the model computes (`gate.changed`). That is
taken off before such a tensor is compared with fp32. The model's outputs are always compared as they are.

The engine is built from the same Q/DQ model with the compared tensors marked as outputs. That keeps TensorRT
from fusing across them: it is a probe of the arithmetic, not the engine that is deployed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from trtq.backends.builders import builder
from trtq.backends.engine import is_engine
from trtq.backends.interface import BuildOptions, Profile, find_gpu
from trtq.backends.runner import open_engine
from trtq.data.batches import Arrays, Batch, batches
from trtq.data.samples import Samples
from trtq.errors import InputError, TrtqError
from trtq.escapes import html_table
from trtq.files import PathLike
from trtq.gate.changed import Twin, channel_axis, difference
from trtq.graph.fold import fold
from trtq.graph.foreign import View
from trtq.graph.inputs import fixed_batch
from trtq.graph.model import QDQ_OPS, Model, load_model, save_model
from trtq.graph.products import product
from trtq.graph.surgery import copied, in_order
from trtq.graph.twin import float_twin
from trtq.job import profile_from_samples
from trtq.scratch import scratch_folder
from trtq.simulation.finite import compared
from trtq.simulation.rows import Run, Runner, naming_rows, runs_on_several, taken
from trtq.simulation.similarity import decibels

PART_DB = 30.0
"""Simulation and engine part where their SQNR is below this, in dB. Both should round to the same INT8
codes; sums added in another order may flip a code here and there, which is little noise. Two orders of
ONNX Runtime's own differ by 140 dB on the demo; what engines do is to be measured on a GPU."""

BATCH = 8

_PROBE = (
    "The compared tensors are outputs of this engine, which TensorRT does not fuse across: it is a probe of"
    " the arithmetic, not the engine that is deployed."
)

_CHANGED = (
    "* A fix changed what it holds, by a factor and an offset of each channel; what reads it makes up for\n"
    "  it. They were found with the float model that has the fix, and taken off before comparing."
)

SAMPLES = 16
"""Samples that are enough to compare on."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """One tensor, in dB over all rows.

    Attributes:
        simulation_db: SQNR of the simulation against fp32.
        engine_db: SQNR of the engine against the simulation; None without a GPU.
        changed: a fix changed what the tensor holds, which was taken off for `simulation_db`.
    """

    tensor: str
    node: str
    op: str
    simulation_db: float
    engine_db: float | None
    changed: bool = False

    @property
    def made_by(self) -> str:
        """The operator, marked where a fix changed the tensor."""
        return f"{self.op} *" if self.changed else self.op


@dataclasses.dataclass(frozen=True)
class ThreeWay:
    """The report: tensors in topological order.

    Attributes:
        rows: samples that were run.
        engine: name of the GPU that ran the engine; None: none ran, and only fp32 and the simulation were
            compared.
        failure: why the engine did not run although there is a GPU.
    """

    tensors: tuple[Compared, ...]
    rows: int
    engine: str | None
    failure: str | None = None

    @property
    def parts_at(self) -> Compared | None:
        """The first tensor where simulation and engine part (`PART_DB`); None if they never do."""
        return next((t for t in self.tensors if t.engine_db is not None and t.engine_db < PART_DB), None)

    def text(self) -> str:
        """A line per tensor, and what follows from them."""
        width = max(len(t.tensor) for t in self.tensors)
        missing = "needs a GPU" if self.failure is None else "did not run"
        lines = [f"{'tensor':<{width}}  fp32/simulation  simulation/engine   ({self.rows} rows, SQNR in dB)"]
        lines += [
            f"{t.tensor:<{width}}  {t.simulation_db:>15.1f}  "
            + (missing.rjust(17) if t.engine_db is None else f"{t.engine_db:>17.1f}")
            + f"   {t.made_by}"
            for t in self.tensors
        ]
        return "\n".join([*lines, "", self._conclusion()])

    def __repr__(self) -> str:
        lowest = min(self.tensors, key=lambda t: t.simulation_db)
        where = f"{lowest.simulation_db:.1f} dB at {lowest.tensor}"
        return f"<ThreeWay: {len(self.tensors)} tensors, lowest {where}>"

    def _repr_html_(self) -> str:
        rows = [
            (
                t.tensor,
                t.made_by,
                f"{t.simulation_db:.1f}",
                "" if t.engine_db is None else f"{t.engine_db:.1f}",
            )
            for t in self.tensors
        ]
        head = ("tensor", "made by", "fp32/simulation, dB", "simulation/engine, dB")
        return html_table(f"{self.rows} rows. {self._conclusion()}", rows, head)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        parts_at = self.parts_at
        return {**dataclasses.asdict(self), "parts_at": parts_at.tensor if parts_at else None}

    def _conclusion(self) -> str:
        changed = f"{_CHANGED}\n" if any(t.changed for t in self.tensors) else ""
        return changed + self._found()

    def _found(self) -> str:
        if self.failure is not None:
            return f"Simulation only, the engine failed: {self.failure}"
        if self.engine is None:
            return "Simulation only: the engine's column needs a GPU."
        if self.parts_at is None:
            found = f"agree on every tensor, to {PART_DB:.0f} dB or better."
        else:
            found = (
                f"part at '{self.parts_at.tensor}', the output of {self.parts_at.op} '{self.parts_at.node}':"
                f" {self.parts_at.engine_db:.1f} dB."
            )
        return f"Simulation and engine ({self.engine}) {found}\n{_PROBE}"


def some_rows(samples: Samples) -> Samples:
    """The first `SAMPLES` samples, or all where there are fewer."""
    return samples.subset(range(min(SAMPLES, len(samples) // samples.group)))


def refuse_engines(models: Iterable[PathLike]) -> None:
    """Refuse engines, which show no tensors.

    Raises:
        InputError: for the first of them.
    """
    if engines := [model for model in map(Path, models) if is_engine(model)]:
        raise InputError(
            "an engine shows its outputs only, not its tensors",
            file=engines[0],
            remedy="give the Q/DQ model that it was built from: an engine of that is built",
        )


def compare_three(
    reference: PathLike,
    int8: PathLike,
    samples: Samples,
    *,
    backend: str | None = None,
    profile: Profile | None = None,
    threads: int | None = None,
    plugins: Sequence[str] = (),
) -> ThreeWay:
    """Run fp32, the simulation, its float twin and, if there is a GPU, the engine; compare tensor by tensor.

    Compared are the outputs of weighted nodes and of the activations right behind them, and the model's
    outputs or, in front of an operator without a reference, what goes into it; as far as both models have a
    tensor of that name. Memory holds one batch of them.

    Args:
        reference: fp32 ONNX model; it is folded, as `trtq quantize` does.
        int8: the same model with Q/DQ.
        samples: a few dozen rows will do.
        profile: of the engine; None: batches of up to 8 and the samples' shapes.
        plugins: libraries of TensorRT plugins.

    Raises:
        InputError: a model that does not load or run, or two models without a tensor in common. Where only
            the engine fails, the report says so instead.
    """
    fp32, quantized = load_model(reference), load_model(int8)
    fold(fp32.graph)
    view = View.of(fp32.graph)
    compared = _tensors(quantized, fp32.graph.tensors().keys() - view.hidden.keys(), view.outputs)
    if not compared:
        raise InputError(
            "the two models have no tensor in common",
            file=int8,
            remedy="give the fp32 model and the Q/DQ model that was made from it",
        )
    names = [tensor for tensor, _ in compared]
    graphs = fp32.graph, quantized.graph, float_twin(quantized.graph)
    *simulations, twin = [Runner(graph, names, threads=threads).run for graph in graphs]
    axes = {tensor: channel_axis(node) for tensor, node in compared}

    def beside() -> Twin:
        return Twin(twin, axes, view.outputs)

    fixed = samples.fixed_batch or fixed_batch(quantized.inputs)
    rows = batches(samples.rows(), fixed or BATCH, fixed or 1, samples.axes)
    parts = list(taken(simulations[0], rows))
    gpu, failure, found = find_gpu(), None, None
    if gpu is not None:
        if profile is None:
            only_one = not runs_on_several(fp32.graph, samples)
            profile = profile_from_samples(quantized.inputs, [samples], BATCH, only_one=only_one)
        try:
            with _engine(quantized, names, profile, backend, plugins) as engine:
                found = _sqnr([*simulations, engine], names, samples, parts, beside())
        except TrtqError as error:  # what the CPU has to say stands without it
            failure = str(error)
    (simulated, *on_engine), changed = found or _sqnr(simulations, names, samples, parts, beside())
    return ThreeWay(
        tensors=tuple(
            Compared(
                t,
                node.name,
                node.op,
                changed.get(t, simulated[t]),
                on_engine[0][t] if on_engine else None,
                t in changed,
            )
            for t, node in compared
        ),
        rows=len(samples),
        engine=gpu.name if gpu is not None and on_engine else None,
        failure=failure,
    )


def _tensors(model: Model, known: set[str], outputs: Container[str]) -> list[tuple[str, gs.Node]]:
    """Tensors to compare, in topological order, with the node that makes each.

    Args:
        known: those of the fp32 model that can be computed.
        outputs: are compared whatever makes them.
    """
    found = []
    for node in in_order(copied(model.graph)).nodes:
        near = product(node) or any(t.inputs and product(t.inputs[0]) for t in node.inputs)
        for tensor in node.outputs:
            wanted = tensor.name in outputs or (near and node.op not in QDQ_OPS)
            if wanted and tensor.name in known:
                found.append((tensor.name, node))
    return found


@contextlib.contextmanager
def _engine(
    model: Model, names: list[str], profile: Profile, backend: str | None, plugins: Sequence[str]
) -> Iterator[Run]:
    """The engine of the model with `names` as its outputs, on the GPU."""
    graph = copied(model.graph)
    tensors = graph.tensors()
    graph.outputs = [tensors[name] for name in names]
    with scratch_folder() as folder:
        marked, plan = folder / "marked.onnx", folder / "marked.plan"
        save_model(graph, marked)
        options = BuildOptions(plugin_lib=tuple(plugins))
        builder(backend).build(marked, plan, profile=profile, options=options)
        with open_engine(plan, plugins) as loaded:
            yield loaded.infer


def _sqnr(
    runs: Sequence[Run], names: list[str], samples: Samples, parts: Iterable[Batch], twin: Twin
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """SQNR in dB of each run against the one before it, per tensor, summed over all rows.

    Args:
        runs: fp32, the simulation, and perhaps the engine.

    Returns:
        with it, that of the simulation for the tensors that a fix changed, once that is taken off.
    """
    signal = [dict.fromkeys(names, 0.0) for _ in runs[1:]]
    noise = [dict.fromkeys(names, 0.0) for _ in runs[1:]]

    def on(run: Run, batch: Batch) -> Arrays:
        with naming_rows(run, batch, samples):
            return dict(run(batch.feed))

    for batch in parts:
        before = on(runs[0], batch)
        for index, run in enumerate(runs[1:]):
            after = on(run, batch)
            for name in names:
                r, c = compared(np.asarray(before[name], np.float64), np.asarray(after[name], np.float64))
                signal[index][name] += float(np.sum(r * r))
                noise[index][name] += difference(r, c)
            if index == 0:
                twin.add(before, on(twin.run, batch), after)
            before = {name: np.array(after[name]) for name in names}
    return [
        {name: float(decibels(np.float64(s[name]), np.float64(n[name]))) for name in names}
        for s, n in zip(signal, noise, strict=True)
    ], twin.changed()
