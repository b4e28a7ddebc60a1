"""Files on disk: hashes, and writing that leaves either the whole file or the old one."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from trtq import stops
from trtq.errors import InputError
from trtq.scratch import folder_in

if sys.platform != "win32":
    import fcntl

PathLike = str | os.PathLike[str]

T = TypeVar("T")

MOST_BYTES = 1 << 28
"""Files that are read whole as text, JSON or a table are refused above this size."""

DEEPEST = 64
"""Levels of lists and mappings in a JSON or TOML file."""

_DESCRIPTOR = re.compile(
    r"/dev/(?P<name>stdin|stdout|stderr)|(/dev|/proc/(?P<process>[^/]+))/fd/(?P<number>\d+)"
)
_READER_SECONDS = 10.0
_LONGEST_INTEGER = 20
"""Characters of one that has 64 bits."""


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is moved into place, otherwise removed.

    The temporary file is in the same folder, so the move is one rename: a reader, a concurrent
    writer or Ctrl-C never sees half a file. Missing parent folders are made; of a link, what it leads to is
    replaced.

    Raises:
        InputError: the folder cannot be written to, the disk is full, or `path` is a folder, a device or a
            stream.
    """
    given = Path(path)
    try:
        if is_stream(given) or (given.exists() and not given.is_file()):
            raise OSError("it is not a regular file")
        path = Path(os.path.realpath(given))
        path.parent.mkdir(parents=True, exist_ok=True)
        with folder_in(path.parent, path.name) as folder:
            yield folder / path.name
            stops.check()
            os.replace(folder / path.name, path)
    except OSError as error:
        raise _cannot_write(given, error) from error


@contextlib.contextmanager
def staged_folder(output: PathLike, replaced: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a hidden folder whose files are moved into `output` at the end, or thrown away.

    It is in `output`, or in the folder above that exists, so that every move is one rename. `output` is made
    only when there is something to move; other processes that move files into it wait. An error or a signal
    while the files are moved puts back what was there; a process killed then leaves files missing, never old
    ones among new ones.

    Args:
        replaced: names of an earlier result's files, which go even where there is no new one.

    Raises:
        InputError: the folder cannot be written to, a file's place is taken by a folder, or the disk is full.
    """
    output = Path(output)
    _check_places(output, replaced)
    home = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(folder_in(home, output.name))
        except OSError as error:
            raise _cannot_write(output, error) from error
        made = folder / "made"
        made.mkdir()
        try:
            yield made
            _move_files(made, output, replaced)
        except InputError as error:
            if error.file is None or not Path(error.file).is_relative_to(folder):
                raise
            file = output / Path(error.file).name  # where it would have come to lie
            raise InputError(error.problem, file=file, cause=error.cause, remedy=error.remedy) from error


def is_stream(path: PathLike) -> bool:
    """Whether a path leads to a pipe, a character device such as a terminal, or an open descriptor such as
    /dev/stdout, also where that is redirected to a file: bytes go there in order, and nothing replaces it."""
    if _descriptor(path) is not None:
        return True
    with contextlib.suppress(OSError, ValueError):
        mode = os.stat(path).st_mode
        return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)
    return False


def check_name(path: PathLike) -> None:
    """Refuse a path whose bytes are no UTF-8: ONNX Runtime opens no such file, and trtq's own files, where
    names of others stand, are UTF-8.

    Raises:
        InputError: it is such a path.
    """
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            "a path is not UTF-8", file=path, cause=error.reason, remedy="rename the file, or its folder"
        ) from error


def is_stdout(path: PathLike) -> bool:
    """Whether a path is this process's standard output."""
    return _descriptor(path) == 1


def _descriptor(path: PathLike) -> int | None:
    """The open descriptor of this process that a path leads to by way of its links, if it is one."""
    path = os.path.abspath(path)
    for _ in range(40):  # as many links as Linux follows
        if (found := _DESCRIPTOR.fullmatch(path)) and found["process"] in (None, "self", str(os.getpid())):
            names = ("stdin", "stdout", "stderr")
            return names.index(found["name"]) if found["name"] else int(found["number"])
        try:
            path = os.path.abspath(os.path.join(os.path.dirname(path), os.readlink(path)))
        except (OSError, ValueError):  # no link
            return None
    return None


def write_bytes(path: PathLike, content: bytes) -> None:
    """Write `content` to `path`: to a file in one move (see `atomic_path`), into a stream as it comes.

    Raises:
        InputError: as `atomic_path`; a pipe that nobody reads; a stream that cannot be written to.
    """
    if not is_stream(path):
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
        return
    try:
        with os.fdopen(_opened_stream(path), "wb") as stream:
            stream.write(content)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _cannot_write(Path(path), error) from error


def _opened_stream(path: PathLike) -> int:
    """A new descriptor of a stream, for writing. A pipe's reader is waited for some seconds."""
    if (descriptor := _descriptor(path)) is not None:
        if descriptor == 1 and sys.stdout is not None:
            sys.stdout.flush()
        return os.dup(descriptor)
    end = time.monotonic() + _READER_SECONDS
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > end:
                raise OSError(errno.ENXIO, "nobody reads the pipe") from error
            time.sleep(0.05)
            continue
        os.set_blocking(descriptor, True)
        return descriptor


def write_text(path: PathLike, content: str) -> None:
    """Write `content` to `path` as UTF-8 (see `write_bytes`)."""
    write_bytes(path, content.encode())


def write_json(path: PathLike, value: Any) -> None:
    """Write `value` as indented JSON (see `write_bytes`); NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_bytes(path: PathLike, most: int = MOST_BYTES) -> bytes:
    """A file that is read whole: a regular one of at most so many bytes, never a pipe or an endless device.

    Raises:
        OSError: missing, unreadable, no regular file, or too large; `strerror` says so.
    """
    try:
        with open(path, "rb", opener=_open_regular) as file:
            if os.fstat(file.fileno()).st_size <= most and len(content := file.read(most + 1)) <= most:
                return content
    except ValueError as error:  # a path with a NUL
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from error
    raise OSError(errno.EFBIG, f"it is larger than the {most:,} bytes that such a file may have")


def _open_regular(path: str, flags: int) -> int:
    """Open without waiting, as for a pipe's other end, and only what is a regular file."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return descriptor


def read_json(path: PathLike, what: str) -> Any:
    """The JSON value in `path`; `what` names the kind of file in the error.

    Raises:
        InputError: the file is missing, unreadable or not JSON, which has no NaN and no infinity.
    """
    try:
        return parse_json(read_bytes(path))
    except OSError as error:
        raise InputError(f"cannot read the {what}", file=path, cause=error.strerror) from error
    except ValueError as error:
        raise InputError(f"cannot read the {what}", file=path, cause=error) from error


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, which has no NaN and no infinity, nested too deeply, or has an integer
            beyond 64 bits.
    """
    try:
        value = json.loads(content, parse_constant=_refuse_constant, parse_int=_parse_int)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Refuse lists and mappings within each other beyond `DEEPEST`: what walks through them recurses.

    Raises:
        ValueError: they are nested too deeply.
    """
    level = [value] if isinstance(value, Mapping | list) else []
    for _ in range(DEEPEST):
        inner = (v.values() if isinstance(v, Mapping) else v for v in level)
        level = [child for values in inner for child in values if isinstance(child, Mapping | list)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _parse_int(text: str) -> int:
    if len(text) > _LONGEST_INTEGER or not -(1 << 63) <= int(text) < 1 << 63:
        raise ValueError("it has an integer beyond 64 bits")
    return int(text)


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
        InputError: the file is missing or unreadable, or no regular one.
    """
    digest = hashlib.sha256()
    with _regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def first_bytes(path: PathLike, count: int) -> bytes:
    """Up to `count` bytes of a file's start, which tell what it is.

    Raises:
        InputError: as `sha256_file`.
    """
    with _regular(path) as file:
        return file.read(count)


@contextlib.contextmanager
def _regular(path: PathLike) -> Iterator[BinaryIO]:
    """A regular file, open for reading; what goes wrong within is an `InputError` about it."""
    try:
        with open(path, "rb", opener=_open_regular) as file:
            yield file
    except (OSError, ValueError) as error:
        raise InputError(
            "cannot read the file",
            file=path,
            cause=getattr(error, "strerror", error),
            remedy="check the path",
        ) from error


def sha256_json(value: Any) -> str:
    """Hash of a JSON value, the same whatever the order of its keys."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def _check_places(output: Path, names: Iterable[str]) -> None:
    """Raise InputError where a file of `output` would come to lie at a folder."""
    for name in names:
        if (output / name).is_dir():
            raise _cannot_write(output / name, OSError("it is a folder"))


def _move_files(made: Path, output: Path, replaced: Sequence[str]) -> None:
    """Move the files of `made` into `output`, all or none; see `staged_folder`."""
    names = sorted(path.name for path in made.iterdir())
    before = made.with_name("before")
    try:
        before.mkdir()
        output.mkdir(parents=True, exist_ok=True)
        with stops.deferred(), locked(output), contextlib.ExitStack() as back:
            stops.check()
            _check_places(output, names)
            for name in dict.fromkeys([*names, *replaced]):
                if os.path.lexists(output / name):
                    os.replace(output / name, before / name)
                    back.callback(os.replace, before / name, output / name)
            for name in names:
                os.replace(made / name, output / name)
                back.callback(os.replace, output / name, made / name)
            back.pop_all()
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
