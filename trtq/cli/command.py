"""What a command is: a name, its options, examples, exit codes and the function that runs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trtq.console import Console
from trtq.errors import ExitCode, InputError
from trtq.paths import Output, Read, Written, check_paths, paths_of_recipe, writes_to_stdout
from trtq.recipe import Recipe, missing, spelled

if TYPE_CHECKING:
    from trtq.report.junit import Said

Codes = tuple[tuple[ExitCode, str], ...]

DONE: Codes = (
    (ExitCode.PASS, "done"),
    (ExitCode.BAD_INPUT, "bad usage or bad input"),
    (ExitCode.MISSING_BACKEND, "a package, a GPU or a driver that it needs is missing"),
)
"""The exit codes of a command that decides nothing."""

DECIDED: Codes = (
    (ExitCode.PASS, "pass"),
    (ExitCode.FAIL, "fail: the gate, or a check that was asked for"),
    DONE[1],
    (ExitCode.INCONCLUSIVE, "inconclusive: too few samples, or only simulated where an engine was asked for"),
    DONE[2],
)
"""Those of one that decides."""


@dataclass(frozen=True)
class Argument:
    """An argument that is not an option of recipes.

    Attributes:
        path: what is done with the path that it holds, if it holds one.
    """

    names: tuple[str, ...]
    settings: dict[str, Any]
    path: Literal["read", "written"] | None = None

    def add_to(self, parser: Any, *, late: bool = False) -> Any:
        """Make it an argument of a parser or group.

        Args:
            late: whether it is there is seen once the recipe is read, together with all else that is missing.
        """
        settings = dict(self.settings)
        if self.path is not None:
            settings["type"] = path_text
        if late and not self.names[0].startswith("-"):
            settings["nargs"] = {"+": "*"}.get(str(settings.get("nargs")), "?")
        return parser.add_argument(*self.names, **settings)

    @property
    def name(self) -> str:
        """Its attribute of what was parsed."""
        return str(self.settings.get("dest") or self.names[-1].lstrip("-").replace("-", "_"))

    @property
    def spelled(self) -> str:
        """As a message has it."""
        return self.names[-1] if self.names[-1].startswith("-") else str(self.settings.get("metavar"))

    def paths(self, given: argparse.Namespace) -> Iterator[Read | Written]:
        """The paths that are given for it."""
        found = getattr(given, self.name, None) if self.path else None
        for text in found if isinstance(found, list) else [found]:
            if text is not None:
                path = Path(text)
                yield (
                    Read(self.spelled, path)
                    if self.path == "read"
                    else Written(self.spelled, path, Output.TEXT)
                )


@dataclass(frozen=True)
class Command:
    """A command: `options` are names of recipe options, `arguments` those that are its own.

    Attributes:
        required: what it cannot do without, by its names; of names in a tuple one is enough. What a recipe
            gives is not missing.
        examples: command lines that say how it is used.
        codes: the exit codes that it may have, and what each says.
        output, makes: what it makes of -o (see `Written`).
        said: the files that say how it ended, if it writes any.
    """

    name: str
    run: Callable[[argparse.Namespace], int]
    options: tuple[str, ...] = ()
    arguments: tuple[Argument, ...] = ()
    required: tuple[str | tuple[str, ...], ...] = ()
    examples: tuple[str, ...] = ()
    codes: Codes = DONE
    output: Output = Output.FOLDER
    makes: tuple[str, ...] = ()
    said: Callable[[argparse.Namespace, Recipe], Said] | None = None

    def paths(self, given: argparse.Namespace, recipe: Recipe) -> Iterator[Read | Written]:
        """What it reads and writes, as far as that is named."""
        if given.recipe:
            yield Read("--recipe", Path(given.recipe))
        yield from paths_of_recipe(recipe, self.output, self.makes)
        for argument in self.arguments:
            yield from argument.paths(given)

    def check_required(self, given: argparse.Namespace, recipe: Recipe) -> None:
        """Refuse a command line that lacks something.

        Raises:
            InputError: it names all that is missing.
        """
        own = {argument.name: argument for argument in self.arguments}

        def value(name: str) -> Any:
            return getattr(given, name) if name in own else getattr(recipe, name)

        absent = []
        for item in self.required:
            names = (item,) if isinstance(item, str) else item
            if all(value(name) in (None, []) for name in names):
                absent.append(" or ".join(own[n].spelled if n in own else spelled(n) for n in names))
        if absent:
            raise missing(absent)


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


def said_in_folder(given: argparse.Namespace, recipe: Recipe) -> Said:
    """`Said` of a command that leaves a verdict in its folder of results."""
    from trtq.report.junit import Said

    return Said.in_folder(recipe.output, recipe.model)


def recipe_of(given: argparse.Namespace) -> Recipe:
    """The recipe file's options with the command line's on top, once it is certain that nothing is missing,
    and that nothing that the command reads is written over. Where it writes to standard output, what it
    prints goes to standard error (`main` undoes that). What an earlier job said of its outcome is gone then.

    Raises:
        InputError: an option or a path is missing or cannot be used.
    """
    model = getattr(given, "model", None)
    if model is not None and model.endswith(".toml"):
        raise InputError("MODEL is a recipe", file=model, remedy=f"give it as --recipe {model}")
    base = Recipe.load(given.recipe) if given.recipe else Recipe()
    recipe = base.merged(vars(given))
    paths = list(given.command.paths(given, recipe))
    check_paths(paths)
    if given.command.said is not None:
        given.said = given.command.said(given, recipe)
        given.said.retire()
    given.command.check_required(given, recipe)
    if writes_to_stdout(paths) and not given.quiet:
        sys.stdout = sys.stderr
    return recipe


def console_of(given: argparse.Namespace) -> Console:
    """The console, silent with --quiet."""
    return Console(quiet=given.quiet)
