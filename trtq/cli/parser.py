"""The parser of a command: its options in groups, what is required first, examples and exit codes last."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from trtq.cli.command import Command, path_text
from trtq.cli.options import GROUPS
from trtq.recipe import FLAG, flag, from_command_line, options, spelled

_SIGNALS = {130: "Ctrl-C (128 and the number of the signal: 143 is SIGTERM)"}


def fill(parser: argparse.ArgumentParser, command: Command, completion: Any = None) -> None:
    """Give a parser the options of a command.

    Args:
        completion: becomes the attribute `complete` of arguments that are paths, which `shtab` reads.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = _usage(parser.prog, command)
    parser.epilog = _epilog(command)
    parser.set_defaults(command=command, said=None)
    needed = {name for item in command.required for name in ([item] if isinstance(item, str) else item)}
    own = {argument.name: argument for argument in command.arguments}
    recipe = [name for group in GROUPS.values() for name in group if name in command.options]
    required = [name for name in (*recipe, *own) if name in needed]
    optional = [name for name in own if name not in needed]
    groups = {"required": required, f"of {command.name}": optional}
    groups |= {
        title: [n for n in recipe if n in names and n not in needed] for title, names in GROUPS.items()
    }
    for title, names in groups.items():
        group = parser.add_argument_group(title) if names else None
        for name in names:
            if name in own:
                late = name in needed and bool(command.options)
                action, is_path = own[name].add_to(group, late=late), own[name].path is not None
            else:
                (field,) = options([name])
                action, is_path = _add_option(group, name), field.metadata["path"]
            if is_path:
                action.complete = completion
    other = parser.add_argument_group("other")
    if command.options:
        action = other.add_argument(
            "--recipe",
            type=path_text,
            metavar="FILE.toml",
            help="options in a file, in which relative paths are relative to it; the command line wins",
        )
        action.complete = completion  # type: ignore[attr-defined]
    other.add_argument(
        "-q", "--quiet", action="store_true", help="print errors only; the exit code says the rest"
    )
    other.add_argument("--debug", action="store_true", help="show tracebacks")
    other.add_argument("-h", "--help", action="help", help="show this help")


def _add_option(group: Any, name: str) -> Any:
    (field,) = options([name])
    metadata = field.metadata
    if name == "model":
        return group.add_argument(name, nargs="?", metavar=metadata["metavar"], help=metadata["help"])
    names = (*metadata["flags"], flag(name))
    kind, value = metadata["kind"], partial(from_command_line, name)
    if kind is FLAG:
        return group.add_argument(*names, action="store_const", const=True, help=metadata["help"])
    if kind.many is not None:
        return group.add_argument(*names, action="append", type=value, metavar="X", help=metadata["help"])
    default = "" if field.default is None else f" (default: {kind.write(field.default)})"
    return group.add_argument(
        *names,
        type=value,
        choices=kind.choices,
        metavar=metadata["metavar"],
        help=(metadata["help"] + default).replace("%", "%%"),
    )


def _usage(prog: str, command: Command) -> str:
    """What is required, spelled out, and `[options]`."""
    own = {argument.name: argument for argument in command.arguments}

    def word(name: str) -> str:
        if name in own:
            text, metavar = own[name].spelled, own[name].settings.get("metavar")
            many = "..." if own[name].settings.get("nargs") == "+" else ""
            return f"{text} {metavar or name.upper()}" if text.startswith("-") else text + many
        (field,) = options([name])
        metavar = field.metadata["metavar"]
        return metavar if name == "model" else f"{(*field.metadata['flags'], flag(name))[0]} {metavar}"

    positional = [argument for argument in command.arguments if not argument.names[0].startswith("-")]
    words = [argument.spelled for argument in positional if "nargs" not in argument.settings]
    words = [word for word in words if word not in {own[n].spelled for n in own if n in command.required}]
    words += [
        word(item) if isinstance(item, str) else f"({' | '.join(word(name) for name in item)})"
        for item in command.required
    ]
    words += [f"[{a.spelled}]" for a in positional if a.settings.get("nargs") in ("?", "*")]
    return " ".join([prog, *words, "[options]"]).replace("%", "%%")


def _epilog(command: Command) -> str:
    lines = ["examples:", *(f"  {example}" for example in command.examples)] if command.examples else []
    codes = {int(code): text for code, text in command.codes} | _SIGNALS
    lines += ["", "exit codes:", *(f"  {code:<4}{text}" for code, text in codes.items())]
    return "\n".join(lines).strip().replace("%", "%%")


def spelled_names(command: Command) -> list[str]:
    """Every option of a command as it is spelled, for suggestions."""
    own = [name for argument in command.arguments for name in argument.names if name.startswith("-")]
    others = [spelled(name) for name in command.options if name != "model"]
    return [*own, *others, "--recipe", "--quiet", "--debug", "--help"]
