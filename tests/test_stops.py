"""Signals end the work as one exception, whatever a library makes of that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from nets import net

from trtq import stops
from trtq.files import write_bytes

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

ENDED = "trtq: interrupted; no result was written, finished steps are in the cache\n"


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
    assert run.stderr == ENDED


def signalled(number: int, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """What becomes of code that prints a line when the signal may come, and asks for more than a minute."""
    lines = "from trtq import stops", *code.splitlines()
    with subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(number)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize(
    ("number", "run"),
    [
        (signal.SIGINT, "runner.on(batch, rows)"),
        (signal.SIGTERM, "list(runner.over(rows, [batch] * 9, workers=2))"),
    ],
)
def test_a_model_that_never_ends_is_interrupted(number: int, run: str, tmp_path: Path) -> None:
    model = net(
        """g (float[N,4] x) => (float[N,4] y) {
            most = Constant<value = int64 {4611686018427387904}>()
            low = Constant<value = float {-9.0}>()
            first = ReduceMax<keepdims = 0>(x)
            yes = Greater(first, low)
            y = Loop(most, yes, x) <body = b (int64 i, bool go, float[N,4] z) => (bool on, float[N,4] new) {
                new = Tanh(z)
                reached = ReduceMax<keepdims = 0>(new)
                on = Greater(reached, low)
            }>
        }"""
    )
    onnx.save(model, path := tmp_path / "model.onnx")
    done = signalled(
        number,
        f"""
import sys, numpy
from trtq.data.batches import Batch
from trtq.data.samples import Samples
from trtq.simulation.rows import Runner
runner = Runner(sys.argv[1])
x = numpy.zeros((1, 4), numpy.float32)
rows, batch = Samples("rows", (), {{"x": x}}, {{}}, "hash"), Batch({{"x": x}}, 0, 1, 0)
try:
    with stops.handled(), stops.unmasked():
        print(flush=True)
        {run}
except KeyboardInterrupt:
    sys.exit(128 + {int(number)})""",
        path,
    )
    assert (done.returncode, done.stderr) == (128 + number, "")


STUCK = """
import hashlib, sys
from trtq.scratch import folder_in
stops.PATIENCE = 0.1
with stops.handled(), folder_in(sys.argv[1]):
    print(flush=True)
    {}
"""


def test_a_process_whose_main_thread_does_not_come_back_ends_without_litter(tmp_path: Path) -> None:
    stuck = STUCK.format('hashlib.pbkdf2_hmac("md5", b"", b"", (1 << 31) - 1)')
    done = signalled(signal.SIGTERM, stuck, tmp_path)
    assert (done.returncode, done.stderr) == (143, ENDED)
    assert list(tmp_path.iterdir()) == []


def test_what_is_deferred_is_done_whole_however_long_it_takes(tmp_path: Path) -> None:
    long = 'hashlib.pbkdf2_hmac("md5", b"", b"", 1 << 20)'
    deferred = f"""with stops.deferred():
        {long}
        print("whole", flush=True)"""
    done = signalled(signal.SIGTERM, STUCK.format(deferred), tmp_path)
    assert done.stdout == "whole\n"
    assert "Stopped" in done.stderr


def test_a_signal_to_a_forked_process_is_its_own() -> None:
    with stops.handled():
        if not (child := os.fork()):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        time.sleep(0.05)
        assert not stops.run_options().terminate
