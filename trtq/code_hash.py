"""What computed a result: hashes of source code, found through its import statements.

Two runs of one release, or of one checkout, have the same hash; a changed line gives another. So what other
code computed is never taken for the result of this code, whether or not the release number changed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import numpy as np

PACKAGE = Path(__file__).parent

_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(?P<base>[\w.]+)[ \t]+import[ \t]+(?P<names>\([^)]*\)|[^\n]*)"
    r"|import[ \t]+(?P<modules>[^\n]*))",
    re.MULTILINE,
)
_NAME = re.compile(r"[\w.]+")
_OF_EVERY_CLASS = {
    "__dict__",
    "__weakref__",
    "__module__",
    "__doc__",
    "__firstlineno__",
    "__static_attributes__",
}


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


def callable_sha256(function: Callable[..., Any]) -> str | None:
    """Hash of what a function computes: its code, its defaults, what it closes over, the globals that it
    names, and so on through all that these are. None where that cannot be told, as of an object with a state
    of its own kind: nothing may be taken for its result then.

    Args:
        function: a function, lambda, method, `functools.partial`, or an object with `__call__`.
    """
    parts: list[str] = []
    try:
        _describe(function, parts, {})
    except (_UnknownError, RecursionError, ValueError):  # nested too deeply; a closure's empty cell
        return None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class _UnknownError(Exception):
    """A value of which no hash can be made."""


def _describe(value: Any, parts: list[str], seen: dict[int, tuple[int, object]]) -> None:
    """Append what a value is, in text that differs where values do.

    Args:
        seen: id of what was described -> its number, and itself, so that no other value gets its id;
            functions may name each other.

    Raises:
        _UnknownError: it is of no known kind.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | range | slice):
        parts.append(f"{type(value).__name__} {value!r}")
        return
    if id(value) in seen:
        parts.append(f"again {seen[id(value)][0]}")
        return
    seen[id(value)] = len(seen), value
    if isinstance(value, ModuleType):
        parts.append(f"module {value.__name__} {_module_version(value.__name__)}")
    elif isinstance(value, functools.partial):
        _describe_all("partial", [value.func, value.args, value.keywords], parts, seen)
    elif isinstance(value, MethodType):
        _describe_all("method", [value.__func__, value.__self__], parts, seen)
    elif isinstance(value, FunctionType) and _is_users(value.__module__):
        code, names = value.__code__, sorted(_names_of(value.__code__) & value.__globals__.keys())
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        globals_ = {name: value.__globals__[name] for name in names}
        more = [value.__defaults__, value.__kwdefaults__, cells, globals_, vars(value)]
        _describe_all(f"function {value.__name__}", [code, *more], parts, seen)
    elif isinstance(value, CodeType):
        own = (value.co_code, value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
        table = getattr(value, "co_exceptiontable", b"")
        _describe_all("code", [*own, table, value.co_flags, value.co_consts], parts, seen)
    elif _is_installed(value):
        parts.append(f"installed {value.__module__} {value.__name__} {_module_version(value.__module__)}")
    elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        parts.append(f"array {value.dtype.str} {value.shape} {content}")
    elif type(value) in (tuple, list):
        _describe_all(f"{type(value).__name__} {len(value)}", value, parts, seen)
    elif type(value) in (set, frozenset) and all(isinstance(item, str | int) for item in value):
        _describe_all(f"{type(value).__name__} {len(value)}", sorted(value, key=repr), parts, seen)
    elif type(value) in (dict, MappingProxyType):
        _describe_all(f"dict {len(value)}", [part for item in value.items() for part in item], parts, seen)
    elif isinstance(value, type):
        members = {name: item for name, item in vars(value).items() if name not in _OF_EVERY_CLASS}
        _describe_all(f"class {value.__qualname__}", [list(value.__bases__), members], parts, seen)
    elif isinstance(value, staticmethod | classmethod):
        _describe_all(type(value).__name__, [value.__func__], parts, seen)
    elif isinstance(value, property):
        _describe_all("property", [value.fget, value.fset, value.fdel], parts, seen)
    elif _holds_all_in_dict(value):
        _describe_all("object", [type(value), vars(value)], parts, seen)
    else:
        raise _UnknownError


def _describe_all(
    kind: str, values: Iterable[Any], parts: list[str], seen: dict[int, tuple[int, object]]
) -> None:
    parts.append(f"{kind} (")
    for value in values:
        _describe(value, parts, seen)
    parts.append(")")


def _holds_all_in_dict(value: Any) -> bool:
    """Whether a value is of the user's own class, and its `__dict__` is all its state: not so where it is a
    list or an array as well, or has slots."""
    own = all(base is object or _is_users(base.__module__) for base in type(value).__mro__)
    return own and hasattr(value, "__dict__") and not hasattr(value, "__slots__")


def _names_of(code: CodeType) -> set[str]:
    """The names in a function's code and in those inside it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*(_names_of(constant) for constant in inner))


def _is_installed(value: Any) -> bool:
    """Whether a value is what an installed module has under the value's name."""
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(name, str) or _is_users(module):
        return False
    return getattr(sys.modules.get(module), name, None) is value


def _is_users(module: str | None) -> bool:
    """Whether a module is the user's own: `__main__`, a notebook, a file; neither Python's nor installed."""
    if module is None or module == "builtins":
        return False
    loaded = sys.modules.get(module)
    return module == "__main__" or loaded is None or _own_file(loaded) is not None


def _own_file(module: ModuleType) -> Path | None:
    """The source of a user's module."""
    file = getattr(module, "__file__", None)
    return None if file is None or not file.endswith(".py") or _elsewhere(Path(file)) else Path(file)


def _module_version(name: str) -> str:
    """What tells one version of a module from another.

    Raises:
        _UnknownError: nothing does.
    """
    module = sys.modules.get(name)
    if module is not None and (file := _own_file(module)) is not None:
        return script_sha256(file)
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names:
        return sys.version
    version = getattr(sys.modules.get(top), "__version__", None)
    if version is None:
        raise _UnknownError
    return str(version)


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
    path = Path(spec.origin)
    return None if _elsewhere(path) else path


def _elsewhere(path: Path) -> bool:
    """Whether a file is Python's, installed, or trtq's."""
    paths = sysconfig.get_paths()
    folders = {paths[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")} | {str(PACKAGE)}
    return any(path.is_relative_to(folder) for folder in folders)


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
