"""The user's own Python files."""

from __future__ import annotations

import io
import os
import pickle
import sys
from pathlib import Path

import pytest

from trtq.errors import InputError
from trtq.scripts import contained, load_function


def write(folder: Path, body: str, name: str = "mine.py") -> str:
    (folder / name).write_text(body)
    return f"{folder / name}:score"


def test_the_function_runs_with_its_module(tmp_path: Path) -> None:
    spec = write(
        tmp_path, "FACTOR = 3\ndef helper(x): return FACTOR * x\ndef score(x): return helper(x) + 1\n"
    )
    path, name, function = load_function(spec, "metric")
    assert (path, name, function(2)) == (tmp_path / "mine.py", "score", 7)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    assert load_function(write(tmp_path, "def score(): return 1"), "metric")[2]() == 1
    assert load_function(write(tmp_path, "def score(): return 'two'"), "metric")[2]() == "two"


def test_classes_of_the_file_can_be_pickled(tmp_path: Path) -> None:
    spec = write(tmp_path, "class Pair:\n    size = 2\ndef score(): return Pair()\n")
    assert pickle.loads(pickle.dumps(load_function(spec, "metric")[2]())).size == 2


def test_a_colon_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert load_function(write(tmp_path / "a:b", "def score(): return 5"), "metric")[2]() == 5


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def score(:", ["does not import", "SyntaxError"]),
        ("import no_such_package_here", ["does not import", "ModuleNotFoundError", "no_such_package_here"]),
        ("1 / 0", ["does not import", "ZeroDivisionError"]),
        ("raise SystemExit(3)", ["does not import", "SystemExit: 3"]),
        ("def other(): pass", ["no function 'score'"]),
        ("score = 3", ["no function 'score'"]),
    ],
)
def test_what_is_wrong_is_named(body: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_function(write(tmp_path, body), "metric")
    assert caught.value.file == str(tmp_path / "mine.py")
    for word in ["the metric's file", *words]:
        assert word in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the data's file does not exist"):
        load_function(f"{tmp_path}/none.py:score", "data")


def test_what_the_code_does_to_the_process_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", stdout := io.StringIO())
    before, deepest = os.getcwd(), sys.getrecursionlimit()
    with contained():
        os.chdir(tmp_path)
        sys.setrecursionlimit(deepest + 7)
        sys.stdout = sys.stderr = None  # type: ignore[assignment]
    assert (os.getcwd(), sys.getrecursionlimit()) == (before, deepest)
    assert sys.stdout is stdout
    assert sys.stderr is not None


def test_a_closed_stream_is_an_error_that_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(ValueError, match="closes standard output"), contained():
        sys.stdout.close()
    print("nowhere")


def test_whatever_the_code_raises_can_be_caught() -> None:
    class NoError(BaseException):
        pass

    with pytest.raises(RuntimeError, match="NoError: why"), contained():
        raise NoError("why")

    class NoText(Exception):
        def __str__(self) -> str:
            raise ValueError

    with pytest.raises(RuntimeError, match="NoText: without a text"), contained():
        raise NoText
    with pytest.raises(SystemExit, match=r"os\._exit\(0\)"), contained():
        os._exit(0)
