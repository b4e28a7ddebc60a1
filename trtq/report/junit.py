"""A verdict as JUnit XML, which CI systems show test by test."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from trtq.escapes import xml_text
from trtq.files import write_json, write_text
from trtq.gate.verdict import Check, Outcome, Verdict


def write_verdict(folder: Path, verdict: Verdict) -> None:
    """Write `verdict.json` and `junit.xml` into a folder of results."""
    write_json(folder / "verdict.json", verdict.to_json())
    write_text(folder / "junit.xml", junit_xml(verdict))


def junit_xml(verdict: Verdict) -> str:
    """One test suite: the gate's test case, then one per check.

    A fail is a `failure`, what is inconclusive is `skipped`: the suite has failures, or else skipped cases,
    exactly where the verdict's outcome is not a pass. The gate's case carries the verdict's text, and every
    failure says what stands in the way. Characters that XML cannot hold become `?`.
    """
    suite = ElementTree.Element("testsuite", name="trtq")
    gate = Check(f"accuracy gate {verdict.metric}", verdict.gate, verdict.gate_line())
    in_the_way = "\n".join(verdict.in_the_way.lines()) if verdict.in_the_way else ""
    for check, text in (
        (gate, verdict.text()),
        *((check, f"{check.message}\n{in_the_way}".strip()) for check in verdict.checks),
    ):
        case = ElementTree.SubElement(suite, "testcase", classname="trtq", name=xml_text(check.name))
        if check.ok:
            ElementTree.SubElement(case, "system-out").text = xml_text(text)
        else:
            kind = "failure" if check.outcome is Outcome.FAIL else "skipped"
            ElementTree.SubElement(case, kind, message=xml_text(check.message)).text = xml_text(text)
    for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
        suite.set(attribute, str(sum(1 for _ in suite.iter(tag))))
    suite.set("errors", "0")
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"
