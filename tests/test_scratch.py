"""Folders that go with their process, however it ends, and never before it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trtq.cache import Cache
from trtq.scratch import folder_in, sweep

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no locks")

HOLD = """
import sys, time
from trtq.scratch import folder_in
with folder_in(sys.argv[1], "table") as folder:
    (folder / "half").write_bytes(b"half")
    print(folder.name, flush=True)
    time.sleep(60)
"""


def holder(home: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that has made a folder in `home`, and the folder's name."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(home)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def names(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir())


def test_the_folder_of_a_living_process_stays_and_that_of_a_killed_one_goes(tmp_path: Path) -> None:
    process, name = holder(tmp_path)
    with process:
        assert name.startswith(".table.trtq-")
        sweep(tmp_path)
        assert names(tmp_path) == [name]
        process.kill()
    assert names(tmp_path) == [name]
    sweep(tmp_path)
    assert names(tmp_path) == []


def test_the_first_folder_beside_it_sweeps(tmp_path: Path) -> None:
    process, name = holder(tmp_path)
    with process:
        process.kill()
    with folder_in(tmp_path, "x" * 300) as folder:
        assert names(tmp_path) == [folder.name] != [name]
    assert names(tmp_path) == []


def test_what_is_of_another_form_stays(tmp_path: Path) -> None:
    kept = ["trtq-measure", ".mine.part", "trtq-abc.part", "trtq-abcdefgh.part.txt", "trtq-file1234.part"]
    for name in kept[:-1]:
        (tmp_path / name).mkdir()
    (tmp_path / kept[-1]).write_bytes(b"a file")
    (tmp_path / "target").mkdir()
    (tmp_path / "trtq-link1234.part").symlink_to("target")
    sweep(tmp_path)
    assert names(tmp_path) == sorted([*kept, "target", "trtq-link1234.part"])


def test_many_make_and_sweep_at_once(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from trtq.cache import Cache
from trtq.scratch import folder_in, sweep
for step in range(100):
    with folder_in(sys.argv[1]) as folder:
        (folder / "file").write_bytes(b"mine")
        sweep(Path(sys.argv[1]))
        assert (folder / "file").read_bytes() == b"mine"
"""
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    assert [(process.communicate()[1], process.returncode) for process in both] == [(b"", 0)] * 4
    assert os.listdir(tmp_path) == []


def test_pruning_a_cache_sweeps_it(tmp_path: Path) -> None:
    home = tmp_path / ("a" * 16) / ("b" * 16)
    home.mkdir(parents=True)
    process, name = holder(home)
    with process:
        Cache(tmp_path).prune(lambda entry: True)
        assert names(home) == [name]
        process.kill()
    Cache(tmp_path).prune(lambda entry: True)
    assert names(home) == []
