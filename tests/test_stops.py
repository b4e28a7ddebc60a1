"""Signals end the work as one exception, whatever a library makes of that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trtq import stops
from trtq.files import write_bytes

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


@pytest.mark.parametrize("number", stops.SIGNALS)
def test_each_signal_is_an_exception_and_an_exit_code(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(number) for number in stops.SIGNALS]
    with stops.handled():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert stops.ended() == 128 + number
    assert capsys.readouterr().err.startswith("trtq: interrupted; ")
    assert [signal.getsignal(number) for number in stops.SIGNALS] == before
    stops.check()


def test_what_a_library_makes_of_it_is_still_an_interruption() -> None:
    def load() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    with stops.handled(), pytest.raises(stops.Stopped), stops.unmasked():
        load()
    with pytest.raises(ImportError), stops.unmasked():
        raise ImportError


def test_nothing_is_written_after_a_signal_that_was_swallowed(tmp_path: Path) -> None:
    with stops.handled():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            write_bytes(tmp_path / "table", b"wrong, perhaps")
    assert list(tmp_path.iterdir()) == []


def test_what_is_deferred_comes_afterwards_whatever_happened() -> None:
    done = []

    def work(fail: bool) -> None:
        with stops.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(fail)
            if fail:
                raise ValueError

    for fail in (False, True):
        with stops.handled(), pytest.raises(KeyboardInterrupt):
            work(fail)
    assert done == [False, True]


def test_an_ignored_signal_stays_ignored() -> None:
    code = (
        "import os, signal; from trtq import stops; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with stops.handled(): os.kill(os.getpid(), signal.SIGHUP)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_import_of_the_command_line_is_interrupted_with_one_line(
    number: int, code: int, tmp_path: Path
) -> None:
    (tmp_path / "numpy.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    run = subprocess.run(
        [sys.executable, "-m", "trtq", "inspect", "nothing.onnx"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (code, "")
    assert run.stderr == "trtq: interrupted; no result was written, finished steps are in the cache\n"
