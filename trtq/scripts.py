"""The user's own Python: `FILE.py:FUNCTION`, for metrics and data, and whole files."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TextIO

from trtq.errors import InputError


def load_function(spec: str, what: str) -> tuple[Path, str, Callable[..., Any]]:
    """File, name and function that `FILE.py:FUNCTION` means; importing the file runs it.

    Args:
        what: what the function is for, as it stands in errors ("metric").

    Raises:
        InputError: the file or the function is missing, or the file does not import.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    function = getattr(load_module(path, what), name, None)
    if not callable(function):
        raise InputError(f"the {what}'s file has no function '{name}'", file=path)
    return path, name, function


def load_module(path: Path, what: str) -> ModuleType:
    """A file as a module; importing it runs it.

    Args:
        what: what it is for, as it stands in errors.

    Raises:
        InputError: the file is missing, or does not import.
    """
    if not path.is_file():
        raise InputError(f"the {what}'s file does not exist", file=path, remedy="check the path")
    module_spec = importlib.util.spec_from_file_location(f"trtq_script_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"the {what}'s file is not Python's", file=path, remedy="give a .py file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look their module up
    try:
        with contained():
            module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {error}"
        raise InputError(f"the {what}'s file does not import", file=path, cause=cause) from error
    return module


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Keep to the user's code what it does to the process.

    `os._exit` is an error as `sys.exit` is one: the process would end with whatever exit code it names, and 0
    is what passes. Processes that the code forks end as they like. Paths mean afterwards what they meant
    before, and results are printed where they were.

    Raises:
        RuntimeError: the code raised what has no text, or is no `Exception`, but for Ctrl-C and `sys.exit`.
        ValueError: standard output or standard error was closed.
    """
    leave, own, streams = os._exit, os.getpid(), (sys.stdout, sys.stderr)
    deepest = sys.getrecursionlimit()
    folder = os.getcwd() if os.path.exists(".") else None

    def refuse(status: int) -> NoReturn:
        if os.getpid() != own:
            leave(status)
        raise SystemExit(f"os._exit({status})")

    os._exit = refuse
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        text = _text(error)
        if text is None or not isinstance(error, Exception):  # nothing else would show, or catch it
            raise RuntimeError(f"{type(error).__name__}: {text or 'without a text'}") from None
        raise
    finally:
        os._exit = leave
        sys.setrecursionlimit(deepest)
        sys.stdout, sys.stderr = streams
        if folder is not None:
            os.chdir(folder)
        _reopen(streams)


def _text(error: BaseException) -> str | None:
    """The text of an error, if its own code can tell it."""
    try:
        return str(error)
    except Exception:
        return None


def _reopen(streams: tuple[TextIO | None, ...]) -> None:
    """Replace standard streams that were closed, so that printing is no error of its own, and raise one.

    Raises:
        ValueError: there are some.
    """
    closed = [index for index, stream in enumerate(streams, 1) if stream is not None and stream.closed]
    if not closed:
        return
    for index in closed:
        setattr(sys, ("stdin", "stdout", "stderr")[index], io.StringIO())
    raise ValueError("it closes standard output or standard error")
