"""Recipes: all options of a job in one TOML file; the command line's win over them.

Every option is one field of `Recipe`, which the command line makes its arguments from. A recipe may also
hold `[preprocess.<input>]` tables (see `trtq.data.preprocess`), which have no command-line form.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from trtq.backends.builders import BUILDERS
from trtq.backends.interface import BuildOptions
from trtq.calibration.methods import method_name
from trtq.data.preprocess import Preprocess
from trtq.errors import InputError, about
from trtq.files import PathLike

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "confidence": (lambda c: 0.5 < c < 1, "between 0.5 and 1"),
    "min_sqnr": (math.isfinite, "of decibels"),
    "min_reference": (math.isfinite, "of the metric"),
    "batch": (lambda n: n >= 1, "from 1"),
    "threads": (lambda n: n >= 1, "from 1"),
    "workspace": (lambda n: n >= 1, "from 1"),
    "optimization_level": (lambda n: n in range(6), "from 0 to 5"),
    "dla_core": (lambda n: n >= 0, "from 0"),
}


def _option(
    help: str,
    kind: type = str,
    *,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    default: Any = None,
    path: bool = False,
    number: str | None = None,
    flags: tuple[str, ...] = (),
) -> Any:
    """The field of an option; `number` says how the text of one that TOML may give as a number is written."""
    metadata = {
        "help": help, "kind": kind, "metavar": metavar, "choices": choices, "path": path, "flags": flags,
        "number": number,
    }  # fmt: skip
    if kind is list:
        return field(default=(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """The options of a job; None or empty where nothing was said."""

    model: str | None = _option("ONNX model: fp32, or with Q/DQ for build", metavar="MODEL", path=True)
    data: str | None = _option(
        "calibration data: .npz, a folder, a .csv of images, or script.py:function",
        metavar="CALIB",
        path=True,
    )
    eval: str | None = _option(
        "evaluation data, with targets where the metric needs them", metavar="EVAL", path=True
    )
    metric: str | None = _option(
        "top1, top5, accuracy, f1, miou, cosine, kl, or file.py:function (higher is better)",
        metavar="M",
        path=True,
    )
    output: str | None = _option("where to write the results", metavar="OUT", path=True, flags=("-o",))
    method: str = _option(
        "max, entropy, mse, percentile:P, or auto (measured choice)", metavar="M", default="auto"
    )
    max_drop: str = _option(
        "largest allowed relative drop of the metric", metavar="1%", default="1%", number="1% or 0.01"
    )
    confidence: float | None = _option(
        "confidence at which the bound must clear the margin", float, metavar="C"
    )
    require_engine: bool = _option(
        "a verdict that was simulated on the CPU is inconclusive", bool, default=False
    )
    min_reference: float | None = _option(
        "smallest value of the fp32 model's metric; below it the labels or the preprocessing are taken to be"
        " wrong, and the job ends with exit code 2 before anything is quantized",
        float,
        metavar="V",
    )
    ignore_nonfinite: bool = _option(
        "compare outputs only where fp32 is finite; without it NaN or infinity there is an error",
        bool,
        default=False,
    )
    min_int8: str | None = _option(
        "smallest share of multiply-accumulates that the engine runs in INT8",
        metavar="90%",
        number="90% or 0.9",
    )
    min_sqnr: float | None = _option(
        "smallest signal-to-quantization-noise ratio of every output, in dB", float, metavar="DB"
    )
    recover: str = _option(
        "steps that may follow calibration until the gate passes: fix, partial, learn; or none",
        metavar="STEPS",
        default="fix,partial,learn",
    )
    budget: str | None = _option(
        "time after which no further step is begun, and searching and learning stop, such as 90s, 10m, 1h",
        metavar="TIME",
        number="90s, 10m or 1h",
    )
    labels: str | None = _option(
        "target of the calibration data, class numbers, to learn from beside the fp32 model", metavar="NAME"
    )
    plan: str | None = _option("plan.json to quantize by, in place of the rules", metavar="PLAN", path=True)
    include: tuple[str, ...] = _option(
        "quantize only nodes that match: name with * and ?, or op:Type (repeatable)", list
    )
    exclude: tuple[str, ...] = _option("leave nodes that match in floating point (repeatable)", list)
    weights: str = _option(
        "form of the weights: int8 initializers, or float + Q/DQ", choices=("int8", "qdq"), default="int8"
    )
    rest: str = _option("precision of what is not quantized", choices=("fp32", "fp16"), default="fp32")
    backend: str | None = _option(
        "builder of the engine; default: the one that is installed, TensorRT-RTX first",
        choices=tuple(BUILDERS),
    )
    target: tuple[str, ...] = _option(
        "compute capability to build for, such as 8.6 (repeatable)", list, number="8.6"
    )
    profile: tuple[str, ...] = _option(
        "optimization profile NAME:MIN,OPT,MAX: input:1x3x224x224,8x3x224x224,32x3x224x224 (repeatable)",
        list,
    )
    batch: int | None = _option(
        "batch size that the engine is tuned for and that the gate evaluates with", int, metavar="N"
    )
    parallel: str | None = _option(
        "spread collecting, evaluating, sensitivity: loky, loky:4 or dask://host:8786",
        metavar="WHERE",
    )
    threads: int | None = _option("CPU threads; default: all", int, metavar="N")
    cache: str | None = _option(
        "cache of statistics, tables and outputs; default: $TRTQ_CACHE or the user's cache folder",
        metavar="DIR",
        path=True,
    )
    timing_cache: str | None = _option(
        "file of kernel timings, read and written by the build (TensorRT)", metavar="F", path=True
    )
    workspace: int | None = _option("largest scratch memory of a kernel, in bytes", int, metavar="N")
    optimization_level: int | None = _option("0 (fast build) to 5 (fast engine) (TensorRT)", int, metavar="N")
    version_compatible: bool = _option(
        "the engine also runs on later versions of TensorRT", bool, default=False
    )
    hardware_compatible: bool = _option("the engine also runs on later GPUs (TensorRT)", bool, default=False)
    dla_core: int | None = _option("run on this DLA core what runs there (TensorRT)", int, metavar="N")
    refit: bool = _option("the engine's weights may be replaced later", bool, default=False)
    strip_weights: bool = _option("leave the weights out; refit before running", bool, default=False)
    lower_precision: str | None = _option(
        "type that TensorRT up to 10 may choose for what is not INT8", choices=("fp16", "bf16")
    )
    preprocess: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (allowed, expected) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not allowed(value):
                raise InputError(f"{flag(name)} is {value}", remedy=f"use a number {expected}")
        object.__setattr__(self, "method", method_name(self.method))

    @classmethod
    def load(cls, path: PathLike) -> Recipe:
        """Read a recipe; relative paths in it are relative to its folder.

        Raises:
            InputError: missing, not TOML, an option that is unknown or there twice, or a value of the wrong
                kind.
        """
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError("cannot read the recipe", file=path, cause=error) from error
        given: dict[str, Any] = {}
        for name, value in values.items():
            option = name.replace("-", "_")
            if option in given:
                spelled = " and ".join(f"'{n}'" for n in values if n.replace("-", "_") == option)
                raise InputError(f"the recipe has {spelled}, the same option", file=path, remedy="keep one")
            given[option] = _value(option, value, path)
        with about(path):
            for input_name, steps in given.get("preprocess", {}).items():
                Preprocess.parse(input_name, steps)
            return cls()._with(given, path.parent)

    def merged(self, given: Mapping[str, Any]) -> Recipe:
        """This recipe with what the command line gave instead; None and empty lists are not given."""
        known = {f.name for f in dataclasses.fields(self)}
        named = {n: v for n, v in given.items() if n in known and v is not None and v != []}
        return self._with(named, Path())

    def need(self, *names: str) -> None:
        """Make sure that options are there.

        Raises:
            InputError: one is not.
        """
        for name in names:
            if getattr(self, name) is None:
                option = flag(name) if name != "model" else "MODEL"
                raise InputError(
                    f"{option} is missing", remedy="give it on the command line or in the recipe"
                )

    def build_options(self) -> BuildOptions:
        """The options of the builder."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(BuildOptions)}
        return BuildOptions(**values | {"timing_cache": self.timing_cache and Path(self.timing_cache)})

    def dumps(self) -> str:
        """The recipe as TOML; `load` gives it back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}
        return tomli_w.dumps({n: v for n, v in plain.items() if v is not None and v not in ([], {})})

    def _with(self, values: Mapping[str, Any], base: Path) -> Recipe:
        changes: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        for option in options():
            if option.name in changes and option.metadata["path"]:
                changes[option.name] = _absolute(changes[option.name], base, option.name == "metric")
        return dataclasses.replace(self, **changes)


BUILD_OPTIONS = tuple(f.name for f in dataclasses.fields(BuildOptions))
"""Names of the options that go to the builder."""


def options(names: Iterable[str] | None = None) -> list[dataclasses.Field[Any]]:
    """The fields that are options, all or those named, in the order of the recipe."""
    wanted = None if names is None else set(names)
    return [f for f in dataclasses.fields(Recipe) if f.metadata and (wanted is None or f.name in wanted)]


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


def _absolute(value: str, base: Path, is_metric: bool) -> str:
    """A path as an absolute one; URLs and names of metrics stay."""
    if "://" in value or (is_metric and ".py:" not in value):
        return value
    return os.path.abspath(base / value)


def _value(name: str, value: Any, path: Path) -> Any:
    """An option's value in its own kind: a list from a single item, text from a number that it may be.

    Raises:
        InputError: an unknown option, or a value of another kind or that is no choice.
    """
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    if name not in fields:
        close = difflib.get_close_matches(name, fields, 1)
        raise InputError(
            f"the recipe has an unknown option '{name}'",
            file=path,
            remedy=f"did you mean '{close[0]}'?" if close else f"options: {', '.join(fields)}",
        )
    metadata = fields[name].metadata
    if not metadata:
        if not isinstance(value, dict):
            raise InputError(f"the recipe's option '{name}' is {value!r}, not a table", file=path)
        return value
    kind, number, choices = metadata["kind"], metadata["number"], metadata["choices"]
    items = value if kind is list and isinstance(value, list) else [value]
    items = [_item(item, str if kind is list else kind, number is not None) for item in items]
    if None in items or (choices and value not in choices):
        wanted = "" if choices else ", not a list of strings" if kind is list else f", not {kind.__name__}"
        remedy = f"use {', '.join(choices)}" if choices else number and f"write it as {number}"
        raise InputError(f"the recipe's option '{name}' is {value!r}{wanted}", file=path, remedy=remedy)
    return items if kind is list else items[0]


def _item(value: Any, kind: type, number: bool) -> Any:
    """A TOML value as one of the kinds str, bool, int or float, None if it is none; numbers may be text."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if numeric and number:
        return str(value) if 0 <= value <= sys.float_info.max else None
    if type(value) is int and kind is float and abs(value) <= sys.float_info.max:
        return float(value)
    return value if type(value) is kind else None
