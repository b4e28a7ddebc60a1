"""Calibration tables: golden vectors of TensorRT's format, bytes that come back, and what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtq.calibration.table import ALGORITHMS, Table, metadata_path, tensorrt_version
from trtq.errors import InputError

HEADER = b"TRT-101601-EntropyCalibration2\n"

GOLDEN = {  # sign, exponent and fraction of the big-endian float32, by hand
    "3c010a14": (1 + 0x010A14 / 2**23) * 2.0 ** (0x78 - 127),  # 0.007876, amax 1.0002
    "3f800000": 1.0,
    "3c000000": 1 / 128,
    "42fe0000": 127.0,
    "3f000001": 0.5 + 2.0**-24,
    "00800000": 2.0**-126,
    "00000001": 2.0**-149,  # denormal
    "7f7fffff": (2 - 2.0**-23) * 2.0**127,
}


@pytest.mark.parametrize(("digits", "value"), GOLDEN.items())
def test_scales_are_big_endian_floats(digits: str, value: float) -> None:
    content = HEADER + f"x: {digits}\n".encode()
    table = Table.from_bytes(content)
    assert table.scales == {"x": value}
    assert isinstance(table.scales["x"], np.float32)
    assert table.to_bytes() == content
    assert Table.from_bytes(content.replace(digits.encode(), digits.upper().encode())).scales == {"x": value}


def test_the_table_of_the_documentation() -> None:
    table = Table.from_bytes(HEADER + b"data: 3c010a14\n")
    assert float(table.scales["data"]) == pytest.approx(0.007876, abs=5e-7)
    assert table.to_json()["tensors"]["data"]["amax"] == pytest.approx(1.0002, abs=5e-5)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (8601, "8.6.1"),
        (8600, "8.6.0"),
        (7103, "7.1.3"),
        (9300, "9.3.0"),
        (100001, "10.0.1"),
        (101601, "10.16.1"),
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_headers(number: int, text: str, algorithm: str) -> None:
    content = f"TRT-{number}-{algorithm}\nx: 3f800000\n".encode()
    table = Table.from_bytes(content)
    assert (table.version, table.algorithm) == (number, algorithm)
    assert tensorrt_version(number) == text
    assert table.to_bytes() == content


NAMES = [
    "x",
    "a:b",
    "a: b",
    "a: 3f800000",
    ": ",
    " leading",
    "trailing ",
    "two  blanks\tand a tab",
    "(Unnamed Layer* 7) [Constant]_output",
    "/model/layer.0/Conv_output_0",
    "Größe/張力",
    "vertical\x0btab, form\x0cfeed, record\x1eseparator, next\x85line and line\u2028separator",
    "carriage\rreturn",
]


def test_names_of_all_kinds() -> None:
    table = Table({name: np.float32(i + 1) for i, name in enumerate(NAMES)})
    again = Table.from_bytes(table.to_bytes())
    assert list(again.scales.items()) == list(table.scales.items())
    assert again.to_bytes() == table.to_bytes()


positive = st.floats(2.0**-149, float(np.finfo(np.float32).max), width=32).map(np.float32)
names = st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1)


@given(st.dictionaries(names, positive), st.sampled_from(ALGORITHMS), st.integers(1000, 110000))
def test_any_table_comes_back(scales: dict, algorithm: str, version: int) -> None:
    table = Table(scales, version, algorithm)
    again = Table.from_bytes(table.to_bytes())
    assert list(again.scales.items()) == list(scales.items())
    assert (again.version, again.algorithm) == (version, algorithm)
    assert again.to_bytes() == table.to_bytes()


def test_blank_lines_other_line_ends_and_blanks_behind_a_row() -> None:
    content = HEADER + b"x: 3f800000\ny: 3c010a14\n"
    expected = Table.from_bytes(content).scales
    for same in (
        content.replace(b"\n", b"\r\n"),
        content.replace(b"\n", b"\n\n"),
        content.replace(b"\n", b" \t\n"),
        content + b"\n \n\r\n",
        content[:-1],
    ):
        assert Table.from_bytes(same).scales == expected
        assert Table.from_bytes(same).to_bytes() == content


def test_a_table_without_rows() -> None:
    assert Table.from_bytes(HEADER).scales == {}
    assert Table.from_bytes(HEADER[:-1]).to_bytes() == HEADER


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", 1),
        (b"\n", 1),
        (b"\n" + HEADER, 1),
        (b"x: 3f800000\n", 1),
        (b"TRT--EntropyCalibration2\n", 1),
        (b"TRT-8601\n", 1),
        (b"TRT-8601-\n", 1),
        (b"TRT-10.16-EntropyCalibration2\n", 1),
        (b"TRT-" + b"1" * 5000 + b"-EntropyCalibration2\n", 1),
        ("TRT-١٠١٦-EntropyCalibration2\n".encode(), 1),
        (b"trt-8601-EntropyCalibration2\n", 1),
        (b"\x89PNG\r\n\x1a\n", 1),
        (HEADER + b"x\n", 2),
        (HEADER + b"x: \n", 2),
        (HEADER + b": 3f800000\n", 2),
        (HEADER + b"x:3f800000\n", 2),
        (HEADER + b"x: 3f80000\n", 2),
        (HEADER + b"x: 3f8000000\n", 2),
        (HEADER + b"x: 0x3f8000\n", 2),
        (HEADER + b"x: 3f80000g\n", 2),
        (HEADER + "x: 3f80000٣\n".encode(), 2),
        (HEADER + b"x: 0.007876\n", 2),
        (HEADER + b"x: 3f800000\n\ny: 3f800000\nz = 1\n", 5),
        (HEADER + b"x: 3f800000\ny: 3f800000\nx: 3f800000\n", 4),
        (HEADER + b"x: 3f800000\n" + HEADER, 3),
        (HEADER + b"x: 00000000\n", 2),
        (HEADER + b"x: 80000000\n", 2),
        (HEADER + b"x: bf800000\n", 2),
        (HEADER + b"x: 7f800000\n", 2),
        (HEADER + b"x: ff800000\n", 2),
        (HEADER + b"x: 7fc00000\n", 2),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_table_is_refused_with_its_line(content: bytes, line: int) -> None:
    with pytest.raises(InputError) as caught:
        Table.from_bytes(content, "t.cache")
    assert caught.value.problem == "not a calibration table of TensorRT"
    assert caught.value.file == "t.cache"
    assert caught.value.cause is not None
    assert caught.value.cause.startswith(f"line {line}: ")


@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_are_a_table_or_refused(content: bytes, with_header: bool) -> None:
    content = HEADER * with_header + content
    try:
        table = Table.from_bytes(content)
    except InputError:
        return
    assert Table.from_bytes(table.to_bytes()) == table


def test_a_name_with_a_line_break_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'a\\nb'"):
        Table({"x": np.float32(1), "a\nb": np.float32(1)}).save(tmp_path / "t.cache")
    assert list(tmp_path.iterdir()) == []


# -- files

TABLE = Table(
    {"x": np.float32(0.5), "y: z": np.float32(0.007876)},
    metadata={"method": "entropy", "rows": 100, "model": "m"},
)


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    TABLE.save(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.cache", "calibration.cache.json"]
    rows = [b"x: 3f000000\n", b"y: z: " + struct.pack(">f", 0.007876).hex().encode() + b"\n"]
    assert path.read_bytes() == HEADER + b"".join(rows)
    assert Table.load(path) == TABLE
    assert json.loads(metadata_path(path).read_text()).items() > TABLE.metadata.items()


def test_metadata_that_is_missing_or_of_another_table(tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    TABLE.save(path)
    path.write_bytes(TABLE.to_bytes().replace(b"3f000000", b"3f000001"))
    assert Table.load(path).metadata == {}
    path.write_bytes(TABLE.to_bytes())
    assert Table.load(path).metadata == TABLE.metadata
    for other in ("{}", '{"method": "max"}'):
        metadata_path(path).write_text(other)
        assert Table.load(path).metadata == {}
    metadata_path(path).unlink()
    assert Table.load(path).metadata == {}


@pytest.mark.parametrize("other", ["[]", "1", "null", '"text"'])
def test_metadata_that_are_no_object(other: str, tmp_path: Path) -> None:
    TABLE.save(path := tmp_path / "calibration.cache")
    metadata_path(path).write_text(other)
    with pytest.raises(InputError, match=r"calibration\.cache\.json\n  cause:  it is not a JSON object"):
        Table.load(path)


def test_metadata_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    TABLE.save(path)
    metadata_path(path).write_text("{")
    with pytest.raises(InputError, match="metadata") as caught:
        Table.load(path)
    assert caught.value.file == str(metadata_path(path))


@pytest.mark.parametrize("name", ["missing.cache", "."])
def test_a_table_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot read the calibration table"):
        Table.load(tmp_path / name)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.cache").write_bytes(HEADER + b"x: 3f8")
    with pytest.raises(InputError) as caught:
        Table.load(tmp_path / "t.cache")
    assert caught.value.file == str(tmp_path / "t.cache")


def test_json_for_people_and_scripts() -> None:
    assert Table({"x": np.float32(0.5)}, 8601, "MinMaxCalibration", {"method": "max"}).to_json() == {
        "header": "TRT-8601-MinMaxCalibration",
        "metadata": {"method": "max"},
        "tensors": {"x": {"scale": 0.5, "amax": 63.5}},
    }
