"""The documentation: its site builds, every command in it runs, and what is made of the code is current."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import doc_blocks
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(ROOT.glob("examples/[0-9]*_*/README.md"))
PAGES = sorted(ROOT.glob("docs/**/*.md"))
RUN = [page for page in [*EXAMPLES, *PAGES] if any(b.runs for b in doc_blocks.blocks_of(page.read_text()))]
NEEDS = {"needs a GPU", "needs a checkout", "needs a service", "needs a Jetson"}
BY_PAGE = {"ids": lambda page: str(page.relative_to(ROOT))}

sys.path.append(str(ROOT / "tools"))


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
@pytest.mark.parametrize("page", RUN, **BY_PAGE)
def test_commands_of_a_page_run_in_their_order(page, environment, tmp_path):
    folder = tmp_path / "here"
    if page in EXAMPLES:
        shutil.copytree(page.parent, folder)
    else:
        folder.mkdir()
    command = [sys.executable, doc_blocks.__file__, str(page)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"


@pytest.mark.parametrize("page", [*EXAMPLES, *PAGES], **BY_PAGE)
def test_blocks_that_cannot_run_here_parse_and_say_what_they_need(page):
    for block in doc_blocks.blocks_of(page.read_text()):
        doc_blocks.check(block)
        assert block.needs is None or block.needs in NEEDS, f"{page}:{block.line}"


@pytest.mark.parametrize("page", EXAMPLES, **BY_PAGE)
def test_files_that_an_example_shows_are_those_in_its_folder(page):
    for block in doc_blocks.blocks_of(page.read_text()):
        if block.file is not None:
            assert (page.parent / block.file).read_text() == block.content, f"{page}:{block.line}"


def test_numbers_of_examples_are_in_a_row():
    assert [page.parent.name[:3] for page in EXAMPLES] == [f"{n:02}_" for n in range(1, len(EXAMPLES) + 1)]


@pytest.mark.slow
def test_site_builds_strictly_and_needs_no_network(tmp_path):
    pytest.importorskip("material", reason="needs mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loads = re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="(https?:)?//', page.read_text())
        assert not loads, page


def test_pictures_are_those_that_the_script_draws():
    from site_pictures import PICTURES

    drawn = {path.stem: path.read_text() for path in (ROOT / "docs" / "images").glob("*.svg")}
    assert {name: draw() for name, draw in PICTURES.items()} == drawn


def test_reference_has_every_command_option_and_a_meaning_for_every_key():
    import site_reference

    from trtq.cli.main import COMMANDS
    from trtq.recipe import flag, options

    cli, recipe = site_reference.cli_page(), site_reference.recipe_page()
    for name in COMMANDS:
        assert f"## `trtq {name}`" in cli
    for option in options():
        assert f"| `{option.name}`<br>" in recipe
        assert option.name == "model" or f"`{flag(option.name)}" in cli
    for name, described in site_reference.FILES.items():
        assert [key for key, text in described.meanings().items() if not text] == [], name


@pytest.fixture(scope="module")
def written(environment, tmp_path_factory) -> dict[str, Any]:
    """JSON files of real jobs."""
    folder = tmp_path_factory.mktemp("jobs")
    script = """
    cp "$(python -c 'import trtq, os; print(os.path.dirname(trtq.__file__))')"/demo/* .
    given="digits.onnx --data calib.npz --method max" judged="--eval eval.npz --metric top1"
    trtq deploy $given $judged --min-sqnr 60 --recover none --rest fp32 -o . || test $? = 1
    trtq migrate digits.onnx --table calibration.cache $judged -o migrated
    trtq sensitivity $given --fast -o sensitivity.json
    trtq bench model.plan --json bench.json
    trtq gate digits.onnx model.int8.onnx $judged --tensors tensors.json
    trtq study $given $judged --include stem -o study
    mv migrated/migration.json study/study.json .
    """
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.slow
def test_reference_has_every_key_of_every_file(written):
    from site_reference import FILES

    assert written.keys() == FILES.keys()
    for name, content in written.items():
        known, free = FILES[name].meanings(), FILES[name].free
        assert set(keys_of(content, free)) - known.keys() == set(), name


def keys_of(value: Any, free: frozenset[str]) -> Iterator[str]:
    """The keys in a JSON value, but not those of objects whose keys are names, which `free` lists."""
    if isinstance(value, list):
        for item in value:
            yield from keys_of(item, free)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            named = key in free and isinstance(item, dict)
            yield from keys_of(list(item.values()) if named else item, free)
