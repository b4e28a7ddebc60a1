"""Images and their labels, as folders and CSV files have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trtq.data.listing import listed
from trtq.errors import InputError


def images(folder: Path, *names: str) -> Path:
    """Files that have names of images."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def found(path: Path, **classes: int) -> tuple[list[str], dict[str, list[object]]]:
    listing = listed(path, classes)
    folder = path.with_suffix("") if path.suffix else path
    names = [Path(image).relative_to(folder).as_posix() for image in listing.images]
    return names, {name: array.tolist() for name, array in listing.targets.items()}


def test_folders_are_classes_as_torchvision_numbers_them(tmp_path: Path) -> None:
    names = ("cat/b.png", "cat/deep/c.JPG", "cat/a.txt", "ant/z.png", "Zebra/1.png", ".hidden/x.png")
    images(tmp_path, *names)
    (tmp_path / "empty").mkdir()
    expected = ["Zebra/1.png", "ant/z.png", "cat/b.png", "cat/deep/c.JPG"]
    assert found(tmp_path) == (expected, {"label": [0, 1, 2, 2]})
    torchvision = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")
    (tmp_path / "empty").rmdir()
    (tmp_path / ".hidden" / "x.png").unlink()
    (tmp_path / ".hidden").rmdir()
    theirs = torchvision.ImageFolder(tmp_path)
    assert [(Path(path).relative_to(tmp_path).as_posix(), label) for path, label in theirs.samples] == list(
        zip(expected, [0, 1, 2, 2], strict=True)
    )


def test_the_recipe_says_which_number_a_folder_has(tmp_path: Path) -> None:
    images(tmp_path, "cat/b.png", "ant/z.png")
    assert found(tmp_path, cat=5, ant=7, dog=1) == (["ant/z.png", "cat/b.png"], {"label": [7, 5]})
    with pytest.raises(InputError, match="'cat' is none of the recipe's `classes`") as caught:
        found(tmp_path, ant=7)
    assert caught.value.file == str(tmp_path)


def test_images_in_the_folder_itself_have_no_class(tmp_path: Path) -> None:
    images(tmp_path, "1.png", "inner/2.png")
    assert found(tmp_path) == (["1.png"], {})


@pytest.mark.parametrize(
    "text",
    [
        "file,label,note\n2.png,dog,x\n1.png,cat,y\n",
        "note,label,file\nx,dog,2.png\ny,cat,1.png\n",
        "label;Filename\ndog;2.png\ncat;1.png\n",
        "species\timg\ndog\t2.png\ncat\t1.png\n",
        "photo,species\n2.png,dog\n1.png,cat\n",
        "2.png,dog\n1.png,cat\n",
        "dog,2.png\ncat,1.png\n",
        "\ufefffile, label\n2.png, dog\n\n1.png, cat\n",
    ],
    ids=[
        "file first",
        "file last",
        "semicolons",
        "tabs",
        "by content",
        "no header",
        "no header, last",
        "spaces",
    ],
)
def test_a_csv_in_any_order_with_text_as_labels(text: str, tmp_path: Path) -> None:
    images(tmp_path / "all", "1.png", "2.png", "3.png")
    table = tmp_path / "all.csv"
    table.write_text(text, encoding="utf-8")
    names, targets = found(table)
    assert names == ["2.png", "1.png"]
    (labels,) = targets.values()
    assert labels == [1, 0]  # of cat and dog, in the order of the alphabet
    assert found(table, dog=3, cat=9)[1] == {name: [3, 9] for name in targets}


def test_numbers_of_a_csv_stay_what_they_are(tmp_path: Path) -> None:
    images(tmp_path / "all", "1.png", "2.png")
    table = tmp_path / "all.csv"
    table.write_text("class,x,note,file\n7,0.5,a,1.png\n3,1,b,2.png\n")
    listing = listed(table, {"7": 1})
    assert {name: array.dtype for name, array in listing.targets.items()} == {
        "class": np.dtype(np.int64),
        "x": np.dtype(np.float64),
    }
    assert found(table)[1] == {"class": [7, 3], "x": [0.5, 1.0]}
