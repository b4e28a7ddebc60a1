"""The hash of the code behind a result: a changed line counts wherever it is, and nothing else does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trtq
from trtq.code_hash import script_sha256

HASH = "from trtq.cache import Key; print(Key('{kind}', 'a' * 64, 'b' * 64).to_json()['code'])"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trtq's sources in a folder of their own."""
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", "demo")
    shutil.copytree(Path(trtq.__file__).parent, folder / "trtq", ignore=ignored)
    return folder


def code_of(copy: Path, kind: str) -> str:
    """The hash that a process of its own finds, which imports that copy."""
    run = subprocess.run(
        [sys.executable, "-c", HASH.format(kind=kind)],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


@pytest.mark.parametrize(
    ("kind", "file", "counts"),
    [
        ("statistics", "calibration/collect.py", True),
        ("statistics", "calibration/kernels.py", True),  # imported within a function
        ("statistics", "data/preprocess.py", True),
        ("statistics", "gate/metrics.py", False),
        ("outputs", "simulation/session.py", True),
        ("table", "calibration/methods.py", True),
        ("table", "simulation/similarity.py", True),  # what `auto` measures by
        ("table", "report/html.py", False),
        ("quantization", "recovery/fixes/smooth.py", True),
        ("checkpoint", "recovery/learning/pupil.py", True),
    ],
)
def test_a_changed_line_counts_where_it_computes(copy: Path, kind: str, file: str, counts: bool) -> None:
    before, path = code_of(copy, kind), copy / "trtq" / file
    original = path.read_text()
    path.write_text(original + "\n# changed\n")
    try:
        assert (code_of(copy, kind) != before) is counts
    finally:
        path.write_text(original)
    assert code_of(copy, kind) == before


def test_a_script_alone(tmp_path: Path) -> None:
    script = tmp_path / "metric.py"
    script.write_text("import json\nimport numpy.linalg, not_there\nfrom os import path\n")
    before = script_sha256(script)
    script.write_text(script.read_text() + "#\n")
    assert script_sha256(script) != before
