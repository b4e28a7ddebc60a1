"""Inputs and outputs that are 8-bit numbers: the same model, fed codes by the host in place of floats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from jobs import Case, conv_case, deploy_arguments, trtq_command
from nets import engine, graph_of, net, normal, run
from numpy.typing import NDArray

from trtq.data.preprocess import Preprocess
from trtq.errors import InputError
from trtq.graph.codes import Code
from trtq.graph.ends import Ends, codes_of, why_float
from trtq.graph.model import export
from trtq.simulation.rows import Runner

SCALE = np.float32(0.03)
PARAMETERS = {
    "s": SCALE,
    "t": np.float32(0.05),
    "z": np.int8(0),
    "w": normal(8, 4, 3, 3),
    "o": np.float32(0.1),
}

DIRECT = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Conv(d, w)"
MOVED = """
    p = Transpose<perm = [0, 1, 3, 2]>(x) q = QuantizeLinear(p, s, z) d = DequantizeLinear(q, s, z)
    y = Conv(d, w)
"""
BOTH = f"""
    {DIRECT} p = Transpose<perm = [0, 1, 3, 2]>(x) q2 = QuantizeLinear(p, s, z)
    d2 = DequantizeLinear(q2, s, z) y2 = Conv(d2, w)
"""


def graph(body: str, outputs: str = "float[2,8,4,4] y") -> gs.Graph:
    return graph_of(net(f"g (float[2,4,6,6] x) => ({outputs}) {{ {body} }}", opset=19, **PARAMETERS))


def int8(scale: float) -> Code:
    return Code("int8", np.array(scale, np.float32), np.zeros((), np.float32))


def test_codes_are_rounded_half_to_even_and_saturate() -> None:
    values = np.array([0.25, 0.75, 1.25, -0.25, -0.75, 63.5, 64.0, -64.0, -90.0], np.float32)
    np.testing.assert_array_equal(int8(0.5).encoded(values), [0, 2, 2, 0, -2, 127, 127, -128, -128])
    np.testing.assert_array_equal(int8(0.5).decoded(np.array([-128, 3], np.int8)), [-64.0, 1.5])


def test_codes_are_taken_as_they_are() -> None:
    codes = np.array([-128, 5], np.int8)
    assert int8(0.5).encoded(codes) is codes


def test_the_host_line_is_python_that_gives_the_codes() -> None:
    x = normal(100)
    code = int8(0.0217)
    np.testing.assert_array_equal(eval(code.host_line("x"), {"np": np, "x": x}), code.encoded(x))
    numbers = code.encoded(x)
    line = code.host_line("y", output=True)
    np.testing.assert_array_equal(eval(line, {"np": np, "y": numbers}), code.decoded(numbers))


@pytest.mark.parametrize(("body", "outputs"), [(DIRECT, ""), (MOVED, ""), (BOTH, ", float[2,8,4,4] y2")])
def test_fed_codes_the_model_gives_what_it_gave_for_floats(body: str, outputs: str) -> None:
    plain = graph(body, f"float[2,8,4,4] y{outputs}")
    x = normal(2, 4, 6, 6)
    expected = run(plain, {"x": x})
    changed = Ends(int8=True).given_to(plain.copy())
    (tensor,) = changed.inputs
    assert tensor.dtype == np.int8
    found = run(changed, {"x": run(quantizer(), {"x": x})["q"]})
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(Runner(changed).run({"x": x})["y"], expected["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", ["Transpose, Cast", "Cast, Transpose"])
def test_a_moved_input_of_another_type_than_its_scale_gives_a_model_of_one_type(order: str) -> None:
    cast, move = "Cast<to = 1>", "Transpose<perm = [0, 1, 3, 2]>"
    first, then = (move, cast) if order.startswith("T") else (cast, move)
    body = f"""
        p = {first}(x) f = {then}(p) q = QuantizeLinear(f, s, z) d = DequantizeLinear(q, s, z) y = Conv(d, w)
    """
    text = f"g (float16[2,4,6,6] x) => (float[2,8,4,4] y) {{ {body} }}"
    plain, x = graph_of(net(text, opset=19, **PARAMETERS)), normal(2, 4, 6, 6, dtype=np.float16)
    plain.tensors()["p"].dtype = np.dtype(np.float16 if first == move else np.float32)
    plain.tensors()["f"].dtype = np.dtype(np.float32)
    changed = Ends(int8=True).given_to(plain.copy())
    model = export(changed)
    onnx.checker.check_model(model, full_check=True)
    codes = codes_of(model.graph)["x"].encoded(x)
    expected = run(plain, {"x": x})["y"]
    np.testing.assert_allclose(run(changed, {"x": codes})["y"], expected, rtol=1e-5, atol=1e-6)


def quantizer() -> onnx.ModelProto:
    """ONNX's own QuantizeLinear as the host."""
    return net(
        "g (float[2,4,6,6] x) => (int8[2,4,6,6] q) { q = QuantizeLinear(x, s, z) }", opset=19, **PARAMETERS
    )


def test_a_half_model_is_fed_codes_without_a_cast() -> None:
    body = """
        h = Cast<to = 10>(x) q = QuantizeLinear(h, s, z) d = DequantizeLinear(q, s, z) c = Conv(d, w)
        y = Cast<to = 1>(c)
    """
    halves = {**PARAMETERS, "s": np.float16(0.03), "w": PARAMETERS["w"].astype(np.float16)}
    made = graph_of(net(f"g (float[2,4,6,6] x) => (float[2,8,4,4] y) {{ {body} }}", opset=19, **halves))
    made.tensors()["c"].dtype = np.dtype(np.float16)
    changed = Ends(int8=True, outputs={"y": 0.1}).given_to(made)
    assert sorted(node.op for node in changed.nodes) == ["Conv", "DequantizeLinear", "QuantizeLinear"]
    assert changed.outputs[0].name == "y"
    assert changed.outputs[0].dtype == np.int8
    codes = codes_of(export(changed).graph)
    assert codes["x"].scale == np.float16(0.03)
    assert codes["y"].scale == np.float16(0.1)


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        (f"{DIRECT} a = Relu(x)", "float[2,4,6,6] a", "a (Relu) reads it in floating point"),
        (f"{DIRECT} e = QuantizeLinear(x, t, z) f = DequantizeLinear(e, t, z) a = Conv(f, w)",
         "float[2,8,4,4] a", "it is quantized by different scales"),
        ("y = Conv(x, w)", "", "y (Conv) reads it in floating point"),
    ],
)  # fmt: skip
def test_an_input_that_is_read_otherwise_stays(body: str, outputs: str, reason: str) -> None:
    plain = graph(body, ", ".join(filter(None, ["float[2,8,4,4] y", outputs])))
    assert why_float(plain, plain.inputs[0]) == reason
    assert Ends(int8=True).given_to(plain.copy()).inputs[0].dtype == np.float32


def test_outputs_are_codes_of_what_they_were() -> None:
    plain, x, step = graph(DIRECT), normal(2, 4, 6, 6), np.float32(0.1)
    (expected,) = run(plain, {"x": x}).values()
    changed = Ends(outputs={"y": 0.1}).given_to(plain.copy())
    assert run(changed, {"x": x})["y"].dtype == np.int8
    found = Runner(changed).run({"x": x})["y"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.clip(np.rint(expected / step), -128, 127) * step)


def pixels(preprocess: Preprocess, layout: str) -> tuple[gs.Graph, NDArray[np.uint8], NDArray]:
    """A graph, images as the host has them, and what preprocessing makes of those."""
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 4), np.uint8)
    prepared = np.stack([preprocess(image) for image in images]).astype(np.float32)
    host = np.moveaxis(images, -1, 1) if layout == "NCHW" else images
    body = (
        DIRECT
        if layout == "NCHW"
        else f"p = Transpose<perm = [0, 3, 1, 2]>(x) {DIRECT.replace('(x,', '(p,')}"
    )
    shape = "x".join(map(str, prepared.shape)).replace("x", ",")
    made = graph_of(net(f"g (float[{shape}] x) => (float[2,8,4,4] y) {{ {body} }}", opset=19, **PARAMETERS))
    return made, host, prepared


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_images_are_scaled_and_normalized_by_the_model(layout: str) -> None:
    options = {"scale": "1/255", "mean": [0.4, 0.5, 0.3, 0.2], "std": [0.2, 0.25, 0.2, 0.3], "layout": layout}
    preprocess = Preprocess.parse("x", options)
    plain, images, prepared = pixels(preprocess, layout)
    changed = Ends(images={"x": preprocess.image()}).given_to(plain.copy())
    (expected,) = run(plain, {"x": prepared}).values()
    np.testing.assert_allclose(run(changed, {"x": images})["y"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(Runner(changed).run({"x": prepared})["y"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(codes_of(export(changed).graph)["x"].encoded(prepared), images)


def test_values_between_pixels_are_no_image() -> None:
    code = Code("uint8", np.array(1 / 255, np.float32), np.array(-0.5, np.float32))
    with pytest.raises(InputError, match="pixels from 0 to 255"):
        code.encoded(np.array([0.3 / 255 - 0.5], np.float32))
    with pytest.raises(InputError, match="pixels from 0 to 255"):
        code.encoded(np.array([0.9], np.float32))


def test_the_builder_takes_them_and_the_first_kernel_reads_bytes(tmp_path: Path) -> None:
    preprocess = Preprocess.parse("x", {"scale": "1/255", "mean": 0.4, "layout": "NCHW"})
    for ends, datatype in ((Ends(int8=True), "Int8"), (Ends(images={"x": preprocess.image()}), "UInt8")):
        built = engine(ends.given_to(graph(DIRECT)), tmp_path)
        read = [t.datatype for layer in built.compiled.layers for t in layer.inputs if t.name == "x"]
        assert read == [datatype]
        record = json.loads((tmp_path / "model.plan.json").read_text())
        assert record["codes"]["x"]["type"] == datatype.lower()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return conv_case(tmp_path_factory.mktemp("ends"), "N")


def test_the_verdict_is_of_the_model_that_is_delivered(case: Case, tmp_path: Path) -> None:
    made = trtq_command(
        *deploy_arguments(case, tmp_path, "--io", "int8-in-out", "--backend", "none", "--rest", "fp32")
    )
    assert made.code == 0
    io = json.loads((tmp_path / "manifest.json").read_text())["io"]
    assert io["x"]["host"] in made.err
    x = np.load(case.data)["x"]
    (codes,) = run(tmp_path / "model.int8.onnx", {"x": eval(io["x"]["host"], {"np": np, "x": x})}).values()
    found = eval(io["classes_out"]["host"], {"np": np, "classes_out": codes})
    (expected,) = onnxruntime.InferenceSession(case.model).run(None, {"x": x})
    noise = 10 * np.log10((expected.astype(np.float64) ** 2).sum() / ((expected - found) ** 2).sum())
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["outputs"]["classes_out"]["sqnr_db"] == pytest.approx(noise, abs=0.05)


def test_images_need_a_recipe_that_says_how_they_are_scaled(case: Case, tmp_path: Path) -> None:
    made = trtq_command(*deploy_arguments(case, tmp_path / "out", "--io", "uint8", "--backend", "none"))
    assert made.code == 2
    assert "[preprocess.<input>]" in made.err
    assert not (tmp_path / "out" / "verdict.json").exists()
