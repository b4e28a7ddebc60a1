"""Timed engines, imported and measured: what they say of their own placement, and of another."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cost.blocks import input_shapes, plan_of, residual_block, shapes_of, without

from trtq.backends.compiled import Compiled, parse_inspection
from trtq.backends.record import sidecar
from trtq.backends.timing import Timing
from trtq.cost.gpus import gpu_named
from trtq.cost.imported import closest_gpu, own_us, read_engine
from trtq.cost.layers import layer_load
from trtq.cost.measured import timed_engine
from trtq.cost.modelled import Modelled
from trtq.cost.roofline import FITTED, kernel_time
from trtq.cost.sources import source_for
from trtq.cost.timed import Timed, TimedEngine, TimedLayer
from trtq.errors import InputError
from trtq.files import sha256_file
from trtq.graph.place import RESIDUAL, leave_out

A10 = gpu_named("A10")
GRAPH = residual_block()
PLAN = plan_of(GRAPH)
NONE = without(PLAN)
N = [8, 64, 56, 56]

HALF = "Channel major FP16 format where channel % 8 == 0"
INT8 = "Thirty-two wide channel vectorized row major Int8 format"
LINEAR = "Row major linear FP32"


def tensor(name: str, phrase: str, dims: list[int] = N) -> dict[str, Any]:
    return {"Name": name, "Location": "Device", "Dimensions": dims, "Format/Datatype": phrase}


def layer(
    name: str, kind: str, inputs: list[Any], output: Any, weights: tuple[str, int] | None = None
) -> Any:
    more = {"Weights": {"Type": weights[0], "Count": weights[1]}} if weights else {}
    return {"Name": name, "LayerType": kind, "Inputs": inputs, "Outputs": [output], **more}


def engine(int8: bool) -> list[tuple[Any, float]]:
    """Layers of the residual block's engine as TensorRT 8.5 lists them, and microseconds of each."""
    phrase, weights = (INT8, ("Int8", 36864)) if int8 else (HALF, ("Half", 36864))
    fc = ("Int8", 640) if int8 else ("Half", 640)
    a, b, c = (tensor(name, phrase) for name in "abc")
    p, y = tensor("p", phrase, [8, 64, 1, 1]), tensor("y", LINEAR, [8, 10, 1, 1])
    entry = "QuantizeLinear_0" if int8 else "Reformatting CopyNode for Input Tensor 0 to conv1 + relu1"
    us = (40, 50, 60, 70, 12, 11) if int8 else (45, 90, 100, 120, 14, 12)
    layers = [
        layer(entry, "Reformat", [tensor("x", LINEAR)], tensor("x copied", phrase)),
        layer("conv1 + relu1", "CaskConvolution", [tensor("x copied", phrase)], a, weights),
        layer("conv2 + relu2", "CaskConvolution", [a], b, weights),
        layer("conv3 + add + relu3", "CaskConvolution", [b, a], c, weights),
        layer("pool", "CaskPooling", [c], p),
        layer("fc", "CaskConvolution", [p], y, fc),
        layer("reshape_after_fc", "NoOp", [y], tensor("logits", LINEAR, [8, 10])),
    ]
    return list(zip(layers, (*us, 0), strict=True))


def versions(layers: list[Any]) -> dict[str, list[Any]]:
    """The same layers as TensorRT 8.5, 10 and 11 write them."""

    def ten(each: Any) -> Any:
        nodes = each["Name"].split(" to ")[-1].split(" + ")
        return {**each, "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)}

    def split(each: Any) -> Any:
        word = {HALF: "Half", INT8: "Int8", LINEAR: "Float"}[each["Format/Datatype"]]
        left = {key: value for key, value in each.items() if key != "Format/Datatype"}
        return {**left, "Datatype": word, "Format": each["Format/Datatype"]}

    def eleven(each: Any) -> Any:
        sides = {side: [split(t) for t in each[side]] for side in ("Inputs", "Outputs")}
        return {**ten(each), **sides}

    return {"8.5": layers, "10": [ten(each) for each in layers], "11": [eleven(each) for each in layers]}


def write(folder: Path, int8: bool, version: str = "8.5") -> tuple[Path, Path]:
    """A profile and a list of layers as trtexec writes them, what the profiler adds included."""
    made = engine(int8)
    profile, layers = folder / f"{int8}.profile.json", folder / f"{int8}.layers.json"
    shown = [(each["Name"], us + FITTED.profiler_us if us else 0) for each, us in made]
    times = [{"name": name, "timeMs": us / 50, "averageMs": us / 1e3, "percentage": 1} for name, us in shown]
    profile.write_text(json.dumps([{"count": 20}, *times]))
    layers.write_text(json.dumps({"Layers": versions([each for each, _ in made])[version], "Bindings": []}))
    return profile, layers


def imported(folder: Path, version: str = "8.5") -> list[TimedEngine]:
    return [read_engine(*write(folder, int8, version)) for int8 in (False, True)]


@pytest.mark.parametrize("version", ["8.5", "10", "11"])
def test_formats_of_all_versions(tmp_path: Path, version: str) -> None:
    half, int8 = imported(tmp_path, version)
    assert (half.precision, int8.precision) == ("fp16", "int8")
    assert half.microseconds == pytest.approx(45 + 90 + 100 + 120 + 14 + 12)
    assert int8.layers[3].nodes == ("conv3", "add", "relu3")
    assert [each.converts for each in int8.layers[:2]] == [True, False]


def test_the_sum_of_all_runs_is_an_average_too(tmp_path: Path) -> None:
    """TensorRT 8.0 has no more than the sum for some layers."""
    profile, layers = write(tmp_path, True)
    value = json.loads(profile.read_text())
    profile.write_text(json.dumps([{k: v for k, v in e.items() if k != "averageMs"} for e in value]))
    summed = read_engine(profile, layers).layers
    averages = imported(tmp_path)[1].layers
    assert [e.name for e in summed] == [e.name for e in averages]
    assert [e.microseconds for e in summed] == pytest.approx([e.microseconds for e in averages])


@pytest.mark.parametrize(("plan", "engine"), [(NONE, 0), (PLAN, 1)], ids=["fp16", "int8"])
@pytest.mark.parametrize("version", ["8.5", "11"])
def test_an_engine_costs_what_it_took(tmp_path: Path, version: str, plan: Any, engine: int) -> None:
    engines = imported(tmp_path, version)
    timed = Timed(Modelled(GRAPH, shapes_of(GRAPH), A10), engines, "imported")
    assert timed.share == pytest.approx(1)
    latency = timed.latency(plan, "fp16")
    assert latency.microseconds == pytest.approx(engines[engine].microseconds, rel=0.02)
    assert {part.why for part in latency.parts} == {"imported"}
    assert latency.kind == "imported"
    assert latency.source == "False.profile.json of trtexec, True.profile.json of trtexec"


def test_an_engine_without_q_on_the_residual_input_costs_what_it_took(tmp_path: Path) -> None:
    """conv1 writes float16, which conv3 adds and a kernel of its own quantizes for conv2."""
    made = engine(True)
    made[1][0]["Outputs"] = [tensor("a", HALF)]
    made[3][0]["Inputs"] = [tensor("b", INT8), tensor("a", HALF)]
    made.insert(2, (layer("QuantizeLinear_1", "Reformat", [tensor("a", HALF)], tensor("aq", INT8)), 20.0))
    compiled = parse_inspection(json.dumps({"Layers": [each for each, _ in made]}))
    layers = [
        TimedLayer(found.name, us, found.onnx_nodes, found)
        for found, (_, us) in zip(compiled.layers, made, strict=True)
    ]
    timed = Timed(
        Modelled(GRAPH, shapes_of(GRAPH), A10), [TimedEngine("it", "int8", tuple(layers))], "imported"
    )
    plan = replace(PLAN, edges=[edge for edge in PLAN.edges if edge.rule != RESIDUAL])
    assert timed.latency(plan, "fp16").microseconds == pytest.approx(243 + 20, rel=0.02)
    assert timed.latency(PLAN, "fp16").microseconds == pytest.approx(
        243
    )  # the convolutions are compute-bound


def test_a_mixed_placement_is_made_of_both(tmp_path: Path) -> None:
    """conv2 in float16 costs its float16 time, less than nothing is spared, and conv3 waits for reformats."""
    timed = Timed(Modelled(GRAPH, shapes_of(GRAPH), A10), imported(tmp_path), "imported")
    mixed = timed.latency(leave_out(GRAPH, PLAN, {"conv2": "to try"}), "fp16")
    whole = timed.latency(PLAN, "fp16")
    parts = {part.nodes[0]: part for part in mixed.parts}
    assert parts["conv2"].precision == "fp16"
    assert parts["conv2"].microseconds == pytest.approx(100, rel=0.01)
    assert parts["conv3"].reformats_us > 0
    assert mixed.microseconds > whole.microseconds


def test_what_no_engine_had_is_the_roofline_scaled(tmp_path: Path) -> None:
    """An engine that takes twice as long as the roofline says is twice the roofline in float32, too."""
    modelled = Modelled(GRAPH, shapes_of(GRAPH), A10)
    half = imported(tmp_path)[0]
    slow = replace(half, layers=tuple(replace(e, microseconds=2 * e.microseconds) for e in half.layers))
    once, twice = (Timed(modelled, [e], "imported").latency(NONE, "fp32") for e in (half, slow))
    assert twice.microseconds == pytest.approx(2 * once.microseconds)
    assert {part.why for part in once.parts} == {"by the roofline, scaled"}


def test_the_closest_gpu_is_the_one_that_it_was() -> None:
    """Engines that take what the roofline of a GPU says are of that GPU."""
    compiled = parse_inspection(json.dumps({"Layers": [each for each, _ in engine(True)]}))
    for gpu in (A10, gpu_named("T4"), gpu_named("RTX 4090")):
        layers = [
            TimedLayer(e.name, kernel_time(gpu, layer_load(e)).microseconds, e.onnx_nodes, e)
            for e in compiled.layers
        ]
        assert closest_gpu([TimedEngine("an engine", "int8", tuple(layers))]) is gpu


def test_the_profilers_share() -> None:
    assert own_us(50.0) == 50.0 - FITTED.profiler_us
    assert own_us(1.0) == pytest.approx(0.2)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the profile"),
        ("[]", "not a profile"),
        ("3", "not a profile"),
        ('[{"count": 0}, {"name": "a", "timeMs": 1}]', "not a profile"),
        ('[{"name": "a", "averageMs": -1}]', "not a profile"),
        ('[{"name": "a", "averageMs": "fast"}]', "not a profile"),
    ],
)
def test_other_profiles(tmp_path: Path, text: str, message: str) -> None:
    profile, layers = write(tmp_path, True)
    profile.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_engine(profile, layers)
    assert caught.value.file == str(profile)


@pytest.mark.parametrize("text", ["{", "[]", '{"Layers": 1}'])
def test_other_lists_of_layers(tmp_path: Path, text: str) -> None:
    profile, layers = write(tmp_path, True)
    layers.write_text(text)
    with pytest.raises(InputError, match="not a list of an engine's layers"):
        read_engine(profile, layers)


def test_two_engines_files(tmp_path: Path) -> None:
    profile, layers = write(tmp_path, True)
    names_only = {"Layers": ["conv1 + relu1", "conv2 + relu2"]}
    layers.write_text(json.dumps(names_only))  # built without detailed verbosity
    with pytest.raises(InputError, match="has a time in") as caught:
        read_engine(profile, layers)
    assert "--profilingVerbosity=detailed" in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    profile, layers = write(tmp_path, True)
    layers.unlink()
    with pytest.raises(InputError, match="cannot read"):
        read_engine(profile, layers)


# --- which source -----------------------------------------------------------------------------------------


def test_sources_in_order_of_trust(tmp_path: Path) -> None:
    files = [write(tmp_path, int8) for int8 in (False, True)]
    given: dict[str, Any] = {"profiles": [p for p, _ in files], "layer_infos": [i for _, i in files]}
    shapes = input_shapes(GRAPH)
    assert source_for(GRAPH, shapes) is None
    model = source_for(GRAPH, shapes, gpu="L4")
    assert model is not None
    assert (model.kind, model.name) == ("modelled", "roofline of NVIDIA L4, TensorRT")
    read = source_for(GRAPH, shapes, gpu="L4", **given)
    assert read is not None
    assert read.kind == "imported"
    measured = source_for(GRAPH, shapes, measured=imported(tmp_path), gpu="L4", **given)
    assert measured is not None
    assert measured.kind == "measured"


def test_profiles_and_layers_come_in_pairs(tmp_path: Path) -> None:
    profile, _ = write(tmp_path, True)
    with pytest.raises(InputError, match="1 profiles and 0 lists of layers"):
        source_for(GRAPH, input_shapes(GRAPH), profiles=[profile])


def test_another_models_engines(tmp_path: Path) -> None:
    profile, layers = write(tmp_path, True)
    for path in (profile, layers):
        path.write_text(re.sub("conv|relu|add|pool|fc", "other", path.read_text()))
    with pytest.raises(InputError, match="the layers are not the model's"):
        source_for(GRAPH, input_shapes(GRAPH), profiles=[profile], layer_infos=[layers])


# --- measured ---------------------------------------------------------------------------------------------


def timing(kernel_ms: dict[str, float], p50_ms: float) -> Timing:
    return Timing(8, 100, p50_ms, p50_ms, p50_ms, 1.0, True, "", 0, 1.0, 1.0, kernel_ms, None)


def record(folder: Path, compiled: Compiled) -> Path:
    """A plan file with a record beside it."""
    plan = folder / "model.plan"
    plan.write_bytes(b"a plan")
    sidecar(plan).write_text(
        json.dumps(
            {
                "engine_sha256": sha256_file(plan),
                "builder": "tensorrt",
                "version": "10.16.1",
                "model": "model.onnx",
                "model_sha256": "0" * 64,
                "targets": [],
                "profile": {},
                "compiled": compiled.to_json(),
            }
        )
    )
    return plan


def test_measured_layers_add_up_to_the_engine(tmp_path: Path) -> None:
    """What the profiler adds to the whole is taken off every layer alike."""
    made = engine(True)
    compiled = parse_inspection(json.dumps({"Layers": [each for each, _ in made]}), batch=8)
    shown = {each["Name"]: (us + 6) / 1e3 for each, us in made if us}
    found = timed_engine(record(tmp_path, compiled), timing(shown, p50_ms=0.243))
    assert found.microseconds == pytest.approx(243)
    assert found.precision == "int8"
    assert found.layers[1].nodes == ("conv1", "relu1")
    timed = Timed(Modelled(GRAPH, shapes_of(GRAPH), A10), [found], "measured")
    assert timed.latency(PLAN, "fp16").microseconds == pytest.approx(243, rel=0.02)


def test_engines_without_a_record_or_layers(tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"a plan")
    with pytest.raises(InputError, match="layers take cannot be told"):
        timed_engine(plan, timing({"conv1": 1.0}, 1.0))
    with pytest.raises(InputError, match="profiler shows no layers"):
        timed_engine(record(tmp_path, Compiled(())), timing({}, 1.0))
