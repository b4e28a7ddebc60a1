"""What to try where a job did not pass: commands to copy, the one most likely to help first."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from trtq.gate.verdict import Outcome, Verdict
from trtq.recipe import STEPS, Recipe


@dataclass(frozen=True)
class Way:
    """Something to try: why, and the command; empty where there is none."""

    why: str
    command: str = ""


def ways(verdict: Verdict, recipe: Recipe | None, command: str) -> list[Way]:
    """What to try after a verdict that is no pass.

    Args:
        recipe: of the job; None: not known.
        command: that ran it; empty where Python called.
    """
    return list(_ways(verdict, recipe, command))


def _ways(verdict: Verdict, recipe: Recipe | None, command: str) -> Iterator[Way]:
    again = command if command.startswith("trtq deploy ") else "trtq deploy --recipe recipe.toml -o again"
    found = verdict.in_the_way
    if found is not None and found.options is not None:
        yield Way(
            f"Leave the noisiest layers in floating point ({found.advice}):", f"{again} {found.options}"
        )
    if verdict.gate is Outcome.INCONCLUSIVE and verdict.samples_to_prove is not None:
        yield Way(f"Evaluate on more samples: about {verdict.samples_to_prove} like these would decide.")
    if recipe is None:
        return
    if missing := [step for step in STEPS if step not in recipe.recover]:
        yield Way(
            f"Let the job recover accuracy by itself; {', '.join(missing)} was left out of its steps:",
            f"{again} --recover {','.join(STEPS)}",
        )
    if recipe.budget is not None:
        yield Way("Run it again without --budget: it goes on from its last finished step.")
    if recipe.model is not None and recipe.data is not None and found is not None and found.obstacles:
        given = f"{shlex.quote(str(recipe.model))} --data {shlex.quote(str(recipe.data))}"
        yield Way("Measure what each layer does on all rows:", f"trtq sensitivity {given}")
    if verdict.gate is Outcome.FAIL:
        yield Way(
            "Look at the data: calibration rows that are like those of production, made by the same"
            " preprocessing, are what ranges rest on; a few hundred are enough.",
        )
