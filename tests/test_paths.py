"""Jobs that are started from Python: what their results would replace is refused as on the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from jobs import Case, conv_case

from trtq import Recipe, deploy
from trtq.build import build, build_three
from trtq.console import SILENT
from trtq.errors import InputError
from trtq.migration.migrate import migrate


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return conv_case(tmp_path, "N")


@pytest.fixture
def recipe(case: Case) -> Recipe:
    return Recipe(model=str(case.model), data=str(case.data), eval=str(case.data), metric="cosine")


def _replacing(recipe: Recipe, folder: Path, name: str) -> Recipe:
    """The recipe with a folder for its output in which its model has a name."""
    os.rename(recipe.model, folder / name)
    return replace(recipe, model=str(folder / name), output=str(folder))


JOBS: dict[str, Callable[[Recipe, Path], object]] = {
    "deploy": lambda recipe, table: deploy(_replacing(recipe, table.parent, "model.int8.onnx")),
    "deploy, at the recipe": lambda recipe, table: deploy(_replacing(recipe, table.parent, "recipe.toml")),
    "migrate": lambda recipe, table: migrate(_replacing(recipe, table.parent, "model.int8.onnx"), table),
    "migrate, its table": lambda recipe, table: migrate(replace(recipe, output=str(table.parent)), table),
    "build": lambda recipe, table: build(replace(recipe, output=recipe.model)),
    "build, its table": lambda recipe, table: build(replace(recipe, output=str(table)), table),
    "three": lambda recipe, table: build_three(
        _replacing(recipe, table.parent, "model.int8.onnx"), None, None, SILENT
    ),
    "three, a link": lambda recipe, table: build_three(
        replace(_linked(recipe, table.parent / "model.fp16.onnx"), output=str(table.parent)),
        recipe.model,
        None,
        SILENT,
    ),
}


def _linked(recipe: Recipe, link: Path) -> Recipe:
    """The recipe, whose model has a second name."""
    os.link(recipe.model, link)
    return recipe


@pytest.mark.parametrize("job", JOBS)
def test_results_replace_no_input(job: str, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "calibration.cache").write_text("TRT-101601-EntropyCalibration2\nx: 3c010204\n")
    with pytest.raises(InputError, match="would replace an input"):
        JOBS[job](recipe, tmp_path / "calibration.cache")


def test_two_outputs_are_two_files(recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(recipe, output=str(tmp_path), timing_cache=str(tmp_path / "manifest.json"))
    with pytest.raises(InputError, match="written to the same file"):
        deploy(recipe)


def test_a_folder_is_no_stream(recipe: Recipe) -> None:
    with pytest.raises(InputError, match="is a stream"):
        deploy(replace(recipe, output="/dev/stdout"))
