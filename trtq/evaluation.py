"""Running models over data, with what was run before taken from the cache."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from trtq.cache import Cache, Key
from trtq.console import Console
from trtq.data.samples import Samples
from trtq.files import sha256_file
from trtq.gate.execute import ENGINE_SUFFIXES, Outputs, fingerprint, run_model
from trtq.graph.model import model_sha256

CACHED_BYTES = 1 << 28
"""Outputs above this size are not cached."""


def outputs_of(
    model: Path,
    samples: Samples,
    cache: Cache,
    console: Console,
    *,
    label: str,
    sha256: str | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
) -> tuple[Outputs, bool]:
    """The model's outputs on every row, and whether they came from the cache.

    Args:
        model: an ONNX file, simulated on the CPU, or an engine, run on the GPU.
        label: what the progress is called.
        sha256: hash of the model including its external data; default: found here.

    Raises:
        InputError, MissingBackendError: as `run_model`.
    """
    sha256 = sha256 or (sha256_file(model) if model.suffix in ENGINE_SUFFIXES else model_sha256(model))
    key = Key("outputs", sha256, samples.hash, {"executor": fingerprint(model)})
    if (content := cache.fetch(key)) is not None:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = {name: stored[f"output.{name}"] for name in stored["names"].tolist()}
            return Outputs(arrays, "engine" if str(stored["executor"]) == "engine" else "simulation"), True
    with console.progress(label, len(samples)) as advance:
        outputs = run_model(model, samples, batch_size=batch_size, threads=threads, progress=advance)
    if sum(array.nbytes for array in outputs.arrays.values()) <= CACHED_BYTES:
        buffer = io.BytesIO()
        stored = {"names": np.array(list(outputs.arrays)), "executor": np.array(outputs.executor)}
        stored |= {f"output.{name}": array for name, array in outputs.arrays.items()}
        np.savez(buffer, **stored)
        cache.store(key, buffer.getvalue())
    return outputs, False
