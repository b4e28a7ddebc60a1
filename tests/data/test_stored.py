"""Rows of large arrays are read from their `.npz`; nothing else may tell them from arrays in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from trtq.data import load, stored
from trtq.data.load import load_samples
from trtq.data.stored import Chained, StoredRows, read_npz
from trtq.errors import InputError
from trtq.graph.inputs import InputSpec

SPECS = (InputSpec("x", np.dtype(np.float32), ("N", 3, 5)),)


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "IN_MEMORY", 200)


def values(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "u1", "<i8", "?", "<f2"])
@pytest.mark.parametrize("shape", [(200,), (30, 7), (9, 3, 5), (2, 1, 1, 1000)])
def test_every_row_is_that_of_the_array(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = (values(*shape) * 10).astype(dtype)
    np.savez(tmp_path / "a.npz", first=np.arange(99), a=array)
    rows = read_npz(tmp_path / "a.npz")["a"]
    assert isinstance(rows, StoredRows)
    assert (len(rows), rows.shape, rows.dtype) == (len(array), array.shape, array.dtype)
    for index in (len(array) - 1, 0, len(array) // 2):
        np.testing.assert_array_equal(rows[index], array[index])
    assert b"".join(row.tobytes() for row in rows) == array.tobytes()
    with pytest.raises(IndexError):
        rows[len(array)]


def test_what_cannot_be_read_by_rows_is_read_whole(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", small=np.arange(3), fortran=np.asfortranarray(values(40, 3)))
    np.savez_compressed(tmp_path / "b.npz", compressed=values(40, 3))
    arrays = {**read_npz(tmp_path / "a.npz"), **read_npz(tmp_path / "b.npz")}
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    np.testing.assert_array_equal(arrays["fortran"], values(40, 3))
    np.testing.assert_array_equal(arrays["compressed"], values(40, 3))


def test_samples_do_not_depend_on_how_they_are_stored(tmp_path: Path) -> None:
    x, label = values(20, 3, 5), np.arange(20)
    np.savez(tmp_path / "a.npz", x=x, label=label)
    np.savez_compressed(tmp_path / "b.npz", x=x, label=label)
    by_row, whole = (load_samples(str(tmp_path / f"{name}.npz"), SPECS) for name in "ab")
    assert isinstance(by_row.columns["x"], StoredRows)
    assert by_row.hash == whole.hash
    np.testing.assert_array_equal(by_row.targets["label"], label)
    for one, other in zip(by_row.rows(), whole.rows(), strict=True):
        np.testing.assert_array_equal(one["x"], other["x"])


def test_a_folder_of_large_files(tmp_path: Path) -> None:
    x = values(20, 3, 5)
    for part in range(2):
        np.savez(tmp_path / f"{part}.npz", x=x[10 * part :][:10])
    samples = load_samples(str(tmp_path), SPECS)
    np.testing.assert_array_equal(samples.columns["x"], x)


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=values(20, 3, 5))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged") as caught:
        load_samples(str(path), SPECS)
    assert "CRC" in str(caught.value.cause)


@pytest.mark.parametrize(
    "shapes", [[(4, 3, 5), (9, 3, 5), (1, 3, 5)], [(4, 3, 5), (5, 3, 6)]], ids=["alike", "ragged"]
)
def test_a_folder_is_read_by_rows(
    shapes: list[tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a folder's files hold together counts: each may be small."""
    specs = (InputSpec("x", np.dtype(np.float32), ("N", 3, None)),)
    for index, shape in enumerate(shapes):
        np.savez(tmp_path / f"{index}.npz", x=values(*shape) + index, label=np.arange(shape[0]))
    whole = load_samples(str(tmp_path), specs)
    monkeypatch.setattr(load, "IN_MEMORY", 300)
    by_row = load_samples(str(tmp_path), specs)
    assert isinstance(by_row.columns["x"], Chained)
    assert not isinstance(whole.columns["x"], Chained)
    assert by_row.hash == whole.hash
    for one, other in zip(by_row.rows(), whole.rows(), strict=True):
        np.testing.assert_array_equal(one["x"], other["x"])
    np.testing.assert_array_equal(by_row.targets["label"], whole.targets["label"])
    with pytest.raises(IndexError):
        by_row.columns["x"][len(by_row)]


def test_data_that_change_while_they_are_read_are_refused(tmp_path: Path) -> None:
    """Of rows that are read some at a time, no row comes from the new file."""
    np.savez(tmp_path / "a.npz", x=values(2000, 3, 5))
    samples = load_samples(str(tmp_path / "a.npz"), SPECS)
    np.savez(tmp_path / "a.npz", x=values(2001, 3, 5))
    with pytest.raises(InputError, match="changed while they were read"):
        list(samples.rows())
