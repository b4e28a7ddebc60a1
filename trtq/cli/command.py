"""What a command is: a name, a line of help, its options and the function that runs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trtq.console import Console
from trtq.errors import InputError
from trtq.recipe import Recipe


@dataclass(frozen=True)
class Argument:
    """An argument that is not an option of recipes."""

    names: tuple[str, ...]
    settings: dict[str, Any]

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Make it an argument of `parser`."""
        parser.add_argument(*self.names, **self.settings)


@dataclass(frozen=True)
class Command:
    """A command: `options` are names of recipe options, `arguments` those that are its own."""

    name: str
    summary: str
    run: Callable[[argparse.Namespace], int]
    options: tuple[str, ...] = ()
    arguments: tuple[Argument, ...] = ()


def argument(*names: str, **settings: Any) -> Argument:
    """An argument as `ArgumentParser.add_argument` takes it."""
    return Argument(names, settings)


def recipe_of(given: argparse.Namespace) -> Recipe:
    """The recipe file's options with the command line's on top."""
    model = getattr(given, "model", None)
    if model is not None and model.endswith(".toml"):
        raise InputError("MODEL is a recipe", file=model, remedy=f"give it as --recipe {model}")
    base = Recipe.load(given.recipe) if given.recipe else Recipe()
    return base.merged(vars(given))


def console_of(given: argparse.Namespace) -> Console:
    """The console, silent with --quiet."""
    return Console(quiet=given.quiet)
