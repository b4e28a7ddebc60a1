"""The library side of the workflow: what a call gives back, and the small decisions in between."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from jobs import Case
from small_nets import Net

from trtq import Recipe, deploy
from trtq.backends.interface import Range, parse_profile
from trtq.calibration.calibrate import FloatGraph, calibrate, statistics_of
from trtq.calibration.collect import collect
from trtq.calibration.methods import parse_method, scales_from
from trtq.calibration.table import Table
from trtq.console import SILENT, Console
from trtq.data.samples import Samples
from trtq.errors import ExitCode, InputError
from trtq.gate.verdict import Outcome
from trtq.job import Job, prepare, profile_for


def recipe_for(case: Case, output: Path, **options: object) -> Recipe:
    recipe = Recipe(
        model=str(case.model), data=str(case.data), eval=str(case.data), metric="cosine", output=str(output)
    )
    return dataclasses.replace(recipe, **options)  # type: ignore[arg-type]


def test_deploy_is_a_library_call(small: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    done = deploy(recipe_for(small, tmp_path / "out", method="max"))
    assert capsys.readouterr() == ("", "")
    assert done.exit_code is ExitCode.PASS
    assert done.build.engine == tmp_path / "out" / "model.plan"
    assert done.build.engine.is_file()
    assert [node.name for node in done.coverage.int8] == ["conv", "classes"]
    assert done.verdict.to_json() == json.loads((tmp_path / "out" / "verdict.json").read_text())
    stored = Table.load(tmp_path / "out" / "calibration.cache")
    assert stored.scales == done.table.scales
    with np.load(small.data) as data:
        assert done.table.scales["x"] == np.float32(np.abs(data["x"]).max()) / np.float32(127)


@pytest.mark.slow
def test_a_metric_function_is_resampled_for_the_verdict_that_is_kept(small: Case, tmp_path: Path) -> None:
    """No attempt passes; each calls the metric once, like the reference, and the one kept 2000 times more."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    data, log = dict(np.load(small.data)), tmp_path / "calls"
    np.savez(tmp_path / "eval.npz", **data, t=np.zeros(len(data["x"])))
    (tmp_path / "metric.py").write_text(
        "def mean(outputs, targets):\n"
        f"    print(file=open({str(log)!r}, 'a'))\n"
        "    first, *_ = outputs.values()\n"
        "    return 1 + 1e-6 * first.mean()\n"
    )
    options = {"method": "max", "eval": str(tmp_path / "eval.npz"), "recover": ("fix", "partial")}
    options |= {"metric": f"{tmp_path / 'metric.py'}:mean", "min_sqnr": 190.0}
    done = deploy(recipe_for(small, tmp_path / "out", **options))
    assert len(done.attempts) > 1
    assert done.verdict.draws == 1000
    assert done.verdict.relative_interval is not None
    gated = len(log.read_text().splitlines()) - 1 - 1 - 2 * 1000
    assert len(done.attempts) <= gated < 100


def test_a_failed_check_fails_a_passed_gate(small: Case, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    options = {"method": "max", "exclude": ("conv",), "min_int8": "99%"}
    done = deploy(recipe_for(small, tmp_path / "out", **options))
    assert done.verdict.gate is Outcome.PASS
    assert done.verdict.outcome is Outcome.FAIL
    assert done.exit_code is ExitCode.FAIL
    assert done.verdict.in_the_way is not None
    (obstacle,) = done.verdict.in_the_way.obstacles
    assert obstacle.nodes == ("conv",)
    assert "excluded by 'conv'" in obstacle.reason


def test_a_job_that_fails_late_keeps_what_was_made_but_not_its_verdict(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    output = tmp_path / "out"
    deploy(recipe_for(small, output, method="max"))
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def fail(*_: object) -> None:
        raise InputError("the disk is full")

    monkeypatch.setattr("trtq.pipeline.write_report", fail)
    with pytest.raises(InputError, match="the disk is full"):
        deploy(recipe_for(small, output, method="entropy"))
    after = {path.name: path.read_bytes() for path in output.iterdir()}
    assert b"the disk is full" in after.pop("junit.xml")
    verdicts = ("verdict.json", "junit.xml", "workflow.json", "report.html")
    assert after == {name: content for name, content in before.items() if name not in verdicts}


def job_for(case: Case, folder: Path, **options: object) -> Job:
    return Job.open(recipe_for(case, folder / "out", cache=str(folder / "c"), **options), SILENT)


def test_auto_merges_the_rows_held_back_into_the_scales(small: Case, tmp_path: Path) -> None:
    job = job_for(small, tmp_path)
    table = Table.of(calibrate(job, job.place()))
    assert table.metadata["held_back"] == 10
    assert table.metadata["method"] == max(table.metadata["sqnr_db"], key=table.metadata["sqnr_db"].get)
    if not table.metadata["exceptions"]:
        every_row = collect(job.model.graph, job.place().tensors, job.data)
        assert table.scales == scales_from(every_row, parse_method(table.metadata["method"]))


def test_a_cached_table_is_the_table(small: Case, tmp_path: Path) -> None:
    job = job_for(small, tmp_path)
    tables = [Table.of(calibrate(job, job.place())) for _ in range(2)]
    assert tables[0] == tables[1]


def test_statistics_do_not_depend_on_the_threads(small: Case, tmp_path: Path) -> None:
    contents = []
    for threads in (1, 3):
        job = job_for(small, tmp_path / str(threads), threads=threads)
        source = FloatGraph.of(job.model)
        contents.append(statistics_of(job, job.place().tensors, job.data, source).to_bytes())
    assert contents[0] == contents[1]


def test_the_profile_is_the_recipes_or_the_datas(small: Case, tmp_path: Path) -> None:
    recipe = recipe_for(small, tmp_path / "out", batch=2)
    model = prepare(recipe)
    assert profile_for(model, recipe, None) == {"x": Range((1, 3, 8, 8), (2, 3, 8, 8), (8, 3, 8, 8))}
    own = dataclasses.replace(recipe, profile=parse_profile(["x:5x3x8x8"]))
    assert profile_for(model, own, None) == {"x": Range(*[(5, 3, 8, 8)] * 3)}
    unknown = dataclasses.replace(own, profile=(*own.profile, ("x", Range(*[(5, 3, 9, 9)] * 3))))
    with pytest.raises(InputError, match="shape 5x3x9x9 does not fit input 'x'"):
        profile_for(model, unknown, None)


def rows_of_lengths(job: Job, *lengths: int) -> Samples:
    """Rows (length, 16) of the job's one input."""
    rows = [np.ones((length, 16), np.float32) for length in lengths]
    return Samples("rows", job.data.specs, {"x": rows}, {}, "rows")


def test_the_engine_takes_the_evaluations_rows(tmp_path: Path) -> None:
    net = Net()
    onnx.save(net.model(net.op("MatMul", net.input("N", "L", 16), net.weight(16, 8))), tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=np.ones((20, 4, 16), np.float32))
    job = Job.open(Recipe(model=str(tmp_path / "m.onnx"), data=str(tmp_path / "data.npz")), SILENT)
    assert job.profile == {"x": Range((1, 4, 16), (8, 4, 16), (32, 4, 16))}
    longer = dataclasses.replace(job, evaluation=rows_of_lengths(job, 9, 3, 9))
    assert longer.profile == {"x": Range((1, 3, 16), (8, 4, 16), (32, 9, 16))}


def test_rows_outside_of_given_profiles_are_warned_of(tmp_path: Path) -> None:
    net = Net()
    onnx.save(net.model(net.op("MatMul", net.input("N", "L", 16), net.weight(16, 8))), tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=np.ones((20, 4, 16), np.float32))

    def warned(*profiles: str) -> list[str]:
        console = Console(quiet=True)
        options = {"model": str(tmp_path / "m.onnx"), "data": str(tmp_path / "data.npz"), "profile": profiles}
        job = Job.open(Recipe(**options), console)
        dataclasses.replace(job, evaluation=rows_of_lengths(job, 9, 3, 9)).warn_of_profiles()
        return [text for text in console.warnings if "--profile" in text]

    assert warned() == []
    assert warned("x:1x3x16,2x4x16,4x9x16") == []
    assert warned("x:1x3x16,2x4x16,4x4x16", "x:1x5x16,2x9x16,4x9x16") == []
    assert "takes 2 of 3 evaluation rows (the first: x 9x16)" in warned("x:1x3x16,2x4x16,4x8x16")[0]
