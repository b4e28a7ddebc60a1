"""Learning what calibration cannot measure: ranges, biases and weights, with the fp32 model as the teacher.

Quantization-aware training with fake quantization and straight-through gradients (paper section 5.2) and
learned ranges (section 5.3), from the ONNX model alone. The loss is the noise of the outputs against the fp32
model's, sum (r - c)² / sum r², so no labels are needed; class numbers, where there are some, add their
cross-entropy. An output that mixes scales counts with the mean over its components, which leads gradients to
all of them; what is kept is judged by the worst, as everywhere.

A few hundred rows are enough because little has to change: all steps start from the best calibration, weights
are learned in units of their scale, with a learning rate that moves them by less than one code in total,
and half-cosine decay. Of all epochs the one with the least noise on rows held back is kept.

First come ranges, biases and norms alone, then weights with them. Then all goes on from the best so far with
shorter steps, until nothing is gained any more: how long a step may be differs between networks by more than
ten times, and where the first ones were too long, the best so far is the start. The INT8 codes that come out
are those that were trained with: `Quantization.rewritten` writes exactly them.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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

    from trtq.recovery.learning.pupil import Pupil

BATCH = 8
MOST_ROWS = 512
"""Rows to learn from, evenly spread over the data."""

FEWEST_STEPS, MOST_STEPS = 160, 600
MAC_BUDGET = 1.5e12
"""Steps of a whole run, one batch each: as many as fit into this many multiply-accumulates within those
bounds, where a step costs three times the forward pass."""

FIRST = 0.2
"""The part of the steps in which the weights stay as they are."""

RATE_SCALES, RATE_BIASES, RATE_CODES = 1e-3, 5e-4, 5e-3
"""Adam's learning rates: of the logarithms of scales, of biases in units of their mean magnitude, and of
weights in units of their scale."""

FINE, FINE_SHARE = 0.2, 0.5
"""The fine steps that follow: their rates in units of the first ones', and how many there are for each."""

PATIENCE = 2
"""Epochs of fine steps in a row without `LEAST_GAIN_DB`, after which learning ends."""

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
        save: called after each epoch.
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
class _Progress:
    """How far learning has come.

    Attributes:
        best: what did best on the rows held back; `noise`: how much it left.
        epoch: how many were taken.
        idle: of these, the last ones that gained nothing with fine steps.
    """

    best: Answer
    noise: float
    epoch: int = 0
    idle: int = 0


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

        from trtq.recovery.learning.pupil import Pupil
        from trtq.recovery.learning.torch_graph import TorchGraph

        self.given, self.device, self.ignore_nonfinite = quantization, device, recipe.ignore_nonfinite
        self.start = quantization = quantization.with_corrections_inside()
        part = up_to_measured(quantization.graph)
        self.pupil: Pupil = Pupil(replace(quantization, graph=part), device)
        self.biases = {name: self.pupil.make_trainable(name) for name in _biases(part)}
        self.codes = _own_weights(quantization)
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
        coarse = max(math.ceil(_steps(self.start.plan) / len(self.lessons)), 2)
        epochs = coarse + max(round(FINE_SHARE * coarse), 1)
        optimizer, rates = self._optimizer()
        if checkpoint.state is not None:
            at = self._resume(checkpoint.state, optimizer)
        with console.progress("learn", (epochs - at.epoch) * len(self.lessons), "step") as advance:
            while at.epoch < epochs and at.idle < PATIENCE and not budget.over:
                fine = at.epoch >= coarse
                if at.epoch == coarse:
                    self._restore(at.best)
                    optimizer.state.clear()
                order = np.random.default_rng(at.epoch).permutation(len(self.lessons))
                for position, index in enumerate(order):
                    done = at.epoch + position / len(order)
                    pace = _decayed(done, 0, coarse) if not fine else FINE * _decayed(done, coarse, epochs)
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        held = group["weights"] and done < FIRST * coarse
                        group["lr"] = 0.0 if held else rate * pace
                    optimizer.zero_grad()
                    self._loss(self.lessons[index]).backward()
                    optimizer.step()
                    advance(1)
                    if budget.over:
                        break
                noise = self._exam()
                gain = noise_db(noise) - noise_db(at.noise)
                if gain > 0:
                    at.best, at.noise = self._answer(), noise
                if budget.over:
                    break
                at.epoch += 1
                at.idle = at.idle + 1 if fine and gain < LEAST_GAIN_DB else 0
                text = f"{noise_db(noise):.2f} dB on rows held back"
                console.say("learn", f"epoch {at.epoch} of {epochs}: {text}")
                checkpoint.save(self._state(at, optimizer))
        gain = noise_db(at.noise) - noise_db(before)
        quantization = self._exported(at.best) if gain >= LEAST_GAIN_DB else self.given
        whole = at.epoch == epochs or at.idle == PATIENCE
        return Learned(
            quantization, noise_db(before), noise_db(at.noise), at.epoch * len(self.lessons), whole
        )

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

    def _optimizer(self) -> tuple[Any, list[float]]:
        """Adam, and the learning rate of each of its groups."""
        import torch

        pupil = self.pupil
        groups: list[dict[str, Any]] = [{"params": list(pupil.log_scales.values()), "lr": RATE_SCALES}]
        groups += [
            {"params": [bias], "lr": RATE_BIASES * float(bias.detach().abs().mean().clamp_min(1e-8))}
            for bias in self.biases.values()
        ]
        groups = [group | {"weights": False} for group in groups]
        groups.append({"params": [pupil.codes[key] for key in self.codes], "lr": RATE_CODES, "weights": True})
        groups = [group for group in groups if group["params"]]
        return torch.optim.Adam(groups, betas=(0.9, 0.99)), [group["lr"] for group in groups]

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


def _decayed(epoch: float, first: int, end: int) -> float:
    """What is left of the rates on a half cosine from an epoch to an end."""
    return 0.5 * (1 + math.cos(math.pi * (epoch - first) / (end - first)))


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
