"""Ctrl-C, SIGTERM and SIGHUP: each ends the work as an exception, so that everything half done is cleaned up.

A library may swallow that exception, or raise its own in its place: an import that fails, a callback of C++
that cannot raise. So the signal is remembered, too: nothing is moved into its place after it (`check`), and
the command line ends as interrupted whatever exception reaches it (`unmasked`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

_received: list[int] = []


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
    for number in previous:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if previous:
            _received.clear()


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
    print("trtq: interrupted; no result was written, finished steps are in the cache", file=sys.stderr)
    return 128 + next(iter(_received), signal.SIGINT)


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
