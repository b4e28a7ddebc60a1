"""Every form of data, and everything that can be wrong with it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trtq.data.feeding import Feeding, InputOptions
from trtq.data.load import load_samples
from trtq.data.preprocess import Preprocess
from trtq.data.samples import Samples
from trtq.errors import InputError
from trtq.graph.inputs import InputSpec

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 3)).astype(np.float32)
LABELS = np.array([3, 1, 2, 0])
PIXELS = RNG.integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)


def parsed(**tables: Mapping[str, Any]) -> dict[str, Preprocess]:
    """The tables of a recipe, by input."""
    return {name: Preprocess.parse(name, options) for name, options in tables.items()}


IMAGE = [InputSpec("input", np.dtype(np.float32), ("N", 3, 4, 5))]
OPTIONS = {"scale": "1/255", "mean": 0.5, "std": [0.5, 0.25, 0.5], "layout": "NCHW"}
SPEC = parsed(input=OPTIONS)
EXPECTED = ((PIXELS / 255 - 0.5) / [0.5, 0.25, 0.5]).transpose(0, 3, 1, 2)


def vector(name: str = "x", size: int | str = 3) -> InputSpec:
    return InputSpec(name, np.dtype(np.float32), ("N", size))


def stacked(samples: Samples, name: str) -> np.ndarray:
    return np.concatenate([feed[name] for feed in samples.rows()])


def message_of(spec: object, inputs: list[InputSpec], preprocess: dict | None = None) -> str:
    with pytest.raises(InputError) as caught:
        list(load_samples(str(spec), inputs, preprocess).rows())
    return str(caught.value)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    file = tmp_path / "a.npz"
    np.savez(file, x=X, label=LABELS)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three PNG images, which keep their pixels."""
    images = tmp_path / "images"
    images.mkdir()
    for index, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(images / f"{index}.png")
    return images


def script(tmp_path: Path, body: str) -> str:
    file = tmp_path / "loader.py"
    file.write_text("import numpy as np\n" + body)
    return f"{file}:feeds"


# --- .npz ---------------------------------------------------------------------------------------------


def test_npz(npz: Path) -> None:
    samples = load_samples(str(npz), [vector()])
    assert len(samples) == 4
    assert samples.source == str(npz)
    np.testing.assert_array_equal(stacked(samples, "x"), X)
    assert list(samples.targets) == ["label"]
    np.testing.assert_array_equal(samples.targets["label"], LABELS)
    assert samples.group == 1


def test_npz_through_preprocessing(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=PIXELS, labels=[0, 1, 2])
    samples = load_samples(str(tmp_path / "a.npz"), IMAGE, parsed(input={"from": "images", **OPTIONS}))
    np.testing.assert_allclose(stacked(samples, "input"), EXPECTED, atol=1e-6)
    assert list(samples.targets) == ["labels"]


def test_fewer_targets_than_rows_make_groups(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, score=[0.5, 0.25])
    assert load_samples(str(tmp_path / "a.npz"), [vector()]).group == 2


def test_a_folder_of_npz_in_the_order_of_names(tmp_path: Path) -> None:
    wide = RNG.standard_normal((2, 5)).astype(np.float32)
    np.savez(tmp_path / "2.npz", x=wide, label=[8, 9])
    np.savez(tmp_path / "1.npz", x=X, label=LABELS)
    samples = load_samples(str(tmp_path), [vector(size="L")])
    rows = [feed["x"] for feed in samples.rows()]
    for row, expected in zip(rows, [*X, *wide], strict=True):
        np.testing.assert_array_equal(row[0], expected)
    assert samples.targets["label"].tolist() == [*LABELS, 8, 9]
    assert samples.row_shapes() == {"x": [(3,)] * len(X) + [(5,)] * 2}


def test_a_folder_of_npz_with_preprocessing(tmp_path: Path) -> None:
    for name, part in (("a", slice(0, 1)), ("b", slice(1, 3))):
        np.savez(tmp_path / f"{name}.npz", images=PIXELS[part], label=LABELS[part])
    samples = load_samples(str(tmp_path), IMAGE, parsed(input={"from": "images", **OPTIONS}))
    np.testing.assert_allclose(stacked(samples, "input"), EXPECTED, rtol=0, atol=1e-6)
    assert samples.targets["label"].tolist() == LABELS[:3].tolist()


def test_what_can_be_wrong_with_an_npz(tmp_path: Path, npz: Path) -> None:
    bad = tmp_path / "bad.npz"
    assert "does not exist" in message_of(tmp_path / "none.npz", [vector()])
    bad.write_bytes(b"no zip")
    assert "not an .npz" in message_of(bad, [vector()])
    bad.write_bytes(npz.read_bytes()[:200])
    assert "not an .npz" in message_of(bad, [vector()])
    np.savez(bad, x=np.array([None]))
    assert "not an .npz of plain arrays" in message_of(bad, [vector()])
    np.savez(bad, x=X, t=1)
    assert "'t' has no rows" in message_of(bad, [vector()])
    np.savez(bad, x=X[:0])
    assert "no rows" in message_of(bad, [vector()])
    np.savez(bad, x=X, y=X[:3])
    assert "{'x': 4, 'y': 3}" in message_of(bad, [vector(), vector("y")])
    np.savez(bad, x=X, t=np.zeros(3))
    assert "target 't' has shape (3,) for 4 rows" in message_of(bad, [vector()])
    np.savez(bad, x=X, t=np.zeros(4), u=np.zeros(2))
    assert "{'t': 4, 'u': 2}" in message_of(bad, [vector()])
    np.savez(bad, x=X.astype(np.int64))
    assert "is int64; the model takes x float32 Nx3" in message_of(bad, [vector()])
    assert "has shape (3,)" in message_of(npz, [vector(size=7)])


def test_a_missing_input_lists_what_is_there_and_how_to_name_it(npz: Path) -> None:
    message = message_of(npz, [vector(), vector("mask")])
    assert "no array 'mask'" in message
    assert "the data has x, label" in message
    assert '[preprocess.mask] from = "ARRAY"' in message
    assert "no array 'pixels'" in message_of(npz, [vector()], parsed(x={"from": "pixels"}))
    assert "names no input" in message_of(npz, [vector()], parsed(y={"scale": 2}))


def test_parts_that_do_not_fit_together(tmp_path: Path) -> None:
    np.savez(tmp_path / "1.npz", x=X, label=LABELS)
    np.savez(tmp_path / "2.npz", x=X)
    assert "not every part of the data has an array 'label'" in message_of(tmp_path, [vector()])
    # 4 + 4 rows and 3 + 1 targets: two rows for each in sum, but not in any part
    np.savez(tmp_path / "1.npz", x=X, label=LABELS[:3])
    np.savez(tmp_path / "2.npz", x=X, label=LABELS[:1])
    assert "'label' do not match those of 'x'" in message_of(tmp_path, [vector()])


def test_other_things_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert "not supported" in message_of(tmp_path / "a.txt", [vector()])
    assert "does not exist" in message_of(tmp_path / "nothing", [vector()])
    assert "no .npz, no .npy and no images" in message_of(tmp_path, [vector()])


# --- hash ---------------------------------------------------------------------------------------------


def test_the_hash_is_of_the_content(tmp_path: Path, npz: Path) -> None:
    original = load_samples(str(npz), [vector()]).hash
    np.savez_compressed(tmp_path / "b.npz", label=LABELS, x=X)
    assert load_samples(str(tmp_path / "b.npz"), [vector()]).hash == original
    changes = {
        "the last bits": {"x": np.nextafter(X, np.float32(9)), "label": LABELS},
        "a dtype": {"x": X.astype(np.float64), "label": LABELS},
        "a target": {"x": X, "label": LABELS[::-1]},
        "a name": {"x": X, "labels": LABELS},
        "no target": {"x": X},
    }
    hashes = {original}
    for arrays in changes.values():
        np.savez(tmp_path / "c.npz", **arrays)
        hashes.add(load_samples(str(tmp_path / "c.npz"), [vector()]).hash)
    hashes.add(load_samples(str(npz), [vector()], parsed(x={"scale": 2})).hash)
    hashes.add(load_samples(str(npz), [vector()], parsed(x={"scale": 3})).hash)
    assert len(hashes) == len(changes) + 3


@pytest.mark.parametrize(
    "target", [np.array(["2020-01-01"] * 4, "M8[D]"), np.array(["a", "b", "c", "d"]), np.zeros((4, 0))]
)
def test_targets_of_any_dtype_are_hashed(target: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=X, t=target)
    assert load_samples(str(tmp_path / "t.npz"), [vector()]).targets["t"].dtype == target.dtype


def test_the_hash_of_images_is_of_their_bytes(folder: Path, tmp_path: Path) -> None:
    original = load_samples(str(folder), IMAGE, SPEC).hash
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert load_samples(str(copy), IMAGE, SPEC).hash == original
    Image.fromarray(PIXELS[0, ::-1].copy()).save(copy / "0.png")
    assert load_samples(str(copy), IMAGE, SPEC).hash != original


# --- images -------------------------------------------------------------------------------------------


def test_images_without_a_csv(folder: Path) -> None:
    samples = load_samples(str(folder), IMAGE, SPEC)
    np.testing.assert_allclose(stacked(samples, "input"), EXPECTED, atol=1e-6)
    assert samples.targets == {}


@pytest.mark.parametrize("place", ["inside", "beside", "elsewhere in the listing"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_images_with_a_csv(place: str, encoding: str, folder: Path) -> None:
    prefix = "images/" if place == "elsewhere in the listing" else ""
    table = folder / "any.csv" if place == "inside" else folder.with_suffix(".csv")
    lines = ["file,label,weight,note", f"{prefix}2.png,7,0.5,a", f"{prefix}0.png,8,1,b"]
    table.write_text("\n".join(lines), encoding=encoding)
    for spec in (folder, table):
        samples = load_samples(str(spec), IMAGE, SPEC)
        np.testing.assert_allclose(stacked(samples, "input"), EXPECTED[[2, 0]], atol=1e-6)
        assert list(samples.targets) == ["label", "weight"]
        assert samples.targets["label"].dtype == np.int64
        assert samples.targets["label"].tolist() == [7, 8]
        assert samples.targets["weight"].tolist() == [0.5, 1.0]


def test_images_are_decoded_when_they_are_read(folder: Path) -> None:
    samples = load_samples(str(folder), IMAGE, SPEC)
    (folder / "2.png").write_bytes(b"no image")
    rows = samples.rows()
    next(rows), next(rows)
    with pytest.raises(InputError, match="cannot read the image") as caught:
        next(rows)
    assert caught.value.file == str(folder / "2.png")


def test_images_are_never_guessed_at(folder: Path) -> None:
    message = message_of(folder, IMAGE)
    assert "preprocessing spec" in message
    assert '[preprocess.input] with scale = "1/255"' in message
    assert "several inputs" in message_of(folder, [*IMAGE, vector()], SPEC)


def test_what_can_be_wrong_with_images(folder: Path) -> None:
    table = folder.with_suffix(".csv")
    assert "has shape (4, 5, 3)" in message_of(folder, IMAGE, parsed(input={"scale": 1}))
    assert "is uint8" in message_of(folder, IMAGE, parsed(input={"layout": "NCHW"}))
    table.write_text("file,label\n0.png,1\ngone.png,2\n")
    assert "the first is gone.png" in message_of(table, IMAGE, SPEC)
    assert f"file:   {table}" in message_of(table, IMAGE, SPEC)
    table.write_text("file,label\n0.png,cat\n1.png,\n")
    assert "row 1 of the CSV has nothing in column 'label'" in message_of(table, IMAGE, SPEC)
    table.write_text("file,label\n0.png,cat\n1.png,7,8\n")
    assert "row 1 of the CSV has 3 cells" in message_of(table, IMAGE, SPEC)
    table.write_text("0,1\n1,2\n")
    assert "header" in message_of(table, IMAGE, SPEC)
    table.write_text("file,label\n")
    assert "lists no images" in message_of(table, IMAGE, SPEC)
    table.write_bytes(b"file,label\n\xff\xfe,1\n")
    assert "cannot read the CSV" in message_of(table, IMAGE, SPEC)
    table.unlink()
    assert "does not exist" in message_of(table, IMAGE, SPEC)
    for name in ("a.csv", "b.csv"):
        (folder / name).write_text("file\n0.png\n")
    assert "several .csv" in message_of(folder, IMAGE, SPEC)


# --- .npy and several files ---------------------------------------------------------------------------


def test_an_npy_is_the_only_input(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X)
    assert (
        load_samples(str(tmp_path / "a.npy"), [vector()]).hash
        == load_samples(
            script(tmp_path, f"def feeds():\n    yield {{'x': np.load({str(tmp_path / 'a.npy')!r})}}\n"),
            [vector()],
        ).hash
    )
    assert "does not say of which input" in message_of(tmp_path / "a.npy", [vector(), vector("y")])
    np.save(tmp_path / "a.npy", np.array([None]))
    assert "not an .npy of numbers" in message_of(tmp_path / "a.npy", [vector()])
    (tmp_path / "a.npy").write_bytes(b"no array")
    assert "not an .npy of numbers" in message_of(tmp_path / "a.npy", [vector()])


def test_npy_files_that_are_named_like_inputs_are_an_npz(tmp_path: Path, npz: Path) -> None:
    (tmp_path / "apart").mkdir()
    for name, array in (("x", X), ("label", LABELS)):
        np.save(tmp_path / "apart" / f"{name}.npy", array)
    samples = load_samples(str(tmp_path / "apart"), [vector()])
    assert samples.hash == load_samples(str(npz), [vector()]).hash
    assert list(samples.targets) == ["label"]


@pytest.mark.parametrize("rows", [[X[:1], X[1:2], X[2:]], [*X]], ids=["batches", "samples"])
def test_npy_files_of_samples_or_batches(rows: list[np.ndarray], tmp_path: Path) -> None:
    for index, array in enumerate(rows):
        np.save(tmp_path / f"{index:03}.npy", array)
    np.testing.assert_array_equal(stacked(load_samples(str(tmp_path), [vector()]), "x"), X)


def test_a_row_that_does_not_fit_is_named_by_its_file(tmp_path: Path, folder: Path) -> None:
    """Of the parts of a folder, of whole arrays and of subsets; of images."""
    for name, part in (("a", X), ("b", X[:2]), ("c", X[:1, :2])):
        np.savez(tmp_path / f"{name}.npz", x=part)
    with pytest.raises(InputError) as caught:
        list(load_samples(str(tmp_path), [vector()]).subset([1, 6, 5]).rows())
    assert caught.value.file == str(tmp_path / "c.npz")
    assert "row 6 of input 'x' has shape (2,)" in caught.value.problem
    Image.fromarray(PIXELS[0, :3]).save(folder / "1.png")
    with pytest.raises(InputError) as caught:
        list(load_samples(str(folder), IMAGE, SPEC).rows())
    assert caught.value.file == str(folder / "1.png")


# --- scripts ------------------------------------------------------------------------------------------


def test_a_script_gives_batches_that_become_rows(tmp_path: Path) -> None:
    spec = script(
        tmp_path,
        "def feeds():\n"
        "    for start in (0, 4):\n"
        "        x = np.arange(start, start + 4, dtype=np.float32)[:, None]\n"
        "        yield {'x': x, 'score': [start, start + 2]}\n",
    )
    samples = load_samples(spec, [vector(size=1)])
    assert stacked(samples, "x").ravel().tolist() == list(range(8))
    assert samples.targets["score"].tolist() == [0, 2, 4, 6]
    assert samples.group == 2
    assert samples.row_shapes() == {"x": [(1,)] * 8}


def test_a_script_and_an_npz_of_the_same_arrays_are_the_same_data(tmp_path: Path, npz: Path) -> None:
    spec = script(tmp_path, f"def feeds():\n    yield dict(np.load({str(npz)!r}))\n")
    assert load_samples(spec, [vector()]).hash == load_samples(str(npz), [vector()]).hash


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def other(): pass", "no function 'feeds'"),
        ("import no_such_module_at_all", "ModuleNotFoundError"),
        ("def feeds():\n    yield {}\n    1 / 0", "ZeroDivisionError"),
        ("def feeds():\n    raise SystemExit(3)", "SystemExit: 3"),
        ("def feeds():\n    return None", "TypeError"),
        ("def feeds():\n    return []", "gave no data"),
        ("def feeds():\n    yield {'y': np.zeros((1, 3))}", "no array 'x'"),
        ("def feeds():\n    yield {'x': np.zeros((1, 3)), 't': [object()]}", "'t', which is not an array"),
        (
            "def feeds():\n    for n in (6, 2):\n        yield {'x': np.zeros((n, 3)), 't': np.zeros(2)}",
            "do not match",
        ),
    ],
)
def test_what_can_be_wrong_with_a_script(body: str, words: str, tmp_path: Path) -> None:
    message = message_of(script(tmp_path, body), [vector()])
    assert words in message
    assert "loader.py" in message


@pytest.mark.parametrize(
    "body",
    [
        "def feeds():\n    return list(zip(X, LABELS))",
        "def feeds():\n    return X, LABELS",
        "def feeds():\n    return {'x': X, 'labels': LABELS}",
        "class Set:\n    def __len__(self): return 4\n    def __getitem__(self, i): return X[i], LABELS[i]\n"
        "feeds = Set",
        "def feeds():\n    import torch.utils.data as d\n    import torch\n"
        "    s = d.TensorDataset(torch.tensor(X), torch.tensor(LABELS))\n"
        "    return d.DataLoader(s, batch_size=3)",
    ],
    ids=["tuples", "arrays", "by name", "indexed", "DataLoader"],
)
def test_a_script_gives_what_python_programs_have(body: str, tmp_path: Path) -> None:
    arrays = f"X = np.array({X.tolist()}, np.float32)\nLABELS = np.array({LABELS.tolist()})\n"
    samples = load_samples(script(tmp_path, arrays + body), [vector()])
    np.testing.assert_array_equal(stacked(samples, "x"), X)
    assert samples.targets["labels"].tolist() == LABELS.tolist()


def test_a_script_gives_images_as_hugging_face_does(tmp_path: Path) -> None:
    body = f"""from PIL import Image
PIXELS = np.array({PIXELS.tolist()}, np.uint8)
def feeds():
    for number, pixels in enumerate(PIXELS):
        yield {{"image": Image.fromarray(pixels), "label": number}}
"""
    samples = load_samples(script(tmp_path, body), IMAGE, parsed(input={"from": "image", **OPTIONS}))
    np.testing.assert_allclose(stacked(samples, "input"), EXPECTED, atol=1e-6)
    assert samples.targets["label"].tolist() == [0, 1, 2]


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in message_of(f"{tmp_path}/none.py:feeds", [vector()])


def test_images_beside_a_constant(folder: Path) -> None:
    specs = [*IMAGE, InputSpec("size", np.dtype(np.int64), (2,), None)]
    assert "takes .npz" in message_of(folder, specs, SPEC)
    feeding = Feeding({"size": InputOptions.parse("size", {"value": [4, 5]})})
    samples = load_samples(str(folder), specs, SPEC, feeding)
    np.testing.assert_allclose(stacked(samples, "input"), EXPECTED, rtol=0, atol=1e-6)
    assert all(feed["size"].tolist() == [4, 5] for feed in samples.rows())


def test_targets_of_different_shapes(tmp_path: Path) -> None:
    body = "def feeds():\n    for n in (2, 3):\n        yield {'x': np.zeros((1, 3)), 't': [[0] * n]}"
    samples = load_samples(script(tmp_path, body), [vector()])
    assert [target.shape for target in samples.targets["t"]] == [(2,), (3,)]
    assert samples.subset([1]).targets["t"][0].shape == (3,)


# --- the zoo ------------------------------------------------------------------------------------------


def test_zoo_cifar10(zoo: Path) -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    spec = parsed(input={"from": "images", "scale": "1/255", "mean": mean, "std": std, "layout": "NCHW"})
    inputs = [InputSpec("input", np.dtype(np.float32), ("N", 3, 32, 32))]
    samples = load_samples(str(zoo / "cifar10" / "calib.npz"), inputs, spec)
    images = np.load(zoo / "cifar10" / "calib.npz")["images"]
    expected = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(stacked(samples, "input"), expected, atol=1e-5)
    assert (len(samples), samples.group, list(samples.targets)) == (300, 1, ["labels"])


def test_zoo_imagenet_sample(zoo: Path) -> None:
    spec = parsed(input={"scale": "1/255", "mean": 0.498, "std": 0.502, "layout": "NCHW"})
    inputs = [InputSpec("input", np.dtype(np.float32), ("N", 3, 224, 224))]
    samples = load_samples(str(zoo / "imagenet_sample" / "calib"), inputs, spec)
    by_table = load_samples(str(zoo / "imagenet_sample" / "calib.csv"), inputs, spec)
    assert len(samples) == len(samples.targets["label"]) == 100
    assert by_table.hash == samples.hash
    first = next(samples.rows())["input"]
    name = (zoo / "imagenet_sample" / "calib.csv").read_text().splitlines()[1].partition(",")[0]
    pixels = np.asarray(Image.open(zoo / "imagenet_sample" / "calib" / name).convert("RGB"))
    np.testing.assert_allclose(first[0], ((pixels / 255 - 0.498) / 0.502).transpose(2, 0, 1), atol=1e-5)


def test_zoo_stsb(zoo: Path) -> None:
    inputs = [InputSpec(n, np.dtype(np.int64), ("N", "L")) for n in ("input_ids", "attention_mask")]
    samples = load_samples(str(zoo / "stsb" / "calib.npz"), inputs)
    assert (len(samples), samples.group, list(samples.targets)) == (512, 2, ["score"])
    kept, held_back = samples.split()
    assert (len(kept), len(held_back), len(held_back.targets["score"])) == (384, 128, 64)


def test_a_script_may_fill_one_buffer_again_and_again(tmp_path: Path) -> None:
    body = (
        "def feeds():\n    x = np.zeros((1, 3), np.float32)\n    for i in range(3):\n"
        "        x[:] = i\n        yield {'x': x}\n"
    )
    samples = load_samples(script(tmp_path, body), [vector()])
    np.testing.assert_array_equal(stacked(samples, "x")[:, 0], [0, 1, 2])


def test_an_array_that_only_later_parts_have_is_not_dropped(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X)
    np.savez(tmp_path / "b.npz", x=X, label=LABELS)
    assert "not every part of the data has an array 'label'" in message_of(tmp_path, [vector()])


def test_a_row_of_the_csv_without_a_file(folder: Path) -> None:
    (folder / "t.csv").write_text("label,file\n1,0.png\n2\n")
    assert "row 1 of the CSV names no file" in message_of(folder, IMAGE, SPEC)


def test_a_label_beyond_int64_is_a_float(folder: Path) -> None:
    (folder / "t.csv").write_text(f"file,label\n0.png,{10**20}\n")
    np.testing.assert_array_equal(load_samples(str(folder), IMAGE, SPEC).targets["label"], [1e20])
