"""The documentation: its site builds, every command in it runs, and what is made of the code is current."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import doc_blocks
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(ROOT.glob("examples/[0-9]*_*/README.md"))
PAGES = sorted(ROOT.glob("docs/**/*.md"))
RUN = [page for page in [*EXAMPLES, *PAGES] if any(b.runs for b in doc_blocks.blocks_of(page.read_text()))]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """`trtq` and `python` are those under test; all pages share one cache."""
    commands = tmp_path_factory.mktemp("bin")
    for name, arguments in {"trtq": "-m trtq ", "python": ""}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments}"$@"\n')
        (commands / name).chmod(0o755)
    inherited = [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
    return {
        **os.environ,
        "PATH": os.pathsep.join(inherited),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins")]),
        "TRTQ_CACHE": str(tmp_path_factory.mktemp("cache")),
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_run_in_their_order(page, environment, tmp_path):
    folder = tmp_path / "here"
    if page in EXAMPLES:
        shutil.copytree(page.parent, folder)
    else:
        folder.mkdir()
    command = [sys.executable, doc_blocks.__file__, str(page)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"


@pytest.mark.parametrize("page", [*EXAMPLES, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_that_cannot_run_here_parse_and_say_what_they_need(page):
    for block in doc_blocks.blocks_of(page.read_text()):
        doc_blocks.check(block)
        if block.needs:
            assert block.needs in NEEDS, f"{page}:{block.line}"


NEEDS = {"needs a GPU", "needs a service", "needs Docker", "needs a Jetson"}
