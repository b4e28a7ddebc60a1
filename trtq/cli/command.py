"""What a command is: a name, a line of help, its options and the function that runs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trtq.console import Console
from trtq.errors import InputError
from trtq.paths import Output, Read, Written, check_paths, paths_of_recipe, writes_to_stdout
from trtq.recipe import Recipe


@dataclass(frozen=True)
class Argument:
    """An argument that is not an option of recipes.

    Attributes:
        path: what is done with the path that it holds, if it holds one.
    """

    names: tuple[str, ...]
    settings: dict[str, Any]
    path: Literal["read", "written"] | None = None

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Make it an argument of `parser`."""
        checked: dict[str, Any] = {} if self.path is None else {"type": path_text}
        parser.add_argument(*self.names, **checked, **self.settings)

    def paths(self, given: argparse.Namespace) -> Iterator[Read | Written]:
        """The paths that are given for it."""
        name = self.names[0].lstrip("-").replace("-", "_")
        found = getattr(given, name, None) if self.path else None
        spelled = self.names[0] if self.names[0].startswith("-") else str(self.settings.get("metavar"))
        for text in found if isinstance(found, list) else [found]:
            if text is not None:
                path = Path(text)
                yield Read(spelled, path) if self.path == "read" else Written(spelled, path, Output.TEXT)


@dataclass(frozen=True)
class Command:
    """A command: `options` are names of recipe options, `arguments` those that are its own.

    Attributes:
        output, makes: what it makes of -o (see `Written`).
    """

    name: str
    summary: str
    run: Callable[[argparse.Namespace], int]
    options: tuple[str, ...] = ()
    arguments: tuple[Argument, ...] = ()
    output: Output = Output.FOLDER
    makes: tuple[str, ...] = ()

    def paths(self, given: argparse.Namespace, recipe: Recipe) -> Iterator[Read | Written]:
        """What it reads and writes, as far as that is named."""
        if given.recipe:
            yield Read("--recipe", Path(given.recipe))
        yield from paths_of_recipe(recipe, self.output, self.makes)
        for argument in self.arguments:
            yield from argument.paths(given)


def argument(*names: str, path: Literal["read", "written"] | None = None, **settings: Any) -> Argument:
    """An argument as `ArgumentParser.add_argument` takes it; `path` as for `Argument`."""
    return Argument(names, settings, path)


def path_text(text: str) -> str:
    """A path on the command line.

    Raises:
        InputError: it is empty, which would be the folder at hand.
    """
    if not text:
        raise InputError("a path is empty", remedy="give a path, or leave the option out")
    return text


def recipe_of(given: argparse.Namespace) -> Recipe:
    """The recipe file's options with the command line's on top, once it is certain that nothing that the
    command reads is written over. Where it writes to standard output, what it prints goes to standard error
    (`main` undoes that).

    Raises:
        InputError: an option or a path cannot be used.
    """
    model = getattr(given, "model", None)
    if model is not None and model.endswith(".toml"):
        raise InputError("MODEL is a recipe", file=model, remedy=f"give it as --recipe {model}")
    base = Recipe.load(given.recipe) if given.recipe else Recipe()
    recipe = base.merged(vars(given))
    paths = list(given.command.paths(given, recipe))
    check_paths(paths)
    if writes_to_stdout(paths):
        sys.stdout = sys.stderr
    return recipe


def console_of(given: argparse.Namespace) -> Console:
    """The console, silent with --quiet."""
    return Console(quiet=given.quiet)
