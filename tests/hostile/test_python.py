"""What Python programs give by mistake ends as an error of trtq's, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile.python import attempts

ATTEMPTS = dict(attempts())


@pytest.mark.parametrize("name", [name for name in ATTEMPTS if name.startswith("data")])
def test_data_of_any_kind(name: str, tmp_path: Path) -> None:
    assert ATTEMPTS[name](tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ATTEMPTS if not name.startswith("data")])
def test_models_and_options_of_any_kind(name: str, tmp_path: Path) -> None:
    assert ATTEMPTS[name](tmp_path) == []
