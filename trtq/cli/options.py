"""Groups of options that several commands share, by their names in recipes."""

from __future__ import annotations

from trtq.calibration.table import ENCODINGS
from trtq.cli.command import argument

PLACEMENT = ("plan", "include", "exclude", "weights", "rest")
CALIBRATION = ("data", "state", "method", "op_reference", "budget", "cache", "threads", "parallel")
COST = ("objective", "gpu", "profile_json", "layer_info")
ENGINE = ("backend", "target", "profile", "batch", "min_int8")
GATE = ("eval", "metric", "max_drop", "confidence", "require_engine", "min_reference", "ignore_nonfinite")
RECOVERY = ("min_sqnr", "recover", "partial_limit", "labels")

TABLE_FORMAT = (
    argument(
        "--encoding",
        choices=tuple(ENCODINGS),
        default="scale",
        help="what the table's rows hold, where it is not TensorRT's big-endian scale",
    ),
    argument("--strict", action="store_true", help="a table that lacks a scale or is doubtful is an error"),
)
"""Arguments of every command that reads a table from elsewhere."""
