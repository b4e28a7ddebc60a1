"""Affine quantization where TensorRT has scales only: a scale and a zero-point for each channel, by operators
in front of a quantizer (`sites`).

`smooth` and `shift` fold factors and middles into what makes an activation; that is free, and impossible
behind whatever does not commute with them: SiLU, GELU, hard-swish, ReLU, a Clip, a gate. Operators behind it
always work. They cost what a pointwise operation costs, and nothing where they become part of a kernel that
is there anyway: of a public detector of 218 kernels not one was added.

What may be inserted comes from the rows to fit on (`options`). Where it is, is tried on rows of all
calibration data, and kept as far as the engine gains no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtq.backends.builders import NO_ENGINE
from trtq.calibration.calibrate import effort_of_step, with_float32_nodes
from trtq.calibration.refine import BATCH, LEAST_DB, LEAST_SHARE, Alone
from trtq.calibration.search import Rows
from trtq.data.batches import Arrays
from trtq.graph.names import Names
from trtq.graph.quantization import Correction, Quantization
from trtq.graph.rewrite import rounded_weight, scales_as_inputs
from trtq.graph.selecting import instead_of_outputs
from trtq.graph.surgery import cleaned
from trtq.job import Job
from trtq.numerics import INT8_MAX
from trtq.recovery.fixes.channels import Bias, behind, bias_of, collect_channels
from trtq.recovery.fixes.options import Option, options
from trtq.recovery.fixes.sites import (
    PADDED_OPS,
    POINTWISE_OPS,
    Affine,
    Site,
    find_sites,
    inserted,
    is_made_by,
)
from trtq.recovery.fixes.smooth import scaled_weight
from trtq.recovery.trial import compiled
from trtq.simulation.rows import Runner, Workers
from trtq.simulation.similarity import noise_db

Item = TypeVar("Item")

MOST_TRIED = 3
"""Options that are tried at each site, of those that promise most."""

TRIED_MACS, TRIED_ROWS, FEW_ROWS = 1e10, (32, 128), 6
"""Multiply-accumulates of the calibration rows that sites are tried on, the fewest and most of these rows,
and how many a tensor alone is run on."""

MOST_BUILDS = 16
"""Engines that are built to find what adds kernels."""

NEIGHBOURS = (1.25, 0.8, 0.65)
"""Multiples of a changed tensor's range that are tried, too, where they leave less error on the rows to fit
on than there is without operators: the few rows that are tried may lack the values that are cut off."""

Choices = Mapping[Site, Option]


class _Trials:
    """A quantization with any choices at some sites, on rows: one session runs them all, as factors, middles,
    weights, biases and ranges are its inputs."""

    def __init__(self, rows: Rows, start: Quantization, sites: Sequence[Site]) -> None:
        self._rows = rows
        graph, plan = inserted(start.graph, start.plan, {site: _neutral(site) for site in sites})
        tensors = {edge.node: edge.tensor for edge in plan.edges if edge.index == 0}
        self._tensors = {site: tensors[site.readers[0]] for site in sites}
        self._scales = {**start.scales, **{self._tensors[site]: start.scales[site.tensor] for site in sites}}
        made = replace(start, graph=graph, plan=plan, scales=self._scales).rewritten()
        self._ranges = scales_as_inputs(made, plan)
        self._readers = _readers(start, sites)
        nodes, makers, names = {node.name: node for node in made.nodes}, made.tensors(), Names(made)
        self._names: dict[str, str] = {}

        def give(node: gs.Node, index: int, wish: str) -> None:
            self._names[wish] = _as_input(made, node, index, names.tensor(wish))

        for site, readers in self._readers.items():
            last = makers[self._tensors[site]].inputs[0]
            if site.takes_middle:
                give(last, 1, f"{site.name}/middle")
                last = last.inputs[0].inputs[0]
            give(last, 1, f"{site.name}/factors")
            for reader in readers:
                for bias in reader.biases:
                    give(nodes[bias.node.name], bias.index, f"{reader.name}/bias")
                give(nodes[reader.name], 1, f"{reader.name}/weights")
        self._runner = Runner(cleaned(made), rows.tensors, threads=rows.threads)
        self._plain = {site: self._inputs(site, None) for site in sites}
        self._known: dict[Option, Arrays] = {}

    def noise(self, choices: Choices) -> float:
        """Noise of the outputs (see `similarity.Reference`) with some of the sites changed."""
        scales = {**self._scales, **{self._tensors[site]: option.scale for site, option in choices.items()}}
        given: Arrays = {name: np.array(scales[tensor]) for name, tensor in self._ranges.items()}
        known = self._known
        made = {o: known.get(o) or self._inputs(site, o) for site, o in choices.items()}
        self._known = made
        for site, plain in self._plain.items():
            given |= made[choices[site]] if site in choices else plain
        return self._rows.noise(self._rows.run(self._runner, given))

    def _inputs(self, site: Site, option: Option | None) -> Arrays:
        affine, readers = _neutral(site) if option is None else option.affine, self._readers[site]
        factors = np.ones(site.channels) if affine.factors is None else affine.factors
        given: Arrays = {f"{site.name}/factors": site.broadcast(1 / factors, readers[0].rank)}
        if site.takes_middle:
            middle = np.zeros(site.channels) if affine.middle is None else affine.middle
            given[f"{site.name}/middle"] = site.broadcast(middle / factors, readers[0].rank)
        for reader in readers:
            given[f"{reader.name}/weights"] = reader.weights(option)
            given |= {f"{reader.name}/bias": reader.bias(own, option) for own in reader.biases}
        return {self._names[wish]: values for wish, values in given.items()}


def _neutral(site: Site) -> Affine:
    """All operators that the site can have, without effect."""
    return Affine(np.ones(site.channels), np.zeros(site.channels) if site.takes_middle else None)


class _Reader:
    """An INT8 node behind a site.

    Args:
        axis: of its weights' scales.

    Attributes:
        biases: the one that it has, or can have, if any.
        key: of its weights' codes.
        rank: of the weights.
    """

    def __init__(self, start: Quantization, node: gs.Node, axis: int) -> None:
        self.name, self._node = node.name, node
        self.key = (node.inputs[1].name, axis)
        bias = bias_of(start.graph, node)
        self.biases = [] if bias is None else [bias]
        self.rank = node.inputs[1].values.ndim
        self._codes = start.codes.get(self.key)
        self._correction, self._corrects = start.corrections.get(node.name), bool(start.corrections)

    def weights(self, option: Option | None) -> NDArray[np.float32]:
        """As INT8 has them; by the codes that they have where they are not scaled."""
        weight, axis = self._node.inputs[1].values, self.key[1]
        if option is None or option.factors is None:
            return rounded_weight(weight, axis, codes=self._codes)
        scaled = scaled_weight(self._node, option.factors, output=False)
        return rounded_weight(scaled.astype(np.float32), axis)

    def bias(self, own: Bias, option: Option | None) -> NDArray[np.float32]:
        """The bias that it has; behind an option with what the rounded weights make of the middle given back,
        or where the start has its biases corrected, the whole mean error."""
        if option is None and self._correction is not None:
            return self._correction.values
        values = np.zeros(own.size, np.float32)
        if len(own.node.inputs) > own.index:
            values = own.values + values  # a Gemm's may be a scalar
        if option is None:
            return values
        rounded = self.weights(option)
        if self._corrects:
            mean = option.values.mean(axis=0, dtype=np.float64)
            added = behind(self._node, mean) - behind(self._node, option.mean, rounded)
        elif (middle := option.affine.middle) is not None:
            added = behind(self._node, middle / (1 if option.factors is None else option.factors), rounded)
        else:
            return values
        return (values + added).astype(np.float32)


def _readers(start: Quantization, sites: Iterable[Site]) -> dict[Site, list[_Reader]]:
    """Site -> what reads it."""
    nodes = {node.name: node for node in start.graph.nodes}
    axes = {weight.node: weight.axis for weight in start.plan.weights}
    return {site: [_Reader(start, nodes[name], axes[name]) for name in site.readers] for site in sites}


def _as_input(graph: gs.Graph, node: gs.Node, index: int, name: str) -> str:
    """Make a constant operand of a node an input of the graph, in place; returns its name."""
    given = gs.Variable(name, np.float32, [None] * len(node.inputs[index].shape))
    node.inputs[index] = given
    graph.inputs.append(given)
    return name


def insert_affine(job: Job, start: Quantization) -> Quantization | None:
    """A calibrated quantization with operators where they pay and add no kernel.

    Factors, middles and ranges of the changed tensors come from the rows to fit on; the ranges of all other
    tensors stay as they are. Weights that are scaled are rounded to the nearest. Biases give back what their
    own weights make of the middles, and are corrected as far as the start's are.

    Args:
        start: its learned weights' scales, if it has some, are kept.

    Returns:
        None where nothing pays.
    """
    sites = [site for site in find_sites(start.graph, start.plan) if not _is_given(start, site)]
    by_rule, tensors = job.recipe.backend == NO_ENGINE, start.graph.tensors()
    if by_rule:
        sites = [site for site in sites if is_made_by(tensors[site.tensor], POINTWISE_OPS)]
    if not sites:
        return None
    chances = _chances(job, start, sites)
    chosen = _choose(job, chances, len(sites)) if chances.options else {}
    if chosen and not by_rule:
        chosen = _without_kernels(job, start, chances, chosen)
    return with_float32_nodes(job, _changed(start, chosen)) if chosen else None


def is_affordable(job: Job, start: Quantization) -> bool:
    """Whether there is time to try options at every place, one after the other."""
    sites, effort = len(find_sites(start.graph, start.plan)), effort_of_step(job, start)
    runs = sites * MOST_TRIED * _rows_to_try(job, start)
    return effort.takes("affine", effort.alone(sites * FEW_ROWS), effort.quantized(runs))


def _is_given(start: Quantization, site: Site) -> bool:
    """Whether a reader's weights have scales of their own, or the site is a model input that is to hold
    8-bit codes."""
    if start.ends.int8 and any(tensor.name == site.tensor for tensor in start.graph.inputs):
        return True
    learned = {tensor for tensor, _ in start.weight_scales}
    return any(weight.tensor in learned for weight in start.plan.weights if weight.node in site.readers)


class _Chances(NamedTuple):
    """What can be tried.

    Attributes:
        options: site -> its options, the best first; the most promising site first.
        promises: site -> noise that it may save: what its tensor alone makes in the outputs, times the share
            of the error behind its readers that its best option saves.
        trials: on calibration rows.
        rows: how many.
    """

    options: Mapping[Site, Sequence[Option]]
    promises: Mapping[Site, float]
    trials: _Trials
    rows: int


def _chances(job: Job, start: Quantization, sites: Sequence[Site]) -> _Chances:
    rows = Rows(
        start.graph,
        job.data.spread(_rows_to_try(job, start)),
        batch=BATCH,
        threads=1,
        kept=True,
        ignore_nonfinite=job.recipe.ignore_nonfinite,
        tensors=instead_of_outputs(start.graph),
    )
    alone = Alone(rows, start)

    def made_by(site: Site) -> float:
        return alone.noise(site.tensor, start.scales[site.tensor], max(FEW_ROWS // BATCH, 1))

    noises = dict(zip(sites, Workers(job.recipe.threads).map(made_by, sites), strict=True))
    axes = {site.tensor: site.axis for site in sites}
    channels = collect_channels(start.graph, axes, job.parts[0], job.recipe.threads)
    nodes = {node.name: node for node in start.graph.nodes}

    def found_for(site: Site) -> list[Option]:
        amax = float(start.scales[site.tensor]) * INT8_MAX
        return options(site, [nodes[name] for name in site.readers], channels[site.tensor], amax)

    found = _worthwhile(noises, found_for)
    promises = {site: noises[site] * (1 - some[0].share) for site, some in found.items()}
    ranked = {site: found[site] for site in sorted(found, key=lambda site: -promises[site])}
    return _Chances(ranked, promises, _Trials(rows, start, list(ranked)), len(rows.samples))


def _choose(job: Job, chances: _Chances, sites: int) -> dict[Site, Option]:
    """What saves noise on calibration rows."""
    noise, workers = chances.trials.noise, Workers(job.recipe.threads)
    made = searched(chances.options, chances.promises, noise, workers, lambda: job.budget.over)
    before, after = noise_db(made.plain), noise_db(noise(made.choices))
    job.console.say(
        "affine",
        f"{len(made.choices)} of {sites} tensors: {before:.1f} -> {after:.1f} dB"
        f" on {chances.rows} rows, {sites + made.runs} runs",
    )
    return made.choices if after > before + LEAST_DB else {}


def _worthwhile(
    noises: Mapping[Site, float], found_for: Callable[[Site], list[Option]]
) -> dict[Site, list[Option]]:
    """Site -> its options, if it has some; the noisiest first, until all others together make next to nothing
    of what would be left."""
    waiting, kept = sorted(noises, key=lambda site: noises[site]), 0.0
    left, found = sum(noises.values()), dict[Site, list[Option]]()
    while waiting and left >= LEAST_SHARE * (left + kept):
        site = waiting.pop()
        if some := found_for(site):
            found[site] = some
        kept += noises[site] * (some[0].share if some else 1)
        left -= noises[site]
    return found


def _rows_to_try(job: Job, start: Quantization) -> int:
    """How many calibration rows sites are tried on."""
    return min(start.plan.rows_within(TRIED_MACS, *TRIED_ROWS), len(job.data))


class Searched(NamedTuple):
    """What a search for choices found.

    Attributes:
        plain: noise without any.
        runs: how many choices were run.
    """

    choices: dict[Site, Option]
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
    adds up, and few where they get into each other's way; with their best options, or without factors. Then
    each site, the most promising first, goes in or out, and tries other options and ranges. What is out then
    is tried once more. Sites at the end that promise next to nothing are left out.

    Args:
        options: site -> its options, the best first; the most promising site first.
        promises: site -> noise that it may save.
        noise: of the outputs with some choices.
        over: nothing more is tried once this is true.
    """
    order = list(options)
    rest = np.cumsum([promises[site] for site in reversed(order)])[::-1]
    firsts: list[dict[Site, Option]] = []
    for count in _counts(len(order)):
        for pick in (_best, _plainest):
            first = {site: pick(options[site]) for site in order[:count]}
            if first not in firsts:
                firsts.append(first)
    noises = list(workers.map(noise, firsts))
    plain, best, chosen = noises[0], min(noises), firsts[int(np.argmin(noises))]
    runs, dropped = len(noises), set[Site]()

    def took(site: Site, tried: Sequence[Option | None]) -> Option | None:
        """The best of what was tried at a site and what it has."""
        nonlocal best, chosen, runs
        others = [_with(chosen, site, option) for option in tried]
        noises = list(workers.map(noise, others))
        runs, winner = runs + len(others), int(np.argmin(noises)) if noises else 0
        if noises and noises[winner] < best:
            best, chosen = noises[winner], others[winner]
        return chosen.get(site)

    for site, left in zip(order, rest, strict=True):
        if left < LEAST_SHARE * best or over():
            dropped.add(site)
            chosen = _with(chosen, site, None)
            continue
        large = promises[site] > best / len(order)
        some = options[site][: MOST_TRIED if large else 1]
        kept = took(site, [None if site in chosen else some[0], *some[1:]])
        if large and kept is not None:
            took(site, [other for by in NEIGHBOURS if (other := kept.widened(by)).share < 1])
    for site in order:
        if site not in chosen and site not in dropped and not over():
            took(site, options[site][:1])
    return Searched(chosen, plain, runs)


def _best(options: Sequence[Option]) -> Option:
    return options[0]


def _plainest(options: Sequence[Option]) -> Option:
    """The best without factors, if there is one."""
    return next((option for option in options if option.factors is None), options[0])


def _counts(most: int) -> list[int]:
    """0, the powers of two below `most`, and `most`."""
    return [0, *(1 << power for power in range((most - 1).bit_length())), most]


def _with(chosen: Choices, site: Site, choice: Option | None) -> dict[Site, Option]:
    """The choices with another one for a site, or with none."""
    others = {other: own for other, own in chosen.items() if other != site}
    return others if choice is None else {**others, site: choice}


def _without_kernels(job: Job, start: Quantization, chances: _Chances, chosen: Choices) -> dict[Site, Option]:
    """Those of the choices that add no kernel to the engine, in place of others such without a middle; where
    no builder can be asked, those behind `POINTWISE_OPS`. What the budget leaves no time to build is left
    out."""
    tensors, before = start.graph.tensors(), compiled(job, start)
    if before is None:
        return {site: o for site, o in chosen.items() if is_made_by(tensors[site.tensor], POINTWISE_OPS)}
    limit, moved = before.kernels, before.bytes_moved()
    moves: dict[tuple[tuple[Site, Option], ...], int] = {(): moved}

    def fits(items: Sequence[tuple[Site, Option]]) -> bool:
        if job.budget.over:
            return False
        made = compiled(job, _changed(start, dict(items)))
        if made is None or made.kernels > limit:
            return False
        moves[tuple(items)] = made.bytes_moved()
        return True

    def doubtful(item: tuple[Site, Option]) -> bool:
        return bool(item[0].pads) and item[1].centred and not is_made_by(tensors[item[0].tensor], PADDED_OPS)

    kept = dict(most_that_fit(sorted(chosen.items(), key=doubtful), fits, MOST_BUILDS))
    instead = dict(kept)
    for site in chosen:
        if site in kept or job.budget.over:
            continue
        plainer = [_with(instead, site, o) for o in chances.options[site] if not o.centred][:MOST_TRIED]
        instead = min([instead, *plainer], key=chances.trials.noise)
    added = [item for item in instead.items() if item[0] not in kept]
    kept |= most_that_fit(added, lambda some: fits([*kept.items(), *some]), MOST_BUILDS // 2)
    job.console.say(
        "affine",
        f"{len(kept)} of {len(chosen)} add no kernel to the {limit} of the engine, which moves"
        f" {moved / 1e6:.4g} -> {moves[tuple(kept.items())] / 1e6:.4g} MB",
    )
    return kept


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


def _changed(start: Quantization, chosen: Choices) -> Quantization:
    """The start with operators inserted, and the ranges and biases that they were tried with."""
    graph, plan = inserted(start.graph, start.plan, {s: option.affine for s, option in chosen.items()})
    tensors = {edge.node: edge.tensor for edge in plan.edges if edge.index == 0}
    scales = {**start.scales, **{tensors[s.readers[0]]: o.scale for s, o in chosen.items()}}
    scales = {tensor: scales[tensor] for tensor in plan.tensors}
    corrections, codes = dict(start.corrections), dict(start.codes)
    for site, readers in _readers(start, chosen).items():
        option = chosen[site]
        for reader in readers:
            for bias in reader.biases:
                values = reader.bias(bias, option)
                corrections[reader.name] = Correction(bias.node.name, bias.index, values)
            if option.factors is not None:
                codes.pop(reader.key, None)
    return replace(start, graph=graph, plan=plan, scales=scales, corrections=corrections, codes=codes)
