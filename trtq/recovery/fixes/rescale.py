"""Channel scales that are inserted: one Mul in front of a quantizer, folded out of the weights behind it.

`smooth` scales what makes an activation; that is free, and impossible behind whatever does not commute with a
factor: SiLU, GELU, hard-swish, a Clip, a gate. A Mul behind it always works, with one factor s per channel:

    y = SiLU(x)                  y = SiLU(x) ── y' = y * (1 / s) ── Q/DQ ── W' = W * s
    z = W·y

It costs what a pointwise operation costs, and nothing where it becomes part of a kernel that is there anyway,
as behind an activation function: of a public detector of 218 kernels not one was added.

All readers of a tensor that run in INT8 and multiply it by weights of their own read one scaled tensor; all
others, those in floating point among them, read what they read before.

- A depthwise convolution has one scale per channel for its weights, so no factor costs them anything: s is
  the range of the channel, and every channel then uses all codes.
- Elsewhere large factors cost the weights what small ones cost the activation: SmoothQuant's balance (see
  `smooth`), with the exponent for which the error behind the weights is least.

Channels that hardly occur in the calibration data have no range to speak of, and others in use may have them
large. No factor is therefore below `LEAST_FACTOR` of the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.backends.builders import NO_ENGINE
from trtq.calibration.calibrate import effort_of_step, with_float32_nodes
from trtq.calibration.refine import BATCH, LEAST_DB, Alone
from trtq.calibration.search import Rows
from trtq.data.batches import Arrays
from trtq.graph.names import Names
from trtq.graph.place import carried_over
from trtq.graph.plan import RESCALED, Plan
from trtq.graph.quantization import Quantization
from trtq.graph.rewrite import scales_as_inputs, weight_scale
from trtq.graph.selecting import instead_of_outputs
from trtq.job import Job
from trtq.numerics import fake_quantize, scale_from_amax
from trtq.recovery.fixes.channels import (
    Channels,
    Vector,
    along,
    channel_axis,
    collect_channels,
    is_linear,
    weight_matrix,
)
from trtq.recovery.fixes.smooth import (
    EXPONENTS,
    balanced,
    by_input,
    error_behind,
    quantization_noise,
    scale_linear,
    scaled_weight,
)
from trtq.recovery.trial import kernels
from trtq.simulation.rows import Runner, Workers
from trtq.simulation.similarity import noise_db

Item = TypeVar("Item")

LEAST_FACTOR = 1 / 256
"""Factors below this share of a tensor's largest are raised to it."""

LEAST_SUM_DB = 0.1
"""Sites that promise less than this, all together, are not tried."""

MOST_TRIED = 3
"""Factors that are tried at each site, of those that promise most."""

MOST_ROWS, FEW_ROWS = 24, 6
"""Rows held back that sites are tried on, and those that a tensor alone is run on."""

MOST_BUILDS = 12
"""Engines that are built to find what adds kernels."""

NARROWED = (0.8, 0.65)
"""Parts of the largest magnitude of a scaled tensor that are tried as its range."""

POINTWISE_OPS = frozenset(
    "Add Div Elu Erf Gelu HardSigmoid HardSwish LayerNormalization Mish Mul PRelu Selu Sigmoid Softplus"
    " Softsign Sub Swish Tanh".split()
)
"""Operators that run in a kernel of their own kind, which takes one more multiplication for nothing: behind
these alone are scales inserted where no builder can be asked. TensorRT for RTX 1.7.1 takes a scale for
nothing behind nearly all others, too; not behind a Concat of pooled tensors, nor behind the Reshape of a
fused attention's result, where it takes 3 kernels more."""


@dataclass(frozen=True)
class Site:
    """A place for channel scales.

    Attributes:
        tensor: what is scaled, before its readers.
        axis: where it has its channels.
        channels: how many.
        readers: names of the INT8 nodes that will read the scaled tensor as their first input.
    """

    tensor: str
    axis: int
    channels: int
    readers: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the tensor that is added."""
        return f"{self.tensor}{RESCALED}"


def find_sites(graph: gs.Graph, plan: Plan) -> list[Site]:
    """Every place where scales can be inserted, in the order of the plan's tensors.

    Left alone are tensors that share their range with one that only holds moved values of them: TensorRT then
    moves integers, and would move floats.
    """
    nodes, int8 = {node.name: node for node in graph.nodes}, set(plan.int8_nodes)
    tensors = graph.tensors()
    moved = {name for edge in plan.edges if edge.range != edge.tensor for name in (edge.range, edge.tensor)}
    found: dict[tuple[str, int, int], list[str]] = {}
    for edge in plan.edges:
        node = nodes[edge.node]
        if edge.index or edge.node not in int8 or edge.tensor in moved or not is_linear(node):
            continue
        if tensors[edge.tensor].dtype == np.float32:
            groups, _, inputs, _ = weight_matrix(node).shape
            found.setdefault((edge.tensor, channel_axis(node), groups * inputs), []).append(edge.node)
    taken: dict[str, Site] = {}
    for (tensor, axis, channels), names in found.items():
        if channels > 1:
            taken.setdefault(tensor, Site(tensor, axis, channels, tuple(names)))
    return list(taken.values())


def inserted(graph: gs.Graph, plan: Plan, factors: Mapping[Site, Vector]) -> tuple[gs.Graph, Plan]:
    """A copy of a graph with scales at some sites, and the plan for it; both compute the same function.

    Args:
        factors: site -> what the tensor is divided by and its readers' weights are multiplied by, shape
            (channels,).
    """
    made, names = graph.copy(), Names(graph)
    nodes, tensors = {node.name: node for node in made.nodes}, made.tensors()
    renamed: dict[tuple[str, int], str] = {}
    for site, vector in factors.items():
        tensor = tensors[site.tensor]
        inverse = _inverse(site, vector, nodes[site.readers[0]].inputs[1].values.ndim)
        scaled = gs.Variable(names.tensor(site.name), tensor.dtype, tensor.shape)
        constant = gs.Constant(names.tensor(f"{site.name}/factors"), inverse)
        made.nodes.append(gs.Node("Mul", names.node(f"{site.name}/Mul"), {}, [tensor, constant], [scaled]))
        for reader in site.readers:
            nodes[reader].inputs[0] = scaled
            scale_linear(nodes[reader], vector, names, output=False)
            renamed[reader, 0] = scaled.name
    edges = [
        replace(edge, tensor=name, range=name) if (name := renamed.get((edge.node, edge.index))) else edge
        for edge in plan.edges
    ]
    return made.toposort(), carried_over(replace(plan, edges=edges), graph, made)


def _inverse(site: Site, factors: Vector, rank: int) -> NDArray[np.float32]:
    """1 / factors, as it broadcasts against a tensor that a node with weights of this rank reads."""
    return along(1 / factors, site.axis, rank if site.axis == 1 else 1).astype(np.float32)


# --- choosing the factors -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """Factors of a site.

    Attributes:
        factors: what the tensor is divided by, (channels,).
        amax: largest magnitude of the scaled tensor.
        share: error behind the readers' weights, as a share of what it is without factors.
    """

    factors: Vector
    amax: float
    share: float


def options(site: Site, readers: Sequence[gs.Node], channels: Channels) -> list[Option]:
    """Factors that leave less error behind the readers' weights than none do, the least error first."""
    amax = channels.amax.astype(np.float64)
    weights = np.max([np.abs(by_input(node)).max(axis=0) for node in readers], axis=0)
    tried = [amax, *(balanced(amax, weights, exponent) for exponent in EXPONENTS)]
    power = channels.power

    def error(factors: Vector) -> float:
        noise = quantization_noise(channels.values, factors)
        return sum(error_behind(node, power, noise, factors) for node in readers)

    plain, found = error(np.ones(site.channels)), list[Option]()
    for factors in map(_held, tried):
        share = error(factors) / plain if plain else 1
        if share < 1 and all(abs(share - other.share) > 0.02 * other.share for other in found):
            found.append(Option(factors, float((amax / factors).max()), share))
    return sorted(found, key=lambda option: option.share)


def _held(factors: Vector) -> Vector:
    """Factors that are not too small, about a geometric mean of 1."""
    if not factors.max() > 0:
        return np.ones(factors.shape)
    factors = np.maximum(factors, factors.max() * LEAST_FACTOR)
    mean: Vector = factors / np.exp(np.log(factors).mean())
    return mean


@dataclass(frozen=True)
class Choice:
    """Factors of a site, and the part of the scaled tensor's largest magnitude that is its range."""

    option: Option
    part: float = 1.0

    @property
    def scale(self) -> np.float32:
        return np.float32(scale_from_amax(self.option.amax * self.part))


Choices = Mapping[Site, Choice]


class _Trials:
    """A quantization with scales at any of some sites, on rows: one session runs them all, as factors,
    weights and ranges are its inputs."""

    def __init__(self, rows: Rows, start: Quantization, sites: Sequence[Site]) -> None:
        self._rows, self._start = rows, start
        graph, plan = inserted(start.graph, start.plan, {site: np.ones(site.channels) for site in sites})
        tensors = {edge.node: edge.tensor for edge in plan.edges if edge.index == 0}
        self._tensors = {site: tensors[site.readers[0]] for site in sites}
        self._scales = {**start.scales, **{self._tensors[site]: start.scales[site.tensor] for site in sites}}
        made = replace(start, graph=graph, plan=plan, scales=self._scales, corrections={}).rewritten()
        self._ranges = scales_as_inputs(made, plan)
        self._readers = {site: [_Reader(start, name) for name in site.readers] for site in sites}
        nodes, makers = {node.name: node for node in made.nodes}, made.tensors()
        for site in sites:
            _as_input(made, makers[self._tensors[site]].inputs[0], self._factors(site))
            for reader in self._readers[site]:
                _as_input(made, nodes[reader.name], reader.input)
        self._runner = Runner(made.cleanup(), rows.tensors, threads=rows.threads)

    def noise(self, choices: Choices) -> float:
        """Noise of the outputs (see `similarity.Reference`) with some of the sites scaled."""
        scales = {**self._scales, **{self._tensors[site]: choice.scale for site, choice in choices.items()}}
        given: Arrays = {name: np.array(scales[tensor]) for name, tensor in self._ranges.items()}
        for site, readers in self._readers.items():
            factors = choices[site].option.factors if site in choices else np.ones(site.channels)
            given[self._factors(site)] = _inverse(site, factors, readers[0].rank)
            given |= {reader.input: reader.rounded(factors) for reader in readers}
        return self._rows.noise(self._rows.run(self._runner, given))

    def _factors(self, site: Site) -> str:
        return f"{self._tensors[site]}/given"


class _Reader:
    """An INT8 node whose weights are given with each run."""

    def __init__(self, start: Quantization, name: str) -> None:
        self.name, self.input = name, f"{name}/weights/given"
        self._node = next(node for node in start.graph.nodes if node.name == name)
        self._axis = next(weight.axis for weight in start.plan.weights if weight.node == name)
        self.rank = self._node.inputs[1].values.ndim

    def rounded(self, factors: Vector) -> NDArray[np.float32]:
        """The weights, multiplied by factors of their inputs, as INT8 has them."""
        weight = scaled_weight(self._node, factors, output=False).astype(np.float32)
        scale = weight_scale(weight, self._axis)
        return fake_quantize(weight, scale, axis=self._axis, narrow=True).astype(np.float32)


def _as_input(graph: gs.Graph, node: gs.Node, name: str) -> None:
    """Make the second operand of a node an input of the graph; in place."""
    node.inputs[1] = gs.Variable(name, np.float32, [None] * len(node.inputs[1].shape))
    graph.inputs.append(node.inputs[1])


def rescale(job: Job, start: Quantization) -> Quantization | None:
    """A calibrated quantization with scales where that pays on the rows held back and adds no kernel.

    Factors and ranges of the scaled tensors come from the rows to fit on; the ranges of all other tensors
    stay as they are. Corrections of biases are left out: they belong to the weights as they were.

    Args:
        start: its learned weights' scales, if it has some, are kept.

    Returns:
        None where nothing pays.
    """
    fitting, _ = job.parts
    sites = [site for site in find_sites(start.graph, start.plan) if not _learned(start, site)]
    by_rule = job.recipe.backend == NO_ENGINE
    if by_rule:
        sites = [site for site in sites if _is_pointwise(start.graph, site)]
    if not sites:
        return None
    axes = {site.tensor: site.axis for site in sites}
    channels = collect_channels(start.graph, axes, fitting, job.recipe.threads)
    nodes = {node.name: node for node in start.graph.nodes}
    found = {site: options(site, [nodes[n] for n in site.readers], channels[site.tensor]) for site in sites}
    found = {site: some for site, some in found.items() if some}
    chosen = _choose(job, start, found)
    if not by_rule:
        chosen = _without_kernels(job, start, chosen)
    if not chosen:
        return None
    made = _scaled(start, chosen)
    return with_float32_nodes(job, made)


def is_affordable(job: Job, start: Quantization) -> bool:
    """Whether there is time to try scales at every place, one after the other."""
    sites, effort = len(find_sites(start.graph, start.plan)), effort_of_step(job, start)
    runs = sites * MOST_TRIED * min(MOST_ROWS, len(job.parts[1]))
    return effort.takes("rescale", effort.alone(sites * FEW_ROWS), effort.quantized(runs))


def _learned(start: Quantization, site: Site) -> bool:
    """Whether a reader's weights have scales of their own."""
    learned = {tensor for tensor, _ in start.weight_scales}
    return any(weight.tensor in learned for weight in start.plan.weights if weight.node in site.readers)


def _is_pointwise(graph: gs.Graph, site: Site) -> bool:
    makers = graph.tensors()[site.tensor].inputs
    return bool(makers) and makers[0].op in POINTWISE_OPS


def _choose(job: Job, start: Quantization, found: Mapping[Site, Sequence[Option]]) -> dict[Site, Choice]:
    """The sites at which scales save noise on the rows held back.

    A site promises the noise that its tensor alone makes in the outputs, times the share of the error behind
    its readers that its factors save.
    """
    rows = Rows(
        start.graph,
        job.parts[1].spread(MOST_ROWS),
        batch=BATCH,
        threads=1,
        kept=True,
        ignore_nonfinite=job.recipe.ignore_nonfinite,
        tensors=instead_of_outputs(start.graph),
    )
    workers, alone = Workers(job.recipe.threads), Alone(rows, start)

    def promised(site: Site) -> float:
        noise = alone.noise(site.tensor, start.scales[site.tensor], max(FEW_ROWS // BATCH, 1))
        return noise * (1 - found[site][0].share)

    promises = dict(zip(found, workers.map(promised, found), strict=True))
    order = sorted(found, key=lambda site: -promises[site])
    trials = _Trials(rows, start, order)
    ranked = {site: found[site] for site in order}
    made = searched(ranked, promises, trials.noise, workers, lambda: job.budget.over)
    before, after = noise_db(made.plain), noise_db(trials.noise(made.choices))
    job.console.say(
        "rescale",
        f"{len(made.choices)} of {len(found)} tensors: {before:.1f} -> {after:.1f} dB"
        f" on {len(rows.samples)} rows held back, {len(found) + made.runs} runs",
    )
    return made.choices if after > before + LEAST_DB else {}


class Searched(NamedTuple):
    """What a search for choices found.

    Attributes:
        plain: noise without any.
        runs: how many choices were run.
    """

    choices: dict[Site, Choice]
    plain: float
    runs: int


def searched(
    options: Mapping[Site, Sequence[Option]],
    promises: Mapping[Site, float],
    noise: Callable[[Choices], float],
    workers: Workers,
    over: Callable[[], bool] = lambda: False,
) -> Searched:
    """The choices with the least noise.

    The search starts from the first few sites, as many as are best at once: all of them where what they save
    adds up, and few where they get into each other's way. Then each site, the most promising first, goes in
    or out, and tries other factors and ranges. Sites at the end that promise next to nothing are left out.

    Args:
        options: site -> its factors, the best first; the most promising site first.
        promises: site -> noise that it may save.
        noise: of the outputs with some choices.
        over: nothing more is tried once this is true.
    """
    order = list(options)
    rest = np.cumsum([promises[site] for site in reversed(order)])[::-1]
    firsts = [{site: Choice(options[site][0]) for site in order[:count]} for count in _counts(len(order))]
    noises = list(workers.map(noise, firsts))
    plain, best, chosen = noises[0], min(noises), firsts[int(np.argmin(noises))]
    runs = len(noises)
    for site, left in zip(order, rest, strict=True):
        if left < best * (1 - 10 ** (-LEAST_SUM_DB / 10)) or over():
            chosen = _with(chosen, site, None)
            continue
        large = promises[site] > best / len(order)
        others: list[Choice | None] = [None if site in chosen else Choice(options[site][0])]
        if large:
            others += [Choice(option) for option in options[site][1:MOST_TRIED]]
        narrowed = False
        while others:
            tried = [_with(chosen, site, choice) for choice in others]
            noises = list(workers.map(noise, tried))
            runs, winner = runs + len(tried), int(np.argmin(noises))
            if noises[winner] < best:
                best, chosen = noises[winner], tried[winner]
            kept, others = chosen.get(site), []
            if large and kept is not None and not narrowed:
                others = [replace(kept, part=part) for part in NARROWED]
            narrowed = True
    return Searched(chosen, plain, runs)


def _counts(most: int) -> list[int]:
    """0, the powers of two below `most`, and `most`."""
    return [0, *(1 << power for power in range((most - 1).bit_length())), most]


def _with(chosen: Choices, site: Site, choice: Choice | None) -> dict[Site, Choice]:
    """The choices with another one for a site, or with none."""
    others = {other: own for other, own in chosen.items() if other != site}
    return others if choice is None else {**others, site: choice}


def _without_kernels(job: Job, start: Quantization, chosen: dict[Site, Choice]) -> dict[Site, Choice]:
    """Those of the sites at which scales add no kernel to the engine; where no builder can be asked, those
    behind `POINTWISE_OPS`."""
    before = kernels(job, start) if chosen else None
    if before is None:
        return {site: choice for site, choice in chosen.items() if _is_pointwise(start.graph, site)}
    limit = before

    def fits(sites: Sequence[Site]) -> bool:
        count = kernels(job, _scaled(start, {site: chosen[site] for site in sites}))
        return count is not None and count <= limit

    kept = most_that_fit(list(chosen), fits, MOST_BUILDS)
    job.console.say("rescale", f"{len(kept)} of {len(chosen)} add no kernel to the {before} of the engine")
    return {site: chosen[site] for site in kept}


def most_that_fit(items: Sequence[Item], fits: Callable[[Sequence[Item]], bool], most: int) -> list[Item]:
    """As many of the items as fit together: halves of what does not fit are tried, with all that is kept so
    far, down to single items.

    Args:
        fits: is asked `most` times at most; what is left then is not kept.
    """
    kept: list[Item] = []
    waiting, asked = [list(items)], 0
    while waiting and asked < most:
        part = waiting.pop()
        asked += 1
        if fits([*kept, *part]):
            kept += part
        elif len(part) > 1:
            middle = len(part) // 2
            waiting += [part[middle:], part[:middle]]
    return kept


def _scaled(start: Quantization, chosen: Choices) -> Quantization:
    """The start with scales inserted, and the ranges that they were tried with."""
    graph, plan = inserted(start.graph, start.plan, {s: c.option.factors for s, c in chosen.items()})
    tensors = {edge.node: edge.tensor for edge in plan.edges if edge.index == 0}
    scales = {**start.scales, **{tensors[s.readers[0]]: c.scale for s, c in chosen.items()}}
    scales = {tensor: scales[tensor] for tensor in plan.tensors}
    return replace(start, graph=graph, plan=plan, scales=scales, corrections={})
