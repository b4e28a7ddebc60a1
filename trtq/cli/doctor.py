"""`trtq doctor`: what works on this machine."""

from __future__ import annotations

import argparse

from trtq.cli.command import Command
from trtq.console import show
from trtq.errors import ExitCode


def _doctor(given: argparse.Namespace) -> int:
    from trtq.backends.doctor import as_text, diagnose

    show(as_text(diagnose()))
    return ExitCode.PASS


DOCTOR = Command("doctor", _doctor, examples=("trtq doctor",))
