"""Models with states and scalars, from command line to verdict, against loops over ONNX Runtime here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from jobs import trtq_command
from numpy.typing import NDArray

from trtq import Recipe
from trtq.backends.interface import Range
from trtq.console import SILENT
from trtq.job import Job, samples_of

RANDOM = np.random.default_rng(0)


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options)


def stream(
    path: Path, x: NDArray, sequence: NDArray, names: tuple[str, str, str, str], start: NDArray, **others: Any
) -> list[NDArray]:
    """The outputs of a stream through a model that follows its own states.

    Args:
        names: of the input, the state, the output and the state that is left.
    """
    model, state, found = session(path), start, []
    for index, row in enumerate(x):
        if index and sequence[index] != sequence[index - 1]:
            state = start
        output, state = model.run(list(names[2:]), {names[0]: row, names[1]: state, **others})
        found.append(output)
    return found


def sqnr_db(reference: list[NDArray], candidate: list[NDArray]) -> float:
    r, c = (np.concatenate(side).astype(np.float64) for side in (reference, candidate))
    return float(10 * np.log10((r**2).sum() / ((r - c) ** 2).sum()))


def recurrent(folder: Path) -> Path:
    """h' = tanh(x W + h U), y = h' V; the data are three sequences."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[1,24] x, float[1,32] h) => (float[1,20] y, float[1,32] hn) {
          a = MatMul(x, w)  b = MatMul(h, u)  s = Add(a, b)  hn = Tanh(s)  y = MatMul(hn, v)
        }"""
    )
    for name, shape in (("w", (24, 32)), ("u", (32, 32)), ("v", (32, 20))):
        values = RANDOM.normal(0, 0.2, shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(proto, folder / "model.onnx")
    for part in ("calib", "eval"):
        x = RANDOM.normal(size=(30, 1, 24)).astype(np.float32)
        np.savez(folder / f"{part}.npz", x=x, sequence=np.repeat([0, 1, 2], [8, 12, 10]))
    return folder / "model.onnx"


def test_the_gate_runs_whole_sequences(tmp_path: Path) -> None:
    model, int8 = recurrent(tmp_path), tmp_path / "int8.onnx"
    done = trtq_command(
        *("quantize", model, "--data", tmp_path / "calib.npz", "--state", "h=hn"),
        *("--method", "max", "--rest", "fp32", "-o", int8),
    )
    assert done.code == 0, done.err
    done = trtq_command(
        *("gate", model, int8, "--eval", tmp_path / "eval.npz", "--metric", "cosine", "--state", "h=hn"),
        *("--json", tmp_path / "verdict.json"),
    )
    assert done.code == 0, done.err
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert any("the 30 samples are 3 sequences" in note for note in verdict["notes"])
    assert not any("sequences" in warning for warning in verdict["warnings"])
    with np.load(tmp_path / "eval.npz") as data:
        fp32, quantized = (
            stream(m, data["x"], data["sequence"], ("x", "h", "y", "hn"), np.zeros((1, 32), np.float32))
            for m in (model, int8)
        )
    assert verdict["outputs"]["y"]["sqnr_db"] == pytest.approx(sqnr_db(fp32, quantized), abs=0.01)


def test_the_engine_takes_the_shapes_of_both_data_sets(tmp_path: Path) -> None:
    """Heights 8 to 16 to calibrate, 12 to 40 to evaluate; and a state whose batch is not its first axis."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N,3,height,8] x, float[2,N,4] h) => (float[N,5,more,6] y, float[2,N,4] hn)
          { y = Conv(x, w)  hn = Neg(h) }"""
    )
    weight = RANDOM.normal(size=(5, 3, 3, 3)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, tmp_path / "model.onnx")
    for part, heights in (("calib", (8, 16)), ("eval", (12, 40))):
        (tmp_path / part).mkdir()
        for height in heights:
            x, h = np.ones((1, 3, height, 8), np.float32), np.ones((2, 1, 4), np.float32)
            np.savez(tmp_path / part / f"{height}.npz", x=x, h=h)
    names = {name: str(tmp_path / name) for name in ("calib", "eval")}
    recipe = Recipe(model=str(tmp_path / "model.onnx"), data=names["calib"])
    job = Job.open(recipe, SILENT)
    both = samples_of(recipe, names["eval"], job.model, job.cache, SILENT)
    profile = replace(job, evaluation=both).profile
    assert (profile["x"].min, profile["x"].max) == ((1, 3, 8, 8), (1, 3, 40, 8))
    assert profile["h"] == Range((2, 1, 4), (2, 1, 4), (2, 1, 4))
    several = Job.open(replace(recipe, batch=8), SILENT).profile
    assert (several["x"].opt[0], several["h"].opt) == (8, (2, 8, 4))


def test_sizes_that_vary_are_in_the_engines_profile(tmp_path: Path) -> None:
    """As SAM's decoder takes the size of the image: the engine takes those of both data sets."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[1,8,8,8] x, int64[2] orig_im_size) => (float[1,4,h,w] y) <int64[2] head = {1,4}> {
          c = Conv(x, k)  sizes = Concat<axis=0>(head, orig_im_size)
          y = Resize<mode="linear">(c, , , sizes)
        }"""
    )
    weight = RANDOM.normal(size=(4, 8, 3, 3)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "k"))
    onnx.save(proto, tmp_path / "model.onnx")
    for part, sizes in (("calib", [(16, 24), (20, 12), (16, 24)]), ("eval", [(12, 40), (16, 24)])):
        x = RANDOM.normal(size=(len(sizes), 1, 8, 8, 8)).astype(np.float32)
        np.savez(tmp_path / f"{part}.npz", x=x, orig_im_size=np.array(sizes))
    done = trtq_command(
        *("deploy", tmp_path / "model.onnx", "--data", tmp_path / "calib.npz", "--method", "max"),
        *("--eval", tmp_path / "eval.npz", "--metric", "cosine", "-o", tmp_path / "out"),
    )
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out" / "model.plan.json").read_text())
    assert record["profile_values"] == {"orig_im_size": [[12, 12], [16, 24], [20, 40]]}


def test_a_table_for_a_model_with_a_fixed_input(tmp_path: Path) -> None:
    """The rate decides an If and is 16 in all data; the table needs the recipe that says so, too."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N,16] x, int64 rate) => (float[N,20] y) <int64 sixteen = {16}> {
          wide = Equal(rate, sixteen)
          y = If(wide) <
            then_branch = t () => (float[N,20] a) { a = MatMul(x, w) },
            else_branch = e () => (float[N,20] b) { b = MatMul(x, v) }
          >
        }"""
    )
    for name in "wv":
        values = RANDOM.normal(size=(16, 20)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(proto, model := tmp_path / "model.onnx")
    x = RANDOM.normal(size=(20, 16)).astype(np.float32)
    np.savez(tmp_path / "calib.npz", x=x, rate=np.full(20, 16))
    (tmp_path / "recipe.toml").write_text("[inputs.rate]\nvalue = 16\n")
    table, int8 = tmp_path / "t.cache", tmp_path / "int8.onnx"
    done = trtq_command(
        *("calibrate", model, "--data", tmp_path / "calib.npz", "--method", "max", "-o", table)
    )
    assert done.code == 0, done.err
    assert "'rate' is 16 in all data" in done.err
    assert "with the same [inputs]" in trtq_command("quantize", model, "--table", table, "-o", int8).err
    recipe = ("--recipe", tmp_path / "recipe.toml")
    done = trtq_command("quantize", model, "--table", table, *recipe, "-o", int8)
    assert done.code == 0, done.err
    (found,) = session(int8).run(None, {"x": x})
    (expected,) = session(model).run(None, {"x": x, "rate": np.array(16)})
    assert 30 < sqnr_db([expected], [found]) < 60


# --- Silero VAD ---------------------------------------------------------------------------------------


def deployed(zoo: Path, model: str, data: str, folder: Path, *options: object) -> dict[str, Any]:
    """The verdict on a voice-activity detector of the zoo."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    if not (zoo / "models" / f"{model}.onnx").is_file():
        pytest.skip("the zoo has no Silero VAD")
    files = zoo / "silero_vad"
    done = trtq_command(
        *("deploy", zoo / "models" / f"{model}.onnx", "--data", files / f"{data}_calib.npz"),
        *("--eval", files / f"{data}_eval.npz", "--metric", f"{files / 'metric.py'}:score"),
        *("-o", folder, "--method", "entropy", *options),
    )
    assert done.code == 0, done.err
    verdict: dict[str, Any] = json.loads((folder / "verdict.json").read_text())
    return verdict


@pytest.mark.slow
def test_zoo_silero_vad_streams(zoo: Path, tmp_path: Path) -> None:
    # ONNX Runtime itself, which is the witness, does not round to float16
    verdict = deployed(zoo, "silero_vad_16k", "stream", tmp_path, "--state", "state=stateN", "--rest", "fp32")
    with np.load(zoo / "silero_vad" / "stream_eval.npz") as data:
        fp32, int8 = (
            stream(
                *(path, data["input"], data["sequence"], ("input", "state", "output", "stateN")),
                np.zeros((2, 1, 128), np.float32),
            )
            for path in (zoo / "models" / "silero_vad_16k.onnx", tmp_path / "model.int8.onnx")
        )
        speech = np.mean((np.ravel(int8) > 0.5) == data["speech"])
    assert verdict["outputs"]["output"]["sqnr_db"] == pytest.approx(sqnr_db(fp32, int8), abs=0.05)
    assert verdict["candidate"] == pytest.approx(speech)


@pytest.mark.slow
def test_zoo_silero_vad_with_its_rate(zoo: Path, tmp_path: Path) -> None:
    """The rate decides an If and is 16 kHz in all data: what is made is the 16 kHz branch, and says so."""
    verdict = deployed(zoo, "silero_vad", "full", tmp_path)
    assert any("input 'sr' is 16000 in all data and decides" in warning for warning in verdict["warnings"])
    int8 = session(tmp_path / "model.int8.onnx")
    assert [item.name for item in int8.get_inputs()] == ["input", "state"]
    fp32 = session(zoo / "models" / "silero_vad.onnx")
    with np.load(zoo / "silero_vad" / "full_eval.npz") as data:
        feeds = [{name: np.asarray(data[name][i]) for name in ("input", "state", "sr")} for i in range(100)]
    pairs = [
        (
            fp32.run(["output"], feed)[0],
            int8.run(["output"], {n: feed[n] for n in ("input", "state")})[0],
        )
        for feed in feeds
    ]
    assert sqnr_db([r for r, _ in pairs], [c for _, c in pairs]) > 30
    assert Recipe.load(tmp_path / "recipe.toml").inputs["sr"].options == {"value": 16000}
