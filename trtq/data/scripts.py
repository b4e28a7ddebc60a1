"""The user's own Python: `FILE.py:FUNCTION`, for metrics and data."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trtq.errors import InputError


def load_function(spec: str, what: str) -> tuple[Path, str, Callable[..., Any]]:
    """File, name and function that `FILE.py:FUNCTION` means; importing the file runs it.

    Args:
        what: what the function is for, as it stands in errors ("metric").

    Raises:
        InputError: the file or the function is missing, or the file does not import.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"the {what}'s file does not exist", file=path, remedy="check the path")
    module_spec = importlib.util.spec_from_file_location(f"trtq_script_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look their module up
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {error}"
        raise InputError(f"the {what}'s file does not import", file=path, cause=cause) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"the {what}'s file has no function '{name}'", file=path)
    return path, name, function
