"""How well a calibration table suits a model, known before anything is written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trtq.calibration.table import ENCODINGS, Table
from trtq.errors import InputError
from trtq.files import PathLike
from trtq.numerics import INT8_MAX

_POSITIONAL = re.compile(r"\(Unnamed Layer\* \d+\) \[.*")

_ANY_AMAX = (1e-4, 1e4)
"""Where the amax of an activation lies if nothing else is known about it."""


@dataclass(frozen=True)
class Fit:
    """How a table fits a model: the coverage report before anything is written.

    Attributes:
        rows: tensor whose range the Q/DQ model needs -> row that gives it; of another name where that row's
            tensor has the same values, or those that this one was moved from.
        missing: tensor without a scale -> nodes that therefore stay in floating point, or do not fuse.
        unmatched: rows that match no tensor of the model.
        positional: rows named `(Unnamed Layer* N) [...]`, which shift with any edit of the graph; not used.
        colons: names that hold a colon, which other tools cut in the wrong place.
        doubts: what speaks against the rows being scales at all, with the evidence.
    """

    rows: Mapping[str, str]
    missing: Mapping[str, Sequence[str]]
    unmatched: Sequence[str]
    positional: Sequence[str]
    colons: Sequence[str]
    doubts: Sequence[str]

    @property
    def complete(self) -> bool:
        """Whether every tensor has its scale, from rows that can be scales."""
        return not self.missing and not self.doubts

    def text(self) -> str:
        """The report for a person; at most three names of each kind."""
        moved = [f"{tensor} from {row}" for tensor, row in self.rows.items() if tensor != row]
        lacking = [f"{tensor} (for {', '.join(nodes)})" for tensor, nodes in self.missing.items()]
        lines = [f"{len(self.rows)} of {len(self.rows) + len(self.missing)} tensors have their scale"]
        for what, names in (
            ("from the row of a tensor with the same or moved values", moved),
            ("without a scale, so in floating point", lacking),
            ("rows that match no tensor of the model", list(self.unmatched)),
            ("positional rows, which are not used", list(self.positional)),
            ("names with a colon", list(self.colons)),
        ):
            if names:
                lines.append(f"{len(names)} {what}: {'; '.join(names[:3])}{'; …' if len(names) > 3 else ''}")
        return "\n".join([*lines, *(f"doubtful: {doubt}" for doubt in self.doubts)])

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self) | {"complete": self.complete}


def is_positional(row: str) -> bool:
    """Whether a row is named `(Unnamed Layer* N) [...]`, by its position in the network."""
    return _POSITIONAL.fullmatch(row) is not None


def doubts(table: Table, observed: Mapping[str, float], bounds: Mapping[str, float]) -> list[str]:
    """What speaks against the rows being scales, with the evidence; nothing if they can be.

    Each row's amax is held against what is known of its tensor: the amax seen on data, else the bound of
    the operator that makes it (sigmoid, softmax, ReLU6, ...), else any magnitude that activations have.
    Where most rows contradict it, and almost none would if the file were read in another way, that is it.

    Args:
        observed: row -> amax seen on data.
        bounds: row -> largest magnitude that the tensor can have.
    """
    rows = [name for name in table.scales if not is_positional(name)]
    known = {name: _plausible(name, observed, bounds) for name in rows}
    if any(name in observed or name in bounds for name in rows):
        known = {name: limits for name, limits in known.items() if limits != _ANY_AMAX}
    if not known:
        return []

    def amax(name: str, encoding: str) -> float:
        with np.errstate(all="ignore"):
            return float(ENCODINGS[encoding](table.scales[name])) * INT8_MAX

    def wrong(encoding: str) -> list[str]:
        return [name for name, (low, high) in known.items() if not low <= amax(name, encoding) <= high]

    contradicting = wrong("scale")
    if 2 * len(contradicting) < len(known):
        return []
    examples = "; ".join(
        f"'{name}': amax {amax(name, 'scale'):.4g}, expected {known[name][0]:.3g} to {known[name][1]:.3g}"
        for name in contradicting[:3]
    )
    evidence = f"{len(contradicting)} of {len(known)} ranges cannot be right ({examples})"
    better = {encoding: len(wrong(encoding)) for encoding in ENCODINGS if encoding != "scale"}
    best = min(better, key=better.__getitem__)
    if 10 * better[best] > len(known):
        return [evidence]
    return [f"{evidence}; read as --encoding {best}, {better[best]} of them would contradict it"]


def require_complete(fit: Fit, table: PathLike) -> None:
    """Refuse a table that lacks a scale or cannot be right.

    Raises:
        InputError: `fit` is not complete.
    """
    if not fit.complete:
        raise InputError(
            "the table is incomplete or doubtful",
            file=table,
            cause=fit.text(),
            remedy="calibrate again; or leave --strict out, and nodes without a range stay in floating point",
        )


def _plausible(name: str, observed: Mapping[str, float], bounds: Mapping[str, float]) -> tuple[float, float]:
    """Lowest and highest amax that a table may give a tensor; calibration clips outliers, data may be few."""
    if observed.get(name):
        return observed[name] / 16, observed[name] * 4
    if name in bounds:
        return bounds[name] / 1000, bounds[name] * 1.05
    return _ANY_AMAX
