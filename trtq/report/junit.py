"""A verdict as JUnit XML, which CI systems show test by test."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple
from xml.etree import ElementTree

from trtq.gate.verdict import Outcome, Verdict

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Check(NamedTuple):
    """One more thing to report beside the gate."""

    name: str
    ok: bool
    message: str = ""


def junit_xml(verdict: Verdict, checks: Iterable[Check] = ()) -> str:
    """One test suite: the gate's test case, then one per check.

    A fail is a `failure`, an inconclusive gate is `skipped`; both carry the verdict's text, which
    is the test case's output otherwise. Characters that XML cannot hold become `?`.
    """
    suite = ElementTree.Element("testsuite", name="trtq")
    text = verdict.text()
    summary = text.splitlines()[0]
    case = _case(suite, f"accuracy gate {verdict.metric}")
    if verdict.outcome is Outcome.FAIL:
        _result(case, "failure", summary, text)
    elif verdict.outcome is Outcome.INCONCLUSIVE:
        _result(case, "skipped", summary, text)
    else:
        ElementTree.SubElement(case, "system-out").text = _clean(text)
    for name, ok, message in checks:
        case = _case(suite, name)
        if not ok:
            _result(case, "failure", message, message)
    for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
        suite.set(attribute, str(sum(1 for _ in suite.iter(tag))))
    suite.set("errors", "0")
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _case(suite: ElementTree.Element, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname="trtq", name=_clean(name))


def _result(case: ElementTree.Element, kind: str, message: str, text: str) -> None:
    ElementTree.SubElement(case, kind, message=_clean(message)).text = _clean(text)


def _clean(text: str) -> str:
    return _NOT_XML.sub("?", text)
