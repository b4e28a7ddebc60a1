"""The demo model and its data, as files that Polygraphy and trtq both read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import trtq

LOADER = """
import numpy as np

def load_data():
    images = np.load({eval!r})["image"]
    for start in range(0, len(images), 100):
        yield {{"image": images[start : start + 100]}}

def load_calibration():
    for image in np.load({calib!r})["image"]:
        yield {{"image": image[None]}}
"""


@pytest.fixture(scope="session")
def demo() -> Path:
    """The folder of the demo model, its calibration and its evaluation data."""
    return Path(trtq.__file__).parent / "demo"


@pytest.fixture(scope="session")
def model(demo: Path) -> str:
    return str(demo / "digits.onnx")


@pytest.fixture(scope="session")
def loader(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data-loader script of Polygraphy: 500 rows to compare on, 256 to calibrate with."""
    path = tmp_path_factory.mktemp("loader") / "loader.py"
    path.write_text(LOADER.format(eval=str(demo / "eval.npz"), calib=str(demo / "calib.npz")))
    return path


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of trtq for these tests and their subprocesses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
