"""The content-addressed cache: what was computed for a model, its data and a method is not computed again.

Layout, the same at run time and in the repository's `calib_cache/`::

    <root>/<model>/<data>/<kind>-<key>.<suffix>        the content: statistics, table or outputs
    <root>/<model>/<data>/<kind>-<key>.<suffix>.json   its SHA-256, its key, notes, and a hash of all these
    <root>/<model>/job.txt                             name of the model's file, for people

`<model>` and `<data>` are the first 16 digits of their SHA-256, `<key>` those of the whole key. A key holds

- `kind`, and the kind's `algorithm`: a number that is raised when the same inputs should give something else;
- `code`: the hash of the source code that computes the kind, and `packages`: the versions of what it calls;
- `model`, `data`, and the entries that the caller names: everything else the content depends on.

So nothing that other code computed is used, even within one release. What changes no content (threads,
workers, where shards run) is in no key. Golden tables that are checked in (`calib_cache/`) are therefore
compared by content; nobody looks them up by key.

Concurrent readers and writers see whole entries: a writer has the folder for itself, and takes the old record
away before it moves the content and the new record into place. So one that is killed leaves content without a
record, which is no entry. What does not match its hash, or lies under another key, is reported and computed
again.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trtq import __version__
from trtq.code_hash import code_sha256
from trtq.console import show
from trtq.errors import InputError
from trtq.files import (
    PathLike,
    decode,
    locked,
    read_bytes,
    sha256_bytes,
    sha256_json,
    write_bytes,
    write_json,
    write_text,
)
from trtq.scratch import sweep


@dataclass(frozen=True)
class Kind:
    """A kind of content.

    Attributes:
        suffix: of its files.
        algorithm: raise it when the same inputs should give something else. The hash of the code notices any
            edit by itself; the number states the intent, and is all there is without sources.
        modules: what computes it; all that these import counts, too.
        packages: what its values depend on besides those and the executor.
    """

    suffix: str
    algorithm: int
    modules: tuple[str, ...]
    packages: tuple[str, ...] = ()


_READING = ("trtq.data.load", "trtq.graph.model", "trtq.graph.fold")
_SENSITIVITY = ("trtq.recovery.sensitivity", "trtq.recovery.partial")
_RUNNING = ("trtq.simulation.outputs", "trtq.backends.engine")
_SHARDED = ("trtq.calibration.collect", "trtq.simulation.outputs")
_PACKAGES = ("numpy", "onnx", "onnx-graphsurgeon", "pillow")

KINDS: Mapping[str, Kind] = {
    "states": Kind("npz", 1, ("trtq.simulation.states", "trtq.data.load"), _PACKAGES),
    "statistics": Kind("npz", 2, ("trtq.calibration.collect", *_READING), (*_PACKAGES, "numba")),
    "table": Kind("cache", 2, ("trtq.calibration.calibrate", *_READING), (*_PACKAGES, "numba")),
    "extents": Kind("bin", 1, ("trtq.calibration.extents", *_READING), _PACKAGES),
    "reach": Kind("bin", 1, ("trtq.calibration.extents", *_READING), _PACKAGES),
    "outputs": Kind("npz", 3, (*_RUNNING, "trtq.data.load"), _PACKAGES),
    "quantization": Kind("npz", 2, ("trtq.recovery.workflow", *_READING), (*_PACKAGES, "numba", "torch")),
    "front": Kind("bin", 1, ("trtq.recovery.workflow", *_READING), (*_PACKAGES, "numba", "torch")),
    "sensitivity": Kind(
        "bin", 2, ("trtq.recovery.sensitivity", "trtq.recovery.partial", *_READING), _PACKAGES
    ),
    "checkpoint": Kind("bin", 2, ("trtq.recovery.learning.learn", *_READING), (*_PACKAGES, "torch")),
    "shard": Kind("npz", 3, (*_SHARDED, *_READING), (*_PACKAGES, "numba")),
}
"""Every kind of content that is cached."""

_JOB = "job.txt"
_LONGEST_JOB = 4096

_OTHER_KEY = "it belongs to another key"

_OTHER_FOLDER = "give another folder with --cache or $TRTQ_CACHE"


@dataclass(frozen=True)
class Key:
    """What a cached content depends on; `Key.of` names it.

    Attributes:
        kind: one of `KINDS`.
        model, data: SHA-256 of the model and of the data.
        entries: name -> everything else, as JSON values (method, tensors, executor, ...).
    """

    kind: str
    model: str
    data: str
    entries: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: str, *, model: str, data: str, **entries: Any) -> Key:
        """A key with its entries by name."""
        return cls(kind, model, data, entries)

    def to_json(self) -> dict[str, Any]:
        """The key as it stands in the file beside the content.

        Raises:
            ValueError: an entry has the name of something that every key holds.
        """
        kind = KINDS[self.kind]
        fixed = {
            "kind": self.kind,
            "algorithm": kind.algorithm,
            "code": code_sha256(*kind.modules),
            "packages": {name: _version(name) for name in kind.packages},
            "trtq": __version__,
            "model": self.model,
            "data": self.data,
        }
        if taken := fixed.keys() & self.entries.keys():
            raise ValueError(f"every key has {sorted(taken)}")
        return {**fixed, **self.entries}


@cache
def _version(package: str) -> str | None:
    """The version of a package that is installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Entry:
    """A file of the cache as `trtq cache` lists it.

    Attributes:
        key: as its record says (see `Key.to_json`); empty where the record cannot be read, or is an old one.
        problem: what is wrong with it, if anything.
        notes: what is kept beside it.
        modified: when its content was written, in seconds since 1970.
        job: name of the file of the model in whose job it was made first; empty where that is not known.
    """

    path: Path
    key: Mapping[str, Any]
    size: int
    modified: float
    problem: str | None
    notes: Mapping[str, Any] = field(default_factory=dict)
    job: str = ""

    @property
    def made_by(self) -> str:
        """The method of a table, or what ran the model; empty where the key has neither."""
        return str(self.key.get("method") or str(self.key.get("executor", "")).partition(":")[0])

    def to_json(self) -> dict[str, Any]:
        """Path, problem, notes and key as JSON values."""
        return {"path": str(self.path), "problem": self.problem, **self.notes, **self.key}


def default_root() -> Path:
    """`$TRTQ_CACHE`, or `trtq/calib_cache` in the user's cache folder."""
    if root := os.environ.get("TRTQ_CACHE"):
        return Path(root)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "trtq" / "calib_cache"


@dataclass(frozen=True)
class Cache:
    """A cache folder.

    Attributes:
        report: receives a line for every damaged entry.
        job: name of the model's file, for people who list the cache; no key depends on it.
    """

    root: Path
    report: Callable[[str], object] = show
    job: str = ""

    def __post_init__(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise InputError("the cache is not a folder", file=self.root, remedy=_OTHER_FOLDER)

    @classmethod
    def at(cls, folder: PathLike | None, report: Callable[[str], object] = show, job: str = "") -> Cache:
        """The cache in a folder, or the user's (`default_root`)."""
        return cls(Path(folder) if folder else default_root(), report, job)

    @property
    def timing(self) -> Path:
        """The folder of TensorRT's kernel timings; only TensorRT can say whether they are damaged."""
        return Path(self.root) / "timing"

    def path(self, key: Key) -> Path:
        """Where the content of `key` is kept."""
        return Path(self.root) / _place(key.to_json())

    def fetch(self, key: Key) -> bytes | None:
        """The content of `key`, or None where it is not cached or damaged (which is reported)."""
        found = self.fetch_noted(key)
        return None if found is None else found[0]

    def fetch_noted(self, key: Key) -> tuple[bytes, dict[str, Any]] | None:
        """As `fetch`, with the notes that were stored beside the content."""
        path = self.path(key)
        try:
            content, record = _read(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            problem: str | None = str(error)
        else:
            problem = _problem(path, content, record)
            if problem is None and record.get("key") != json.loads(json.dumps(key.to_json())):
                problem = _OTHER_KEY
            if problem is None:
                return content, _notes(record)
        self.report(f"cache entry {path} is damaged ({problem}); it is computed again")
        return None

    def store(self, key: Key, content: bytes, notes: Mapping[str, Any] | None = None) -> None:
        """Keep `content` under `key`; `notes` are JSON values kept beside it.

        The record is flat except for the key, so a cached table's record is the table's metadata.
        """
        path = self.path(key)
        record = json.loads(
            json.dumps({**(notes or {}), "sha256": sha256_bytes(content), "key": key.to_json()})
        )
        record["record_sha256"] = sha256_json(record)  # of what will be read: all keys are text
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.parent):
                _record_path(path).unlink(missing_ok=True)
                write_bytes(path, content)
                write_json(_record_path(path), record)
            if self.job and not (named := path.parent.parent / _JOB).exists():
                write_text(named, self.job)
        except (InputError, OSError) as error:
            file, cause = (
                (error.file, error.cause) if isinstance(error, InputError) else (path, error.strerror)
            )
            raise InputError(
                "cannot write to the cache", file=file, cause=cause, remedy=_OTHER_FOLDER
            ) from error

    def entries(self) -> Iterator[Entry]:
        """Every entry of the cache, verified, in the order of their paths."""
        for suffix in sorted({kind.suffix for kind in KINDS.values()}):
            for path in sorted(Path(self.root).glob(f"*/*/*.{suffix}")):
                if entry := _entry(path):
                    yield entry

    def prune(self, keep: Callable[[Entry], bool]) -> list[Entry]:
        """Remove and return the entries that `keep` does not want; what killed processes left goes, too."""
        for folder in Path(self.root).glob("*/*/"):
            sweep(folder)
        unwanted = [entry for entry in self.entries() if not keep(entry)]
        for entry in unwanted:
            remove(entry.path)
        return unwanted

    def prune_older(
        self, days: float, wanted: Callable[[Entry], bool] = lambda entry: True
    ) -> tuple[int, int]:
        """Remove what is damaged or older than some days; how many entries went, and how many stayed.

        Args:
            wanted: only entries of which this is true go.

        Raises:
            InputError: `days` is not a number from 0.
        """
        if not 0 <= days < math.inf:
            raise InputError(f"--days is {days}", remedy="use a number from 0")
        oldest = time.time() - 86400 * days
        removed = self.prune(
            lambda entry: not wanted(entry) or (not entry.problem and entry.modified > oldest)
        )
        return len(removed), sum(1 for _ in self.entries())


def remove(path: PathLike) -> None:
    """Remove an entry and the record beside it."""
    path = Path(path)
    try:
        with locked(path.parent):
            _record_path(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError("cannot remove the cache entry", file=path, cause=error.strerror) from error


def _entry(path: Path) -> Entry | None:
    """The entry at `path`, verified; None where it has no record, or another process has just removed it."""
    try:
        status = path.lstat()
        content, record = _read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return Entry(path, {}, status.st_size, status.st_mtime, f"unreadable: {error}")
    key, problem = record.get("key"), _problem(path, content, record)
    key = key if isinstance(key, dict) else {}
    return Entry(path, key, status.st_size, status.st_mtime, problem, _notes(record), _job(path))


def _job(path: Path) -> str:
    """The name that is kept beside the entries of a model; empty where there is none."""
    try:
        return read_bytes(path.parent.parent / _JOB, _LONGEST_JOB).decode(errors="replace")
    except OSError:
        return ""


def _problem(path: Path, content: bytes, record: Mapping[str, Any]) -> str | None:
    """What is wrong with an entry, if anything. Of tables without a key, as they are checked in, only the
    content is known."""
    if record.get("sha256") != sha256_bytes(content):
        return "its hash does not match"
    if "key" not in record:
        return None
    hashed = {name: value for name, value in record.items() if name != "record_sha256"}
    if record.get("record_sha256") != sha256_json(hashed):
        return "its record was changed"
    key = record["key"]
    if not isinstance(key, dict) or path.parts[-3:] != _place(key).parts:
        return _OTHER_KEY
    return None


def _place(key: Mapping[str, Any]) -> Path:
    """Where below a cache's root the content of a key is; see `Key.to_json`."""
    kind = KINDS.get(str(key.get("kind")))
    suffix = kind.suffix if kind else "?"
    folder = Path(str(key.get("model"))[:16]) / str(key.get("data"))[:16]
    return folder / f"{key.get('kind')}-{sha256_json(key)[:16]}.{suffix}"


def _notes(record: Mapping[str, Any]) -> dict[str, Any]:
    own = ("sha256", "record_sha256", "key")
    return {name: value for name, value in record.items() if name not in own}


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Content and record of an entry, both of one writer.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: the record is not one.
        OSError: they cannot be read.
    """
    with locked(path.parent, shared=True):
        record, content = _record_path(path).read_text(encoding="utf-8"), path.read_bytes()
    try:
        return content, decode(json.loads(record), dict[str, Any])
    except RecursionError as error:
        raise ValueError("the record is nested too deep") from error


def _record_path(path: Path) -> Path:
    return Path(f"{path}.json")
