"""Several candidates judged on the same samples until one passes.

With a confidence c, a candidate whose true drop is just the margin passes by chance in a share 1 - c of all
cases. Where up to k candidates are tried until one passes, one of them does so up to k times as often, and
what is said to be proved at 95 % is not. So all candidates that one job may try share the error 1 - c
(Bonferroni's inequality, which holds however alike they are): the first one, which is the one that most jobs
deliver, has most of it, and the others have equal parts of the rest.

Where the point estimate decides, there is no error to share: then the verdict on a candidate that others went
before says that its drop is the better of several.
"""

from __future__ import annotations

import math
from dataclasses import replace

from trtq.gate.evaluation import Evaluation
from trtq.gate.verdict import percent

OF_FIRST = 0.8
"""The part of the error that is the first candidate's."""

MOST_LATER = 40
"""The most candidates that follow, rounded up: two searches with twelve each, what they and the other steps
of the workflow give, and that with the rest in float32."""


def level_of(confidence: float, *, first: bool) -> float:
    """The one-sided level at which one of several candidates has to clear the margin."""
    error = 1 - confidence
    level = 1 - (OF_FIRST * error if first else (1 - OF_FIRST) * error / MOST_LATER)
    return min(level, math.nextafter(1, 0))


def judging(evaluation: Evaluation, confidence: float | None, *, first: bool) -> Evaluation:
    """The evaluation as it judges the first of several candidates, or one that follows.

    Args:
        confidence: of the job; None: the point estimate decides.
    """
    if confidence is None:
        better = "others were judged on these samples before it: its drop may look better than it is"
        return replace(evaluation, remarks=() if first else (better,))
    level = level_of(confidence, first=first)
    remark = (
        f"judged at {percent(level)}: all candidates that this job may try on the same samples share the"
        f" {percent(1 - confidence)} that the confidence leaves"
    )
    recipe = replace(evaluation.recipe, confidence=level)
    return replace(evaluation, recipe=recipe, remarks=(remark,))
