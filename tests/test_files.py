"""Files that are written whole or not at all, whatever goes wrong, and hashes against known ones."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from trtq import files
from trtq.errors import ExitCode, InputError, MissingBackendError, TrtqError

# -- writing


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "file.bin"
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        assert not path.exists()
        temporary.write_bytes(b"whole")
    assert contents(path.parent) == {"file.bin": b"whole"}


@pytest.mark.parametrize("stopped", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [None, b"old"])
def test_whatever_stops_the_writer_leaves_the_old_file(
    tmp_path: Path, stopped: type, old: bytes | None
) -> None:
    path = tmp_path / "file.bin"
    if old is not None:
        path.write_bytes(old)
    before = contents(tmp_path)

    def write() -> None:
        with files.atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise stopped

    with pytest.raises(stopped):
        write()
    assert contents(tmp_path) == before


def test_a_new_file_has_the_mode_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_bytes(b"")
    files.write_bytes(tmp_path / "ours", b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "ours")]
    assert modes[0] == modes[1]


@pytest.fixture
def unwritable() -> Iterator[Path]:
    """A folder without write permission, and a user whom that stops."""
    folder = Path(tempfile.mkdtemp())
    (folder / "old.bin").write_bytes(b"old")
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["old.bin", "new.bin", "folder/new.bin"])
def test_an_unwritable_folder(unwritable: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        files.write_bytes(unwritable / name, b"new")
    assert caught.value.file == str(unwritable / name)
    assert caught.value.cause == "Permission denied"
    assert caught.value.remedy


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(InputError, match="cannot write the file"):
        files.write_bytes(tmp_path / "file" / "new.bin", b"new")
    assert contents(tmp_path) == {"file": b"old"}


def test_neither_folders_nor_devices_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "folder", tmp_path / "pipe", Path("/dev/null"), Path("/dev/stdout")):
        with pytest.raises(InputError, match="not a regular file"), files.atomic_path(path):
            pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "pipe"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("far/file")
    files.write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "far") == {"file": b"new"}


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        files.write_bytes(tmp_path / "pipe", b"new" * 1000)
        assert reader.communicate()[0] == b"new" * 1000
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_pipe_that_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_READER_SECONDS", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="nobody reads the pipe"):
        files.write_bytes(tmp_path / "pipe", b"new")


WRITE_TO_STDOUT = """
import sys
from trtq import files
sys.stdout.write("before ")
for name in sys.argv[1:]:
    files.write_bytes(name, b"written ")
sys.stdout.write("after")
"""


def test_standard_output_is_written_into_in_order_also_where_it_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/stdout")
    names = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", tmp_path / "link", "/dev/null"]
    command = [sys.executable, "-c", WRITE_TO_STDOUT, *names]
    expected = b"before " + b"written " * 4 + b"after"
    assert subprocess.run(command, capture_output=True, check=True).stdout == expected
    with (tmp_path / "out").open("wb") as out:
        subprocess.run(command, stdout=out, check=True)
    assert contents(tmp_path)["out"] == expected
    assert (tmp_path / "link").is_symlink()
    assert Path("/dev/stdout").is_symlink()


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "folder", "large", "a\0b"])
def test_only_files_of_a_bounded_size_are_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)  # no blocks
    with pytest.raises(OSError, match=r"regular|larger|directory|null"):
        files.read_bytes(tmp_path / name, 1000)


def test_nesting_has_an_end(tmp_path: Path) -> None:
    for depth, most in ((files.DEEPEST, True), (files.DEEPEST + 1, False), (10**6, False)):
        text = "[" * depth + "]" * depth
        if most:
            assert isinstance(files.parse_json(text), list)
        else:
            with pytest.raises(ValueError, match="nested too deeply"):
                files.parse_json(text)


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 10**400])
def test_integers_of_json_have_64_bits(number: int) -> None:
    if -(2**63) <= number < 2**63:
        assert files.parse_json(f"[{number}]") == [number]
    else:
        with pytest.raises(ValueError, match="beyond 64 bits"):
            files.parse_json(f"[{number}]")


WRITE_TOO_MUCH = """
import resource, sys
from trtq import errors, files
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    files.write_bytes(sys.argv[1], bytes(1 << 17))
except errors.InputError as error:
    sys.exit(f"{error.problem}: {error.cause}")
"""


def test_a_file_that_the_system_refuses_halfway(tmp_path: Path) -> None:
    """A limit on the size of files fails in write(2), as a full disk does."""
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", WRITE_TOO_MUCH, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "cannot write the file: File too large\n")
    assert contents(tmp_path) == {"file.bin": b"old"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    path = small_disk / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(InputError) as caught:
        files.write_bytes(path, bytes(1 << 17))
    assert caught.value.cause == "No space left on device"
    assert contents(small_disk) == {"file.bin": b"old"}


# -- text, JSON and hashes


def test_text_is_utf8(tmp_path: Path) -> None:
    files.write_text(tmp_path / "text", "Käfer\n")
    assert (tmp_path / "text").read_bytes() == b"K\xc3\xa4fer\n"


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": {"ü": ""}}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json", "plan") == value
    assert (tmp_path / "x.json").read_text() == json.dumps(value, indent=2) + "\n"


def test_json_without_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", {"score": float("nan")})
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"{'a': 1}"])
def test_json_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="cannot read the plan") as caught:
        files.read_json(path, "plan")
    assert caught.value.file == str(path)
    assert caught.value.cause


def test_hashes(tmp_path: Path) -> None:
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert files.sha256_bytes(b"abc") == abc
    assert files.sha256_bytes(memoryview(b"abc")) == abc
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "abc") == abc
    million = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"  # appendix B.3
    (tmp_path / "million").write_bytes(b"a" * 10**6 + b"")
    assert files.sha256_file(tmp_path / "million") == million


def test_a_file_longer_than_one_block_is_hashed_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10000
    (tmp_path / "long").write_bytes(content)
    assert files.sha256_file(tmp_path / "long") == files.sha256_bytes(content)


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_file_that_cannot_be_hashed(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot read the file"):
        files.sha256_file(tmp_path / name)


def test_json_hash_is_of_the_value() -> None:
    assert files.sha256_json({"a": 1, "b": [1, 2]}) == files.sha256_json({"b": [1, 2], "a": 1})
    assert files.sha256_json({"a": 1, "b": [1, 2]}) == files.sha256_bytes(b'{"a":1,"b":[1,2]}')
    different = [{}, [], None, "", "1", 1, 1.5, {"a": 1}, {"a": "1"}, {"b": 1}, [[1], 2], [1, [2]]]
    assert len({files.sha256_json(value) for value in different}) == len(different)


# -- errors


def test_an_error_names_problem_file_cause_and_remedy() -> None:
    error = InputError("it is broken", file=Path("a/b.onnx"), cause=ValueError(" why\n"), remedy="mend it")
    assert str(error) == "it is broken\n  file:   a/b.onnx\n  cause:  why\n  remedy: mend it"
    assert (error.problem, error.file, error.cause, error.remedy) == (
        "it is broken",
        "a/b.onnx",
        "why",
        "mend it",
    )
    assert str(InputError("it is broken")) == "it is broken"


def test_exit_codes() -> None:
    assert [code.value for code in ExitCode] == [0, 1, 2, 3, 4]
    for error, code in ((InputError, 2), (MissingBackendError, 4)):
        with contextlib.suppress(TrtqError):
            assert error("x").exit_code == code
            raise error("x")


# -- JSON values as dataclasses


@dataclass(frozen=True)
class Leaf:
    name: str
    value: float | None = None


@dataclass(frozen=True)
class Tree:
    leaves: list[Leaf]
    named: dict[str, Leaf]
    pair: tuple[float, float] | None = None
    best: Leaf | None = None


TREE = {"leaves": [{"name": "a"}], "named": {"b c": {"name": "b", "value": 2}}, "best": {"name": "d"}}


def test_a_json_value_becomes_the_dataclass_it_stands_for() -> None:
    found = files.decode(TREE | {"pair": [1, 2.5]}, Tree)
    assert found == Tree([Leaf("a")], {"b c": Leaf("b", 2.0)}, (1.0, 2.5), Leaf("d"))
    assert files.decode(TREE | {"format": "tree-1"}, Tree, format="tree-1").best == Leaf("d")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leaves": [{"name": "a"}, {"name": 1}]}, "`leaves[1].name`: expected str, got int"),
        ({"leaves": [{"name": "a", "value": "1"}]}, "`leaves[0].value`: expected float | null, got str"),
        ({"leaves": [{"name": "a", "value": True}]}, "`leaves[0].value`: expected float | null, got bool"),
        ({"leaves": [{"value": 1}]}, "`leaves[0]`: the key 'name' is missing"),
        ({"leaves": None}, "`leaves`: expected array, got null"),
        ({"pair": [1]}, "`pair`: expected array of length 2"),
        ({"leave": []}, "unknown key 'leave'; it may have leaves, named, pair, best"),
        ({"leaves": [{"name": "a", "nmae": 1}]}, "`leaves[0]`: unknown key 'nmae'; it may have name, value"),
        ({"named": {"x": {"name": "a", "size": 1}}}, "`named['x']`: unknown key 'size'"),
        ({"best": {"name": "a", "size": 1}}, "`best`: unknown key 'size'"),
    ],
)
def test_another_json_value_is_refused_with_the_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        files.decode(TREE | change, Tree)


@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_what_is_no_object_is_no_dataclass(value: object) -> None:
    with pytest.raises(ValueError, match="expected object, got"):
        files.decode(value, Tree)
    with pytest.raises(ValueError, match="the format is None, not tree-1"):
        files.decode(value, Tree, format="tree-1")


def test_keys_that_are_not_read_may_be_allowed() -> None:
    assert files.decode({"name": "a", "size": 1}, Leaf, closed=False) == Leaf("a")


# -- a folder of results


def test_a_result_replaces_the_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for name in ("plan", "engine", "mine"):
        (output / name).write_bytes(b"old")
    with files.staged_folder(output, ["plan", "engine", "new"]) as folder:
        for name in ("plan", "new"):
            (folder / name).write_bytes(b"new")
    assert contents(output) == {"plan": b"new", "new": b"new", "mine": b"old"}


@pytest.mark.parametrize("stopped", [RuntimeError, KeyboardInterrupt, InputError])
def test_a_result_that_is_stopped_leaves_the_earlier_one(tmp_path: Path, stopped: type) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "plan").write_bytes(b"old")

    def write() -> None:
        with files.staged_folder(output, ["plan"]) as folder:
            (folder / "plan").write_bytes(b"new")
            raise stopped("stopped")

    with pytest.raises(stopped):
        write()
    assert contents(tmp_path / "out") == {"plan": b"old"}


@pytest.mark.parametrize("known", [True, False])
def test_a_folder_in_a_files_place_leaves_the_whole_result(tmp_path: Path, known: bool) -> None:
    output = tmp_path / "out"
    (output / "report").mkdir(parents=True)
    (output / "plan").write_bytes(b"old")
    done = []

    def write() -> None:
        with files.staged_folder(output, ["report"] if known else []) as folder:
            done.append("work")
            for name in ("plan", "report", "verdict"):
                (folder / name).write_bytes(b"new")

    with pytest.raises(InputError, match="it is a folder") as caught:
        write()
    assert caught.value.file == str(output / "report")
    assert done == ([] if known else ["work"])
    assert sorted(path.name for path in output.iterdir()) == ["plan", "report"]
    assert (output / "plan").read_bytes() == b"old"


def test_an_error_between_two_files_puts_the_earlier_result_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for name in ("a", "b"):
        (output / name).write_bytes(b"old")
    replace, moves = os.replace, []

    def fourth_fails(source: Path, target: Path) -> None:
        moves.append(target)
        if len(moves) == 4:
            raise OSError("the disk is gone")
        replace(source, target)

    def write() -> None:
        with files.staged_folder(output) as folder:
            for name in ("a", "b"):
                (folder / name).write_bytes(b"new")
            monkeypatch.setattr(os, "replace", fourth_fails)

    with pytest.raises(InputError, match="the disk is gone"):
        write()
    assert contents(output) == {"a": b"old", "b": b"old"}
