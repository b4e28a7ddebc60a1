"""What a command is: a name, a line of help, its options and the function that runs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trtq.console import Console
from trtq.recipe import Recipe


@dataclass(frozen=True)
class Argument:
    """An argument that is not an option of recipes."""

    names: tuple[str, ...]
    settings: dict[str, Any]

    def add_to(self, parser: argparse.ArgumentParser) -> None:
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
    return Argument(names, settings)


def recipe_of(given: argparse.Namespace) -> Recipe:
    """The recipe file's options with the command line's on top."""
    base = Recipe.load(given.recipe) if given.recipe else Recipe()
    return base.merged(vars(given))


def console_of(given: argparse.Namespace) -> Console:
    return Console(quiet=given.quiet)
