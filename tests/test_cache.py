"""The cache: what comes back is what was stored, or nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtq
from trtq.cache import KINDS, Cache, Key, default_root, remove
from trtq.code_hash import own_module
from trtq.errors import InputError

KEY = Key("table", "a" * 64, "b" * 64, {"method": "max", "tensors": ["x", "y"]})
CONTENT = bytes(range(256)) * 50


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty cache that keeps what it reports in `reports`."""
    return Cache(tmp_path / "cache", reports.append)


reports: list[str] = []


@pytest.fixture(autouse=True)
def _no_reports() -> None:
    reports.clear()


def record_of(cache: Cache, key: Key = KEY) -> Path:
    return Path(f"{cache.path(key)}.json")


def test_what_is_stored_comes_back(cache: Cache) -> None:
    assert cache.fetch(KEY) is None
    cache.store(KEY, CONTENT)
    assert cache.fetch(KEY) == CONTENT
    assert Cache(cache.root).fetch(replace(KEY, entries={"tensors": ["x", "y"], "method": "max"})) == CONTENT
    assert reports == []


def test_layout(cache: Cache) -> None:
    cache.store(KEY, CONTENT, {"name": "net"})
    path = cache.path(KEY)
    assert path.parent == cache.root / ("a" * 16) / ("b" * 16)
    assert path.name.startswith("table-")
    assert path.suffix == ".cache"
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, f"{path.name}.json"])
    record = json.loads(record_of(cache).read_text())
    assert record.pop("sha256")
    assert record.pop("record_sha256")
    key = record["key"]
    assert key.pop("packages")["numpy"] == np.__version__
    assert len(key.pop("code")) == 64
    assert record == {
        "name": "net",
        "key": {
            "kind": "table",
            "algorithm": KINDS["table"].algorithm,
            "model": "a" * 64,
            "data": "b" * 64,
            "trtq": trtq.__version__,
            "method": "max",
            "tensors": ["x", "y"],
        },
    }
    assert cache.fetch_noted(KEY) == (CONTENT, {"name": "net"})


def test_every_component_of_a_key_counts(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [
        KEY,
        replace(KEY, kind="statistics"),
        replace(KEY, kind="outputs"),
        replace(KEY, model="a" * 63 + "c"),
        replace(KEY, data="b" * 63 + "c"),
        replace(KEY, entries={}),
        replace(KEY, entries={"method": "max", "tensors": ["y", "x"]}),
        replace(KEY, entries={"method": "mse", "tensors": ["x", "y"]}),
        replace(KEY, entries={**KEY.entries, "executor": "simulation"}),
    ]
    for index, key in enumerate(keys):
        cache.store(key, b"%d" % index)
    assert [cache.fetch(key) for key in keys] == [b"%d" % index for index in range(len(keys))]
    monkeypatch.setattr("trtq.cache.__version__", "0.0.0")
    assert cache.fetch(KEY) is None
    assert reports == []


@pytest.mark.parametrize(
    "change", [{"algorithm": 99}, {"modules": ("trtq.errors",)}, {"packages": ("numpy", "tqdm")}]
)
def test_what_another_algorithm_code_or_package_computed_is_not_used(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    cache.store(KEY, CONTENT)
    monkeypatch.setitem(KINDS, "table", replace(KINDS["table"], **change))
    assert cache.fetch(KEY) is None
    cache.store(KEY, b"new")
    assert (cache.fetch(KEY), len(list(cache.entries()))) == (b"new", 2)


def test_a_key_is_named_and_its_names_are_its_own() -> None:
    assert Key.of("table", model="a" * 64, data="b" * 64, tensors=["x", "y"], method="max") == KEY
    with pytest.raises(ValueError, match="every key has"):
        replace(KEY, entries={"code": "mine"}).to_json()


def test_every_kinds_code_is_there() -> None:
    for kind in KINDS.values():
        assert all(own_module(name) for name in kind.modules)


def test_damaged_content_is_reported_and_replaced(cache: Cache) -> None:
    for damaged in (CONTENT[:-1], b"", CONTENT[:100] + b"?" + CONTENT[101:]):
        cache.store(KEY, CONTENT)
        cache.path(KEY).write_bytes(damaged)
        assert cache.fetch(KEY) is None
        (report,) = reports
        assert str(cache.path(KEY)) in report
        assert "hash does not match" in report
        reports.clear()
    cache.store(KEY, CONTENT)
    assert cache.fetch(KEY) == CONTENT


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"sha256": 1}', b"[" * 100_000, b"9" * 5000]
)
def test_damaged_record_is_reported(cache: Cache, damage: bytes) -> None:
    cache.store(KEY, CONTENT)
    record_of(cache).write_bytes(damage)
    assert cache.fetch(KEY) is None
    assert len(reports) == 1
    (entry,) = cache.entries()
    assert entry.problem
    assert entry.size == len(CONTENT)


def test_content_or_record_that_is_missing_is_no_entry(cache: Cache) -> None:
    """As a writer leaves them that was stopped between the two, or one who removes them."""
    for missing in (record_of(cache), cache.path(KEY)):
        cache.store(KEY, CONTENT)
        missing.unlink()
        assert cache.fetch(KEY) is None
        assert reports == []


@pytest.mark.parametrize(
    "change",
    [{"name": "another"}, {"new": 1}, {"key": []}, {"record_sha256": None}, {"key": {"kind": "table"}}],
)
def test_a_record_that_was_edited_is_reported(cache: Cache, change: dict[str, Any]) -> None:
    cache.store(KEY, CONTENT, {"name": "net", 9: [10], 10: (9,)})  # type: ignore[dict-item]
    assert cache.fetch(KEY) == CONTENT
    record = json.loads(record_of(cache).read_text())
    record_of(cache).write_text(json.dumps(record | change))
    assert cache.fetch(KEY) is None
    assert "is damaged (its record was changed); it is computed again" in reports[0]
    assert [entry.problem for entry in cache.entries()] == ["its record was changed"]
    cache.store(KEY, CONTENT)
    assert [entry.problem for entry in cache.entries()] == [None]


def test_verify_finds_content_and_record_that_were_swapped(cache: Cache) -> None:
    other = replace(KEY, entries={"method": "mse"})
    for key in (KEY, other):
        cache.store(key, str(key).encode())
    for end in ("", ".json"):
        here, there = Path(f"{cache.path(KEY)}{end}"), Path(f"{cache.path(other)}{end}")
        kept = here.read_bytes()
        here.write_bytes(there.read_bytes())
        there.write_bytes(kept)
    assert [entry.problem for entry in cache.entries()] == ["it belongs to another key"] * 2
    assert (cache.fetch(KEY), cache.fetch(other)) == (None, None)


def test_a_writer_that_is_stopped_between_the_two_leaves_no_entry(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.store(KEY, CONTENT)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trtq.cache.write_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            cache.store(KEY, b"new")
    assert (cache.fetch(KEY), list(cache.entries()), reports) == (None, [], [])
    cache.store(KEY, b"new")
    assert cache.fetch(KEY) == b"new"


def test_content_that_is_a_folder_is_reported(cache: Cache) -> None:
    cache.store(KEY, CONTENT)
    cache.path(KEY).unlink()
    cache.path(KEY).mkdir()
    assert cache.fetch(KEY) is None
    assert len(reports) == 1
    with pytest.raises(InputError, match="cannot remove"):
        cache.prune(lambda entry: False)


WRITER = """
import hashlib, sys
from pathlib import Path
from trtq.cache import Cache, Key
contents = [hashlib.sha512(bytes([part])).digest() * 4096 for part in range(4)]
key = Key("sensitivity", "a" * 64, "b" * 64)
cache = Cache(Path(sys.argv[1]), lambda line: sys.exit(line))
for turn in range(40):
    cache.store(key, contents[turn % 4], {"turn": turn})
    assert cache.fetch(key) in contents
    assert [entry.problem for entry in cache.entries()] == [None]
"""


def test_concurrent_writers_and_readers_see_whole_entries(cache: Cache) -> None:
    command = [sys.executable, "-c", WRITER, str(cache.root)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [(w.communicate()[1], w.returncode) for w in writers] == [("", 0)] * 4
    (entry,) = cache.entries()
    assert entry.problem is None
    assert len(list(entry.path.parent.iterdir())) == 2


def stored(cache: Cache) -> list[Key]:
    keys = [replace(KEY, kind=kind, model=model * 64) for kind in KINDS for model in "cd"]
    for key in keys:
        cache.store(key, key.kind.encode())
    return keys


def test_entries(cache: Cache) -> None:
    assert list(cache.entries()) == []
    keys = stored(cache)
    damaged = cache.path(keys[0])
    damaged.write_bytes(b"?")
    (cache.root / "README").write_text("no entry")
    entries = list(cache.entries())
    assert {e.path for e in entries} == {cache.path(key) for key in keys}
    assert [e.path for e in entries if e.problem] == [damaged]
    assert all(e.size == e.path.stat().st_size for e in entries)
    assert {(e.key["kind"], e.key["model"][0]) for e in entries} == {(k.kind, k.model[0]) for k in keys}


def test_an_entry_that_vanishes_while_they_are_listed(cache: Cache) -> None:
    stored(cache)
    paths = [e.path for e in cache.entries()]
    listing = cache.entries()
    assert next(listing).path == paths[0]
    remove(paths[1])
    assert paths[1] not in [e.path for e in listing]


def test_prune(cache: Cache) -> None:
    keys = stored(cache)
    removed = cache.prune(lambda entry: entry.key["kind"] == "table")
    assert {e.path for e in removed} == {cache.path(k) for k in keys if k.kind != "table"}
    assert {e.path for e in cache.entries()} == {cache.path(k) for k in keys if k.kind == "table"}
    left = [p for p in cache.root.rglob("*") if p.is_file()]
    assert len(left) == 4  # two tables and their records
    remove(removed[0].path)  # once more does no harm


def test_default_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTQ_CACHE", "/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/user")
    assert default_root() == Path("/somewhere")
    monkeypatch.setenv("TRTQ_CACHE", "")
    assert default_root() == Path("/xdg/trtq/calib_cache")
    monkeypatch.delenv("TRTQ_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_root() == Path("/home/user/.cache/trtq/calib_cache")


def test_content_in_the_place_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    reports: list[str] = []
    cache = Cache(tmp_path, reports.append)
    first, second = (Key("outputs", "a" * 64, "b" * 64, {"executor": name}) for name in ("one", "two"))
    for key in (first, second):
        cache.store(key, str(key).encode())
    here, there = cache.path(first), cache.path(second)
    for suffix in ("", ".json"):
        shutil.copy(f"{there}{suffix}", f"{here}{suffix}")
    assert cache.fetch(first) is None
    assert "belongs to another key" in reports[0]
    assert cache.fetch(second) == str(second).encode()
