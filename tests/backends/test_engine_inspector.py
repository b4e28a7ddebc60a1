"""Reading the engine inspector's JSON, of TensorRT up to 10 and from 11 on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from trtq.backends.compiled import UNKNOWN, Compiled, CompiledLayer, int8_nodes, onnx_layers, parse_inspection

REAL = Path(__file__).parent / "data" / "engine_explorer"

INT8_TEN = "Thirty-two wide channel vectorized row major Int8 format"


def tensor(name: str, dims: list[int], phrase: str, **more: Any) -> dict[str, Any]:
    return {"Name": name, "Location": "Device", "Dimensions": dims, "Format/Datatype": phrase, **more}


def layer(name: str, kind: str, inputs: list[Any], outputs: list[Any], **more: Any) -> dict[str, Any]:
    return {"Name": name, "LayerType": kind, "Inputs": inputs, "Outputs": outputs, **more}


ENGINE = {
    "Layers": [
        layer(
            "x/QuantizeLinear",
            "Reformat",
            [tensor("x", [1, 3, 8, 8], "Row major linear FP32")],
            [tensor("q", [1, 3, 8, 8], "Four wide channel vectorized row major Int8 format")],
            Origin="QDQ",
            Metadata="[ONNX Layer: x/QuantizeLinear]",
        ),
        layer(
            "conv + relu",
            "CaskConvolution",
            [tensor("q", [1, 3, 8, 8], "Four wide channel vectorized row major Int8 format")],
            [tensor("c", [1, 16, 8, 8], INT8_TEN)],
            Weights={"Type": "Int8", "Count": 432},
            Bias={"Type": "Float", "Count": 16},
            Metadata="[ONNX Layer: /conv]\x1e[ONNX Layer: relu]",
        ),
        layer(
            "excluded",
            "CaskGemmConvolution",
            [tensor("c16", [1, 16, 8, 8], "Channel major FP16 format where channel % 8 == 0")],
            [tensor("e", [1, 4, 8, 8], "Half")],
            Weights={"Type": "Half", "Count": 64},
            Bias={"Type": "Half", "Count": 0},
            Metadata="[ONNX Layer: excluded]",
        ),
        layer("copy", "NoOp", [tensor("e", [1, 4, 8, 8], "Half")], [tensor("y", [1, 4, 8, 8], "Half")]),
    ],
    "Bindings": ["x", "y"],
}


def test_tensorrt_10() -> None:
    compiled = parse_inspection(json.dumps(ENGINE), batch=1)
    assert not compiled.unread
    assert compiled.kernels == 3  # NoOp launches nothing
    quantize, conv, excluded, _ = compiled.layers
    assert [t.datatype for t in (*quantize.inputs, *quantize.outputs)] == ["Float", "Int8"]
    assert quantize.converts
    assert not conv.converts
    assert (conv.computes, conv.int8) == (True, True)
    assert [(t.dims, t.datatype) for t in conv.constants] == [((432,), "Int8"), ((16,), "Float")]
    assert (excluded.computes, excluded.int8) == (True, False)
    assert len(excluded.constants) == 1
    assert int8_nodes(compiled.layers, ["/conv", "excluded", "relu"]) == {"/conv", "relu"}
    read_and_written = (192 * 4 + 192) + (192 + 432 + 16 * 4 + 1024) + (1024 * 2 + 64 * 2 + 256 * 2)
    assert compiled.bytes_moved() == read_and_written
    assert Compiled.from_json(compiled.to_json()) == compiled


def test_tensorrt_11_names_datatype_and_format_apart() -> None:
    def split(tensor: dict[str, Any]) -> dict[str, Any]:
        phrase = tensor.pop("Format/Datatype")
        word = "Int8" if "Int8" in phrase else "Float" if "FP32" in phrase else "Half"
        return {**tensor, "Datatype": word, "Format": phrase}

    engine = json.loads(json.dumps(ENGINE))
    for each in engine["Layers"]:
        each["Inputs"] = [split(t) for t in each["Inputs"]]
        each["Outputs"] = [split(t) for t in each["Outputs"]]
    engine["I/O Tensors"] = engine.pop("Bindings")
    assert parse_inspection(json.dumps(engine)) == parse_inspection(json.dumps(ENGINE))


def test_what_cannot_be_read_is_said() -> None:
    strange = [
        "a name only",  # of an engine that was not built DETAILED
        layer("z", "Shuffle", [tensor("x", [1], "a word of the future")], []),
        {"Name": "no type"},
    ]
    compiled = parse_inspection(json.dumps({"Layers": [*strange, ENGINE["Layers"][1]]}))
    assert len(compiled.layers) == 1
    assert [json.loads(text) for text in compiled.unread] == strange


@pytest.mark.parametrize(
    ("engine", "layers", "convolutions", "int8"),
    [("fp16", 36, 21, 0), ("qat", 37, 21, 21), ("qat-residual-qgap", 24, 21, 21)],
)
def test_engines_of_a_real_gpu(engine: str, layers: int, convolutions: int, int8: int) -> None:
    """ResNet-18 has 20 convolutions and a fully connected layer."""
    text = (REAL / f"resnet-a100-{engine}.json").read_text()
    compiled = parse_inspection(text, batch=32)
    assert (len(compiled.layers), compiled.unread) == (layers, ())
    assert sum(layer.computes for layer in compiled.layers) == convolutions
    assert sum(layer.int8 for layer in compiled.layers) == int8
    for raw, found in zip(json.loads(text)["Layers"], compiled.layers, strict=True):
        if tactic := raw.get("TacticName"):  # which names the types of its operands: another witness
            assert found.int8 == (re.search("_i8(i8|f16|f32)_|int8", tactic) is not None), tactic
        if raw.get("Origin"):
            assert found.converts


def test_without_metadata_the_names_tell_the_nodes() -> None:
    """TensorRT before 8.6: what it fuses it joins with `+`."""
    text = (REAL / "resnet-a100-qat-residual-qgap.json").read_text()
    fused = [found for found in parse_inspection(text).layers if "Conv_9" in found.onnx_nodes]
    assert [found.name for found in fused] == ["conv1.weight + QuantizeLinear_7 + Conv_9 + MaxPool_12"]
    assert int8_nodes(fused, ["Conv_9", "Conv_22"]) == {"Conv_9"}


def test_bytes_of_a_real_engine_by_hand() -> None:
    compiled = parse_inspection((REAL / "resnet-a100-qat-residual-qgap.json").read_text(), batch=32)
    quantize, stem = compiled.layers[:2]
    image, pooled = 32 * 3 * 224 * 224, 32 * 64 * 56 * 56
    assert quantize.bytes_moved(32) == 4 * image + image
    assert stem.bytes_moved(32) == image + 64 * 3 * 7 * 7 + 4 * 64 + pooled  # convolution and pooling in one


@pytest.mark.parametrize(
    ("phrase", "datatype"),
    [
        ("Row major linear BOOL", "Bool"),
        ("Row major Int8 format", "Int8"),
        ("Row major linear INT32", "Int32"),
        ("Row major linear Int64", "Int64"),
        ("Channel major BF16 format where channel % 8 == 0", "BFloat16"),
        ("Channel major FP32 format with 3 spatial dimensions", "Float"),
        ("N/A due to dynamic shapes", UNKNOWN),
        ("Unknown format", UNKNOWN),
    ],
)
def test_phrases(phrase: str, datatype: str) -> None:
    read = parse_inspection(json.dumps({"Layers": [layer("z", "Shuffle", [], [tensor("x", [3], phrase)])]}))
    assert not read.unread
    (written,) = read.layers[0].outputs
    assert written.datatype == datatype


@pytest.mark.parametrize(("kind", "int8"), [("Int8", True), ("Half", False)])
def test_dynamic_shapes_leave_the_weights_to_tell(kind: str, int8: bool) -> None:
    x, y = (tensor(name, [-1, 8], "N/A due to dynamic shapes") for name in "xy")
    weighted = layer(
        "fc", "CaskGemmConvolution", [x], [y], Weights={"Type": kind, "Count": 64},
        Metadata="[ONNX Layer: fc]",
    )  # fmt: skip
    product = layer("scores", "MatrixMultiply", [x, x], [y], Metadata="[ONNX Layer: scores]")
    compiled = parse_inspection(json.dumps({"Layers": [weighted, product]}), batch=4)
    assert not compiled.unread
    assert int8_nodes(compiled.layers, ["fc", "scores"]) == ({"fc"} if int8 else set())
    assert compiled.layers[1].bytes_moved(4) == 3 * 4 * (4 * 8)  # at most: as if of 32 bits


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Layers": 3}'])
def test_no_inspection(text: str) -> None:
    with pytest.raises(ValueError, match=r"Layers|Expecting value"):
        parse_inspection(text)


def test_metadata() -> None:
    assert onnx_layers("") == ()
    assert onnx_layers("[ONNX Layer: a]\x1f[ONNX Layer: b[0]]") == ("a", "b[0]")
    assert onnx_layers("[ONNX Layer: a][ONNX Layer: b/c:0]") == ("a", "b/c:0")


@pytest.mark.parametrize(
    ("steps", "converts"),
    [
        ("MulMinMaxRounCast", True),  # quantize
        ("CastMul", True),  # dequantize
        ("MulMinMaxRounCastReplConc", True),
        ("Move", True),
        ("Mul", False),  # a product of the model
        ("MulAddMaxMinMulMinMaxRounCast", False),
        ("MaxMinMulMinMaxRounCast", False),  # a Clip of the model, then quantize
        ("", False),
    ],
)
def test_generated_kernels_that_only_convert(steps: str, converts: bool) -> None:
    assert CompiledLayer(f"__myl_{steps}_myl0_1", "kgen", (), (), (), ()).converts == converts
    assert not CompiledLayer(f"__myl_{steps}_myl0_1", "avgpool", (), (), (), ()).converts
