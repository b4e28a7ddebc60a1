"""Files on disk: hashes, and writing that leaves either the whole file or the old one."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from trtq.errors import InputError

if sys.platform != "win32":
    import fcntl

PathLike = str | os.PathLike[str]

T = TypeVar("T")


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is moved into place, otherwise removed.

    The temporary file is in the same folder, so the move is one rename: a reader, a concurrent
    writer or Ctrl-C never sees half a file. Missing parent folders are made.

    Raises:
        InputError: the folder cannot be written to, the disk is full, or `path` is a folder or a device.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a device such as /dev/null would be replaced by a file
            raise OSError("it is not a regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        _apply_umask(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_folder(output: PathLike) -> Iterator[Path]:
    """Yield a hidden folder whose files are moved into `output` at the end, or thrown away.

    It is in `output`, or in the folder above that exists, so that every move is one rename. `output` is made
    only when there is something to move; other processes that move files into it wait.

    Raises:
        InputError: the folder cannot be written to, or the disk is full.
    """
    output = Path(output)
    home = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=home))
    except OSError as error:
        raise _cannot_write(output, error) from error
    try:
        yield folder
        _move_files(folder, output)
    except InputError as error:
        if error.file is None or not Path(error.file).is_relative_to(folder):
            raise
        file = output / Path(error.file).name  # where it would have come to lie
        raise InputError(error.problem, file=file, cause=error.cause, remedy=error.remedy) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_bytes(path: PathLike, content: bytes) -> None:
    """Write `content` to `path` in one move (see `atomic_path`)."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: PathLike, content: str) -> None:
    """Write `content` to `path` as UTF-8 in one move (see `atomic_path`)."""
    write_bytes(path, content.encode())


def write_json(path: PathLike, value: Any) -> None:
    """Write `value` as indented JSON in one move; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: PathLike, what: str) -> Any:
    """The JSON value in `path`; `what` names the kind of file in the error.

    Raises:
        InputError: the file is missing, unreadable or not JSON, which has no NaN and no infinity.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read the {what}", file=path, cause=error) from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def read_own_json(path: PathLike, what: str, parse: Callable[[Any], T], remedy: str | None = None) -> T:
    """What `parse` makes of the JSON value in `path`, a file that trtq wrote.

    Args:
        parse: raises ValueError for a value that is something else (see `decode`).
        remedy: what to do then.

    Raises:
        InputError: the file is missing, unreadable or not JSON, or `parse` refuses the value.
    """
    value = read_json(path, what)
    try:
        return parse(value)
    except ValueError as error:
        raise InputError(f"not a {what} of trtq", file=path, cause=error, remedy=remedy) from error


def decode(value: Any, kind: type[T], *, format: str | None = None, closed: bool = True) -> T:
    """A JSON value as a dataclass, or another type with annotated fields; nothing is converted but int to
    float, list to tuple and text to an enum's member.

    Args:
        format: what the value's own `format` must be; None: it has none.
        closed: refuse keys that a dataclass does not have. Those that have a default may be missing.

    Raises:
        ValueError: the value is something else; the message names the field, as in
            "`nodes[3].axis`: expected int, got str".
    """
    import msgspec

    if format is not None:
        value = dict(value) if isinstance(value, Mapping) else {}
        if (found := value.pop("format", None)) != format:
            raise ValueError(f"the format is {found}, not {format}")
    if closed:
        _refuse_unknown_keys(value, kind, "")
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at ")
        where = where.replace("$.", "").replace("$", "")
        problem = re.sub(r"^Object missing required field `(.*)`", r"the key '\1' is missing", problem)
        problem = problem.replace("`", "")
        problem = problem[0].lower() + problem[1:]
        raise ValueError(f"{where}: {problem}" if where else problem) from error


def _refuse_unknown_keys(value: Any, kind: Any, where: str) -> None:
    """Raise ValueError where a JSON object has a key that the dataclass it stands for does not have."""
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        known = get_type_hints(kind)
        if unknown := [name for name in value if name not in known]:
            place = f"`{where}`: " if where else ""
            raise ValueError(f"{place}unknown key {unknown[0]!r}; it may have {', '.join(known)}")
        for name, item in value.items():
            _refuse_unknown_keys(item, known[name], f"{where}.{name}" if where else name)
        return
    origin, of = get_origin(kind), get_args(kind)
    if isinstance(value, Mapping) and isinstance(origin, type) and issubclass(origin, Mapping):
        for name, item in value.items():
            _refuse_unknown_keys(item, of[1], f"{where}[{name!r}]")
    elif isinstance(value, list) and of:
        for index, item in enumerate(value):
            _refuse_unknown_keys(item, of[0], f"{where}[{index}]")
    else:
        for kind in of:
            _refuse_unknown_keys(value, kind, where)


def sha256_bytes(content: bytes | memoryview) -> str:
    """Lower-case hex SHA-256 of `content`."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: PathLike) -> str:
    """Lower-case hex SHA-256 of a file's bytes, read in blocks.

    Raises:
        InputError: the file is missing or unreadable.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(
            "cannot read the file", file=path, cause=error.strerror, remedy="check the path"
        ) from error
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON value, the same whatever the order of its keys."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def _move_files(folder: Path, output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with locked(output):
            for path in sorted(folder.iterdir()):
                os.replace(path, output / path.name)
    except OSError as error:
        raise _cannot_write(output, error) from error


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep other processes that lock `folder` out of it, where the file system can lock.

    Args:
        shared: keep only those out that do not share, as readers want it.

    Raises:
        OSError: the folder is missing or cannot be read.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(
        "cannot write the file",
        file=path,
        cause=error.strerror or error,
        remedy="check the folder's permissions and free space, or choose another output path",
    )


def _apply_umask(path: Path) -> None:
    """Give a file made by mkstemp (mode 0600) the mode an ordinary open() would have given it."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
