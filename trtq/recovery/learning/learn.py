"""Learning what calibration cannot measure: ranges, biases and weights, with the fp32 model as the teacher.

Quantization-aware training with fake quantization and straight-through gradients (paper section 5.2) and
learned ranges (section 5.3), from the ONNX model alone. The loss is the noise of the outputs against the fp32
model's, sum (r - c)² / sum r², so no labels are needed; class numbers, where there are some, add their
cross-entropy. An output that mixes scales counts with the mean over its components, which leads gradients to
all of them; what is kept is judged by the worst, as everywhere.

A few hundred rows are enough because little has to change: all steps start from the best calibration, weights
are learned in units of their scale, with a learning rate that moves them by less than one code in total,
and half-cosine decay. What leaves the least noise on rows held back is kept.

First comes block after block (`blocks`), each on its own: from what the quantized blocks in front of it make,
half of the values as they are in fp32 (Wei et al. 2022, QDrop), to what it makes in fp32. A block that
does not do better on rows held back stays as it was. Then all goes on together, in short steps with the noise
of the outputs as the loss, until nothing is gained any more. The INT8 codes that come out are those that were
trained with: `Quantization.rewritten` writes exactly them.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.budget import NO_BUDGET, Budget
from trtq.console import Console
from trtq.data.batches import Arrays, Batch
from trtq.data.samples import Samples
from trtq.errors import InputError, MissingBackendError
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.graph.selecting import up_to_measured
from trtq.graph.weights import is_plain
from trtq.recipe import Recipe
from trtq.scratch import scratch_folder
from trtq.simulation.finite import check_reference
from trtq.simulation.processors import patient_openmp, processors
from trtq.simulation.rows import taken
from trtq.simulation.similarity import Reference, noise_db

if TYPE_CHECKING:
    from torch import Tensor

    from trtq.recovery.learning.blocks import Block
    from trtq.recovery.learning.pupil import Pupil

BATCH = 8
MOST_ROWS = 512
"""Rows to learn from, evenly spread over the data."""

BLOCK_STEPS = 100
"""For each block, one batch each."""

FEWEST_STEPS, MOST_STEPS = 80, 300
MAC_BUDGET = 7.5e11
"""Steps of the whole that follow: as many as fit into this many multiply-accumulates within those bounds,
where a step costs three times the forward pass."""

BLOCK_BYTES = 2**29
"""What the values of all rows between two blocks may take; as many rows as do not exceed it teach blocks.
They are held three times: in fp32, as quantized, and as the target."""

KEPT_EXACT = 0.5
"""The part of the values in front of a block that are as in fp32 while it learns."""


@dataclass(frozen=True)
class Rates:
    """Adam's learning rates: of the logarithms of scales, of biases in units of their mean magnitude, and of
    weights in units of their scale."""

    scales: float
    biases: float
    codes: float


BLOCK_RATES = Rates(5e-3, 1e-2, 5e-2)
FINE_RATES = Rates(2e-4, 1e-4, 1e-3)
"""Of the whole: how long a step may be differs between networks by more than ten times, and longer ones harm
some."""

ROUND = 20
"""Steps of the whole between looks at the rows held back: as many epochs as make at least these."""

PATIENCE = 2
"""Rounds in a row without `LEAST_GAIN_DB`, after which learning ends."""

LABEL_WEIGHT = 0.05
"""Of the cross-entropy with labels, added to the noise against the teacher."""

LEAST_GAIN_DB = 0.05

_COMPILER_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


Answer: TypeAlias = "dict[str, list[Tensor]]"
"""Kind of parameter -> the values of all of that kind."""


@dataclass(frozen=True)
class Learned:
    """What came of learning.

    Attributes:
        quantization: the start where nothing was better.
        before_db, after_db: SQNR of the outputs on the rows held back.
        steps: that were taken.
        whole: whether those are all that were planned; a budget may end learning before.
    """

    quantization: Quantization
    before_db: float
    after_db: float
    steps: int
    whole: bool


@dataclass(frozen=True)
class Checkpoint:
    """How an interrupted run goes on.

    Attributes:
        state: what `save` was given before the interruption; None: learning begins.
        save: called after each block and each round.
    """

    state: bytes | None = None
    save: Callable[[bytes], object] = lambda state: None


NO_CHECKPOINT = Checkpoint()


def learn(
    quantization: Quantization,
    teacher: gs.Graph,
    fitting: Samples,
    held_back: Samples,
    console: Console,
    *,
    recipe: Recipe | None = None,
    budget: Budget = NO_BUDGET,
    checkpoint: Checkpoint = NO_CHECKPOINT,
) -> Learned:
    """Learn from `fitting`, keep what is best on `held_back`.

    Runs on a GPU where PyTorch finds one, else on the CPU. Convolutions do without TF32, whose ten bits would
    move values to other INT8 codes than those of the CPU.

    Args:
        teacher: the fp32 model, folded; a fix may have changed the biases of the quantization's own graph.
        recipe: `labels` is the target of `fitting` that holds class numbers (rows,), and the model then needs
            one output (rows, classes); `threads`; with `ignore_nonfinite` only what is finite in the
            teacher's outputs is learned from.
        budget: learning stops when it is spent, with what was best until then.

    Raises:
        MissingBackendError: PyTorch is not installed.
        InputError: an operator cannot be differentiated, the labels do not suit the model, or the teacher's
            outputs are not finite.
    """
    try:
        with patient_openmp():
            import torch
    except ImportError as error:
        raise MissingBackendError(
            "PyTorch is not installed, and learning needs it", remedy="pip install 'trtq[qat]'"
        ) from error
    recipe = recipe or Recipe()
    before = torch.get_num_threads()
    torch.set_num_threads(recipe.threads or processors())
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with flags, _compiler_folder():
            run = _Run(quantization, teacher, fitting, held_back, recipe, device)
            return run.learn(console, budget, checkpoint)
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _compiler_folder() -> Iterator[None]:
    """Where PyTorch's compiler, which its optimizers import, makes a folder that it would leave for good."""
    if _COMPILER_FOLDER in os.environ:
        yield
        return
    with scratch_folder() as folder:
        os.environ[_COMPILER_FOLDER] = str(folder)
        try:
            yield
        finally:
            del os.environ[_COMPILER_FOLDER]


@dataclass(frozen=True)
class _Lesson:
    """One batch: its feed, what the teacher says of it, and labels."""

    feed: dict[str, Tensor]
    expected: dict[str, Tensor]
    labels: Tensor | None


@dataclass
class _Stage:
    """A lesson in front of a block.

    Attributes:
        exact, found: the block's source in fp32, and as the quantized blocks before make it; None in front of
            the first.
        target: what the block makes in fp32; for the last one what the teacher says.
    """

    lesson: _Lesson
    exact: Tensor | None = None
    found: Tensor | None = None
    target: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Progress:
    """How far learning has come.

    Attributes:
        best: what did best on the rows held back; `noise`: how much it left.
        block: how many blocks are learned.
        round: how many rounds of the whole were taken.
        idle: of these, the last ones that gained nothing.
        steps: that were taken in all.
    """

    best: Answer
    noise: float
    block: int = 0
    round: int = 0
    idle: int = 0
    steps: int = 0


class _Run:
    """The pupil, its lessons and its exams."""

    def __init__(
        self,
        quantization: Quantization,
        teacher: gs.Graph,
        fitting: Samples,
        held_back: Samples,
        recipe: Recipe,
        device: Any,
    ) -> None:
        import torch

        from trtq.recovery.learning.blocks import in_blocks
        from trtq.recovery.learning.pupil import Pupil
        from trtq.recovery.learning.torch_graph import TorchGraph

        self.given, self.device, self.ignore_nonfinite = quantization, device, recipe.ignore_nonfinite
        self.start = quantization = quantization.with_corrections_inside()
        part = up_to_measured(quantization.graph)
        self.pupil: Pupil = Pupil(replace(quantization, graph=part), device)
        self.biases = {name: self.pupil.make_trainable(name) for name in _biases(part)}
        self.codes = _own_weights(quantization)
        plan = quantization.plan
        self.blocks = in_blocks(
            self.pupil, {node for node, _ in plan.inputs}, {weight.node for weight in plan.weights}
        )
        self.exact = TorchGraph(up_to_measured(self.given.graph)).to(device)
        self.exact_nodes = {node.name: node for node in self.exact.nodes}
        self.teacher = TorchGraph(up_to_measured(teacher)).to(device)
        fitting, held_back = fitting.spread(MOST_ROWS), held_back.spread(MOST_ROWS)
        outputs = [tensor.name for tensor in quantization.graph.outputs]
        if (labels := recipe.labels) is not None and (len(outputs) != 1 or outputs != self.pupil.outputs):
            where = (
                f"this one has {', '.join(outputs)}, and can be learned up to {', '.join(self.pupil.outputs)}"
            )
            raise InputError("labels need a model with one output that can be learned", cause=where)
        numbers = None if labels is None else fitting.class_numbers(labels)
        self.lessons = list(self._lessons(fitting, numbers))
        if numbers is not None:
            (logits,) = self.lessons[0].expected.values()
            if logits.ndim != 2 or numbers.max() >= logits.shape[1]:
                raise InputError(
                    f"the labels '{labels}' do not suit the model's output",
                    file=fitting.source,
                    cause=f"they reach {numbers.max()}, the output is {tuple(logits.shape[1:])} for each row",
                )
        self.exams = list(self._lessons(held_back, None))
        self.reference = Reference([_arrays(exam.expected) for exam in self.exams])
        self.components = {
            name: [torch.from_numpy(own).to(device) for own in split.indices]
            for name, split in self.reference.components.items()
        }

    def learn(self, console: Console, budget: Budget, checkpoint: Checkpoint) -> Learned:
        before = self._exam()
        at = _Progress(self._answer(), before)
        optimizer, rates = self._optimizer(FINE_RATES)
        if checkpoint.state is not None:
            at = self._resume(checkpoint.state, optimizer)
        epochs = math.ceil(ROUND / len(self.lessons))
        length = epochs * len(self.lessons)
        rounds = math.ceil(_steps(self.start.plan) / length)

        def save() -> None:
            checkpoint.save(self._state(at, optimizer))

        todo = len(self.blocks) * BLOCK_STEPS + rounds * length - at.steps
        with console.progress("learn", todo, "step") as advance:
            if at.block < len(self.blocks):
                self._learn_blocks(at, console, budget, advance, save)
            while at.round < rounds and at.idle < PATIENCE and not budget.over:
                random = np.random.default_rng(at.round)
                order = np.concatenate([random.permutation(len(self.lessons)) for _ in range(epochs)])
                for position, index in enumerate(order):
                    _set_rates(optimizer, rates, (at.round + position / length) / rounds)
                    self._step(optimizer, self._loss(self.lessons[index]))
                    advance(1)
                    if budget.over:
                        break
                gain = self._examine(at)
                if budget.over:
                    break
                at.round, at.steps = at.round + 1, at.steps + length
                at.idle = 0 if gain >= LEAST_GAIN_DB else at.idle + 1
                console.say("learn", f"round {at.round} of {rounds}: {self._text(at)}")
                save()
        gain = noise_db(at.noise) - noise_db(before)
        quantization = self._exported(at.best) if gain >= LEAST_GAIN_DB else self.given
        whole = at.round == rounds or at.idle == PATIENCE
        return Learned(quantization, noise_db(before), noise_db(at.noise), at.steps, whole)

    def _learn_blocks(
        self,
        at: _Progress,
        console: Console,
        budget: Budget,
        advance: Callable[[int], object],
        save: Callable[[], object],
    ) -> None:
        """Learn block after block, and go on with the best so far."""
        step = self._stride()
        lessons, exams = ([_Stage(lesson) for lesson in part[::step]] for part in (self.lessons, self.exams))
        for position, block in enumerate(self.blocks):
            for stage in (*lessons, *exams):
                stage.target = self._target(block, stage)
            if position >= at.block:
                self._learn_block(position, lessons, exams, budget, advance)
                if budget.over:
                    break
                at.block, at.steps = position + 1, at.steps + BLOCK_STEPS
            if position + 1 < len(self.blocks):
                if at.block == position + 1:
                    save()
                for stage in (*lessons, *exams):
                    self._pass(block, stage)
        self._examine(at)
        self._restore(at.best)
        if at.block == len(self.blocks):
            console.say("learn", f"{len(self.blocks)} blocks: {self._text(at)}")
            save()

    def _stride(self) -> int:
        """Of how many lessons one teaches blocks, so that what lies between two fits into `BLOCK_BYTES`."""
        import torch

        first, count = self.lessons[0], len(self.lessons) + len(self.exams)
        between = [block.source for block in self.blocks if block.source is not None]
        with torch.no_grad():
            values = self.exact.run(self.exact.nodes, first.feed, between).values()
        return math.ceil(count * max((value.nbytes for value in values), default=0) / BLOCK_BYTES) or 1

    def _learn_block(
        self,
        position: int,
        lessons: Sequence[_Stage],
        exams: Sequence[_Stage],
        budget: Budget,
        advance: Callable[[int], object],
    ) -> None:
        """Learn one block; it stays as it was where that leaves no less noise on the rows held back."""
        import torch

        block = self.blocks[position]
        optimizer, rates = self._optimizer(BLOCK_RATES, block)
        if not rates:
            advance(BLOCK_STEPS)
            return
        before, start = self._block_exam(block, exams), self._answer()
        random = np.random.default_rng(position)
        mask = torch.Generator(self.device).manual_seed(position)
        for step in range(BLOCK_STEPS):
            if budget.over:
                break
            stage = lessons[int(random.integers(len(lessons)))]
            source = stage.found
            if source is not None and stage.exact is not None:
                exact = torch.rand(source.shape, generator=mask, device=self.device) < KEPT_EXACT
                source = torch.where(exact, stage.exact, source)
            _set_rates(optimizer, rates, step / BLOCK_STEPS)
            self._step(optimizer, self._block_noise(block, stage, source))
            advance(1)
        if not self._block_exam(block, exams) < before:
            self._restore(start)

    def _target(self, block: Block, stage: _Stage) -> dict[str, Tensor]:
        """What a block makes in fp32 of its source in fp32; for the last one what the teacher says."""
        import torch

        if block is self.blocks[-1]:
            return stage.lesson.expected
        with torch.no_grad():
            return self.exact.run(
                [self.exact_nodes[node.name] for node in block.nodes],
                _values(block, stage, stage.exact),
                block.outputs,
            )

    def _pass(self, block: Block, stage: _Stage) -> None:
        """Move a lesson behind a block that is not the last."""
        import torch

        (name,) = block.outputs
        with torch.no_grad():
            stage.found = self.pupil.run(block.nodes, _values(block, stage, stage.found), [name])[name]
        stage.exact = stage.target[name]

    def _block_noise(self, block: Block, stage: _Stage, source: Tensor | None) -> Tensor:
        """Noise of what a block makes of its source, relative to the signal."""
        found = self.pupil.run(block.nodes, _values(block, stage, source), block.outputs)
        if block is self.blocks[-1]:
            return self._noise(stage.lesson, found)
        (name,) = block.outputs
        expected = stage.target[name]
        return (expected - found[name]).square().sum() / expected.square().sum().clamp_min(1e-30)

    def _block_exam(self, block: Block, exams: Sequence[_Stage]) -> float:
        """Mean noise on rows held back."""
        import torch

        with torch.no_grad():
            return float(np.mean([float(self._block_noise(block, exam, exam.found)) for exam in exams]))

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def _examine(self, at: _Progress) -> float:
        """Keep what there is if it is the best so far.

        Returns:
            what is gained, dB.
        """
        noise = self._exam()
        gain = noise_db(noise) - noise_db(at.noise)
        if gain > 0:
            at.best, at.noise = self._answer(), noise
        return gain

    def _text(self, at: _Progress) -> str:
        return f"{noise_db(at.noise):.2f} dB at best on rows held back"

    def _state(self, at: _Progress, optimizer: Any) -> bytes:
        """All that `_resume` needs to go on."""
        import torch

        buffer = io.BytesIO()
        torch.save(vars(at) | {"now": self._answer(), "optimizer": optimizer.state_dict()}, buffer)
        return buffer.getvalue()

    def _resume(self, state: bytes, optimizer: Any) -> _Progress:
        """Go back to a state."""
        import torch

        stored = torch.load(io.BytesIO(state), map_location=self.device, weights_only=True)
        self._restore(stored.pop("now"))
        optimizer.load_state_dict(stored.pop("optimizer"))
        return _Progress(**stored)

    def _lessons(self, samples: Samples, labels: NDArray[np.int64] | None) -> Iterator[_Lesson]:
        import torch

        def taught(feed: Arrays) -> dict[str, Tensor]:
            with torch.no_grad():
                return self.teacher(self._tensors(feed))

        for batch in taken(taught, samples.batches(BATCH)):
            feed, outputs = self._tensors(batch.feed), taught(batch.feed)
            expected = {name: value for name, value in outputs.items() if value.is_floating_point()}
            if not expected:
                raise InputError("none of the model's outputs is a float, so there is nothing to learn from")
            arrays = {name: value.cpu().numpy() for name, value in expected.items()}
            check_reference(arrays, ignore_nonfinite=self.ignore_nonfinite, samples=samples, batch=batch)
            yield _Lesson(feed, expected, None if labels is None else self._batch_of(labels, batch))

    def _tensors(self, feed: Arrays) -> dict[str, Tensor]:
        import torch

        return {name: torch.from_numpy(values).to(self.device) for name, values in feed.items()}

    def _batch_of(self, labels: NDArray[np.int64], batch: Batch) -> Tensor:
        import torch

        own = labels[batch.start : batch.start + batch.rows]
        padded = np.concatenate([own, np.repeat(own[-1:], batch.padding)])
        return torch.from_numpy(padded).to(self.device)

    def _loss(self, lesson: _Lesson) -> Tensor:
        import torch.nn.functional as F

        found = self.pupil(lesson.feed)
        loss = self._noise(lesson, found)
        if lesson.labels is not None:
            (logits,) = found.values()
            loss = loss + LABEL_WEIGHT * F.cross_entropy(logits, lesson.labels)
        return loss

    def _noise(self, lesson: _Lesson, found: dict[str, Tensor]) -> Tensor:
        """Noise of the outputs relative to the signal, averaged over an output's components and outputs."""
        ratios = []
        for name, expected in lesson.expected.items():
            signal = self._parts(name, _signal(expected))
            error = self._parts(name, _error(expected, found[name]))
            parts = [
                e.square().sum() / s.square().sum().clamp_min(1e-30)
                for e, s in zip(error, signal, strict=True)
            ]
            ratios.append(sum(parts[1:], parts[0]) / len(parts))
        return sum(ratios[1:], ratios[0]) / len(ratios)

    def _parts(self, name: str, values: Tensor) -> list[Tensor]:
        """The values of an output's components; all where it is whole."""
        axis = self.reference.components[name].axis
        return [values] if axis is None else [values.index_select(axis, own) for own in self.components[name]]

    def _exam(self) -> float:
        """Noise on all the rows held back, relative to their signal (`Reference.noise`)."""
        import torch

        with torch.no_grad():
            return self.reference.noise(_arrays(self.pupil(exam.feed)) for exam in self.exams)

    def _optimizer(self, rates: Rates, block: Block | None = None) -> tuple[Any, list[float]]:
        """Adam for what a block reads, or the whole, and the learning rate of each of its groups."""
        import torch

        pupil, nodes = self.pupil, self.pupil.nodes if block is None else block.nodes
        inputs = {(node.name, i) for node in nodes for i in range(len(node.inputs))}
        plan, read = self.start.plan, {tensor.name for node in nodes for tensor in node.inputs}
        ranges = {edge.range for edge in plan.edges if (edge.node, edge.index) in inputs}
        weights = {(w.tensor, w.axis) for w in plan.weights if (w.node, w.index) in inputs}
        groups: list[tuple[list[Tensor], float]] = [
            ([scale for name, scale in pupil.log_scales.items() if name in ranges], rates.scales),
            ([pupil.codes[key] for key in self.codes if key in weights], rates.codes),
        ]
        for name, bias in self.biases.items():
            if name in read:
                groups.append(([bias], rates.biases * float(bias.detach().abs().mean().clamp_min(1e-8))))
        groups = [(held, rate) for held, rate in groups if held]
        if not groups:
            return None, []
        parameters = [{"params": held, "lr": rate} for held, rate in groups]
        return torch.optim.Adam(parameters, betas=(0.9, 0.99)), [rate for _, rate in groups]

    def _answer(self) -> Answer:
        """A copy of everything that is learned."""
        return {kind: [p.detach().clone() for p in held] for kind, held in self._parameters().items()}

    def _restore(self, answer: Answer) -> None:
        for kind, held in self._parameters().items():
            for parameter, value in zip(held, answer[kind], strict=True):
                parameter.data.copy_(value)

    def _parameters(self) -> dict[str, list[Any]]:
        return {
            "scales": list(self.pupil.log_scales.values()),
            "biases": list(self.biases.values()),
            "codes": [self.pupil.codes[key] for key in self.codes],
        }

    def _exported(self, answer: Answer) -> Quantization:
        """The start with what was learned."""
        self._restore(answer)
        pupil, graph = self.pupil, self.start.graph.copy()
        tensors = graph.tensors()
        for name, bias in self.biases.items():
            tensors[name].values = bias.detach().cpu().numpy()
        weight_scales = dict(self.start.weight_scales)
        for key in self.codes:
            tensors[key[0]].values = pupil.weight(key).detach().cpu().numpy()
            weight_scales[key] = pupil.weight_scales[key].flatten().cpu().numpy()
        scales = dict(self.start.scales)
        for tensor in pupil.log_scales:
            scales[tensor] = np.float32(pupil.scale(tensor).detach().cpu().numpy())
        return replace(self.start, graph=graph, scales=scales, weight_scales=weight_scales)


_VECTORS = {
    "Conv": (2,),
    "ConvTranspose": (2,),
    "Gemm": (2,),
    "LayerNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "RMSNormalization": (1,),
    "InstanceNormalization": (1, 2),
    "BatchNormalization": (1, 2),
}
"""The inputs of an operator that scale or shift its channels."""


def _signal(expected: Tensor) -> Tensor:
    """What is expected, with 0 where it is not finite."""
    return expected.where(expected.isfinite(), 0)


def _error(expected: Tensor, found: Tensor) -> Tensor:
    """Expected minus found, 0 where what is expected is not finite."""
    return (expected - found).where(expected.isfinite(), 0)


def _values(block: Block, stage: _Stage, source: Tensor | None) -> dict[str, Tensor]:
    """What a block reads."""
    if block.source is None:
        return stage.lesson.feed
    assert source is not None
    return {**stage.lesson.feed, block.source: source}


def _set_rates(optimizer: Any, rates: Sequence[float], done: float) -> None:
    """The rates after a part of all steps, on a half cosine."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done))


def _steps(plan: Plan) -> int:
    affordable = MAC_BUDGET / max(3 * BATCH * plan.macs_per_row, 1)
    return int(min(max(affordable, FEWEST_STEPS), MOST_STEPS))


def _biases(graph: gs.Graph) -> list[str]:
    """Constants of one node alone that shift channels, or scale them in a norm; a MatMul's are in an Add.

    Those of types that NumPy lacks stay as they are.
    """
    found = []
    for node in graph.nodes:
        made = [op.op for tensor in node.inputs for op in tensor.inputs] if node.op == "Add" else []
        wanted = (0, 1) if made == ["MatMul"] else _VECTORS.get(node.op, ())
        for tensor in [node.inputs[index] for index in wanted if index < len(node.inputs)]:
            alone = isinstance(tensor, gs.Constant) and len(tensor.outputs) == 1 and is_plain(tensor)
            if alone and np.prod(tensor.shape) == max(tensor.shape, default=0):
                found.append(tensor.name)
    return found


def _own_weights(quantization: Quantization) -> Sequence[tuple[str, int]]:
    """(constant, axis) of the weights that nothing reads but quantizers along one axis."""
    tensors = quantization.graph.tensors()
    readers: dict[str, set[tuple[str, int]]] = {}
    axes: dict[str, set[int]] = {}
    for weight in quantization.plan.weights:
        readers.setdefault(weight.tensor, set()).add((weight.node, weight.index))
        axes.setdefault(weight.tensor, set()).add(weight.axis)
    return [
        (name, axis)
        for name, (axis, *others) in axes.items()
        if not others and len(tensors[name].outputs) == len(readers[name])
    ]


def _arrays(outputs: dict[str, Tensor]) -> dict[str, NDArray]:
    """The outputs as NumPy has them; on the CPU both share the memory."""
    return {name: values.detach().cpu().numpy() for name, values in outputs.items()}
