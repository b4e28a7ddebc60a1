"""The command line: what it leaves, what it says, and its exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import onnx.reference
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from jobs import Case, Deployed, Run, conv_case, deploy_arguments, save_case

import trtq
from trtq.calibration.table import Table
from trtq.errors import ExitCode

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

CONTRACT = {
    "calibration.cache",
    "calibration.cache.json",
    "junit.xml",
    "manifest.json",
    "model.int8.onnx",
    "model.plan",
    "model.plan.json",
    "plan.json",
    "recipe.toml",
    "report.html",
    "report.json",
    "verdict.json",
    "workflow.json",
}

REPEATED = ("calibration.cache", "plan.json", "model.int8.onnx", "verdict.json", "report.html")


def lasting(path: Path) -> bytes:
    """The bytes of a result without what the report says of the run: when it was, and its command."""
    content = path.read_bytes()
    if path.name == "report.html":
        content, times = re.subn(rb"<time .*?</time>", b"", content)
        content, commands = re.subn(rb"<dt>Command</dt>.*?</dd>", b"", content, flags=re.DOTALL)
        assert (times, commands) == (1, 1)
    return content


DEMO = Path(trtq.__file__).parent / "demo"

Command = Callable[..., Run]


def in_process(*arguments: object, prelude: str = "", **settings: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own; `prelude` runs first."""
    code = f"{prelude}\nimport sys\nfrom trtq.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **settings)  # type: ignore[call-overload]


def assert_refused(run: Run, problem: str, *, code: int = ExitCode.BAD_INPUT) -> None:
    """One readable message, the right exit code, and no traceback."""
    assert run.code == code
    assert run.err.count("trtq: ") == 1
    assert problem in run.err
    assert "Traceback" not in run.err
    assert "internal error" not in run.err
    assert run.out == ""


def assert_error_is_left(folder: Path, problem: str) -> None:
    """Of a job that ended with an error nothing is there but a JUnit file that says so."""
    assert [path.name for path in folder.iterdir()] == ["junit.xml"]
    suite = ElementTree.parse(folder / "junit.xml").getroot()
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["1", "0", "1", "0"]
    assert problem in suite.findtext("testcase/error", "")


# --- demo -------------------------------------------------------------------------------------------------


def test_demo_passes_and_leaves_the_files_of_the_contract(demo: Deployed) -> None:
    assert demo.run.code == ExitCode.PASS
    assert demo.run.out.splitlines()[-1].startswith("PASS  top1 on 500 samples")
    assert {path.name for path in demo.folder.iterdir()} == CONTRACT
    assert [path.name for path in demo.folder.parent.iterdir() if path.name.startswith(".")] == []


def test_demo_verdict_is_complete(demo: Deployed) -> None:
    verdict = json.loads((demo.folder / "verdict.json").read_text())
    assert verdict["outcome"] == "pass"
    assert verdict["executor"] in ("simulation", "engine")
    assert verdict["samples"] == 500
    assert verdict["max_drop"] == 0.01
    low, high = verdict["relative_interval"]
    assert low <= verdict["relative_drop"] <= high
    assert verdict["relative_drop"] == pytest.approx(1 - verdict["candidate"] / verdict["reference"])
    assert verdict["absolute_drop"] == pytest.approx(verdict["reference"] - verdict["candidate"])
    assert verdict["outputs"].keys() == {"logits"}


def test_demo_verdict_is_what_onnx_s_reference_measures(demo: Deployed) -> None:
    """It rounds float16 tensors, which ONNX Runtime does not."""
    with np.load(DEMO / "eval.npz") as stored:
        data = dict(stored)
    scores = []
    for model in (DEMO / "digits.onnx", demo.folder / "model.int8.onnx"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (found,) = onnx.reference.ReferenceEvaluator(str(model)).run(None, {"image": data["image"]})
        scores.append(np.mean(found.argmax(axis=1) == data["label"]))
    verdict = json.loads((demo.folder / "verdict.json").read_text())
    assert verdict["reference"] == pytest.approx(scores[0])
    assert verdict["candidate"] == pytest.approx(
        scores[1], abs=0.0021
    )  # one sample may tip with the batch size


def test_demo_junit_is_one_passed_case(demo: Deployed) -> None:
    suite = ElementTree.parse(demo.folder / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("1", "0", "0")
    (case,) = suite.iter("testcase")
    assert (case.get("classname"), case.get("name")) == ("digits.onnx", "accuracy gate top1")
    properties = {item.get("name"): item.get("value") for item in suite.iter("property")}
    verdict = json.loads((demo.folder / "verdict.json").read_text())
    assert {name: properties[name] for name in ("model", "outcome")} == {
        "model": "digits.onnx",
        "outcome": "pass",
    }
    assert float(properties["candidate"]) == pytest.approx(verdict["candidate"])
    assert 0 < float(suite.get("time", "0")) == float(case.get("time", "0"))


def test_demo_manifest_has_the_hashes_of_its_files(demo: Deployed) -> None:
    manifest = json.loads((demo.folder / "manifest.json").read_text())
    assert manifest["outputs"].keys() == CONTRACT - {"manifest.json"}
    for name, entry in manifest["outputs"].items():
        content = (demo.folder / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (entry["sha256"], entry["bytes"]), name
    model = Path(manifest["inputs"]["model"]["file"])
    assert hashlib.sha256(model.read_bytes()).hexdigest() == manifest["inputs"]["model"]["sha256"]
    assert manifest["command"].startswith("trtq demo -o ")


def test_a_second_run_repeats_every_byte_and_runs_no_inference(
    demo: Deployed, tmp_path: Path, trtq_run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was run again")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", refuse)
    again = trtq_run("demo", "-o", tmp_path / "again", "--cache", demo.cache)
    assert again.code == ExitCode.PASS
    assert again.err.count("nothing was run") == 3  # table, outputs of the reference and of the candidate
    for name in REPEATED:
        assert lasting(tmp_path / "again" / name) == lasting(demo.folder / name), name


@pytest.mark.slow
def test_a_run_without_the_cache_repeats_every_byte(
    demo: Deployed, tmp_path: Path, trtq_run: Command
) -> None:
    trtq_run("demo", "-o", tmp_path / "again", "--threads", 1)
    for name in REPEATED:
        assert lasting(tmp_path / "again" / name) == lasting(demo.folder / name), name


# --- exit codes -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_exit_1_where_the_engine_runs_too_little_in_int8(
    small: Case, tmp_path: Path, trtq_run: Command
) -> None:
    options = ("--method", "max", "--exclude", "conv", "--min-int8", "90%")
    run = trtq_run(*deploy_arguments(small, tmp_path / "out", *options))
    assert run.code == ExitCode.FAIL
    assert run.out.splitlines()[-1].startswith("FAIL  --min-int8: the engine runs")
    assert run.out.endswith("(the gate itself passes)\n")
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")


def broken(case: Case, path: Path) -> Path:
    """The model with its classes in another order."""
    graph = gs.import_onnx(onnx.load(case.model))
    weight = graph.tensors()["fc"]
    weight.values = np.roll(weight.values, 1, axis=1)
    onnx.save(gs.export_onnx(graph), path)
    return path


def test_exit_1_where_the_gate_fails(small: Case, tmp_path: Path, trtq_run: Command) -> None:
    candidate = broken(small, tmp_path / "broken.onnx")
    files = ("--json", tmp_path / "verdict.json", "--junit", tmp_path / "junit.xml")
    run = trtq_run("gate", small.model, candidate, "--eval", small.data, "--metric", "top1", *files)
    assert run.code == ExitCode.FAIL
    assert run.out.splitlines()[-1].startswith("FAIL  top1 on 40 samples: reference 1.0000")
    assert json.loads((tmp_path / "verdict.json").read_text())["outcome"] == "fail"
    assert ElementTree.parse(tmp_path / "junit.xml").getroot().get("failures") == "1"


@pytest.mark.parametrize("option", [("--confidence", "0.99999"), ("--require-engine",)])
def test_exit_3_where_nothing_is_proved(option: tuple[str, ...], small: Case, trtq_run: Command) -> None:
    run = trtq_run("gate", small.model, small.model, "--eval", small.data, "--metric", "top1", *option)
    assert run.code == ExitCode.INCONCLUSIVE
    assert run.out.splitlines()[-1].startswith("INCONCLUSIVE")


def test_exit_4_without_a_builder(small: Case, tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['tensorrt_rtx'] = None"
    run = in_process(*deploy_arguments(small, tmp_path / "out"), prelude=hidden)
    assert run.returncode == ExitCode.MISSING_BACKEND
    assert "pip install 'trtq[rtx]'" in run.stderr
    assert "Traceback" not in run.stderr
    assert_error_is_left(tmp_path / "out", "TensorRT for RTX")


@pytest.fixture
def passed(demo: Deployed, tmp_path: Path) -> Path:
    """A folder in which an earlier job passed, with a file of somebody else."""
    folder = Path(shutil.copytree(demo.folder, tmp_path / "out"))
    (folder / "mine.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("more", "code", "error"),
    [
        (("--data", "nowhere.npz"), ExitCode.BAD_INPUT, "the data does not exist"),
        (("--metric", "best"), ExitCode.BAD_INPUT, "unknown metric 'best'"),
        (("--require-engine",), ExitCode.INCONCLUSIVE, None),
    ],
)
def test_no_pass_of_an_earlier_job_stays(
    more: tuple[str, ...], code: int, error: str | None, small: Case, passed: Path, trtq_run: Command
) -> None:
    run = trtq_run(*deploy_arguments(small, passed, "--method", "max", *more))
    assert run.code == code
    assert (passed / "mine.json").read_text() == "{}"
    suite = ElementTree.parse(passed / "junit.xml").getroot()
    assert suite.get("errors") == str(int(error is not None))
    if error is None:
        assert json.loads((passed / "verdict.json").read_text())["outcome"] == "inconclusive"
        assert suite.get("skipped") != "0"
        return
    assert error in suite.findtext("testcase/error", "")
    for name in ("verdict.json", "workflow.json", "report.html"):
        assert not (passed / name).exists()
    assert (passed / "model.plan").exists()  # what was made is still what it was


def test_a_job_without_its_options_leaves_no_earlier_pass(passed: Path, trtq_run: Command) -> None:
    assert trtq_run("deploy", "-o", passed).code == ExitCode.BAD_INPUT
    assert not (passed / "verdict.json").exists()
    assert "MODEL, --data, --eval and --metric are missing" in (passed / "junit.xml").read_text()


def test_a_job_that_is_killed_leaves_no_earlier_pass(small: Case, passed: Path, tmp_path: Path) -> None:
    (tmp_path / "metric.py").write_text(
        "import os, signal\n\n\ndef metric(outputs, targets):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = in_process(*deploy_arguments(small, passed, metric=f"{tmp_path}/metric.py:metric"))
    assert run.returncode == -signal.SIGKILL
    assert not (passed / "verdict.json").exists()
    error = ElementTree.parse(passed / "junit.xml").getroot().find("testcase/error")
    assert error is not None
    assert "has not finished" in str(error.get("message"))


def test_files_of_others_are_no_earlier_verdict(small: Case, tmp_path: Path, trtq_run: Command) -> None:
    names = {"verdict.json": '{"outcome": "pass"}', "report.html": "<html>", "workflow.json": "[]"}
    for name, content in names.items():
        (tmp_path / name).write_text(content)
    run = trtq_run(*deploy_arguments(small, tmp_path, "--data", "nowhere.npz"))
    assert run.code == ExitCode.BAD_INPUT
    assert {name: (tmp_path / name).read_text() for name in names} == names


def test_gate_leaves_its_error_in_the_file_of_junit(small: Case, tmp_path: Path, trtq_run: Command) -> None:
    files = {name: tmp_path / f"{name}.file" for name in ("json", "junit")}
    gate = ("gate", small.model, small.model, "--eval", small.data, "--metric", "top1")
    asked = [part for name, file in files.items() for part in (f"--{name}", file)]
    assert trtq_run(*gate, *asked).code == ExitCode.PASS
    assert trtq_run(*gate, *asked, "--min-reference", 2).code == ExitCode.BAD_INPUT
    assert not files["json"].exists()
    suite = ElementTree.parse(files["junit"]).getroot()
    assert suite.get("errors") == "1"
    assert "at least 2 is required" in suite.findtext("testcase/error", "")


def test_exit_4_for_an_engine_without_a_gpu(demo: Deployed, small: Case, trtq_run: Command) -> None:
    engine = demo.folder / "model.plan"
    run = trtq_run("gate", small.model, engine, "--eval", small.data, "--metric", "top1")
    assert_refused(run, "an engine runs only on an NVIDIA GPU", code=ExitCode.MISSING_BACKEND)


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "required: COMMAND"),
        (("deploy",), "MODEL, --data, --eval, --metric and --output are missing"),
        (("deploy", "{model}"), "--data, --eval, --metric and --output are missing"),
        (("migrate",), "MODEL, --table and --output are missing"),
        (("deploy", "nowhere.onnx", "{all}"), "the model does not exist"),
        (("deploy", "{folder}", "{all}"), "the model is a folder"),
        (("deploy", "{data}", "{all}"), "not an ONNX model"),
        (("deploy", "{truncated}", "{all}"), "truncated"),
        (("deploy", "{model}", "{all}", "--data", "nowhere.npz"), "the data does not exist"),
        (("deploy", "{model}", "{all}", "--method", "best"), "unknown calibration method 'best'"),
        (("deploy", "{model}", "{all}", "--metric", "best"), "unknown metric 'best'"),
        (("deploy", "{model}", "{all}", "--metric", "sqnr"), "sqnr cannot decide"),
        (("deploy", "{model}", "{all}", "--metric", "top5"), "top5 needs an output"),
        (("deploy", "{model}", "{all}", "--max-drop", "101%"), "--max-drop is '101%'"),
        (("deploy", "{model}", "{all}", "--min-int8", "nan"), "--min-int8 is 'nan'"),
        (("deploy", "{model}", "{all}", "--confidence", "nan"), "--confidence is nan"),
        (("deploy", "{model}", "{all}", "--batch", "0"), "--batch is 0"),
        (("deploy", "{model}", "{all}", "--batch", "four"), "--batch is 'four'"),
        (("deploy", "{model}", "{all}", "--budget", "1d"), "--budget is '1d'"),
        (("deploy", "{model}", "{all}", "--recover", "fixes"), "--recover is 'fixes'"),
        (("deploy", "{model}", "{all}", "--max-drop", "2", "--recipe", "none.toml"), "--max-drop is '2'"),
        (("deploy", "{model}", "{all}", "--backend", "abacus"), "invalid choice: 'abacus'"),
        (("deploy", "{model}", "{all}", "--target", "9.9"), "compute capability 9.9"),
        (("deploy", "{model}", "{all}", "--profile", "x:0x3x8x8"), "is not an optimization profile"),
        (("deploy", "{model}", "{all}", "--profile", "y:1x3x8x8"), "names 'y', which is no input"),
        (("deploy", "{model}", "{all}", "--profile", "x:1x3x9x9"), "does not fit input 'x'"),
        (("deploy", "{model}", "{all}", "--exclude", "nothing"), "'nothing' matches no node"),
        (("deploy", "{model}", "{all}", "--exclude", "*"), "no node of the model can be quantized"),
        (("deploy", "{model}", "{all}", "-o", "{model}"), "cannot write"),
        (("deploy", "{model}", "{all}", "--cache", "{model}"), "the cache is not a folder"),
        (("deploy", "{model}", "{all}", "--recipe", "nowhere.toml"), "cannot read the recipe"),
        (("quantize", "{model}", "-o", "{folder}/q.onnx"), "--data or --table is missing"),
        (("cache", "prune", "--days", "nan"), "--days is nan"),
        (("report", "{folder}"), "the folder holds no results"),
        (("inspect", "{folder}"), "the folder holds no results"),
    ],
)
def test_exit_2_for_bad_input(
    arguments: tuple[str, ...], problem: str, small: Case, tmp_path: Path, trtq_run: Command
) -> None:
    output, folder, truncated = (tmp_path / name for name in ("out", "folder", "truncated.onnx"))
    folder.mkdir()
    truncated.write_bytes(small.model.read_bytes()[:-100])
    names = {"model": small.model, "data": small.data, "folder": folder, "truncated": truncated}
    everything = ("--data", small.data, "--eval", small.data, "--metric", "cosine", "-o", output)
    given: list[object] = []
    for argument in arguments:
        given += everything if argument == "{all}" else [argument.format(**names)]
    assert_refused(trtq_run(*given), problem)
    if output.exists():  # what a CI shows; where nothing else can be wrong with the output
        assert_error_is_left(output, problem)
    assert sorted(tmp_path.glob(".*")) == []


def test_a_model_without_weighted_nodes_is_refused(tmp_path: Path, trtq_run: Command) -> None:
    graph = gs.Graph(opset=17)
    graph.inputs, graph.outputs = (
        [gs.Variable("x", np.float32, ["N", 4])],
        [gs.Variable("y", np.float32, ["N", 4])],
    )
    graph.nodes = [gs.Node("Relu", "relu", {}, graph.inputs, graph.outputs)]
    case = save_case(graph, tmp_path, {"x": np.ones((4, 4), np.float32)})
    assert_refused(
        trtq_run(*deploy_arguments(case, tmp_path / "out")), "no node of the model can be quantized"
    )


def test_a_quantized_model_is_refused(demo: Deployed, tmp_path: Path, trtq_run: Command) -> None:
    case = Case(demo.folder / "model.int8.onnx", DEMO / "calib.npz")
    assert_refused(trtq_run(*deploy_arguments(case, tmp_path / "out")), "the model is quantized already")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("raise RuntimeError('no')", "RuntimeError: no"),
        ("return float('nan')", "did not return a number"),
        ("return -1.0", "the reference scores -1"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import no_such_package", "No module named 'no_such_package'"),
    ],
)
def test_a_bad_metric_is_found_before_the_work(
    body: str, problem: str, small: Case, tmp_path: Path, trtq_run: Command
) -> None:
    (tmp_path / "metric.py").write_text(f"def metric(outputs, targets):\n    {body}\n")
    run = trtq_run(*deploy_arguments(small, tmp_path / "out", metric=f"{tmp_path}/metric.py:metric"))
    assert_refused(run, problem)
    assert "statistics" not in run.err
    assert_error_is_left(tmp_path / "out", problem)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (np.full(40, 2**40), "is not a class"),
        (np.full(40, -1), "negative label"),
        (np.full(40, 0.5), "does not hold class numbers"),
        (np.array(["a"] * 40), "does not hold class numbers"),
        (np.zeros((40, 4), int), "one label per row"),
        (np.zeros(33, int), "target 'labels' has shape (33,) for 40 rows"),
        (None, "needs targets"),
    ],
)
def test_bad_labels_are_found_before_the_work(
    labels: np.ndarray | None, problem: str, small: Case, tmp_path: Path, trtq_run: Command
) -> None:
    with np.load(small.data) as stored:
        arrays = {"x": stored["x"]} | ({} if labels is None else {"labels": labels})
    np.savez(tmp_path / "eval.npz", **arrays)
    arguments = deploy_arguments(small, tmp_path / "out", "--eval", tmp_path / "eval.npz", metric="top1")
    run = trtq_run(*arguments)
    assert_refused(run, problem)
    assert str(tmp_path / "eval.npz") in run.err
    assert "statistics" not in run.err


def test_debug_shows_the_traceback(trtq_run: Command) -> None:
    run = trtq_run("inspect", "nowhere", "--debug")
    assert run.code == ExitCode.BAD_INPUT
    assert "Traceback" in run.err


# --- what else can happen ---------------------------------------------------------------------------------


def test_other_files_of_the_output_folder_stay(small: Case, tmp_path: Path, trtq_run: Command) -> None:
    output = tmp_path / "ein Ordner ü"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    (output / "model.plan").write_text("old")
    assert trtq_run(*deploy_arguments(small, output, "--method", "max", "-q")).err == ""
    assert (output / "mine.txt").read_text() == "mine"
    assert {path.name for path in output.iterdir()} == CONTRACT | {"mine.txt"}
    assert (output / "model.plan").read_bytes()[:4] == b"vtrt"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGINT of POSIX")
@pytest.mark.parametrize("line", ["data", "plan", "statistics", "method"])
def test_ctrl_c_leaves_nothing(line: str, tmp_path: Path) -> None:
    code = "import sys; from trtq.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "demo", "-o", str(tmp_path / "new" / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for said in process.stderr:
            if said.split()[0] == line:
                break
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-1].startswith("trtq: interrupted; no result was written")
    assert "Traceback" not in rest
    assert [path for path in tmp_path.iterdir() if path.name != "cache"] == []


@pytest.mark.slow
def test_two_at_once_share_cache_and_output(small: Case, tmp_path: Path, trtq_run: Command) -> None:
    code = "import sys; from trtq.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, deploy_arguments(small, tmp_path / "out", "-q"))]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[1] for process in both] == ["", ""]
    assert [process.returncode for process in both] == [0, 0]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for name, entry in manifest["outputs"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"], name
    assert trtq_run("cache", "verify").code == ExitCode.PASS


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_the_exit_code_survives_a_reader_that_has_gone(small: Case, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    candidate = broken(small, tmp_path / "broken.onnx")
    code = "import sys; from trtq.cli.main import main; sys.exit(main(sys.argv[1:]))"
    arguments = ("gate", small.model, candidate, "--eval", small.data, "--metric", "top1", "-q")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, check=False
    )
    os.close(writing)
    assert run.returncode == ExitCode.FAIL
    assert run.stderr == ""


# --- the other commands -----------------------------------------------------------------------------------


def test_the_steps_equal_deploy(small: Case, tmp_path: Path, trtq_run: Command) -> None:
    options = ("--method", "percentile:99.9")
    without_fixes = deploy_arguments(small, tmp_path / "out", *options, "--recover", "none")
    assert trtq_run(*without_fixes).code == ExitCode.PASS
    table, int8, engine = (tmp_path / name for name in ("t.cache", "q.onnx", "e.plan"))
    assert trtq_run("calibrate", small.model, "--data", small.data, *options, "-o", table).code == 0
    assert trtq_run("quantize", small.model, "--table", table, "--data", small.data, "-o", int8).code == 0
    built = trtq_run("build", int8, "-o", engine, "--min-int8", "100%")
    assert built.code == ExitCode.PASS
    assert "2 of 2 weighted nodes in INT8, 100.0%" in built.out
    verdict = tmp_path / "verdict.json"
    gated = trtq_run("gate", small.model, int8, "--eval", small.data, "--metric", "cosine", "--json", verdict)
    assert gated.code == ExitCode.PASS
    for ours, theirs in ((table, "calibration.cache"), (int8, "model.int8.onnx")):
        assert ours.read_bytes() == (tmp_path / "out" / theirs).read_bytes(), theirs
    alone, whole = (json.loads(path.read_text()) for path in (verdict, tmp_path / "out" / "verdict.json"))
    assert "40 of 40 evaluation rows are also calibration rows" in whole["warnings"][0]
    assert alone == whole | {"warnings": []}  # the gate alone knows nothing of the calibration data


def test_a_method_is_one_in_every_spelling(small: Case, tmp_path: Path, trtq_run: Command) -> None:
    tables = []
    for text in ("percentile:99.9", "Percentile:99.90", " PERCENTILE:9.99e1"):
        tables.append(tmp_path / f"{len(tables)}.cache")
        arguments = ("calibrate", small.model, "--data", small.data, "--method", text, "-o", tables[-1])
        run = trtq_run(*arguments)
        assert run.code == ExitCode.PASS
        assert ("from the cache; nothing was run" in run.err) == (len(tables) > 1)
    assert len({table.read_bytes() for table in tables}) == 1
    assert {Table.load(table).metadata["method"] for table in tables} == {"percentile:99.9"}


def test_auto_is_spelled_like_the_methods(small: Case, tmp_path: Path, trtq_run: Command) -> None:
    table = tmp_path / "t.cache"
    arguments = ("calibrate", small.model, "--data", small.data, "-o", table)
    assert trtq_run(*arguments, "--method", "AUTO").code == ExitCode.PASS
    assert Table.load(table).metadata["requested"] == "auto"
    assert "from the cache" in trtq_run(*arguments).err


def test_a_method_that_is_none_is_refused_before_any_work(tmp_path: Path, trtq_run: Command) -> None:
    run = trtq_run("calibrate", "no.onnx", "--data", "no.npz", "--method", "nope", "-o", tmp_path / "t.cache")
    assert_refused(run, "unknown calibration method 'nope'")


def test_quantize_refuses_the_table_of_another_model(
    demo: Deployed, small: Case, tmp_path: Path, trtq_run: Command
) -> None:
    table = demo.folder / "calibration.cache"
    run = trtq_run("quantize", small.model, "--table", table, "-o", tmp_path / "q.onnx")
    assert_refused(run, "the table was made for another model")


def test_the_command_line_wins_over_the_recipe(small: Case, tmp_path: Path, trtq_run: Command) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'model = "{small.model}"\ndata = "{small.data}"\neval = "{small.data}"\nmetric = "cosine"\n'
        'method = "max"\nmax-drop = "3%"\noutput = "from-recipe"\n'
    )
    assert trtq_run("deploy", "--recipe", recipe, "--method", "percentile:90", "--max-drop", "50%").code == 0
    output = tmp_path / "from-recipe"
    assert Table.load(output / "calibration.cache").metadata["method"] == "percentile:90"
    assert json.loads((output / "verdict.json").read_text())["max_drop"] == 0.5


def test_the_resolved_recipe_repeats_the_job(small: Case, tmp_path: Path, trtq_run: Command) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    options = ("--method", "entropy", "--exclude", "classes", "--weights", "qdq", "--max-drop", "20%")
    trtq_run(*deploy_arguments(small, first, *options))
    trtq_run("deploy", "--recipe", first / "recipe.toml", "-o", second, "--cache", tmp_path / "other")
    for name in REPEATED:
        assert lasting(first / name) == lasting(second / name), name


def test_quantizing_equals_deploy_with_its_free_fixes(small: Case, tmp_path: Path, trtq_run: Command) -> None:
    assert trtq_run(*deploy_arguments(small, tmp_path / "out")).code == ExitCode.PASS
    int8 = tmp_path / "q.onnx"
    assert trtq_run("quantize", small.model, "--data", small.data, "-o", int8).code == ExitCode.PASS
    assert int8.read_bytes() == (tmp_path / "out" / "model.int8.onnx").read_bytes()


def test_a_damaged_cache_entry_is_reported_and_made_again(
    small: Case, tmp_path: Path, trtq_run: Command
) -> None:
    trtq_run(*deploy_arguments(small, tmp_path / "one", "--method", "max", "--recover", "none"))
    assert trtq_run("cache", "verify").code == ExitCode.PASS
    (table,) = (tmp_path / "cache").glob("*/*/table-*.cache")
    content = table.read_bytes()
    table.write_bytes(content[:-3] + b"00\n")
    assert trtq_run("cache", "verify").code == ExitCode.FAIL
    run = trtq_run(*deploy_arguments(small, tmp_path / "two", "--method", "max", "--recover", "none"))
    assert run.code == ExitCode.PASS
    assert f"{table} is damaged" in run.err
    assert table.read_bytes() == content
    assert trtq_run("cache", "verify").code == ExitCode.PASS


def test_two_spellings_of_a_method_are_one(small: Case, tmp_path: Path, trtq_run: Command) -> None:
    for spellings in (("max", "MAX"), ("auto", " Auto")):
        for method, cached in zip(spellings, (False, True), strict=True):
            arguments = ("--data", small.data, "--method", method, "-o", tmp_path / "t.cache")
            run = trtq_run("calibrate", small.model, *arguments)
            assert run.code == 0, run.err
            assert ("from the cache; nothing was run" in run.err) is cached


def test_cache_list_show_and_prune(small: Case, tmp_path: Path, trtq_run: Command) -> None:
    trtq_run(*deploy_arguments(small, tmp_path / "one", "--method", "max", "--recover", "none"))
    listed = trtq_run("cache", "list").out.splitlines()
    kinds = [line.rpartition("/")[2].partition("-")[0] for line in listed[:-1]]
    assert sorted(kinds) == ["extents", *["outputs"] * 4, "reach", "statistics", "table"]
    assert listed[-1].startswith("8 entries, 0 damaged")
    assert '"requested": "max"' in trtq_run("cache", "show").out
    assert trtq_run("cache", "prune").out.startswith("0 of 8 entries removed")
    assert trtq_run("cache", "prune", "--days", 0).out.startswith("8 of 8 entries removed")
    assert trtq_run("cache", "list").out.startswith("0 entries")


def test_cache_list_has_dates_sizes_and_models_and_filters(
    small: Case, tmp_path: Path, trtq_run: Command
) -> None:
    other = conv_case(tmp_path, 4)
    other.model.rename(tmp_path / "other.onnx")
    for model, data in ((small.model, small.data), (tmp_path / "other.onnx", other.data)):
        trtq_run("calibrate", model, "--data", data, "--method", "max", "-o", tmp_path / "t.cache")

    def listed(*more: object) -> list[str]:
        return trtq_run("cache", "list", *more).out.splitlines()

    everything = listed()
    assert all(line.startswith(time.strftime("%Y-")) for line in everything[:-1])
    total = sum(int(line.split()[2].replace(",", "")) for line in everything[:-1])
    assert f"{total / 1e6:.1f} MB" in everything[-1]
    of_other = listed("--model", "oth*")
    assert 1 < len(of_other) < len(everything)
    assert all("other.onnx" in line for line in of_other[:-1])
    assert listed("--model", tmp_path / "other.onnx") == of_other
    assert len(listed("--kind", "table")) == 3
    assert len(listed("--kind", "table", "--model", small.model)) == 2
    pruned = trtq_run("cache", "prune", "--days", 0, "--model", "oth*").out
    assert pruned.startswith(f"{len(of_other) - 1} of {len(everything) - 1} entries removed")


def test_a_job_without_a_builder_quantizes_and_gates(small: Case, tmp_path: Path, trtq_run: Command) -> None:
    out = tmp_path / "out"
    options = ("--method", "max", "--backend", "none", "--min-int8", "100%")
    hidden = "import sys; sys.modules['tensorrt_rtx'] = None"
    run = in_process(*deploy_arguments(small, out, *options), prelude=hidden)
    assert run.returncode == ExitCode.PASS, run.stderr
    assert f"{out}/model.int8.onnx" in run.stdout
    assert {path.name for path in out.iterdir()} == CONTRACT - {"model.plan", "model.plan.json"}
    verdict = json.loads((out / "verdict.json").read_text())
    assert (verdict["executor"], verdict["outcome"]) == ("simulation", "pass")
    (check,) = verdict["checks"]
    assert "without an engine, the plan has 100.0% in INT8" in check["message"]
    versions = json.loads((out / "manifest.json").read_text())["versions"]
    assert "trtq" in versions
    assert "tensorrt-rtx" not in versions
    assert ElementTree.parse(out / "junit.xml").getroot().get("failures") == "0"
    assert "none was asked for (--backend none)" in (out / "report.html").read_text()
    assert trtq_run("report", out).code == ExitCode.PASS
    assert trtq_run("inspect", out / "model.int8.onnx").code == ExitCode.PASS
    required = trtq_run(*deploy_arguments(small, tmp_path / "other", *options, "--require-engine"))
    assert required.code == ExitCode.INCONCLUSIVE


def test_without_a_builder_the_plan_has_to_have_the_share(
    small: Case, tmp_path: Path, trtq_run: Command
) -> None:
    options = ("--method", "max", "--backend", "none", "--min-int8", "100%", "--exclude", "classes")
    run = trtq_run(*deploy_arguments(small, tmp_path / "out", *options, "--recover", "none"))
    assert run.code == ExitCode.FAIL
    assert "without an engine, the plan has" in run.out


def test_other_commands_need_a_builder(small: Case, tmp_path: Path, trtq_run: Command) -> None:
    run = trtq_run("build", small.model, "--backend", "none", "-o", tmp_path / "model.plan")
    assert_refused(run, "--backend none builds no engine")


def test_report_is_made_again(demo: Deployed, tmp_path: Path, trtq_run: Command) -> None:
    for path in demo.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "report.html").unlink()
    assert trtq_run("report", tmp_path).code == ExitCode.PASS
    assert (tmp_path / "report.html").read_bytes() == (demo.folder / "report.html").read_bytes()


def test_doctor_says_what_works(trtq_run: Command) -> None:
    run = trtq_run("doctor")
    assert run.code == ExitCode.PASS
    assert "ok  build engines" in run.out
    assert "ok  simulate INT8" in run.out


@pytest.mark.parametrize(
    "command",
    ["demo", "deploy", "calibrate", "quantize", "build", "gate", "inspect", "cache", "report", "doctor"],
)
def test_help(command: str, capsys: pytest.CaptureFixture[str], trtq_run: Command) -> None:
    with pytest.raises(SystemExit) as ended:
        trtq_run(command, "--help")
    assert ended.value.code == 0


# --- kinds of models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
@pytest.mark.parametrize("weights", ["int8", "qdq"])
def test_forms_of_the_int8_model(
    rest: str, weights: str, small: Case, tmp_path: Path, trtq_run: Command
) -> None:
    options = ("--method", "max", "--rest", rest, "--weights", weights)
    assert trtq_run(*deploy_arguments(small, tmp_path / "out", *options)).code == ExitCode.PASS
    graph = onnx.load(tmp_path / "out" / "model.int8.onnx").graph
    codes = [i for i in graph.initializer if i.data_type == onnx.TensorProto.INT8 and len(i.dims) > 1]
    halves = [i for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT16]
    assert len(codes) == (2 if weights == "int8" else 0)
    assert bool(halves) == (rest == "fp16")


@pytest.mark.parametrize(
    ("option", "int8"), [(("--exclude", "conv"), ["classes"]), (("--include", "op:Conv"), ["conv"])]
)
def test_include_and_exclude(
    option: tuple[str, str], int8: list[str], small: Case, tmp_path: Path, trtq_run: Command
) -> None:
    assert trtq_run(*deploy_arguments(small, tmp_path / "out", "--method", "max", *option)).code == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [node["name"] for node in plan["nodes"] if node["int8"]] == int8


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch(batch: int, tmp_path: Path, trtq_run: Command) -> None:
    case = conv_case(tmp_path, batch, rows=10)  # 10 is no multiple of 4
    run = trtq_run(*deploy_arguments(case, tmp_path / "out", "--max-drop", "10%", metric="top1"))
    assert run.code == ExitCode.PASS
    assert "top1 on 10 samples: reference 1.0000" in run.out


def test_several_inputs_and_outputs(tmp_path: Path, trtq_run: Command) -> None:
    random = np.random.default_rng(1)
    graph = gs.Graph(opset=17)
    graph.inputs = [gs.Variable("a", np.float32, ["N", 6]), gs.Variable("b", np.float32, ["N", 7])]
    u, v = gs.Variable("u", np.float32, ["N", 5]), gs.Variable("v", np.float32, ["N", 5])
    graph.outputs = [gs.Variable("y", np.float32, ["N", 5]), gs.Variable("z", np.float32, ["N", 5])]
    weights = [gs.Constant(f"w{n}", random.normal(size=(n, 5)).astype(np.float32)) for n in (6, 7)]
    graph.nodes = [
        gs.Node("MatMul", "left", {}, [graph.inputs[0], weights[0]], [u]),
        gs.Node("MatMul", "right", {}, [graph.inputs[1], weights[1]], [v]),
        gs.Node("Add", "sum", {}, [u, v], [graph.outputs[0]]),
        gs.Node("Softmax", "softmax", {"axis": -1}, [u], [graph.outputs[1]]),
    ]
    inputs = {n: random.normal(size=(40, w)).astype(np.float32) for n, w in (("a", 6), ("b", 7))}
    case = save_case(graph, tmp_path, inputs)
    assert trtq_run(*deploy_arguments(case, tmp_path / "out")).code == ExitCode.PASS
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert verdict["outputs"].keys() == {"y", "z"}
    assert_refused(trtq_run(*deploy_arguments(case, tmp_path / "two", metric="top1")), "several outputs")


def test_a_float16_model(tmp_path: Path, trtq_run: Command) -> None:
    graph = gs.Graph(opset=13)
    graph.inputs = [gs.Variable("x", np.float16, ["N", 16])]
    graph.outputs = [gs.Variable("y", np.float16, ["N", 4])]
    weight = gs.Constant("w", np.random.default_rng(0).normal(size=(16, 4)).astype(np.float16))
    graph.nodes = [gs.Node("MatMul", "matmul", {}, [*graph.inputs, weight], graph.outputs)]
    x = np.random.default_rng(1).normal(size=(20, 16)).astype(np.float16)
    run = trtq_run(*deploy_arguments(save_case(graph, tmp_path, {"x": x}), tmp_path / "out"))
    assert run.code == ExitCode.PASS


def test_candidates_that_differ_in_external_data_only_are_told_apart(
    small: Case, tmp_path: Path, trtq_run: Command
) -> None:
    outcomes = []
    for name, source in (("good", small.model), ("bad", broken(small, tmp_path / "broken.onnx"))):
        (tmp_path / name).mkdir()
        model = tmp_path / name / "model.onnx"
        proto = onnx.load(source)
        proto.producer_name = proto.graph.name = ""
        proto.ir_version = 10
        onnx.save(proto, model, save_as_external_data=True, location="weights", size_threshold=0)
        outcomes.append(trtq_run("gate", small.model, model, "--eval", small.data, "--metric", "top1").code)
    assert (tmp_path / "good" / "model.onnx").read_bytes() == (tmp_path / "bad" / "model.onnx").read_bytes()
    assert outcomes == [ExitCode.PASS, ExitCode.FAIL]


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("onnxruntime", "tensorrt", "tensorrt_rtx", "torch", "numba", "polygraphy", "onnx")
    code = f"import sys, trtq, trtq.cli.main; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_simulated_job_does_not_load_torch(small: Case) -> None:
    arguments = ("gate", small.model, small.model, "--eval", small.data, "--metric", "top1", "-q")
    check = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))"
    run = in_process(*arguments, prelude=check)
    assert run.stdout.splitlines()[-1] == "False"
