"""`trtq inspect`: what a file is and what is in it."""

from __future__ import annotations

import argparse
import json

from trtq.cli.command import Command, argument
from trtq.console import show
from trtq.errors import ExitCode


def _inspect(given: argparse.Namespace) -> int:
    from trtq.report.inspection import inspect

    found = inspect(given.file)
    if given.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        show(found.text())
    return ExitCode.PASS


INSPECT = Command(
    "inspect",
    _inspect,
    required=("file",),
    examples=(
        "trtq inspect out",
        "trtq inspect out/model.plan --json",
        "trtq inspect calibration.cache",
    ),
    arguments=(
        argument("file", path="read", metavar="FILE"),
        argument("--json", action="store_true", help="print JSON"),
    ),
)
