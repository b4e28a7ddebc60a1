"""The command line: `trtq`, or `python -m trtq`."""

import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
import time

from trtq import stops

GARBAGE = (50_000, 5, 2)
"""Thresholds of Python's search for garbage (`gc.set_threshold`). With its own, it looks at the objects of a
large graph again and again while it is made; with these a third of the time, and copies still go early."""


PATIENCE = 5.0
"""Seconds that threads of the user's own code have to end when all else is done."""


def main() -> int:
    """Import and run the command line; a signal ends the import, too, with one line.

    NumPy's products run on one thread each: several rows are worked on at once, and OpenBLAS's own threads
    beside them only wait for each other, at full speed. The variable counts when NumPy is imported.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with stops.handled():
        try:
            with stops.unmasked():
                from trtq.cli.main import main as run
            gc.freeze()
            gc.set_threshold(*GARBAGE)
            code = run()
        except KeyboardInterrupt:
            code = stops.ended()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while Python winds up
    _leave_threads(code)
    return code


def _leave_threads(code: int) -> None:
    """End the process where threads that the user's code started do not end: Python would wait for them.

    A metric may have left one, and whoever waits for the verdict would wait forever. Pools of threads and of
    processes end first, as they do when Python ends.
    """
    end = time.monotonic() + PATIENCE
    pools = threading.Thread(target=_end_pools, daemon=True)
    pools.start()
    pools.join(PATIENCE)
    left = [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    for thread in left:
        thread.join(max(end - time.monotonic(), 0))
    if any(thread.is_alive() for thread in left):
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)


def _end_pools() -> None:
    """Call what Python calls before it waits for threads; it does no harm twice."""
    for function in reversed(getattr(threading, "_threading_atexits", [])):
        function()


if __name__ == "__main__":
    sys.exit(main())
