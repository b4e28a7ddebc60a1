"""The quantization arithmetic against the paper's equations, hand-worked vectors and ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trtq import numerics

# -- the paper's equations, with its own s, which multiplies


def paper_scale(x, alpha, bits):
    """Eq. 5-9: symmetric, -alpha ... alpha."""
    s = (2 ** (bits - 1) - 1) / alpha
    codes = np.clip(np.round(s * x), -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)
    return codes, codes / s


@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16])
@pytest.mark.parametrize("alpha", [0.37, 1.0, 96.5])
def test_scale_quantization_is_the_papers(bits, alpha):
    x = np.random.default_rng(bits).normal(scale=alpha / 2, size=4096)
    scale = numerics.scale_from_amax(alpha, bits).astype(np.float64)
    codes, values = paper_scale(x, float(scale) * (2 ** (bits - 1) - 1), bits)
    np.testing.assert_array_equal(numerics.quantize(x, scale, bits=bits, narrow=True), codes)
    np.testing.assert_allclose(
        numerics.fake_quantize(x, scale, bits=bits, narrow=True), values, rtol=1e-12, atol=0
    )


# -- codes by hand


def test_halves_round_to_even():
    x = np.array(
        [0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -3.5, 126.5, -126.5, 0.49999997, 0.50000006], np.float32
    )
    expected = [0, 2, 2, 4, 0, -2, -2, -4, 126, -126, 0, 1]
    np.testing.assert_array_equal(numerics.quantize(x, 1.0), expected)
    np.testing.assert_array_equal(numerics.quantize(x * np.float32(0.25), 0.25), expected)


def test_saturation():
    x = np.array([127.0, 127.5, 128.0, 1e30, -127.0, -127.5, -128.0, -129.0, -1e30])
    np.testing.assert_array_equal(numerics.quantize(x, 1), [127] * 4 + [-127] + [-128] * 4)
    np.testing.assert_array_equal(numerics.quantize(x, 1, narrow=True), [127] * 4 + [-127] * 5)
    assert numerics.quantize(x, 1).dtype == np.int8


@pytest.mark.parametrize(
    ("bits", "narrow", "low", "high", "dtype"),
    [
        (2, False, -2, 1, np.int8),
        (4, False, -8, 7, np.int8),
        (4, True, -7, 7, np.int8),
        (8, True, -127, 127, np.int8),
        (9, False, -256, 255, np.int16),
        (16, False, -32768, 32767, np.int16),
    ],
)
def test_codes_of_each_width(bits, narrow, low, high, dtype):
    assert numerics.integer_range(bits, narrow) == (low, high)
    codes = numerics.quantize([-1e9, 0.0, 1e9], 1.0, bits=bits, narrow=narrow)
    np.testing.assert_array_equal(codes, [low, 0, high])
    assert codes.dtype == dtype


@pytest.mark.parametrize("bits", [1, 0, 17])
def test_widths_that_are_refused(bits):
    with pytest.raises(ValueError, match=f"not {bits}"):
        numerics.scale_from_amax(1.0, bits)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, [1.0, 0.0]])
def test_a_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match="scale must be positive"):
        numerics.quantize(np.ones((2, 2)), scale, axis=0)


def test_per_channel_scales_need_an_axis():
    with pytest.raises(ValueError, match="need an axis"):
        numerics.quantize(np.ones((2, 2)), [1.0, 2.0])


# -- scales and ranges


def test_scale_from_amax():
    smallest = np.finfo(np.float32).tiny
    scales = numerics.scale_from_amax([127.0, 1.0, 0.0, 1e-45, np.finfo(np.float32).max])
    np.testing.assert_array_equal(
        scales, np.array([1.0, 1 / 127, 1.0, smallest, np.finfo(np.float32).max / 127.0], np.float32)
    )
    assert scales.dtype == np.float32
    assert numerics.scale_from_amax(7.0, bits=4) == 1.0


@pytest.mark.parametrize("amax", [-1.0, np.nan, np.inf, [1.0, -0.5]])
def test_amax_must_be_a_magnitude(amax):
    with pytest.raises(ValueError, match="finite and not negative"):
        numerics.scale_from_amax(amax)


def test_amax_per_channel():
    x = np.array([[[1.0, -7.0], [0.0, 0.0]], [[2.0, 3.0], [0.0, -0.0]]])
    assert numerics.amax_per_channel(x, None) == 7
    np.testing.assert_array_equal(numerics.amax_per_channel(x, 0), [7, 3])
    np.testing.assert_array_equal(numerics.amax_per_channel(x, 1), [7, 0])
    np.testing.assert_array_equal(numerics.amax_per_channel(x, -1), [2, 7])
    np.testing.assert_array_equal(numerics.amax_per_channel(np.zeros((3, 0)), 0), [0, 0, 0])
    assert numerics.amax_per_channel(np.zeros(0), None) == 0


# -- ONNX Runtime


def onnx_runtime(x, scale, zero_point, axis):
    """Codes and values of ONNX Runtime's QuantizeLinear and DequantizeLinear."""
    names = {"float32": "float", "float16": "float16", "int8": "int8", "int16": "int16"}
    kind, integer = names[x.dtype.name], names[zero_point.dtype.name]
    attribute = "" if axis is None else f"<axis = {axis}>"
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]>
        g ({kind}{list(x.shape)} x, {kind}{list(scale.shape)} s, {integer}{list(zero_point.shape)} z)
          => ({integer}{list(x.shape)} q, {kind}{list(x.shape)} y) {{
            q = QuantizeLinear {attribute} (x, s, z)
            y = DequantizeLinear {attribute} (q, s, z)
        }}""".replace("[]", "")
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x, "s": scale, "z": zero_point})


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("integer", "bits"), [(np.int8, 8), (np.int16, 16)])
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_bits_are_those_of_onnx_runtime(dtype, integer, bits, axis):
    random = np.random.default_rng(bits)
    shape = (5, 7, 64)
    channels = () if axis is None else (shape[axis],)
    scale = np.asarray(random.uniform(0.9, 1.1, channels) * 2.0 ** (4 - bits), dtype)
    zero_point = np.zeros(channels, integer)
    x = random.normal(scale=6, size=shape).astype(dtype)
    x.flat[::3] = (random.integers(-300, 300, x.flat[::3].size) + 0.5) * float(scale.flat[0])  # halves
    codes, values = onnx_runtime(x, scale, zero_point, axis)
    ours = numerics.quantize(x, scale, axis=axis, bits=bits)
    np.testing.assert_array_equal(ours, codes)
    assert ours.dtype == integer
    back = numerics.dequantize(codes, scale, axis=axis)
    np.testing.assert_array_equal(back.view(np.uint8), values.view(np.uint8))
    assert back.dtype == dtype
    together = numerics.fake_quantize(x, scale, axis=axis, bits=bits)
    np.testing.assert_array_equal(together, values)


# -- invariants

amaxes = st.floats(2.0**-100, 2.0**100, width=32)
units = arrays.arrays(np.float32, st.integers(1, 50), elements=st.floats(-1, 1, width=32))


@given(amaxes, units, st.booleans())
def test_error_inside_the_range_is_half_a_step(amax, unit, narrow):
    x = unit.astype(np.float64) * amax
    scale = numerics.scale_from_amax(amax).astype(np.float64)
    error = np.abs(x - numerics.fake_quantize(x, scale, narrow=narrow))
    assert np.all(error <= scale / 2 * (1 + 1e-6))  # the scale is a rounded float32


@given(amaxes, units, st.integers(2, 16))
def test_the_grid_is_its_own_image_and_holds_zero(amax, unit, bits):
    x = np.append(unit, np.float32(0)) * np.float32(2 * amax)  # half of the range saturates
    scale = numerics.scale_from_amax(amax, bits)
    once = numerics.fake_quantize(x, scale, bits=bits)
    np.testing.assert_array_equal(numerics.fake_quantize(once, scale, bits=bits), once)
    assert once[-1] == 0
