"""A build in a process of its own: what crashes there, as NVIDIA's libraries may, does not end the job."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from trtq.backends.builders import builder, chosen
from trtq.backends.compiled import Compiled
from trtq.backends.interface import DEFAULT_OPTIONS, Build, BuildOptions, Profile
from trtq.errors import BuildError, InputError, MissingBackendError, TrtqError
from trtq.scratch import scratch_folder
from trtq.stops import end_with

_KINDS = {kind.__name__: kind for kind in (BuildError, InputError, MissingBackendError)}


def try_build(
    name: str | None,
    model: Path,
    *,
    profile: Profile | None = None,
    targets: Sequence[str] = (),
    options: BuildOptions = DEFAULT_OPTIONS,
) -> Compiled:
    """Build an engine and throw it away; what it would run.

    Raises:
        BuildError, InputError, MissingBackendError: as `build_apart`.
    """
    with scratch_folder() as folder:
        made = build_apart(
            name, model, folder / "model.plan", profile=profile, targets=targets, options=options
        )
    return made.compiled


def build_apart(
    name: str | None,
    model: Path,
    engine: Path,
    *,
    profile: Profile | None = None,
    further: Sequence[Profile] = (),
    targets: Sequence[str] = (),
    options: BuildOptions = DEFAULT_OPTIONS,
    float32: Collection[str] = (),
) -> Build:
    """Build an engine as `builder(name).build` does.

    Raises:
        BuildError: the builder cannot build the model, or crashes on it.
        InputError, MissingBackendError: as the builder.
    """
    with scratch_folder() as folder:
        request, answer = folder / "request", folder / "answer"
        asked = {
            "profile": profile,
            "further": tuple(further),
            "targets": tuple(targets),
            "options": options,
            "float32": tuple(float32),
        }
        request.write_bytes(pickle.dumps((name, model, engine, asked)))
        code = f"import sys; sys.path[:] = {sys.path!r}; from trtq.backends.apart import serve; serve()"
        command = [sys.executable, "-c", code, str(request), str(answer), str(os.getpid())]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if not answer.exists():
            lines = done.stderr.strip().splitlines()
            raise BuildError(
                f"{chosen(name)} crashed while it built an engine from the model",
                file=model,
                cause="; ".join([_ending(done.returncode), *lines[-1:]]),
                remedy="report it to NVIDIA with the model; another version or --exclude may get round it",
            )
        said = json.loads(answer.read_text())
        if (error := said["error"]) is not None:
            kind = _KINDS[error.pop("kind")]
            raise kind(error.pop("problem"), **error)
        compiled, warnings = Compiled.from_json(said["compiled"]), tuple(said["warnings"])
        return Build(engine, tuple(said["targets"]), compiled, warnings, tuple(said["notes"]))


def serve() -> None:
    """In the process of its own: build what the request file says, and answer with what came of it."""
    end_with(int(sys.argv[3]))
    request, answer = map(Path, sys.argv[1:3])
    name, model, engine, asked = pickle.loads(request.read_bytes())
    said: dict[str, Any] = {"error": None}
    try:
        build = builder(name).build(model, engine, **asked)
        said["compiled"] = build.compiled.to_json()
        said |= {"targets": build.targets, "warnings": build.warnings, "notes": build.notes}
    except TrtqError as raised:
        said["error"] = {
            "kind": next(kind for kind in _KINDS if isinstance(raised, _KINDS[kind])),
            "problem": raised.problem,
            "file": raised.file,
            "cause": raised.cause,
            "remedy": raised.remedy,
        }
    answer.write_text(json.dumps(said))


def _ending(code: int) -> str:
    """How a process ended that gave no answer."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
