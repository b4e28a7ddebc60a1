"""The calibration table: tensor -> scale, in TensorRT's own file format, with metadata beside it.

TensorRT's format (its documentation does not spell it out; this is read off tables and tools in circulation,
no library of TensorRT wrote one here): a first line `TRT-<version>-<algorithm>`, then one line
`name: xxxxxxxx` per tensor, the float32 scale (amax / 127) as big-endian hex. Names may contain colons and
blanks; the last ": " ends the name. The version is major * 1000 + minor * 100 + patch up to TensorRT 9 and
major * 10000 + minor * 100 + patch from 10 on. The algorithm names the calibrator class that may read the
table back, not the method that made the scales;
method, model, data and tool version are in `<table>.json`, which TensorRT does not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtq.errors import InputError
from trtq.escapes import html_table
from trtq.files import PathLike, is_stream, read_bytes, read_json, sha256_bytes, write_bytes, write_json
from trtq.numerics import INT8_MAX

if TYPE_CHECKING:
    from trtq.graph.quantization import Quantization

ALGORITHMS = ("EntropyCalibration2", "MinMaxCalibration", "EntropyCalibration", "LegacyCalibration")

ENCODINGS: dict[str, Callable[[np.float32], np.float32]] = {
    "scale": lambda value: value,
    "little-endian": lambda value: value.byteswap(),
    "amax": lambda value: value / np.float32(INT8_MAX),
    "inverse": lambda value: np.float32(1) / value,
}
"""What a row's big-endian float32 is, and the scale it means. TensorRT writes scales; tools around it also
write scales byte-swapped, amax, and 127 / amax."""

_LAST_PATCHES = {(8, 6): 1, (10, 0): 1, (10, 13): 3, (10, 14): 1, (10, 15): 1, (10, 16): 1}
"""Last patch of each minor version that has one, so that "10.16" names a release."""

_HEADER = re.compile(r"TRT-([1-9]\d{3,5})-(\w+)", re.ASCII)
_ROW = re.compile(r"(?P<name>.+): (?P<scale>[0-9a-fA-F]{8})")


@dataclass(frozen=True)
class Table:
    """Scales of the activations of one model.

    Attributes:
        scales: tensor name -> float32 scale (amax / 127), finite and > 0, in the order of the file.
        version: TensorRT's version as the header has it; 101601 is 10.16.1, the last with calibrators.
        algorithm: one of `ALGORITHMS`.
        metadata: what made the table (`method`, `model`, `data`, `trtq`, `rows`); empty if unknown.
    """

    scales: Mapping[str, np.float32]
    version: int = 101601
    algorithm: str = "EntropyCalibration2"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        method = f", method {self.metadata['method']}" if "method" in self.metadata else ""
        return f"<Table: {len(self.scales)} tensors{method}>"

    def _repr_html_(self) -> str:
        rows = [(name, f"{scale:.4g}", f"{scale * INT8_MAX:.4g}") for name, scale in self.scales.items()]
        return html_table(repr(self)[1:-1], rows, ("tensor", "scale", "amax"))

    @property
    def header(self) -> str:
        """The first line of the file."""
        return f"TRT-{self.version}-{self.algorithm}"

    def to_bytes(self) -> bytes:
        """The file in TensorRT's format.

        Raises:
            InputError: a tensor's name has a line break, which the format cannot hold.
        """
        if broken := [name for name in self.scales if "\n" in name]:
            raise InputError(
                f"a calibration table cannot hold the tensor name {broken[0]!r}",
                cause="its format has one line per tensor",
                remedy="rename the tensor in the model",
            )
        rows = (f"{name}: {_to_hex(scale)}\n" for name, scale in self.scales.items())
        return (self.header + "\n" + "".join(rows)).encode()

    @classmethod
    def from_bytes(cls, content: bytes, file: PathLike | None = None, encoding: str = "scale") -> Table:
        """Parse a file in TensorRT's format.

        Args:
            encoding: what the rows hold, one of `ENCODINGS`.

        Raises:
            InputError: a header, row or scale that is not one (with its line), or two scales for one tensor.
        """

        def bad(
            line: int, problem: str, remedy: str = "calibrate again, or copy the file again"
        ) -> InputError:
            return InputError(
                "not a calibration table of TensorRT",
                file=file,
                cause=f"line {line}: {problem}",
                remedy=remedy,
            )

        try:
            lines = content.decode().split("\n")
        except UnicodeDecodeError as error:
            raise bad(1, "it is not text") from error
        header = _HEADER.fullmatch(lines[0].strip())
        if header is None:
            raise bad(1, "the header 'TRT-<version>-<algorithm>' is missing")
        values: dict[str, np.float32] = {}
        numbers: dict[str, int] = {}
        for number, line in enumerate(lines[1:], start=2):
            if not line.strip():
                continue
            row = _ROW.fullmatch(line.rstrip())
            if row is None:
                raise bad(number, f"'{line[:80]}' is not 'tensor: 8 hex digits'")
            name = row["name"]
            if name in values:
                raise bad(number, f"a second scale for '{name}'")
            values[name], numbers[name] = _from_hex(row["scale"]), number
        with np.errstate(all="ignore"):
            scales = {name: ENCODINGS[encoding](value) for name, value in values.items()}
            swapped = [ENCODINGS["little-endian"](value) for value in values.values()]
        for name, scale in scales.items():
            if _is_scale(scale):
                continue
            problem = f"the scale of '{name}' is {scale}, not a positive finite number"
            if encoding == "scale" and all(1e-6 < value < 1e4 for value in swapped):
                low, high = min(swapped), max(swapped)
                problem += f"; with their bytes reversed all {len(swapped)} are from {low:.3g} to {high:.3g}"
                raise bad(numbers[name], problem, "read it with --encoding little-endian")
            raise bad(numbers[name], problem)
        return cls(scales, int(header[1]), header[2])

    @classmethod
    def of(cls, quantization: Quantization, others: Mapping[str, float] | None = None) -> Table:
        """The table of a quantization: the scales of its plan's tensors, with its notes as metadata.

        Args:
            others: scales of tensors that have no quantizer, for rows behind those.
        """
        scales = {name: quantization.scales[name] for name in quantization.plan.tensors}
        rest = {name: np.float32(scale) for name, scale in (others or {}).items() if name not in scales}
        return cls(scales | rest, metadata=quantization.notes)

    def save(self, path: PathLike) -> None:
        """Write the table, and its metadata to `<path>.json`, each in one move."""
        content = self.to_bytes()
        write_bytes(path, content)
        if not is_stream(path):
            write_json(metadata_path(path), {"sha256": sha256_bytes(content), **self.metadata})

    @classmethod
    def load(cls, path: PathLike, encoding: str = "scale") -> Table:
        """Read a table, with its metadata where `<path>.json` lies beside it and belongs to it.

        Args:
            encoding: what the rows hold, one of `ENCODINGS`.

        Raises:
            InputError: missing, unreadable or not a table; or the metadata beside it is not a JSON object.
        """
        try:
            content = read_bytes(path)
        except OSError as error:
            raise InputError("cannot read the calibration table", file=path, cause=error.strerror) from error
        table = cls.from_bytes(content, path, encoding)
        beside = metadata_path(path)
        if not beside.exists():
            return table
        metadata = read_json(beside, "calibration table's metadata")
        if not isinstance(metadata, dict):
            raise InputError(
                "not a calibration table's metadata of trtq",
                file=beside,
                cause="it is not a JSON object",
                remedy="delete it, or calibrate again",
            )
        if metadata.pop("sha256", None) != sha256_bytes(content):
            return table
        return cls(table.scales, table.version, table.algorithm, metadata)

    def check_made_for(self, model: str, file: PathLike) -> None:
        """Refuse a table whose metadata says that it belongs to another model.

        Args:
            model: SHA-256 of the model at hand.
            file: that model's.

        Raises:
            InputError: it was made for another model.
        """
        made_for = self.metadata.get("model", model)
        if made_for != model:
            raise InputError(
                "the table was made for another model",
                file=file,
                cause=f"it is for {str(made_for)[:16]}…, this one is {model[:16]}…",
                remedy="give that model, with the same [inputs] values, or calibrate this one",
            )

    def to_json(self) -> dict[str, Any]:
        """Header, metadata and every scale with its amax, for people and scripts."""
        return {
            "header": self.header,
            "metadata": dict(self.metadata),
            "tensors": {n: {"scale": float(s), "amax": float(s) * INT8_MAX} for n, s in self.scales.items()},
        }


def metadata_path(path: PathLike) -> Path:
    """Where the metadata of a table lies: `calibration.cache` -> `calibration.cache.json`."""
    return Path(f"{Path(path)}.json")


def tensorrt_version(number: int) -> str:
    """A header's version as people write it: 101601 -> "10.16.1", 8601 -> "8.6.1"."""
    unit = 10000 if number >= 100000 else 1000
    return f"{number // unit}.{number % unit // 100}.{number % 100}"


def version_number(text: str) -> int:
    """A header's version from what people write, the inverse of `tensorrt_version`: "8.6.1" -> 8601.

    Without a patch it is the last one of that minor version: "10.16" -> 101601.

    Raises:
        InputError: not a version, or one without calibration tables.
    """
    match = re.fullmatch(r"(\d{1,2})\.(\d{1,2})(?:\.(\d{1,2}))?(?:\.\d+)?", text, re.ASCII)
    if match is None:
        raise InputError(f"{text!r} is not a version of TensorRT", remedy="write it as 8.6.1 or 10.16")
    major, minor = int(match[1]), int(match[2])
    if not 5 <= major <= 10:
        cause = "calibrators and their tables were removed in TensorRT 11" if major > 10 else None
        raise InputError(
            f"TensorRT {text} reads no calibration table", cause=cause, remedy="use a version from 5 to 10.16"
        )
    patch = _LAST_PATCHES.get((major, minor), 0) if match[3] is None else int(match[3])
    return major * (10000 if major >= 10 else 1000) + minor * 100 + patch


def _is_scale(value: np.float32) -> bool:
    return bool(np.isfinite(value) and value > 0)


def _to_hex(scale: np.float32) -> str:
    return f"{np.float32(scale).view(np.uint32):08x}"


def _from_hex(digits: str) -> np.float32:
    return np.uint32(int(digits, 16)).view(np.float32)
