"""Running models over data, with what was run before taken from the cache; and the recipe's gate on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trtq.backends.engine import fingerprint, is_engine, run_engine
from trtq.cache import Cache, Key
from trtq.console import Console
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.errors import InputError, about
from trtq.files import sha256_file
from trtq.gate.decision import check_decides, decide, score_reference
from trtq.gate.metrics import Metric, Scored, load_metric
from trtq.gate.reference import doubt
from trtq.gate.resampling import Resampling
from trtq.gate.verdict import Check, Outcome, Verdict
from trtq.graph import references
from trtq.graph.door import read_model
from trtq.graph.foreign import View
from trtq.graph.inputs import InputSpec
from trtq.graph.model import model_sha256, save_model
from trtq.graph.quantization import Quantization
from trtq.recipe import Recipe
from trtq.scratch import scratch_folder
from trtq.simulation.finite import check_reference
from trtq.simulation.outputs import Outputs, run_sharded
from trtq.simulation.states import with_states
from trtq.simulation.workers import KEPT_BYTES, Work

CLOSE = 0.5
"""Part of the allowed drop above which a simulated pass is doubtful, although the samples prove it."""

LONG_CALL = 0.1
"""Seconds of one call of a metric that are worth a word: 1000 resamples would take minutes."""


def outputs_of(
    model: Path,
    samples: Samples,
    recipe: Recipe,
    cache: Cache,
    console: Console,
    *,
    label: str,
    sha256: str | None = None,
    fused: bool = False,
) -> tuple[Outputs, bool]:
    """The model's outputs on every row, and whether they came from the cache.

    Args:
        model: an ONNX file, simulated on the CPU, or an engine, run on the GPU. Where the recipe requires an
            engine, it is run even if the cache has its outputs.
        recipe: says how to run it: batch, threads, and where an ONNX model's rows run.
        label: what the progress is called.
        sha256: hash of the model including its external data; default: found here.
        fused: of a model that is simulated: see `simulation_session`.

    Raises:
        InputError, MissingBackendError: as `run_model`, also where the cache has the outputs of an engine:
            they belong to one GPU and its driver, and without it there is no telling which.
    """
    engine = is_engine(model)
    sha256 = sha256 or (sha256_file(model) if engine else model_sha256(model))
    entries = fingerprint(model) | ({"fused": True} if fused else {})
    key = Key.of("outputs", model=sha256, data=samples.hash, batch=recipe.batch, **entries)
    if not (engine and recipe.require_engine) and (content := cache.fetch(key)) is not None:
        outputs = Outputs.from_bytes(content)
        if (outputs.executor == "engine") == engine:
            return outputs, True
        cache.report(f"cache entry {cache.path(key)} is damaged (another executor); it is computed again")
    if not engine:
        work = Work(key, cache, console, label, recipe.parallel)
        outputs = run_sharded(
            model, samples, work, batch_size=recipe.batch, threads=recipe.threads, fused=fused
        )
        return outputs, False
    with console.progress(label, len(samples)) as advance:
        outputs = run_engine(
            model, samples, batch_size=recipe.batch, progress=advance, plugins=recipe.plugin_lib
        )
    if outputs.nbytes <= KEPT_BYTES:
        cache.store(key, outputs.to_bytes())
    return outputs, False


@contextlib.contextmanager
def candidate_of(quantization: Quantization, rest: str = "fp32") -> Iterator[Path]:
    """The file of a quantization's Q/DQ model while the context lasts; `rest` as for its `delivered`."""
    with scratch_folder() as folder:
        save_model(quantization.delivered(rest=rest), path := folder / "candidate.onnx")
        yield path


def warn_of_walls(model: Path, console: Console) -> None:
    """Warn of a model's operators that cannot be computed here, as a job that loads the model does."""
    if not is_engine(model) and (remark := View.of_model(read_model(model)).remark()):
        console.warn(remark)


def metric_of(recipe: Recipe) -> Metric:
    """The metric that the recipe's gate decides by.

    Raises:
        InputError: none is named, there is no such metric, or it cannot decide.
    """
    metric = load_metric(recipe.require("metric").metric)
    check_decides(metric)
    return metric


@dataclass(frozen=True)
class Evaluation:
    """The gate of a recipe: its evaluation rows, and the reference's outputs on them.

    Attributes:
        scored: the reference's value of the metric.
        remarks: notes of every verdict.
    """

    recipe: Recipe
    samples: Samples
    metric: Metric
    reference: Outputs
    scored: Scored
    cache: Cache
    console: Console
    remarks: tuple[str, ...] = ()

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        reference: Path,
        inputs: Iterable[InputSpec],
        cache: Cache,
        console: Console,
    ) -> Evaluation:
        """Load the data, run the reference on them and score it: what is wrong with data, labels, metric or
        margin is found before anything takes long.

        Raises:
            InputError: an option is missing, the metric cannot decide, the data have no targets for it,
                the reference does not run on them, or its outputs cannot be scored or score less than the
                recipe requires.
        """
        given = recipe.require("eval", "metric")
        references.use(recipe.op_reference)
        metric = metric_of(recipe)
        samples = load_samples(given.eval, tuple(inputs), recipe.preprocess, recipe.feeding)
        if not is_engine(reference):
            samples = with_states(reference, samples, cache, console, workers=recipe.threads)
        if metric.needs_targets and not samples.targets:
            raise InputError(
                f"the metric '{metric.name}' needs targets, and the evaluation data has none",
                file=samples.source,
                remedy="add an array of labels, or use the metric 'cosine', which needs none",
            )
        outputs = _outputs(reference, "reference", recipe, samples, cache, console)
        if outputs.mixed:
            console.warn(_mixed(outputs.mixed))
        check_reference(outputs.arrays, ignore_nonfinite=recipe.ignore_nonfinite, samples=samples)
        with about(samples.source):
            scored = score_reference(outputs.arrays, dict(samples.targets), metric)
        value = scored.value
        doubtful = doubt(metric, outputs.arrays, dict(samples.targets), value)
        if recipe.min_reference is not None and value < recipe.min_reference:
            raise InputError(
                f"the reference scores {value:.4g} in {metric.name}, at least {recipe.min_reference:g} is"
                " required",
                file=samples.source,
                cause=doubtful,
                remedy="check labels, preprocessing and model: nothing can be judged by such a reference",
            )
        if doubtful:
            console.warn(doubtful)
        if scored.rows is None and scored.seconds >= LONG_CALL:
            console.say(
                "metric",
                f"one call takes {scored.seconds:.2g} s; for an interval it is called again and again, for a"
                " minute or so: return a value for each sample instead, if their mean is the metric",
            )
        return cls(recipe, samples, metric, outputs, scored, cache, console)

    @property
    def value(self) -> float:
        """The reference's value of the metric."""
        return self.scored.value

    def verdict(
        self, candidate: Path, against: Outputs | None = None, *, final: bool = True, again: bool = False
    ) -> Verdict:
        """What the gate says of a candidate (ONNX model or engine), with the SQNR that the recipe asks for as
        a check; a simulated pass that `is_doubtful` has to be one in a second run, too. See `published`.

        Args:
            against: outputs to compare with instead of the reference's; then nothing is checked beside.
            final: an interval is resampled although no confidence was asked for, whatever the metric.
            again: this job has judged the candidate before: that its outputs are in the cache is no news.
        """
        verdict = self._judged(candidate, against, final=final, said=again)
        verdict = replace(verdict, notes=(*verdict.notes, *self.remarks))
        if against:
            return verdict
        if (least := self.recipe.min_sqnr) is not None:
            verdict = verdict.with_checks(_sqnr_check(verdict, least, len(self.samples)))
        if is_doubtful(verdict):
            fused = self._judged(candidate, final=False, said=True, fused=True)
            verdict = _confirmed(verdict, fused)
        return verdict

    def _judged(
        self,
        candidate: Path,
        against: Outputs | None = None,
        *,
        final: bool,
        said: bool,
        fused: bool = False,
    ) -> Verdict:
        """What the gate itself says; the arguments are those of `verdict` and `outputs_of`."""
        recipe, samples = self.recipe, self.samples
        outputs = _outputs(
            candidate, "candidate", recipe, samples, self.cache, self.console, said=said, fused=fused
        )
        with about(candidate):
            return decide(
                (against or self.reference).arrays,
                outputs.arrays,
                dict(samples.targets),
                self.metric,
                max_drop=recipe.max_drop,
                confidence=recipe.confidence,
                executor=outputs.executor,
                ignore_nonfinite=recipe.ignore_nonfinite,
                scored=None if against else self.scored,
                resampling=Resampling(self.console) if final or recipe.confidence is not None else None,
                sequences=samples.sequences.starts if samples.sequences else (),
            )

    def simulated(self, quantization: Quantization) -> Verdict:
        """What the gate says of a quantization, run on the CPU."""
        with candidate_of(quantization, self.recipe.precision) as candidate:
            return self.verdict(candidate, final=False)

    def published(self, verdict: Verdict) -> Verdict:
        """A verdict as the user gets it, with the warnings so far: inconclusive where the recipe requires an
        engine and none ran."""
        verdict = replace(verdict, warnings=tuple(self.console.warnings))
        return verdict.require_engine() if self.recipe.require_engine else verdict


def is_doubtful(verdict: Verdict) -> bool:
    """Whether a simulated pass may be none on an engine, which sums in another order and rounds elsewhere:
    the samples do not prove it, or it takes more than `CLOSE` of the margin."""
    if verdict.executor == "engine" or verdict.gate is not Outcome.PASS or verdict.relative_drop is None:
        return False
    return not verdict.proved or verdict.relative_drop > CLOSE * verdict.max_drop


def _confirmed(verdict: Verdict, fused: Verdict) -> Verdict:
    """A verdict with what became of the second run, in the other way that an engine may compute in; where
    that does not pass, nobody knows whether an engine does."""
    text = (
        "run again with sums in another order and nothing rounded to float16 within kernels:"
        f" {fused.drop_text()}"
    )
    if fused.gate is Outcome.PASS:
        return replace(verdict, notes=(*verdict.notes, text))
    return verdict.with_checks(
        Check("passes with other roundings", Outcome.INCONCLUSIVE, f"{text}: an engine may fail")
    )


def _mixed(names: Sequence[str]) -> str:
    """What is to be said of a model whose rows are not independent."""
    return (
        f"what the model gives for a row depends on the other rows of its batch ({', '.join(names)}): the"
        " verdict holds for the batches of this run, and another --batch or another order may give another;"
        " export the model so that each row is computed by itself (a mean over the batch axis, or a batch"
        " normalization in training mode?)"
    )


def _sqnr_check(verdict: Verdict, least: float, rows: int) -> Check:
    """Whether every output has an SQNR of at least `least` dB on all rows; nobody knows where some of them
    cannot be compared."""
    lowest = verdict.lowest_sqnr_db
    found = f"the outputs have {lowest:.1f} dB" if verdict.outputs else "the outputs are not finite"
    outcome = Outcome.PASS if lowest >= least else Outcome.FAIL
    if any(item.not_compared for item in verdict.outputs.values()):
        compared = [item.sqnr_db for item in verdict.outputs.values() if item.not_compared < rows]
        outcome = Outcome.INCONCLUSIVE if min(compared, default=least) >= least else Outcome.FAIL
        found += " where they can be compared"
    return Check(
        f"SQNR at least {least:g} dB",
        outcome,
        f"--min-sqnr: {found}, at least {least:g} dB is required",
    )


def _outputs(
    model: Path,
    label: str,
    recipe: Recipe,
    samples: Samples,
    cache: Cache,
    console: Console,
    *,
    said: bool = False,
    fused: bool = False,
) -> Outputs:
    outputs, cached = outputs_of(model, samples, recipe, cache, console, label=label, fused=fused)
    if cached and not said:
        console.say("gate", f"outputs of the {label} from the cache, nothing was run")
    return outputs
