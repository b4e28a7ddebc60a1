"""Data behind URLs: the same samples, to the hash, as from the files."""

from __future__ import annotations

import functools
import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from trtq.data.load import load_samples, reload
from trtq.data.preprocess import Preprocess
from trtq.data.samples import Samples
from trtq.errors import InputError, MissingBackendError
from trtq.graph.inputs import InputSpec

X = (InputSpec("x", np.dtype(np.float32), ("N", 4)),)
IMAGE = (InputSpec("image", np.dtype(np.float32), ("N", 3, 8, 8)),)
PREPROCESS = {"image": Preprocess.parse("image", {"scale": "1/255", "layout": "NCHW"})}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """One file, a folder of files, and images in three forms: with the CSV in, beside and apart."""
    random = np.random.default_rng(0)
    root = tmp_path / "files"
    for name in ("rows.npz", "parts/a.npz", "parts/b.npz"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez(root / name, x=random.normal(size=(5, 4)).astype(np.float32), label=np.arange(5))
    for folder, table in (("inside", "inside/t.csv"), ("beside", "beside.csv"), ("apart", "apart/t.csv")):
        (root / folder).mkdir()
        for index in range(3):
            pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{index}.png")
        (root / table).write_text("file,label\n2.png,1\n0.png,0\n")
    return root


@pytest.fixture
def memory(files: Path) -> Iterator[str]:
    """The files in fsspec's in-memory file system, which is read like a bucket."""
    system = fsspec.filesystem("memory")
    system.put(f"{files}/", "/bucket/", recursive=True)
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


@pytest.fixture
def web(files: Path) -> Iterator[str]:
    """The files behind HTTP."""
    handler = functools.partial(Quiet, directory=str(files))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def load(source: str) -> Samples:
    arrays = "rows.npz" in source or "parts" in source
    return load_samples(source, X if arrays else IMAGE, None if arrays else PREPROCESS)


def same(one: Samples, other: Samples) -> bool:
    rows = zip(one.rows(), other.rows(), strict=True)
    return one.hash == other.hash and all(np.array_equal(a[n], b[n]) for a, b in rows for n in a)


@pytest.mark.parametrize("name", ["rows.npz", "parts", "inside", "beside", "beside.csv", "apart/t.csv"])
def test_a_bucket(name: str, files: Path, memory: str) -> None:
    remote = load(f"{memory}/{name}")
    assert remote.source == f"memory://bucket/{name}"
    assert same(remote, load(str(files / name)))


@pytest.mark.parametrize("name", ["rows.npz", "parts"])
def test_http(name: str, files: Path, web: str) -> None:
    assert same(load(f"{web}/{name}"), load(str(files / name)))


@pytest.mark.parametrize("name", ["rows.npz", "inside"])
def test_files_are_not_copied(name: str, files: Path) -> None:
    samples = load(f"file://{files / name}")
    assert same(samples, load(str(files / name)))
    assert samples.origin is not None
    assert samples.origin.copy == str(files / name)


def test_another_machine_makes_its_own_copy(memory: str) -> None:
    samples = load(f"{memory}/rows.npz")
    assert samples.origin is not None
    Path(samples.origin.copy).unlink()
    again = reload(samples.origin)
    assert again.source == samples.source
    assert same(again, samples)


def test_what_is_wrong_is_said_of_the_url(memory: str) -> None:
    with pytest.raises(InputError) as caught:
        load_samples(f"{memory}/rows.npz", (InputSpec("y", np.dtype(np.float32), ("N", 4)),))
    assert caught.value.problem == "the data has no array 'y'"
    assert caught.value.file == "memory://bucket/rows.npz"
    with pytest.raises(InputError, match="the data does not exist") as caught:
        load(f"{memory}/inside/rows.npz")
    assert caught.value.file == "memory://bucket/inside/rows.npz"


def test_protocols_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="cannot be read from the URL") as caught:
        load("nowhere://bucket/rows.npz")
    assert "nowhere" in str(caught.value.cause)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingBackendError) as missing:
        load("s3://bucket/rows.npz")
    assert "s3fs" in str(missing.value.cause)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingBackendError, match="trtq\\[remote\\]"):
        load("file:///rows.npz")
