"""Recipes: what is written is read back, and what is wrong is said before any work starts."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtq.backends.interface import BuildOptions, Range
from trtq.calibration.methods import Method, parse_method
from trtq.data.preprocess import Preprocess
from trtq.errors import InputError
from trtq.graph.rewrite import WEIGHT_FORMS
from trtq.recipe import KINDS, Recipe, flag, from_command_line
from trtq.simulation.pool import Pool

text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
texts = st.lists(text, max_size=3).map(tuple)
path = text.map(os.path.abspath)


def maybe(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | strategy


def as_range(axes: list[tuple[int, int, int]]) -> Range:
    """A range from three sizes of every axis."""
    return Range(*(tuple(sizes) for sizes in zip(*map(sorted, axes), strict=True)))


sizes = st.integers(1, 999)
ranges = st.lists(st.tuples(sizes, sizes, sizes), min_size=1, max_size=4).map(as_range)

drawn: dict[str, st.SearchStrategy] = {
    "model": maybe(path),
    "data": maybe(path),
    "eval": maybe(path),
    "metric": maybe(st.sampled_from(["top1", "cosine@logits", os.path.abspath("metric.py:score")])),
    "output": maybe(path),
    "method": st.sampled_from(["auto", "percentile:99.99"]),
    "max_drop": st.floats(0, 1, exclude_max=True),
    "confidence": maybe(st.floats(0.5, 1, exclude_min=True, exclude_max=True)),
    "require_engine": st.booleans(),
    "min_reference": maybe(st.floats(-1, 1)),
    "ignore_nonfinite": st.booleans(),
    "min_int8": maybe(st.floats(0, 1)),
    "min_sqnr": maybe(st.floats(-100, 200)),
    "recover": st.sampled_from(["fix,partial,learn", "partial", "none"]),
    "partial_limit": st.floats(0, 1),
    "budget": maybe(st.floats(0, exclude_min=True, allow_infinity=False)),
    "labels": maybe(text),
    "plan": maybe(path),
    "parallel": maybe(st.sampled_from(["loky:2", "dask://host:8786"])),
    "include": texts,
    "exclude": texts,
    "weights": st.sampled_from(["int8", "qdq"]),
    "objective": maybe(st.sampled_from(["latency", "int8"])),
    "gpu": maybe(text),
    "profile_json": st.lists(path, max_size=2).map(tuple),
    "layer_info": st.lists(path, max_size=2).map(tuple),
    "io": st.sampled_from(["float", "int8", "int8-in-out", "uint8"]),
    "rest": st.sampled_from(["auto", "fp32", "fp16"]),
    "op_reference": st.lists(path, max_size=2).map(tuple),
    "plugin_lib": st.lists(path, max_size=2).map(tuple),
    "target": texts,
    "profile": st.lists(st.tuples(text, ranges), max_size=3),
    "batch": maybe(st.integers(1, 64)),
    "threads": maybe(st.integers(1, 64)),
    "cache": maybe(path),
    "backend": st.sampled_from(["tensorrt-rtx", "tensorrt"]),
    "timing_cache": maybe(path),
    "workspace": maybe(st.integers(1, 2**40)),
    "optimization_level": maybe(st.integers(0, 5)),
    "version_compatible": st.booleans(),
    "hardware_compatible": st.booleans(),
    "dla_core": maybe(st.integers(0, 3)),
    "refit": st.booleans(),
    "strip_weights": st.booleans(),
    "lower_precision": maybe(st.sampled_from(["fp16", "bf16"])),
    "state": st.dictionaries(text, text, max_size=2),
    "classes": st.dictionaries(text, st.integers(0, 999), max_size=2),
    "inputs": st.dictionaries(
        text,
        st.fixed_dictionaries({"batch_axis": st.just("none") | st.integers(0, 3)})
        | st.fixed_dictionaries({"value": st.integers(0, 9) | st.just([0.5, 2.0])}),
        max_size=2,
    ),
    "preprocess": st.dictionaries(
        text,
        st.fixed_dictionaries(
            {},
            optional={
                "from": text,
                "scale": st.sampled_from(["1/255", 0.5, 2]),
                "mean": st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=3),
                "std": st.floats(0.125, 1),
                "layout": st.sampled_from(["NCHW", "NHWC"]),
                "resize": st.integers(1, 300) | st.just([224, 160]),
            },
        ),
        max_size=2,
    ),
}
recipes = st.builds(Recipe, **drawn)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.toml"


def load(file: Path, content: str) -> Recipe:
    file.write_text(content, encoding="utf-8")
    return Recipe.load(file)


@given(recipe=recipes)
def test_loading_gives_back_what_was_dumped(recipe: Recipe, file: Path) -> None:
    content = recipe.dumps()
    assert load(file, content) == recipe
    assert Recipe.load(file).dumps() == content


def test_what_is_written_beside_its_files_can_be_moved_with_them(tmp_path: Path) -> None:
    job = tmp_path / "job"
    (job / "out").mkdir(parents=True)
    elsewhere = "/" if tmp_path.parts[1] != "elsewhere" else "/other"
    recipe = Recipe(
        model=str(job / "m.onnx"),
        data="https://host/calib.npz",
        eval=str(job / "out" / "eval.npz"),
        metric=f"{job}/metric.py:score",
        op_reference=[str(job / "a.py"), f"{elsewhere}elsewhere/b.py"],
        output=str(job / "out"),
    )
    content = recipe.dumps(beside=job / "out")
    assert str(tmp_path) not in content
    (job / "out" / "recipe.toml").write_text(content)
    assert Recipe.load(job / "out" / "recipe.toml") == recipe
    job.rename(tmp_path / "moved")
    moved = Recipe.load(tmp_path / "moved" / "out" / "recipe.toml")
    assert moved.model == str(tmp_path / "moved" / "m.onnx")
    assert moved.metric == f"{tmp_path}/moved/metric.py:score"
    assert moved.op_reference == (f"{tmp_path}/moved/a.py", f"{elsewhere}elsewhere/b.py")
    assert moved.output == str(tmp_path / "moved" / "out")


@pytest.mark.parametrize(
    ("line", "numbers"),
    [('classes = ["b", "a"]', {"b": 0, "a": 1}), ("[classes]\na = 7\nb = 7", {"a": 7, "b": 7})],
)
def test_classes_are_a_list_or_a_table(line: str, numbers: dict[str, int], file: Path) -> None:
    assert load(file, line).classes == numbers
    assert load(file, line).feeding.classes == numbers


@pytest.mark.parametrize(
    "line", ['classes = ["a", "a"]', "[classes]\na = -1", "classes = [1]", "[classes]\na = true"]
)
def test_classes_that_are_none(line: str, file: Path) -> None:
    with pytest.raises(InputError, match="classes"):
        load(file, line)


def test_the_round_trip_covers_every_field() -> None:
    assert {f.name for f in fields(Recipe)} == set(drawn)


def test_the_builder_takes_its_options_from_the_recipe() -> None:
    recipe = Recipe(timing_cache="/t.cache", workspace=1 << 30, refit=True)
    assert recipe.build_options() == BuildOptions(
        timing_cache=Path("/t.cache"), workspace=1 << 30, refit=True
    )
    assert Recipe().build_options() == BuildOptions()


def test_relative_paths_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = load(
        Path("jobs/r.toml"), 'model = "a.onnx"\ndata = "../calib.npz"\neval = "/e.npz"\nmetric = "m.py:f"'
    )
    assert recipe.model == str(tmp_path / "jobs" / "a.onnx")
    assert recipe.data == str(tmp_path / "calib.npz")
    assert recipe.eval == "/e.npz"
    assert recipe.metric == str(tmp_path / "jobs" / "m.py:f")
    assert recipe.merged({"model": "b.onnx"}).model == str(tmp_path / "b.onnx")
    assert load(Path("jobs/r.toml"), 'metric = "top1"').metric == "top1"


def test_the_command_line_wins_where_it_says_something(file: Path) -> None:
    recipe = load(file, 'method = "max"\nexclude = ["a"]\nbatch = 4\nconfidence = 0.9')
    said = {"method": "mse", "exclude": [], "batch": None, "confidence": 0.95, "debug": True}
    merged = recipe.merged(said)
    assert merged == replace(recipe, method="mse", confidence=0.95)
    assert recipe.merged({"exclude": ["b", "c"]}).exclude == ("b", "c")


def test_an_empty_recipe_has_the_defaults(file: Path) -> None:
    assert load(file, "") == Recipe()
    assert (Recipe().method, Recipe().max_drop, Recipe().weights) == ("auto", 0.01, None)


def test_choices_are_those_of_what_takes_them() -> None:
    assert KINDS["weights"].choices == WEIGHT_FORMS


def test_keys_may_be_written_as_on_the_command_line(file: Path) -> None:
    assert load(file, 'max-drop = "2%"').max_drop == 0.02
    with pytest.raises(InputError, match="'max-drop' is '2x'"):
        load(file, 'max-drop = "2x"')


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("metod = 'max'", ["metod", "did you mean 'method'?"]),
        ("zzz = 1", ["zzz", "max_drop", "preprocess"]),
        ("max_drop = true", ["max_drop", "True", "1% or 0.01"]),
        ("max_drop = ['1%']", ["max_drop", "1% or 0.01"]),
        ("max_drop = nan", ["max_drop", "nan", "1% or 0.01"]),
        ("max_drop = inf", ["max_drop", "inf", "1% or 0.01"]),
        ("max_drop = -0.01", ["max_drop", "-0.01", "1% or 0.01"]),
        ("max_drop = 1e999999999", ["max_drop", "1% or 0.01"]),
        (f"max_drop = 0x{'f' * 400}", ["max_drop", "1% or 0.01"]),
        ("min_int8 = -1", ["min_int8", "-1", "90% or 0.9"]),
        ("budget = inf", ["budget", "inf", "90s, 10m or 1h"]),
        ("target = nan", ["target", "nan", "8.6"]),
        ("target = [8.6, true]", ["target", "True", "8.6"]),
        ("target = [8.6, [9.0]]", ["target", "8.6"]),
        ("min_sqnr = inf", ["'min_sqnr' is inf", "of decibels"]),
        ("min_sqnr = true", ["min_sqnr", "True", "a number"]),
        (f"min_sqnr = 0x{'f' * 400}", ["min_sqnr", "a number"]),
        ("confidence = nan", ["'confidence' is nan", "between 0.5 and 1"]),
        ("batch = 4.0", ["batch", "4.0", "an integer from 1"]),
        ("budget = '1d'", ["'budget' is '1d'", "90s, 10m or 1h"]),
        ("recover = 'fixes'", ["'recover' is 'fixes'", "fix, partial, learn, or none"]),
        ("parallel = 'loky:0'", ["'parallel' is 'loky:0'", "loky:4"]),
        ("profile = 'x:0x3'", ["'profile': 'x:0x3' is not an optimization profile", "NAME:MIN,OPT,MAX"]),
        ("max-drop = '1%'\nmax_drop = '2%'", ["'max-drop' and 'max_drop'", "the same option"]),
        ("max_drop = '1%'\nmax-drop = '1%'", ["'max_drop' and 'max-drop'", "the same option"]),
        ("method = 'nope'", ["unknown calibration method 'nope'", "percentile:99.99", "auto"]),
        ("batch = '4'", ["batch", "'4'"]),
        ("batch = true", ["batch", "True"]),
        ("require_engine = 1", ["require_engine"]),
        ("exclude = 1", ["exclude", "list of strings"]),
        ("exclude = ['a', 1]", ["exclude", "list of strings"]),
        ("weights = 'int4'", ["weights", "int8, qdq"]),
        ("preprocess = 3", ["preprocess", "table"]),
        ("[preprocess]\nx = 3", ["preprocess.x", "table"]),
        ("[preprocess.x]\nshift = 3", ["shift", "from, scale, mean, std, layout, resize, crop, color"]),
        ("[preprocess.x]\nscale = '1/0'", ["scale", "1/0"]),
        ("[preprocess.x]\nscale = '1/'", ["scale", "1/"]),
        ("[preprocess.x]\nscale = '1e999999999'", ["scale", "1e999999999"]),
        ("[preprocess.x]\nscale = nan", ["scale", "nan"]),
        ("[preprocess.x]\nscale = true", ["scale", "True"]),
        ("[preprocess.x]\nmean = [0.5, true]", ["mean", "True"]),
        (f"[preprocess.x]\nstd = 0x{'f' * 400}", ["std"]),
        ("[preprocess.x]\nresize = true", ["resize", "True"]),
        ("[preprocess.x]\nstd = [1, 0, 1]", ["std"]),
        ("confidence = 2.0", ["'confidence' is 2.0", "between 0.5 and 1"]),
        ("model = ", ["cannot read the recipe"]),
        ("output = ''", ["'output' is ''", "not empty"]),
        ("[profile]\nx = 1", ["'profile' is", "NAME:MIN,OPT,MAX"]),
        ("[profile]\nx = '1x3'", ["'profile' is", "NAME:MIN,OPT,MAX"]),
    ],
)
def test_what_is_wrong_is_named_with_the_file(content: str, words: list[str], file: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(file, content)
    assert caught.value.file == str(file)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "name", "value"),
    [
        ("max_drop = 0.01", "max_drop", 0.01),
        ("max_drop = 0", "max_drop", 0.0),
        ("max_drop = 1e-5", "max_drop", 1e-5),
        ("min_int8 = 0.9", "min_int8", 0.9),
        ("min_int8 = 1", "min_int8", 1.0),
        ("budget = 600", "budget", 600.0),
        ("budget = 1.5", "budget", 1.5),
        ("target = 8.6", "target", ("8.6",)),
        ("target = [8.0, '9.0']", "target", ("8.0", "9.0")),
        ("target = '10.0'", "target", ("10.0",)),
        ("exclude = '/head/*'", "exclude", ("/head/*",)),
        ("min_sqnr = 20", "min_sqnr", 20.0),
    ],
)
def test_numbers_and_single_items_may_be_written_plainly(
    content: str, name: str, value: object, file: Path
) -> None:
    found = getattr(load(file, content), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_drop", "1%", 0.01),
        ("max_drop", "0.01", 0.01),
        ("max_drop", "1e-02", 0.01),
        ("max_drop", " 2.5 % ", 0.025),
        ("max_drop", "0", 0.0),
        ("min_int8", "100%", 1.0),
        ("min_int8", " 0.9 ", 0.9),
        ("budget", "90", 90.0),
        ("budget", "90s", 90.0),
        ("budget", "10m", 600.0),
        ("budget", "1.5h", 5400.0),
        ("recover", "none", ()),
        ("recover", "learn, fix", ("fix", "learn")),
        ("parallel", "loky:2", Pool("loky", processes=2)),
        ("method", "percentile:99.90", parse_method("percentile:99.9")),
        ("batch", "4", 4),
        ("confidence", "0.95", 0.95),
    ],
)
def test_text_becomes_the_value_it_stands_for(name: str, text: str, value: object) -> None:
    given = from_command_line(name, text)
    assert given == value
    assert getattr(Recipe().merged({name: given}), name) == value
    assert KINDS[name].read_all(value) == value  # what is read once may be given again


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("max_drop", ["", "%", "one", "-1%", "100%", "150%", "1", "nan", "inf"]),
        ("min_int8", ["", "%", "90", "-1%", "nan", "101%", "half"]),
        ("budget", ["", "s", "-1s", "0", "ten", "1d", "nan", "inf"]),
        ("recover", ["", "fixes", "fix,", "fix,none"]),
        ("parallel", ["loky:0", "loky:x", "dask://", "threads"]),
        ("batch", ["0", "4.0", "four", ""]),
        ("confidence", ["0.5", "95%", "nan"]),
        ("output", [""]),
        ("exclude", [""]),
        ("target", [""]),
    ],
)
def test_text_without_a_value_is_refused_with_the_option(name: str, texts: list[str]) -> None:
    for text in texts:
        with pytest.raises(InputError, match=flag(name)) as caught:
            from_command_line(name, text)
        assert caught.value.remedy
        with pytest.raises(InputError, match=f"^{name} is "):
            Recipe(**{name: text})


@pytest.mark.parametrize(
    "line",
    [
        'max_drop = "1%"', 'max_drop = "0.5%"', 'max_drop = "12.345%"', 'min_int8 = "90%"', 'budget = "90s"',
        'budget = "10m"', 'budget = "1h"', 'recover = "fix,learn"', 'recover = "none"', 'method = "auto"',
        'method = "percentile:99.99"', 'parallel = "dask://host:8786"', 'parallel = "loky:4"',
        'profile = [\n    "x:1x3,4x3,8x3",\n    "y:5",\n]', 'profile = [\n    "x:1x3",\n    "x:1x9",\n]',
    ],
)  # fmt: skip
def test_values_are_written_as_people_write_them(line: str, file: Path) -> None:
    assert line in load(file, line).dumps()


def test_values_may_be_given_as_they_are() -> None:
    typed = Recipe(max_drop=0.01, budget=600, recover=("learn", "fix"), parallel=Pool("loky"), target=(8.6,))
    assert typed == Recipe(max_drop="1%", budget="10m", recover="fix,learn", parallel="loky", target="8.6")
    options = {"scale": "1/255"}
    tables = Recipe(preprocess={"x": options})
    assert tables == Recipe(preprocess={"x": Preprocess.parse("x", options)})


@pytest.mark.parametrize(
    ("text", "name"), [("AUTO", "auto"), (" Max ", "max"), ("Percentile:99.90", "percentile:99.9")]
)
def test_the_method_has_one_spelling(text: str, name: str, file: Path) -> None:
    found = Recipe(method=text).method
    assert found == Recipe().merged({"method": text}).method
    assert str(found) == name
    assert isinstance(found, Method) == (name != "auto")
    assert load(file, f'method = "{text}"') == Recipe(method=name)


def test_no_method_is_refused_before_anything_is_read() -> None:
    with pytest.raises(InputError, match="unknown calibration method 'nope'"):
        Recipe(model="missing.onnx").merged({"method": "nope"})


@pytest.mark.parametrize(
    "given_options",
    [
        {"confidence": 0.5},
        {"confidence": 1.0},
        {"confidence": float("nan")},
        {"min_sqnr": float("nan")},
        {"min_reference": float("inf")},
        {"batch": 0},
        {"threads": -1},
        {"threads": 2**31},
        {"batch": 2**29},
        {"workspace": 2**63},
        {"dla_core": 10**23},
    ],
)
def test_numbers_out_of_range_are_refused_at_once(given_options: dict[str, float]) -> None:
    (name,) = given_options
    with pytest.raises(InputError, match=flag(name)):
        Recipe().merged(given_options)


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_an_unreadable_recipe(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match="cannot read the recipe"):
        Recipe.load(file)


def test_what_is_missing_is_asked_for() -> None:
    found = Recipe(model="m", data="d").require("model", "data")
    assert (found.model, found.data) == ("m", "d")
    with pytest.raises(AttributeError):
        found.output  # noqa: B018  it was not asked for
    with pytest.raises(InputError, match="--eval is missing"):
        Recipe(model="m").require("model", "eval")
    with pytest.raises(InputError, match="--eval and --table are missing"):
        Recipe(model="m").require("model", "eval", table=None, encoding="scale")
    with pytest.raises(InputError, match="MODEL, --data and --output are missing"):
        Recipe(eval="e").require("model", "data", "eval", "output")
