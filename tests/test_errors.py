"""Messages that name problem, file, cause and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from trtq.errors import LONGEST_CAUSE, ExitCode, InputError, MissingBackendError, about


def test_a_message_has_a_line_for_each_thing_that_is_known() -> None:
    error = InputError("it broke", file=Path("model.onnx"), cause=ValueError(" of that \n"), remedy="mend it")
    assert str(error).splitlines() == [
        "it broke",
        "  file:   model.onnx",
        "  cause:  of that",
        "  remedy: mend it",
    ]
    assert str(InputError("it broke")) == "it broke"


def test_a_message_has_an_end() -> None:
    assert len(str(InputError("x" * 10**6, cause="y" * 10**6))) < 2.1 * LONGEST_CAUSE


def test_exit_codes() -> None:
    assert InputError("x").exit_code is ExitCode.BAD_INPUT
    assert MissingBackendError("x").exit_code is ExitCode.MISSING_BACKEND


def test_a_file_is_named_where_none_is() -> None:
    with pytest.raises(InputError) as caught, about("data.npz"):
        raise InputError("it broke", cause="of that", remedy="mend it")
    assert (caught.value.file, caught.value.cause, caught.value.remedy) == ("data.npz", "of that", "mend it")


def test_a_file_that_is_named_stays() -> None:
    with pytest.raises(InputError) as caught, about("data.npz"):
        raise InputError("it broke", file="row.png")
    assert caught.value.file == "row.png"


def test_a_missing_backend_is_about_no_file() -> None:
    with pytest.raises(MissingBackendError) as caught, about("data.npz"):
        raise MissingBackendError("no GPU")
    assert caught.value.file is None
