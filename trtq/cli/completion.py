"""`trtq completion`: what a shell needs to complete commands and options."""

from __future__ import annotations

import argparse

from trtq.cli.command import Command, argument
from trtq.errors import ExitCode, MissingBackendError
from trtq.escapes import printable

SHELLS = ("bash", "zsh", "fish")


def _completion(given: argparse.Namespace) -> int:
    from trtq.cli.main import parser

    try:
        import shtab
    except ImportError as error:
        raise MissingBackendError(
            "completion is made by shtab", cause=error, remedy="pip install 'trtq[completion]'"
        ) from error
    print(printable(shtab.complete(parser(completion=shtab.FILE), given.shell)))
    return ExitCode.PASS


COMPLETION = Command(
    "completion",
    _completion,
    arguments=(argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS)),),
    examples=(
        "trtq completion bash > ~/.local/share/bash-completion/completions/trtq",
        "trtq completion zsh > ~/.zfunc/_trtq",
        "trtq completion fish > ~/.config/fish/completions/trtq.fish",
    ),
)
