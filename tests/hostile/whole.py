"""Every hostile case there is, by name, and a process of its own that tries them: one that hangs or dies is
found out, too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from hostile.inputs import Hostile as HostileInput
from hostile.inputs import all_cases
from hostile.models import Hostile as HostileModel
from hostile.models import flipped, hostile_models, write_data
from hostile.own_files import CACHE_READ_BY, DAMAGES, Command, copied, dumped, edited, read_by
from hostile.python import attempts
from hostile.trial import faults, tried

from trtq.errors import ExitCode

Try = Callable[[Path], list[str]]
"""Given an empty folder -> what is wrong."""

MODEL_COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "{model}"),
    "quantize": (
        *("quantize", "{model}", "--data", "data.npz", "--method", "max", "-o", "made.onnx"),
        *("--rest", "fp32", "--recover", "none"),  # nothing else runs all of the model
    ),
    "quantize with fixes": (
        "quantize",
        "{model}",
        "--data",
        "data.npz",
        "--method",
        "max",
        "-o",
        "made.onnx",
    ),
    "calibrate": ("calibrate", "{model}", "--data", "data.npz", "--method", "max", "-o", "made.cache"),
    "gate": ("gate", "{model}", "{model}", "--eval", "data.npz", "--metric", "cosine", "--json", "v.json"),
    "build": ("build", "{model}", "-o", "made.plan"),
    "bench": ("bench", "{model}", "--json", "b.json"),
    "convert": ("cache", "convert", "{model}", "-o", "made.cache"),
    "migrate": ("migrate", "{model}", "-o", "made"),
    "deploy": (
        *("deploy", "{model}", "--data", "data.npz", "--eval", "data.npz", "--metric", "top1", "-o", "made"),
        *("--backend", "none", "--method", "max", "--recover", "none"),
    ),
    "sensitivity": ("sensitivity", "{model}", "--data", "data.npz", "--method", "max", "-o", "made.json"),
}
"""The commands that read a model."""


def all_tries(seed: int, scale: int, own: Path) -> Iterator[tuple[str, str, Try]]:
    """Kind, name and the try itself, of every case.

    Args:
        scale: so many times as many where they are random.
        own: a folder that `write_own` filled.
    """
    for case in all_cases(seed, scale):
        yield "inputs", case.name, partial(_input, case)
    for name, attempt in attempts():
        yield "Python", name, attempt
    for number, model in enumerate(hostile_models()):
        for turn, command in enumerate(MODEL_COMMANDS):
            if command == "quantize" or (number + turn + seed) % 5 == 0:
                yield f"models: {command}", model.name, partial(_model, model, command)
    for number in range(seed * 1000, seed * 1000 + 200 * scale):
        command = [*MODEL_COMMANDS][number % len(MODEL_COMMANDS)]
        yield f"models of other bytes: {command}", str(number), partial(_model, flipped(number), command)
    source = random.Random(seed)
    for name, readers in read_by(own).items():
        content, changed = (own / name).read_bytes(), dict[str, bytes]()
        changed |= {kind: damage(content) for kind, damage in DAMAGES.items()}
        if name.endswith(".json"):
            edits = [*edited(json.loads(content))]
            chosen = source.sample(edits, min(len(edits), 60 * scale))
            changed |= {where: dumped(value) for where, value in chosen}
        changed |= {f"byte {n}": _flipped(source, content) for n in range(20 * scale)}
        if readers is CACHE_READ_BY:
            changed = dict(source.sample([*changed.items()], min(len(changed), 4 * scale)))
        for kind, new in changed.items():
            for command in readers:
                spelled = " ".join(command[:2] if command[0] == "cache" else command[:1])
                yield f"own files: {spelled}", f"{name}: {kind}", partial(_own, own, name, new, command)


def _input(case: HostileInput, folder: Path) -> list[str]:
    return faults(case, folder)


def _model(hostile: HostileModel, command: str, folder: Path) -> list[str]:
    (folder / "model").mkdir()
    path = hostile.write(folder / "model").relative_to(folder)
    write_data(folder)
    arguments = [argument.format(model=path) for argument in MODEL_COMMANDS[command]]
    run, found = tried(arguments, folder, may_write=True)
    if command == "quantize" and not hostile.harmless and run.code != ExitCode.BAD_INPUT:
        found.append(f"exit code {run.code}")
    return found


def _own(own: Path, name: str, content: bytes, command: Command, folder: Path) -> list[str]:
    """A command is given a changed file; from the cache it must make the same as before."""
    results = folder / "results"
    copied(own, results)
    (results / name).write_bytes(content)
    run, found = tried(command, results, may_write=True)
    page = results / "report.html"
    if page.exists() and any(text in page.read_text() for text in ("<script>", "\x1b")):
        found.append("markup in the report")
    if name.startswith("cache"):
        if run.code and command[:2] != ("cache", "verify"):
            found.append(f"exit code {run.code}: {run.err[-300:]}")
        for again in ("again.cache", "again.json"):
            if (results / again).exists() and _result(results / again) != _result(own / again):
                found.append(f"another {again}")
    return found


def _result(path: Path) -> object:
    """The content of a result, but for warnings, which say that the cache is damaged."""
    if path.suffix != ".json":
        return path.read_bytes()
    return {**json.loads(path.read_text()), "warnings": None}


def _flipped(source: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(source.randint(1, 4)):
        changed[source.randrange(len(changed))] = source.randrange(256)
    return bytes(changed)


# --- the process that tries them ----------------------------------------------------------------------


class Trying:
    """A process that tries cases by their number; it is replaced where one hangs or ends it.

    Args:
        cases: gives them, as `all_tries`.
        seconds: of the clock, after which a case hangs.
    """

    def __init__(self, cases: Callable[[], Iterable[tuple[str, str, Try]]], seconds: float = 120.0) -> None:
        self._cases, self._seconds = cases, seconds
        self._context = multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self._here, there = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(there, self._cases), daemon=True)
        self._process.start()
        there.close()

    def __call__(self, number: int) -> list[str]:
        """What is wrong with a case."""
        self._here.send(number)
        try:
            if self._here.poll(self._seconds):
                return list(self._here.recv())
            problem = "it hangs"
        except (EOFError, ConnectionError):
            self._process.join()
            problem = f"the process ended: {self._process.exitcode}"
        self.close()
        self._start()
        return [problem]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, cases: Callable[[], Iterable[tuple[str, str, Try]]]) -> None:
    with tempfile.TemporaryDirectory(prefix="hostile-") as home:
        os.environ["TRTQ_CACHE"] = str(Path(home) / "cache")
        os.environ["TMPDIR"] = tempfile.tempdir = str(Path(home) / "tmp")
        (Path(home) / "tmp").mkdir()
        known = [attempt for _, _, attempt in cases()]
        while True:
            number = connection.recv()
            folder = Path(tempfile.mkdtemp(dir=home))
            try:
                found = known[number](folder)
            except Exception as error:  # the case itself is wrong
                found = [f"the case fails: {type(error).__name__}: {error}"]
            found += [f"left {path.name}" for path in Path(home, "tmp").iterdir() if path.name != ".ses"]
            shutil.rmtree(folder, ignore_errors=True)
            connection.send(found)
