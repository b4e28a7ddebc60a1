"""The names of TensorRT's API in the snippet that the documentation runs an engine with."""

from __future__ import annotations

import ast
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "result.md"
CLASSES = {"runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext"}
"""Name of a variable in the snippet -> the class it is of."""


def snippet_names() -> set[str]:
    """Dotted names below the module."""
    snippet = PAGE.read_text().partition("<!-- runtime -->")[2].split("```")[1].partition("\n")[2]
    names = set()
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.Attribute):
            variable, _, attributes = ast.unparse(node).partition(".")
            if variable == "trt":
                names.add(attributes)
            elif variable in CLASSES:
                names.add(f"{CLASSES[variable]}.{attributes}")
    return names
