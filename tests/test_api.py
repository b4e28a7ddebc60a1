"""The steps for Python programs: what they take, what they give back, and what their messages say."""

from __future__ import annotations

import ast
import doctest
import inspect
import json
import re
import subprocess
import sys
import typing
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from jobs import Case, trtq_command

import trtq
from trtq import api
from trtq.backends.builders import BUILDERS, NO_ENGINE
from trtq.console import Console
from trtq.escapes import html_table
from trtq.options import Options
from trtq.recipe import KINDS, STEPS, Recipe

Arrays = dict[str, np.ndarray]


@pytest.fixture
def given(small: Case) -> Arrays:
    """The arrays of `small`, split so that no row is in both sets."""
    with np.load(small.data) as data:
        return {"x": data["x"][:30], "held_back": data["x"][30:], "labels": data["labels"][30:]}


def accuracy(outputs: dict[str, Any], targets: dict[str, Any]) -> np.ndarray:
    (scores,) = outputs.values()
    return (scores.argmax(axis=1) == targets["labels"]).astype(float)


# --- the whole workflow -------------------------------------------------------------------------------


def test_deploy_takes_what_is_in_memory(small: Case, given: Arrays, tmp_path: Path) -> None:
    done = trtq.deploy(
        onnx.load(small.model),
        data=(row for row in given["x"]),
        eval=(given["held_back"], given["labels"]),
        metric=accuracy,
        max_drop=0.4,
        budget=600,
        method="max",
        exclude="op:MatMul",
        recover=[],
        backend="none",
        output=tmp_path / "out",
    )
    assert done.verdict.passed
    assert done.verdict.max_drop == 0.4
    assert [node.name for node in done.plan.nodes if not node.int8] == ["classes"]
    assert done.table.scales["x"] == np.float32(np.abs(given["x"]).max()) / np.float32(127)
    used = json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]
    assert used["model"]["file"] == "in-memory://ModelProto"
    assert used["data"]["source"] == "in-memory://<genexpr>"
    assert used["data"]["rows"] == 30
    assert used["eval"]["source"] == "in-memory://tuple"
    assert used["metric"]["name"] == "accuracy"
    assert not list(tmp_path.glob("**/given.*"))


def test_what_is_in_memory_is_one_with_the_same_in_files(small: Case, given: Arrays, tmp_path: Path) -> None:
    """Nothing runs for the arrays that ran for the files: the cache knows them by their content."""
    np.savez(tmp_path / "calib.npz", x=given["x"])
    np.savez(tmp_path / "eval.npz", x=given["held_back"], labels=given["labels"])
    options: dict[str, Any] = {"metric": "top1", "max_drop": 0.4, "method": "max", "backend": "none"}
    files = {"data": tmp_path / "calib.npz", "eval": tmp_path / "eval.npz"}
    trtq.deploy(small.model, **files, **options, output=tmp_path / "files")
    said = _Said()
    arrays = {"data": {"x": given["x"]}, "eval": {"x": given["held_back"], "labels": given["labels"]}}
    trtq.deploy(onnx.load(small.model), **arrays, **options, output=tmp_path / "memory", console=said)
    assert "outputs of the reference from the cache, nothing was run" in said.lines
    assert "outputs of the candidate from the cache, nothing was run" in said.lines
    assert not [line for line in said.lines if " tensors in " in line]
    name = "model.int8.onnx"
    assert (tmp_path / "files" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()


class _Said(Console):
    """Keeps the lines."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def fresh(self) -> Console:
        return self

    def say(self, label: str, text: str) -> None:
        self.lines.append(text)


def test_a_recipe_of_what_was_in_memory_says_so(small: Case, given: Arrays, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "max", "backend": "none", "max_drop": 0.4}
    evaluation = given["held_back"], given["labels"]
    trtq.deploy(
        onnx.load(small.model),
        data=given["x"],
        eval=evaluation,
        metric=accuracy,
        output=tmp_path / "out",
        **options,
    )
    recipe = tmp_path / "out" / "recipe.toml"
    again = ("deploy", "--recipe", recipe, "-o", tmp_path / "again")
    for more, problem in (
        ((), "the model was in the memory of the Python program"),
        ((small.model,), "the metric was a function in the memory of the Python program"),
        ((small.model, "--metric", "top1"), "the data were in the memory of the Python program"),
    ):
        run = trtq_command(again[0], *more, *again[1:])
        assert run.code == 2
        assert problem in run.err
        assert "in-memory://" in run.err
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["junit.xml"]


def test_saved_data_make_the_recipe_whole(small: Case, given: Arrays, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "max", "backend": "none", "max_drop": 0.4, "metric": "top1"}
    done = trtq.deploy(
        onnx.load(small.model),
        data=[(row,) for row in given["x"]],
        eval=lambda: zip(given["held_back"], given["labels"], strict=True),
        output=tmp_path / "out",
        save_data=True,
        **options,
    )
    (tmp_path / "out").rename(tmp_path / "moved")
    run = trtq_command("deploy", "--recipe", tmp_path / "moved" / "recipe.toml", "-o", tmp_path / "again")
    assert run.code == done.exit_code, run.err
    found = json.loads((tmp_path / "again" / "verdict.json").read_text())
    assert (found["reference"], found["candidate"]) == (done.verdict.reference, done.verdict.candidate)
    with np.load(tmp_path / "moved" / "given.eval.npz") as saved:
        np.testing.assert_array_equal(saved["labels"], given["labels"])
        np.testing.assert_array_equal(saved["x"].squeeze(1), given["held_back"])


@pytest.mark.slow
def test_preprocessed_data_are_saved_as_they_were_given(small: Case, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (24, 8, 8, 3)).astype(np.uint8)
    trtq.deploy(
        small.model,
        data={"images": images[:12]},
        eval={"images": images[12:]},
        metric="cosine",
        preprocess={"x": {"from": "images", "scale": "1/255", "layout": "NCHW"}},
        method="max",
        backend="none",
        output=tmp_path / "out",
        save_data=True,
    )
    with np.load(tmp_path / "out" / "given.data.npz") as saved:
        assert saved.files == ["images"]
        np.testing.assert_array_equal(saved["images"], images[:12])
    run = trtq_command("deploy", "--recipe", tmp_path / "out" / "recipe.toml", "-o", tmp_path / "again")
    assert run.code == 0, run.err
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("out", "again")]
    assert manifests[0]["inputs"]["data"]["sha256"] == manifests[1]["inputs"]["data"]["sha256"]


# --- every step ---------------------------------------------------------------------------------------


def test_every_step_gives_an_object_that_shows_itself(small: Case, given: Arrays, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    model, evaluation = onnx.load(small.model), (given["held_back"], given["labels"])
    table = trtq.calibrate(model, data=given["x"], method="max", output=tmp_path / "t.cache")
    assert trtq.Table.load(tmp_path / "t.cache").scales == table.scales
    quantized = trtq.quantize(model, table=table)
    quantized.save(tmp_path / "q.onnx")
    assert onnx.load(tmp_path / "q.onnx") == quantized.model
    assert quantized.table.scales.items() <= table.scales.items()
    ranked = trtq.sensitivity(model, data=given["x"], fast=True)
    built = trtq.build(quantized, output=tmp_path / "e.plan", profile={"x": [(1, 3, 8, 8)] * 3})
    found = [
        table,
        quantized,
        ranked,
        built,
        trtq.gate(model, quantized, eval=evaluation, metric="top1", max_drop=0.4),
        trtq.compare(small.model, tmp_path / "q.onnx", data=given["x"]),
        trtq.bench(built, tmp_path / "e.plan"),
    ]
    for shown in found:
        assert re.fullmatch(rf"<{type(shown).__name__}: .+>", repr(shown)), repr(shown)
        assert len(repr(shown)) < 200
        _check_html(shown._repr_html_())


@pytest.mark.slow
def test_study_is_a_step(small: Case, given: Arrays, tmp_path: Path) -> None:
    evaluation = {"x": given["held_back"], "labels": given["labels"]}
    study = trtq.study(
        small.model, data=given["x"], eval=evaluation, metric=accuracy, budget=1e-6, output=tmp_path / "s"
    )
    assert study.metric == "accuracy"
    assert (tmp_path / "s" / "study.json").is_file()
    assert repr(study).startswith("<Study: model.onnx, ")
    _check_html(study._repr_html_())
    assert study.text().splitlines()[0] == f"model.onnx: accuracy {study.fp32:.4f} in fp32 on 10 samples"


def test_a_deployment_shows_itself(small: Case, given: Arrays, tmp_path: Path) -> None:
    done = trtq.deploy(
        small.model,
        data=given["x"],
        eval=given["held_back"],
        metric="cosine",
        method="max",
        backend="none",
        output=tmp_path / "<b>out",
    )
    assert repr(done).startswith(f"<Deployment: {tmp_path}/<b>out, PASS cosine on 10 samples")
    shown = done._repr_html_()
    _check_html(shown)
    assert "<b>out" not in shown
    assert "&lt;b&gt;out" in shown


class _Checker(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _check_html(text: str) -> None:
    checker = _Checker()
    checker.feed(text)
    assert not checker.open
    assert checker.tags <= {"table", "caption", "b", "tr", "td", "th", "br"}


def test_tables_for_notebooks_hold_no_markup_of_others() -> None:
    shown = html_table(
        "<script>1</script>", [("<img src=x onerror=alert(1)>", 'a"&b'), ("\x1b[31m", 1.5)], "AB"
    )
    _check_html(shown)
    assert "\x1b" not in shown
    assert "&lt;img" in shown
    many = html_table("t", [(i,) for i in range(1000)])
    assert "and 950 more" in many
    assert ">999<" not in many


# --- models and metrics -------------------------------------------------------------------------------


def test_a_changed_proto_changes_nothing_that_was_given(small: Case, given: Arrays) -> None:
    proto = onnx.load(small.model)
    recipe = Recipe(model=proto, data=given["x"])
    del proto.graph.node[:]
    assert trtq.calibrate(recipe, method="max").scales.keys() >= {"x", "conv_out"}


def test_a_proto_without_its_weights_is_refused(small: Case, tmp_path: Path) -> None:
    onnx.save(
        onnx.load(small.model),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        size_threshold=0,
        location="w",
    )
    with pytest.raises(trtq.InputError, match="the ModelProto has no weights"):
        trtq.calibrate(onnx.load(tmp_path / "m.onnx", load_external_data=False), data=np.ones((2, 3, 8, 8)))


def test_a_proto_above_the_limit_has_its_weights_beside_it(
    small: Case, given: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtq.graph import model

    whole = trtq.calibrate(small.model, data=given["x"], method="max")
    monkeypatch.setattr(model, "PROTOBUF_LIMIT", 500)
    recipe = Recipe(model=onnx.load(small.model))
    assert Path(f"{recipe.model.__fspath__()}.data").is_file()
    assert trtq.calibrate(recipe, data=given["x"], method="max").scales == whole.scales


@pytest.mark.slow
def test_what_torch_exports_is_a_model(given: Arrays) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("onnxscript", reason="the exporter needs onnxscript")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2)).eval()
    exported = torch.onnx.export(net, (torch.ones(2, 3, 8, 8),), dynamo=True, verbose=False)
    batch = torch.utils.data.DataLoader(torch.from_numpy(given["x"]), batch_size=2)
    assert len(trtq.quantize(exported, data=batch, method="max").plan.int8_nodes) == 2


def test_a_metric_may_be_any_callable(small: Case, given: Arrays) -> None:
    from functools import partial

    class Share:
        def __init__(self, of: float) -> None:
            self.of = of

        def score(self, outputs: Any, targets: Any) -> float:
            return self.of * float(accuracy(outputs, targets).mean())

        __call__ = score

    def scaled(outputs: Any, targets: Any, by: float) -> np.ndarray:
        return by * accuracy(outputs, targets)

    evaluation = given["held_back"], given["labels"]
    known: dict[str, Any] = {
        "Share.score": Share(0.5).score,
        "Share": Share(0.5),
        "scaled": partial(scaled, by=0.5),
        "lambda at test_api.py": lambda outputs, targets: 0.5 * accuracy(outputs, targets).mean(),
    }
    for name, metric in known.items():
        verdict = trtq.gate(small.model, small.model, eval=evaluation, metric=metric)
        assert verdict.metric.startswith(name)
        assert (verdict.reference, verdict.candidate) == (0.5, 0.5)


def test_a_metric_that_fails_is_named(small: Case, given: Arrays) -> None:
    def broken(outputs: Any, targets: Any) -> float:
        raise KeyError("text")

    with pytest.raises(trtq.InputError, match="the metric 'broken' failed") as raised:
        trtq.gate(small.model, small.model, eval=(given["held_back"], given["labels"]), metric=broken)
    assert "KeyError: 'text'" in str(raised.value)


@pytest.mark.slow
def test_worker_processes_read_what_is_in_memory(small: Case, given: Arrays) -> None:
    pytest.importorskip("joblib", reason="joblib is not installed")
    evaluation, factor = (given["held_back"], given["labels"]), 1.0
    options: dict[str, Any] = {"data": iter(given["x"]), "eval": evaluation, "cache": None}

    def metric(outputs: Any, targets: Any) -> float:
        return factor * float(accuracy(outputs, targets).mean())

    there = trtq.sensitivity(small.model, **options, metric=metric, parallel="loky:2")
    here = trtq.sensitivity(
        small.model, data=given["x"], eval=evaluation, metric=lambda o, t: float(accuracy(o, t).mean())
    )
    assert [(e.group, e.metric, e.noise) for e in there.effects] == [
        (e.group, e.metric, e.noise) for e in here.effects
    ]


# --- options ------------------------------------------------------------------------------------------


def test_the_options_are_those_of_a_recipe() -> None:
    """Every field, in the same order, and its words where there are some to choose among."""
    hints = typing.get_type_hints(Options, localns=_names_for_hints(), include_extras=True)
    assert list(hints) == list(KINDS)
    words: dict[str, tuple[str, ...]] = {
        name: kind.choices for name, kind in KINDS.items() if kind.choices is not None
    }
    words |= {"recover": STEPS, "backend": (*BUILDERS, NO_ENGINE)}
    for name, choices in words.items():
        assert set(_words_of(hints[name])) == set(choices), name


def _names_for_hints() -> dict[str, Any]:
    """What `options` imports for type checkers only."""
    from onnx import ModelProto

    import trtq.options
    from trtq.calibration.methods import Method
    from trtq.data.feeding import InputOptions
    from trtq.data.memory import Data
    from trtq.data.preprocess import Preprocess
    from trtq.graph.memory import ModelInMemory
    from trtq.memory import Function
    from trtq.simulation.pool import Pool

    kinds = (ModelProto, Method, InputOptions, Data, Preprocess, ModelInMemory, Function, Pool)
    found = vars(trtq.options) | {kind.__name__: kind for kind in kinds}
    return found | {name: eval(found[name], found) for name in ("ModelLike", "DataLike", "MetricLike")}


def _words_of(hint: Any) -> list[str]:
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [word for part in typing.get_args(hint) for word in _words_of(part)]


def test_python_values_are_what_the_command_line_reads(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "max_drop": np.float32(0.25),
        "budget": 600,
        "batch": np.int64(4),
        "exclude": "op:Gemm",
        "include": ["a", "b*"],
        "recover": ["partial", "fix"],
        "target": [8.6, "9.0"],
        "profile": {"x": [(1, 3), (4, 3), [8, 3]]},
        "state": {"h": "hn"},
        "op_reference": tmp_path / "r.py",
        "cache": tmp_path,
        "parallel": "loky:2",
        "min_sqnr": 30,
    }
    recipe = Recipe().changed(values)
    toml = tmp_path / "r.toml"
    toml.write_text(
        'max_drop = "25%"\nbudget = "10m"\nbatch = 4\nexclude = "op:Gemm"\ninclude = ["a", "b*"]\n'
        'recover = "fix,partial"\ntarget = ["8.6", "9.0"]\nprofile = "x:1x3,4x3,8x3"\n[state]\nh = "hn"\n'
    )
    read = Recipe.load(toml)
    for name in values.keys() - {"op_reference", "cache", "parallel", "min_sqnr"}:
        assert getattr(recipe, name) == getattr(read, name), name
    assert recipe.op_reference == (str(tmp_path / "r.py"),)
    assert recipe.cache == str(tmp_path)
    assert recipe.min_sqnr == 30.0


def test_paths_are_absolute_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe().changed(
        {"model": Path("m.onnx"), "data": "d.npz", "metric": "top1", "output": Path("out")}
    )
    assert (recipe.model, recipe.data) == (str(tmp_path / "m.onnx"), str(tmp_path / "d.npz"))
    assert (recipe.metric, recipe.output) == ("top1", str(tmp_path / "out"))


def test_keyword_arguments_win_over_a_recipe(small: Case, given: Arrays, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('method = "entropy"\nexclude = "conv"')
    for base in (tmp_path / "r.toml", Recipe.load(tmp_path / "r.toml")):
        made = trtq.quantize(small.model, recipe=base, data=given["x"], method="max")
        assert made.plan.int8_nodes == ["classes"]
        assert made.table.metadata["method"] == "max"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"exlude": "a"},
            r"calibrate\(\) got an unexpected keyword argument 'exlude': did you mean 'exclude'\?",
        ),
        ({"verbos": True}, "did you mean 'verbose'"),
        ({"qqqqqq": 1}, "it takes backend, batch, "),
        ({"model": "b.onnx"}, r"calibrate\(\) got two models"),
    ],
)
def test_wrong_keyword_arguments_are_type_errors(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        trtq.calibrate("a.onnx", **wrong)


def test_what_is_no_model_is_refused_in_words(small: Case, given: Arrays) -> None:
    with pytest.raises(trtq.InputError, match=r"gate\(\) got a dict for a model"):
        trtq.gate(small.model, given, eval=given["x"], metric="cosine")


def test_values_that_an_option_does_not_take_are_named(small: Case) -> None:
    for name, value in (
        ("max_drop", "many"),
        ("batch", 0),
        ("data", 5),
        ("data", None),
        ("model", 3.5),
        ("metric", 1),
        ("profile", {"x": [(1,), None, (2,)]}),
        ("recover", ["fix", "pray"]),
        ("exclude", [1]),
    ):
        with pytest.raises(trtq.TrtqError) as raised:
            trtq.calibrate(**({"model": small.model, "data": small.data} | {name: value}))
        assert name in str(raised.value)


def test_messages_speak_python(small: Case, given: Arrays) -> None:
    with pytest.raises(trtq.InputError, match=r"^eval= and a metric= with labels go together"):
        trtq.sensitivity(small.model, data=given["x"], eval=given["x"])
    with pytest.raises(trtq.InputError, match=r"^deploy\(\) lacks eval, metric, output"):
        trtq.deploy(small.model, data=given["x"])
    with pytest.raises(trtq.InputError) as raised:
        trtq.quantize(onnx.load(small.model), data=given["x"], exclude="nothing*")
    assert raised.value.file == "in-memory://ModelProto"
    with pytest.raises(trtq.InputError, match="an engine shows its outputs only"):
        trtq.compare(small.model, "model.plan", data=given["x"])


def test_what_the_system_refuses_is_a_trtq_error(small: Case, tmp_path: Path) -> None:
    with pytest.raises(trtq.TrtqError):
        trtq.calibrate(small.model, data=small.data, method="max", output=tmp_path)


# --- what is seen -------------------------------------------------------------------------------------


def test_a_library_prints_nothing_and_warns_as_python_does(
    small: Case, given: Arrays, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(trtq.TrtqWarning, match="2 calibration samples are too few") as caught:
        trtq.calibrate(small.model, data=given["x"][:2], method="max")
    assert caught[0].filename == __file__
    assert capsys.readouterr() == ("", "")


def test_verbose_prints(small: Case, given: Arrays, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trtq.calibrate(small.model, data=given["x"][:2], method="max", verbose=True)
    assert "too few" in capsys.readouterr().err


# --- the package --------------------------------------------------------------------------------------


def test_functions_keep_their_names_beside_modules_of_the_same_name() -> None:
    import trtq.gate.metrics
    import trtq.study

    for name in api.__all__:
        assert getattr(trtq, name, None) is getattr(api, name) or name not in trtq.__all__
    assert trtq.gate is api.gate
    assert trtq.study is api.study


def test_every_public_name_is_there_and_documented() -> None:
    for name in trtq.__all__:
        found = getattr(trtq, name)
        assert name == "__version__" or inspect.getdoc(found)
    assert set(trtq.__all__) <= set(dir(trtq))


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, trtq; print([m for m in ('numpy', 'onnx', 'torch', 'tqdm') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(run.stdout) == []


@pytest.mark.slow
def test_the_steps_do_not_import_torch(small: Case) -> None:
    code = f"import sys, trtq; trtq.calibrate({str(small.model)!r}, data={str(small.data)!r}, method='max');"
    code += "print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_the_example_of_the_documentation_runs(small: Case, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    with np.load(small.data) as data:
        names = {"model": small.model, "images": data["x"], "labels": data["labels"]}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    (example,) = [test for test in doctest.DocTestFinder().find(api) if test.name == "trtq.api"]
    example.globs.update(names, folder=tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert runner.run(example).failed == 0
    assert example.examples
