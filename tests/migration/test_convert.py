"""Tables to Q/DQ models and back: hand-made graphs, ONNX Runtime's quantizer, and hypothesis."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from trtq.calibration.table import Table, tensorrt_version, version_number
from trtq.cli import convert as cli
from trtq.cli.cache import CACHE
from trtq.data.load import load_samples
from trtq.errors import ExitCode, InputError
from trtq.graph.model import load_model, save_model
from trtq.migration.fit import Fit, require_complete
from trtq.migration.source import Source, load_source, observe
from trtq.migration.to_qdq import NO_RANGE, quantize_with_table
from trtq.migration.to_table import table_of

RANDOM = np.random.default_rng(0)


def f32(*values: float) -> list[np.float32]:
    return [np.float32(value) for value in values]


def saved(folder: Path, text: str, opset: int = 17, **constants: ArrayLike) -> Path:
    """A model from ONNX's text form; nodes are called like their first outputs."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {text}')
    for name, values in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    for node in model.graph.node:
        node.name = node.output[0]
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def weight(*shape: int) -> NDArray[np.float32]:
    return RANDOM.normal(size=shape).astype(np.float32)


def convs(folder: Path) -> Source:
    """Zero pad, Conv + BatchNorm + ReLU, pooling, Conv, and a residual addition."""
    path = saved(
        folder,
        """g (float[1,4,8,8] image) => (float[1,4,4,4] sum) {
            padded = Pad(image, pads)
            conv = Conv(padded, w1)
            norm = BatchNormalization(conv, one, zero, zero, one)
            relu = Relu(norm)
            pool = MaxPool<kernel_shape=[2,2], strides=[2,2]>(relu)
            second = Conv(pool, w2)
            sum = Add(second, pool)
        }""",
        pads=np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        w1=weight(4, 4, 3, 3),
        w2=weight(4, 4, 1, 1),
        one=np.ones(4, np.float32),
        zero=np.zeros(4, np.float32),
    )
    return load_source(path)


def quantizers(model: onnx.ModelProto) -> dict[str, NDArray]:
    """Tensor in front of each QuantizeLinear -> its scale, read from the ONNX file itself."""
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    return {n.input[0]: constants[n.input[1]] for n in model.graph.node if n.op_type == "QuantizeLinear"}


def fake_quantized(x: NDArray, scale: ArrayLike) -> NDArray:
    return np.clip(np.rint(x / scale), -128, 127) * scale


# --- table -> Q/DQ ---------------------------------------------------------------------------------------


def test_scales_stand_in_the_model_to_the_bit(tmp_path: Path) -> None:
    image, relu = f32(0.007875938, 0.1)
    quantization, fit = quantize_with_table(convs(tmp_path), Table({"image": image, "relu": relu}))
    save_model(quantization.rewritten(), tmp_path / "q.onnx")
    scales = quantizers(onnx.load(tmp_path / "q.onnx"))
    assert scales == {"image": image, "pool": relu}
    assert quantization.plan.int8_nodes == ["conv", "second"]
    assert fit.complete


def test_the_model_computes_what_the_table_says(tmp_path: Path) -> None:
    w = weight(6, 5)
    path = saved(tmp_path, "g (float[N,6] x) => (float[N,5] y) { y = MatMul(x, w) }", w=w)
    quantization, _ = quantize_with_table(load_source(path), Table({"x": np.float32(0.02)}))
    save_model(quantization.rewritten(), tmp_path / "q.onnx")
    x = weight(9, 6)
    per_channel = np.abs(w).max(axis=0) / np.float32(127)
    expected = fake_quantized(x, np.float32(0.02)) @ fake_quantized(w, per_channel)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "q.onnx", options)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "image", "pool"),
    [
        (["padded", "relu"], "padded", "relu"),  # the Pad is folded away; its zeros change no range
        (["image", "pool"], "image", "pool"),
        (["image", "padded", "relu", "pool"], "image", "pool"),
    ],
)
def test_rows_of_tensors_with_the_same_or_moved_values(
    tmp_path: Path, rows: list[str], image: str, pool: str
) -> None:
    _, fit = quantize_with_table(convs(tmp_path), Table({name: np.float32(0.1) for name in rows}))
    assert fit.rows == {"image": image, "pool": pool}
    assert not fit.missing


@pytest.mark.parametrize(
    ("moving", "stands_in"),
    [
        ("Transpose<perm=[1,0]>(x)", True),
        ("Identity(x)", True),
        ("Dropout(x)", True),
        ("Relu(x)", False),
        ("Slice(x, from, to)", False),  # the rest of x may be larger
    ],
)
def test_a_row_behind_stands_in_only_if_it_has_all_values(
    tmp_path: Path, moving: str, stands_in: bool
) -> None:
    text = f"g (float[4,4] a) => (float[4,4] y, float[m,n] behind) {{\
        x = Sigmoid(a) y = MatMul(x, w) behind = {moving} }}"
    starts = {"from": np.zeros(1, np.int64), "to": np.ones(1, np.int64)} if "Slice" in moving else {}
    source = load_source(saved(tmp_path, text, w=weight(4, 4), **starts))
    assert source.row("x", Table({"behind": np.float32(0.1)})) == ("behind" if stands_in else None)


def test_nodes_without_a_range_stay_in_floating_point(tmp_path: Path) -> None:
    quantization, fit = quantize_with_table(convs(tmp_path), Table({"image": np.float32(0.1)}))
    assert quantization.plan.int8_nodes == ["conv"]
    (left,) = (node for node in quantization.plan.nodes if not node.int8)
    assert (left.name, left.rule, left.reason) == ("second", NO_RANGE, "the table has no row for 'pool'")
    assert list(fit.missing) == ["pool"]
    assert "second" in fit.missing["pool"]
    with pytest.raises(InputError, match="incomplete"):
        require_complete(fit, "t.cache")
    save_model(quantization.rewritten(), tmp_path / "q.onnx")
    assert set(quantizers(onnx.load(tmp_path / "q.onnx"))) == {"image"}


def test_a_residual_without_a_range_is_not_fused(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        """g (float[1,4,4,4] x, float[1,4,4,4] other) => (float[1,4,4,4] y) {
            conv = Conv(x, w)
            y = Add(conv, other)
        }""",
        w=weight(4, 4, 1, 1),
    )
    quantization, fit = quantize_with_table(load_source(path), Table({"x": np.float32(0.1)}))
    assert quantization.plan.int8_nodes == ["conv"]
    assert fit.missing == {"other": ["y"]}
    assert [edge.tensor for edge in quantization.plan.edges] == ["x"]


def test_coverage_report(tmp_path: Path) -> None:
    names = ["image", "relu", "old:name", "gone", "(Unnamed Layer* 3) [Constant]_output"]
    _, fit = quantize_with_table(convs(tmp_path), Table({name: np.float32(0.1) for name in names}))
    assert fit.unmatched == ["old:name", "gone"]
    assert fit.positional == ["(Unnamed Layer* 3) [Constant]_output"]
    assert fit.colons == ["old:name"]
    for part in ("2 of 2 tensors", "1 from the row", "2 rows that match no tensor", "1 positional"):
        assert part in fit.text()
    assert fit.to_json()["rows"] == {"image": "image", "pool": "relu"}


def test_a_table_of_another_model_is_refused(tmp_path: Path) -> None:
    source = convs(tmp_path)
    with pytest.raises(InputError, match="every node of the model lacks a range"):
        quantize_with_table(source, Table({"x": np.float32(1)}))
    table = Table({"image": np.float32(0.1), "relu": np.float32(0.1)}, metadata={"model": "0" * 64})
    with pytest.raises(InputError, match="made for another model") as caught:
        quantize_with_table(source, table)
    assert "0" * 16 in str(caught.value)
    assert source.model.sha256[:16] in str(caught.value)


# --- rows that are not scales ----------------------------------------------------------------------------

WRONG = {
    "little-endian": lambda scale: scale.byteswap(),
    "amax": lambda scale: scale * np.float32(127),
    "inverse": lambda scale: np.float32(1) / scale,
}


def bounded(folder: Path) -> Source:
    """Tensors that the graph itself bounds: at most 6, 1, 1."""
    path = saved(
        folder,
        """g (float[8,6] x) => (float[8,4] y) {
            clip = Clip(x, low, high)
            a = MatMul(clip, w)
            sigmoid = Sigmoid(a)
            b = MatMul(sigmoid, v)
            softmax = Softmax(b)
            y = MatMul(softmax, v)
        }""",
        low=np.float32(0),
        high=np.float32(6),
        w=weight(6, 4),
        v=weight(4, 4),
    )
    return load_source(path)


BOUNDED = Table(dict(zip(("clip", "sigmoid", "softmax"), f32(6 / 127, 0.8 / 127, 1 / 127), strict=True)))


@pytest.mark.parametrize("encoding", WRONG)
def test_the_graph_itself_shows_that_rows_are_not_scales(tmp_path: Path, encoding: str) -> None:
    source = bounded(tmp_path)
    assert quantize_with_table(source, BOUNDED)[1].doubts == []
    table = Table({name: abs(WRONG[encoding](scale)) for name, scale in BOUNDED.scales.items()})
    _, fit = quantize_with_table(source, table)
    assert f"--encoding {encoding}" in fit.text() or encoding == "little-endian"
    assert len(fit.doubts) == 1
    assert "'clip'" in fit.doubts[0]
    assert not fit.complete


@pytest.mark.parametrize("encoding", WRONG)
def test_data_show_that_rows_are_not_scales(tmp_path: Path, encoding: str) -> None:
    source = convs(tmp_path)
    np.savez(tmp_path / "data.npz", image=weight(3, 4, 8, 8))
    samples = load_samples(str(tmp_path / "data.npz"), source.model.inputs, {})
    names = ["image", "relu", "pool"]
    observed = observe(source, Table(dict.fromkeys(names, np.float32(1))), samples)
    assert observed["image"] == np.abs(np.load(tmp_path / "data.npz")["image"]).max()
    right = {name: np.float32(observed[name] / 127) for name in names}
    assert quantize_with_table(source, Table(right), observed=observed)[1].doubts == []
    wrong = {name: abs(WRONG[encoding](scale)) for name, scale in right.items()}
    doubts = quantize_with_table(source, Table(wrong), observed=observed)[1].doubts
    assert "3 of 3 ranges cannot be right" in doubts[0]
    if encoding != "little-endian":
        assert f"--encoding {encoding}" in doubts[0]


def file_of(table: Table, encoding: str) -> bytes:
    """The table's file as a tool that gets the encoding wrong writes it."""
    rows = (
        f"{name}: {np.array(WRONG[encoding](scale), '>f4').tobytes().hex()}\n"
        for name, scale in table.scales.items()
    )
    return (table.header + "\n" + "".join(rows)).encode()


@pytest.mark.parametrize("encoding", WRONG)
def test_other_encodings_are_read_when_named(encoding: str) -> None:
    table = Table.from_bytes(file_of(BOUNDED, encoding), encoding=encoding)
    for name, scale in BOUNDED.scales.items():
        assert table.scales[name] == pytest.approx(scale, rel=1e-6)


def test_a_little_endian_file_is_recognized_by_its_values() -> None:
    scales = Table(dict(zip("abc", f32(0.0078, 0.1, 1.27), strict=True)))
    with pytest.raises(InputError) as caught:
        Table.from_bytes(file_of(scales, "little-endian"), "old.cache")
    assert "with their bytes reversed all 3 are from 0.0078 to 1.27" in str(caught.value)
    assert "--encoding little-endian" in str(caught.value)


# --- Q/DQ -> table ---------------------------------------------------------------------------------------


def qdq(folder: Path, **constants: ArrayLike) -> Path:
    """x -> Q/DQ -> MatMul with an int8 weight."""
    defaults: dict[str, ArrayLike] = {"scale": np.float32(0.1), "zero": np.int8(0)}
    return saved(
        folder,
        """g (float[N,4] x) => (float[N,3] y) {
            q = QuantizeLinear(x, scale, zero)
            dq = DequantizeLinear(q, scale, zero)
            w = DequantizeLinear(codes, weight_scale)
            y = MatMul(dq, w)
        }""",
        21 if np.asarray(constants.get("zero", 0)).dtype == np.int16 else 19,
        codes=np.ones((4, 3), np.int8),
        weight_scale=np.float32(0.01),
        **(defaults | constants),
    )


@pytest.mark.parametrize(
    ("constants", "scale"),
    [
        ({}, 0.1),
        ({"scale": np.array([0.1], np.float32), "zero": np.array([0], np.int8)}, 0.1),
        ({"zero": np.uint8(128)}, 0.1),  # the same grid as int8 around 0
        ({"zero": np.uint8(0)}, np.float64(np.float32(0.1)) * 255 / 127),  # up to 255 x scale
    ],
)
def test_quantizers_that_are_symmetric(tmp_path: Path, constants: dict[str, Any], scale: float) -> None:
    model = load_model(qdq(tmp_path, **constants))
    table = table_of(model)
    assert table.scales == {"x": np.float32(scale)}
    assert table.metadata["source_sha256"] == model.sha256


@pytest.mark.parametrize(
    ("constants", "cause"),
    [
        ({"zero": np.int8(3)}, "its zero-point is 3"),
        ({"zero": np.uint8(127)}, "its zero-point is 127"),
        ({"zero": np.int16(0)}, "quantized to int16"),
        ({"scale": np.full(4, 0.1, np.float32), "zero": np.zeros(4, np.int8)}, "it has 4 scales"),
        ({"scale": np.float32(-1)}, "its scale is -1.0"),
        ({"scale": np.float32(np.inf)}, "its scale is inf"),
    ],
)
def test_quantizers_without_a_row_are_refused(tmp_path: Path, constants: dict[str, Any], cause: str) -> None:
    path = qdq(tmp_path, **constants)
    with pytest.raises(InputError) as caught:
        table_of(load_model(path))
    assert cause in str(caught.value)
    assert "'x'" in str(caught.value)
    assert caught.value.file == str(path)


def test_a_model_without_quantizers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no quantized activations"):
        table_of(convs(tmp_path).model)


def test_two_scales_of_one_tensor_are_refused(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        """g (float[2] x) => (float[2] y) {
            q = QuantizeLinear(x, s, zero)
            a = DequantizeLinear(q, s, zero)
            p = QuantizeLinear(a, t, zero)
            b = DequantizeLinear(p, t, zero)
            y = Relu(b)
        }""",
        s=np.float32(0.1),
        t=np.float32(0.2),
        zero=np.int8(0),
    )
    with pytest.raises(InputError, match="two scales"):
        table_of(load_model(path))


def test_weights_are_no_rows_even_behind_operators(tmp_path: Path) -> None:
    """As PyTorch exports QAT models: constants in nodes, per-channel Q/DQ on the weight, then a Transpose."""
    path = saved(
        tmp_path,
        """g (float[2,4] x) => (float[2,3] y) {
            s = Constant<value = float {0.25}>()
            zero = Constant<value = int8 {0}>()
            q8 = QuantizeLinear(x, s, zero)
            dq = DequantizeLinear(q8, s, zero)
            wt = Identity(w)
            wq = QuantizeLinear<axis=0>(wt, ws, wz)
            wdq = DequantizeLinear<axis=0>(wq, ws, wz)
            t = Transpose(wdq)
            y = MatMul(dq, t)
        }""",
        w=weight(3, 4),
        ws=np.full(3, 0.01, np.float32),
        wz=np.zeros(3, np.int8),
    )
    assert table_of(load_model(path)).scales == {"x": np.float32(0.25)}


@pytest.mark.parametrize("symmetric", [True, False])
def test_models_that_onnxruntime_quantized(tmp_path: Path, symmetric: bool) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([{"image": weight(1, 4, 8, 8) + 1} for _ in range(3)])

        def get_next(self) -> dict[str, NDArray] | None:
            return next(self.feeds, None)

    quantize_static(
        convs(tmp_path).model.path,
        tmp_path / "q.onnx",
        Reader(),
        activation_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"ActivationSymmetric": symmetric},
    )
    model = load_model(tmp_path / "q.onnx")
    if not symmetric:
        with pytest.raises(InputError, match="cannot be a row"):
            table_of(model)
        return
    expected = quantizers(onnx.load(tmp_path / "q.onnx"))
    expected["sum"] = expected.pop("sum_QuantizeLinear_Input")  # the output's own name is behind its Q/DQ
    assert table_of(model).scales == expected


# --- there and back --------------------------------------------------------------------------------------

names = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=12
) | st.sampled_from(["a: b", "onnx::Conv_12", "x: 3c010a14", "层/输出:0", " ", "TRT-1"])
scales = st.floats(np.float32(1e-20), np.float32(1e20), width=32).map(np.float32)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(names, min_size=3, max_size=3, unique=True), st.lists(scales, min_size=2, max_size=2))
def test_round_trips_keep_names_and_bits(tmp_path: Path, named: list[str], values: list[np.float32]) -> None:
    first, second, last = (f"{index}{name}" for index, name in enumerate(named))  # unlike weights and nodes
    nodes = [
        onnx.helper.make_node("MatMul", [first, "w"], [second], "one"),
        onnx.helper.make_node("MatMul", [second, "w"], [last], "two"),
    ]
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2, 2]) for n in (first, last)]
    w = onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], [w]), ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    table = Table(dict(zip((first, second), values, strict=True)))
    table.save(tmp_path / "t.cache")

    quantization, _ = quantize_with_table(
        load_source(tmp_path / "model.onnx"), Table.load(tmp_path / "t.cache")
    )
    save_model(quantization.rewritten(), tmp_path / "q.onnx")
    back = table_of(load_model(tmp_path / "q.onnx"))
    assert back.to_bytes() == table.to_bytes()

    again, _ = quantize_with_table(load_source(tmp_path / "model.onnx"), back)
    save_model(again.rewritten(), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "q.onnx").read_bytes()


def test_models_in_half_give_the_original_names_and_widened_scales(tmp_path: Path) -> None:
    source = load_source(convs(tmp_path).model.path, rest="fp16")
    table = Table({"image": np.float32(0.0078125), "relu": np.float32(0.1)})
    quantization, _ = quantize_with_table(source, table, rest="fp16")
    save_model(quantization.rewritten(rest="fp16"), tmp_path / "half.onnx")
    back = table_of(load_model(tmp_path / "half.onnx"))
    assert back.scales == {"image": np.float32(0.0078125), "pool": np.float32(np.float16(0.1))}


# --- versions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8.6.1", 8601),
        ("8.6", 8601),
        ("8.5.3", 8503),
        ("7.2.3.4", 7203),
        ("9.3.0", 9300),
        ("10.0.1", 100001),
        ("10.2", 100200),
        ("10.16", 101601),
        ("10.16.1.11", 101601),
    ],
)
def test_version_numbers(text: str, number: int) -> None:
    assert version_number(text) == number


@given(st.integers(5, 10), st.integers(0, 9), st.integers(0, 9))
def test_version_number_is_the_inverse(major: int, minor: int, patch: int) -> None:
    text = f"{major}.{minor}.{patch}"
    assert tensorrt_version(version_number(text)) == text


@pytest.mark.parametrize("text", ["11.0", "4.0.1", "8", "eight", "8.6.1-rc", ""])
def test_versions_without_tables(text: str) -> None:
    with pytest.raises(InputError):
        version_number(text)


# --- the command -----------------------------------------------------------------------------------------

Convert = Callable[..., int]


@pytest.fixture
def convert() -> Convert:
    parser = argparse.ArgumentParser()
    for item in cli.ARGUMENTS:
        item.add_to(parser)
    parser.add_argument("-o", "--output")
    parser.add_argument("--data")
    parser.set_defaults(recipe=None, quiet=True, command=CACHE)
    return lambda *arguments: cli.run(parser.parse_args([str(a) for a in arguments]))


def test_convert_there_and_back(tmp_path: Path, convert: Convert) -> None:
    model = convs(tmp_path).model.path
    (tmp_path / "t.cache").write_text("TRT-8601-EntropyCalibration2\nimage: 3c010a14\npool: 3dcccccd\n")
    q, back = tmp_path / "q.onnx", tmp_path / "back.cache"
    assert convert(tmp_path / "t.cache", "--model", model, "-o", q) is ExitCode.PASS
    assert convert(q, "-o", back, "--for", "8.6.1") is ExitCode.PASS
    assert back.read_bytes() == (tmp_path / "t.cache").read_bytes()


def test_convert_rewrites_headers_and_reads_foreign_caches(tmp_path: Path, convert: Convert) -> None:
    (tmp_path / "ort.cache").write_text("image 1.27\n")
    out = tmp_path / "out.cache"
    convert(tmp_path / "ort.cache", "-o", out, "--for", "10.16", "--algorithm", "MinMaxCalibration")
    assert out.read_text() == "TRT-101601-MinMaxCalibration\nimage: 3c23d70a\n"
    convert(out, "-o", tmp_path / "old.cache", "--for", "8.6.1")
    assert (tmp_path / "old.cache").read_text() == "TRT-8601-MinMaxCalibration\nimage: 3c23d70a\n"


def test_convert_strictly_writes_nothing(tmp_path: Path, convert: Convert) -> None:
    model = convs(tmp_path).model.path
    Table({"image": np.float32(0.1)}).save(tmp_path / "t.cache")
    with pytest.raises(InputError, match="incomplete"):
        convert(tmp_path / "t.cache", "--model", model, "-o", tmp_path / "q.onnx", "--strict")
    assert not (tmp_path / "q.onnx").exists()


def test_convert_bad_usage(tmp_path: Path, convert: Convert) -> None:
    model = convs(tmp_path).model.path
    table, out = tmp_path / "t.cache", tmp_path / "out"
    Table({"image": np.float32(0.1)}).save(table)
    for arguments in (
        ["-o", out],
        [table],
        [model, "--model", model, "-o", out],
        [table, "-o", tmp_path / "q.onnx"],
        [table, "--model", model, "-o", out, "--for", "8.6"],
        [table, "-o", out, "--for", "11.4"],
        [tmp_path / "missing.cache", "-o", out],
    ):
        with pytest.raises(InputError):
            convert(*arguments)
    assert not out.exists()


def test_reports_are_short() -> None:
    fit = Fit({}, {f"t{i}": ["n"] for i in range(100)}, [], [], [], [])
    assert len(fit.text()) < 200
