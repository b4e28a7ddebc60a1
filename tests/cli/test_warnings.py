"""What used to be wrong in silence: each fault is named with its figures, and good data are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from jobs import Case, Deployed, Run
from nets import net, normal

from trtq.errors import ExitCode

Command = Callable[..., Run]


def warnings(run: Run) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in run.err.splitlines() if line.split()[:1] == ["warning"]]


def test_good_data_are_not_warned_of(demo: Deployed) -> None:
    assert warnings(demo.run) == []
    assert json.loads((demo.folder / "verdict.json").read_text())["warnings"] == []
    assert "<h2>Warnings</h2>" not in (demo.folder / "report.html").read_text()


@pytest.fixture
def parts(small: Case, tmp_path: Path) -> tuple[Path, Path]:
    """Rows 0 to 29 of the case to calibrate, 20 to 39 to evaluate, in another order."""
    with np.load(small.data) as data:
        x, labels = data["x"], data["labels"]
    order = np.arange(20, 40)[::-1]
    np.savez(tmp_path / "calib.npz", x=x[:30])
    np.savez(tmp_path / "eval.npz", x=x[order], labels=labels[order])
    return tmp_path / "calib.npz", tmp_path / "eval.npz"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sensitivity", "study", "deploy"])
def test_rows_that_both_data_have_are_counted(
    command: str, small: Case, parts: tuple[Path, Path], tmp_path: Path, trtq_run: Command
) -> None:
    more = ["--budget", "1s"] if command == "study" else []
    if command == "deploy":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
        more = ["-o", tmp_path / "out", "--recover", "none"]
    data = ("--data", parts[0], "--eval", parts[1], "--metric", "cosine", "--method", "max")
    run = trtq_run(command, small.model, *data, *more)
    assert run.code == ExitCode.PASS
    (text,) = warnings(run)
    assert text.startswith(
        "10 of 20 evaluation rows are also calibration rows (first: row 10 = calibration row 29)"
    )
    if command == "deploy":
        assert json.loads((tmp_path / "out" / "verdict.json").read_text())["warnings"] == [text]


def test_few_rows_and_rows_that_repeat(small: Case, tmp_path: Path, trtq_run: Command) -> None:
    with np.load(small.data) as data:
        x = data["x"]
    for name, rows, expected in (
        ("few", x[:15], ["15 calibration samples are too few to hold some back (16 are enough)"]),
        ("enough", x[:16], []),
        ("copies", np.repeat(x[:1], 40, axis=0), ["only 1 of the 40 calibration rows is distinct"]),
        ("repeated", np.tile(x[:3], (10, 1, 1, 1)), ["only 3 of the 30 calibration rows are distinct"]),
        ("doubled", np.tile(x[:16], (2, 1, 1, 1)), []),
    ):
        np.savez(tmp_path / "x.npz", x=rows)
        data = ("--data", tmp_path / "x.npz", "--method", "max", "-o", tmp_path / "t.cache")
        found = warnings(trtq_run("calibrate", small.model, *data))
        assert len(found) == len(expected), name
        assert all(map(str.startswith, found, expected)), (name, found)


@pytest.fixture
def guessed(small: Case, tmp_path: Path) -> Path:
    """The case's rows with labels that have nothing to do with them."""
    with np.load(small.data) as data:
        labels = np.roll(np.sort(data["labels"]), 7)
        np.savez(tmp_path / "guessed.npz", x=data["x"], labels=labels)
    return tmp_path / "guessed.npz"


def test_a_reference_near_chance(small: Case, guessed: Path, tmp_path: Path, trtq_run: Command) -> None:
    def gated(data: Path, *more: object) -> Run:
        return trtq_run(
            "gate",
            small.model,
            small.model,
            "--eval",
            data,
            "--metric",
            "top1",
            "--json",
            tmp_path / "v",
            *more,
        )

    run = gated(guessed)
    assert run.code == ExitCode.PASS  # equal models: but equal in what?
    verdict = json.loads((tmp_path / "v").read_text())
    (text,) = warnings(run)
    assert verdict["warnings"] == [text]
    assert text.startswith(f"the reference scores {verdict['reference']:.4g} in top1 on 40 samples, and 0.")
    assert warnings(gated(small.data)) == []

    refused = gated(guessed, "--min-reference", 0.9)
    assert refused.code == ExitCode.BAD_INPUT
    assert f"the reference scores {verdict['reference']:.4g} in top1, at least 0.9 is required" in refused.err
    assert "with the labels of other samples" in refused.err
    assert gated(small.data, "--min-reference", 0.9).code == ExitCode.PASS


def test_a_reference_below_what_was_asked_for_ends_the_job_before_anything_is_quantized(
    small: Case, guessed: Path, tmp_path: Path, trtq_run: Command
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    data = ("--data", small.data, "--eval", guessed, "--metric", "top1", "--min-reference", 0.9)
    run = trtq_run("deploy", small.model, *data, "-o", tmp_path / "out")
    assert run.code == ExitCode.BAD_INPUT
    assert "statistics" not in run.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["junit.xml"]


@pytest.fixture
def logarithms(tmp_path: Path) -> Path:
    """The logarithm of a product, on 40 positive rows, but for row 6: its products are negative."""
    model = net(
        "g (float[N,8] x) => (float[N,4] y) { h = MatMul(x, w) y = Log(h) }", w=np.abs(normal(8, 4)) + 0.1
    )
    onnx.save(model, tmp_path / "log.onnx")
    rows = np.abs(normal(40, 8, seed=1)) + 0.1
    rows[7, 0], rows[6] = 5, -rows[6]
    np.savez(tmp_path / "x.npz", x=rows.astype(np.float32))
    holed = net(
        "g (float[N,8] x) => (float[N,4] y) { h = MatMul(x, w) y = Log(h) }",
        w=np.where(np.arange(4) == 2, 0, np.abs(normal(8, 4)) + 0.1).astype(np.float32),
    )
    onnx.save(holed, tmp_path / "holed.onnx")
    np.savez(tmp_path / "positive.npz", x=np.abs(rows).astype(np.float32))
    return tmp_path


def test_outputs_that_are_not_finite_in_fp32(logarithms: Path, trtq_run: Command) -> None:
    """The search, sensitivity and the gate say the same of them."""
    model, data = logarithms / "log.onnx", logarithms / "x.npz"
    assert (
        trtq_run("quantize", model, "--data", data, "--method", "max", "-o", logarithms / "q.onnx").code == 0
    )
    for run in (
        trtq_run("calibrate", model, "--data", data, "-o", logarithms / "t.cache"),
        trtq_run("sensitivity", model, "--data", data, "--method", "max"),
        trtq_run("gate", model, logarithms / "q.onnx", "--eval", data, "--metric", "cosine"),
    ):
        assert run.code == ExitCode.BAD_INPUT
        assert "output 'y' of the reference is NaN or infinite in row 6\n" in run.err
        assert f"file:   {data}" in run.err
        assert "--ignore-nonfinite" in run.err


def test_what_is_finite_in_fp32_is_compared_if_asked_for(logarithms: Path, trtq_run: Command) -> None:
    model, data, q = logarithms / "holed.onnx", logarithms / "positive.npz", logarithms / "q.onnx"
    assert trtq_run("quantize", model, "--data", data, "-o", q).code == ExitCode.BAD_INPUT
    assert trtq_run("quantize", model, "--data", data, "--ignore-nonfinite", "-o", q).code == ExitCode.PASS
    # what was made and kept so is not taken where it was not asked for
    assert trtq_run("quantize", model, "--data", data, "-o", q).code == ExitCode.BAD_INPUT
    gate = ("gate", model, q, "--eval", data, "--metric", "cosine")
    assert trtq_run(*gate).code == ExitCode.BAD_INPUT
    passed = trtq_run(*gate, "--ignore-nonfinite")
    assert passed.code == ExitCode.PASS
    assert "40 of 160 values are not finite in the reference and were not compared" in passed.out

    recipe = logarithms / "recipe.toml"
    recipe.write_text("ignore_nonfinite = true\n")
    ranked = trtq_run("sensitivity", model, "--data", data, "--method", "max", "--recipe", recipe)
    assert ranked.code == ExitCode.PASS
    assert "every group in INT8: -" not in ranked.out


@pytest.mark.parametrize(
    "options",
    [("--method", "middle"), ("--metric", "best"), ("--metric", "sqnr"), ("--max-drop", "much")],
)
def test_wrong_options_are_found_before_the_model_is_read(
    options: tuple[str, str], small: Case, tmp_path: Path, trtq_run: Command
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    data = ("--data", tmp_path / "none.npz", "--eval", small.data, "-o", tmp_path / "out")
    metric = () if options[0] == "--metric" else ("--metric", "top1")
    run = trtq_run("deploy", tmp_path / "none.onnx", *data, *metric, *options)
    assert run.code == ExitCode.BAD_INPUT
    assert options[1] in run.err or "sqnr" in run.err
    assert "none.onnx" not in run.err
