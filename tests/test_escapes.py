"""What others wrote is shown and not obeyed: on a terminal, in XML and in HTML."""

from __future__ import annotations

import ast
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import Case, trtq_command

import trtq
from trtq.escapes import printable, xml_text

EVIL = "\x1b]0;owned\x07\x9b31m\r\u202e<b>"


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_printable_leaves_nothing_to_obey(text: str) -> None:
    shown = printable(text)
    assert not any(ord(c) < 32 and c not in "\t\n" for c in shown)
    assert not any(0x7F <= ord(c) < 0xA0 for c in shown)
    assert printable(shown) == shown
    shown.encode()


def test_printable_by_hand() -> None:
    assert printable("a\tb\n\x1b[31m é 日本") == "a\tb\n\\x1b[31m é 日本"
    assert printable("\r\x9b\udcff\u202e") == "\\r\\x9b\\udcff\\u202e"


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=())))
def test_xml_text_is_xml(text: str) -> None:
    element = ElementTree.Element("a")
    element.text = xml_text(text)
    ElementTree.fromstring(ElementTree.tostring(element, encoding="unicode"))


def test_every_command_prints_what_is_printable() -> None:
    """A bare `print` in a command is of JSON, which has no control characters, `printable` or fixed text."""
    for path in (Path(trtq.__file__).parent / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                assert ast.unparse(node.args[0]).startswith(("json.dumps(", "printable(", "'trtq: ")), path


@pytest.mark.parametrize("rename", ["node", "tensor", "output"])
def test_names_of_a_model_are_shown_by_no_command_as_they_are(
    rename: str, small: Case, tmp_path: Path
) -> None:
    import onnx

    model = onnx.load(small.model)
    nodes = model.graph.node
    if rename == "node":
        nodes[0].name = EVIL
    elif rename == "tensor":
        nodes[0].output[0] = nodes[1].input[0] = EVIL
    else:
        nodes[-1].output[0] = model.graph.output[0].name = EVIL
    onnx.save(model, path := tmp_path / "model.onnx")
    data = ("--data", small.data, "--method", "max")
    gate = ("gate", path, path, "--eval", small.data, "--metric", "cosine", "--junit", tmp_path / "junit.xml")
    runs = [
        trtq_command("inspect", path),
        trtq_command("inspect", path, "--json"),
        trtq_command("quantize", path, *data, "-o", tmp_path / "int8.onnx"),
        trtq_command("quantize", path, *data, "--exclude", EVIL, "-o", tmp_path / "int8.onnx"),
        trtq_command("calibrate", path, *data, "-o", tmp_path / EVIL),
        trtq_command(*gate),
        trtq_command("inspect", tmp_path / EVIL),
    ]
    for run in runs:
        assert all(character.isprintable() or character == "\n" for character in run.out + run.err)
    ElementTree.parse(tmp_path / "junit.xml")
