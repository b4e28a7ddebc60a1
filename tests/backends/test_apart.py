"""Builds in a process of their own: what the real builder says of them, and what its crash leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import conv_case, refused_case

from trtq.backends.apart import try_build
from trtq.backends.interface import Range
from trtq.errors import BuildError, InputError

BATCHES = {"x": Range((1, 3, 8, 8), (8, 3, 8, 8), (32, 3, 8, 8))}


@pytest.fixture(autouse=True)
def _builder() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def test_what_builds_leaves_nothing(tmp_path: Path) -> None:
    case = conv_case(tmp_path, "N")
    before = sorted(tmp_path.iterdir())
    try_build("tensorrt-rtx", case.model, profile=BATCHES)
    assert sorted(tmp_path.iterdir()) == before


def test_what_the_parser_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    model = refused_case(tmp_path).model
    with pytest.raises(BuildError) as raised:
        try_build("tensorrt-rtx", model, profile={"x": Range((1, 32), (8, 32), (32, 32))})
    assert raised.value.problem == "TensorRT for RTX cannot parse the model"
    assert "'determinant' (Det)" in str(raised.value.cause)
    assert raised.value.remedy


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    case = conv_case(tmp_path, "N")
    with pytest.raises(InputError) as raised:
        try_build("tensorrt-rtx", case.model, profile={})
    assert not isinstance(raised.value, BuildError)


def test_a_crash_of_the_library_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = conv_case(tmp_path, "N")
    (tmp_path / "crashing").mkdir()
    (tmp_path / "crashing" / "tensorrt_rtx.py").write_text("import os\nos.abort()\n")
    monkeypatch.syspath_prepend(tmp_path / "crashing")
    with pytest.raises(BuildError, match="crashed") as raised:
        try_build("tensorrt-rtx", case.model, profile=BATCHES)
    assert "SIGABRT" in str(raised.value.cause)
