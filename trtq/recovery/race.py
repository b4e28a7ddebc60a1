"""On the GPU here: what layers take is measured before a plan is chosen, and engines race before one is.

Both take engines that are built for it. Where they cannot be built or run, the GPU's data sheet stands in for
the first, and nothing for the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trtq.backends.timing import Measuring, measure
from trtq.calibration.table import Table
from trtq.console import Console
from trtq.cost.interface import Latency
from trtq.cost.measured import time_engines
from trtq.cost.timed import TimedEngine
from trtq.errors import TrtqError
from trtq.graph.place import leave_out
from trtq.graph.plan import Plan
from trtq.graph.quantization import Quantization
from trtq.job import Job
from trtq.recovery.attempt import Attempt, build_in, write
from trtq.scratch import scratch_folder

LAYERS, RACE = Measuring(duration_s=1.0), Measuring()
"""How long engines are timed, for their layers and for which is the fastest."""


def layers_timed(job: Job, plan: Plan) -> list[TimedEngine]:
    """The job's engines without INT8 and with all of a plan, timed layer by layer on the GPU here; none where
    they cannot be built or run, which is said.

    They have scales of 1: no kernel's time depends on those.
    """
    bare = leave_out(job.model.graph, plan, dict.fromkeys(plan.int8_nodes, "left out to measure"))
    engines = []
    try:
        with scratch_folder() as folder:
            for name, placed in (("float", bare), ("int8", plan)):
                scales = dict.fromkeys(placed.tensors, np.float32(1))
                quantization = Quantization(job.model.graph, placed, scales)
                (folder / name).mkdir()
                write(quantization, Table.of(quantization), job.recipe, folder / name)
                engines.append(build_in(folder / name, job.recipe, job.profile, placed).engine)
            timed = time_engines(engines, LAYERS, plugins=job.recipe.plugin_lib)
    except TrtqError as error:
        job.console.say("latency", f"layers are not timed here: {error.problem}")
        return []
    text = ", ".join(f"{each.precision} {each.microseconds:.1f} µs" for each in timed)
    job.console.say("latency", f"layers of two engines timed on the GPU here: {text}")
    return timed


def raced(attempts: Sequence[Attempt], plugins: Sequence[str], console: Console) -> list[Attempt]:
    """Attempts with what their engines take, timed in turns on the GPU here.

    Raises:
        InputError, MissingBackendError: as `measure`.
    """
    timings = measure([attempt.folder / "model.plan" for attempt in attempts], RACE, plugins)
    found = []
    for attempt, timing in zip(attempts, timings, strict=True):
        moved = attempt.latency.bytes if attempt.latency else 0
        latency = Latency(1e3 * timing.p50_ms, (), "measured", "the GPU here, engines in turns", moved)
        console.say("race", f"{attempt.step}: {latency.microseconds:.1f} µs")
        found.append(replace(attempt, latency=latency))
    return found
