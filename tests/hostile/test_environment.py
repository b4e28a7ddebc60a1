"""Processes that start where streams are closed, files may not grow, or the current folder is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile.inputs import calibrate, gate, write_suitable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="descriptors and limits of POSIX"),
]


def started(folder: Path, arguments: tuple[str, ...], before: Callable[[], object]) -> tuple[int, str, str]:
    """Exit code, output and messages of a command in a folder.

    Args:
        before: called in the process before the command.
    """
    done = subprocess.run(
        [sys.executable, "-m", "trtq", *arguments],
        cwd=folder,
        env={**os.environ, "TRTQ_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        preexec_fn=before,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]])
def test_closed_streams_change_no_result_and_no_file(closed: list[int], tmp_path: Path) -> None:
    write_suitable(tmp_path)
    before = (tmp_path / "m.onnx").read_bytes()
    job = gate("--json", "verdict.json")
    code, _, err = started(tmp_path, job, lambda: [os.close(number) for number in closed])
    assert code == 0, err
    assert json.loads((tmp_path / "verdict.json").read_text())["outcome"] == "pass"
    assert (tmp_path / "m.onnx").read_bytes() == before


def test_a_result_that_nobody_can_read_is_an_error(tmp_path: Path) -> None:
    write_suitable(tmp_path)
    code, _, err = started(tmp_path, gate("--json", "/dev/stdout"), lambda: os.close(1))
    assert (code, err.count("trtq: cannot write the file")) == (2, 1)


@pytest.mark.parametrize("most", [60, 400])
def test_files_that_may_not_grow_are_not_left_in_part(most: int, tmp_path: Path) -> None:
    import resource

    write_suitable(tmp_path)
    (tmp_path / "out.cache").write_text("before")
    names = {path.name for path in tmp_path.iterdir()}
    code, _, err = started(
        tmp_path, calibrate(), lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    )
    assert (code, err.count("trtq: ")) == (2, 1)
    assert "File too large" in err
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == names
    assert (tmp_path / "out.cache").read_text() == "before"
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_that_is_gone_is_not_needed(tmp_path: Path) -> None:
    write_suitable(tmp_path)
    gone = tmp_path / "gone"
    gone.mkdir()
    model, data = str(tmp_path / "m.onnx"), str(tmp_path / "d.npz")

    def leave() -> None:
        os.chdir(gone)
        gone.rmdir()

    job = ("gate", model, model, "--eval", data, "--metric", "cosine")
    code, out, err = started(tmp_path, job, leave)
    assert code == 0, err
    assert "PASS" in out
    gone.mkdir()
    code, _, err = started(tmp_path, ("calibrate", model, "--data", data, "-o", "out.cache"), leave)
    assert (code, err.count("trtq: ")) == (2, 1)


@pytest.mark.parametrize(("outcome", "code"), [("0.5", 0), ("1 / 0", 2)])
def test_a_thread_that_a_metric_leaves_does_not_keep_the_verdict(
    outcome: str, code: int, tmp_path: Path
) -> None:
    write_suitable(tmp_path)
    (tmp_path / "slow.py").write_text(
        "import threading, time\n"
        "def good(outputs, targets):\n"
        "    threading.Thread(target=time.sleep, args=(3600,)).start()\n"
        f"    return {outcome}\n"
    )
    began = time.monotonic()
    found, out, err = started(tmp_path, gate("--metric", "slow.py:good", "--json", "v.json"), lambda: None)
    assert found == code, err
    assert time.monotonic() - began < 300
    assert ("PASS" in out) == (not code)
    assert (tmp_path / "v.json").exists() == (not code)
    assert not list(tmp_path.rglob("*.part"))


def test_workers_do_not_keep_a_job_that_is_done(tmp_path: Path) -> None:
    write_suitable(tmp_path)
    began = time.monotonic()
    code, _, err = started(tmp_path, (*calibrate(), "--parallel", "loky:2"), lambda: None)
    assert code == 0, err
    assert time.monotonic() - began < 200  # idle, they end by themselves after 300 s
