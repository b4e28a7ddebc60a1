"""What differs between TensorRT 8.5 to 11 and TensorRT for RTX: all of it stands in this one table.

Sources: the Python bindings of 8.5.3, 8.6.1, 10.16.1, 11.4.0 and tensorrt_rtx 1.7.1, and NVIDIA's guide
"Migrating from TensorRT 10.x to 11.x". TensorRT for RTX accepts an optimization level, a timing cache and
hardware compatibility, and ignores them; it cannot build version-compatible engines (no lean runtime) and
has no DLA; these are not its options here, so that nobody relies on them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from trtq.backends.interface import BuildOptions
from trtq.errors import InputError


@dataclasses.dataclass(frozen=True)
class Dialect:
    """One version's way of being asked for an engine.

    Attributes:
        name: for messages.
        explicit_batch: networks must be created with EXPLICIT_BATCH (later versions know nothing else).
        weak_typing: precisions may be chosen by builder flags (INT8, FP16, BF16) and per layer, and there
            are calibrators: implicit quantization exists.
        strong_typing: the ONNX model's types may be the engine's.
        flags: of the builder flags that `trtq` sets, those that exist.
        options: fields of `BuildOptions` that have an effect.
        named_parser_errors: the ONNX parser says which node it refuses.
    """

    name: str
    explicit_batch: bool
    weak_typing: bool
    strong_typing: bool
    flags: frozenset[str]
    options: frozenset[str]
    named_parser_errors: bool

    def check(self, options: BuildOptions) -> None:
        """Refuse options that this version does not have.

        Raises:
            InputError: there is one.
        """
        if unknown := [name for name in options.given() if name not in self.options]:
            raise InputError(
                f"{self.name} has no option {', '.join(unknown)}",
                remedy=f"leave it out; its options are {', '.join(sorted(self.options))}",
            )
        if options.lower_precision is not None and options.lower_precision.upper() not in self.flags:
            raise InputError(f"{self.name} has no {options.lower_precision}", remedy="use fp16")


_EVERY_OPTION = frozenset(field.name for field in dataclasses.fields(BuildOptions))
_COMMON_FLAGS = frozenset({"REFIT", "VERSION_COMPATIBLE", "GPU_FALLBACK"})
_SINCE_8_6 = frozenset({"version_compatible", "hardware_compatible", "optimization_level"})
_WEAK_FLAGS = frozenset({"INT8", "FP16", "OBEY_PRECISION_CONSTRAINTS"})

RTX = Dialect(
    name="TensorRT for RTX",
    explicit_batch=False,
    weak_typing=False,
    strong_typing=True,
    flags=frozenset({"REFIT", "STRIP_PLAN"}),
    options=frozenset({"workspace", "refit", "strip_weights", "plugin_lib"}),
    named_parser_errors=True,
)

_EIGHT_6 = Dialect(
    name="TensorRT 8.6",
    explicit_batch=True,
    weak_typing=True,
    strong_typing=False,
    flags=_COMMON_FLAGS | _WEAK_FLAGS,
    options=_EVERY_OPTION - {"strip_weights"},
    named_parser_errors=False,
)
_EIGHT_5 = dataclasses.replace(
    _EIGHT_6,
    name="TensorRT 8.5",
    flags=_EIGHT_6.flags - {"VERSION_COMPATIBLE"},
    options=_EIGHT_6.options - _SINCE_8_6,
)

_SINCE: tuple[tuple[tuple[int, int], Dialect], ...] = (
    ((8, 5), _EIGHT_5),
    ((8, 6), _EIGHT_6),
    (
        (10, 0),
        Dialect(
            name="TensorRT 10",
            explicit_batch=False,
            weak_typing=True,
            strong_typing=True,
            flags=_COMMON_FLAGS | _WEAK_FLAGS | {"BF16", "STRIP_PLAN"},
            options=_EVERY_OPTION,
            named_parser_errors=True,
        ),
    ),
    (
        (11, 0),
        Dialect(
            name="TensorRT 11",
            explicit_batch=False,
            weak_typing=False,
            strong_typing=True,
            flags=(_COMMON_FLAGS | {"STRIP_PLAN"}) - {"GPU_FALLBACK"},
            options=_EVERY_OPTION - {"dla_core", "lower_precision"},
            named_parser_errors=True,
        ),
    ),
)


def dialect_of(trt: Any) -> Dialect:
    """The dialect of an imported TensorRT module.

    Raises:
        InputError: it is older than 8.5.
    """
    if trt.__name__ == "tensorrt_rtx":
        return RTX
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    known = [dialect for since, dialect in _SINCE if since <= version]
    if not known:
        raise InputError(
            f"TensorRT {trt.__version__} is too old", remedy="pip install --upgrade 'tensorrt>=8.5'"
        )
    return known[-1]
