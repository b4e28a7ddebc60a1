"""Imports point one way, down the list of layers; a module may also import what is in its own folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "trtq"

LAYERS = """
trtq.errors
trtq.escapes
trtq.stops
trtq.scratch
trtq.memory
trtq.files
trtq.arrays
trtq.numerics
trtq.console
trtq.budget
trtq.code_hash
trtq.cache
trtq.scripts
trtq.graph
trtq.data
trtq.simulation
trtq.calibration
trtq.backends
trtq.cost
trtq.recipe
trtq.paths
trtq.options
trtq.job
trtq.calibration.calibrate
trtq.calibration.search
trtq.gate
trtq.recovery
trtq.study
trtq.report
trtq.migration
trtq.pipeline
trtq.build
trtq.api
trtq.cli
trtq.demo
trtq.__main__
""".split()
"""Low to high. calibration/calibrate.py and calibration/search.py take a Job, so they stand above it."""


def modules() -> dict[str, Path]:
    """Name -> file of all but trtq itself, whose version every module may read."""
    paths = {path.relative_to(ROOT.parent).with_suffix(""): path for path in ROOT.rglob("*.py")}
    named = {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}
    return {name: path for name, path in named.items() if name != "trtq"}


def imported(path: Path, names: set[str]) -> Iterator[str]:
    """The modules among `names` that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}": node.module for alias in node.names}
            targets = (part if part in names else module for part, module in parts.items())
            yield from (target for target in targets if target in names)


def layer(module: str) -> int:
    """The index of the longest entry of `LAYERS` that is the module or a package around it.

    Raises:
        ValueError: the module has no place in the list.
    """
    around = [entry for entry in LAYERS if f"{module}.".startswith(f"{entry}.")]
    if not around:
        raise ValueError(f"{module} has no layer")
    return LAYERS.index(max(around, key=len))


def folder(module: str) -> str:
    """The folder of trtq that a module is in; its own name for one that is in none."""
    return module.split(".")[1]


def test_imports_point_down_the_layers() -> None:
    paths = modules()
    upwards = {
        (name, target)
        for name, path in paths.items()
        for target in imported(path, set(paths))
        if layer(target) > layer(name) and folder(target) != folder(name)
    }
    assert not upwards


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import trtq.job", ["trtq.job"]),
        ("from trtq.job import Job, made", ["trtq.job", "trtq.job"]),
        ("def f():\n    from trtq.graph import fold", ["trtq.graph.fold"]),
        ("import numpy\nfrom trtq import __version__", []),
    ],
)
def test_imports_are_found_in_every_form(tmp_path: Path, source: str, found: list[str]) -> None:
    (tmp_path / "module.py").write_text(source)
    assert list(imported(tmp_path / "module.py", set(modules()))) == found
