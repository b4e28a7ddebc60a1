"""What the engine builders share: optimization profiles, the result of a build, and the GPU at hand."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from trtq.backends.compiled import Compiled
from trtq.errors import InputError
from trtq.files import PathLike

INT32_MAX = 2**31 - 1
"""What the builders' sizes go up to."""

OPT_BATCH = 8
"""Batch size an engine is tuned for when nothing else is asked."""

MAX_OVER_OPT = 4
"""Largest batch an engine takes, in multiples of the one it is tuned for."""

Shape = tuple[int, ...]
_SHAPE = r"[1-9]\d*(x[1-9]\d*)*"


class Range(NamedTuple):
    """Smallest, most frequent and largest shape of one input (TensorRT: min, opt, max); or its values."""

    min: Shape
    opt: Shape
    max: Shape

    def holds(self, shape: Shape) -> bool:
        """Whether a shape lies between the smallest and the largest on every axis."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


Profile = Mapping[str, Range]
"""Input name -> its range of shapes; empty for a model without dynamic axes."""


class ValuedProfile(dict[str, Range]):
    """A profile that also knows what inputs hold whose values may decide shapes in the network.

    Attributes:
        held: input name -> range of its values, of inputs that hold a few integers. It is for the network to
            say which of them decide shapes (TensorRT's shape inputs).
    """

    def __init__(self, shapes: Profile, held: Profile) -> None:
        super().__init__(shapes)
        self.held = dict(held)


def held_values(profile: Profile) -> Profile:
    """What the inputs of a profile hold, as far as it knows."""
    return profile.held if isinstance(profile, ValuedProfile) else {}


@dataclasses.dataclass(frozen=True)
class Build:
    """What a build left behind.

    Attributes:
        engine: the plan file. Beside it lies `<engine>.json` with what is recorded here.
        targets: compute capabilities it was built for; empty: the builder's default set.
        compiled: the kernels it runs.
        warnings: the builder's warnings, each once.
        notes: what was done otherwise than asked.
    """

    engine: Path
    targets: tuple[str, ...]
    compiled: Compiled
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How to build; the defaults are TensorRT's own. Not every version has every option (`Dialect`).

    Attributes:
        timing_cache: file of kernel timings, read if it is there and written after the build.
        own_timing_cache: that file is trtq's: where TensorRT refuses it, it is replaced.
        workspace: largest scratch memory of a kernel, in bytes; None: all of the device's.
        optimization_level: 0 (fast build) to 5 (fast engine); TensorRT's default is 3.
        version_compatible: the engine also runs on later versions of the same major version.
        hardware_compatible: the engine also runs on later GPUs than this one (Ampere and newer).
        dla_core: run on this DLA core what runs there, the rest on the GPU.
        refit: the engine's weights may be replaced later.
        strip_weights: leave the weights out of the plan; it must be refitted before it runs.
        lower_precision: "fp16" or "bf16": a type that TensorRT may choose for what is not INT8. Versions
            without this option take the types from the ONNX model (`trtq.graph.half`).
        plugin_lib: libraries of plugins, for operators that TensorRT lacks.
    """

    timing_cache: Path | None = None
    workspace: int | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    dla_core: int | None = None
    refit: bool = False
    strip_weights: bool = False
    lower_precision: str | None = None
    plugin_lib: tuple[str, ...] = ()
    own_timing_cache: bool = False

    def given(self) -> list[str]:
        """Names of the options that differ from their defaults."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]


DEFAULT_OPTIONS = BuildOptions()


class Builder(Protocol):
    """What a module that builds engines offers (`trtq.backends.builders` lists them)."""

    def version(self) -> str:
        """The installed version; MissingBackendError if there is none."""

    def check_targets(self, targets: Sequence[str]) -> tuple[str, ...]:
        """The compute capabilities to build for, or an InputError."""

    def typed_by_model(self) -> bool:
        """Whether the types of an ONNX model may be the engine's; MissingBackendError if there is no builder.

        If not, half is a matter of `BuildOptions.lower_precision`, and Q/DQ have float32 scales.
        """

    def build(
        self,
        model: PathLike,
        engine: PathLike,
        *,
        profile: Profile | None = None,
        further: Sequence[Profile] = (),
        targets: Sequence[str] = (),
        options: BuildOptions = DEFAULT_OPTIONS,
        float32: Collection[str] = (),
    ) -> Build:
        """Compile an ONNX model into a plan file and record beside it what it runs.

        Args:
            further: more optimization profiles; what is recorded as run is the first one's.
            float32: ONNX nodes that stay float32 whatever `BuildOptions.lower_precision` allows.
        """


@dataclasses.dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU; `compute_capability` such as "8.6".

    Attributes:
        driver: the driver's version such as "570.86.15", or what it offers of CUDA ("CUDA 12080") where NVML
            does not tell; "" if unknown.
    """

    name: str
    compute_capability: str
    driver: str = ""


def profiles_from(
    model_inputs: Mapping[str, Sequence[int | str | None]],
    row_shapes: Mapping[str, Sequence[Shape]],
    batch: int = OPT_BATCH,
    *,
    also: Mapping[str, Sequence[Shape]] | None = None,
    only_one: bool = False,
) -> dict[str, Range]:
    """The default optimization profile: any batch up to 4 x `batch`, other axes as the data has them.

    - A dynamic first axis is the batch: min 1, opt `batch`, max 4 x `batch`. TensorRT tunes for opt; max
      only reserves memory.
    - Every other dynamic axis runs from the smallest to the largest size seen, tuned for the most frequent
      row (`_typical`).
    - Inputs without dynamic axes need no range, so a static model gives an empty profile.

    Args:
        model_inputs: input name -> dimensions; a dimension that is not a positive integer is dynamic.
        row_shapes: input name -> the shape of each of the data's rows, that is without the batch axis, in the
            same order for all inputs. Inputs whose only dynamic axis is the batch may be missing.
        batch: opt of the batch axis, > 0.
        also: input name -> shapes of other rows that the engine must take; it is not tuned for them unless
            there are no others.
        only_one: the model runs on one row at a time, so all three are 1.

    Raises:
        InputError: a dynamic axis without data to take its size from, or data of another rank.
    """
    if batch < 1:
        raise InputError(f"the batch size must be at least 1, not {batch}")
    dynamic = {}
    for name, dims in model_inputs.items():
        sizes = [d if isinstance(d, int) and d > 0 else None for d in dims]
        if None in sizes:
            dynamic[name] = sizes
    others = also or {}
    taken = {name: {*row_shapes.get(name, ()), *others.get(name, ())} for name in dynamic}
    for name, sizes in dynamic.items():
        _check_rows(name, sizes, taken[name])
    typical = _typical({n: row_shapes.get(n) or others[n] for n in dynamic if taken[n]})
    batches = (1, 1, 1) if only_one else (1, batch, MAX_OVER_OPT * batch)
    profile = {}
    for name, sizes in dynamic.items():
        ranges = [batches if sizes[0] is None else (sizes[0],) * 3]
        for axis, size in enumerate(sizes[1:]):
            if size is not None:
                ranges.append((size, size, size))
                continue
            seen = [shape[axis] for shape in taken[name]]
            ranges.append((min(seen), typical[name][axis], max(seen)))
        profile[name] = Range(*(tuple(sizes) for sizes in zip(*ranges, strict=True)))
    return profile


def _check_rows(name: str, sizes: Sequence[int | None], rows: Iterable[Shape]) -> None:
    """Make sure that the shapes of an input's rows say how large its dynamic axes (None) are.

    Raises:
        InputError: there are none, or they are of another rank.
    """
    if None in sizes[1:] and not rows:
        raise InputError(
            f"input '{name}' has dynamic axes and there is no data to take their sizes from",
            remedy=f"give data, or its shapes with --profile, such as {name}:1x64,8x64,32x64",
        )
    if wrong := [shape for shape in rows if len(shape) != len(sizes) - 1]:
        raise InputError(
            f"input '{name}' has {len(sizes)} axes, one of them the batch, but rows of the data are "
            f"shaped {'x'.join(map(str, wrong[0])) or 'scalar'}",
            remedy="make the data's arrays (rows, ...) with the model's other axes",
        )


def _typical(rows: Mapping[str, Sequence[Shape]]) -> dict[str, Shape]:
    """The most frequent shapes of a row, all inputs together so that they belong to one row that was seen.

    Rows that not all inputs have are passed over. Of several equally frequent ones it is the one in the
    middle by size, so that lengths that hardly repeat do not end at the longest.
    """
    seen = Counter(zip(*rows.values(), strict=False))
    most = max(seen.values(), default=0)
    tied = sorted(
        (sum(math.prod(shape) for shape in shapes), shapes) for shapes, count in seen.items() if count == most
    )
    return dict(zip(rows, tied[len(tied) // 2][1], strict=True)) if tied else {}


def parse_profile(texts: Iterable[str]) -> dict[str, Range]:
    """A profile from texts such as `input:1x3x224x224,8x3x224x224,32x3x224x224` (min, opt, max).

    One shape alone stands for all three. Input names may hold colons: the last one divides.

    Raises:
        InputError: a text that is not of this form, min <= opt <= max not holding on every axis, or an input
            that has two.
    """
    profile: dict[str, Range] = {}
    for text in texts:
        name, _, shapes = text.rpartition(":")
        if not name or not re.fullmatch(rf"{_SHAPE}(,{_SHAPE}){{0,2}}", shapes) or shapes.count(",") == 1:
            raise InputError(
                f"'{text}' is not an optimization profile",
                remedy="write NAME:MIN,OPT,MAX, such as input:1x3x224x224,8x3x224x224,32x3x224x224",
            )
        parsed = [tuple(int(d) for d in shape.split("x")) for shape in shapes.split(",")]
        low, opt, high = parsed if len(parsed) == 3 else parsed * 3
        if max(max(shape) for shape in (low, opt, high)) > INT32_MAX:
            raise InputError("an axis of an optimization profile is too long", cause=f"at most {INT32_MAX}")
        if not len(low) == len(opt) == len(high) or not all(
            a <= b <= c for a, b, c in zip(low, opt, high, strict=True)
        ):
            raise InputError(
                f"'{text}' is not an optimization profile",
                cause="its shapes differ in rank, or an axis is not min <= opt <= max",
            )
        if name in profile:
            raise InputError(f"the optimization profile has two ranges for '{name}'")
        profile[name] = Range(low, opt, high)
    return profile


def several_profiles(ranges: Iterable[tuple[str, Range]]) -> tuple[Profile, ...]:
    """The optimization profiles of ranges by input: an input's n-th range is in the n-th profile.

    An input with one range has it in all of them. No ranges give no profile.

    Raises:
        InputError: two inputs have different numbers of ranges, both more than one.
    """
    of_input: dict[str, list[Range]] = {}
    for name, sizes in ranges:
        of_input.setdefault(name, []).append(sizes)
    counts = {name: len(found) for name, found in of_input.items() if len(found) > 1}
    if len(set(counts.values())) > 1:
        raise InputError(
            "the inputs have different numbers of optimization profiles",
            cause=", ".join(f"'{name}' has {count}" for name, count in counts.items()),
            remedy="give each input one --profile for all, or one for each optimization profile",
        )
    number = max(counts.values(), default=min(len(of_input), 1))
    return tuple(
        {name: found[index if len(found) > 1 else 0] for name, found in of_input.items()}
        for index in range(number)
    )


def profile_text(name: str, sizes: Range) -> str:
    """The inverse of `parse_profile`, for one input."""
    shapes = sizes[:1] if sizes.min == sizes.opt == sizes.max else sizes
    return f"{name}:" + ",".join("x".join(map(str, shape)) for shape in shapes)


def check_profile(profile: Profile, inputs: Mapping[str, Sequence[int | str | None]], model: Path) -> None:
    """Make sure that a profile fits a model.

    Args:
        inputs: model input name -> dimensions; one that is not a positive integer is dynamic.

    Raises:
        InputError: an unknown input, a shape that does not fit, or a dynamic input without a range.
    """
    dims = {n: ["?" if not isinstance(d, int) or d < 1 else d for d in shape] for n, shape in inputs.items()}
    for name, shapes in profile.items():
        if name not in dims:
            raise InputError(
                f"the optimization profile names '{name}', which is no input of the model",
                file=model,
                remedy=f"the inputs are {', '.join(dims)}",
            )
        for shape in shapes:
            if len(shape) != len(dims[name]) or any(
                d not in ("?", s) for d, s in zip(dims[name], shape, strict=True)
            ):
                raise InputError(
                    f"the profile's shape {'x'.join(map(str, shape))} does not fit input '{name}'",
                    file=model,
                    remedy=f"its dimensions are {'x'.join(map(str, dims[name]))}, where ? is dynamic",
                )
    if missing := [name for name, d in dims.items() if "?" in d and name not in profile]:
        raise InputError(
            f"input '{missing[0]}' has dynamic axes and the optimization profile does not name it",
            file=model,
            remedy=f"its dimensions are {'x'.join(map(str, dims[missing[0]]))}; give min, opt and max",
        )


def value_range(seen: Sequence[Shape], others: Iterable[Shape] = ()) -> Range:
    """The range of an input's values: each number by itself, and the most frequent ones of those seen.

    Args:
        seen: its values in each row of the data, at least one; all of one length.
        others: of other rows that the engine must take.
    """
    every = [*seen, *others]
    low, high = (tuple(extreme(numbers) for numbers in zip(*every, strict=True)) for extreme in (min, max))
    return Range(low, _typical({"": seen})[""], high)


def find_gpu() -> Gpu | None:
    """The first NVIDIA GPU that the driver offers, or None without a driver or GPU."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    compute_capability_major, compute_capability_minor = 75, 76  # CUdevice_attribute
    calls = (
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
        lambda: cuda.cuDeviceGetName(name, len(name), device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(major), compute_capability_major, device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(minor), compute_capability_minor, device),
    )
    if any(call() for call in calls):  # 0 is CUDA_SUCCESS; the first failure ends it
        return None
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}", _driver_version(cuda))


def _driver_version(cuda: ctypes.CDLL) -> str:
    """The driver's version (see `Gpu.driver`)."""
    text = ctypes.create_string_buffer(96)
    try:
        nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
        told = nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0
    except (OSError, AttributeError):
        told = False
    if told:
        return text.value.decode()
    number = ctypes.c_int()
    return f"CUDA {number.value}" if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0 else ""
