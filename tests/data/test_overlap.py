"""Rows that calibration and evaluation share, found whatever their form, and rows that repeat."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trtq.data.load import load_samples
from trtq.data.overlap import Shared, distinct_rows, shared_rows
from trtq.data.preprocess import Preprocess
from trtq.data.samples import Samples
from trtq.graph.inputs import InputSpec

PIXELS = InputSpec("x", np.dtype(np.float32), ("N", 3, 4, 4))
TEXT = tuple(InputSpec(name, np.dtype(np.int64), ("N", 6)) for name in ("ids", "mask"))
RECIPE = {"x": Preprocess.parse("x", {"from": "images", "scale": "1/255", "layout": "NCHW"})}


def vectors(rows, dtype=np.float32) -> Samples:
    rows = np.asarray(rows, dtype)
    spec = InputSpec("x", np.dtype(np.float32), ("N", *rows.shape[1:]))
    return Samples("rows", (spec,), {"x": rows}, {}, "0" * 64)


numbers = st.lists(st.integers(0, 8), min_size=1, max_size=12)


@settings(deadline=None)
@given(numbers, numbers)
def test_shared_rows_are_those_that_both_have(mine, theirs) -> None:
    """Against Python's own sets; each number is a row."""
    common = [(index, mine.index(value)) for index, value in enumerate(theirs) if value in mine]
    expected = Shared(len(common), len(theirs), common[0]) if common else None
    ours, other = (vectors(np.repeat(np.array(values)[:, None], 3, axis=1)) for values in (mine, theirs))
    assert shared_rows(ours, other) == expected
    assert distinct_rows(ours, 100) == len(set(mine))
    assert distinct_rows(ours, 2) == min(len(set(mine)), 2)


def test_rows_that_differ_in_one_value_only_are_not_shared() -> None:
    """Also where a glance at a part of each row does not show it."""
    mine = np.zeros((3, 5000), np.float32)
    theirs = mine.copy()
    theirs[:, 4321] = [1, 0, 2]
    assert shared_rows(vectors(mine), vectors(theirs)) == Shared(1, 3, (1, 0))


def test_the_same_values_in_another_type_are_the_same_row() -> None:
    rows = np.arange(12).reshape(4, 3)
    assert shared_rows(vectors(rows), vectors(rows[2:], np.float64)) == Shared(2, 2, (0, 2))


def test_rows_are_numbered_as_their_sources_do() -> None:
    rows = np.arange(10)[:, None]
    mine, theirs = vectors(rows).subset([1, 4, 7]), vectors(rows).subset([3, 7, 9])
    assert shared_rows(mine, theirs) == Shared(1, 3, (7, 7))


def test_all_inputs_of_a_row_have_to_agree() -> None:
    ids = np.arange(24).reshape(4, 6)
    mask = np.ones_like(ids)
    mine = Samples("a", TEXT, {"ids": ids, "mask": mask}, {}, "0" * 64)
    theirs = Samples("b", TEXT, {"ids": ids, "mask": np.triu(mask)}, {}, "0" * 64)
    assert shared_rows(mine, theirs) == Shared(1, 4, (0, 0))
    padding = Samples("c", TEXT, {"ids": np.zeros((2, 6), int), "mask": np.zeros((2, 6), int)}, {}, "0" * 64)
    assert shared_rows(padding, padding) == Shared(2, 2, (0, 0))
    assert distinct_rows(padding, 16) == 1


def test_of_a_sample_of_two_rows_both_have_to_be_shared() -> None:
    """As pairs of sentences are; where one side has no targets, rows are all that can be compared."""
    rows = np.arange(12)[:, None] * np.ones((1, 3))
    pairs = replace(vectors(rows), targets={"score": np.zeros(6)})
    other = replace(vectors(rows[[0, 5, 6, 7, 11, 10]]), targets={"score": np.zeros(3)})
    assert shared_rows(pairs, other) == Shared(1, 3, (2, 6), 2)
    assert shared_rows(pairs, other.subset([0, 2])) is None
    assert shared_rows(replace(pairs, targets={}), other) == Shared(6, 6, (0, 0))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Folders `mine` (images 0 to 4) and `theirs` (3 to 8), and the same pixels as `.npz`."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    for folder, numbered in (("mine", range(5)), ("theirs", range(3, 9))):
        (tmp_path / folder).mkdir()
        for number in numbered:
            Image.fromarray(pixels[number]).save(tmp_path / folder / f"{folder}{number}.png")
        np.savez(tmp_path / f"{folder}.npz", images=pixels[list(numbered)])
    return tmp_path


@pytest.mark.parametrize("mine", ["mine", "mine.npz"])
@pytest.mark.parametrize("theirs", ["theirs", "theirs.npz"])
def test_images_are_found_whatever_they_are_called_and_kept_in(images: Path, mine: str, theirs: str) -> None:
    ours, other = (load_samples(str(images / name), [PIXELS], RECIPE) for name in (mine, theirs))
    assert shared_rows(ours, other) == Shared(2, 6, (0, 3))


def test_two_files_of_images_are_not_decoded(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = (load_samples(str(images / name), [PIXELS], RECIPE) for name in ("mine", "theirs"))

    def fail(_: object) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr("trtq.data.load.decode_image", fail)
    assert shared_rows(ours, other) == Shared(2, 6, (0, 3))


def test_rows_of_several_shapes(tmp_path: Path) -> None:
    for folder, lengths in (("mine", (2, 3, 5)), ("theirs", (3, 4))):
        (tmp_path / folder).mkdir()
        for length in lengths:
            np.savez(tmp_path / folder / f"{length}.npz", x=np.zeros((1, length), np.float32))
    spec = InputSpec("x", np.dtype(np.float32), ("N", "length"))
    ours, other = (load_samples(str(tmp_path / name), [spec]) for name in ("mine", "theirs"))
    assert shared_rows(ours, other) == Shared(1, 2, (0, 1))


def test_ten_thousand_rows_take_seconds() -> None:
    rows = np.random.default_rng(0).integers(0, 30_000, (10_000, 128))
    specs = (InputSpec("ids", np.dtype(np.int64), ("N", 128)),)
    mine = Samples("a", specs, {"ids": rows}, {}, "0" * 64)
    theirs = Samples("b", specs, {"ids": np.concatenate([rows[:10] + 1, rows[9990:]])}, {}, "0" * 64)
    started = time.process_time()
    assert shared_rows(mine, theirs) == Shared(10, 20, (10, 9990))
    assert time.process_time() - started < 5
