"""Data in memory are the samples that the same arrays in a file are, whatever form a program has them in."""

from __future__ import annotations

import gc
import itertools
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtq.data import memory, stored
from trtq.data.feeding import Feeding, InputOptions
from trtq.data.load import load_samples, reload
from trtq.data.memory import Data, as_array, save_npz
from trtq.data.preprocess import Preprocess
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.graph.inputs import InputSpec

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
IMAGE = (InputSpec("x", F32, ("N", 3, 4, 4)),)
TEXT = (InputSpec("ids", I64, ("N", "L")), InputSpec("mask", I64, ("N", "L")))

_random = np.random.default_rng(0)
X = _random.normal(size=(13, 3, 4, 4)).astype(np.float32)
Y = np.arange(13)
IDS, MASK = _random.integers(0, 9, (13, 5)), _random.integers(0, 2, (13, 5))


def in_file(folder: Path, specs: tuple[InputSpec, ...], **arrays: np.ndarray) -> Samples:
    np.savez(folder / "data.npz", **arrays)
    return load_samples(str(folder / "data.npz"), specs)


class Rows:
    """A map-style data set: no `__iter__`, and no end that iteration would find."""

    def __init__(self, row: Callable[[int], Any], count: int = len(X)) -> None:
        self.row, self.count = row, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.row(index % self.count)


def pairs() -> Iterator[tuple[np.ndarray, int]]:
    yield from zip(X, Y.tolist(), strict=True)


def batches(size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(X), size):
        yield X[start : start + size], Y[start : start + size]


Pair = namedtuple("Pair", "image label")

FORMS: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"x": X, "labels": Y},
    "dict of lists": lambda: {"x": list(X), "labels": Y.tolist()},
    "tuple": lambda: (X, Y),
    "list of tuples": lambda: list(pairs()),
    "list of lists": lambda: [[image, label] for image, label in pairs()],
    "named tuples": lambda: [Pair(*pair) for pair in pairs()],
    "nested tuples": lambda: [((image,), label) for image, label in pairs()],
    "dict and label": lambda: [({"x": image}, label) for image, label in pairs()],
    "list of dicts": lambda: [{"x": image, "labels": label} for image, label in pairs()],
    "nested numbers": lambda: [{"x": image.tolist(), "labels": label} for image, label in pairs()],
    "generator": pairs,
    "function": lambda: pairs,
    "batches": lambda: batches(5),
    "batches of one": lambda: batches(1),
    "data set": lambda: Rows(lambda index: (X[index], Y[index])),
    "data set of dicts": lambda: Rows(lambda index: {"x": X[index], "labels": Y[index]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_data(form: str, tmp_path: Path) -> None:
    """Two rounds, as what is small is read whole, and what is not stays on disk."""
    expected = in_file(tmp_path, IMAGE, x=X, labels=Y)
    for in_memory in (stored.IN_MEMORY, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "IN_MEMORY", in_memory)
            samples = load_samples(Data(FORMS[form]()), IMAGE)
        np.testing.assert_array_equal(np.concatenate([row["x"] for row in samples.rows()]), X)
        np.testing.assert_array_equal(samples.targets["labels"], Y)
        assert samples.targets["labels"].shape == Y.shape
    if form != "nested numbers":  # which are float64
        assert samples.hash == expected.hash


@pytest.mark.parametrize(
    "form",
    [
        lambda: (IDS, MASK, Y),
        lambda: [*zip(IDS, MASK, Y, strict=True)],
        lambda: [({"mask": mask}, ids, y) for ids, mask, y in zip(IDS, MASK, Y, strict=True)],
        lambda: [{"labels": y, "mask": m, "ids": i} for i, m, y in zip(IDS, MASK, Y, strict=True)],
    ],
)
def test_arrays_without_a_name_are_the_inputs_in_order(form: Callable[[], Any], tmp_path: Path) -> None:
    samples = load_samples(Data(form()), TEXT)
    assert samples.hash == in_file(tmp_path, TEXT, ids=IDS, mask=MASK, labels=Y).hash


def test_inputs_without_labels(tmp_path: Path) -> None:
    expected = in_file(tmp_path, IMAGE, x=X).hash
    for form in (X, (X,), list(X), [(image,) for image in X], iter(X), iter([X[:6], X[6:]])):
        samples = load_samples(Data(form), IMAGE)
        assert samples.targets == {}
        assert samples.hash == expected


def test_grey_images_of_one_channel_are_samples() -> None:
    """The first axis of a sample is 1, as that of a batch of one."""
    specs, images = (InputSpec("x", F32, ("N", 1, 4, 4)),), X[:, :1]
    samples = load_samples(Data([(image, np.array(y)) for image, y in zip(images, Y, strict=True)]), specs)
    np.testing.assert_array_equal(np.concatenate([row["x"] for row in samples.rows()]), images)
    np.testing.assert_array_equal(samples.targets["labels"], Y)


def test_targets_of_a_sample_keep_their_shape() -> None:
    masks = np.arange(13 * 16).reshape(13, 1, 16)
    samples = load_samples(Data(list(zip(X, masks, strict=True))), IMAGE)
    np.testing.assert_array_equal(samples.targets["labels"], masks)


def test_rows_of_different_shapes() -> None:
    rows = [np.arange(n) for n in (3, 7, 4)]
    boxes = [np.ones((n, 4)) for n in (2, 0, 1)]
    items = [{"ids": row, "mask": row, "boxes": box} for row, box in zip(rows, boxes, strict=True)]
    for form in (items, {"ids": rows, "mask": rows, "boxes": boxes}):
        samples = load_samples(Data(form), TEXT)
        assert [row["ids"].shape for row in samples.rows()] == [(1, 3), (1, 7), (1, 4)]
        assert [box.shape for box in samples.targets["boxes"]] == [(2, 4), (0, 4), (1, 4)]


def test_a_batch_on_another_axis() -> None:
    specs = (InputSpec("x", F32, (6, "N", 2), 1),)
    rows = np.arange(60, dtype=np.float32).reshape(5, 6, 2)
    for form in (list(rows), [rows.swapaxes(0, 1)]):
        samples = load_samples(Data(form), specs)
        np.testing.assert_array_equal([row["x"][:, 0] for row in samples.rows()], rows)


def test_values_that_belong_to_no_batch_are_fed_as_they_stand() -> None:
    specs = (*IMAGE, InputSpec("size", I64, (2,), None))
    sizes = np.arange(26).reshape(13, 2)
    samples = load_samples(Data(list(zip(X, sizes, Y, strict=True))), specs)
    assert [row["size"].tolist() for row in samples.rows()] == sizes.tolist()
    np.testing.assert_array_equal(samples.targets["labels"], Y)


def test_inputs_with_a_value_in_the_recipe_are_not_among_the_places() -> None:
    specs = (InputSpec("rate", I64, (), None), *IMAGE)
    feeding = Feeding({"rate": InputOptions("rate", {"value": 16})})
    samples = load_samples(Data(list(pairs())), specs, None, feeding)
    assert [row["rate"].item() for row in samples.rows()] == [16] * 13
    np.testing.assert_array_equal(samples.targets["labels"], Y)


def test_preprocessing_reads_arrays_and_images() -> None:
    image_module = pytest.importorskip("PIL.Image")
    pixels = _random.integers(0, 255, (4, 4, 4, 3)).astype(np.uint8)
    recipe = {"x": Preprocess.parse("x", {"scale": "1/255", "layout": "NCHW"})}
    images = [(image_module.fromarray(p), i) for i, p in enumerate(pixels)]
    palette = [(image.convert("P"), i) for image, i in images]
    for form in (
        images,
        [(p, i) for i, p in enumerate(pixels)],
        [(pixels[:3], [0, 1, 2]), (pixels[3:], [3])],
    ):
        samples = load_samples(Data(form), IMAGE, recipe)
        fed = np.concatenate([row["x"] for row in samples.rows()])
        np.testing.assert_allclose(fed, pixels.transpose(0, 3, 1, 2) / 255, rtol=1e-6)
        assert samples.targets["labels"].tolist() == [0, 1, 2, 3]
    assert load_samples(Data(palette), IMAGE, recipe).row(0)["x"].shape == (1, 3, 4, 4)


# --- once ---------------------------------------------------------------------------------------------


def test_what_changes_at_each_pass_is_read_once() -> None:
    calls = []

    class Augmented(Rows):
        def __getitem__(self, index: int) -> Any:
            calls.append(index)
            return X[index] + np.float32(np.random.default_rng(len(calls)).normal())

    data = Data(Augmented(lambda index: None))
    first, second = load_samples(data, IMAGE), load_samples(data, IMAGE)
    assert calls == list(range(13))
    assert first.hash == second.hash
    assert reload(first.origin).hash == first.hash  # type: ignore[arg-type]


def test_one_object_for_both_sets_is_read_once() -> None:
    from trtq.recipe import Recipe

    generator = pairs()
    recipe = Recipe(data=generator, eval=generator)
    assert recipe.data is recipe.eval
    assert len(load_samples(recipe.eval, IMAGE)) == 13  # type: ignore[arg-type]


def test_a_generator_that_was_begun_is_refused() -> None:
    for taken in (1, 13, 14):
        generator = pairs()
        for _ in range(taken):
            next(generator, None)
        with pytest.raises(InputError, match="has given rows before"):
            Data(generator).kept()


def test_data_that_broke_off_are_not_taken_for_all() -> None:
    def broken() -> Iterator[Any]:
        yield X[0]
        raise KeyError("a file")

    iterator = iter([X[0], object(), X[1]])
    for given_, problem in ((broken(), "item 1 cannot be read"), (iterator, "item 1 is <object")):
        data = Data(given_)
        with pytest.raises(InputError, match=problem):
            data.kept()
        with pytest.raises(InputError, match="was broken off"):
            data.kept()


def test_the_copy_goes_with_the_data() -> None:
    data = Data(X)
    folder = data.kept()
    assert folder.is_dir()
    del data
    gc.collect()
    assert not folder.parent.exists()


def test_what_was_given_may_change_afterwards() -> None:
    """A loader that fills one buffer again and again, and arrays that are written to later."""
    buffer = np.zeros((3, 4, 4), np.float32)

    def refilled() -> Iterator[np.ndarray]:
        for row in X:
            buffer[:] = row
            yield buffer

    samples = load_samples(Data(refilled()), IMAGE)
    np.testing.assert_array_equal(np.concatenate([row["x"] for row in samples.rows()]), X)


# --- saved --------------------------------------------------------------------------------------------


def test_saved_data_are_the_same_rows(tmp_path: Path) -> None:
    specs = (
        InputSpec("x", F32, (6, "N", 2), 1),
        InputSpec("h", F32, ("N", 2)),
        InputSpec("k", I64, (), None),
    )
    feeding = Feeding({"k": InputOptions("k", {"value": 3})}, {"h": "hn"})
    rows = np.arange(60, dtype=np.float32).reshape(5, 6, 2)
    numbers = [0, 0, 1, 1, 1]
    items = [{"x": x, "sequence": n, "t": n} for x, n in zip(rows, numbers, strict=True)]
    given_ = load_samples(Data(items), specs, None, feeding)
    save_npz(given_, tmp_path / "saved.npz")
    found = load_samples(str(tmp_path / "saved.npz"), specs, None, feeding)
    assert given_.sequences == found.sequences
    assert found.sequences is not None
    assert found.sequences.starts == (0, 2)
    for row in range(5):
        known = ["x", "h", "k"] if row in (0, 2) else ["x", "k"]
        one, other = (samples.row(row, known) for samples in (given_, found))
        assert one.keys() == other.keys() == set(known)
        for name in known:
            np.testing.assert_array_equal(one[name], other[name])
    np.testing.assert_array_equal(found.targets["t"], [0, 0, 1, 1, 1])


def test_rows_of_different_shapes_are_not_saved(tmp_path: Path) -> None:
    rows = [np.arange(n) for n in (3, 7)]
    with pytest.raises(InputError, match="rows of 'ids' differ in shape"):
        save_npz(load_samples(Data([*zip(rows, rows, strict=True)]), TEXT), tmp_path / "s.npz")


# --- PyTorch ------------------------------------------------------------------------------------------


def test_loaders_and_data_sets_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    tools = torch.utils.data
    expected = in_file(tmp_path, IMAGE, x=X, labels=Y).hash
    tensors = tools.TensorDataset(torch.tensor(X, requires_grad=True), torch.tensor(Y))
    plain = Rows(lambda index: (torch.tensor(X[index]), int(Y[index])))
    named = Rows(lambda index: {"x": X[index], "labels": Y[index]})
    for form in (
        tensors,
        tools.Subset(tensors, range(13)),
        tools.DataLoader(tensors, batch_size=4),
        tools.DataLoader(plain, batch_size=5),
        tools.DataLoader(plain, batch_size=None),
        tools.DataLoader(named, batch_size=13),
        {"x": torch.tensor(X), "labels": torch.tensor(Y)},
    ):
        assert load_samples(Data(form), IMAGE).hash == expected


def test_a_loader_that_shuffles_keeps_rows_and_labels_together() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    tensors = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    samples = load_samples(Data(torch.utils.data.DataLoader(tensors, batch_size=4, shuffle=True)), IMAGE)
    order = samples.targets["labels"]
    assert sorted(order) == Y.tolist()
    np.testing.assert_array_equal(np.concatenate([row["x"] for row in samples.rows()]), X[order])


def test_tensors_become_arrays_of_their_values() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    exact = torch.tensor([1.5, -2.0, 0.0078125])
    for kind in (torch.bfloat16, torch.float32, torch.float64, torch.float16):
        found = as_array(exact.to(kind), "s", "w")
        assert found.tolist() == [1.5, -2.0, 0.0078125]
        assert found.dtype == (np.float32 if kind is torch.bfloat16 else np.dtype(str(kind).split(".")[1]))
    assert as_array(torch.tensor([True]), "s", "w").dtype == bool
    assert as_array(torch.arange(6).reshape(2, 3).T, "s", "w").flags.c_contiguous


def test_bfloat16_of_other_libraries() -> None:
    kinds = pytest.importorskip("ml_dtypes")
    assert as_array(np.array([1.5, -2], kinds.bfloat16), "s", "w").dtype == np.float32


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [5, 1.5, True, b"x", object()])
def test_what_can_be_no_data(wrong: Any) -> None:
    with pytest.raises(InputError, match="data in memory are"):
        Data(wrong)


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        (lambda: [], "there are no data"),
        (lambda: iter(()), "there are no data"),
        (lambda: {}, "has no array 'x'"),
        (lambda: [None], "item 0 is"),
        (lambda: [{"x": X[0], "note": None}], "'note' of item 0 is None"),
        (lambda: [{"x": [[1.0], [1.0, 2.0]]}], "'x' of item 0 is a list"),
        (lambda: {"train": Rows(pairs)}, "'train' is a Rows|'train' is <"),
        (lambda: [(X[0], 1, 2)], "item 0 has 3 arrays without a name, and 1 inputs need one"),
        (lambda: [({"x": X[0], "labels": 1}, 2)], "'labels' by name and another array"),
        (lambda: [({"x": X[0]}, {"x": X[0]})], "item 0 has 'x' twice"),
        (lambda: [()], "item 0 has 0 arrays"),
        (lambda: ["a.npz"], "the data cannot be|shape|array"),
        (lambda: [{"x": X[0]}, {"x": X[0], "labels": 1}], "not every part of the data has an array 'labels'"),
        (lambda: [X[0, 0]], "has shape|row 0"),
        (lambda: lambda: 5, "the function returned a int"),
        (lambda: lambda: 1 / 0, "the function failed"),
        (lambda: {"x": [X[0], X[0, :2]], "labels": [1]}, "different numbers of rows"),
    ],
)
def test_what_is_wrong_with_data_is_said(form: Callable[[], Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem) as raised:
        load_samples(Data(form()), IMAGE)
    assert raised.value.file is not None
    assert raised.value.file.startswith("in-memory://")


def test_an_open_npz_is_arrays_by_name(tmp_path: Path) -> None:
    expected = in_file(tmp_path, IMAGE, x=X, labels=Y).hash
    with np.load(tmp_path / "data.npz") as arrays:
        assert load_samples(Data(arrays), IMAGE).hash == expected


def test_integers_are_not_taken_for_floats() -> None:
    with pytest.raises(InputError, match="row 0 of input 'x' is int64"):
        load_samples(Data(np.ones((2, 3, 4, 4), int)), IMAGE)


def test_a_disk_without_room_is_said() -> None:
    limits = pytest.importorskip("resource", reason="only on Unix")
    before = limits.getrlimit(limits.RLIMIT_FSIZE)
    data = Data(np.zeros((1000, 1000)))
    limits.setrlimit(limits.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(InputError, match="cannot be kept on disk") as raised:
            data.kept()
    finally:
        limits.setrlimit(limits.RLIMIT_FSIZE, before)
    assert "File too large" in str(raised.value)
    assert "TMPDIR" in str(raised.value)


# --- any arrays ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    size=st.integers(1, 9),
    inner=st.lists(st.integers(1, 3), max_size=2),
    kind=st.sampled_from(["f2", "f4", ">f4", "f8"]),
    labels=st.sampled_from(["i1", "u8", "f4", "?", "U3"]),
)
def test_however_rows_are_cut_they_are_the_same(
    rows: int, size: int, inner: list[int], kind: str, labels: str
) -> None:
    specs = (InputSpec("x", F32, ("N", *inner)),)
    x = np.arange(rows * int(np.prod(inner))).reshape(rows, *inner).astype(kind)
    y = np.arange(rows).astype(labels)
    whole = load_samples(Data((x, y)), specs)
    cuts = range(0, rows, size)
    parts = load_samples(Data([(x[i : i + size], y[i : i + size]) for i in cuts]), specs)
    native = np.dtype(kind).isnative
    assert not native or whole.hash == parts.hash
    np.testing.assert_array_equal(parts.targets["labels"], y)
    np.testing.assert_array_equal(np.concatenate([row["x"] for row in parts.rows()]), x.astype(np.float32))
    if inner:
        single = load_samples(Data(list(zip(x, y, strict=True))), specs)
        assert single.hash == whole.hash or not native or labels == "U3"
        np.testing.assert_array_equal(single.targets["labels"], y)


# --- what has no end ----------------------------------------------------------------------------------


def test_an_iterable_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "MOST_ITEMS", 50)
    with pytest.raises(InputError, match="more than 50 items, and may have no end"):
        load_samples(Data({"x": X[0]} for _ in itertools.count()), IMAGE)
    assert len(load_samples(Data({"x": X[0]} for _ in range(50)), IMAGE)) == 50
    assert len(load_samples(Data([{"x": X[0]}] * 60), IMAGE)) == 60  # it says how long it is
    (tmp_path / "feeds.py").write_text(
        "import itertools, numpy as np\n"
        "def feeds():\n"
        "    return ({'x': np.zeros((1, 3, 4, 4), np.float32)} for _ in itertools.count())\n"
    )
    with pytest.raises(InputError, match="more than 50 items, and may have no end"):
        load_samples(f"{tmp_path / 'feeds.py'}:feeds", IMAGE)


def test_items_do_not_fill_disk_or_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "LEAST_FREE", 1 << 60)
    monkeypatch.setattr(memory, "_LOOKED_AFTER", 10 * X[0].nbytes)
    with pytest.raises(InputError, match=r"cannot be kept on disk") as caught:
        load_samples(Data({"x": X[0]} for _ in itertools.count()), IMAGE)
    assert "the 10 items before have filled the disk" in str(caught.value)
    monkeypatch.setattr("trtq.data.load.MOST_WHOLE", 10 * X[0].nbytes)
    (tmp_path / "feeds.py").write_text(
        "import itertools, numpy as np\n"
        "def feeds():\n"
        "    return ({'x': np.zeros((1, 3, 4, 4), np.float32)} for _ in itertools.count())\n"
    )
    with pytest.raises(InputError, match=r"the first 11 items have 0\.0 GB"):
        load_samples(f"{tmp_path / 'feeds.py'}:feeds", IMAGE)
