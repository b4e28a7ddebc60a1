"""`manifest.json`: what went into a job and what came out, with hashes and versions."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from trtq import __version__
from trtq.backends.builders import NO_ENGINE, builder, chosen
from trtq.files import sha256_file
from trtq.gate.evaluation import Evaluation
from trtq.graph.door import read_model
from trtq.graph.ends import codes_of
from trtq.job import Job
from trtq.recipe import Recipe

_PACKAGES = ("numpy", "numba", "onnx", "onnx-graphsurgeon", "onnxruntime", "polygraphy", "pillow")


def manifest(job: Job, evaluation: Evaluation, command: str, folder: Path) -> dict[str, Any]:
    """The inputs of a job, the files in its folder, the versions and the exact command, as JSON values."""
    model, data, rows, metric = job.model, job.data, evaluation.samples, evaluation.metric
    return {
        "command": command,
        "versions": versions(job.recipe),
        "inputs": {
            "model": {"file": str(job.recipe.model), "sha256": model.sha256},
            "data": {"source": data.source, "rows": len(data), "sha256": data.hash},
            "eval": {"source": rows.source, "rows": len(rows), "sha256": rows.hash},
            "metric": {"name": metric.name, "fingerprint": metric.fingerprint},
        },
        "io": _codes(folder / "model.int8.onnx", {spec.name for spec in model.inputs}),
        "outputs": hashes_of(folder),
    }


def _codes(model: Path, inputs: set[str]) -> dict[str, Any]:
    """What the 8-bit inputs and outputs of a model stand for, and what the host does for each."""
    return {
        name: {**code.to_json(), "host": code.host_line(name, output=name not in inputs)}
        for name, code in codes_of(read_model(model).graph).items()
    }


def versions(recipe: Recipe) -> dict[str, str]:
    """Versions of everything that the results depend on."""
    found = {"trtq": __version__, **{name: version(name) for name in _PACKAGES}}
    if recipe.backend == NO_ENGINE:
        return found
    backend = chosen(recipe.backend)
    return found | {backend: builder(backend).version()}


def hashes_of(folder: Path) -> dict[str, Any]:
    """File name -> SHA-256 and size, for every file in a folder."""
    return {
        path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
    }
