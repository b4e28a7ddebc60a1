"""Sequences in the data: where they start, what their first state is, and which parts keep them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from trtq.data.feeding import Feeding
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.data.sequences import Sequences
from trtq.errors import InputError
from trtq.graph.inputs import InputSpec, guess_batch_axes

FEEDING = Feeding(state={"h": "hn"})
FLOAT = np.dtype(np.float32)
SPECS = guess_batch_axes([InputSpec("x", FLOAT, (1, 3)), InputSpec("h", FLOAT, (2, None, 4))], [(1, 5)])
X = np.arange(21, dtype=np.float32).reshape(7, 1, 3)
NUMBERS = np.array([4, 4, 4, 0, 0, 9, 9])
STARTS = (0, 3, 5)


def load(folder: Path, arrays: Mapping[str, NDArray], specs: list[InputSpec] = SPECS) -> Samples:
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
    return load_samples(str(folder / "data.npz"), specs, None, FEEDING)


def starts_of(samples: Samples) -> list[NDArray]:
    """The states that sequences start from, as they are fed."""
    assert samples.sequences is not None
    return [samples.row(index)["h"] for index in samples.sequences.starts]


def test_numbers_name_the_sequences(tmp_path: Path) -> None:
    samples = load(tmp_path, {"x": X, "sequence": NUMBERS})
    assert samples.sequences == Sequences({"h": "hn"}, STARTS)
    assert not samples.targets
    assert all(np.array_equal(state, np.zeros((2, 1, 4))) for state in starts_of(samples))
    with pytest.raises(InputError, match="state 'h' of row 1 is not known"):
        samples.row(1)
    assert samples.row(1, ["x"])["x"].tolist() == X[1].tolist()


def test_a_file_is_a_sequence(tmp_path: Path) -> None:
    for name, part in zip("abc", np.split(X, STARTS[1:]), strict=True):
        np.savez(tmp_path / f"{name}.npz", x=part)
    samples = load_samples(str(tmp_path), SPECS, None, FEEDING)
    assert samples.sequences == Sequences({"h": "hn"}, STARTS)
    assert load(tmp_path, {"x": X}).sequences == Sequences({"h": "hn"}, (0,))


STATES = np.arange(56, dtype=np.float32).reshape(7, 2, 1, 4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (STATES, STATES[list(STARTS)]),  # one for each row: those of the first rows
        (STATES[:3], STATES[:3]),  # one for each sequence
        (STATES[0], STATES[[0, 0, 0]]),  # one for all
    ],
)
def test_a_given_start(given: NDArray, expected: NDArray, tmp_path: Path) -> None:
    samples = load(tmp_path, {"x": X, "sequence": NUMBERS, "h": given})
    np.testing.assert_array_equal(starts_of(samples), expected)


def test_a_start_beside_as_many_sequences_as_layers(tmp_path: Path) -> None:
    """A state 2x1x4 given once, and two sequences."""
    samples = load(tmp_path, {"x": X, "sequence": np.repeat([0, 1], [3, 4]), "h": STATES[5]})
    np.testing.assert_array_equal(starts_of(samples), STATES[[5, 5]])


def test_a_start_in_each_file(tmp_path: Path) -> None:
    for index, part in enumerate(np.split(X, STARTS[1:])):
        np.savez(tmp_path / f"{index}.npz", x=part, h=STATES[index] if index else STATES[:1])
    samples = load_samples(str(tmp_path), SPECS, None, FEEDING)
    np.testing.assert_array_equal(starts_of(samples), STATES[:3])


@pytest.mark.parametrize(
    ("shape", "zeros"),
    [((2, None, 4), (2, 1, 4)), (("N", 4), (1, 4)), (("N", 2, "past", 4), (1, 2, 0, 4)), ((1, 4), (1, 4))],
)
def test_a_start_of_zeros(
    shape: tuple[int | str | None, ...], zeros: tuple[int, ...], tmp_path: Path
) -> None:
    """The batch is 1, what else is dynamic starts empty, as a cache of keys and values does."""
    specs = guess_batch_axes([SPECS[0], InputSpec("h", FLOAT, shape)], [])
    (state, *_) = starts_of(load(tmp_path, {"x": X, "sequence": NUMBERS}, specs))
    assert state.shape == zeros
    assert not state.any()


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (np.array([0, 0, 1, 1, 0, 0, 2]), "sequence 0 goes on after another"),
        (np.array([0, 0, 1]), "has shape (3,) for 7 rows"),
    ],
)
def test_numbers_that_make_no_sequences(numbers: NDArray, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, {"x": X, "sequence": numbers})
    assert words in str(caught.value)


def test_a_loader_must_name_its_sequences(tmp_path: Path) -> None:
    (tmp_path / "loader.py").write_text(
        "import numpy as np\n"
        "def unnamed():\n"
        "    for i in range(4):\n"
        "        yield {'x': np.full((1, 3), i, np.float32)}\n"
        "def named():\n"
        "    for i, feed in enumerate(unnamed()):\n"
        "        yield feed | {'sequence': i // 2}\n"
    )
    with pytest.raises(InputError, match="where the sequences start"):
        load_samples(f"{tmp_path / 'loader.py'}:unnamed", SPECS, None, FEEDING)
    samples = load_samples(f"{tmp_path / 'loader.py'}:named", SPECS, None, FEEDING)
    assert samples.sequences == Sequences({"h": "hn"}, (0, 2))


@pytest.mark.parametrize(
    ("rows", "starts"),
    [
        ([3, 4, 5, 6], (0, 2)),
        ([0, 1, 2], (0,)),
        ([5, 6, 0, 1, 2], (0, 2)),
        ([0, 1], None),
        ([1, 2], None),
        ([0, 2, 1], None),
        ([], ()),
    ],
)
def test_parts_of_whole_sequences_keep_them(rows: list[int], starts: tuple[int, ...] | None) -> None:
    found = Sequences({"h": "hn"}, STARTS).of(rows, 7)
    assert found == (None if starts is None else Sequences({"h": "hn"}, starts))


def test_sequences_are_held_back_whole(tmp_path: Path) -> None:
    numbers = np.repeat(np.arange(5), [2, 3, 1, 4, 2])
    samples = load(tmp_path, {"x": np.zeros((12, 1, 3), np.float32), "sequence": numbers})
    fitting, held_back = samples.split()
    assert tuple(held_back.positions) == (6, 7, 8, 9)
    assert held_back.sequences == Sequences({"h": "hn"}, (0,))
    assert fitting.sequences == Sequences({"h": "hn"}, (0, 2, 5, 6))


def test_sequences_are_part_of_the_hash(tmp_path: Path) -> None:
    hashes = {load(tmp_path, {"x": X, "sequence": n}).hash for n in (NUMBERS, np.zeros(7), np.arange(7))}
    assert len(hashes) == 3
