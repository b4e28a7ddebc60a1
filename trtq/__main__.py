"""The command line: `trtq`, or `python -m trtq`."""

import gc
import os
import signal
import sys

from trtq import stops

GARBAGE = (50_000, 5, 2)
"""Thresholds of Python's search for garbage (`gc.set_threshold`). With its own, it looks at the objects of a
large graph again and again while it is made; with these a third of the time, and copies still go early."""


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
    return code


if __name__ == "__main__":
    sys.exit(main())
