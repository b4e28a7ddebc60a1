"""Ctrl-C, SIGTERM and SIGHUP: each ends the work as an exception, so that everything half done is cleaned up.

A library may swallow that exception, or raise its own in its place: an import that fails, a callback of C++
that cannot raise. So the signal is remembered, too: nothing is moved into its place after it (`check`), and
the command line ends as interrupted whatever exception reaches it (`unmasked`).

Python raises it when the main thread is back in Python, which a model that never ends keeps it from. So a
thread beside it sees the signal at once: runs of ONNX Runtime end (`run_options`), and where the main thread
stays away all the same, the process does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

PATIENCE = 10.0
"""Seconds after a signal that the main thread has to clean up and end."""

_received: list[int] = []

_runs: list[onnxruntime.RunOptions] = []

_cleaners: list[Callable[[], object]] = []

_whole = threading.RLock()
"""The main thread holds it while signals are deferred: the process does not end then."""

_watching: list[int] = []
"""The end of a pipe that the system writes signals to, while there is one."""


class Stopped(KeyboardInterrupt):
    """A signal asks the process to stop."""


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Turn the signals into `Stopped` while the context lasts; one that is ignored, as by nohup, stays so.

    Does nothing outside the main thread, and for a signal that the program around trtq handles.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = (signal.SIG_DFL, signal.default_int_handler)
    handlers = ((number, signal.getsignal(number)) for number in SIGNALS)
    previous = {number: handler for number, handler in handlers if handler in ours}
    if not previous:
        yield
        return
    with _watched(previous):
        for number in previous:
            signal.signal(number, _stop)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            _received.clear()


@functools.cache
def run_options() -> onnxruntime.RunOptions:
    """What every run of ONNX Runtime is given: one that a signal finds running fails, also if it would never
    end."""
    import onnxruntime

    _runs.append(onnxruntime.RunOptions())
    return _runs[-1]


def clean_at_last(function: Callable[[], object]) -> None:
    """Have a function called before a process ends whose main thread does not come back."""
    _cleaners.append(function)


@contextlib.contextmanager
def unmasked() -> Iterator[None]:
    """Raise `Stopped` in place of the exception that a signal has become in a library."""
    try:
        yield
    except BaseException:
        check()
        raise


def ended() -> int:
    """Say that the work was interrupted; the exit code as a shell has it: 128 and the signal's number."""
    return _interrupted(next(iter(_received), signal.SIGINT))


def _interrupted(number: int) -> int:
    print("trtq: interrupted; no result was written, finished steps are in the cache", file=sys.stderr)
    return 128 + number


def check() -> None:
    """Raise `Stopped` if a signal came, whatever became of the exception then."""
    if _received:
        raise Stopped


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Signals take effect when the context ends: what is within is done whole, or cannot be interrupted.

    Also where the program around trtq handles them, if in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[tuple[int, FrameType | None]] = []
    handlers = ((number, signal.getsignal(number)) for number in SIGNALS)
    previous = {number: handler for number, handler in handlers if callable(handler)}
    for number in previous:
        signal.signal(number, lambda number, frame: pressed.append((number, frame)))
    try:
        with _whole:
            yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number, frame in pressed:
            previous[number](number, frame)


def end_with(parent: int) -> None:
    """Let this process be killed when the one that started it ends, whatever ends that; Linux only.

    Args:
        parent: the process id of the one that started it, which may have ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise Stopped


@contextlib.contextmanager
def _watched(numbers: Collection[int]) -> Iterator[None]:
    """A thread waits for these signals while the context lasts; see `_watch`. Not on Windows, whose pipes
    may block."""
    if sys.platform == "win32":
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(reader, numbers, over), daemon=True)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _watching.append(writer)
    watcher.start()
    try:
        yield
    finally:
        _watching.clear()
        signal.set_wakeup_fd(before)
        over.set()
        os.close(writer)
        watcher.join()
        os.close(reader)
        for options in _runs:
            options.terminate = False


def _watch(reader: int, numbers: Collection[int], over: threading.Event) -> None:
    """End what runs when a signal comes, and the process where that is not `over` in time."""
    while number := os.read(reader, 1):
        if number[0] in numbers:
            break
    else:
        return
    for options in _runs:
        options.terminate = True
    while not over.wait(PATIENCE):
        if _whole.acquire(blocking=False):
            for clean in _cleaners:
                clean()
            os._exit(_interrupted(number[0]))


def _unwatch() -> None:
    """In a process that was forked: its signals are none of the parent's, whose pipe it has."""
    if _watching:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unwatch)
