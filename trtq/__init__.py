"""trtq: INT8 deployment for TensorRT, from a trained ONNX model to an engine whose accuracy is proved.

`deploy(Recipe(...))` runs the whole workflow; its steps are functions of `trtq.pipeline`. Importing the
package is quick: nothing heavy is loaded before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtq.errors import TrtqError
    from trtq.pipeline import Deployment, deploy
    from trtq.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Deployment", "Recipe", "TrtqError", "__version__", "deploy"]

_HOMES = {
    "Deployment": "trtq.pipeline",
    "Recipe": "trtq.recipe",
    "TrtqError": "trtq.errors",
    "deploy": "trtq.pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trtq' has no attribute '{name}'")
