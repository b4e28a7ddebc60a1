"""Groups of options: those of the help, and those that several commands share, by their names in recipes."""

from __future__ import annotations

from collections.abc import Mapping

from trtq.calibration.table import ENCODINGS
from trtq.cli.command import argument
from trtq.recipe import BUILD_OPTIONS

PLACEMENT = ("plan", "include", "exclude", "weights", "rest")
CALIBRATION = ("data", "state", "method", "op_reference", "budget", "cache", "threads", "parallel")
COST = ("objective", "gpu", "profile_json", "layer_info")
ENGINE = ("backend", "target", "profile", "batch", "min_int8")
GATE = ("eval", "metric", "max_drop", "confidence", "require_engine", "min_reference", "ignore_nonfinite")
RECOVERY = ("min_sqnr", "recover", "partial_limit", "labels")

GROUPS: Mapping[str, tuple[str, ...]] = {
    "model, data and results": ("model", "data", "state", "output", "op_reference"),
    "calibration": ("method",),
    "which layers are INT8, and what the others are": (*PLACEMENT, "io"),
    "what layers cost": COST,
    "gate": (*GATE, "min_int8", "min_sqnr"),
    "recovery": ("recover", "partial_limit", "labels", "budget"),
    "engine": ("backend", "target", "profile", "batch", *BUILD_OPTIONS),
    "this machine": ("threads", "parallel", "cache"),
}
"""Title -> options, in the order of the help. Every option of recipes is in one of them."""

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
