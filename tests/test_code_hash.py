"""The hash of the code behind a result: a changed line counts wherever it is, and nothing else does."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtq
from trtq.code_hash import callable_sha256, script_sha256

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


def in_a_module(source: str) -> Callable[..., Any]:
    """The function `f` of a program of its own, as a notebook's cells are."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(source, names)
    return names["f"]


SCALED = """
import numpy as np
FACTOR = {factor}
def scaled(values): return FACTOR * np.mean(values)
def f(outputs, targets): return scaled(outputs)
"""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def f(o, t): return 1", "def f(o, t): return 2"),
        ("def f(o, t, k=1): return k", "def f(o, t, k=2): return k"),
        ("def f(o, t, *, k=1): return k", "def f(o, t, *, k=2): return k"),
        ("f = lambda o, t: o + t", "f = lambda o, t: o - t"),
        (
            "def m(a):\n def g(o, t): return a\n return g\nf = m(1)",
            "def m(a):\n def g(o, t): return a\n return g\nf = m(2)",
        ),
        (SCALED.format(factor=1), SCALED.format(factor=2)),
        (
            "import math\ndef f(o, t): return math.sin(o)",
            "import cmath as math\ndef f(o, t): return math.sin(o)",
        ),
        ("L = [1, [2]]\ndef f(o, t): return L", "L = [1, [3]]\ndef f(o, t): return L"),
        (
            "def g(): return 1\ndef f(o, t): return (lambda: g())()",
            "def g(): return 2\ndef f(o, t): return (lambda: g())()",
        ),
        (
            "class C:\n k = 1\n def s(self, o, t): return self.k\nf = C().s",
            "class C:\n k = 2\n def s(self, o, t): return self.k\nf = C().s",
        ),
    ],
)
def test_what_a_function_computes_by_is_in_its_hash(one: str, other: str) -> None:
    first, again, changed = (callable_sha256(in_a_module(source)) for source in (one, one, other))
    assert first is not None
    assert first == again
    assert first != changed


def test_state_and_arguments_are_in_a_functions_hash() -> None:
    class Metric:
        def __init__(self, weights: Any) -> None:
            self.weights = weights

        def score(self, outputs: Any, targets: Any) -> Any:
            return self.weights

        __call__ = score

    ones, twos = np.ones(3), np.full(3, 2.0)
    for make in (Metric, lambda w: Metric(w).score, lambda w: functools.partial(Metric.score, w)):
        assert callable_sha256(make(ones)) == callable_sha256(make(ones.copy())) is not None
        assert callable_sha256(make(ones)) != callable_sha256(make(twos))


def test_functions_may_call_each_other() -> None:
    source = "def f(o, t): return g(o)\ndef g(o): return f(o, 1) if o else {}"
    assert callable_sha256(in_a_module(source.format(1))) != callable_sha256(in_a_module(source.format(2)))


def test_what_cannot_be_hashed_has_no_hash() -> None:
    def generator() -> Any:
        yield

    for state in (object(), generator(), np.random.default_rng(0), open):
        held = [state]
        found = callable_sha256(lambda outputs, targets, held=held: held)
        assert (found is None) == (state is not open)


class Scores(list):
    """A metric that holds numbers as a list does, and not in its `__dict__`."""

    def __call__(self, outputs: Any, targets: Any) -> float:
        return float(sum(self))


def with_an_empty_cell() -> Callable[..., Any]:
    def f(outputs: Any, targets: Any) -> Any:
        return later

    if not callable(f):
        later = 1
    return f


def nested(depth: int) -> Callable[..., Any]:
    whole: list[Any] = []
    for _ in range(depth):
        whole = [whole]
    return lambda outputs, targets: whole


@pytest.mark.parametrize("function", [Scores([1.0]), with_an_empty_cell(), nested(5000)])
def test_what_is_not_seen_whole_has_no_hash(function: Callable[..., Any]) -> None:
    assert callable_sha256(function) is None
