"""Calibration caches of other tools, read into a `Table`.

- **ONNX Runtime** (`onnxruntime.quantization.write_calibration_table` and `save_tensors_data`): lowest and
  highest value of each tensor as `calibration.json`; only the highest as `calibration.flatbuffers` and as
  text `calibration.cache` with a line `name 1.25` per tensor. Where a tensor reaches further below zero than
  above, the highest value is not its amax: prefer the JSON.
- **NVIDIA ModelOpt** (`--calibration_cache_path`): TensorRT's own format, but its reader skips the first
  line whatever it says, and fails on names that hold ": ". Such files are read with any first line.

Ranges become symmetric: amax = max(|lowest|, |highest|), scale = amax / 127. A range of zeros is none: its
tensor has no row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trtq.calibration.table import Table
from trtq.errors import InputError
from trtq.files import PathLike, parse_json, read_bytes
from trtq.numerics import has_scale, scale_from_amax

HIGHEST_ONLY = (
    "the cache holds only the highest value of each tensor, so the range of a tensor that reaches further "
    "below zero than above is too small; calibration.json beside it has both ends"
)
"""`metadata["caution"]` of a table whose ranges may be too small."""

_TABLE_ROW = re.compile(r".+: [0-9a-fA-F]{8}\s*")
_TEXT_ROW = re.compile(r"(?P<name>.+) (?P<highest>\S+)")


def read_table(path: PathLike, encoding: str = "scale") -> Table:
    """The table in a calibration cache of TensorRT, ONNX Runtime or ModelOpt, told apart by their content.

    Caches without TensorRT's header get that of TensorRT 10.16.1; `metadata["source"]` names their format,
    and `metadata["caution"]` says what is doubtful about it.

    Args:
        encoding: what the rows of TensorRT's format hold (`trtq.calibration.table.ENCODINGS`).

    Raises:
        InputError: missing, none of these formats, or a range that is not one.
    """
    path = Path(path)
    try:
        content = read_bytes(path)
    except OSError as error:
        raise InputError("cannot read the calibration table", file=path, cause=error.strerror) from error
    lines = [line for line in content.decode(errors="replace").split("\n") if line.strip()]
    if content.startswith(b"TRT-") or not lines:
        return Table.load(path, encoding)
    if lines[0].startswith("{"):
        return _from_ranges(_json_ranges(content, path), path, {"source": "ONNX Runtime, JSON"})
    if b"\0" in content:
        notes = {"source": "ONNX Runtime, flatbuffers", "caution": HIGHEST_ONLY}
        return _from_ranges(_flatbuffers_ranges(content, path), path, notes)
    if len(lines) > 1 and all(_TABLE_ROW.fullmatch(line) for line in lines[1:]):
        headed = Table({}).header + "\n" + "\n".join(lines[1:])
        table = Table.from_bytes(headed.encode(), path, encoding)
        return Table(table.scales, metadata={"source": "ModelOpt, any first line"})
    if ranges := _text_ranges(lines):
        return _from_ranges(ranges, path, {"source": "ONNX Runtime, text", "caution": HIGHEST_ONLY})
    return Table.load(path, encoding)  # which says what is wrong


def _from_ranges(ranges: Iterable[tuple[str, list[float]]], path: Path, metadata: Mapping[str, Any]) -> Table:
    """A table of amax = the largest magnitude known of each tensor: of both its ends, or of the highest."""
    scales: dict[str, np.float32] = {}
    for name, values in ranges:
        if name in scales:
            raise _bad(path, f"a second range for '{name}'")
        if not values or not np.all(np.isfinite(values)) or (len(values) == 1 and values[0] < 0):
            raise _bad(path, f"the range of '{name}' is {values}")
        amax = float(np.abs(values).max())
        scales[name] = np.float32(scale_from_amax(amax)) if has_scale(amax) else np.float32(0)
    scales = {name: scale for name, scale in scales.items() if scale > 0}
    if not scales:
        raise _bad(path, "it holds no tensor with a range other than zero")
    return Table(scales, metadata=metadata)


def _bad(path: Path, cause: object) -> InputError:
    return InputError(
        "not a calibration cache of ONNX Runtime that can be used",
        file=path,
        cause=cause,
        remedy="take calibration.json, which has the lowest and the highest value, or calibrate again",
    )


def _json_ranges(content: bytes, path: Path) -> Iterable[tuple[str, list[float]]]:
    """Tensor, [lowest, highest] from `write_calibration_table`'s JSON, of any version."""
    try:
        tensors = parse_json(content)
        if tensors.get("CLS") == "TensorsData":
            tensors = tensors["data"]
        return [(name, _bounds(entry)) for name, entry in tensors.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _bad(path, repr(error)) from error


def _bounds(entry: Any) -> list[float]:
    """Lowest and highest value of a tensor: `{"lowest": …, "highest": …}`, or a pair in old versions."""
    pair = [entry["lowest"], entry["highest"]] if isinstance(entry, Mapping) else list(entry)[:2]
    values = [np.ravel(v["data"] if isinstance(v, Mapping) else v).astype(float) for v in pair]
    if len(values) != 2 or any(v.size != 1 for v in values):
        raise ValueError("a tensor has more than one range; per-channel ranges of activations are not used")
    return [float(v[0]) for v in values]


def _flatbuffers_ranges(content: bytes, path: Path) -> Iterable[tuple[str, list[float]]]:
    from onnxruntime.quantization.CalTableFlatBuffers.TrtTable import TrtTable

    try:
        root = TrtTable.GetRootAs(bytearray(content), 0)
        rows = [root.Dict(index) for index in range(root.DictLength())]
        ranges = [(row.Key().decode(), [float(row.Value())]) for row in rows]
    except Exception as error:  # the reader trusts its input: a broken file fails anywhere
        raise _bad(path, repr(error)) from error
    if not content.endswith(b"\0") or not all(name for name, _ in ranges):  # the last string is cut
        raise _bad(path, "it is truncated")
    return ranges


def _text_ranges(lines: list[str]) -> list[tuple[str, list[float]]]:
    """Tensor, [highest] of each line, or nothing where one is not a name and a number."""
    ranges = []
    for line in lines:
        row = _TEXT_ROW.fullmatch(line.rstrip())
        try:
            ranges.append((row["name"], [float(row["highest"])]) if row else ("", []))
        except ValueError:
            return []
    return ranges if all(values for _, values in ranges) else []
