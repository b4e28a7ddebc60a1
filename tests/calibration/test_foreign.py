"""Caches that ONNX Runtime's own functions wrote, and files as NVIDIA ModelOpt reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnxruntime.quantization import CalibrationMethod, write_calibration_table
from onnxruntime.quantization.calibrate import TensorData, TensorsData, save_tensors_data

from trtq.calibration.foreign import HIGHEST_ONLY, read_table
from trtq.calibration.table import Table
from trtq.errors import InputError

RANGES = {"a: b": (-2.54, 1.27), "images": (0.0, 255.0), "日本/é:0": (-1.0, 3.0), "zero": (0.0, 0.0)}
SCALES = {"a: b": 2.54 / 127, "images": 255 / 127, "日本/é:0": 3 / 127}
"""Of the tensors that have a range: that of `zero` is none."""
FROM_HIGHEST = SCALES | {"a: b": 1.27 / 127}


def tensors(ranges: dict[str, tuple[float, float]]) -> dict[str, TensorData]:
    return {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in ranges.items()
    }


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_calibration_table(tensors(RANGES), str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("file", "expected", "caution"),
    [
        ("calibration.json", SCALES, None),
        ("calibration.flatbuffers", FROM_HIGHEST, HIGHEST_ONLY),
        ("calibration.cache", FROM_HIGHEST, HIGHEST_ONLY),
    ],
)
def test_caches_of_onnxruntime(
    written: Path, file: str, expected: dict[str, float], caution: str | None
) -> None:
    table = read_table(written / file)
    assert table.scales == {name: pytest.approx(scale, rel=1e-6) for name, scale in expected.items()}
    assert all(isinstance(scale, np.float32) for scale in table.scales.values())
    assert table.metadata["source"].startswith("ONNX Runtime")
    assert table.metadata.get("caution") == caution
    assert Table.from_bytes(table.to_bytes()).scales == table.scales


def test_calibrators_result_of_onnxruntime(tmp_path: Path) -> None:
    data = TensorsData(CalibrationMethod.MinMax, tensors(RANGES))
    write_calibration_table(data, str(tmp_path))
    save_tensors_data(data, tmp_path / "saved.json")
    for file in ("calibration.json", "saved.json"):
        assert read_table(tmp_path / file).scales == pytest.approx(SCALES)


def test_pairs_of_old_versions(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"x": [-4.0, 2.0], "y": [[0.5], [1.5]]}))
    assert read_table(tmp_path / "old.json").scales == pytest.approx({"x": 4 / 127, "y": 1.5 / 127})


def test_modelopt_skips_the_first_line_whatever_it_says(tmp_path: Path) -> None:
    path = tmp_path / "modelopt.cache"
    path.write_text("made by hand\ninput: 3c010a14\nblock: 1: out: 3c010a14\n\n")
    table = read_table(path)
    assert table.scales == {"input": np.float32(0.007875938), "block: 1: out": np.float32(0.007875938)}
    assert table.header == "TRT-101601-EntropyCalibration2"


def test_tables_of_tensorrt_are_read_as_they_are(tmp_path: Path) -> None:
    table = Table({"x": np.float32(0.1)}, 8601, "MinMaxCalibration", {"method": "max"})
    table.save(tmp_path / "t.cache")
    assert read_table(tmp_path / "t.cache") == table


@pytest.mark.parametrize(
    "content",
    [
        b'{"x": {"lowest": {"data": 0}}}',
        b'{"x": {"lowest": {"data": [0, 0]}, "highest": {"data": [1, 2]}}}',
        b'{"x": [0, NaN]}',
        b'{"x": [0, 1',
        b"[1, 2]",
        b"{}",
        b"\x0c\x00\x00\x00 flat but not flatbuffers",
        b"x 1.0\nx 2.0\n",
        b"x -1.0\n",
        b"x inf\n",
        b"no number here\n",
        b"",
        b"\xff\xfe",
    ],
)
def test_damaged_caches_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_table(path)
    assert caught.value.file == str(path)
    assert caught.value.remedy


def test_truncated_flatbuffers(written: Path) -> None:
    whole = (written / "calibration.flatbuffers").read_bytes()
    for length in range(1, len(whole.rstrip(b"\0"))):
        (written / "cut").write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_table(written / "cut")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the calibration table"):
        read_table(tmp_path / "none.cache")
