"""The figures tell calibration data that do not look like the evaluation data from those that do."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import net, normal

from trtq import Recipe
from trtq.calibration.calibrate import calibrate
from trtq.console import Console
from trtq.data.samples import Samples
from trtq.gate.drift import Spread, gap, inputs_apart, spreads
from trtq.gate.evaluation import Evaluation, candidate_of
from trtq.graph.inputs import InputSpec
from trtq.job import Job


def warned(
    folder: Path,
    calibration: np.ndarray,
    evaluation: np.ndarray,
    seen: float | None = None,
    **options: object,
) -> str | None:
    """What is said of a network of two layers that is calibrated on some rows and evaluated on others."""
    folder.mkdir(exist_ok=True)
    model = net(
        "g (float[N,16] x) => (float[N,4] y) { a = MatMul(x, w) r = Relu(a) y = MatMul(r, v) }",
        w=normal(16, 16),
        v=normal(16, 4, seed=1),
    )
    onnx.save(model, folder / "m.onnx")
    for name, rows in (("calib", calibration), ("eval", evaluation)):
        np.savez(folder / f"{name}.npz", x=rows.astype(np.float32))
    files = {"data": str(folder / "calib.npz"), "eval": str(folder / "eval.npz"), "cache": str(folder / "c")}
    recipe = Recipe(model=str(folder / "m.onnx"), metric="cosine", **{"method": "max", **files, **options})
    console = Console(quiet=True)
    job = Job.open(recipe, console)
    against = Evaluation.open(recipe, job.model.path, job.model.inputs, job.cache, console)
    with candidate_of(calibrate(job, job.place())) as candidate:
        return gap(job, against, against.verdict(candidate), candidate, seen)


def uniform(rows: int, high: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, high, (rows, 16))


def test_pixels_that_were_scaled_for_calibration_only(tmp_path: Path) -> None:
    calibration, evaluation = uniform(64, 1, 0), uniform(200, 255, 1)
    text = warned(tmp_path, calibration, evaluation)
    first, second = text.splitlines()
    here = float(first.partition("have ")[2].partition(" dB on 16 calibration rows")[0])
    there = float(first.partition("but ")[2].partition(" dB on the evaluation data")[0])
    assert here > 30
    assert there < 1  # all but 1/255 of each value is cut off
    assert second == (
        f"input 'x': {calibration.min():.4g} to {calibration.max():.4g}, mean {calibration.mean():.4g} in"
        f" calibration; {evaluation.min():.4g} to {evaluation.max():.4g}, mean {evaluation.mean():.4g} in"
        " evaluation"
    )


def test_a_figure_that_calibration_saw_decides_where_it_is_close_alone(tmp_path: Path) -> None:
    calibration, evaluation = uniform(64, 1, 0), uniform(200, 255, 1)
    assert warned(tmp_path, calibration, evaluation, seen=30.0) == warned(tmp_path, calibration, evaluation)
    assert warned(tmp_path, calibration, evaluation, seen=1.0) is None


def test_pixels_that_were_scaled_for_the_evaluation_only(tmp_path: Path) -> None:
    assert "input 'x': " in warned(tmp_path, uniform(64, 255, 0), uniform(200, 1, 1))


@pytest.mark.parametrize("seed", range(8))
def test_parts_of_one_data_set_are_alike(tmp_path: Path, seed: int) -> None:
    """Rows whose scales differ by far, so that their own figures do, too; few of them."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(56, 16)) * np.exp(random.normal(size=(56, 1)))
    assert warned(tmp_path, rows[:16], rows[16:]) is None
    assert warned(tmp_path / "more", rows[:40], rows[40:]) is None


def test_values_of_inputs_are_those_of_all_rows() -> None:
    specs = tuple(InputSpec(name, np.dtype(np.float32), ("N", None)) for name in ("a", "b"))

    def samples(a: list[list[float]]) -> Samples:
        b = [np.float32([1, 2, 3]), np.float32([4])]
        return Samples("s", specs, {"a": [np.float32(row) for row in a], "b": b}, {}, "0" * 64)

    one, other = samples([[-1, 0], [5]]), samples([[-1, 0], [500]])
    assert spreads(one) == {"a": Spread(-1, 5, pytest.approx(4 / 3)), "b": Spread(1, 4, 2.5)}
    lines = inputs_apart(one, other)
    assert [line.split(":")[0] for line in lines] == ["input 'a'", "input 'b'"]  # what differs comes first
    assert lines[0] == "input 'a': -1 to 5, mean 1.333 in calibration; -1 to 500, mean 166.3 in evaluation"


def test_deploy_says_it_in_the_verdict_and_the_report(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    from trtq.pipeline import deploy

    warned(tmp_path, uniform(64, 1, 0), uniform(200, 255, 1))
    recipe = Recipe(
        model=str(tmp_path / "m.onnx"),
        data=str(tmp_path / "calib.npz"),
        eval=str(tmp_path / "eval.npz"),
        metric="cosine",
        output=str(tmp_path / "out"),
        recover="none",
    )
    console = Console(quiet=True)
    done = deploy(recipe, console=console)
    (text,) = done.verdict.warnings
    assert "do not look like" in text
    assert text.splitlines()[1].startswith("input 'x': ")
    report = html.unescape((tmp_path / "out" / "report.html").read_text())
    assert "<h2>Warnings</h2>" in report
    assert "do not look like the evaluation data<br>" in report
    assert not console.warnings  # those of a job are its own
