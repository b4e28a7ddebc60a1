"""The checked-in tables, Q/DQ model and verdict of the demo, which no change must move unnoticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_files import GOLDEN, described, verdict_of
from jobs import Deployed, trtq_command

import trtq.demo
from trtq.cache import Cache
from trtq.calibration.calibrate import calibrate
from trtq.calibration.table import Table
from trtq.console import SILENT
from trtq.job import Job
from trtq.recipe import Recipe

ROOT = Path(__file__).parents[1] / "calib_cache"
TABLES = sorted(ROOT.glob("*/*/*.cache"))
DEMO = Path(trtq.demo.__file__).parent


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """The demo without fixes: what is learned of float means and moments differs between processors."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    root = tmp_path_factory.mktemp("plain")
    folder, cache = root / "out", root / "cache"
    run = trtq_command("demo", "-o", folder, "--cache", cache, "--recover", "none")
    return Deployed(folder, cache, run)


def test_every_method_has_a_golden_table() -> None:
    methods = {Table.load(path).metadata["method"] for path in TABLES}
    assert methods == {"max", "entropy", "mse", "percentile:99.99"}


def test_the_golden_cache_verifies() -> None:
    assert [entry.problem for entry in Cache(ROOT).entries()] == [None] * len(TABLES)


@pytest.mark.parametrize("path", TABLES, ids=lambda p: Table.load(p).metadata["method"])
def test_calibrating_again_gives_the_golden_scales(path: Path, tmp_path: Path) -> None:
    golden = Table.load(path)
    recipe = Recipe(
        model=str(DEMO / "digits.onnx"),
        data=str(DEMO / "calib.npz"),
        method=golden.metadata["method"],
        cache=str(tmp_path),
    )
    job = Job.open(recipe, SILENT)
    assert (job.model.sha256, job.data.hash) == (golden.metadata["model"], golden.metadata["data"])
    table = Table.of(calibrate(job, job.place()))
    assert list(table.scales) == list(golden.scales)
    # Another processor may round an activation differently and move single values to the next bin.
    np.testing.assert_allclose(list(table.scales.values()), list(golden.scales.values()), rtol=0.02)


def test_the_demo_gives_the_golden_model(plain: Deployed) -> None:
    golden = json.loads((GOLDEN / "model.int8.json").read_text())
    model = described(plain.folder / "model.int8.onnx")
    assert model["nodes"] == golden["nodes"]
    assert_alike(model["scales"], golden["scales"])
    assert model["constants"] == golden["constants"]


def test_the_demo_gives_the_golden_verdict(plain: Deployed) -> None:
    golden = json.loads((GOLDEN / "verdict.json").read_text())
    assert_alike(verdict_of(plain.folder / "verdict.json"), golden, absolute=1 / golden["samples"])


def assert_alike(found: Any, golden: Any, absolute: float = 0) -> None:
    """Equal, but floats within 2 % or `absolute`: another processor may round an activation differently."""
    if isinstance(golden, dict):
        assert list(found) == list(golden)
        for key, value in golden.items():
            assert_alike(found[key], value, absolute)
    elif isinstance(golden, list):
        assert len(found) == len(golden)
        for one, other in zip(found, golden, strict=True):
            assert_alike(one, other, absolute)
    elif isinstance(golden, float):
        assert found == pytest.approx(golden, rel=0.02, abs=absolute)
    else:
        assert found == golden
