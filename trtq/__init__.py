"""trtq: INT8 deployment for TensorRT, from a trained ONNX model to an engine whose accuracy is proved.

`trtq.deploy` runs the whole workflow; `trtq.calibrate`, `quantize`, `sensitivity`, `build`, `gate`, `study`,
`compare` and `bench` are its parts (`trtq.api`). Importing the package is quick: nothing heavy is loaded
before it is used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtq.api import bench, build, calibrate, compare, deploy, gate, quantize, sensitivity, study
    from trtq.calibration.table import Table
    from trtq.data.memory import Data
    from trtq.errors import InputError, MissingBackendError, TrtqError, TrtqWarning
    from trtq.gate.verdict import Verdict
    from trtq.pipeline import Deployment
    from trtq.recipe import Recipe

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("bench", "build", "calibrate", "compare", "deploy", "gate"), "trtq.api"),
    **dict.fromkeys(("quantize", "sensitivity", "study"), "trtq.api"),
    **dict.fromkeys(("InputError", "MissingBackendError", "TrtqError", "TrtqWarning"), "trtq.errors"),
    "Data": "trtq.data.memory",
    "Deployment": "trtq.pipeline",
    "Recipe": "trtq.recipe",
    "Table": "trtq.calibration.table",
    "Verdict": "trtq.gate.verdict",
}

__all__ = [
    "Data",
    "Deployment",
    "InputError",
    "MissingBackendError",
    "Recipe",
    "Table",
    "TrtqError",
    "TrtqWarning",
    "Verdict",
    "__version__",
    "bench",
    "build",
    "calibrate",
    "compare",
    "deploy",
    "gate",
    "quantize",
    "sensitivity",
    "study",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trtq' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps what a program calls apart from modules of the same name: when `trtq.gate.verdict` is imported,
    `trtq.gate` is still the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
