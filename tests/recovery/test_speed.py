"""Deploying the fastest engine: where the figures come from, what they decide, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from jobs import Case, Run, deploy_arguments, save_case, trtq_command
from nets import graph_of, loaded, net, normal, run

from trtq.backends.interface import Gpu
from trtq.cost.interface import Kind, Latency, Rest
from trtq.graph.place import place
from trtq.graph.plan import Plan
from trtq.recipe import Recipe
from trtq.recovery.speed import Speed, builder_of


def wide(folder: Path, size: int, channels: int) -> Case:
    """Four convolutions and a classifier, of a batch of 8."""
    weights = {f"w{i}": normal(channels, channels, 3, 3, seed=i) / channels for i in range(4)}
    body = "\n".join(
        f"c{i} = Conv<pads = [1, 1, 1, 1]>({'x' if i == 0 else f'r{i - 1}'}, w{i}) r{i} = Relu(c{i})"
        for i in range(4)
    )
    text = f"""g (float[8,{channels},{size},{size}] x) => (float[8,5] y) {{
        {body} p = GlobalAveragePool(r3) f = Flatten(p) y = MatMul(f, fc)
    }}"""
    graph = graph_of(net(text, fc=normal(channels, 5), **weights))
    data = np.random.default_rng(0).normal(size=(32, channels, size, size)).astype(np.float32)
    return save_case(graph, folder, {"x": data})


@dataclass(frozen=True)
class Gain:
    """A source by hand: all of INT8 spares a share of the time, and half of it half as much."""

    kind: Kind
    share: float
    name: str = "by hand"

    def latency(self, plan: Plan, rest: Rest) -> Latency:
        part = len(plan.int8_nodes) / len(plan.nodes)
        return Latency(100.0 * (1 - self.share * part), (), self.kind, self.name, 0)


@pytest.mark.parametrize(
    ("kind", "share", "int8"),
    [
        ("modelled", 0.02, False),
        ("modelled", 0.04, True),
        ("imported", 0.02, True),
        ("measured", 0.02, True),
        ("measured", -0.01, False),
    ],
)
def test_a_gain_within_the_models_error_is_none(tmp_path: Path, kind: Kind, share: float, int8: bool) -> None:
    model = loaded(net("g (float[4,8] x) => (float[4,8] y) { h = MatMul(x, w) y = MatMul(h, w) }",
                       w=normal(8, 8)), tmp_path)  # fmt: skip
    plan = place(model, input_shapes={"x": (4, 8)})
    found = Speed(model.graph, plan, Gain(kind, share)).fastest("fp16")
    assert bool(found.int8_nodes) == int8
    if kind == "modelled" and not int8:
        assert "INT8 would save 2.0% of the engine's time by the model" in found.nodes[0].reason


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return wide(tmp_path_factory.mktemp("large"), 32, 64)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return wide(tmp_path_factory.mktemp("tiny"), 2, 8)


def deployed(case: Case, output: Path, *more: object) -> tuple[Run, list[dict]]:
    made = trtq_command(*deploy_arguments(case, output, "--backend", "none", "--method", "max", *more))
    found = output / "workflow.json"
    return made, json.loads(found.read_text()) if found.exists() else []


def kept(steps: list[dict]) -> dict:
    (step,) = (step for step in steps if step["kept"])
    return step


def test_a_named_gpu_decides_the_placement_and_all_of_it_is_shown(large: Case, tmp_path: Path) -> None:
    made, steps = deployed(large, tmp_path, "--gpu", "T4")
    assert made.code == 0
    assert "modelled: roofline of NVIDIA T4" in made.err
    latency, front = kept(steps)["latency"], kept(steps)["front"]
    assert latency["kind"] == "modelled"
    figures = {point["name"]: point["microseconds"] for point in front}
    assert {"FP32", "FP16", "every layer that can in INT8"} <= figures.keys()
    (chosen,) = (point for point in front if point["chosen"])
    assert chosen["microseconds"] == latency["microseconds"] == min(figures.values())
    assert front == sorted(front, key=lambda point: point["microseconds"])
    assert chosen["sqnr_db"] == pytest.approx(min(kept(steps)["sqnr_db"].values()))
    assert f"{chosen['microseconds']:.1f} µs" in made.out


def test_where_int8_does_not_pay_the_engine_is_float16_and_gated(tiny: Case, tmp_path: Path) -> None:
    made, steps = deployed(tiny, tmp_path, "--gpu", "A100 80GB")
    assert made.code == 0
    assert "INT8 does not pay on this model and card: FP16 alone is the fastest" in made.err
    assert [step["step"] for step in steps] == ["fp16 alone"]
    plan = Plan.load(tmp_path / "plan.json")
    assert not plan.int8_nodes
    assert not plan.edges
    assert all(node.rule == "cost" and "INT8" in node.reason for node in plan.nodes)
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["gate"] == "pass"
    assert verdict["outputs"]["y"]["sqnr_db"] > 40


def test_float16_alone_has_the_ends_that_were_asked_for(tiny: Case, tmp_path: Path) -> None:
    options = ("--gpu", "A100 80GB", "--io", "int8-in-out", "--exclude", "c0")
    made, steps = deployed(tiny, tmp_path, *options)
    assert made.code == 0
    assert kept(steps)["step"] == "fp16 alone"
    assert "x stays as it is: c0 (Conv) reads it in floating point" in made.err
    session = onnxruntime.InferenceSession(tmp_path / "model.int8.onnx", providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].type == "tensor(int8)"
    record = json.loads((tmp_path / "manifest.json").read_text())["io"]["y"]
    x = np.load(tiny.data)["x"]
    found = np.concatenate([session.run(None, {"x": x[i : i + 8]})[0] for i in range(0, len(x), 8)])
    expected = np.concatenate([run(tiny.model, {"x": x[i : i + 8]})["y"] for i in range(0, len(x), 8)])
    noise = found * np.float64(record["scale"]) - expected
    verdict = json.loads((tmp_path / "verdict.json").read_text())["outputs"]["y"]
    sqnr = 10 * np.log10((expected**2).sum() / (noise**2).sum())
    assert verdict["sqnr_db"] == pytest.approx(sqnr, abs=0.2)  # float16's rounding is another in ONNX Runtime


def test_an_input_that_the_host_quantizes_costs_no_kernel(large: Case, tmp_path: Path) -> None:
    (_, floats), (made, codes) = (
        deployed(large, tmp_path / io, "--gpu", "T4", "--io", io) for io in ("float", "int8")
    )
    assert "x is int8" in made.err
    taken = [kept(steps)["latency"] for steps in (floats, codes)]
    assert taken[1]["microseconds"] < taken[0]["microseconds"]
    size = 8 * 64 * 32 * 32
    assert taken[0]["bytes"] - taken[1]["bytes"] == (4 + 1) * size  # read as float32, written as int8


def test_where_nothing_with_int8_passes_float_alone_is_the_result(large: Case, tmp_path: Path) -> None:
    made, steps = deployed(large, tmp_path, "--gpu", "T4", "--recover", "none", "--min-sqnr", "50")
    assert made.code == 0
    assert [step["step"] for step in steps] == ["calibrate", "fp16 alone"]
    assert kept(steps)["step"] == "fp16 alone"
    assert "INT8 does not pay on this model and card: no plan with INT8 passes" in made.err
    assert {"chosen", "name"} <= kept(steps)["front"][0].keys()


def test_recovery_gives_speed_away_where_it_buys_most(large: Case, tmp_path: Path) -> None:
    made, steps = deployed(large, tmp_path, "--gpu", "T4", "--recover", "partial", "--min-sqnr", "34")
    assert made.code == 0
    front = {point["name"]: point for point in kept(steps)["front"]}
    calibrated = next(step for step in steps if step["step"] == "calibrate")
    assert min(calibrated["sqnr_db"].values()) < 34
    assert kept(steps)["step"] == "partial"
    assert calibrated["latency"]["microseconds"] < front["partial"]["microseconds"]
    assert front["partial"]["microseconds"] < front["FP16"]["microseconds"]
    assert front["partial"]["sqnr_db"] >= 34
    again, repeated = deployed(large, tmp_path, "--gpu", "T4", "--recover", "partial", "--min-sqnr", "34")
    assert "from the cache; nothing was run" in again.err
    assert kept(repeated)["front"] == kept(steps)["front"]


def test_the_walked_front_is_recorded(large: Case, tmp_path: Path) -> None:
    _, steps = deployed(large, tmp_path, "--gpu", "T4", "--recover", "partial", "--min-sqnr", "34")
    corners = [point for point in kept(steps)["front"] if point["estimated_sqnr_db"] is not None]
    assert len(corners) >= 2
    assert all(point["sqnr_db"] is None for point in corners)
    noises = [point["estimated_sqnr_db"] for point in corners]
    assert noises == sorted(noises)


def test_int8_is_the_objective_where_nothing_tells_a_latency(large: Case, tmp_path: Path) -> None:
    made, steps = deployed(large, tmp_path)
    assert "int8: every layer that can" in made.err
    assert kept(steps)["latency"] is None
    assert "front" not in kept(steps)
    assert len(Plan.load(tmp_path / "plan.json").int8_nodes) == 5


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU here that TensorRT for RTX does not run on."""
    for module in ("recovery.speed", "backends.tensorrt_rtx", "backends.builders"):
        monkeypatch.setattr(f"trtq.{module}.find_gpu", lambda: Gpu("NVIDIA H200", "9.0"))


def test_int8_is_the_objective_on_a_gpu_that_the_builder_does_not_know(
    large: Case, tmp_path: Path, h200: None
) -> None:
    """Else its data sheet would decide of an engine that it never runs."""
    made, steps = deployed(large, tmp_path, "--backend", "tensorrt-rtx")
    assert "int8: every layer that can; tensorrt-rtx does not run on NVIDIA H200" in made.err
    assert kept(steps)["latency"] is None
    refused, _ = deployed(large, tmp_path / "2", "--backend", "tensorrt-rtx", "--objective", "latency")
    assert refused.code == 2
    assert "tensorrt-rtx does not run on NVIDIA H200" in refused.err


@pytest.mark.parametrize(
    ("recipe", "builder"),
    [
        ({"gpu": "L4", "backend": "tensorrt-rtx"}, "tensorrt-rtx"),
        ({"gpu": "H200", "backend": "tensorrt-rtx"}, "tensorrt"),
        ({"gpu": "AGX Orin", "backend": "tensorrt-rtx"}, "tensorrt"),
        ({"gpu": "L4", "backend": "none"}, "tensorrt"),
        ({"backend": "tensorrt-rtx"}, "tensorrt-rtx"),
    ],
)
def test_costs_are_of_the_builder_that_the_gpu_runs(recipe: dict[str, str], builder: str) -> None:
    assert builder_of(Recipe().merged(recipe)) == builder


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--objective", "latency"), "nothing tells what layers cost"),
        (("--objective", "latency", "--gpu", "T4", "--min-int8", "90%"), "does not go with"),
        (("--gpu", "Voodoo 2"), "no data sheet of a GPU named"),
    ],
)
def test_what_cannot_be_decided_is_refused(
    large: Case, tmp_path: Path, more: tuple[str, ...], said: str
) -> None:
    made, _ = deployed(large, tmp_path / "out", *more)
    assert made.code == 2
    assert said in made.err
    assert not (tmp_path / "out" / "verdict.json").exists()


def test_a_least_share_of_int8_makes_int8_the_objective(tiny: Case, tmp_path: Path) -> None:
    _, steps = deployed(tiny, tmp_path, "--gpu", "A100 80GB", "--min-int8", "90%")
    assert kept(steps)["int8_share"] == 1.0
    assert kept(steps)["latency"] is None


def test_the_report_has_the_front(large: Case, tmp_path: Path) -> None:
    _, steps = deployed(large, tmp_path, "--gpu", "T4")
    page = (tmp_path / "report.html").read_text()
    assert "modelled: roofline of NVIDIA T4" in page
    for point in kept(steps)["front"]:
        assert f"{point['microseconds']:.1f} µs" in page


def profiled(folder: Path, datatype: str, microseconds: float) -> list[object]:
    """What trtexec writes of an engine of `large` with convolutions of one datatype, as options."""
    shape = {"x": [8, 64, 32, 32], "y": [8, 5]}
    phrase = {"Half": "Channel major FP16 format", "Int8": "Thirty-two wide Int8 format"}[datatype]
    layers, times = [], [{"count": 100}]
    for i in range(4):
        ends = [
            {"Name": name, "Dimensions": shape["x"], "Format/Datatype": phrase}
            for name in ("x" if i == 0 else f"r{i - 1}", f"r{i}")
        ]
        layers.append(
            {
                **{"Name": f"c{i} + r{i}", "LayerType": "CaskConvolution"},
                **{"Inputs": ends[:1], "Outputs": ends[1:]},
                "Weights": {"Type": datatype, "Count": 64 * 64 * 9},
            }
        )
        times.append({"name": f"c{i} + r{i}", "averageMs": microseconds / 1e3})
    (folder / f"{datatype}.profile.json").write_text(json.dumps(times))
    (folder / f"{datatype}.layers.json").write_text(json.dumps({"Layers": layers, "Bindings": []}))
    files = [folder / f"{datatype}.{kind}.json" for kind in ("profile", "layers")]
    return ["--profile-json", files[0], "--layer-info", files[1]]


@pytest.mark.parametrize(("int8_us", "step"), [(60.0, "calibrate"), (400.0, "fp16 alone")])
def test_profiles_of_another_machine_decide(large: Case, tmp_path: Path, int8_us: float, step: str) -> None:
    given = [*profiled(tmp_path, "Half", 120.0), *profiled(tmp_path, "Int8", int8_us)]
    made, steps = deployed(large, tmp_path / "out", *given)
    assert made.code == 0, made.err
    assert kept(steps)["step"] == step
    assert kept(steps)["latency"]["kind"] == "imported"
    assert "Half.profile.json of trtexec" in kept(steps)["latency"]["source"]
