"""`trtq report`: the page of a folder of results, written again."""

from __future__ import annotations

import argparse

from trtq.cli.command import Command, argument
from trtq.console import show
from trtq.errors import ExitCode


def _report(given: argparse.Namespace) -> int:
    from trtq.report.html import write_report

    show(str(write_report(given.folder)))
    return ExitCode.PASS


REPORT = Command(
    "report",
    _report,
    required=("folder",),
    examples=("trtq report out",),
    arguments=(argument("folder", path="read", metavar="DIR"),),
)
