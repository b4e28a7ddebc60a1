"""Inputs without a leading batch axis: arrays, loaders and folders give each sample as the model takes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trtq.data.batches import Batch
from trtq.data.feeding import NO_FEEDING, Feeding, InputOptions
from trtq.data.load import load_samples
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.graph.inputs import InputSpec, guess_batch_axes

RANDOM = np.random.default_rng(0)
ROWS = 5


def values(*shape: int) -> NDArray[np.float32]:
    return RANDOM.normal(size=shape).astype(np.float32)


def inputs(outputs: Any = (), **shapes: tuple[int | str | None, ...]) -> list[InputSpec]:
    specs = [InputSpec(name, np.dtype(np.float32), shape) for name, shape in shapes.items()]
    return guess_batch_axes(specs, outputs)


def options(**tables: dict[str, Any]) -> Feeding:
    return Feeding({name: InputOptions.parse(name, table) for name, table in tables.items()})


def saved(folder: Path, arrays: Mapping[str, NDArray], name: str = "data.npz") -> str:
    np.savez(folder / name, **arrays)  # type: ignore[arg-type]
    return str(folder / name)


def loader(folder: Path, arrays: Mapping[str, NDArray]) -> str:
    """A loader whose items are the arrays' entries."""
    saved(folder, arrays, "items.npz")
    (folder / "loader.py").write_text(
        "import numpy as np, pathlib\n"
        "def feeds():\n"
        "    data = np.load(pathlib.Path(__file__).with_name('items.npz'))\n"
        "    for index in range(len(data[data.files[0]])):\n"
        "        yield {name: data[name][index] for name in data.files}\n"
    )
    return f"{folder / 'loader.py'}:feeds"


def feeds(samples: Samples) -> list[dict[str, NDArray]]:
    return list(samples.rows())


def check_feeds(found: list[dict[str, NDArray]], expected: Mapping[str, NDArray]) -> None:
    """Each feed holds the entries of `expected` as they stand."""
    assert len(found) == len(next(iter(expected.values())))
    for index, feed in enumerate(found):
        for name, array in expected.items():
            assert feed[name].shape == array[index].shape
            np.testing.assert_array_equal(feed[name], array[index])


CAMERAS = {"images": values(ROWS, 6, 3, 4, 4), "matrices": values(ROWS, 6, 4, 4), "gain": values(ROWS)}
CAMERA_INPUTS = inputs([(1, 6, 4)], images=(6, 3, 4, 4), matrices=(6, 4, 4), gain=())
STREAM = {"x": values(ROWS, 1, 4), "h": values(ROWS, 2, 1, 3)}
STREAM_INPUTS = inputs([(1, 2), (2, 1, 3)], x=(1, 4), h=(2, 1, 3))


@pytest.mark.parametrize(("arrays", "specs"), [(CAMERAS, CAMERA_INPUTS), (STREAM, STREAM_INPUTS)])
def test_samples_as_they_stand(arrays: dict[str, NDArray], specs: list[InputSpec], tmp_path: Path) -> None:
    from_array = load_samples(saved(tmp_path, arrays), specs)
    from_loader = load_samples(loader(tmp_path, arrays), specs)
    (tmp_path / "files").mkdir()
    for index in range(ROWS):
        saved(tmp_path / "files", {name: array[index] for name, array in arrays.items()}, f"{index}.npz")
    from_files = load_samples(str(tmp_path / "files"), specs)
    for samples in (from_array, from_loader, from_files):
        check_feeds(feeds(samples), arrays)
        assert [batch.rows for batch in samples.batches(4)] == [1] * ROWS
    assert from_loader.hash == from_files.hash


def test_a_batch_of_one_is_still_a_batch(tmp_path: Path) -> None:
    """Samples of shape 1x4 for an input ?x4 run together."""
    samples = load_samples(saved(tmp_path, {"x": values(ROWS, 1, 4)}), inputs(x=("N", 4)))
    assert samples.axes == {"x": 0}
    assert [batch.feed["x"].shape for batch in samples.batches(4)] == [(4, 4), (1, 4)]


def test_a_value_given_once_is_a_constant(tmp_path: Path) -> None:
    arrays = {"x": values(ROWS, 4), "scales": values(3), "rate": np.float32(16000), "mask": values(1, 7)}
    specs = inputs(x=("N", 4), scales=(3,), rate=(), mask=("N", 7))
    samples = load_samples(saved(tmp_path, arrays), specs)
    (batch,) = samples.batches(ROWS)
    np.testing.assert_array_equal(batch.feed["x"], arrays["x"])
    np.testing.assert_array_equal(batch.feed["scales"], arrays["scales"])
    np.testing.assert_array_equal(batch.feed["mask"], np.repeat(arrays["mask"], ROWS, 0))
    assert batch.feed["rate"].shape == ()
    assert batch.feed["rate"] == 16000


def test_a_constant_has_as_many_entries_as_there_are_rows(tmp_path: Path) -> None:
    """Three scales and three rows: an input of a fixed size beside dynamic ones is no batch."""
    arrays = {"x": values(3, 4), "scales": values(3)}
    samples = load_samples(saved(tmp_path, arrays), inputs(x=("N", 4), scales=(3,)))
    assert all(np.array_equal(feed["scales"], arrays["scales"]) for feed in feeds(samples))


def test_rows_that_differ_in_an_unbatched_input_share_no_batch(tmp_path: Path) -> None:
    arrays = {"x": values(6, 4), "rate": np.array([8, 8, 16, 16, 16, 8], np.float32)}
    samples = load_samples(saved(tmp_path, arrays), inputs(x=("N", 4), rate=()))
    found = list(samples.batches(4))
    assert [(batch.start, batch.rows, float(batch.feed["rate"])) for batch in found] == [
        (0, 2, 8.0),
        (2, 3, 16.0),
        (5, 1, 8.0),
    ]
    np.testing.assert_array_equal(np.concatenate([batch.feed["x"] for batch in found]), arrays["x"])


def test_a_loaders_batches_stay_batches(tmp_path: Path) -> None:
    """Items of 4 rows with a scalar beside them."""
    arrays = {
        "x": values(2, 4, 3),
        "rate": np.array([8, 16], np.float32),
        "label": np.arange(8).reshape(2, 4),
    }
    samples = load_samples(loader(tmp_path, arrays), inputs(x=("N", 3), rate=()))
    np.testing.assert_array_equal(np.concatenate([f["x"] for f in feeds(samples)]), arrays["x"].reshape(8, 3))
    assert [float(feed["rate"]) for feed in feeds(samples)] == [8] * 4 + [16] * 4
    assert samples.targets["label"].tolist() == list(range(8))


def test_items_of_inputs_of_different_sizes_are_one_sample_each(tmp_path: Path) -> None:
    """An image and the points in it, five or one; the answer is the sample's."""
    body = (
        "import numpy as np\n"
        "def feeds():\n"
        "    for n in (5, 1, 2):\n"
        "        image, points = np.full((1, 4), n, np.float32), np.full((n, 2), n, np.float32)\n"
        "        yield {'image': image, 'points': points, 'boxes': np.ones((n, 4))}\n"
    )
    (tmp_path / "loader.py").write_text(body)
    samples = load_samples(f"{tmp_path / 'loader.py'}:feeds", inputs(image=("N", 4), points=("M", 2)))
    assert [feed["points"].shape for feed in feeds(samples)] == [(5, 2), (1, 2), (2, 2)]
    assert [feed["image"].shape for feed in feeds(samples)] == [(1, 4)] * 3
    assert [boxes.shape for boxes in samples.targets["boxes"]] == [(5, 4), (1, 4), (2, 4)]


def test_the_recipe_says_where_the_batch_is(tmp_path: Path) -> None:
    """Time first: TxBxC with the samples along axis 1, and one sample of shape Tx1xC at a time."""
    x = values(7, ROWS, 3)
    specs, feeding = inputs(x=("T", "B", 3)), options(x={"batch_axis": 1})
    along = load_samples(saved(tmp_path, {"x": x}), specs, None, feeding)
    check_feeds(feeds(along), {"x": x.transpose(1, 0, 2)[:, :, None]})
    apart = load_samples(saved(tmp_path, {"x": x.transpose(1, 0, 2)[:, :, None]}), specs, None, feeding)
    check_feeds(feeds(apart), {"x": x.transpose(1, 0, 2)[:, :, None]})
    assert [batch.rows for batch in along.batches(4)] == [1] * ROWS


@pytest.mark.parametrize("layout", ["along", "apart"])
def test_a_batch_is_known_by_its_name(layout: str, tmp_path: Path) -> None:
    x, h = values(ROWS, 4), values(2, ROWS, 3)
    each = h.transpose(1, 0, 2)[:, :, None]
    arrays = {"x": x, "h": h if layout == "along" else each}
    samples = load_samples(saved(tmp_path, arrays), inputs(x=("N", 4), h=(2, "N", 3)))
    assert samples.axes == {"x": 0, "h": 1}
    check_feeds(feeds(samples), {"x": x[:, None], "h": each})


def test_a_fixed_batch_along_axis_1_is_filled(tmp_path: Path) -> None:
    x = values(7, 5, 3)
    samples = load_samples(saved(tmp_path, {"x": x}), inputs(x=(7, 4, 3)), None, options(x={"batch_axis": 1}))
    first, last = samples.batches()
    np.testing.assert_array_equal(first.feed["x"], x[:, :4])
    np.testing.assert_array_equal(last.feed["x"], np.repeat(x[:, 4:], 4, 1))
    assert (first.rows, last.rows, last.padding) == (4, 1, 3)


def test_the_recipe_says_that_there_is_no_batch(tmp_path: Path) -> None:
    """Points ?x2, always one: without the recipe they would be a batch."""
    arrays = {"x": values(ROWS, 4), "points": values(ROWS, 1, 2)}
    specs = inputs(x=("N", 4), points=("M", 2))
    assert load_samples(saved(tmp_path, arrays), specs).axes == {"x": 0, "points": 0}
    feeding = options(points={"batch_axis": "none"})
    samples = load_samples(saved(tmp_path, arrays), specs, None, feeding)
    assert samples.axes == {"x": 0, "points": None}
    assert [batch.rows for batch in samples.batches(4)] == [1] * ROWS


def test_a_value_from_the_recipe(tmp_path: Path) -> None:
    specs = [*inputs(x=("N", 4)), InputSpec("rate", np.dtype(np.int64), (), None)]
    samples = load_samples(
        saved(tmp_path, {"x": values(ROWS, 4)}), specs, None, options(rate={"value": 16000})
    )
    assert [feed["rate"].tolist() for feed in feeds(samples)] == [16000] * ROWS
    other = {"x": values(ROWS, 4), "rate": np.array([16000] * 4 + [8000])}
    with pytest.raises(
        InputError, match=r"row 4 of input 'rate' is not the value of the recipe's \[inputs.rate"
    ):
        load_samples(saved(tmp_path, other), specs, None, options(rate={"value": 16000}))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": values(ROWS, 4), "h": values(2, 3, 7)}, ["2x1x3", "2x3x7", "[inputs.h] batch_axis"]),
        ({"x": values(ROWS, 4), "h": values(3, 2, 1, 3)}, ["5", "3x2x1x3", "[inputs.h] batch_axis"]),
    ],
)
def test_the_message_shows_both_shapes_and_the_line_to_write(
    arrays: dict[str, NDArray], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        load_samples(saved(tmp_path, arrays), inputs(x=("N", 4), h=(2, 1, 3)))
    assert all(word in str(caught.value) for word in words)


def test_a_value_that_may_be_a_batch_is_not_guessed(tmp_path: Path) -> None:
    """A state 2xBx3 with as many entries along its dynamic axis as there are rows."""
    arrays, specs = {"x": values(ROWS, 4), "h": values(2, ROWS, 3)}, inputs(x=("N", 4), h=(2, None, 3))
    with pytest.raises(InputError, match="which axis of 'h' holds the samples"):
        load_samples(saved(tmp_path, arrays), specs)
    samples = load_samples(saved(tmp_path, arrays), specs, None, options(h={"batch_axis": 1}))
    check_feeds(feeds(samples), {"h": arrays["h"].transpose(1, 0, 2)[:, :, None]})


@pytest.mark.parametrize(
    "table",
    [{}, {"batch_axis": -1}, {"batch_axis": "all"}, {"batch_axis": True}, {"axis": 1}, {"value": "a"}],
)
def test_options_that_are_not_valid(table: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"inputs\.x"):
        InputOptions.parse("x", table)


@pytest.mark.parametrize(
    ("feeding", "words"),
    [
        (options(z={"batch_axis": 1}), "names 'z'"),
        (options(x={"batch_axis": 2}), "batch_axis is 2"),
        (options(x={"value": [1, 2]}), "inputs.x.value is int64 of shape 2"),
        (Feeding(state={"z": "y"}), "names 'z'"),
    ],
)
def test_options_that_do_not_suit_the_model(feeding: Feeding, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        load_samples(saved(tmp_path, {"x": values(ROWS, 4)}), inputs(x=("N", 4)), None, feeding)


def test_batched_data_are_read_as_ever(tmp_path: Path) -> None:
    """The hash of what has its batch first says nothing of axes: it is that of releases before."""
    path = saved(tmp_path, {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "label": np.array([1, 0])})
    samples = load_samples(path, inputs(x=("N", 3)), None, NO_FEEDING)
    assert samples.hash == "28d67b050051e39786f24b6293ab71ccd0b58b5d7f34e03e623b631aff66688b"
    assert isinstance(next(samples.batches(2)), Batch)
