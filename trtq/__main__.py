"""The command line: `trtq`, or `python -m trtq`."""

import signal
import sys

from trtq import stops


def main() -> int:
    """Import and run the command line; a signal ends the import, too, with one line."""
    with stops.handled():
        try:
            with stops.unmasked():
                from trtq.cli.main import main as run
            code = run()
        except KeyboardInterrupt:
            code = stops.ended()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while Python winds up
    return code


if __name__ == "__main__":
    sys.exit(main())
