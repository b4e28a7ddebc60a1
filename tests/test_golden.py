"""The checked-in tables of the demo model, which a change of the algorithms must not move unnoticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
