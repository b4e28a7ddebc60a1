"""`trtq cache`: what is cached, and tables in other forms (`trtq cache convert`)."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from trtq.cache import KINDS, Cache, Entry
from trtq.cli import convert
from trtq.cli.command import DONE, Command, argument, recipe_of
from trtq.console import show
from trtq.errors import ExitCode, InputError
from trtq.paths import Output


def _cache(given: argparse.Namespace) -> int:
    if given.action == "convert":
        return convert.run(given)
    if given.source is not None:
        raise InputError(f"'{given.action}' takes no SOURCE", remedy="only 'trtq cache convert' does")
    cache, wanted = Cache.at(recipe_of(given).cache), _filter(given)
    if given.action == "prune":
        removed, kept = cache.prune_older(given.days, wanted)
        show(f"{removed} of {removed + kept} entries removed from {cache.root}")
        return ExitCode.PASS
    entries = [entry for entry in cache.entries() if wanted(entry)]
    if given.action == "show":
        for entry in entries:
            print(json.dumps(entry.to_json(), indent=2))
        return ExitCode.PASS
    damaged = [entry for entry in entries if entry.problem]
    for entry in entries if given.action == "list" else damaged:
        show(_line(cache, entry))
    size = sum(entry.size for entry in entries)
    show(f"{len(entries)} entries, {len(damaged)} damaged, {size / 1e6:.1f} MB, in {cache.root}")
    return ExitCode.FAIL if given.action == "verify" and damaged else ExitCode.PASS


def _line(cache: Cache, entry: Entry) -> str:
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.modified))
    path = entry.path.relative_to(cache.root)
    found = f"{entry.problem or 'ok':<4}  {entry.job or '-':<20}"
    return f"{made} {entry.size:>13,}  {found}  {path}  {entry.made_by}"


def _filter(given: argparse.Namespace) -> Callable[[Entry], bool]:
    """Whether an entry is among those that are asked for."""
    name, kind = given.model, given.kind
    sha256 = None
    if name is not None and Path(name).is_file():
        from trtq.graph.model import load_model

        sha256 = load_model(name).sha256

    def wanted(entry: Entry) -> bool:
        if kind is not None and entry.key.get("kind") != kind:
            return False
        model = str(entry.key.get("model"))
        if name is None:
            return True
        if sha256 is not None:
            return model == sha256 or entry.job == Path(name).name
        return model.startswith(name) or fnmatchcase(entry.job, name)

    return wanted


CACHE = Command(
    "cache",
    _cache,
    ("cache", *convert.OPTIONS),
    (
        argument(
            "action",
            choices=("list", "show", "verify", "prune", "convert"),
            metavar="ACTION",
            help="list: a line for each entry; show: their keys as JSON; verify: the damaged ones; prune:"
            " remove old and damaged ones; convert: a table to another form",
        ),
        *convert.ARGUMENTS,
        argument("--kind", choices=tuple(KINDS), help="list, show, verify, prune: only this kind"),
        argument("--days", type=float, default=30.0, help="prune: keep entries younger than this (30)"),
    ),
    examples=(
        "trtq cache list",
        "trtq cache list --model 'resnet*' --kind table",
        "trtq cache prune --days 7",
        "trtq cache convert calibration.cache --model model.onnx -o model.int8.onnx",
        "trtq cache convert calibration.cache --for 8.6 -o calibration86.cache",
    ),
    codes=((ExitCode.PASS, "done"), (ExitCode.FAIL, "verify: an entry is damaged"), *DONE[1:]),
    output=Output.TEXT,
    makes=(".json", ".data"),
)
