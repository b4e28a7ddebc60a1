"""The names of TensorRT's API that modules use: how they are found, and those of what runs engines."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trtq.backends

MODULES = ("runner.py", "loading.py")
CLASSES = {
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "runtime_config": "IRuntimeConfig",
    "context": "IExecutionContext",
    "cache": "IRuntimeCache",
    "refitter": "Refitter",
    "weights": "OnnxParserRefitter",
}
"""Name of a variable or attribute in those modules -> the class it is of."""

RTX_ONLY = {
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "EngineInvalidityDiagnostics",
    "EngineValidity",
    "EngineValidity.INVALID",
    "ICudaEngine.create_runtime_config",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache",
    "Runtime.engine_header_size",
    "Runtime.get_engine_validity",
}
NOT_BEFORE_10 = {
    "ICudaEngine.get_tensor_profile_values",
    "OnnxParserRefitter",
    "OnnxParserRefitter.get_error",
    "OnnxParserRefitter.num_errors",
    "OnnxParserRefitter.refit_from_file",
}


def used_names(modules: Sequence[str] = MODULES, classes: Mapping[str, str] = CLASSES) -> set[str]:
    """Dotted names below the module, attributes of what `classes` names, and methods called by their name."""
    folder, names = Path(trtq.backends.__file__).parent, set()
    for module in modules:
        for node in ast.walk(ast.parse((folder / module).read_text())):
            if isinstance(node, ast.Attribute):
                names |= _name_of(node, classes)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "self._succeed":
                names.add(f"IExecutionContext.{ast.literal_eval(node.args[0])}")
    return {name for name in names if "__" not in name}


def _name_of(node: ast.Attribute, classes: Mapping[str, str]) -> set[str]:
    variable, *attributes = ast.unparse(node).partition("(")[0].removeprefix("self._").split(".")
    if variable == "trt" and attributes:
        return {attributes[0], ".".join(attributes[:2])}
    if variable in classes and len(attributes) == 1:
        return {f"{classes[variable]}.{attributes[0]}"}
    return set()


def exists(trt: Any, name: str) -> bool:
    """Whether a module has a dotted name."""
    found = trt
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not None
