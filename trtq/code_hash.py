"""What computed a result: hashes of source code, found through its import statements.

Two runs of one release, or of one checkout, have the same hash; a changed line gives another. So what other
code computed is never taken for the result of this code, whether or not the release number changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent

_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(?P<base>[\w.]+)[ \t]+import[ \t]+(?P<names>\([^)]*\)|[^\n]*)"
    r"|import[ \t]+(?P<modules>[^\n]*))",
    re.MULTILINE,
)
_NAME = re.compile(r"[\w.]+")


@cache
def code_sha256(*modules: str) -> str:
    """Hash of the sources of some of trtq's modules and of all of trtq's modules that they import, however
    deep. Without sources (a compiled-only installation) it depends on the names alone.

    Args:
        modules: dotted names, such as `trtq.calibration.collect`.
    """
    return _sha256({name: path.read_bytes() for name, path in _closure(modules, own_module).items()})


def script_sha256(path: Path) -> str:
    """Hash of a user's script and of the user's own modules that it imports: neither Python's nor those that
    were installed."""
    found = _closure(_imported(path.read_text(encoding="utf-8", errors="replace")), _users_module)
    return _sha256({"": path.read_bytes()} | {name: file.read_bytes() for name, file in found.items()})


def own_module(name: str) -> Path | None:
    """The source of a module of trtq; None for others, and for trtq itself, which only names its parts."""
    if not name.startswith(f"{PACKAGE.name}."):
        return None
    path = PACKAGE.parent.joinpath(*name.split("."))
    candidates = (path.with_name(f"{path.name}.py"), path / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


def _users_module(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):  # no module, or one without a place
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    path, paths = Path(spec.origin), sysconfig.get_paths()
    elsewhere = {paths[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")} | {str(PACKAGE)}
    return None if any(path.is_relative_to(folder) for folder in elsewhere) else path


def _closure(names: Iterator[str] | tuple[str, ...], find: Callable[[str], Path | None]) -> dict[str, Path]:
    """Module -> file of those that `find` knows, and of those that they import."""
    found: dict[str, Path] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found and (path := find(name)) is not None:
            found[name] = path
            waiting += _imported(path.read_text(encoding="utf-8", errors="replace"))
    return found


def _imported(source: str) -> Iterator[str]:
    """What import statements anywhere in a source mention: modules, and names that are perhaps none."""
    for match in _IMPORT.finditer(source):
        if match["modules"] is not None:
            yield from _NAME.findall(match["modules"])
        else:
            yield match["base"]
            yield from (f"{match['base']}.{name}" for name in _NAME.findall(match["names"]))


def _sha256(sources: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        digest.update(f"{name} {len(source)}\n".encode())
        digest.update(source)
    return digest.hexdigest()
