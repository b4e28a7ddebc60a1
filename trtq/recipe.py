"""Recipes: all options of a job, each parsed once into the value it stands for.

Every option is one field of `Recipe`, which the command line makes its arguments from. What the command line,
a TOML file and a Python caller give is read by the same `Kind`, so that nothing further in is text to be
parsed. A recipe may also hold `[preprocess.<input>]` and `[inputs.<input>]` tables and the names of `classes`
(see `trtq.data.preprocess`, `trtq.data.feeding`), which have no command-line form.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tomli_w

from trtq.backends.builders import BUILDERS, NO_ENGINE
from trtq.backends.interface import (
    INT32_MAX,
    BuildOptions,
    Profile,
    Range,
    parse_profile,
    profile_text,
    several_profiles,
)
from trtq.cache import Cache
from trtq.calibration.methods import AUTO, Method, parse_method
from trtq.data.feeding import Feeding, InputOptions
from trtq.data.memory import Data
from trtq.data.preprocess import Preprocess
from trtq.data.remote import is_url
from trtq.errors import InputError, about, shown
from trtq.files import PathLike, check_depth, read_bytes
from trtq.graph.memory import ModelInMemory, model_in_memory
from trtq.memory import Function, refuse_memory
from trtq.simulation.pool import Pool, parse_parallel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


STEPS = ("fix", "partial", "learn")
"""What may follow calibration, in this order."""

MOST_OF_A_RECIPE = 1 << 20
"""Bytes of a recipe."""

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


@dataclass(frozen=True)
class Kind:
    """How an option is read and written.

    Attributes:
        read: from what is given (TOML's values, or the value itself) to the value; raises ValueError, or an
            InputError that says more.
        allowed: what may be given, for the message.
        write: from the value to TOML's.
        from_text: from the command line's text to what `read` takes; raises ValueError.
        choices: all values that are allowed, where they are few.
        many: how items are gathered where an option takes several; `read` and `write` are for one of them.
        table: several items are written as a TOML table.
    """

    read: Callable[[Any], Any]
    allowed: str
    write: Callable[[Any], Any] = lambda value: value
    from_text: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None
    many: Callable[[Iterable[Any]], Any] | None = None
    table: bool = False

    def read_all(self, given: Any) -> Any:
        """The value of an option: `read`, item by item where there may be several. NumPy's numbers are
        Python's."""
        if isinstance(given, np.generic):
            given = given.item()
        if self.many is None:
            return self.read(given)
        if isinstance(given, Mapping):
            given = list(given.items())
        return self.many(self.read(item) for item in (given if isinstance(given, list | tuple) else [given]))

    def write_all(self, value: Any) -> Any:
        """TOML's form of an option's value."""
        if self.many is None:
            return self.write(value)
        if self.table:
            return dict(value)
        return [self.write(item) for item in (value.items() if isinstance(value, Mapping) else value)]


def _instance(kind: type) -> Callable[[Any], Any]:
    """Accept values of a type as they are."""

    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError
        return value

    return read


def _number(kind: type, allowed: Callable[[Any], bool], words: str) -> Kind:
    """Numbers of a type, int or float, in a range."""

    def read(value: Any) -> Any:
        if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
            value = float(value)
        if type(value) is not kind or not allowed(value):
            raise ValueError
        return value

    return Kind(read, f"use {'an integer' if kind is int else 'a number'} {words}", from_text=kind)


def _choice(*choices: str) -> Kind:
    """One of some words."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError
        return value

    return Kind(read, f"use {', '.join(choices)}", choices=choices)


def _fraction(inside: Callable[[float], bool], example: str) -> Kind:
    """A part of a whole: "1%" or 0.01."""

    def read(value: Any) -> float:
        if isinstance(value, str):
            text = value.strip()
            value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        if isinstance(value, bool) or not isinstance(value, int | float) or not inside(value):
            raise ValueError
        return float(value)

    def write(value: float) -> str:
        return _exact(read, value, [f"{100 * value:.12g}%", repr(value)])

    return Kind(read, f"write it as {example}", write)


def _read_duration(value: Any) -> float:
    """Seconds, from a number of them or from text such as "90", "90s", "10m" or "1.5h"."""
    if isinstance(value, str):
        number, unit = (value[:-1], value[-1]) if value[-1:] in _UNITS else (value, "s")
        value = float(number) * _UNITS[unit]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ValueError
    return float(value)


def _write_duration(seconds: float) -> str:
    """In the largest unit that gives a whole number, or else in seconds."""
    whole = [f"{seconds / size:.0f}{unit}" for unit, size in _UNITS.items()]
    return _exact(_read_duration, seconds, [*whole, f"{seconds!r}s"])


def _exact(read: Callable[[str], float], value: float, texts: Iterable[str]) -> str:
    """The first text that is read as `value`, to the bit."""
    return next(text for text in texts if _read_or_nan(read, text) == value)


def _read_or_nan(read: Callable[[str], float], text: str) -> float:
    try:
        return read(text)
    except ValueError:
        return math.nan


def _read_method(value: Any) -> Method | Literal["auto"]:
    if isinstance(value, Method):
        return value
    text = _instance(str)(value)
    return AUTO if text.strip().lower() == AUTO else parse_method(text)


def _read_steps(value: Any) -> tuple[str, ...]:
    """Some of `STEPS` in their order, from "fix,partial,learn" or "none"."""
    if not isinstance(value, tuple | list):
        text = _instance(str)(value)
        value = [] if text.strip() == "none" else [name.strip() for name in text.split(",")]
    if any(step not in STEPS for step in value):
        raise ValueError
    return tuple(step for step in STEPS if step in value)


def _read_target(value: Any) -> str:
    """A compute capability; TOML may have it as a number."""
    if type(value) in (int, float) and 0 <= value <= sys.float_info.max:
        return str(value)
    return _read_text(value)


def _read_profile(value: Any) -> tuple[str, Range]:
    """An input and its range, from text such as "x:1x3x8x8,4x3x8x8,8x3x8x8", or from three shapes."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], list | tuple):
        name, shapes = value
        value = profile_text(name, Range(*(tuple(int(size) for size in shape) for shape in shapes)))
    ((name, sizes),) = parse_profile([_instance(str)(value)]).items()
    return name, sizes


def _read_preprocess(value: Any) -> dict[str, Preprocess]:
    if not isinstance(value, Mapping):
        raise ValueError
    return {
        name: given if isinstance(given, Preprocess) else Preprocess.parse(name, given)
        for name, given in value.items()
    }


def _read_inputs(value: Any) -> dict[str, InputOptions]:
    if not isinstance(value, Mapping):
        raise ValueError
    return {
        name: given if isinstance(given, InputOptions) else InputOptions.parse(name, given)
        for name, given in value.items()
    }


def _read_classes(value: Any) -> dict[str, int]:
    """Class names and their numbers, from a table, or from a list of names in the order of the numbers."""
    if isinstance(value, list | tuple):
        if len(set(value)) != len(value):
            raise ValueError
        value = {name: number for number, name in enumerate(value)}
    if not isinstance(value, Mapping):
        raise ValueError
    if any(not isinstance(n, str) or type(k) is not int or not 0 <= k <= INT32_MAX for n, k in value.items()):
        raise ValueError
    return dict(value)


def _read_state(value: Any) -> tuple[str, str]:
    """An input and the output that it is at the next row, from a TOML table or from text such as "h=hn"."""
    names = value if isinstance(value, tuple) else _instance(str)(value).split("=")
    if len(names) != 2 or not all(isinstance(name, str) and name for name in names):
        raise ValueError
    return names[0], names[1]


LONGEST_TEXT = 4096
"""Characters, as of a path on Linux."""


def _read_text(value: Any) -> str:
    """Text that says something: an empty path would be the folder at hand, and none has a NUL."""
    if not _instance(str)(value) or "\0" in value or len(value) > LONGEST_TEXT:
        raise ValueError
    return value


def _read_path(value: Any) -> str:
    """A path as text."""
    return _read_text(os.fspath(value) if isinstance(value, os.PathLike) else value)


def _read_model(value: Any) -> str | ModelInMemory:
    """A path, or a model in memory."""
    return model_in_memory(value) or _read_path(value)


def _read_data(value: Any) -> str | Data:
    """A path, or data in memory."""
    if isinstance(value, str | os.PathLike):
        return _read_path(value)
    return value if isinstance(value, Data) else Data(value)


def _read_metric(value: Any) -> str | Function:
    """The name of a metric, or a function."""
    if isinstance(value, Function):
        return value
    return Function(value) if callable(value) else _read_path(value)


TEXT = Kind(_read_text, f"use text that is not empty, up to {LONGEST_TEXT} characters")
PATH = Kind(_read_path, f"give a path of up to {LONGEST_TEXT} characters that is not empty")
MODEL = Kind(_read_model, "give the path of an ONNX file, or an onnx.ModelProto", str)
DATA = Kind(_read_data, "give a path, or data in memory", str)
METRIC = Kind(_read_metric, "give the name of a metric, FILE.py:FUNCTION, or a function", str)
FLAG = Kind(_instance(bool), "use true or false")
PATTERNS = Kind(_read_text, "write text, or a list of strings, none of them empty", many=tuple)
FILES = Kind(_read_path, "write a path, or a list of paths, none of them empty", many=tuple)
MARGIN = _fraction(lambda part: 0 <= part < 1, "1% or 0.01, below 100%")
SHARE = _fraction(lambda part: 0 <= part <= 1, "90% or 0.9, up to 100%")
DURATION = Kind(_read_duration, "write it as 90s, 10m or 1h", _write_duration)
METHOD = Kind(_read_method, "use max, entropy, mse, percentile:P or auto", str)
RECOVERY = Kind(
    _read_steps, f"use some of {', '.join(STEPS)}, or none", lambda steps: ",".join(steps) or "none"
)
TARGETS = Kind(_read_target, "write it as 8.6", many=tuple)
PROFILE = Kind(_read_profile, "write NAME:MIN,OPT,MAX", lambda item: profile_text(*item), many=tuple)
PARALLEL = Kind(
    lambda given: given if isinstance(given, Pool) else parse_parallel(_instance(str)(given)),
    "use loky, loky:4 or dask://host:8786",
    str,
)
PREPROCESS = Kind(
    _read_preprocess,
    "write tables [preprocess.<input>]",
    lambda tables: {name: dict(table.options) for name, table in tables.items()},
)
INPUTS = Kind(
    _read_inputs,
    "write tables [inputs.<input>]",
    lambda tables: {name: dict(table.options) for name, table in tables.items()},
)
CLASSES = Kind(
    _read_classes, "write a list of class names in the order of their numbers, or a table [classes]", dict
)
STATE = Kind(_read_state, "write INPUT=OUTPUT, or a table [state]", many=dict, table=True)
MOST_THREADS, MOST_WORKSPACE = 1024, 1 << 40

COUNT = _number(int, lambda n: 1 <= n <= MOST_THREADS, f"from 1 to {MOST_THREADS}")
BATCH = _number(int, lambda n: 1 <= 4 * n <= INT32_MAX, "from 1, of which TensorRT can take 4 times as many")
BYTES = _number(int, lambda n: 1 <= n <= MOST_WORKSPACE, "from 1 to 2^40, 1 TiB")


def _option(
    help: str,
    kind: Kind = TEXT,
    *,
    metavar: str | None = None,
    default: Any = None,
    path: bool = False,
    flags: tuple[str, ...] = (),
) -> Any:
    """The field of an option."""
    metadata = {"help": help, "kind": kind, "metavar": metavar, "path": path, "flags": flags}
    if kind.many is not None:
        return field(default_factory=lambda: kind.read_all([]), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """The options of a job; None or empty where nothing was said."""

    model: str | ModelInMemory | None = _option(  # noqa: RUF009
        "ONNX model: fp32, or with Q/DQ for build", MODEL, metavar="MODEL", path=True
    )
    data: str | Data | None = _option(  # noqa: RUF009
        "calibration data: .npz, .npy, a folder of them or of images (also by class), a .csv of images, or"
        " script.py:function. Images need [preprocess.<input>] in a recipe: resize and crop (torchvision's"
        " Resize and CenterCrop), color (RGB, BGR, gray), scale, mean, std, layout",
        DATA,
        metavar="CALIB",
        path=True,
    )
    eval: str | Data | None = _option(  # noqa: RUF009
        "evaluation data, with targets where the metric needs them", DATA, metavar="EVAL", path=True
    )
    metric: str | Function | None = _option(  # noqa: RUF009
        "top1, top5, accuracy, f1, miou, cosine, sqnr, kl, detections, mAP, mAP50, or file.py:function",
        METRIC,
        metavar="M",
        path=True,
    )
    output: str | None = _option("where to write the results", PATH, metavar="OUT", path=True, flags=("-o",))
    method: Method | Literal["auto"] = _option(  # noqa: RUF009
        "max, entropy, mse, percentile:P, or auto (measured choice)", METHOD, metavar="M", default=AUTO
    )
    max_drop: float = _option(
        "largest allowed relative drop of the metric", MARGIN, metavar="1%", default=0.01
    )
    confidence: float | None = _option(
        "confidence at which the bound must clear the margin",
        _number(float, lambda c: 0.5 < c < 1, "between 0.5 and 1"),
        metavar="C",
    )
    require_engine: bool = _option(
        "a verdict that was simulated on the CPU is inconclusive", FLAG, default=False
    )
    min_reference: float | None = _option(
        "smallest value of the fp32 model's metric; below it the labels or the preprocessing are assumed to"
        " be wrong, and the job ends with exit code 2 before anything is quantized",
        _number(float, math.isfinite, "such as 0.7"),
        metavar="V",
    )
    ignore_nonfinite: bool = _option(
        "compare outputs only where fp32 is finite; without it NaN or infinity there is an error",
        FLAG,
        default=False,
    )
    min_int8: float | None = _option(
        "smallest share of multiply-accumulates that the engine runs in INT8", SHARE, metavar="90%"
    )
    min_sqnr: float | None = _option(
        "smallest signal-to-quantization-noise ratio of every output, in dB",
        _number(float, math.isfinite, "of decibels"),
        metavar="DB",
    )
    recover: tuple[str, ...] = _option(
        "steps that may follow calibration until the gate passes: fix, partial, learn; or none",
        RECOVERY,
        metavar="STEPS",
        default=STEPS,
    )
    partial_limit: float = _option(
        "share of the multiply-accumulates that 'partial' may give away before 'learn' is tried; more is"
        " warned of",
        SHARE,
        metavar="20%",
        default=0.2,
    )
    budget: float | None = _option(
        "time after which no further step is begun, and searching (for ranges, too) and learning stop, such"
        " as 90s, 10m, 1h; collecting statistics, the build and the gate are not cut short; without it, work"
        " that would take too long on a model of many thousand nodes is left out",
        DURATION,
        metavar="TIME",
    )
    labels: str | None = _option(
        "target of the calibration data, class numbers, to learn from beside the fp32 model", metavar="NAME"
    )
    plan: str | None = _option(
        "plan.json to quantize by, in place of the rules", PATH, metavar="PLAN", path=True
    )
    include: tuple[str, ...] = _option(
        "quantize only nodes that match: name with * and ?, or op:Type (repeatable)", PATTERNS
    )
    exclude: tuple[str, ...] = _option("leave nodes that match in floating point (repeatable)", PATTERNS)
    op_reference: tuple[str, ...] = _option(
        "Python file with NumPy references of operators that only TensorRT has (repeatable)",
        FILES,
        path=True,
    )
    plugin_lib: tuple[str, ...] = _option(
        "library of TensorRT plugins, for building and running engines (repeatable)",
        FILES,
        path=True,
    )
    weights: str | None = _option(
        "form of the weights: int8 initializers (default), or float + Q/DQ (default for TensorRT 8)",
        _choice("int8", "qdq"),
    )
    rest: str = _option(
        "precision of what is not quantized: fp32, fp16, or auto: fp16 where there are data that show what it"
        " can hold, unless it alone fails the gate; with migrate, cache convert and study it is fp32",
        _choice("auto", "fp16", "fp32"),
        default="auto",
    )
    objective: str | None = _option(
        "latency: a layer goes to INT8 where that makes the engine faster, transitions counted, and FP16"
        " alone may win; int8: every layer that can. Default: latency where something says what layers cost"
        " (a GPU here, --gpu, --profile-json), unless --min-int8 asks for INT8",
        _choice("latency", "int8"),
    )
    gpu: str | None = _option(
        "GPU whose data sheet says what layers cost, where the engine will run: L4, T4, A100, RTX 4090, ...",
        metavar="NAME",
    )
    profile_json: tuple[str, ...] = _option(
        "times of layers that trtexec --exportProfile wrote of the model's FP16 or INT8 engine (repeatable)",
        FILES,
        path=True,
    )
    layer_info: tuple[str, ...] = _option(
        "layers that trtexec --exportLayerInfo wrote of the same engine, in the same order (repeatable)",
        FILES,
        path=True,
    )
    io: str = _option(
        "what the engine's float inputs and outputs are: float; int8: inputs that are quantized first of all"
        " are int8, and the host feeds np.clip(np.rint(x / scale), -128, 127), with the scale in"
        " manifest.json; int8-in-out: the outputs, too; uint8: images as they are, scaled and normalized by"
        " the engine as [preprocess.<input>] says",
        _choice("float", "int8", "int8-in-out", "uint8"),
        default="float",
    )
    backend: str | None = _option(
        "builder of the engine, or none to deploy without one; default: the one that is installed, of both"
        " the one for the GPU here",
        _choice(*BUILDERS, NO_ENGINE),
    )
    target: tuple[str, ...] = _option("compute capability to build for, such as 8.6 (repeatable)", TARGETS)
    profile: tuple[tuple[str, Range], ...] = _option(
        "optimization profile NAME:MIN,OPT,MAX: input:1x3x224x224,8x3x224x224,32x3x224x224 (repeatable: an"
        " input's second is in the engine's second profile)",
        PROFILE,
    )
    batch: int | None = _option(
        "batch size that the engine is tuned for and that the gate evaluates with", BATCH, metavar="N"
    )
    parallel: Pool | None = _option(  # noqa: RUF009
        "spread collecting, evaluating, sensitivity: loky, loky:4 or dask://host:8786",
        PARALLEL,
        metavar="WHERE",
    )
    threads: int | None = _option(
        "CPU threads; default: as many as this process may use (affinity, cgroup, OMP_NUM_THREADS)",
        COUNT,
        metavar="N",
    )
    cache: str | None = _option(
        "cache of statistics, tables and outputs; default: $TRTQ_CACHE or the user's cache folder",
        PATH,
        metavar="DIR",
        path=True,
    )
    timing_cache: str | None = _option(
        "file of kernel timings, read and written by the build (TensorRT; deploy keeps one in the cache)",
        PATH,
        metavar="F",
        path=True,
    )
    workspace: int | None = _option("largest scratch memory of a kernel, in bytes", BYTES, metavar="N")
    optimization_level: int | None = _option(
        "0 (fast build) to 5 (fast engine) (TensorRT)",
        _number(int, lambda n: n in range(6), "from 0 to 5"),
        metavar="N",
    )
    version_compatible: bool = _option(
        "the engine also runs on later versions of TensorRT", FLAG, default=False
    )
    hardware_compatible: bool = _option("the engine also runs on later GPUs (TensorRT)", FLAG, default=False)
    dla_core: int | None = _option(
        "run on this DLA core what runs there (TensorRT)",
        _number(int, lambda n: 0 <= n <= INT32_MAX, "from 0"),
        metavar="N",
    )
    refit: bool = _option("the engine's weights may be replaced later", FLAG, default=False)
    strip_weights: bool = _option("leave the weights out; refit before running", FLAG, default=False)
    lower_precision: str | None = _option(
        "type that TensorRT up to 10 may choose by itself for what is not INT8; the model stays fp32. --rest"
        " fp16 sets it where TensorRT takes half in no other way: with --table, --calibrator, and up to 8.6",
        _choice("fp16", "bf16"),
    )
    state: Mapping[str, str] = _option(
        "INPUT=OUTPUT: at the next row of a sequence the input is what the output was (repeatable)", STATE
    )
    preprocess: Mapping[str, Preprocess] = field(default_factory=dict, metadata={"kind": PREPROCESS})
    inputs: Mapping[str, InputOptions] = field(default_factory=dict, metadata={"kind": INPUTS})
    classes: Mapping[str, int] = field(default_factory=dict, metadata={"kind": CLASSES})

    def __post_init__(self) -> None:
        same = self.eval is self.data  # is read once
        for name in KINDS:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, read(name, value, name))
        if same:
            object.__setattr__(self, "eval", self.data)

    @classmethod
    def load(cls, path: PathLike) -> Recipe:
        """Read a recipe; relative paths in it are relative to its folder.

        Raises:
            InputError: missing, not TOML, an option that is unknown or there twice, or a value that
                the option does not take.
        """
        path = Path(path)
        try:
            values = tomllib.loads(read_bytes(path, MOST_OF_A_RECIPE).decode())
            check_depth(values)
        except RecursionError as error:
            raise InputError("cannot read the recipe", file=path, cause="it is nested too deeply") from error
        except OSError as error:
            raise InputError("cannot read the recipe", file=path, cause=error.strerror) from error
        except ValueError as error:
            raise InputError("cannot read the recipe", file=path, cause=error) from error
        given: dict[str, Any] = {}
        with about(path):
            for name, value in values.items():
                option = name.replace("-", "_")
                if option in given:
                    spelled = " and ".join(f"'{n}'" for n in values if n.replace("-", "_") == option)
                    raise InputError(f"the recipe has {spelled}, the same option", remedy="keep one")
                _check_known(option)
                given[option] = read(option, value, f"the recipe's option '{name}'")
        return cls()._with(given, path.parent)

    def merged(self, given: Mapping[str, Any]) -> Recipe:
        """This recipe with what the command line gave instead; None and empty lists are not given.

        Raises:
            InputError: a value that the option does not take.
        """
        named = {n: v for n, v in given.items() if n in KINDS and v is not None and v != []}
        return self._with({n: read(n, v, flag(n)) for n, v in named.items()}, Path())

    def changed(self, given: Mapping[str, Any]) -> Recipe:
        """This recipe with what a Python program gives instead; None is not given.

        Raises:
            InputError: a value that the option does not take.
        """
        named = {name: value for name, value in given.items() if value is not None}
        recipe = dataclasses.replace(self, **named)
        return recipe._with({name: getattr(recipe, name) for name in named}, Path())

    def require(self, *names: str, **beside: str | None) -> Required:
        """The options that a job cannot do without.

        Args:
            beside: arguments of the command that are no options of recipes, but needed as well.

        Raises:
            InputError: some are missing; the message names all of them. Or the model was in memory when the
                recipe was saved.
        """
        values = {name: getattr(self, name) for name in names}
        if absent := [spelled(n) for n, value in (values | beside).items() if value is None]:
            raise missing(absent)
        if isinstance(model := values.get("model"), str):
            refuse_memory(model, "the model was", "give a file, or make the recipe with save_data=True")
        return Required(values)

    @property
    def precision(self) -> str:
        """Precision of what is not quantized, fp32 or fp16; without data none tell what float16 can hold."""
        if self.rest == "auto":
            return "fp32" if self.data is None else "fp16"
        return self.rest

    @property
    def half(self) -> bool:
        """Whether what is not quantized may compute in float16."""
        return "fp16" in (self.precision, self.lower_precision)

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The optimization profiles that `profile` gives.

        Raises:
            InputError: as `several_profiles`.
        """
        return several_profiles(self.profile)

    @property
    def feeding(self) -> Feeding:
        """What is said of the inputs beside preprocessing."""
        return Feeding(self.inputs, self.state, self.classes)

    def build_options(self) -> BuildOptions:
        """The options of the builder."""
        values = {name: getattr(self, name) for name in BUILD_OPTIONS}
        timing_cache = None if self.timing_cache is None else Path(self.timing_cache)
        own = timing_cache is not None and timing_cache.parent == Cache.at(self.cache).timing
        return BuildOptions(**values | {"timing_cache": timing_cache, "own_timing_cache": own})

    def dumps(self, beside: PathLike | None = None) -> str:
        """The recipe as TOML; `load` gives it back.

        Args:
            beside: the folder that the file will be in. Paths are written relative to it, so that it can be
                moved, or committed, together with what it names; but not where the two have nothing in common
                but the root.
        """
        given = {name: getattr(self, name) for name in KINDS}
        plain = {n: KINDS[n].write_all(value) for n, value in given.items() if value is not None}
        if beside is not None:
            for option in options(plain):
                if option.metadata["path"]:
                    value, is_metric = plain[option.name], option.name == "metric"
                    plain[option.name] = (
                        [_relative(path, beside) for path in value]
                        if isinstance(value, list)
                        else _relative(value, beside, is_metric)
                    )
        return tomli_w.dumps({n: value for n, value in plain.items() if value not in ([], {})})

    def _with(self, values: Mapping[str, Any], base: Path) -> Recipe:
        changes = dict(values)
        for option in options(values):
            if option.metadata["path"] and changes[option.name] is not None:
                many = option.metadata["kind"].many is not None
                paths = changes[option.name] if many else [changes[option.name]]
                found = tuple(_absolute(path, base, option.name == "metric") for path in paths)
                changes[option.name] = found if many else found[0]
        return dataclasses.replace(self, **changes)


KINDS: Mapping[str, Kind] = {f.name: f.metadata["kind"] for f in dataclasses.fields(Recipe)}
"""Name of every field -> how it is read and written."""

BUILD_OPTIONS = tuple(f.name for f in dataclasses.fields(BuildOptions) if f.name in KINDS)
"""Names of the options that go to the builder."""


class Required:
    """Options that are certainly set: those that `Recipe.require` was asked for, and no others."""

    model: str | ModelInMemory
    data: str | Data
    eval: str | Data
    metric: str | Function
    output: str

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)


def options(names: Iterable[str] | None = None) -> list[dataclasses.Field[Any]]:
    """The fields that are options, all or those named, in the order of the recipe."""
    wanted = None if names is None else set(names)
    fields = [f for f in dataclasses.fields(Recipe) if "help" in f.metadata]
    return [f for f in fields if wanted is None or f.name in wanted]


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


def spelled(name: str) -> str:
    """An option as the command line has it: MODEL has no flag."""
    return "MODEL" if name == "model" else flag(name)


def missing(options: Sequence[str]) -> InputError:
    """The error that names all options that a job lacks, each as it is spelled."""
    *others, last = options
    which = f"{', '.join(others)} and {last} are" if others else f"{last} is"
    them = "them" if others else "it"
    return InputError(f"{which} missing", remedy=f"give {them} on the command line or in the recipe")


def read(name: str, given: Any, spelled: str) -> Any:
    """The value of an option from what is given for it.

    Args:
        spelled: the option as the user wrote it, for the message.

    Raises:
        InputError: the option does not take that.
    """
    kind = KINDS[name]
    try:
        return kind.read_all(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{spelled} is {shown(given)}", remedy=kind.allowed) from error
    except InputError as error:
        if name in ("preprocess", "inputs"):  # which name themselves
            raise
        raise InputError(f"{spelled}: {error.problem}", cause=error.cause, remedy=error.remedy) from error


def from_command_line(name: str, text: str) -> Any:
    """The value of an option, or the text of an item where it takes several, from the command line's text.

    Raises:
        InputError: the option does not take that.
    """
    kind = KINDS[name]
    if kind.choices is not None:
        return text  # the parser says which there are
    try:
        given = kind.from_text(text)
    except ValueError as error:
        raise InputError(f"{flag(name)} is {shown(text)}", remedy=kind.allowed) from error
    value = read(name, given, flag(name))
    return value if kind.many is None else given


def _absolute(value: Any, base: Path, is_metric: bool) -> Any:
    """A path as an absolute one; URLs, what is in memory and names of metrics stay."""
    if is_url(value) or (is_metric and ".py:" not in value):
        return value
    return os.path.abspath(base / value)


def _relative(path: str, beside: PathLike, is_metric: bool = False) -> str:
    """The inverse of `_absolute`, where both have a folder in common; what is relative is so already."""
    if is_url(path) or (is_metric and ".py:" not in path) or not os.path.isabs(path):
        return path
    base = os.path.abspath(beside)
    try:
        common = os.path.commonpath([path, base])
    except ValueError:  # on different drives
        return path
    return path if common == os.path.dirname(common) else os.path.relpath(path, base).replace(os.sep, "/")


def _check_known(name: str) -> None:
    """Refuse an unknown option, suggesting the one that may be meant."""
    if name not in KINDS:
        close = difflib.get_close_matches(name, KINDS, 1)
        raise InputError(
            f"the recipe has an unknown option '{name}'",
            remedy=f"did you mean '{close[0]}'?" if close else f"options: {', '.join(KINDS)}",
        )
