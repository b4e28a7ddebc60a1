"""`trtq cache`: what is cached, and tables in other forms (`trtq cache convert`)."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable

from trtq.cache import Cache, Entry
from trtq.cli import convert
from trtq.cli.command import Command, argument, recipe_of
from trtq.console import show
from trtq.errors import ExitCode, InputError
from trtq.paths import Output


def _cache(given: argparse.Namespace) -> int:
    if given.action == "convert":
        return convert.run(given)
    if given.source is not None:
        raise InputError(f"'{given.action}' takes no SOURCE", remedy="only 'trtq cache convert' does")
    cache = Cache.at(recipe_of(given).cache)
    if given.action == "prune":
        if not 0 <= given.days < math.inf:
            raise InputError(f"--days is {given.days}", remedy="use a number from 0")
        removed, kept = cache.prune_older(given.days)
        show(f"{removed} of {removed + kept} entries removed from {cache.root}")
        return ExitCode.PASS
    entries = list(cache.entries())
    if given.action == "show":
        for entry in entries:
            print(json.dumps(entry.to_json(), indent=2))
        return ExitCode.PASS
    damaged = [entry for entry in entries if entry.problem]
    _list(cache, entries if given.action == "list" else damaged)
    show(f"{len(entries)} entries, {len(damaged)} damaged, in {cache.root}")
    return ExitCode.FAIL if given.action == "verify" and damaged else ExitCode.PASS


def _list(cache: Cache, entries: Iterable[Entry]) -> None:
    for entry in entries:
        path = entry.path.relative_to(cache.root)
        show(f"{entry.size:>12,}  {entry.problem or 'ok':<4}  {path}  {entry.made_by}")


CACHE = Command(
    "cache",
    "list, show, verify or prune what is cached; convert tables to Q/DQ models and back",
    _cache,
    ("cache", *convert.OPTIONS),
    (
        argument("action", choices=("list", "show", "verify", "prune", "convert")),
        *convert.ARGUMENTS,
        argument("--days", type=float, default=30.0, help="prune: keep entries younger than this (30)"),
    ),
    output=Output.TEXT,
    makes=(".json", ".data"),
)
